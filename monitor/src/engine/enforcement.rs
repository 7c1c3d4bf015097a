//! Deadlines, and when policy may kill: `enforcement.enabled`, the operator's word, the fuse, what is never enforced upon.
//! It makes orders; whom to spare and how to end the rest is `enforce`'s.

use std::collections::HashSet;

use super::alerts::{About, Raise};
use super::timers::Timer;
use super::{Effect, EnforcementState, Engine, JobRecord, KillOrder, SECOND, summary};
use crate::config;
use crate::engine::forest::Idx;
use crate::model::key::Key;
use crate::model::kill::{Reason, What};
use crate::model::schema::{AlertKind, JobId, KillReport, State};

/// How late the supervisor of an `exec` job may act on the deadline before the agent does: a member may have stopped it.
const SUPERVISOR_SLACK: u64 = SECOND;
/// How long an end that the supervisor has asked for may take, after its grace, before an alert says that it failed.
const EXEC_SLACK: u64 = 2 * SECOND;
pub(super) const MINUTE: u64 = 60 * SECOND;

#[derive(Debug, Default)]
pub(super) struct Enforcement {
    pub(super) enabled: bool,
    pub(super) max_per_minute: u32,
    pub(super) state: EnforcementState,
}

impl Enforcement {
    pub(super) fn new(c: &config::Enforcement) -> Self {
        Self { enabled: c.enabled, max_per_minute: c.max_job_kills_per_minute, ..Self::default() }
    }

    pub(super) fn configure(&mut self, c: &config::Enforcement) {
        (self.enabled, self.max_per_minute) = (c.enabled, c.max_job_kills_per_minute);
    }

    pub(super) fn on(&self, now: u64) -> bool {
        match (self.state.by_operator, self.state.until) {
            (Some(on), None) => on,
            (Some(on), Some(until)) if now < until => on,
            _ => self.enabled,
        }
    }

    /// Counts a job; false: one too many within a minute. A job that is counted already costs nothing more.
    fn count(&mut self, number: u64, now: u64) -> bool {
        let ended = &mut self.state.ended;
        while ended.front().is_some_and(|(at, _)| at.saturating_add(MINUTE) <= now) {
            ended.pop_front();
        }
        if ended.iter().any(|&(_, n)| n == number) {
            return true;
        }
        if ended.len() >= self.max_per_minute as usize {
            return false;
        }
        ended.push_back((now, number));
        true
    }
}

impl Engine {
    pub(super) fn set_deadline(&mut self, g: Idx) {
        if let Some(r) = self.jobs.get(g).map(|j| &j.record)
            && let Some(due) = self.deadline_acted_on(r)
        {
            self.timers.set(due, Timer::Deadline(r.number));
        }
    }

    /// When the engine acts on the deadline: later where a supervisor does so itself. One that passed while the agent was
    /// down could not be acted on by the supervisor either.
    fn deadline_acted_on(&self, r: &JobRecord) -> Option<u64> {
        let deadline = r.deadline?;
        Some(match r.supervisor {
            Some(_) => deadline.max(self.ready.unwrap_or(0)).saturating_add(SUPERVISOR_SLACK),
            None => deadline,
        })
    }

    pub(super) fn deadline_due(&mut self, number: u64, now: u64, fx: &mut Vec<Effect>) {
        let Some(g) = self.jobs.by_number(number) else { return };
        // Nothing is decided about those who run before it is known who runs; `become_ready` sets the timer again.
        let (Some(ready), Some(j)) = (self.ready, self.jobs.get(g)) else { return };
        // A timer from before the deadline was moved.
        if j.done.is_some() || self.deadline_acted_on(&j.record).is_none_or(|due| due > now) {
            return;
        }
        if j.record.supervisor.is_some() {
            return self.supervised_deadline_due(g, now, fx);
        }
        let Some(j) = self.jobs.get_mut(g) else { return };
        let Some(deadline) = j.record.deadline else { return };
        if !j.record.expired {
            j.record.expired = true;
            let job = Box::new(j.record.clone());
            fx.push(Effect::Job { job, label: false });
        }
        let mut kill = None;
        if j.record.policy.kill_on_timeout && j.killing.is_none() && !j.timed_kill {
            let waits = ready.saturating_add(j.record.policy.grace_ns);
            if j.restored && deadline <= ready && now < waits {
                self.timers.set(waits, Timer::Deadline(number));
                kill = Some("It passed while jobwarden was down; the job has one more grace.".to_owned());
            } else {
                kill = Some(match self.may_kill(g, now, fx) {
                    Ok(()) => {
                        self.order(g, Reason::Timeout, What::Whole, fx);
                        "It is being ended.".to_owned()
                    }
                    Err(why) => format!("It would have been ended: {why}."),
                });
            }
        }
        self.timeout_alert(g, deadline, kill.as_deref(), now, fx);
    }

    /// The deadline of an `exec` job, whose supervisor should have acted on it by now.
    fn supervised_deadline_due(&mut self, g: Idx, now: u64, fx: &mut Vec<Effect>) {
        let Some(j) = self.jobs.get_mut(g) else { return };
        let Some(deadline) = j.record.deadline else { return };
        let number = j.record.number;
        if j.killing.is_some() {
            let failed = deadline.saturating_add(j.record.policy.grace_ns).saturating_add(EXEC_SLACK);
            if now < failed {
                return self.timers.set(failed, Timer::Deadline(number));
            }
        }
        let act = j.killing.is_none() && !j.timed_kill;
        j.timed_kill |= act;
        if !j.record.expired {
            j.record.expired = true;
            let job = Box::new(j.record.clone());
            fx.push(Effect::Job { job, label: false });
        }
        // As for a supervisor that died, neither the fuse nor `enforcement` is asked: this end was ordered by who ran `exec`.
        if act {
            self.order(g, Reason::Exec, What::Whole, fx);
        }
        let text = if act {
            "Its `exec` did not act on it in time: it is being ended."
        } else {
            "It is being ended."
        };
        self.timeout_alert(g, deadline, Some(text), now, fx);
    }

    fn timeout_alert(&mut self, g: Idx, deadline: u64, kill: Option<&str>, now: u64, fx: &mut Vec<Effect>) {
        let text = summary::timeout(self, g, deadline, kill, now);
        let raise = Raise { since: deadline, summary: text, ..self.about_job(g, now) };
        let Some(number) = self.number(g) else { return };
        self.raise((AlertKind::JobTimeout, About::Job(number)), &raise, now, fx);
    }

    fn number(&self, g: Idx) -> Option<u64> {
        self.jobs.get(g).map(|j| j.record.number)
    }

    /// A firing alert about a job; its root is the subject, as far as it is known.
    fn about_job(&self, g: Idx, now: u64) -> Raise {
        let j = self.jobs.get(g);
        let root = j.and_then(|j| j.root);
        Raise {
            job: Some(g),
            severity: j.and_then(|j| j.record.policy.severity),
            subject: root,
            whose: root,
            count: self.forest.groups.get(g).map_or(0, |g| g.all.live as usize),
            ..Raise::host(now)
        }
    }

    pub(super) fn clear_timeout(&mut self, g: Idx, why: &str, now: u64, fx: &mut Vec<Effect>) {
        let Some(number) = self.number(g) else { return };
        let text = summary::job_over(self, g, why);
        self.clear((AlertKind::JobTimeout, About::Job(number)), text, now, fx);
    }

    /// The job has ended: nothing about it holds any more.
    pub(super) fn clear_job_alerts(&mut self, g: Idx, now: u64, fx: &mut Vec<Effect>) {
        let Some(number) = self.number(g) else { return };
        for kind in [AlertKind::Orphan, AlertKind::JobTimeout, AlertKind::KillFailed] {
            let text = summary::job_over(self, g, "no process of it is left");
            self.clear((kind, About::Job(number)), text, now, fx);
        }
    }

    /// Whether policy may end this job now; asked before its first signal. `Err` says why not. The fuse counts it here.
    pub(super) fn may_kill(&mut self, g: Idx, now: u64, fx: &mut Vec<Effect>) -> Result<(), String> {
        let Some(j) = self.jobs.get(g) else { return Err("the job is not known".into()) };
        let (number, root) = (j.record.number, j.record.id.root);
        if !self.enforcement.on(now) {
            return Err("enforcement is off".into());
        }
        if self.enforcement.state.fuse_open {
            return Err("the fuse is open (`jobwarden enforcement on` closes it)".into());
        }
        if self.untouchable(root) {
            return Err("its root is PID 1, or jobwarden itself or an ancestor of it".into());
        }
        if j.record.existing && !j.record.policy.enforce_existing {
            return Err(
                "its root already ran when the rule first saw it (`enforce_existing` is not set)".into()
            );
        }
        if self.ready.is_none() {
            return Err("the forest is not synced yet".into());
        }
        let counted = self.enforcement.count(number, now);
        self.enforcement.state.fuse_open = !counted;
        // Saved before the first signal: a restart must not give the fuse a new minute.
        fx.push(Effect::Enforcement(self.enforcement.state.clone()));
        if counted {
            return Ok(());
        }
        self.fuse_alert(now, fx);
        Err("the fuse has opened: too many jobs ended within a minute".into())
    }

    pub(super) fn fuse_alert(&mut self, now: u64, fx: &mut Vec<Effect>) {
        if self.enforcement.state.fuse_open {
            let text = summary::fuse(self.enforcement.max_per_minute);
            let raise = Raise { summary: text, ..Raise::host(now) };
            self.raise((AlertKind::EnforcementStopped, About::Host), &raise, now, fx);
        }
    }

    pub(super) fn order(&mut self, g: Idx, reason: Reason, what: What, fx: &mut Vec<Effect>) {
        let Some(j) = self.jobs.get_mut(g) else { return };
        j.killing = Some(reason);
        j.killed |= what == What::Whole;
        j.timed_kill |= reason == Reason::Timeout;
        let JobRecord { id, number, name, rule, policy, .. } = &j.record;
        fx.push(Effect::Kill(Box::new(KillOrder {
            job: *id,
            number: *number,
            job_name: name.clone(),
            rule: rule.clone(),
            reason,
            what,
            root: id.root,
            signal: policy.stop_signal,
            grace_ns: policy.grace_ns,
        })));
    }

    /// A process died that may have supervised jobs: they end with it.
    pub(super) fn supervisor_died(&mut self, key: Key, fx: &mut Vec<Effect>) {
        let mine = |j: &super::jobs::Job| j.record.supervisor == Some(key) && j.done.is_none();
        let jobs: Vec<Idx> = self.jobs.iter().filter(|(_, j)| mine(j)).map(|(g, _)| g).collect();
        for g in jobs {
            let live = self.forest.groups.get(g).is_some_and(|x| x.all.live > 0);
            if live && self.jobs.get(g).is_some_and(|j| j.killing.is_none()) {
                self.order(g, Reason::Exec, What::Whole, fx);
                // As the watcher of an `exec` without an agent does it: nobody waits for a grace any more.
                if let Some(Effect::Kill(k)) = fx.last_mut() {
                    k.grace_ns = 0;
                }
            }
        }
    }

    pub(super) fn started(&mut self, id: JobId, reason: Reason) {
        if let Some(j) = self.jobs.by_id(id).and_then(|g| self.jobs.get_mut(g)) {
            j.killing = Some(reason);
            j.killed = true;
            j.timed_kill |= reason == Reason::Exec;
        }
    }

    pub(super) fn finished(
        &mut self,
        id: JobId,
        reason: Reason,
        whole: bool,
        report: Result<&KillReport, &str>,
        now: u64,
        fx: &mut Vec<Effect>,
    ) {
        let Some(g) = self.jobs.by_id(id) else { return };
        let Some(j) = self.jobs.get_mut(g) else { return };
        // Also of one that is over: its end waits for this.
        j.killing = None;
        if j.done.is_some() {
            j.killed |= whole;
            return;
        }
        // One that was under way at the deadline, and was not about all of the job.
        let recheck = !j.timed_kill;
        // A kill of some orphans does not make the job a killed one, unless the job ends by it.
        j.killed |= whole || j_is_empty(&self.forest, g);
        let failed = match report {
            Ok(r) if r.survivors.is_empty() => None,
            Ok(r) => Some((summary::survivors(r), r.survivors.len())),
            Err(e) => Some((e.to_owned(), 1)),
        };
        let Some(number) = self.number(g) else { return };
        let name = (AlertKind::KillFailed, About::Job(number));
        if let Some((text, count)) = failed {
            let text = summary::kill_failed(self, g, &format!("{text} ({} kill)", reason.as_str()));
            let mut raise = Raise { summary: text, ..self.about_job(g, now) };
            (raise.count, raise.severity) = (count, None);
            self.raise(name, &raise, now, fx);
        } else {
            let text = summary::job_over(self, g, "who survived was ended");
            self.clear(name, text, now, fx);
        }
        if recheck {
            self.set_deadline(g);
        }
        self.plan_orphans(g, now);
    }

    /// A kill of a process outside of jobs is over, or one that was about a process and not about its job.
    pub(super) fn process_kill_over(
        &mut self,
        root: Key,
        report: Result<&KillReport, &str>,
        now: u64,
        fx: &mut Vec<Effect>,
    ) {
        let (why, left) = match report {
            Ok(r) => (summary::survivors(r), r.survivors.iter().map(|r| r.id).collect()),
            Err(e) => (e.to_owned(), vec![root]),
        };
        // Who has ended since is no survivor.
        let left: HashSet<Key> = left.into_iter().filter(|&k| self.stays(k)).collect();
        if left.is_empty() {
            self.survivors.remove(&root);
            let text = summary::process_over(self, root);
            return self.clear((AlertKind::KillFailed, About::Process(root)), text, now, fx);
        }
        let text = summary::process_kill_failed(self, root, &why);
        self.process_kill_failed(root, left, text, now, fx);
    }

    fn process_kill_failed(
        &mut self,
        root: Key,
        left: HashSet<Key>,
        summary: String,
        now: u64,
        fx: &mut Vec<Effect>,
    ) {
        let subject = self.forest.find(root);
        let raise = Raise { subject, whose: subject, count: left.len(), summary, ..Raise::host(now) };
        let name = (AlertKind::KillFailed, About::Process(root));
        self.raise(name, &raise, now, fx);
        // No more of them than there are alerts, which are bounded.
        if self.alerts.get(name).is_some() {
            self.survivors.insert(root, left);
        }
    }

    /// Not a zombie, and not gone.
    fn stays(&self, key: Key) -> bool {
        let state = self.forest.find(key).map(|i| self.forest.node(i).state);
        state.is_some_and(|s| !matches!(s, State::Zombie | State::Gone))
    }

    /// Somebody has ended who may have survived a kill.
    pub(super) fn survivor_ended(&mut self, key: Key, now: u64, fx: &mut Vec<Effect>) {
        let mut over = Vec::new();
        self.survivors.retain(|&root, left| {
            left.remove(&key);
            if left.is_empty() {
                over.push(root);
            }
            !left.is_empty()
        });
        for root in over {
            let text = summary::process_over(self, root);
            self.clear((AlertKind::KillFailed, About::Process(root)), text, now, fx);
        }
    }

    /// After a restart nobody knows who the survivors were: all that descends from the target is taken for one.
    pub(super) fn process_alert_restored(&mut self, root: Key, now: u64, fx: &mut Vec<Effect>) {
        let Some(i) = self.forest.find(root) else { return };
        let below = self.forest.descend(i).map(|i| self.forest.node(i).key);
        let left: HashSet<Key> = below.filter(|&k| self.stays(k)).collect();
        if !left.is_empty() {
            let text = summary::process_kill_failed(self, root, "that was before jobwarden's restart");
            self.process_kill_failed(root, left, text, now, fx);
        }
    }

    pub(super) fn job_alert_restored(
        &mut self,
        kind: AlertKind,
        job: Option<JobId>,
        now: u64,
        fx: &mut Vec<Effect>,
    ) {
        let Some(g) = job.and_then(|id| self.jobs.by_id(id)) else { return };
        let Some(j) = self.jobs.get(g).filter(|j| j.done.is_none()) else { return };
        match kind {
            AlertKind::Orphan => self.orphans_restored(g, now, fx),
            AlertKind::JobTimeout if j.record.expired => {
                let number = j.record.number;
                self.deadline_due(number, now, fx);
            }
            AlertKind::KillFailed => {
                let text = summary::kill_failed(self, g, "that was before jobwarden's restart");
                let Some(number) = self.number(g) else { return };
                let raise = Raise { summary: text, severity: None, ..self.about_job(g, now) };
                self.raise((kind, About::Job(number)), &raise, now, fx);
            }
            _ => {}
        }
    }

    /// `enforcement on|off`: the operator's word.
    pub(super) fn word(&mut self, on: bool, until: Option<u64>, now: u64, fx: &mut Vec<Effect>) {
        self.enforcement.state.by_operator = Some(on);
        self.enforcement.state.until = until;
        if let Some(until) = until {
            self.timers.set(until, Timer::EnforcementOver);
        }
        if on && std::mem::take(&mut self.enforcement.state.fuse_open) {
            self.enforcement.state.ended.clear();
            let text = "Enforcement was switched on again: the fuse is closed.".to_owned();
            self.clear((AlertKind::EnforcementStopped, About::Host), text, now, fx);
        }
        fx.push(Effect::Enforcement(self.enforcement.state.clone()));
        self.reconsider(now);
    }

    pub(super) fn word_over(&mut self, now: u64, fx: &mut Vec<Effect>) {
        let s = &mut self.enforcement.state;
        if s.until.is_some_and(|u| u <= now) {
            (s.by_operator, s.until) = (None, None);
            fx.push(Effect::Enforcement(self.enforcement.state.clone()));
            self.reconsider(now);
        }
    }

    /// What was only told may now be done.
    pub(super) fn reconsider(&mut self, now: u64) {
        if !self.enforcement.on(now) {
            return;
        }
        let jobs: Vec<(Idx, u64, bool)> =
            self.jobs.iter().map(|(g, j)| (g, j.record.number, j.record.expired)).collect();
        for (g, number, expired) in jobs {
            if expired {
                self.timers.set(now, Timer::Deadline(number));
            }
            self.watch_orphans(g, now);
        }
    }
}

fn j_is_empty(f: &crate::engine::forest::Forest, g: Idx) -> bool {
    f.groups.get(g).is_none_or(|x| x.all.live == 0)
}
