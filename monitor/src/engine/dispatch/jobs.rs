//! The life of a job, the rules and the config.

use std::collections::HashMap;

use crate::config::{Config, Rule};
use crate::engine::conditions::Capacity;
use crate::engine::forest::Idx;
use crate::engine::jobs::{NewJob, policy_of};
use crate::engine::turn::Turn;
use crate::engine::{Engine, ExecJob, JobRecord, Output, Refused, facts};
use crate::model::schema::{AlertKind, JobId};

impl Engine {
    /// Makes a job of `root`, and gives it to all parts that have to do with it.
    pub(in crate::engine) fn begin(
        &mut self,
        root: Idx,
        new: NewJob,
        out: &mut Output,
    ) -> Result<Idx, Refused> {
        let limits = self.settings.limits;
        let g = self.jobs.begin(root, new, &mut self.forest, limits, turn!(self, out))?;
        if let Some(j) = self.jobs.get(g) {
            self.names.job(&j.record.name, self.now);
        }
        facts::ask_place(root, &mut self.forest, turn!(self, out));
        self.set_deadline(g, out);
        self.watch_orphans(g, out);
        self.zombies.replan_group(g, &self.forest, &self.jobs, turn!(self, out));
        Ok(g)
    }

    pub(in crate::engine) fn job_of(&self, g: Idx) -> Result<Box<JobRecord>, Refused> {
        let known = self.jobs.get(g).ok_or_else(|| Refused::NoJob(g.to_string()))?;
        Ok(Box::new(known.record.clone()))
    }

    pub(in crate::engine) fn register(
        &mut self,
        j: ExecJob,
        out: &mut Output,
    ) -> Result<Box<JobRecord>, Refused> {
        if let Some(g) = self.jobs.by_id(JobId { root: j.root, ordinal: 0 }) {
            return self.job_of(g);
        }
        let full = || Refused::TooManyJobs(self.settings.limits.jobs);
        let root = self.forest.ensure(j.root, self.now).ok_or_else(full)?;
        let new = NewJob {
            ordinal: 0,
            name: j.name,
            rule: None,
            policy: j.policy,
            existing: false,
            supervisor: j.supervisor,
            number: j.number,
        };
        let begun = self.begin(root, new, out).and_then(|g| self.job_of(g));
        self.follow_changes(out);
        begun
    }

    pub(in crate::engine) fn extend(
        &mut self,
        id: JobId,
        by: std::time::Duration,
        out: &mut Output,
    ) -> Result<Box<JobRecord>, Refused> {
        let g = self.jobs.extend(id, by, turn!(self, out))?;
        self.clear_job_alerts(&[AlertKind::JobTimeout], g, "its deadline was extended", out);
        self.set_deadline(g, out);
        self.job_of(g)
    }

    pub(in crate::engine) fn release(
        &mut self,
        id: JobId,
        out: &mut Output,
    ) -> Result<Box<JobRecord>, Refused> {
        let g = self.jobs.release(id, turn!(self, out))?;
        let kinds = [AlertKind::Orphan, AlertKind::JobTimeout];
        self.clear_job_alerts(&kinds, g, "its `exec` is over and left it alone", out);
        self.job_of(g)
    }

    /// No member of `g` has a live thread any more.
    pub(in crate::engine) fn job_emptied(&mut self, g: Idx, at: u64, out: &mut Output) {
        if self.jobs.end(g, at, self.ready.is_some(), turn!(self, out)) {
            let kinds = [AlertKind::Orphan, AlertKind::JobTimeout, AlertKind::KillFailed];
            self.clear_job_alerts(&kinds, g, "no process of it is left", out);
        }
    }

    pub(in crate::engine) fn revive(&mut self, g: Idx, out: &mut Output) {
        if self.jobs.revive(g, turn!(self, out)) {
            self.set_deadline(g, out);
            self.watch_orphans(g, out);
        }
    }

    /// The kernel has counted the members of a job that seemed over.
    pub(in crate::engine) fn job_counted(&mut self, number: u64, alive: bool, out: &mut Output) {
        if self.jobs.is_counted(number) {
            // Until a snapshot has shown who it is.
            self.unsynced |= alive;
        }
        if let Some(ended) = self.jobs.counted(number, self.unsynced, turn!(self, out)) {
            let numbers = self.names.ended(&ended.name, self.now);
            *numbers.finished.entry(ended.outcome).or_default() += 1;
            numbers.duration.observe(ended.ended.saturating_sub(ended.started) as f64 / 1e9);
        }
    }

    pub(in crate::engine) fn forget_job(&mut self, number: u64, out: &mut Output) {
        let Some(job) = self.jobs.forget(number, &mut self.forest, turn!(self, out)) else { return };
        self.orphans.forget(number);
        self.names.job(&job.record.name, self.now);
        self.names.plan(turn!(self, out));
        self.forest.collect();
    }

    /// The process has execed, or facts that it waited for have come.
    pub(in crate::engine) fn try_rules(&mut self, i: Idx, out: &mut Output) {
        if let Some(rule) = self.rules.matching(i, &mut self.forest, turn!(self, out)) {
            self.matched(i, rule, false, out);
        }
    }

    /// The first rule that matches `i` is `rule`: it begins a job, unless `i` is in one of the same rule already.
    pub(in crate::engine) fn matched(&mut self, i: Idx, rule: usize, existing: bool, out: &mut Output) {
        let Some(new) = self.rules.job(rule, existing) else { return };
        let name = new.name.clone();
        let n = self.forest.node(i);
        let (key, group, alive) = (n.key, n.group, n.alive());
        let same = |g| self.jobs.get(g).is_some_and(|j| j.record.rule.as_ref() == Some(&name));
        if !alive || self.forest.groups.chain(group).any(same) {
            return;
        }
        if let Some(g) = self.jobs.saved(key, &name) {
            self.jobs.enroll(g, group, i, &mut self.forest);
        } else if let Err(refused @ Refused::TooDeep(..)) = self.begin(i, new, out) {
            let text = format!("Rule {name} matches, but {refused}.");
            let step = Capacity::report(text, &self.alerts, turn!(self, out));
            self.alert(step, out);
        }
    }

    pub(in crate::engine) fn scan(&mut self, existing: bool, out: &mut Output) {
        if self.rules.scan(existing, &mut self.forest, turn!(self, out)) {
            self.scan_now(out);
        }
    }

    pub(in crate::engine) fn scan_now(&mut self, out: &mut Output) {
        let (candidates, all_existing) = self.rules.scan_candidates(&self.forest, turn!(self, out));
        for i in candidates {
            if let Some(rule) = self.rules.matching_now(i, &self.forest) {
                let start = self.forest.node(i).key.start;
                let existing = all_existing || self.ready.is_none_or(|r| start < r);
                self.matched(i, rule, existing, out);
            }
        }
    }

    pub(in crate::engine) fn reload(&mut self, c: &Config, out: &mut Output) {
        self.configure(c);
        self.names.plan(turn!(self, out));
        let by_name: HashMap<&str, &Rule> = c.jobs.iter().map(|r| (r.name.as_str(), r)).collect();
        for g in self.jobs.groups() {
            let name = self.jobs.get(g).and_then(|j| j.record.rule.as_deref());
            let Some(rule) = name.and_then(|name| by_name.get(name)) else { continue };
            if !self.jobs.set_policy(g, policy_of(rule), turn!(self, out)) {
                continue;
            }
            if self.jobs.get(g).is_some_and(|j| !j.record.expired) {
                self.clear_job_alerts(&[AlertKind::JobTimeout], g, "it has another deadline now", out);
            }
            self.set_deadline(g, out);
            self.watch_orphans(g, out);
            self.zombies.replan_group(g, &self.forest, &self.jobs, turn!(self, out));
        }
        self.reconsider(out);
        for i in self.zombies.all() {
            self.plan_zombie(i, out);
        }
        if self.ready.is_some() {
            self.scan(true, out);
        }
        self.follow_changes(out);
    }
}
