//! Everything that the engine is told beside the ring's records, as data: what is told can be recorded, and told again.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::config::{self, Config, ConfigError, Overrides};
use crate::engine::forest::Snapshot;
use crate::engine::{Effect, EnforcementState, Engine, ExecJob, JobRecord, Observation, Settings};
use crate::model::key::Key;
use crate::model::kill::Reason;
use crate::model::schema::{Alert, AlertKind, Cause, JobId, KillReport};

/// One call of the engine; times are boot-time nanoseconds. See [`Engine`]'s methods of these names.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Input {
    /// The first one: the engine is made of it. `config` is TOML, as `check --print` writes it.
    Start {
        settings: Box<Settings>,
        config: String,
    },
    RestoreEnforcement(EnforcementState),
    RestoreJobs(Vec<JobRecord>),
    RestoreAlerts {
        alerts: Vec<Alert>,
        this_boot: bool,
        now: u64,
    },
    Snapshot {
        snapshot: Snapshot,
        now: u64,
    },
    Ready {
        now: u64,
    },
    Observe {
        observation: Observation,
        now: u64,
    },
    Tick {
        now: u64,
    },
    Clock {
        boot_to_wall_ns: i64,
    },
    Exec {
        job: Box<ExecJob>,
        now: u64,
    },
    Extend {
        job: JobId,
        by: Duration,
        now: u64,
    },
    Release {
        job: JobId,
        now: u64,
    },
    Reload {
        config: String,
        now: u64,
    },
    KillStarted {
        job: JobId,
        reason: Reason,
    },
    KillFinished {
        job: JobId,
        reason: Reason,
        whole: bool,
        report: Result<Box<KillReport>, String>,
        now: u64,
    },
    ProcessKilled {
        root: Key,
        report: Result<Box<KillReport>, String>,
        now: u64,
    },
    Enforcement {
        on: bool,
        lasts: Option<Duration>,
        now: u64,
    },
    Lost {
        n: u64,
        now: u64,
    },
    Condition {
        kind: AlertKind,
        wrong: Option<String>,
        now: u64,
    },
    Cause {
        alert: String,
        cause: Box<Cause>,
        now: u64,
    },
    FreeNumber {
        now: u64,
    },
    SnapshotStarted {
        t0: u64,
    },
    Emptied {
        number: u64,
        alive: bool,
        now: u64,
    },
}

/// A config as it was recorded.
pub(super) fn config(text: &str) -> Result<Config, ConfigError> {
    config::parse(Path::new("recorded config"), text, &BTreeMap::new(), &Overrides::default())
}

impl Input {
    /// Tells it to an engine, as when it was recorded. What the engine answers beside effects is not needed then.
    pub(super) fn replay(self, e: &mut Engine, fx: &mut Vec<Effect>) -> Result<(), ConfigError> {
        match self {
            // The first frame has made the engine; another one would be a recording of two agents.
            Self::Start { .. } => {}
            Self::RestoreEnforcement(s) => e.restore_enforcement(s),
            Self::RestoreJobs(jobs) => e.restore_jobs(jobs),
            Self::RestoreAlerts { alerts, this_boot, now } => e.restore_alerts(alerts, this_boot, now, fx),
            Self::Snapshot { snapshot, now } => {
                e.snapshot(snapshot, now, fx);
            }
            Self::Ready { now } => e.ready(now, fx),
            Self::Observe { observation, now } => e.observe(observation, now, fx),
            Self::Tick { now } => e.tick(now, fx),
            Self::Clock { boot_to_wall_ns } => e.set_clock(boot_to_wall_ns),
            Self::Exec { job, now } => {
                let _ = e.register_exec_job(*job, now, fx);
            }
            Self::Extend { job, by, now } => {
                let _ = e.extend(job, by, now, fx);
            }
            Self::Release { job, now } => {
                let _ = e.release(job, now, fx);
            }
            Self::Reload { config: text, now } => e.reload(&config(&text)?, now, fx),
            Self::KillStarted { job, reason } => e.kill_started(job, reason),
            Self::KillFinished { job, reason, whole, report, now } => {
                let report = report.as_deref().map_err(String::as_str);
                e.kill_finished(job, reason, whole, report, now, fx);
            }
            Self::ProcessKilled { root, report, now } => {
                e.process_killed(root, report.as_deref().map_err(String::as_str), now, fx);
            }
            Self::Enforcement { on, lasts, now } => e.enforcement(on, lasts, now, fx),
            Self::Lost { n, now } => e.events_lost(n, now, fx),
            Self::Condition { kind, wrong, now } => e.condition(kind, wrong, now, fx),
            Self::Cause { alert, cause, now } => e.set_cause(&alert, *cause, now, fx),
            Self::SnapshotStarted { t0 } => e.snapshot_started(t0),
            Self::Emptied { number, alive, now } => e.emptied(number, alive, now, fx),
            Self::FreeNumber { now } => {
                e.free_number(now);
            }
        }
        Ok(())
    }
}
