//! The incident: a worker reads a pipe to its end before it waits; its child is dead, and a grandchild still holds
//! the write end. When the grandchild ends (with stdin, or killed), the worker reads the end and reaps.

use jobwarden_tests::shape::{
    bounded, close, fork, linger, nap, pid, pipe, ppid, read_byte, say, wait, wait_death,
};

fn main() {
    bounded();
    let (read, write) = pipe();
    let command = fork(|| {
        close(read);
        let me = pid();
        let helper = fork(move || {
            while ppid() == me {
                nap(1);
            }
            linger();
            0
        });
        say("holder", helper);
        0
    });
    close(write);
    wait_death(command);
    say("command", command);
    while read_byte(read).is_some() {}
    say("status", wait(command));
    linger();
}
