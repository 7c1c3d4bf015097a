//! Renames itself by prctl on a step.

use jobwarden_tests::shape::{bounded, say, set_name, step};

fn main() {
    bounded();
    say("ready", 1);
    step();
    let name = std::env::args().nth(1).unwrap_or_default();
    set_name(&name);
    say("renamed", name);
    step();
}
