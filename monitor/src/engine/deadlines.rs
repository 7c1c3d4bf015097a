//! Deadlines of jobs: when one is acted upon, and its alert.

use super::alerts::{About, AlertStep, Raise};
use super::forest::Idx;
use super::jobs::Jobs;
use super::output::Change;
use super::summary;
use super::timers::Timer;
use super::turn::{SECOND, Turn};
use super::view::View;
use crate::model::schema::AlertKind;

/// A supervisor of an `exec` job that is alive has this long, after deadline and grace, before an alert says it failed.
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
}

/// When the deadline is acted upon: that of an `exec` job by its supervisor, unless that one fails to.
pub(super) fn set(g: Idx, jobs: &Jobs, turn: &mut Turn<'_>) {
    let Some(r) = jobs.get(g).map(|j| &j.record) else { return };
    let Some(deadline) = r.deadline else { return };
    let slack = if r.supervisor.is_some() { r.policy.grace_ns.saturating_add(EXEC_SLACK) } else { 0 };
    turn.set(deadline.saturating_add(slack), Timer::Deadline(r.number));
}

/// The timer of a deadline has gone off. `ready`: when the forest was first synced; nothing is decided before that.
pub(super) fn due(
    number: u64,
    ready: Option<u64>,
    jobs: &mut Jobs,
    turn: &mut Turn<'_>,
) -> Option<PassedDeadline> {
    let (now, ready) = (turn.now, ready?);
    let group = jobs.by_number(number)?;
    let j = jobs.get_mut(group)?;
    let deadline = j.record.deadline.filter(|&d| d <= now && j.done.is_none())?;
    if !j.record.expired {
        j.record.expired = true;
        turn.change(Change::Job(Box::new(j.record.clone())));
    }
    let asks = j.record.policy.kill_on_timeout && j.killing.is_none() && !j.timed_kill;
    let until = ready.saturating_add(j.record.policy.grace_ns);
    let kill = if !asks {
        DeadlineKill::No
    } else if j.restored && deadline <= ready && now < until {
        turn.set(until, Timer::Deadline(number));
        DeadlineKill::Waits
    } else {
        DeadlineKill::Order
    };
    Some(PassedDeadline { group, deadline, kill })
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
