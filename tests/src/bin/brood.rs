//! At each step a child forks one of its own and exits: an orphan, that ends with stdin. The parent stays and reaps.

use jobwarden_tests::shape::{bounded, fork, linger, say, step, wait};

fn main() {
    bounded();
    loop {
        let middle = fork(|| {
            let orphan = fork(|| {
                linger();
                0
            });
            say("orphan", orphan);
            0
        });
        let _ = wait(middle);
        say("middle", middle);
        step();
    }
}
