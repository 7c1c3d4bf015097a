//! Scenarios on the running kernel: the real agent, the real commands, a helper program for each lifecycle shape, and
//! the kernel's own answers (`waitpid`, /proc) to compare with.
//!
//! Nothing here mocks anything. A test that cannot run says so loudly ([`skip!`]) and names itself. All that a test
//! starts carries a random token in its environment and its argv; only what carries it is ever signalled.

pub mod agent;
pub mod alerts;
pub mod disk;
pub mod events;
pub mod exec;
pub mod fixture;
pub mod kill;
pub mod limit;
pub mod metrics;
pub mod mutate;
pub mod shape;
pub mod truth;

use std::io::Write as _;
use std::time::{Duration, Instant};

pub use agent::{Agent, Output};
pub use events::Events;
pub use fixture::{Fixture, Shape};
pub use limit::Limit;
pub use metrics::Metrics;

/// `skip!("test: why")`: ends a test that cannot run here, loudly.
#[macro_export]
macro_rules! skip {
    ($($arg:tt)*) => {{
        $crate::loudly(&format!("SKIPPED: {}", format_args!($($arg)*)));
        return Ok(());
    }};
}

/// The ground of a test that needs root and BPF; skips the test where there is none.
#[macro_export]
macro_rules! fixture {
    ($test:expr) => {
        match $crate::fixture::missing() {
            Some(why) => $crate::skip!("{}: {why}", $test),
            None => $crate::Fixture::new($test)?,
        }
    };
}

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
