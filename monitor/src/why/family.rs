//! Who is who: pids of this moment to keys, names, lineage and relations, from what the forest, the kernel's maps and
//! /proc know.

use std::cell::OnceCell;
use std::time::Instant;

use super::{Holders, Limits};
use crate::model::key::Key;
use crate::model::outside::OutsideText;
use crate::model::question::Question;
use crate::model::schema::{LineageKnown, Process, Ref, State};
use crate::sources::proc::{Proc, Stat};

/// Ancestors that are followed, as many as the forest keeps.
const ANCESTORS: usize = 64;

/// All that one `explain` reads from.
pub(super) struct Family<'a> {
    pub q: &'a Question,
    pub proc: &'a Proc,
    pub holders: &'a dyn Holders,
    pub limits: &'a Limits,
    /// Of this reader's time namespace, ticks.
    tick_offset: i64,
    keys: OnceCell<Vec<Key>>,
    began: Instant,
}

impl<'a> Family<'a> {
    pub(super) fn new(q: &'a Question, proc: &'a Proc, holders: &'a dyn Holders, limits: &'a Limits) -> Self {
        let tick_offset = tick_offset(proc);
        Self { q, proc, holders, limits, tick_offset, keys: OnceCell::new(), began: Instant::now() }
    }

    /// Whether the time for looking around is over.
    pub(super) fn late(&self) -> bool {
        self.began.elapsed() > self.limits.time
    }

    /// Whether what has this pid now is the process with this key, as far as ticks of 10 ms tell.
    pub(super) fn same(&self, key: Key, stat: &Stat) -> bool {
        let ticks = (key.start / super::holders::NS_PER_TICK) as i64;
        key.pid == stat.pid && ticks + self.tick_offset == stat.start_ticks as i64
    }

    fn known(&self, stat: &Stat) -> Option<&'a Process> {
        let all = std::iter::once(&self.q.subject).chain(&self.q.family);
        all.into_iter().find(|p| p.state != State::Gone && self.same(p.id, stat))
    }

    pub(super) fn key(&self, stat: &Stat) -> Key {
        if let Some(p) = self.known(stat) {
            return p.id;
        }
        // The pid may be another process's than when they were read: then the ticks are all there is.
        let all = self.keys.get_or_init(|| self.holders.keys().unwrap_or_default());
        all.iter().copied().find(|k| self.same(*k, stat)).unwrap_or_else(|| {
            let ticks = (stat.start_ticks as i64 - self.tick_offset).max(0) as u64;
            Key::new(stat.pid, ticks * super::holders::NS_PER_TICK)
        })
    }

    /// Names what has this pid now; None if there is nothing.
    pub(super) fn name(&self, pid: u32) -> Option<Ref> {
        self.proc.stat(pid).ok().map(|s| self.name_of(&s))
    }

    pub(super) fn name_of(&self, stat: &Stat) -> Ref {
        if let Some(p) = self.known(stat)
            && !p.argv.is_empty()
        {
            return Ref { comm: OutsideText::from_bytes(stat.comm.bytes()), ..p.to_ref() };
        }
        let argv = self.proc.argv(stat.pid).unwrap_or_default();
        let argv = argv.iter().map(|a| OutsideText::from_bytes(a)).collect();
        Ref { id: self.key(stat), pid: stat.pid, comm: OutsideText::from_bytes(stat.comm.bytes()), argv }
    }

    /// Names the tracer by what TracerPid says: the thread that traces.
    pub(super) fn tracer(&self, tid: u32) -> Option<Ref> {
        if tid == 0 {
            return None;
        }
        self.name(self.proc.status(tid).ok()?.tgid)
    }

    /// By key, if it is known, whether it lives or not.
    pub(super) fn name_key(&self, key: Key) -> Option<Ref> {
        if let Some(p) = self.q.process(key) {
            return Some(p.to_ref());
        }
        let stat = self.proc.stat(key.pid).ok()?;
        self.same(key, &stat).then(|| self.name_of(&stat))
    }

    pub(super) fn lineage_parent(&self, key: Key) -> Option<Key> {
        match self.q.process(key) {
            // An orphan from before the start: what the kernel's map was given for it is its adopter.
            Some(p) if p.lineage == LineageKnown::Unknown => None,
            Some(Process { lineage_parent: Some(l), .. }) => Some(*l),
            _ => self.holders.lineage_parent(key).ok().flatten(),
        }
    }

    /// Lineage ancestors, nearest first.
    pub(super) fn ancestors(&self, key: Key) -> Vec<Key> {
        let mut v = Vec::new();
        let mut at = key;
        while let Some(next) = self.lineage_parent(at) {
            if v.len() == ANCESTORS || next == key || v.contains(&next) {
                break;
            }
            v.push(next);
            at = next;
        }
        v
    }

    /// Whether this very process is there and not dead.
    pub(super) fn alive(&self, key: Key) -> bool {
        self.proc.stat(key.pid).is_ok_and(|s| self.same(key, &s)) && self.proc.has_live_thread(key.pid)
    }

    /// How the process `key`, with `stat` now, is related to the zombie and to `blocked`, which waits for it.
    pub(super) fn relation(&self, key: Key, stat: &Stat, zombie: Key, blocked: &Stat) -> Relation {
        let ancestors = self.ancestors(key);
        let known = self.q.process(key);
        let parent = ancestors.first().copied();
        let orphan = known.map_or_else(|| parent.is_some_and(|p| !self.alive(p)), |p| p.orphan);
        let jobs = |p: &Process| p.jobs.clone();
        let job = known.map(jobs).unwrap_or_default();
        let same_job = self.q.subject.jobs.iter().find(|j| job.contains(j)).copied();
        let blocked_key = self.key(blocked);
        let closeness = if ancestors.contains(&zombie) {
            Closeness::OfZombie
        } else if same_job.is_some() && orphan {
            Closeness::OrphanOfJob
        } else if ancestors.contains(&blocked_key) || stat.ppid == blocked.pid {
            Closeness::OfBlocked
        } else if same_job.is_some() {
            Closeness::SameJob
        } else if parent.is_none() && stat.session != 0 && stat.session == blocked.session {
            Closeness::SameSession
        } else {
            Closeness::None
        };
        let adopter =
            orphan.then(|| known.and_then(|p| p.adopter.clone()).or_else(|| self.name(stat.ppid))).flatten();
        Relation { closeness, orphan, parent, adopter, job: same_job, ancestors }
    }

    /// Seconds since a dead process died, if the forest has seen it.
    pub(super) fn dead_for(&self, key: Key) -> Option<f64> {
        let p = self.q.process(key)?;
        matches!(p.state, State::Exiting | State::Zombie | State::Gone).then_some(p.state_s)
    }
}

/// Ordered: the nearer, the likelier it has to do with the zombie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Closeness {
    None,
    SameSession,
    SameJob,
    OfBlocked,
    OrphanOfJob,
    OfZombie,
}

#[derive(Clone, Debug)]
pub(super) struct Relation {
    pub closeness: Closeness,
    pub orphan: bool,
    pub parent: Option<Key>,
    pub adopter: Option<Ref>,
    pub job: Option<crate::model::schema::JobId>,
    pub ancestors: Vec<Key>,
}

/// `comm (pid)`, as people read it.
pub(super) fn short(r: &Ref) -> String {
    format!("{} ({})", r.comm, r.pid)
}

/// `comm (ID)`: in what is to be done, where a bare pid may be another's by then.
pub(super) fn full(r: &Ref) -> String {
    format!("{} ({})", r.comm, r.id)
}

/// `12 s`, `3 min`, `5 h`.
pub(super) fn ago(s: f64) -> String {
    match s {
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.0} h", s / 3600.0),
    }
}

fn tick_offset(proc: &Proc) -> i64 {
    let text = std::fs::read_to_string(proc.root().join("self/timens_offsets")).unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("boottime"));
    let mut words = line.unwrap_or_default().split_ascii_whitespace().map(|w| w.parse::<i64>().unwrap_or(0));
    let (s, ns) = (words.next().unwrap_or(0), words.next().unwrap_or(0));
    s.saturating_mul(100).saturating_add(ns / super::holders::NS_PER_TICK as i64)
}
