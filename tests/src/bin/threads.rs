//! Threads that come and go: none of them is a process.

use jobwarden_tests::shape::{bounded, number, say, step};

fn main() {
    bounded();
    let n = number(1, 50);
    let ids: Vec<_> = (0..n)
        .filter_map(|_| {
            std::thread::spawn(|| {
                // SAFETY: no effects.
                unsafe { libc::gettid() }
            })
            .join()
            .ok()
        })
        .collect();
    say("threads", ids.len());
    say("tids", ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(","));
    step();
}
