//! A daemon by double fork and setsid: the one in the middle is reaped, the daemon is adopted. It ends with stdin.

use jobwarden_tests::shape::{bounded, fork, linger, nap, pid, ppid, say, setsid, step, wait};

fn main() {
    bounded();
    let middle = fork(|| {
        setsid();
        let me = pid();
        fork(move || {
            while ppid() == me {
                nap(1);
            }
            say("adopter", ppid());
            say("daemon", pid());
            linger();
            0
        });
        0
    });
    say("middle", middle);
    say("status", wait(middle));
    step();
}
