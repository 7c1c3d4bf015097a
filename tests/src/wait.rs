//! Time in tests: how long to wait here, and what a test says past the harness's capture.

use std::io::Write as _;
use std::time::{Duration, Instant};

/// Writes a line to stderr past the test harness's capture.
pub fn loudly(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// How many times longer things may take here (`JWTEST_SLOW`): what `cargo xtask test` measures, and 20 in a VM
/// under software emulation.
#[must_use]
pub fn slow() -> u32 {
    rounds("JWTEST_SLOW", 1).clamp(1, 100) as u32
}

/// `ms` milliseconds, longer where the machine is slow.
#[must_use]
pub fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms) * slow()
}

/// A time that the contract promises. On a slow machine it is longer too, as [`ms`], but not silently: a line names the promise
/// and what it became, and `cargo xtask test` repeats it in its summary.
#[must_use]
pub fn promised(what: &str, ms: u64) -> Duration {
    let (kept, slow) = (Duration::from_millis(ms), slow());
    if slow > 1 {
        loudly(&format!("SCALED: {what}: {kept:?}, here {:?} (JWTEST_SLOW={slow})", kept * slow));
    }
    kept * slow
}

/// Lets things happen that take no answer: far less longer on a slow machine than a deadline is.
pub fn pause(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms) * slow().min(3));
}

/// A number from the environment: rounds of the long tests.
#[must_use]
pub fn rounds(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|s| s.parse().ok()).unwrap_or(default)
}

/// Asks again until there is an answer; what the last attempt said is in the error.
pub fn eventually<T>(
    what: &str,
    within: Duration,
    mut ask: impl FnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let end = Instant::now() + within;
    let mut pause = Duration::from_millis(5);
    loop {
        match ask() {
            Ok(t) => return Ok(t),
            Err(e) if Instant::now() >= end => {
                return Err(e.context(format!("{what}: not within {:.1} s", within.as_secs_f64())));
            }
            Err(_) => {
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(50));
            }
        }
    }
}
