//! The last signals that the probes saw, whoever sent them: a ring of fixed size. `why` asks it, and an exit by signal
//! finds its sender here.

use std::collections::VecDeque;

use crate::model::event::{Comm, Sender, SignalResult};
use crate::model::key::Key;

/// One signal, with the names that sender and target had then: either may be gone when it is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Signal {
    pub(crate) at: u64,
    pub(crate) sender: Sender,
    /// It was a probe of ours: `sender` means nothing.
    pub(crate) probe: bool,
    pub(crate) sender_comm: Comm,
    pub(crate) target: Key,
    pub(crate) target_comm: Comm,
    pub(crate) number: u8,
    pub(crate) result: SignalResult,
    /// The one before it to the same target; 0 = none.
    pub(super) prev: u32,
}

impl Signal {
    /// Only who sent it.
    pub(crate) fn by(sender: Sender) -> Self {
        Self { sender, ..Self::default() }
    }

    pub(crate) fn sender_key(&self) -> Option<Key> {
        match self.sender {
            _ if self.probe => None,
            Sender::Process(k) | Sender::ParentDeath(k) => Some(k),
            Sender::Timer | Sender::Kernel => None,
        }
    }
}

/// Numbers begin at 1; the oldest one kept is `next - ring.len()`.
#[derive(Debug)]
pub(crate) struct Signals {
    ring: VecDeque<Signal>,
    next: u32,
    max: usize,
    pub(crate) evicted: u64,
}

/// How many signals to one target are looked through for the one that killed it.
const BACK: usize = 16;

impl Signals {
    pub(crate) fn new(max: usize) -> Self {
        Self { ring: VecDeque::new(), next: 1, max: max.max(1), evicted: 0 }
    }

    /// Returns its number, which the target keeps as its newest.
    pub(crate) fn push(&mut self, mut s: Signal, prev: u32) -> u32 {
        if self.ring.len() == self.max {
            self.ring.pop_front();
            self.evicted += 1;
        }
        s.prev = prev;
        self.ring.push_back(s);
        let n = self.next;
        // After four thousand million signals the numbers begin again; a chain that reaches back that far ends there.
        self.next = self.next.checked_add(1).unwrap_or(1);
        n
    }

    fn get(&self, n: u32) -> Option<&Signal> {
        let back = self.next.checked_sub(n)? as usize;
        if n == 0 || back == 0 { None } else { self.ring.get(self.ring.len().checked_sub(back)?) }
    }

    /// The newest signal `number` that reached the target whose newest is `from`.
    pub(crate) fn last(&self, from: u32, target: Key, number: u8) -> Option<&Signal> {
        let mut n = from;
        for _ in 0..BACK {
            let s = self.get(n).filter(|s| s.target == target)?;
            // An overflow or lost info still delivers a plain signal.
            let arrived = !matches!(s.result, SignalResult::Ignored | SignalResult::AlreadyPending);
            if s.number == number && arrived {
                return Some(s);
            }
            n = s.prev;
        }
        None
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Signal> {
        self.ring.iter()
    }

    pub(crate) fn len(&self) -> usize {
        self.ring.len()
    }

    pub(crate) fn max(&self) -> usize {
        self.max
    }
}

impl Default for Signal {
    fn default() -> Self {
        Self {
            at: 0,
            sender: Sender::Kernel,
            probe: false,
            sender_comm: Comm::default(),
            target: Key::default(),
            target_comm: Comm::default(),
            number: 0,
            result: SignalResult::Delivered,
            prev: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_killer_is_the_last_that_arrived_and_old_ones_fall_out() {
        let mut log = Signals::new(3);
        let target = Key::new(1, 1);
        let sig = |at, number, result| Signal { at, target, number, result, ..Signal::default() };
        let n = log.push(sig(1, 15, SignalResult::Delivered), 0);
        let n = log.push(sig(2, 15, SignalResult::Ignored), n);
        assert_eq!(log.last(n, target, 15).map(|s| s.at), Some(1));
        assert_eq!(log.last(n, target, 9), None);
        assert_eq!(log.last(n, Key::new(1, 2), 15), None);
        let n = log.push(sig(3, 2, SignalResult::Delivered), n);
        let n = log.push(sig(4, 2, SignalResult::Delivered), n);
        assert_eq!(log.last(n, target, 15), None);
        assert_eq!((log.len(), log.evicted), (3, 1));
        assert_eq!(log.last(n, target, 2).map(|s| s.at), Some(4));
    }
}
