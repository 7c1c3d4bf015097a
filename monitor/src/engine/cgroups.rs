//! Which cgroup a process is in, known from its exec on. The exec record carries the id of its v2 group: the path that
//! belongs to it is read from /proc once, for the first process that comes with it. Where the id does not tell the path
//! (v1 and hybrid hosts) each is read, within a bound; what is refused there is read when it is needed.

use std::collections::HashMap;

use super::proc_poll::Budget;
use super::{Effect, Engine, Output};
use crate::engine::forest::{Fast, Flags, Idx, Str};
use crate::model::key::Key;

/// Ids whose paths are kept; with more all are asked for again.
const KNOWN_MAX: usize = 4_096;
/// Ids that are asked for at one time, and processes that wait for each.
const ASKED_MAX: usize = 1_024;
const WAITING_MAX: usize = 256;

#[derive(Debug)]
pub(super) struct Cgroups {
    known: HashMap<u64, Str, Fast>,
    /// Asked for by one process; the others wait for what it is told.
    asked: HashMap<u64, Vec<Key>, Fast>,
    budget: Budget,
}

impl Default for Cgroups {
    fn default() -> Self {
        Self { known: HashMap::default(), asked: HashMap::default(), budget: Budget::cgroups() }
    }
}

impl Engine {
    /// `key` has execed in the cgroup with this id (0: not told).
    pub(super) fn execed_in(&mut self, key: Key, id: u64, now: u64, out: &mut Output) {
        let Some(i) = self.forest.find(key).filter(|&i| self.forest.node(i).alive()) else { return };
        if id == 0 || self.forest.node(i).flags.has(Flags::KERNEL) {
            return;
        }
        if let Some(&path) = self.cgroups.known.get(&id) {
            return self.forest.in_cgroup(i, path);
        }
        let full = self.cgroups.asked.len() >= ASKED_MAX;
        match self.cgroups.asked.get_mut(&id) {
            Some(waiting) if waiting.len() < WAITING_MAX => waiting.push(key),
            Some(_) => {}
            None if full || !self.cgroups.budget.take(now) => {}
            None => {
                self.cgroups.asked.insert(id, Vec::new());
                out.effects.push(Effect::ReadCgroup { key, id });
            }
        }
    }

    pub(super) fn cgroup_came(
        &mut self,
        key: Key,
        id: u64,
        cgroup: Option<&str>,
        by_id: bool,
        now: u64,
        out: &mut Output,
    ) {
        let mut waiting = self.cgroups.asked.remove(&id).unwrap_or_default();
        if let Some(path) = cgroup {
            let path = self.forest.strings.intern(path.as_bytes());
            if let Some(i) = self.forest.find(key) {
                self.forest.in_cgroup(i, path);
            }
            if by_id {
                for i in waiting.drain(..).filter_map(|k| self.forest.find(k)).collect::<Vec<Idx>>() {
                    self.forest.in_cgroup(i, path);
                }
                self.keep_cgroup(id, path);
            }
            self.forest.strings.release(path);
        }
        // It told nothing about the others: each must be read.
        for k in waiting {
            if self.forest.find(k).is_some() && self.cgroups.budget.take(now) {
                out.effects.push(Effect::ReadCgroup { key: k, id });
            }
        }
    }

    fn keep_cgroup(&mut self, id: u64, path: Str) {
        if self.cgroups.known.len() >= KNOWN_MAX {
            for (_, s) in self.cgroups.known.drain() {
                self.forest.strings.release(s);
            }
        }
        let path = self.forest.strings.share(path);
        if let Some(old) = self.cgroups.known.insert(id, path) {
            self.forest.strings.release(old);
        }
    }
}
