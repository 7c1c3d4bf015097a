//! A parent, a child, a grandchild; on a step the child exits 7 and is reaped.

use jobwarden_tests::shape::{bounded, fork, say, step, wait};

fn main() {
    bounded();
    let child = fork(|| {
        let grandchild = fork(|| {
            step();
            3
        });
        say("grandchild", grandchild);
        say("grandchild_status", wait(grandchild));
        7
    });
    say("child", child);
    say("status", wait(child));
    step();
}
