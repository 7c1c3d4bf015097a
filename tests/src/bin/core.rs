//! A child that dumps core (if the host lets it: its parent prints what waitpid said).

use jobwarden_tests::shape::{bounded, fork, say, step, wait};

fn main() {
    bounded();
    let child = fork(|| {
        let unlimited = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
        // SAFETY: a valid rlimit; abort ends the process.
        unsafe {
            libc::setrlimit(libc::RLIMIT_CORE, &raw const unlimited);
            libc::abort()
        }
    });
    say("child", child);
    say("status", wait(child));
    step();
}
