//! A pid used twice: a child exits and is reaped, another is made with the same pid by clone3 at once. The second
//! ends with stdin.

use jobwarden_tests::shape::{bounded, fork, fork_as, linger, number, say, step, wait};

fn main() {
    bounded();
    for _ in 0..number(1, 1) {
        let first = fork(|| 11);
        let status = wait(first);
        match fork_as(first, || {
            step();
            12
        }) {
            Ok(second) => {
                say("first_status", status);
                say("pid", second);
                say("second_status", wait(second));
            }
            Err(e) => say("failed", e),
        }
    }
    say("done", 1);
    linger();
}
