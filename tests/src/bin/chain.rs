//! Each process forks one successor and exits, N times over; the last ends with stdin.

use jobwarden_tests::shape::{bounded, fork, linger, number, pid, say};

fn main() {
    bounded();
    for _ in 0..number(1, 100) {
        let mut heir = false;
        // The forked one goes on in this loop, so it must not be ended by `fork` itself.
        // SAFETY: one thread.
        match unsafe { libc::fork() } {
            0 => {
                bounded();
                heir = true;
            }
            -1 => say("failed", std::io::Error::last_os_error()),
            _ => {}
        }
        if !heir {
            return;
        }
    }
    let last = fork(|| {
        linger();
        0
    });
    say("last", last);
    say("parent", pid());
    linger();
}
