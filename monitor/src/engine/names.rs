//! The values of the `job_name` label: which names have a place, and what is counted under each. Gauges and counters ask
//! here, so a job is under the same name in both. Names of rules come first; those of `exec` jobs, which anybody may
//! invent, share what is left. A name that no rule has and no job carries goes when it has been idle for a while.

use std::collections::{BTreeMap, HashSet};

use super::timers::Timer;
use super::turn::{SECOND, Turn};
use crate::model::stats::{JobNumbers, MAX_JOB_NAMES, OTHER};

/// Long enough that every scraper has seen the last of it.
const IDLE: u64 = 600 * SECOND;

#[derive(Debug, Default)]
struct Named {
    /// How its jobs ended and how long they took.
    ended: JobNumbers,
    /// When a job or a rule last had it.
    used: u64,
}

/// The names that are shown.
#[derive(Debug, Default)]
pub(super) struct Names {
    all: BTreeMap<String, Named>,
    /// In the config's order, as far as there is room.
    rules: Vec<String>,
    /// A timer will look for idle ones.
    planned: bool,
}

impl Names {
    /// Under which a job of this name is counted.
    pub(super) fn label<'a>(&self, name: &'a str) -> &'a str {
        if self.all.contains_key(name) { name } else { OTHER }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&String, &JobNumbers)> {
        self.all.iter().map(|(name, n)| (name, &n.ended))
    }

    pub(super) fn ended(&mut self, name: &str, now: u64) -> &mut JobNumbers {
        let label = self.label(name).to_owned();
        self.touch(label, now)
    }

    fn touch(&mut self, label: String, now: u64) -> &mut JobNumbers {
        let n = self.all.entry(label).or_default();
        n.used = n.used.max(now);
        &mut n.ended
    }

    fn is_rule(&self, name: &str) -> bool {
        self.rules.iter().any(|r| r == name)
    }

    /// How many have a place; what is counted as `_other` is beside them.
    fn places(&self) -> usize {
        self.all.len() - usize::from(self.all.contains_key(OTHER))
    }

    /// A job of this name begins, or has ended: it gets a place if there is one.
    pub(super) fn job(&mut self, name: &str, now: u64) {
        let free = self.all.contains_key(name) || self.places() < MAX_JOB_NAMES;
        let label = if free { name } else { OTHER };
        self.touch(label.to_owned(), now);
    }

    /// The config's rules, in order. A place that an idle or a younger name has is given up for one of them.
    pub(super) fn set_rules<'a>(&mut self, rules: impl Iterator<Item = &'a str>, now: u64) {
        for gone in std::mem::take(&mut self.rules) {
            self.touch(gone, now);
        }
        self.rules = rules.take(MAX_JOB_NAMES).map(str::to_owned).collect();
        for name in self.rules.clone() {
            if !self.all.contains_key(&name) && self.places() >= MAX_JOB_NAMES {
                let others = self.all.iter().filter(|(n, _)| *n != OTHER && !self.is_rule(n));
                let oldest = others.min_by_key(|(_, n)| n.used).map(|(name, _)| name.clone());
                self.all.remove(&oldest.unwrap_or_default());
            }
            self.touch(name, now);
        }
    }

    /// Forgets who is idle and neither a rule's nor `carried`; gives the time at which to look again.
    fn expire(&mut self, carried: &HashSet<&str>, now: u64) -> Option<u64> {
        let rules = std::mem::take(&mut self.rules);
        let stays = |name: &String| rules.contains(name) || carried.contains(name.as_str());
        self.all.retain(|name, n| stays(name) || n.used.saturating_add(IDLE) > now);
        let next =
            self.all.iter().filter(|(name, _)| !stays(name)).map(|(_, n)| n.used.saturating_add(IDLE)).min();
        self.rules = rules;
        next
    }
}

impl Names {
    /// A name may be idle from now on.
    pub(super) fn plan(&mut self, turn: &mut Turn<'_>) {
        if !std::mem::replace(&mut self.planned, true) {
            turn.set(turn.now.saturating_add(IDLE), Timer::Names);
        }
    }

    /// Drops idle names; those in `jobs` are carried by a job.
    pub(super) fn due<'a>(&mut self, jobs: impl Iterator<Item = &'a str>, turn: &mut Turn<'_>) {
        let carried: HashSet<&str> = jobs.map(|name| self.label(name)).collect();
        let next = self.expire(&carried, turn.now);
        self.planned = next.is_some();
        if let Some(at) = next {
            turn.set(at, Timer::Names);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(n: &Names) -> Vec<&str> {
        n.iter().map(|(name, _)| name.as_str()).collect()
    }

    #[test]
    fn a_name_goes_when_it_is_idle_and_neither_a_rules_nor_a_jobs() {
        let mut n = Names::default();
        n.set_rules(["rule", "gone"].into_iter(), 0);
        n.job("exec", 5);
        n.job("long", 5);
        n.set_rules(["rule"].into_iter(), 7);
        let carried = HashSet::from(["long"]);
        assert_eq!(n.expire(&carried, IDLE), Some(IDLE + 5));
        assert_eq!(shown(&n), ["exec", "gone", "long", "rule"]);
        assert_eq!(n.expire(&carried, IDLE + 5), Some(IDLE + 7), "the removed rule was there until 7");
        assert_eq!(shown(&n), ["gone", "long", "rule"]);
        assert_eq!(n.expire(&carried, IDLE + 7), None);
        assert_eq!(shown(&n), ["long", "rule"]);
        n.job("long", IDLE + 8);
        assert_eq!(n.expire(&HashSet::new(), 2 * IDLE + 8), None);
        assert_eq!(shown(&n), ["rule"]);
    }

    #[test]
    fn two_hundred_names_then_other_and_rules_come_first() {
        let mut n = Names::default();
        for i in 0..MAX_JOB_NAMES + 50 {
            n.job(&format!("exec{i:03}"), i as u64);
        }
        assert_eq!(shown(&n).len(), MAX_JOB_NAMES + 1);
        assert_eq!((n.label("exec000"), n.label("exec220")), ("exec000", OTHER));
        n.ended("exec220", 300).zombies += 1;
        assert_eq!(n.iter().find(|(name, _)| *name == OTHER).unwrap().1.zombies, 1);
        n.set_rules(["late"].into_iter(), 400);
        assert_eq!(n.label("late"), "late");
        assert_eq!(n.label("exec000"), OTHER, "the one that was idle longest made room");
        assert_eq!(shown(&n).len(), MAX_JOB_NAMES + 1);
        assert_eq!(n.expire(&HashSet::new(), 400 + IDLE), None);
        assert_eq!(shown(&n), ["late"], "_other goes too");
        n.job("exec220", 500 + IDLE);
        assert_eq!(n.label("exec220"), "exec220", "there is room again");
    }

    #[test]
    fn more_rules_than_places_share_other() {
        let mut n = Names::default();
        let rules: Vec<String> = (0..MAX_JOB_NAMES + 9).map(|i| format!("r{i:03}")).collect();
        n.set_rules(rules.iter().map(String::as_str), 0);
        assert_eq!(shown(&n).len(), MAX_JOB_NAMES);
        n.job("r205", 1);
        assert_eq!((n.label("r000"), n.label("r205")), ("r000", OTHER));
    }
}
