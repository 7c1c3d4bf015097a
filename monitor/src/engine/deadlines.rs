//! Deadlines of jobs: when one is acted upon, and its alert.

use super::alerts::{About, AlertStep, Raise};
use super::forest::Idx;
use super::jobs::{Job, Jobs};
use super::output::Change;
use super::record::JobRecord;
use super::summary;
use super::timers::Timer;
use super::turn::{SECOND, Turn};
use super::view::View;
use crate::model::schema::AlertKind;

/// How late the supervisor of an `exec` job may act on the deadline before the engine does: a member may have stopped it.
const SUPERVISOR_SLACK: u64 = SECOND;
/// How long an end that the supervisor has asked for may take, after its grace, before an alert says that it failed.
const EXEC_SLACK: u64 = 2 * SECOND;

/// What a deadline that has passed asks for.
pub(super) struct PassedDeadline {
    pub(super) group: Idx,
    deadline: u64,
    pub(super) kill: DeadlineKill,
}

pub(super) enum DeadlineKill {
    /// The policy does not ask for it, or it was ordered before.
    No,
    /// The deadline passed while the agent was down: one more grace.
    Waits,
    Order,
    /// The supervisor of an `exec` job has not acted on it: in its place.
    InPlaceOfSupervisor,
    /// The supervisor's kill takes too long.
    BySupervisor,
}

/// When the engine acts on the deadline: later where a supervisor does so itself. A deadline that passed while the agent was down
/// could not be acted on by the supervisor either. `ready`: when the forest was first synced.
fn acted_on(r: &JobRecord, ready: Option<u64>) -> Option<u64> {
    let deadline = r.deadline?;
    Some(match r.supervisor {
        Some(_) => deadline.max(ready.unwrap_or(0)).saturating_add(SUPERVISOR_SLACK),
        None => deadline,
    })
}

pub(super) fn set(g: Idx, ready: Option<u64>, jobs: &Jobs, turn: &mut Turn<'_>) {
    if let Some(r) = jobs.get(g).map(|j| &j.record)
        && let Some(at) = acted_on(r, ready)
    {
        turn.set(at, Timer::Deadline(r.number));
    }
}

/// The timer of a deadline has gone off. Nothing is decided before the forest was first synced.
pub(super) fn due(
    number: u64,
    ready: Option<u64>,
    jobs: &mut Jobs,
    turn: &mut Turn<'_>,
) -> Option<PassedDeadline> {
    let now = turn.now;
    let group = jobs.by_number(number)?;
    let j = jobs.get_mut(group)?;
    // A timer from before the deadline was moved.
    if ready.is_none() || j.done.is_some() || acted_on(&j.record, ready).is_none_or(|at| at > now) {
        return None;
    }
    let deadline = j.record.deadline?;
    let kill = if j.record.supervisor.is_some() {
        supervised(j, deadline, turn)?
    } else {
        by_policy(j, deadline, ready?, turn)
    };
    if !j.record.expired {
        j.record.expired = true;
        turn.change(Change::Job(Box::new(j.record.clone())));
    }
    Some(PassedDeadline { group, deadline, kill })
}

fn by_policy(j: &Job, deadline: u64, ready: u64, turn: &mut Turn<'_>) -> DeadlineKill {
    if !j.record.policy.kill_on_timeout || j.killing.is_some() || j.timed_kill {
        return DeadlineKill::No;
    }
    let until = ready.saturating_add(j.record.policy.grace_ns);
    if j.restored && deadline <= ready && turn.now < until {
        turn.set(until, Timer::Deadline(j.record.number));
        return DeadlineKill::Waits;
    }
    DeadlineKill::Order
}

/// The deadline of an `exec` job, whose supervisor should have acted on it by now. None: its kill still has time.
fn supervised(j: &mut Job, deadline: u64, turn: &mut Turn<'_>) -> Option<DeadlineKill> {
    if j.killing.is_some() {
        let failed = deadline.saturating_add(j.record.policy.grace_ns).saturating_add(EXEC_SLACK);
        if turn.now < failed {
            turn.set(failed, Timer::Deadline(j.record.number));
            return None;
        }
    }
    let acts = j.killing.is_none() && !j.timed_kill;
    j.timed_kill |= acts;
    Some(if acts { DeadlineKill::InPlaceOfSupervisor } else { DeadlineKill::BySupervisor })
}

impl PassedDeadline {
    /// The alert. `kill`: what is done about it, as a sentence.
    pub(super) fn alert(&self, kill: Option<&str>, view: View<'_>, now: u64) -> Option<AlertStep> {
        let number = view.jobs.number(self.group)?;
        let text = summary::timeout(view, self.group, self.deadline, kill, now);
        let raise = Raise { since: self.deadline, summary: text, ..Raise::job(self.group, view, now) };
        Some(AlertStep::raise((AlertKind::JobTimeout, About::Job(number)), raise))
    }
}

/// These alerts about a job end, and why.
pub(super) fn clear(kinds: &[AlertKind], g: Idx, why: &str, view: View<'_>) -> Vec<AlertStep> {
    let Some(number) = view.jobs.number(g) else { return Vec::new() };
    let one =
        |&kind: &AlertKind| AlertStep::Clear((kind, About::Job(number)), summary::job_over(view, g, why));
    kinds.iter().map(one).collect()
}
