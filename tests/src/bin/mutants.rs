//! A family that changes all the time, by chance: forks, sessions of its own, double forks, exits, ignored signals. At most
//! N at a time in each branch, for SECONDS after the start.

use std::time::Instant;

use jobwarden_tests::shape::{bounded, disposition, fork, nap, number, pid, say, setsid};

struct Chance(u64);

impl Chance {
    fn below(&mut self, n: u64) -> u64 {
        // xorshift64
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

fn live(depth: u64, until: Instant) -> i32 {
    let seed: u64 = pid().unsigned_abs().into();
    let mut chance = Chance(seed ^ 0x9e37_79b9_7f4a_7c15);
    if chance.below(2) == 0 {
        disposition(libc::SIGTERM, libc::SIG_IGN);
    }
    disposition(libc::SIGCHLD, libc::SIG_IGN);
    let mut forks = 0;
    while Instant::now() < until {
        nap(chance.below(8));
        match chance.below(8) {
            0 => {
                setsid();
            }
            1 if depth > 2 => return 0,
            // A daemon: this one goes on as the forked, and who forked it leaves.
            // SAFETY: one thread.
            2 if depth > 1 && unsafe { libc::fork() } > 0 => return 0,
            3..=5 if depth < 5 && forks < 3 => {
                forks += 1;
                fork(|| live(depth + 1, until));
            }
            _ => {}
        }
    }
    0
}

fn main() {
    bounded();
    let until = Instant::now() + std::time::Duration::from_secs(number(2, 5));
    for _ in 0..number(1, 4) {
        fork(|| live(1, until));
    }
    say("started", 1);
    live(0, until);
}
