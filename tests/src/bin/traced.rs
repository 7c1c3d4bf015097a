//! A process held by its tracer in a stop that SIGKILL does not end (PTRACE_O_TRACEEXIT). When stdin is closed the
//! tracer exits, and with it goes what it held. With `plain` the tracer only traces: SIGKILL ends the other, and its zombie
//! is the tracer's.

use jobwarden_tests::shape::{bounded, fork, linger, nap, say, wait};

fn main() {
    bounded();
    let plain = std::env::args().nth(1).as_deref() == Some("plain");
    let options = libc::PTRACE_O_EXITKILL | if plain { 0 } else { libc::PTRACE_O_TRACEEXIT };
    let held = fork(|| {
        loop {
            nap(60_000);
        }
    });
    let tracer = fork(move || {
        // SAFETY: PTRACE_SEIZE takes no pointers but the options as a number.
        let seized = unsafe { libc::ptrace(libc::PTRACE_SEIZE, held, 0, libc::c_long::from(options)) };
        if seized != 0 {
            say("failed", std::io::Error::last_os_error());
            return 1;
        }
        say("tracer", jobwarden_tests::shape::pid());
        linger();
        0
    });
    say("held", held);
    let _ = (wait(tracer), wait(held));
    linger();
}
