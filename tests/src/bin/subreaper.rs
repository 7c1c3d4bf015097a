//! A subreaper adopts the grandchild whose parent exits 9 on a step. The grandchild ends with stdin.

use jobwarden_tests::shape::{bounded, fork, linger, nap, pid, ppid, prctl, say, step, wait};

fn main() {
    bounded();
    if !prctl(libc::PR_SET_CHILD_SUBREAPER, 1) {
        return;
    }
    let parent = fork(|| {
        let me = pid();
        let grandchild = fork(move || {
            while ppid() == me {
                nap(1);
            }
            say("adopter", ppid());
            linger();
            0
        });
        say("grandchild", grandchild);
        step();
        9
    });
    say("parent", parent);
    say("status", wait(parent));
    linger();
    say("grandchild_status", wait(-1));
}
