//! Decides what is a job, an alert or a kill. Pure: it reads no clock and opens no file, so a recorded stream replays to the
//! same result. [`Engine::handle`] takes every [`Input`] and adds to an [`Output`]; queries change nothing.
//!
//! Each part owns its state and returns what follows from a call; only this file passes it on to other parts.

/// The turn of an input: the fields that every part may write, borrowed beside the part itself.
macro_rules! turn {
    ($engine:ident, $out:ident) => {
        &mut Turn { now: $engine.now, timers: &mut $engine.timers, out: &mut *$out }
    };
}

/// What the parts describe processes and jobs with, borrowed beside the part itself.
macro_rules! view {
    ($engine:ident) => {
        View { settings: &$engine.settings, forest: &$engine.forest, jobs: &$engine.jobs }
    };
}

mod alerts;
mod cgroups;
mod conditions;
mod deadlines;
mod dispatch;
mod enforcement;
mod event_context;
mod facts;
pub mod forest;
pub mod input;
mod jobs;
mod kills;
mod names;
mod orphans;
pub mod output;
pub(crate) mod prefilter;
mod proc_poll;
mod queries;
pub mod query;
pub mod record;
mod rules;
mod summary;
#[cfg(test)]
mod tests;
mod timers;
mod turn;
mod view;
mod zombies;

use std::borrow::Cow;

pub use event_context::EventContext;
pub use input::{ExecJob, Input, Limits, Observation, Settings};
pub use output::{AlertChange, Answer, Change, Effect, Output, Refused};
pub use proc_poll::LOOKS_PER_S;
pub use query::{Gauges, Target, TreeQuery};
pub use record::{EnforcementState, JobEnded, JobPolicy, JobRecord};

use self::alerts::{About, AlertStep, Alerts};
use self::conditions::{Capacity, Losses};
use self::forest::{Forest, Idx, NodeChange};
use self::jobs::Jobs;
use self::orphans::Orphans;
use self::proc_poll::ExitPolls;
use self::timers::Timers;
use self::turn::{Turn, nanos};
use self::view::View;
use crate::config::Config;
use crate::model::key::Key;
use crate::model::schema::AlertKind;
use crate::model::stats::{Histogram, REAP_DELAY_BOUNDS};

/// Nanoseconds by which the wall clock is set at least, if it is; less is slewed.
const CLOCK_STEP: u64 = 10_000_000;

/// The forest and all decisions over it. Times are boot-time nanoseconds and may not go back between two inputs (a time
/// that does counts as the last one).
///
/// Order of a start: `new`, the `Restore` inputs, attach the probes, `SnapshotStarted`, take the snapshot while records go on
/// being handled or after it, `Snapshot`, and when it was taken without loss, `Ready`.
#[derive(Debug)]
pub struct Engine {
    settings: Settings,
    forest: Forest,
    jobs: Jobs,
    timers: Timers,
    alerts: Alerts,
    zombies: zombies::Zombies,
    orphans: Orphans,
    enforcement: enforcement::Enforcement,
    survivors: kills::Survivors,
    rules: rules::Rules,
    cgroups: cgroups::Cgroups,
    exit_polls: ExitPolls,
    /// Values of the `job_name` label.
    names: names::Names,
    losses: Losses,
    capacity: Capacity,
    reap_delay: Histogram,
    /// When the forest was first synced.
    ready: Option<u64>,
    /// Records were lost and no snapshot has been merged since.
    unsynced: bool,
    merging: bool,
    changes: Vec<NodeChange>,
    now: u64,
}

impl Engine {
    #[must_use]
    pub fn new(settings: Settings, config: &Config) -> Self {
        let l = settings.limits;
        let mut engine = Self {
            forest: Forest::new(l.processes, l.tombstones, l.signals),
            jobs: Jobs::default(),
            timers: Timers::default(),
            alerts: Alerts::default(),
            zombies: zombies::Zombies::new(nanos(config.zombies.after)),
            orphans: Orphans::default(),
            enforcement: enforcement::Enforcement::new(&config.enforcement),
            survivors: kills::Survivors::default(),
            rules: rules::Rules::default(),
            cgroups: cgroups::Cgroups::default(),
            exit_polls: ExitPolls::default(),
            names: names::Names::default(),
            losses: Losses::default(),
            capacity: Capacity::default(),
            reap_delay: Histogram::new(REAP_DELAY_BOUNDS),
            ready: None,
            unsynced: false,
            merging: false,
            changes: Vec::new(),
            now: 0,
            settings,
        };
        engine.configure(config);
        engine
    }

    fn configure(&mut self, config: &Config) {
        self.alerts.static_labels.clone_from(&config.agent.labels);
        self.zombies.after = nanos(config.zombies.after);
        self.enforcement.configure(&config.enforcement);
        self.rules.set(&config.jobs);
        self.names.set_rules(config.jobs.iter().map(|r| r.name.as_str()), self.now);
    }

    fn view(&self) -> View<'_> {
        view!(self)
    }

    /// The one door: applies an input at boot time `now` (ns) and adds to `out` what follows from it. A record brings its own time.
    pub fn handle(&mut self, input: Input<'_>, now: u64, out: &mut Output) -> Answer {
        // Time does not go back, and it ends before `u64::MAX`: a timer whose time saturates there never goes off.
        self.now = self.now.max(now).min(u64::MAX - 1);
        match input {
            Input::Record { event, .. } => self.record(event, out),
            Input::SnapshotStarted { t0 } => {
                self.now = self.now.max(t0);
                self.forest.snapshot_started(t0);
            }
            Input::Snapshot(s) => return Answer::Merged(self.merge(&s, out)),
            Input::Ready => self.become_ready(out),
            Input::Observation(o) => self.observed(o.into_owned(), out),
            Input::Tick => self.run_timers(out),
            Input::Clock { boot_to_wall_ns } => self.set_clock(boot_to_wall_ns),
            Input::RestoreEnforcement(s) => self.enforcement.restore(s.into_owned(), turn!(self, out)),
            Input::RestoreJobs(jobs) => self.restore_jobs(&jobs),
            Input::RestoreAlerts { alerts, this_boot } => {
                self.alerts.restore(alerts.into_owned(), this_boot, view!(self), turn!(self, out));
            }
            Input::Reload(config) => self.reload(&config, out),
            Input::RegisterJob(job) => return Answer::Job(self.register(job.into_owned(), out)),
            Input::ExtendJob { job, by } => return Answer::Job(self.extend(job, by, out)),
            Input::ReleaseJob { job } => return Answer::Job(self.release(job, out)),
            Input::ReserveNumbers { count } => {
                return Answer::Number(self.jobs.reserve_numbers(count, self.now));
            }
            Input::KillStarted { job, reason } => kills::started(job, reason, &mut self.jobs),
            Input::KillFinished { job, reason, whole, report } => {
                self.kill_finished(job, reason, whole, report.as_deref().map_err(AsRef::as_ref), out);
            }
            Input::ProcessKillFinished { root, report } => {
                let report = report.as_deref().map_err(AsRef::as_ref);
                let step = self.survivors.finished(root, report, view!(self), self.now);
                self.survivor_alert(root, step, out);
            }
            Input::Enforcement { on, lasts } => self.set_enforcement(on, lasts.map(nanos), out),
            Input::EventsLost { count } => {
                self.unsynced = true;
                let alerted = self.alerts.get((AlertKind::EventsLost, About::Host)).is_some();
                let step = self.losses.add(count, alerted, turn!(self, out));
                self.alert(step, out);
            }
            Input::Condition { kind, problem } => self.condition(kind, problem.map(Cow::into_owned), out),
            Input::JobCounted { number, alive } => self.job_counted(number, alive, out),
            Input::Cause { alert, cause } => {
                self.alerts.set_cause(&alert, cause.into_owned(), turn!(self, out));
            }
        }
        Answer::None
    }

    /// Both clocks run at one rate, and a smaller difference comes from reading one after the other: the start of a process must
    /// not read differently each time.
    fn set_clock(&mut self, boot_to_wall_ns: i64) {
        if self.settings.boot_to_wall_ns.abs_diff(boot_to_wall_ns) >= CLOCK_STEP {
            self.settings.boot_to_wall_ns = boot_to_wall_ns;
        }
    }

    /// The forkers of the records that come next ([`event::forker`](crate::model::event::forker)). Changes nothing: they are fetched from
    /// memory beside each other. Among a million processes handling a fork is mostly waiting for its forker; all others are young, and near.
    pub fn expect(&self, forkers: &[Key]) {
        self.forest.expect(forkers);
    }

    /// When `Input::Tick` has something to do next.
    #[must_use]
    pub fn next_wake(&self) -> Option<u64> {
        self.timers.next()
    }

    // What the parts ask of each other.

    /// An alert is raised or cleared.
    fn alert(&mut self, step: impl Into<Option<AlertStep>>, out: &mut Output) {
        match step.into() {
            None => {}
            Some(AlertStep::Raise(name, raise)) => {
                let room = self.alerts.raise(name, &raise, view!(self), turn!(self, out));
                if !room {
                    self.store_full(out);
                }
            }
            Some(AlertStep::Clear(name, end)) => self.alerts.clear(name, end, view!(self), turn!(self, out)),
        }
    }

    fn alerts_all(&mut self, steps: Vec<AlertStep>, out: &mut Output) {
        for step in steps {
            self.alert(step, out);
        }
    }

    /// Something was refused because a store is full.
    fn store_full(&mut self, out: &mut Output) {
        let stores = (&self.forest, &self.jobs, &self.alerts);
        let step = Capacity::refused(self.settings.limits, stores, turn!(self, out));
        self.alert(step, out);
    }

    /// The `kill-failed` alert of a process outside of jobs. Without room for the alert its survivors are not followed.
    fn survivor_alert(&mut self, root: Key, step: impl Into<Option<AlertStep>>, out: &mut Output) {
        self.alert(step, out);
        if self.alerts.get((AlertKind::KillFailed, About::Process(root))).is_none() {
            self.survivors.forget(root);
        }
    }

    fn plan_zombie(&mut self, i: Idx, out: &mut Output) {
        self.zombies.plan_for(i, &self.forest, &self.jobs, turn!(self, out));
    }

    fn zombie_left(&mut self, parent: Idx, out: &mut Output) {
        self.zombies.left(parent, &self.forest, turn!(self, out));
    }

    fn look_soon(&mut self, i: Idx, at: u64, out: &mut Output) {
        ExitPolls::begin(i, at, &mut self.forest, turn!(self, out));
    }

    fn watch_orphans(&mut self, g: Idx, out: &mut Output) {
        self.orphans.watch(g, &self.forest, &self.jobs, turn!(self, out));
    }

    fn orphan_left(&mut self, g: Idx, out: &mut Output) {
        let Some(number) = self.jobs.number(g) else { return };
        let alerted = self.alerts.get((AlertKind::Orphan, About::Job(number))).is_some();
        self.orphans.left(g, alerted, &self.jobs, turn!(self, out));
    }

    fn set_deadline(&mut self, g: Idx, out: &mut Output) {
        deadlines::set(g, self.ready, &self.jobs, turn!(self, out));
    }

    fn clear_job_alerts(&mut self, kinds: &[AlertKind], g: Idx, why: &str, out: &mut Output) {
        let steps = deadlines::clear(kinds, g, why, view!(self));
        self.alerts_all(steps, out);
    }
}
