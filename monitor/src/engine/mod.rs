//! Decides what is a job, an alert or a kill. Pure: it reads no clock and opens no file, so a recorded stream replays to the
//! same result. [`Engine::handle`] takes every [`Input`] and adds to an [`Output`]; queries change nothing.

mod alerts;
mod cgroups;
mod describe;
mod enforcement;
mod event_context;
mod exec;
pub mod forest;
pub mod input;
mod jobs;
mod names;
mod orphans;
pub mod output;
mod proc_poll;
pub mod query;
mod react;
pub mod record;
mod rules;
mod summary;
#[cfg(test)]
mod tests;
mod timers;
mod view;
mod zombies;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::Duration;

pub use event_context::EventContext;
pub use input::{ExecJob, Input, Limits, Observation, Settings};
pub use output::{AlertChange, Answer, Change, Effect, KillOrder, Output, Refused};
pub use query::{Gauges, Target, TreeQuery};
pub use record::{EnforcementState, JobEnded, JobPolicy, JobRecord};

use crate::config::{Config, Match};
use crate::engine::forest::{Fast, Forest, Idx, NodeChange};
use crate::model::event::{Event, WaitStatus};
use crate::model::key::Key;
use crate::model::question::Question;
use crate::model::schema::{Alert, AlertKind, EventLine, Job, JobId, Process, Ref, State, Tree};
use crate::model::stats::Histogram;

/// Most `Effect::Look`s a second, on average, for exits: one whose turn would come above that waits for its next.
pub const LOOKS_PER_S: u64 = 2_000;

const MS: u64 = 1_000_000;
const SECOND: u64 = 1_000 * MS;
/// A zombie or an orphan is a pending alert once it has stayed for this long; most are gone by then.
const PENDING: u64 = SECOND;
/// `events-lost` ends this long after the last loss.
const LOSS_OVER: u64 = 300 * SECOND;

fn nanos(d: Duration) -> u64 {
    u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)
}

/// Nanoseconds by which the wall clock is set at least, if it is; less is slewed.
const CLOCK_STEP: u64 = 10_000_000;

/// The forest and all decisions over it. Times are boot-time nanoseconds and may not go back between two calls (a time
/// that does is taken as the last one).
///
/// Order of a start: `new`, the `Restore` inputs, attach the probes, `SnapshotStarted`, take the snapshot while records go on
/// being handled or after it, `Snapshot`, and when it was taken without loss, `Ready`.
#[derive(Debug)]
pub struct Engine {
    settings: Settings,
    static_labels: BTreeMap<String, String>,
    /// `[zombies].after`, ns.
    zombies_after: u64,
    /// Each with what of its MATCH needs no look at /proc.
    rules: Vec<(rules::Watched, Option<Match>)>,
    enforcement: enforcement::Enforcement,
    forest: Forest,
    jobs: jobs::Jobs,
    /// Values of the `job_name` label.
    names: names::Names,
    alerts: alerts::Alerts,
    timers: timers::Timers,
    cgroups: cgroups::Cgroups,
    looks: proc_poll::Budget,
    alert_looks: proc_poll::Budget,
    /// Parents that have zombies which stay.
    watches: zombies::Watches,
    /// All zombies by age.
    zombies: BTreeSet<(u64, Idx)>,
    reap_delay: Histogram,
    /// Whose facts a rule waits for -> who waits.
    waiting: HashMap<Key, Vec<Key>>,
    scan: Option<rules::Scan>,
    /// Supervisors of `exec` jobs, and how many jobs each has.
    supervisors: HashMap<Key, usize, Fast>,
    /// Targets of kills outside of jobs under a `kill-failed` alert, and who of each is left.
    survivors: HashMap<Key, HashSet<Key>>,
    /// When the forest was first synced.
    ready: Option<u64>,
    /// Records were lost and no snapshot has been merged since.
    unsynced: bool,
    merging: bool,
    /// Lost since `events-lost` fires, when that began, and the last time.
    lost: (u64, u64, u64),
    /// What the edge said is wrong about its stores.
    wrong: Option<String>,
    changes: Vec<NodeChange>,
    now: u64,
}

impl Engine {
    #[must_use]
    pub fn new(settings: Settings, config: &Config) -> Self {
        let l = settings.limits;
        let mut names = names::Names::default();
        names.set_rules(config.jobs.iter().map(|r| r.name.as_str()), 0);
        Self {
            forest: Forest::new(l.processes, l.tombstones, l.signals),
            static_labels: config.agent.labels.clone(),
            zombies_after: nanos(config.zombies.after),
            rules: rules::watched(&config.jobs),
            enforcement: enforcement::Enforcement::new(&config.enforcement),
            jobs: jobs::Jobs::default(),
            names,
            alerts: alerts::Alerts::default(),
            timers: timers::Timers::default(),
            cgroups: cgroups::Cgroups::default(),
            looks: proc_poll::Budget::exits(),
            alert_looks: proc_poll::Budget::alerts(),
            watches: zombies::Watches::default(),
            zombies: BTreeSet::new(),
            reap_delay: Histogram::new(crate::model::stats::REAP_DELAY_BOUNDS),
            waiting: HashMap::new(),
            scan: None,
            supervisors: HashMap::default(),
            survivors: HashMap::new(),
            ready: None,
            unsynced: false,
            merging: false,
            lost: (0, 0, 0),
            wrong: None,
            changes: Vec::new(),
            now: 0,
            settings,
        }
    }

    /// The one door: applies an input at boot time `now` (ns) and adds to `out` what follows from it. A record brings its own time.
    pub fn handle(&mut self, input: Input<'_>, now: u64, out: &mut Output) -> Answer {
        let now = self.later(now);
        match input {
            Input::Record { event, .. } => self.apply(event, out),
            Input::SnapshotStarted { t0 } => {
                self.later(t0);
                self.forest.snapshot_started(t0);
            }
            Input::Snapshot(s) => return Answer::Merged(self.merge(&s, now, out)),
            Input::Ready => self.become_ready(now, out),
            Input::Observation(o) => self.observed(o.into_owned(), now, out),
            Input::Tick => self.run_timers(now, out),
            Input::Clock { boot_to_wall_ns } => self.set_clock(boot_to_wall_ns),
            Input::RestoreEnforcement(s) => self.restore_enforcement(s.into_owned()),
            Input::RestoreJobs(jobs) => self.restore(jobs.into_owned()),
            Input::RestoreAlerts { alerts, this_boot } => {
                self.restore_alert_list(alerts.into_owned(), this_boot, now, out);
            }
            Input::Reload(config) => self.take_config(&config, now, out),
            Input::RegisterJob(job) => {
                return Answer::Job(self.exec_job(job.into_owned(), now, out).map(Box::new));
            }
            Input::ExtendJob { job, by } => {
                return Answer::Job(self.extend_job(job, by, now, out).map(Box::new));
            }
            Input::ReleaseJob { job } => return Answer::Job(self.release(job, now, out).map(Box::new)),
            Input::ReserveNumbers { count } => return Answer::Number(self.jobs.reserve_numbers(count, now)),
            Input::KillStarted { job, reason } => self.started(job, reason),
            Input::KillFinished { job, reason, whole, report } => {
                self.finished(job, reason, whole, report.as_deref().map_err(AsRef::as_ref), now, out);
            }
            Input::ProcessKillFinished { root, report } => {
                self.process_kill_over(root, report.as_deref().map_err(AsRef::as_ref), now, out);
            }
            Input::Enforcement { on, lasts } => {
                let until = lasts.map(|d| now.saturating_add(nanos(d)));
                self.word(on, until, now, out);
            }
            Input::EventsLost { count } => {
                self.unsynced = true;
                self.loss(count, now, out);
            }
            Input::Condition { kind, problem } => {
                self.edge_condition(kind, problem.map(Cow::into_owned), now, out);
            }
            Input::JobCounted { number, alive } => self.counted(number, alive, now, out),
            Input::Cause { alert, cause } => self.cause(&alert, cause.into_owned(), now, out),
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

    fn restore_enforcement(&mut self, s: EnforcementState) {
        if let Some(until) = s.until {
            self.timers.set(until, timers::Timer::EnforcementOver);
        }
        self.enforcement.state = s;
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

    // Views.

    pub fn tree(&self, q: &TreeQuery, now: u64) -> Result<Tree, Refused> {
        self.view_tree(q, now)
    }

    /// Newest last; the done ones that are still remembered too.
    #[must_use]
    pub fn jobs(&self) -> Vec<Job> {
        self.view_jobs()
    }

    #[must_use]
    pub fn job_record(&self, id: JobId) -> Option<JobRecord> {
        Some(self.jobs.get(self.jobs.by_id(id)?)?.record.clone())
    }

    /// Every job that has not ended, as it must be saved.
    #[must_use]
    pub fn job_records(&self) -> Vec<JobRecord> {
        self.records()
    }

    /// Members of the job and of its inner jobs, zombies too.
    #[must_use]
    pub fn members(&self, id: JobId) -> Vec<Key> {
        let in_it = |&i: &Idx| self.jobs.by_id(id).is_some_and(|g| self.forest.in_group(i, g));
        let all = self.members_of(id);
        all.into_iter().filter(in_it).map(|i| self.forest.node(i).key).collect()
    }

    /// Firing ones; with `all` the pending too.
    #[must_use]
    pub fn alerts(&self, all: bool) -> Vec<Alert> {
        self.view_alerts(all)
    }

    #[must_use]
    pub fn process(&self, key: Key, now: u64) -> Option<Process> {
        self.describe(self.forest.find(key)?, now)
    }

    #[must_use]
    pub fn reference(&self, key: Key) -> Option<Ref> {
        self.forest.find(key).map(|i| self.ref_of(i))
    }

    /// The process that has this pid now, or had it last and is still known.
    #[must_use]
    pub fn current(&self, pid: u32) -> Option<Key> {
        self.forest.current(pid).map(|i| self.forest.node(i).key)
    }

    /// What `why::explain` needs. The question of an alert is that of its oldest zombie or orphan.
    #[must_use]
    pub fn question(&self, key: Key, now: u64) -> Option<Question> {
        self.ask_why(key, now)
    }

    /// The process that an alert's cause is about: the oldest zombie or orphan.
    #[must_use]
    pub fn alert_subject(&self, alert: &str) -> Option<Key> {
        let e = self.alerts.by_id(alert)?;
        e.oldest.or_else(|| e.alert.subject.as_ref().map(|p| p.id))
    }

    /// The firing alerts that have a cause, each with the process that it is about.
    pub fn to_explain(&self) -> impl Iterator<Item = (&str, Key)> {
        let explained = |e: &&alerts::Entry| {
            let kind = matches!(e.alert.kind, AlertKind::Zombie | AlertKind::Orphan);
            kind && e.alert.state == crate::model::schema::AlertState::Firing
        };
        self.alerts.iter().filter(explained).filter_map(|e| {
            let subject = e.oldest.or_else(|| e.alert.subject.as_ref().map(|p| p.id))?;
            Some((e.alert.id.as_str(), subject))
        })
    }

    /// PID, ID, JOB or name:NAME; the several matches of a name oldest first. Empty never: that is `Refused`.
    pub fn resolve(&self, target: &str) -> Result<Vec<Target>, Refused> {
        self.targets(target)
    }

    #[must_use]
    pub fn gauges(&self, now: u64) -> Gauges {
        self.numbers(now)
    }

    /// For `events`: call before `event`, since a reaped process is forgotten with its record.
    #[must_use]
    pub fn event_context(&self, e: &Event<'_>) -> EventContext {
        self.context_of(e)
    }

    /// Not in the forest, or there only as a dead ancestor.
    #[must_use]
    pub fn is_gone(&self, key: Key) -> bool {
        self.forest.find(key).is_none_or(|i| self.forest.node(i).state == State::Gone)
    }

    /// As far as its exit told.
    #[must_use]
    pub fn wait_status(&self, key: Key) -> Option<WaitStatus> {
        self.forest.node(self.forest.find(key)?).wait_status()
    }

    /// One line of `events`. `job` is the innermost of its process.
    #[must_use]
    pub fn event_line(&self, e: &Event<'_>, m: &EventContext, job: Option<JobId>) -> EventLine {
        m.line(e, self.wall(e.at), job)
    }

    /// The jobs (innermost first) of the process that an event is about.
    #[must_use]
    pub fn jobs_of(&self, key: Key) -> Vec<JobId> {
        self.named_jobs(key).map(|j| j.0).collect()
    }

    /// The same, with their names.
    pub fn named_jobs(&self, key: Key) -> impl Iterator<Item = (JobId, &str)> + Clone {
        let i = self.forest.find(key);
        let chain = i.into_iter().flat_map(|i| self.forest.groups.chain(self.forest.node(i).group));
        chain.filter_map(|g| self.jobs.get(g)).map(|j| (j.record.id, j.record.name.as_str()))
    }

    #[must_use]
    pub fn enforcement_state(&self) -> EnforcementState {
        self.enforcement.state.clone()
    }

    /// Whether policy kills now: config, operator and fuse taken together.
    #[must_use]
    pub fn enforcing(&self, now: u64) -> bool {
        self.enforcement.on(now) && !self.enforcement.state.fuse_open
    }

    /// Time does not go back.
    fn later(&mut self, now: u64) -> u64 {
        self.now = self.now.max(now);
        self.now
    }
}
