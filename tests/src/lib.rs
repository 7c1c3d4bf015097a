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
mod wait;

pub use agent::{Agent, Output};
pub use events::Events;
pub use fixture::{Fixture, Shape};
pub use limit::Limit;
pub use metrics::Metrics;
pub use wait::{eventually, loudly, ms, pause, promised, rounds, slow};

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
