//! Alerts about jobwarden itself: lost records, full stores, what the agent finds wrong.

use super::alerts::{About, AlertStep, Alerts, Name, Raise};
use super::forest::Forest;
use super::input::Limits;
use super::jobs::Jobs;
use super::summary;
use super::timers::Timer;
use super::turn::{SECOND, Turn};
use crate::model::schema::{Alert, AlertKind};

/// `events-lost` ends this long after the last loss.
const LOSS_OVER: u64 = 300 * SECOND;
/// A store that was full has room again when it is filled to less than this, in percent.
const ROOM: usize = 90;
/// How often a full store is looked at.
const LOOK: u64 = 10 * SECOND;

const LOST: Name = (AlertKind::EventsLost, About::Host);
const CAPACITY: Name = (AlertKind::Capacity, About::Host);

/// Records that were lost while `events-lost` fires.
#[derive(Debug, Default)]
pub(super) struct Losses {
    count: u64,
    since: u64,
    /// The last loss, boot-time ns; 0: none.
    pub(super) last: u64,
}

impl Losses {
    /// `alerted`: `events-lost` is there already.
    pub(super) fn add(&mut self, n: u64, alerted: bool, turn: &mut Turn<'_>) -> AlertStep {
        let now = turn.now;
        if !alerted {
            (self.count, self.since) = (0, now);
        }
        self.count = self.count.saturating_add(n);
        self.last = now;
        turn.set(now.saturating_add(LOSS_OVER), Timer::LossOver);
        let count = self.count as usize;
        let summary = summary::lost(count, now, self.since);
        AlertStep::raise(LOST, Raise { count, since: self.since, summary, ..Raise::host(now) })
    }

    /// It fired before a restart: its summary stays, and it ends as late after this moment as after a loss.
    pub(super) fn restored(&mut self, a: &Alert, turn: &mut Turn<'_>) -> AlertStep {
        let now = turn.now;
        (self.count, self.since, self.last) = (a.count as u64, now, now);
        turn.set(now.saturating_add(LOSS_OVER), Timer::LossOver);
        AlertStep::raise(LOST, Raise { count: a.count, summary: a.summary.clone(), ..Raise::host(now) })
    }

    pub(super) fn due(&self, now: u64) -> Option<AlertStep> {
        let over = self.last.saturating_add(LOSS_OVER) <= now;
        let text = || format!("No record was lost in the last 5 minutes; {} were before.", self.count);
        over.then(|| AlertStep::Clear(LOST, text()))
    }
}

/// What is full, here and outside of the engine.
#[derive(Debug, Default)]
pub(super) struct Capacity {
    /// What the agent found wrong about its stores.
    problem: Option<String>,
}

/// A store of the engine that is filled to this many percent.
fn full(
    percent: usize,
    limits: Limits,
    forest: &Forest,
    jobs: &Jobs,
    alerts: &Alerts,
) -> Option<&'static str> {
    let at = |n: usize, max: usize| n.saturating_mul(100) >= max.saturating_mul(percent);
    [
        ("processes", forest.len(), limits.processes),
        ("jobs", jobs.len(), limits.jobs),
        ("alerts", alerts.len(), limits.alerts),
    ]
    .into_iter()
    .find(|&(_, n, max)| at(n, max))
    .map(|(name, ..)| name)
}

impl Capacity {
    /// Something was refused because a store is full.
    pub(super) fn refused(
        limits: Limits,
        (forest, jobs, alerts): (&Forest, &Jobs, &Alerts),
        turn: &mut Turn<'_>,
    ) -> Option<AlertStep> {
        let store = full(100, limits, forest, jobs, alerts)?;
        Self::report(format!("jobwarden's table of {store} is full: more are not followed."), alerts, turn)
    }

    /// An alert that ends by itself when there is room again.
    pub(super) fn report(summary: String, alerts: &Alerts, turn: &mut Turn<'_>) -> Option<AlertStep> {
        if alerts.get(CAPACITY).is_some() {
            return None;
        }
        Self::watch(turn);
        Some(AlertStep::raise(CAPACITY, Raise { summary, ..Raise::host(turn.now) }))
    }

    /// Whether there is room again is looked at until there is.
    pub(super) fn watch(turn: &mut Turn<'_>) {
        turn.set(turn.now.saturating_add(LOOK), Timer::Capacity);
    }

    pub(super) fn due(
        &self,
        limits: Limits,
        (forest, jobs, alerts): (&Forest, &Jobs, &Alerts),
        turn: &mut Turn<'_>,
    ) -> Option<AlertStep> {
        if full(ROOM, limits, forest, jobs, alerts).is_some() {
            Self::watch(turn);
            return None;
        }
        self.problem.is_none().then(|| AlertStep::Clear(CAPACITY, "There is room again.".into()))
    }

    /// What the agent finds about its stores; None: there is room.
    pub(super) fn set(&mut self, problem: Option<String>) {
        self.problem = problem;
    }
}

/// `storage-failed` or `capacity` as the agent finds it.
pub(super) fn problem(kind: AlertKind, summary: String, now: u64) -> AlertStep {
    AlertStep::raise((kind, About::Host), Raise { summary, ..Raise::host(now) })
}

/// The condition is over.
pub(super) fn over(kind: AlertKind) -> AlertStep {
    AlertStep::Clear((kind, About::Host), "It works again.".into())
}
