//! Which cgroup a process is in, known from its exec on. The exec record carries the id of its v2 group: the path that
//! belongs to it is read from /proc once, for the first process that comes with it. Where the id does not tell the path
//! (v1 and hybrid hosts) each is read, within a bound; what is refused there is read when it is needed.

use std::collections::HashMap;

use super::forest::{Fast, Flags, Forest, Idx, Str};
use super::output::Effect;
use super::proc_poll::Budget;
use super::turn::Turn;
use crate::model::key::Key;

/// Ids whose paths are kept; with more all are asked for again.
const KNOWN_MAX: usize = 4_096;
/// Ids that are asked for at one time, and processes that wait for each.
const ASKED_MAX: usize = 1_024;
const WAITING_MAX: usize = 256;

#[derive(Debug)]
pub(super) struct Cgroups {
    known: HashMap<u64, Str, Fast>,
    /// Asked for by one process; the others wait for its answer.
    asked: HashMap<u64, Vec<Key>, Fast>,
    budget: Budget,
}

impl Default for Cgroups {
    fn default() -> Self {
        Self { known: HashMap::default(), asked: HashMap::default(), budget: Budget::cgroups() }
    }
}

impl Cgroups {
    /// `key` has execed in the cgroup with this id (0: not told).
    pub(super) fn execed_in(&mut self, key: Key, id: u64, forest: &mut Forest, turn: &mut Turn<'_>) {
        let Some(i) = forest.find(key).filter(|&i| forest.node(i).alive()) else { return };
        if id == 0 || forest.node(i).flags.has(Flags::KERNEL) {
            return;
        }
        if let Some(&path) = self.known.get(&id) {
            return forest.in_cgroup(i, path);
        }
        let full = self.asked.len() >= ASKED_MAX;
        match self.asked.get_mut(&id) {
            Some(waiting) if waiting.len() < WAITING_MAX => waiting.push(key),
            Some(_) => {}
            None if full || !self.budget.take(turn.now) => {}
            None => {
                self.asked.insert(id, Vec::new());
                turn.effect(Effect::ReadCgroup { key, id });
            }
        }
    }

    pub(super) fn answered(
        &mut self,
        key: Key,
        id: u64,
        cgroup: Option<&str>,
        by_id: bool,
        forest: &mut Forest,
        turn: &mut Turn<'_>,
    ) {
        let mut waiting = self.asked.remove(&id).unwrap_or_default();
        if let Some(path) = cgroup {
            let path = forest.strings.intern(path.as_bytes());
            if let Some(i) = forest.find(key) {
                forest.in_cgroup(i, path);
            }
            if by_id {
                for i in waiting.drain(..).filter_map(|k| forest.find(k)).collect::<Vec<Idx>>() {
                    forest.in_cgroup(i, path);
                }
                self.keep(id, path, forest);
            }
            forest.strings.release(path);
        }
        // It says nothing about the others: each must be read.
        for k in waiting {
            if forest.find(k).is_some() && self.budget.take(turn.now) {
                turn.effect(Effect::ReadCgroup { key: k, id });
            }
        }
    }

    fn keep(&mut self, id: u64, path: Str, forest: &mut Forest) {
        if self.known.len() >= KNOWN_MAX {
            for (_, s) in self.known.drain() {
                forest.strings.release(s);
            }
        }
        let path = forest.strings.share(path);
        if let Some(old) = self.known.insert(id, path) {
            forest.strings.release(old);
        }
    }
}
