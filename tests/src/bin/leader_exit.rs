//! The leader exits 3 and another thread lives on: `ps` shows Z, and nobody fails to reap anything. On a step the
//! thread ends the process with 7.

use jobwarden_tests::shape::{bounded, quit, say, step};

fn main() {
    bounded();
    std::thread::spawn(|| {
        // SAFETY: no effects.
        say("thread", unsafe { libc::gettid() });
        step();
        quit(7)
    });
    // SAFETY: ends the leader alone; the other thread owns what it uses.
    unsafe { libc::syscall(libc::SYS_exit, 3) };
}
