//! A child in a session of its own, with a child there. Both end with stdin; so does the program.

use jobwarden_tests::shape::{bounded, fork, linger, say, setsid, wait};

fn main() {
    bounded();
    let child = fork(|| {
        setsid();
        let grandchild = fork(|| {
            linger();
            0
        });
        say("grandchild", grandchild);
        linger();
        wait(grandchild)
    });
    say("child", child);
    linger();
    say("status", wait(child));
}
