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
pub(super) struct Timers {
    heap: BinaryHeap<Reverse<(u64, Timer)>>,
    /// While the due timers run: the earliest time for a new one, 1 ns after that tick.
    floor: u64,
}

impl Timers {
    /// A timer that sets another one cannot keep a tick from ending: the new one waits for a later tick, whatever time is asked for.
    pub(super) fn set(&mut self, at: u64, t: Timer) {
        self.heap.push(Reverse((at.max(self.floor), t)));
    }

    pub(super) fn next(&self) -> Option<u64> {
        self.heap.peek().map(|Reverse((at, _))| *at)
    }

    /// The earliest that is due. Call it until it returns None, which ends the tick.
    pub(super) fn due(&mut self, now: u64) -> Option<Timer> {
        if self.next().is_none_or(|at| at > now) {
            self.floor = 0;
            return None;
        }
        self.floor = now.saturating_add(1);
        self.heap.pop().map(|Reverse((_, t))| t)
    }

    pub(super) fn len(&self) -> usize {
        self.heap.len()
    }
}
