//! A process stuck in its exit: the init of a pid namespace cannot finish exiting while somebody else's unreaped
//! child is in it (zap_pid_ns_processes, kernel/pid_namespace.c). On a step that child is reaped, and all go on.

use jobwarden_tests::shape::{bounded, fork, pipe, quit, read_byte, say, send_byte, step, wait, wait_death};

/// Enters `init`'s pid namespace for the children to come.
fn enter(init: i32) -> bool {
    let Ok(ns) = std::fs::File::open(format!("/proc/{init}/ns/pid")) else { return false };
    // SAFETY: a valid descriptor.
    unsafe { libc::setns(std::os::fd::AsRawFd::as_raw_fd(&ns), libc::CLONE_NEWPID) == 0 }
}

fn main() {
    bounded();
    let (go, start) = pipe();
    let (told, tell) = pipe();
    // The one who makes the namespace is a process of its own, so that this one's children stay outside.
    let maker = fork(|| {
        // SAFETY: no memory effects.
        if unsafe { libc::unshare(libc::CLONE_NEWPID) } != 0 {
            say("failed", std::io::Error::last_os_error());
            return 1;
        }
        let init = fork(|| {
            let _ = read_byte(go);
            8
        });
        say("init", init);
        // SAFETY: four valid bytes.
        unsafe { libc::write(tell, (&raw const init).cast(), 4) };
        say("init_status", wait(init));
        0
    });
    let mut init = 0i32;
    // SAFETY: room for four bytes; the maker writes them at once.
    if unsafe { libc::read(told, (&raw mut init).cast(), 4) } != 4 {
        quit(1);
    }
    say("maker", maker);
    let intruder = fork(|| {
        if !enter(init) {
            say("failed", std::io::Error::last_os_error());
            return 1;
        }
        let zombie = fork(|| 0);
        wait_death(zombie);
        say("zombie", zombie);
        send_byte(tell);
        step();
        say("zombie_status", wait(zombie));
        0
    });
    say("intruder", intruder);
    let _ = read_byte(told);
    send_byte(start);
    say("stuck", 1);
    let _ = (wait(intruder), wait(maker));
    say("over", 1);
    step();
}
