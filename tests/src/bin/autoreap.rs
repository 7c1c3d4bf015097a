//! SIGCHLD ignored: a child that exits is never a zombie.

use jobwarden_tests::shape::{bounded, disposition, fork, say, step, wait};

fn main() {
    bounded();
    disposition(libc::SIGCHLD, libc::SIG_IGN);
    let child = fork(|| {
        step();
        6
    });
    say("child", child);
    // With SIGCHLD ignored wait(2) returns ECHILD when the last child is gone, and no status.
    say("status", wait(child));
    step();
}
