//! A child that clones with CLONE_PARENT: the newcomer's lineage parent is the child, its parent is the program.

use jobwarden_tests::shape::{bounded, clone, fork, ppid, say, step, wait};

fn main() {
    bounded();
    let forker = fork(|| {
        let sibling = clone(libc::CLONE_PARENT, || {
            say("sibling_ppid", ppid());
            step();
            4
        });
        say("sibling", sibling);
        step();
        2
    });
    say("forker", forker);
    // Either may take the first step.
    let first = wait(-1);
    say("first_status", first);
    let second = wait(-1);
    say("second_status", second);
    step();
}
