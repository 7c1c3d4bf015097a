//! Snapshots, the saved state, the start; conditions of the host.

use crate::engine::alerts::About;
use crate::engine::conditions::Capacity;
use crate::engine::forest::{Merge, NONE, RowState, Snapshot};
use crate::engine::turn::Turn;
use crate::engine::view::View;
use crate::engine::{Effect, Engine, JobRecord, Output, conditions, kills};
use crate::model::key::Key;
use crate::model::schema::{Alert, AlertKind};

impl Engine {
    pub(in crate::engine) fn merge(&mut self, s: &Snapshot, out: &mut Output) -> Merge {
        for row in s.rows.iter().filter(|r| r.job != 0) {
            if let Some(j) = self.jobs.by_number(row.job).and_then(|g| self.jobs.get_mut(g)) {
                j.in_kernel = true;
            }
        }
        let jobs = &self.jobs;
        let mut missing = Vec::new();
        let m = self.forest.merge(s, &|n| jobs.by_number(n), &mut missing, self.now);
        self.merging = true;
        self.follow_changes(out);
        self.merging = false;
        out.effects.extend(missing.into_iter().map(Effect::Look));
        self.unsynced = m.overrun;
        if self.ready.is_some() {
            self.recount_jobs(out);
            self.scan(false, out);
            self.enter_rows(s, out);
        }
        self.follow_changes(out);
        m
    }

    /// Members by lineage that the kernel does not have in their job: their fork found no room, or their forker's did.
    pub(in crate::engine) fn enter_rows(&self, s: &Snapshot, out: &mut Output) {
        for row in s.rows.iter().filter(|r| r.job == 0 && r.state != RowState::Gone) {
            let Some(i) = self.forest.find(row.key).filter(|&i| self.forest.node(i).group != NONE) else {
                continue;
            };
            let parent = self.forest.get(self.forest.node(i).lineage).map(|n| n.key).or(row.parent);
            self.enter_kernel(i, parent.unwrap_or_default(), 0, false, out);
        }
    }

    /// A snapshot may have brought members of jobs that seemed empty, or shown that the last one is gone.
    pub(in crate::engine) fn recount_jobs(&mut self, out: &mut Output) {
        for g in self.jobs.groups() {
            let live = self.forest.groups.get(g).map_or(0, |x| x.all.live);
            let done = self.jobs.get(g).is_some_and(|j| j.done.is_some());
            match (live, done) {
                (0, false) => self.job_emptied(g, self.now, out),
                (1.., true) => self.revive(g, out),
                _ => {}
            }
            // Some may be no orphans after all.
            self.orphan_left(g, out);
        }
    }

    pub(in crate::engine) fn restore_jobs(&mut self, jobs: &[JobRecord]) {
        self.jobs.restore(jobs, &mut self.forest, self.settings.limits);
        for record in jobs.iter().filter(|r| self.jobs.by_number(r.number).is_some()) {
            self.names.job(&record.name, self.now);
        }
    }

    pub(in crate::engine) fn become_ready(&mut self, out: &mut Output) {
        if self.ready.is_some() {
            return;
        }
        self.ready = Some(self.now);
        for g in self.jobs.find_restored(&mut self.forest) {
            if self.forest.groups.get(g).is_some_and(|x| x.all.live > 0) {
                self.jobs.resume(g, turn!(self, out));
                self.set_deadline(g, out);
                self.watch_orphans(g, out);
            } else {
                self.job_emptied(g, self.now, out);
            }
        }
        self.follow_changes(out);
        for alert in self.alerts.restored() {
            self.alert_restored(&alert, out);
        }
        self.alerts.resolve_unclaimed(view!(self), turn!(self, out));
        self.fuse_alert(out);
        // Supervisors of `exec` that died while the agent was down.
        let dead = |k: &Key| self.forest.find(*k).is_none_or(|i| !self.forest.node(i).alive());
        let dead: Vec<Key> = self.jobs.supervisors().filter(dead).collect();
        for key in dead {
            self.supervisor_died(key, out);
        }
        // Deadlines that passed before are looked at again.
        for g in self.jobs.groups() {
            self.set_deadline(g, out);
        }
        self.scan(true, out);
        self.run_timers(out);
    }

    /// An alert fired before the restart: the part that it is about decides whether it still holds.
    pub(in crate::engine) fn alert_restored(&mut self, a: &Alert, out: &mut Output) {
        let subject = a.subject.as_ref().map(|p| p.id);
        let job = a.job.and_then(|id| self.jobs.by_id(id));
        let job = job.filter(|&g| self.jobs.get(g).is_some_and(|j| j.done.is_none()));
        match (a.kind, job) {
            (AlertKind::Zombie, _) => {
                let firing = |name| self.alerts.firing(name);
                let step = self.zombies.restored(subject, firing, view!(self), turn!(self, out));
                self.alert(step, out);
            }
            (AlertKind::KillFailed, _) if a.job.is_none() => {
                if let Some(root) = subject
                    && let Some(step) = self.survivors.restored(root, view!(self), self.now)
                {
                    self.survivor_alert(root, step, out);
                }
            }
            (AlertKind::KillFailed, Some(g)) => {
                let step = kills::alert_restored(g, view!(self), self.now);
                self.alert(step, out);
            }
            (AlertKind::Orphan, Some(g)) => {
                if let Some(number) = self.jobs.number(g) {
                    self.orphans.restored(number, self.now);
                    self.orphans_due(number, out);
                }
            }
            (AlertKind::JobTimeout, Some(g)) => {
                let expired = self.jobs.get(g).filter(|j| j.record.expired).map(|j| j.record.number);
                if let Some(number) = expired {
                    self.deadline_due(number, out);
                }
            }
            (AlertKind::Orphan | AlertKind::JobTimeout | AlertKind::KillFailed, None) => {}
            (AlertKind::EventsLost, _) => {
                if self.alerts.get((a.kind, About::Host)).is_none() {
                    let step = self.losses.restored(a, turn!(self, out));
                    self.alert(step, out);
                }
            }
            (AlertKind::EnforcementStopped, _) => self.fuse_alert(out),
            (AlertKind::StorageFailed | AlertKind::Capacity, _) => {
                self.alert(conditions::problem(a.kind, a.summary.clone(), self.now), out);
                if a.kind == AlertKind::Capacity {
                    Capacity::watch(turn!(self, out));
                }
            }
        }
    }

    pub(in crate::engine) fn condition(
        &mut self,
        kind: AlertKind,
        problem: Option<String>,
        out: &mut Output,
    ) {
        if kind == AlertKind::Capacity {
            self.capacity.set(problem.clone());
        }
        match problem {
            Some(text) => self.alert(conditions::problem(kind, text, self.now), out),
            None if kind == AlertKind::Capacity => self.check_room(out),
            None => self.alert(conditions::over(kind), out),
        }
    }

    pub(in crate::engine) fn check_room(&mut self, out: &mut Output) {
        let stores = (&self.forest, &self.jobs, &self.alerts);
        let step = self.capacity.due(self.settings.limits, stores, turn!(self, out));
        self.alert(step, out);
    }
}
