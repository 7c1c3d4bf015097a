//! Small pieces that all the texts are made of.

use std::fmt::Write as _;
use std::time::SystemTime;

use crate::model::outside;
use crate::model::schema::{Exit, Ref};

/// Text that came over the socket, safe on a terminal.
#[must_use]
pub fn escape(text: &str) -> String {
    outside::escape(text).into_owned()
}

/// `4110 (python3)`.
#[must_use]
pub fn process(r: &Ref) -> String {
    name(r.pid, &r.comm)
}

/// The same, of its parts.
#[must_use]
pub(super) fn name(pid: u32, comm: &impl std::fmt::Display) -> String {
    format!("{pid} ({comm})")
}

/// How it ended: `exit 1`, `killed by SIGTERM from 4110 (python3)`.
#[must_use]
pub fn exit(e: &Exit) -> String {
    match e {
        Exit::Code { code } => format!("exit {code}"),
        Exit::Signal { signal, core, sender } => {
            let mut out = format!("killed by {}", escape(signal));
            if *core {
                out.push_str(" (core dumped)");
            }
            if let Some(s) = sender {
                let _ = write!(out, " from {}", process(s));
            }
            out
        }
    }
}

/// Seconds in at most two units: `0.4s`, `42s`, `3m12s`, `2h05m`, `3d4h`.
#[must_use]
pub fn age(seconds: f64) -> String {
    // NaN becomes 0.
    let s = seconds.max(0.0);
    if s < 9.95 {
        return format!("{s:.1}s");
    }
    let s = s as u64;
    match (s / 86_400, s / 3600, s / 60) {
        (0, 0, 0) => format!("{s}s"),
        (0, 0, m) => format!("{m}m{:02}s", s % 60),
        (0, h, m) => format!("{h}h{:02}m", m % 60),
        (d, h, _) => format!("{d}d{:02}h", h % 24),
    }
}

/// A point in time of the contract.
#[must_use]
pub fn wall(rfc3339: &str) -> Option<SystemTime> {
    humantime::parse_rfc3339(rfc3339).ok()
}

/// Seconds from `from` to `to`, both RFC 3339; negative if `to` is earlier.
#[must_use]
pub(super) fn between(from: &str, to: SystemTime) -> Option<f64> {
    let from = wall(from)?;
    Some(match to.duration_since(from) {
        Ok(d) => d.as_secs_f64(),
        Err(e) => -e.duration().as_secs_f64(),
    })
}

/// `4 processes`, `1 process`.
#[must_use]
pub(super) fn count(n: usize, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
}

/// Only the time of day, of an RFC 3339 time in UTC.
#[must_use]
pub(super) fn clock(rfc3339: &str) -> String {
    escape(rfc3339.split_once('T').map_or(rfc3339, |(_, t)| t.trim_end_matches('Z')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_have_two_units() {
        for (s, t) in [
            (f64::NAN, "0.0s"),
            (-1.0, "0.0s"),
            (0.44, "0.4s"),
            (9.96, "9s"),
            (59.9, "59s"),
            (192.0, "3m12s"),
            (7500.0, "2h05m"),
            (273_600.0, "3d04h"),
        ] {
            assert_eq!(age(s), t);
        }
    }
}
