//! Kills: orders by policy, and what a kill that is over means for its job and its alert.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use super::alerts::{About, AlertStep, Raise};
use super::forest::{Forest, Idx};
use super::jobs::Jobs;
use super::output::Effect;
use super::summary;
use super::turn::Turn;
use super::view::View;
use crate::model::key::Key;
use crate::model::kill::{AskedBy, KillSpec, Reason, What};
use crate::model::schema::{AlertKind, JobId, KillReport, State};

/// Orders the end of (a part of) a job. `grace_ns` None: that of the job.
pub(super) fn order(
    g: Idx,
    reason: Reason,
    what: What,
    grace_ns: Option<u64>,
    jobs: &mut Jobs,
    turn: &mut Turn<'_>,
) {
    let Some(j) = jobs.get_mut(g) else { return };
    j.killing = Some(reason);
    j.killed |= what == What::Whole;
    j.timed_kill |= reason == Reason::Timeout;
    let kill = j.record.kill(what, reason);
    turn.effect(Effect::Kill(Box::new(KillSpec {
        grace: grace_ns.map_or(kill.grace, Duration::from_nanos),
        asked_by: AskedBy { rule: j.record.rule.clone(), ..AskedBy::default() },
        ..kill
    })));
}

/// `kill` or `exec` ends this job.
pub(super) fn started(id: JobId, reason: Reason, jobs: &mut Jobs) {
    if let Some(j) = jobs.by_id(id).and_then(|g| jobs.get_mut(g)) {
        j.killing = Some(reason);
        j.killed = true;
        j.timed_kill |= reason == Reason::Exec;
    }
}

/// A kill of a job is over. Gives the job if it goes on.
pub(super) fn finished(id: JobId, whole: bool, jobs: &mut Jobs, forest: &Forest) -> Option<Idx> {
    let g = jobs.by_id(id)?;
    let j = jobs.get_mut(g)?;
    // Also of one that has ended: its end waits for this.
    j.killing = None;
    if j.done.is_some() {
        j.killed |= whole;
        return None;
    }
    // A kill of some orphans does not make the job a killed one, unless the job ends by it.
    j.killed |= whole || forest.groups.get(g).is_none_or(|x| x.all.live == 0);
    Some(g)
}

/// The `kill-failed` alert of a job after a kill: raised or cleared.
pub(super) fn alert(
    g: Idx,
    reason: Reason,
    report: Result<&KillReport, &str>,
    view: View<'_>,
    now: u64,
) -> Option<AlertStep> {
    let name = (AlertKind::KillFailed, About::Job(view.jobs.number(g)?));
    let (text, count) = match report {
        Ok(r) if r.survivors.is_empty() => {
            let text = summary::job_over(view, g, "its survivors were ended");
            return Some(AlertStep::Clear(name, text));
        }
        Ok(r) => (summary::survivors(r), r.survivors.len()),
        Err(e) => (e.to_owned(), 1),
    };
    let text = summary::kill_failed(view, g, &format!("{text} ({} kill)", reason.as_str()));
    let raise = Raise { summary: text, count, severity: None, ..Raise::job(g, view, now) };
    Some(AlertStep::raise(name, raise))
}

/// A `kill-failed` alert of this job fired before a restart.
pub(super) fn alert_restored(g: Idx, view: View<'_>, now: u64) -> Option<AlertStep> {
    let name = (AlertKind::KillFailed, About::Job(view.jobs.number(g)?));
    let text = summary::kill_failed(view, g, "that was before jobwarden's restart");
    Some(AlertStep::raise(name, Raise { summary: text, severity: None, ..Raise::job(g, view, now) }))
}

/// Targets of kills outside of jobs under a `kill-failed` alert, and the survivors of each.
#[derive(Debug, Default)]
pub(super) struct Survivors {
    by_root: HashMap<Key, HashSet<Key>>,
}

fn alert_of(root: Key) -> (AlertKind, About) {
    (AlertKind::KillFailed, About::Process(root))
}

/// Neither a zombie nor gone.
fn lives(key: Key, forest: &Forest) -> bool {
    let state = forest.find(key).map(|i| forest.node(i).state);
    state.is_some_and(|s| !matches!(s, State::Zombie | State::Gone))
}

impl Survivors {
    /// A kill of a process outside of jobs is over, or one that was about a process and not about its job.
    pub(super) fn finished(
        &mut self,
        root: Key,
        report: Result<&KillReport, &str>,
        view: View<'_>,
        now: u64,
    ) -> AlertStep {
        let (why, left) = match report {
            Ok(r) => (summary::survivors(r), r.survivors.iter().map(|r| r.id).collect()),
            Err(e) => (e.to_owned(), vec![root]),
        };
        // A process that has ended since is no survivor.
        let left: HashSet<Key> = left.into_iter().filter(|&k| lives(k, view.forest)).collect();
        if left.is_empty() {
            self.by_root.remove(&root);
            return AlertStep::Clear(alert_of(root), summary::process_over(view, root));
        }
        let text = summary::process_kill_failed(view, root, &why);
        self.failed(root, left, text, view, now)
    }

    fn failed(
        &mut self,
        root: Key,
        left: HashSet<Key>,
        summary: String,
        view: View<'_>,
        now: u64,
    ) -> AlertStep {
        let subject = view.forest.find(root);
        let raise = Raise { subject, whose: subject, count: left.len(), summary, ..Raise::host(now) };
        self.by_root.insert(root, left);
        AlertStep::raise(alert_of(root), raise)
    }

    /// There was no room for the alert about this target: no more of them than there are alerts, which are bounded.
    pub(super) fn forget(&mut self, root: Key) {
        self.by_root.remove(&root);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_root.is_empty()
    }

    /// A process has ended that may have survived a kill.
    pub(super) fn ended(&mut self, key: Key, view: View<'_>) -> Vec<AlertStep> {
        let mut over = Vec::new();
        self.by_root.retain(|&root, left| {
            left.remove(&key);
            if left.is_empty() {
                over.push(AlertStep::Clear(alert_of(root), summary::process_over(view, root)));
            }
            !left.is_empty()
        });
        over
    }

    /// After a restart the survivors are not known: all that descends from the target counts as one.
    pub(super) fn restored(&mut self, root: Key, view: View<'_>, now: u64) -> Option<AlertStep> {
        let below = view.forest.descend(view.forest.find(root)?).map(|i| view.forest.node(i).key);
        let left: HashSet<Key> = below.filter(|&k| lives(k, view.forest)).collect();
        if left.is_empty() {
            return None;
        }
        let text = summary::process_kill_failed(view, root, "that was before jobwarden's restart");
        Some(self.failed(root, left, text, view, now))
    }
}
