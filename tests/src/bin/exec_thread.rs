//! A thread that is not the leader execs: it gets the leader's pid, and the process goes on under its old identity.
//! With `leader-gone` the leader has exited before.

use jobwarden_tests::shape::{bounded, exec, nap, own_path, pid, say, step};

fn main() {
    bounded();
    let args: Vec<String> = std::env::args().collect();
    if args.iter().any(|a| a == "after") {
        say("after", pid());
        step();
        return;
    }
    say("before", pid());
    let tag = args.last().cloned().unwrap_or_default();
    // /proc/self/exe is the leader's, and gone with it.
    let path = own_path();
    std::thread::spawn(move || {
        // SAFETY: no effects.
        say("thread", unsafe { libc::gettid() });
        step();
        exec(&path, &["exec-thread", "after", &tag]);
    });
    if args.iter().any(|a| a == "leader-gone") {
        // SAFETY: ends the leader alone; the other thread owns what it uses.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
    }
    loop {
        nap(1000);
    }
}
