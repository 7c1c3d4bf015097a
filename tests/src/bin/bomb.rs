//! Processes that multiply as fast as they can, until SECONDS after the start: `chains N SECONDS` keeps N chains in which
//! each process forks one successor and exits; `tree LIMIT SECONDS` forks wherever it may. Both are to be run under a
//! `pids` limit.

use std::time::Duration;

use jobwarden_tests::shape::{bounded, disposition, fork, nap, number, prctl, quit, say, setsid};

fn now() -> Duration {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a valid timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut t) };
    Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
}

/// The forked one goes on: 0; -1 where it may not.
fn raw_fork() -> libc::pid_t {
    // SAFETY: one thread.
    unsafe { libc::fork() }
}

fn chain(until: Duration) -> i32 {
    let mut generation = 0u32;
    while now() < until {
        if raw_fork() > 0 {
            quit(0);
        }
        generation += 1;
        if generation.is_multiple_of(3) {
            setsid();
        }
    }
    0
}

fn tree(until: Duration) -> i32 {
    while now() < until {
        if raw_fork() < 0 {
            nap(1);
        }
    }
    0
}

fn main() {
    bounded();
    let until = now() + Duration::from_secs(number(3, 5));
    disposition(libc::SIGTERM, libc::SIG_IGN);
    // Who adopts the dead of the chains reaps them at once, or they use up the host's pids.
    disposition(libc::SIGCHLD, libc::SIG_IGN);
    if !prctl(libc::PR_SET_CHILD_SUBREAPER, 1) {
        return;
    }
    let n = number(2, 20);
    if std::env::args().nth(1).as_deref() == Some("chains") {
        for _ in 0..n {
            fork(|| chain(until));
        }
    } else {
        for _ in 0..2 {
            fork(|| tree(until));
        }
    }
    say("started", n);
    while now() < until {
        nap(20);
    }
}
