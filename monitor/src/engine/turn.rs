//! What the parts of the engine share while one input is handled: the time, the timers, the output.

use std::time::Duration;

use super::output::{Change, Effect, Output};
use super::timers::{Timer, Timers};

pub(super) const MS: u64 = 1_000_000;
pub(super) const SECOND: u64 = 1_000 * MS;
/// A zombie or an orphan is a pending alert once it has stayed for this long; most are gone by then.
pub(super) const PENDING: u64 = SECOND;

pub(super) fn nanos(d: Duration) -> u64 {
    u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)
}

/// One input under way.
pub(super) struct Turn<'a> {
    /// Boot-time ns.
    pub(super) now: u64,
    pub(super) timers: &'a mut Timers,
    pub(super) out: &'a mut Output,
}

impl Turn<'_> {
    pub(super) fn effect(&mut self, e: Effect) {
        self.out.effects.push(e);
    }

    pub(super) fn change(&mut self, c: Change) {
        self.out.changes.push(c);
    }

    pub(super) fn set(&mut self, at: u64, t: Timer) {
        self.timers.set(at, t);
    }
}
