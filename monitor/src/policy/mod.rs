//! What is a job, an alert or a kill: pure. [`Engine`] owns the forest and is the one thing that the agent drives: it is
//! given events, snapshots, observations, commands and the time, and it answers with [`Effect`]s. It reads no clock and
//! opens no file, so a recorded stream replays to the same result.

pub mod effect;
pub mod input;

use std::time::Duration;

pub use effect::{AlertChange, Effect, EnforcementState, JobEnded, JobPolicy, JobRecord, KillOrder};
pub use input::{ExecJob, Gauges, Limits, Observation, Refused, Settings, Target, TreeQuery};

use crate::config::Config;
use crate::contract::{Alert, AlertKind, Cause, EventLine, Job, JobId, KillReport, Process, Ref, Tree};
use crate::enforce::Reason;
use crate::event::Event;
use crate::forest::{Merge, Snapshot};
use crate::key::Key;
use crate::why::Question;

/// Most `Effect::Look`s a second, on average: an exit whose turn would come above that waits for its next one.
pub const LOOKS_PER_S: u64 = 2_000;

/// The forest and all decisions over it. Times are boot-time nanoseconds and may not go back between two calls (a time
/// that does is taken as the last one).
///
/// Order of a start: `new`, `restore_*`, attach the probes, `snapshot_started`, take the snapshot while events go on
/// being handed over or after it, `snapshot`, and when it was taken without loss, `ready`.
#[derive(Debug)]
pub struct Engine {
    settings: Settings,
}

#[expect(unused_variables, clippy::needless_pass_by_value, clippy::unused_self, reason = "being filled in")]
impl Engine {
    #[must_use]
    pub fn new(settings: Settings, config: &Config) -> Self {
        Self { settings }
    }

    /// Wall clock minus boot clock, ns; when the wall clock was set.
    pub fn set_clock(&mut self, boot_to_wall_ns: i64) {
        self.settings.boot_to_wall_ns = boot_to_wall_ns;
    }

    /// One record of the ring. Idempotent: records may come twice, and late ones never touch a pid's successor.
    pub fn event(&mut self, e: &Event<'_>, fx: &mut Vec<Effect>) {}

    /// From here on reaped keys leave tombstones, until `snapshot`. `t0`: boot time before the first row is read.
    pub fn snapshot_started(&mut self, t0: u64) {}

    /// Merges a snapshot by key. May be called without `snapshot_started` when no event was handed over meanwhile.
    pub fn snapshot(&mut self, s: Snapshot, now: u64, fx: &mut Vec<Effect>) -> Merge {
        Merge::default()
    }

    /// First synced: rules are tried on those who already run, restored alerts are held or resolved, and the grace of
    /// restored jobs whose deadline has passed begins. Once in the engine's life; further calls do nothing.
    pub fn ready(&mut self, now: u64, fx: &mut Vec<Effect>) {}

    /// The answer to `Effect::Look` or `Effect::ReadFacts`.
    pub fn observe(&mut self, o: Observation, now: u64, fx: &mut Vec<Effect>) {}

    /// Lets the time pass: call at `next_wake`, or more often. Its cost does not depend on the number of processes.
    pub fn tick(&mut self, now: u64, fx: &mut Vec<Effect>) {}

    /// When `tick` has something to do next.
    #[must_use]
    pub fn next_wake(&self) -> Option<u64> {
        None
    }

    // Commands.

    /// A job of `jobwarden exec`. Known by its root already (the client retried): the same record again.
    pub fn register_exec_job(
        &mut self,
        j: ExecJob,
        now: u64,
        fx: &mut Vec<Effect>,
    ) -> Result<JobRecord, Refused> {
        Err(Refused::TooManyJobs(0))
    }

    /// `jobs extend JOB D`: the deadline moves by `by`, from now if it has passed.
    pub fn extend(
        &mut self,
        id: JobId,
        by: Duration,
        now: u64,
        fx: &mut Vec<Effect>,
    ) -> Result<JobRecord, Refused> {
        Err(Refused::NoJob(id.to_string()))
    }

    /// A new config. Jobs and alerts stay; jobs of a rule that is still there take its new settings; those who already
    /// run are matched against the new rules.
    pub fn reload(&mut self, config: &Config, now: u64, fx: &mut Vec<Effect>) {}

    /// Somebody began to kill this job (`kill`, `exec`, or an `Effect::Kill` that is being carried out).
    pub fn kill_started(&mut self, id: JobId, reason: Reason, now: u64, fx: &mut Vec<Effect>) {}

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
    }

    /// `enforcement on|off [--for D]`. `on` closes the fuse.
    pub fn enforcement(&mut self, on: bool, lasts: Option<Duration>, now: u64, fx: &mut Vec<Effect>) {}

    /// The kernel lost `n` records: `events-lost` fires, and resolves 5 minutes after the last call.
    pub fn events_lost(&mut self, n: u64, now: u64, fx: &mut Vec<Effect>) {}

    /// `storage-failed` or `capacity` as the edge finds it: what is wrong, or None when it is well again.
    pub fn condition(&mut self, kind: AlertKind, wrong: Option<String>, now: u64, fx: &mut Vec<Effect>) {}

    /// The cause of a firing alert, from `why`; makes an `Updated` if it differs materially.
    pub fn set_cause(&mut self, alert: &str, cause: Cause, now: u64, fx: &mut Vec<Effect>) {}

    // Restart. Before the first snapshot.

    /// Jobs of this boot, as last saved. Records of another boot must not be given.
    pub fn restore_jobs(&mut self, jobs: Vec<JobRecord>, now: u64, fx: &mut Vec<Effect>) {}

    /// Alerts that were firing. Of this boot: kept firing, silently, until `ready` decides. Of another boot: resolved at
    /// once, with that reason.
    pub fn restore_alerts(&mut self, alerts: Vec<Alert>, this_boot: bool, now: u64, fx: &mut Vec<Effect>) {}

    pub fn restore_enforcement(&mut self, s: EnforcementState, now: u64, fx: &mut Vec<Effect>) {}

    // Views.

    pub fn tree(&self, q: &TreeQuery, now: u64) -> Result<Tree, Refused> {
        Err(Refused::Target(String::new()))
    }

    /// Newest last; the done ones that are still remembered too.
    #[must_use]
    pub fn jobs(&self) -> Vec<Job> {
        Vec::new()
    }

    #[must_use]
    pub fn job_record(&self, id: JobId) -> Option<JobRecord> {
        None
    }

    /// Every job that has not ended, as it must be saved.
    #[must_use]
    pub fn job_records(&self) -> Vec<JobRecord> {
        Vec::new()
    }

    /// Members of the job and of its inner jobs, zombies too.
    #[must_use]
    pub fn members(&self, id: JobId) -> Vec<Key> {
        Vec::new()
    }

    /// Firing ones; with `all` the pending too.
    #[must_use]
    pub fn alerts(&self, all: bool) -> Vec<Alert> {
        Vec::new()
    }

    #[must_use]
    pub fn process(&self, key: Key, now: u64) -> Option<Process> {
        None
    }

    #[must_use]
    pub fn reference(&self, key: Key) -> Option<Ref> {
        None
    }

    /// The process that has this pid now, or had it last and is still known.
    #[must_use]
    pub fn current(&self, pid: u32) -> Option<Key> {
        None
    }

    /// What `why::explain` needs. The question of an alert is that of its oldest zombie or orphan.
    #[must_use]
    pub fn question(&self, key: Key, now: u64) -> Option<Question> {
        None
    }

    /// The process that an alert's cause is about: the oldest zombie or orphan.
    #[must_use]
    pub fn alert_subject(&self, alert: &str) -> Option<Key> {
        None
    }

    /// PID, ID, JOB or name:NAME; the several matches of a name oldest first. Empty never: that is `Refused`.
    pub fn resolve(&self, target: &str) -> Result<Vec<Target>, Refused> {
        Err(Refused::Target(target.to_owned()))
    }

    #[must_use]
    pub fn gauges(&self, now: u64) -> Gauges {
        unimplemented!()
    }

    /// For `events`: call before `event`, since a reaped process is forgotten with its record.
    #[must_use]
    pub fn event_line(&self, e: &Event<'_>) -> EventLine {
        unimplemented!()
    }

    /// The jobs (innermost first) of the process that an event is about.
    #[must_use]
    pub fn jobs_of(&self, key: Key) -> Vec<JobId> {
        Vec::new()
    }

    #[must_use]
    pub fn enforcement_state(&self) -> EnforcementState {
        EnforcementState::default()
    }

    /// Whether policy kills now: config, operator and fuse taken together.
    #[must_use]
    pub fn enforcing(&self, now: u64) -> bool {
        false
    }

    /// A free job number: boot-time ns, never given twice.
    pub fn free_number(&mut self, now: u64) -> u64 {
        now
    }
}
