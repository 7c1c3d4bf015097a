//! A child that its parent kills on a step, with the signal given as the first argument.

use jobwarden_tests::shape::{bounded, fork, kill, linger, number, say, step, wait};

fn main() {
    bounded();
    let signal = number(1, 15) as i32;
    let child = fork(|| {
        linger();
        0
    });
    say("child", child);
    step();
    kill(child, signal);
    say("status", wait(child));
    step();
}
