//! Orphans inside jobs: one alert for each job whose members outlived their parents, and `on_orphan = "kill"`.

use super::alerts::{About, Raise};
use super::timers::Timer;
use super::{Effect, Engine, MS, PENDING, summary};
use crate::engine::forest::{Flags, Idx, NONE, Seen};
use crate::model::daemon::daemonized;
use crate::model::key::Key;
use crate::model::kill::{Reason, What};
use crate::model::schema::AlertKind;

/// A member came or went: the job's orphans are looked through after this.
const SOON: u64 = 20 * MS;

/// More keys than this of one job are looked through for those that are gone.
const KEPT: usize = 1_024;

impl Engine {
    /// `i` has become an orphan.
    pub(super) fn orphaned(&mut self, i: Idx, now: u64) {
        let g = self.forest.node(i).group;
        let Some(after) = self.orphan_after(g) else { return };
        let since = self.forest.node(i).orphan_since;
        self.plan_orphans(g, since.saturating_add(after.min(PENDING)).max(now));
    }

    /// The number of its orphans went down.
    pub(super) fn orphan_left(&mut self, g: Idx, now: u64) {
        let Some(j) = self.jobs.get(g) else { return };
        if self.alerts.get((AlertKind::Orphan, About::Job(j.record.number))).is_some() {
            self.plan_orphans(g, now.saturating_add(SOON));
        }
    }

    /// A job that begins with orphans in it, or goes on after a restart.
    pub(super) fn watch_orphans(&mut self, g: Idx, now: u64) {
        if self.orphans_in(g, true) > 0 {
            self.plan_orphans(g, now);
        }
    }

    fn orphan_after(&self, g: Idx) -> Option<u64> {
        self.jobs.get(g).filter(|j| j.done.is_none())?.record.policy.orphan_after_ns
    }

    pub(super) fn plan_orphans(&mut self, g: Idx, at: u64) {
        if let Some(j) = self.jobs.get_mut(g)
            && at < j.orphans_at
        {
            j.orphans_at = at;
            let number = j.record.number;
            self.timers.set(at, Timer::Orphans(number));
        }
    }

    pub(super) fn orphans_due(&mut self, number: u64, now: u64, fx: &mut Vec<Effect>) {
        let Some(g) = self.jobs.by_number(number) else { return };
        match self.jobs.get_mut(g) {
            Some(j) if j.orphans_at <= now => j.orphans_at = u64::MAX,
            _ => return,
        }
        let Some(after) = self.orphan_after(g) else { return };
        let name = (AlertKind::Orphan, About::Job(number));
        let root = self.jobs.get(g).and_then(|j| j.root);
        let mut orphans: Vec<(u64, Idx)> = self
            .forest
            .members(g)
            .filter(|&i| Some(i) != root && self.forest.node(i).orphan())
            .map(|i| (self.forest.node(i).orphan_since, i))
            .collect();
        orphans.sort_unstable();
        let Some(&(since, oldest)) = orphans.first() else {
            let text = summary::orphans_over(self, g);
            return self.clear(name, text, now, fx);
        };
        // With the usual times this is at the pending alert, well before it fires and its labels are frozen.
        self.ask_place(oldest, fx);
        let due: Vec<Idx> =
            orphans.iter().filter(|(s, _)| s.saturating_add(after) <= now).map(|&(_, i)| i).collect();
        if let Some(&(next, _)) = orphans.get(due.len()) {
            self.plan_orphans(g, next.saturating_add(after));
        }
        let kill = if due.is_empty() { None } else { self.kill_orphans(g, &due, now, fx) };
        let raise = Raise {
            firing: !due.is_empty(),
            severity: self.jobs.get(g).and_then(|j| j.record.policy.severity),
            job: Some(g),
            subject: Some(oldest),
            whose: Some(oldest),
            oldest: Some(self.forest.node(oldest).key),
            count: orphans.len(),
            since,
            summary: summary::orphans(self, g, oldest, orphans.len(), kill.as_deref(), now),
        };
        self.raise(name, &raise, now, fx);
    }

    /// Ends those who have been orphans for long enough, and what descends from them. Says in words what is done or why
    /// nothing is; None: the rule does not ask for it.
    fn kill_orphans(&mut self, g: Idx, due: &[Idx], now: u64, fx: &mut Vec<Effect>) -> Option<String> {
        let j = self.jobs.get(g)?;
        let policy = &j.record.policy;
        if !policy.kill_on_orphan {
            return None;
        }
        if j.killing.is_some() {
            return Some("It is being ended.".into());
        }
        let mut roots = Vec::new();
        let mut ask = false;
        for &i in due {
            let key = self.forest.node(i).key;
            if j.tried.contains(&key) {
                continue;
            }
            match (policy.kill_daemons, j.sessions.get(&key)) {
                (true, _) => roots.push(i),
                (false, Some(&session)) if !self.daemonized(i, session, now) => roots.push(i),
                (false, Some(_)) => {}
                (false, None) => {
                    ask = true;
                    fx.push(Effect::Look(key));
                }
            }
        }
        // Who descends from another of them is ended with it.
        let tops: Vec<Idx> = roots
            .iter()
            .copied()
            .filter(|&i| !self.forest.ancestors(i).any(|a| roots.contains(&a)))
            .collect();
        if tops.is_empty() {
            return Some(
                if ask { "Its session is being looked at." } else { "It is daemonized: left alone." }.into(),
            );
        }
        if let Err(why) = self.may_kill(g, now, fx) {
            return Some(format!("It would have been ended: {why}."));
        }
        let root = self.jobs.get(g).and_then(|j| j.root);
        let root_gone = root.is_none_or(|i| !self.forest.node(i).alive());
        let whole = root_gone && !ask && roots.len() == self.orphans_in(g, false);
        let keys: Vec<Key> = tops.iter().map(|&i| self.forest.node(i).key).collect();
        let gone = |k: &Key| self.forest.find(*k).is_none();
        if let Some(j) = self.jobs.get_mut(g) {
            if j.tried.len() + j.sessions.len() > KEPT {
                j.tried.retain(|k| !gone(k));
                j.sessions.retain(|k, _| !gone(k));
            }
            j.tried.extend(keys.iter().copied());
        }
        let what = if whole {
            What::Whole
        } else {
            let number = self.jobs.free_number(now);
            for _ in 1..keys.len() {
                self.jobs.free_number(now);
            }
            What::Descendants { number, roots: keys }
        };
        self.order(g, Reason::Orphan, what, fx);
        Some("It is being ended.".into())
    }

    /// Left its session and its parent on purpose.
    fn daemonized(&self, i: Idx, session: i32, now: u64) -> bool {
        let Some(me) = self.describe(i, now) else { return false };
        let above: Vec<_> = self.forest.ancestors(i).filter_map(|a| self.describe(a, now)).collect();
        daemonized(&me, session as u32, &above.iter().collect::<Vec<_>>())
    }

    /// The session of an orphan whose end is asked for.
    pub(super) fn session_seen(&mut self, key: Key, seen: Seen, now: u64) {
        let Some(i) = self.forest.find(key) else { return };
        let node = self.forest.node(i);
        let g = node.group;
        if g == NONE || !node.flags.has(Flags::ORPHAN) {
            return;
        }
        let Seen::Present(look) = seen else { return };
        let Some(job) = self.jobs.get_mut(g) else { return };
        if job.record.policy.kill_on_orphan && job.sessions.insert(key, look.session).is_none() {
            let due = n_due(self, i, g);
            self.plan_orphans(g, due.max(now));
        }
    }

    pub(super) fn orphans_restored(&mut self, g: Idx, now: u64, fx: &mut Vec<Effect>) {
        if let Some(j) = self.jobs.get_mut(g) {
            j.orphans_at = now;
            let number = j.record.number;
            self.orphans_due(number, now, fx);
        }
    }
}

fn n_due(e: &Engine, i: Idx, g: Idx) -> u64 {
    let after = e.jobs.get(g).and_then(|j| j.record.policy.orphan_after_ns).unwrap_or(0);
    e.forest.node(i).orphan_since.saturating_add(after)
}
