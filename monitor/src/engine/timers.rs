//! What is due when. A heap: setting one costs O(log n), a tick costs only what is due. Nothing is ever taken out: a timer
//! whose reason has gone finds that out when it goes off.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::forest::Idx;
use crate::model::key::Key;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Timer {
    /// A look at a process that is exiting, or whose children wait for an adopter. The node and its generation.
    Look(Idx, u32),
    /// The zombies of this parent.
    Zombies(Key),
    /// The orphans of the job with this number.
    Orphans(u64),
    /// The deadline of the job with this number.
    Deadline(u64),
    /// A job that is empty has ended, unless a member has turned up.
    Ended(u64),
    /// A job that has ended is forgotten.
    Forget(u64),
    /// The last loss is long enough ago.
    LossOver,
    /// `enforcement --for` ends.
    EnforcementOver,
    /// The alert in this slot: an update that was held back, or a resolve after flapping.
    Alert(u64),
    /// Whether a store that was full has room again.
    Capacity,
    /// Names of jobs that are idle are no longer shown.
    Names,
    /// Facts that a scan waits for have not come.
    Scan,
}

#[derive(Debug, Default)]
pub(super) struct Timers(BinaryHeap<Reverse<(u64, Timer)>>);

impl Timers {
    pub(super) fn set(&mut self, at: u64, t: Timer) {
        self.0.push(Reverse((at, t)));
    }

    pub(super) fn next(&self) -> Option<u64> {
        self.0.peek().map(|Reverse((at, _))| *at)
    }

    /// All that are due at `now`, earliest first. What is set while they run waits for the next call, so a timer that sets itself
    /// for the same time cannot keep a tick from ending.
    pub(super) fn take_due(&mut self, now: u64) -> Vec<Timer> {
        let mut due = Vec::new();
        while let Some(Reverse((_, t))) = self.0.peek().filter(|Reverse((at, _))| *at <= now) {
            due.push(*t);
            self.0.pop();
        }
        due
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}
