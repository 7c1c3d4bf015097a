//! N children exit 3 and stay zombies; on a step they are reaped, on the next the program ends.

use jobwarden_tests::shape::{bounded, fork, number, say, step, wait, wait_death};

fn main() {
    bounded();
    let children: Vec<_> = (0..number(1, 1)).map(|_| fork(|| 3)).collect();
    for &child in &children {
        wait_death(child);
    }
    for child in &children {
        say("child", child);
    }
    say("dead", children.len());
    step();
    for &child in &children {
        say("status", wait(child));
    }
    say("reaped", children.len());
    step();
}
