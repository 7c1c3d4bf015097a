//! What is a job, an alert or a kill: pure. [`Engine`] owns the forest and is the one thing that the agent drives: it is
//! given events, snapshots, observations, commands and the time, and it answers with [`Effect`]s. It reads no clock and
//! opens no file, so a recorded stream replays to the same result.

mod alerts;
mod cgroups;
mod describe;
pub mod effect;
mod enforcement;
mod event_context;
mod exec;
pub mod forest;
pub mod input;
mod jobs;
mod names;
mod orphans;
mod proc_poll;
mod react;
mod rules;
mod summary;
#[cfg(test)]
mod tests;
mod timers;
mod view;
mod zombies;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::Duration;

pub use effect::{AlertChange, Effect, EnforcementState, JobEnded, JobPolicy, JobRecord, KillOrder};
pub use event_context::EventContext;
pub use input::{ExecJob, Gauges, Limits, Observation, Refused, Settings, Target, TreeQuery};

use crate::config::{Config, Match};
use crate::engine::forest::{Change, Fast, Forest, Idx, Merge, Snapshot};
use crate::model::event::{Event, WaitStatus};
use crate::model::key::Key;
use crate::model::kill::Reason;
use crate::model::question::Question;
use crate::model::schema::{
    Alert, AlertKind, Cause, EventLine, Job, JobId, KillReport, Process, Ref, State, Tree,
};
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
/// Order of a start: `new`, `restore_*`, attach the probes, `snapshot_started`, take the snapshot while events go on
/// being handed over or after it, `snapshot`, and when it was taken without loss, `ready`.
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
    changes: Vec<Change>,
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

    /// Wall clock minus boot clock, ns. Followed when the wall clock was set: both run at one rate, and what is less comes from
    /// reading one after the other. A process's start must not read otherwise each time.
    pub fn set_clock(&mut self, boot_to_wall_ns: i64) {
        if self.settings.boot_to_wall_ns.abs_diff(boot_to_wall_ns) >= CLOCK_STEP {
            self.settings.boot_to_wall_ns = boot_to_wall_ns;
        }
    }

    /// Who forks in the records that come next ([`event::forker`](crate::model::event::forker)). Changes nothing: they are fetched from memory
    /// beside each other. Among a million processes handling a fork is waiting for its forker, mostly; all others are young, and near.
    pub fn expect(&self, forkers: &[Key]) {
        self.forest.expect(forkers);
    }

    /// One record of the ring. Idempotent: records may come twice, and late ones never touch a pid's successor.
    pub fn event(&mut self, e: &Event<'_>, fx: &mut Vec<Effect>) {
        self.apply(e, fx);
    }

    /// From here on reaped keys leave tombstones, until `snapshot`. `t0`: boot time before the first row is read.
    pub fn snapshot_started(&mut self, t0: u64) {
        self.later(t0);
        self.forest.snapshot_started(t0);
    }

    /// Merges a snapshot by key. May be called without `snapshot_started` when no event was handed over meanwhile.
    #[expect(clippy::needless_pass_by_value, reason = "a snapshot is merged once")]
    pub fn snapshot(&mut self, s: Snapshot, now: u64, fx: &mut Vec<Effect>) -> Merge {
        let now = self.later(now);
        self.merge(&s, now, fx)
    }

    /// First synced: rules are tried on those who already run, restored alerts are held or resolved, and the grace of
    /// restored jobs whose deadline has passed begins. Once in the engine's life; further calls do nothing.
    pub fn ready(&mut self, now: u64, fx: &mut Vec<Effect>) {
        let now = self.later(now);
        self.become_ready(now, fx);
    }

    /// The answer to `Effect::Look` or `Effect::ReadFacts`.
    pub fn observe(&mut self, o: Observation, now: u64, fx: &mut Vec<Effect>) {
        let now = self.later(now);
        self.observed(o, now, fx);
    }

    /// Lets the time pass: call at `next_wake`, or more often. Its cost does not depend on the number of processes.
    pub fn tick(&mut self, now: u64, fx: &mut Vec<Effect>) {
        let now = self.later(now);
        self.run_timers(now, fx);
    }

    /// When `tick` has something to do next.
    #[must_use]
    pub fn next_wake(&self) -> Option<u64> {
        self.timers.next()
    }

    // Commands.

    /// A job of `jobwarden exec`. Known by its root already (the client retried): the same record again.
    pub fn register_exec_job(
        &mut self,
        j: ExecJob,
        now: u64,
        fx: &mut Vec<Effect>,
    ) -> Result<JobRecord, Refused> {
        let now = self.later(now);
        self.exec_job(j, now, fx)
    }

    /// `jobs extend JOB D`: the deadline moves by `by`, from now if it has passed.
    pub fn extend(
        &mut self,
        id: JobId,
        by: Duration,
        now: u64,
        fx: &mut Vec<Effect>,
    ) -> Result<JobRecord, Refused> {
        let now = self.later(now);
        self.extend_job(id, by, now, fx)
    }

    /// A new config. Jobs and alerts stay; jobs of a rule that is still there take its new settings; those who already
    /// run are matched against the new rules.
    pub fn reload(&mut self, config: &Config, now: u64, fx: &mut Vec<Effect>) {
        let now = self.later(now);
        self.take_config(config, now, fx);
    }

    /// Somebody began to kill this job (`kill`, `exec`, or an `Effect::Kill` that is being carried out).
    pub fn kill_started(&mut self, id: JobId, reason: Reason) {
        self.started(id, reason);
    }

    /// The kill is over. `Err`: it could not be carried out, and why. `whole`: the whole job was meant, not only some.
    pub fn kill_finished(
        &mut self,
        id: JobId,
        reason: Reason,
        whole: bool,
        report: Result<&KillReport, &str>,
        now: u64,
        fx: &mut Vec<Effect>,
    ) {
        let now = self.later(now);
        self.finished(id, reason, whole, report, now, fx);
    }

    /// The same for a kill of a process and what descends from it, outside of jobs.
    pub fn process_killed(
        &mut self,
        root: Key,
        report: Result<&KillReport, &str>,
        now: u64,
        fx: &mut Vec<Effect>,
    ) {
        let now = self.later(now);
        self.process_kill_over(root, report, now, fx);
    }

    /// `enforcement on|off [--for D]`. `on` closes the fuse.
    pub fn enforcement(&mut self, on: bool, lasts: Option<Duration>, now: u64, fx: &mut Vec<Effect>) {
        let now = self.later(now);
        let until = lasts.map(|d| now.saturating_add(nanos(d)));
        self.word(on, until, now, fx);
    }

    /// The kernel lost `n` records: `events-lost` fires, and resolves 5 minutes after the last call.
    pub fn events_lost(&mut self, n: u64, now: u64, fx: &mut Vec<Effect>) {
        let now = self.later(now);
        self.unsynced = true;
        self.loss(n, now, fx);
    }

    /// `storage-failed` or `capacity` as the edge finds it: what is wrong, or None when it is well again.
    pub fn condition(&mut self, kind: AlertKind, wrong: Option<String>, now: u64, fx: &mut Vec<Effect>) {
        let now = self.later(now);
        self.edge_condition(kind, wrong, now, fx);
    }

    /// The answer to `Effect::Emptied`: whether the kernel knows somebody alive in the job. True also when it could not be
    /// asked; then take a snapshot.
    pub fn emptied(&mut self, number: u64, alive: bool, now: u64, fx: &mut Vec<Effect>) {
        let now = self.later(now);
        self.counted(number, alive, now, fx);
    }

    /// The cause of a firing alert, from `why`; makes an `Updated` if it differs materially.
    pub fn set_cause(&mut self, alert: &str, cause: Cause, now: u64, fx: &mut Vec<Effect>) {
        let now = self.later(now);
        self.cause(alert, cause, now, fx);
    }

    // Restart. Before the first snapshot.

    /// Jobs of this boot, as last saved. Records of another boot must not be given.
    pub fn restore_jobs(&mut self, jobs: Vec<JobRecord>) {
        self.restore(jobs);
    }

    /// Alerts that were firing. Of this boot: kept firing, silently, until `ready` decides. Of another boot: resolved at
    /// once, with that reason.
    pub fn restore_alerts(&mut self, alerts: Vec<Alert>, this_boot: bool, now: u64, fx: &mut Vec<Effect>) {
        let now = self.later(now);
        self.restore_alert_list(alerts, this_boot, now, fx);
    }

    pub fn restore_enforcement(&mut self, s: EnforcementState) {
        if let Some(until) = s.until {
            self.timers.set(until, timers::Timer::EnforcementOver);
        }
        self.enforcement.state = s;
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
    pub fn moment(&self, e: &Event<'_>) -> EventContext {
        self.moment_of(e)
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

    /// A free job number: boot-time ns, never given twice.
    pub fn free_number(&mut self, now: u64) -> u64 {
        self.jobs.free_number(now)
    }

    /// Time does not go back, and it ends before `u64::MAX`: a timer whose time saturates there never goes off.
    fn later(&mut self, now: u64) -> u64 {
        self.now = self.now.max(now).min(u64::MAX - 1);
        self.now
    }
}
