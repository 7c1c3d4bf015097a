//! A parent that leaves a child behind on a step, exiting 0; the child ends with stdin.

use jobwarden_tests::shape::{bounded, fork, linger, say, step};

fn main() {
    bounded();
    let child = fork(|| {
        linger();
        0
    });
    say("child", child);
    step();
}
