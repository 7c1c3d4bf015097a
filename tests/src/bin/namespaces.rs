//! A member that moves to a pid and user namespace of its own; the init there ignores every signal, and so does its child.

use jobwarden_tests::shape::{bounded, disposition, fork, nap, say, wait};

fn main() {
    bounded();
    let mover = fork(|| {
        // SAFETY: no memory effects.
        if unsafe { libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWPID) } != 0 {
            say("failed", std::io::Error::last_os_error());
            return 1;
        }
        let init = fork(|| {
            disposition(libc::SIGTERM, libc::SIG_IGN);
            fork(|| {
                disposition(libc::SIGTERM, libc::SIG_IGN);
                loop {
                    nap(60_000);
                }
            });
            loop {
                nap(60_000);
            }
        });
        say("init", init);
        wait(init)
    });
    say("mover", mover);
    let _ = wait(mover);
}
