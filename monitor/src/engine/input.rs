//! What the engine is told beside events and snapshots: its place in the world, observations, commands.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::effect::JobPolicy;
use crate::engine::forest::{Facts, Seen};
use crate::model::key::Key;
use crate::model::schema::{AlertKind, JobId};
use crate::model::stats::{Histogram, JobNumbers, StoreNumbers};

/// What is fixed for the agent's life.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Settings {
    /// The host's name: label `instance`, and `host` in `tree`.
    pub host: String,
    pub machine_id: String,
    pub boot_id: String,
    /// The agent itself: it and its ancestors are never enforced upon.
    pub agent: Key,
    /// Inode of the host's pid namespace, if known: it is shown for those whose facts say nothing else.
    pub pid_ns: Option<u64>,
    /// Names of users, for the label `user`; a uid that is not in it is shown as a number.
    #[serde(default)]
    pub users: BTreeMap<u32, String>,
    /// Wall clock minus boot clock, in ns. May be moved later with `set_clock`.
    pub boot_to_wall_ns: i64,
    pub limits: Limits,
}

/// Bounds of what the engine keeps.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Limits {
    /// Processes, dead ancestors included. More are not entered; that is counted and raises `capacity`.
    pub processes: usize,
    /// Jobs, done ones included.
    pub jobs: usize,
    /// Alerts, pending and firing.
    pub alerts: usize,
    /// Signals remembered for `why`.
    pub signals: usize,
    /// Reaped keys remembered while a snapshot is under way.
    pub tombstones: usize,
}

impl Limits {
    /// The lower of each: a recording cannot ask for more than an agent has.
    #[must_use]
    pub fn at_most(&self, o: &Self) -> Self {
        Self {
            processes: self.processes.min(o.processes),
            jobs: self.jobs.min(o.jobs),
            alerts: self.alerts.min(o.alerts),
            signals: self.signals.min(o.signals),
            tombstones: self.tombstones.min(o.tombstones),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self { processes: 1 << 22, jobs: 1 << 16, alerts: 1 << 14, signals: 1 << 13, tombstones: 1 << 18 }
    }
}

/// The answer to an effect, or what a view has read meanwhile.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Observation {
    /// `at`: boot time (ns) just before /proc was read.
    Look { key: Key, at: u64, seen: Seen },
    /// None: it is gone, or cannot be read.
    Facts { key: Key, facts: Option<Facts> },
    /// Its pid namespace and its pid there, which stay what they are. Read by views.
    Inside { key: Key, pid_ns: u64, ns_pid: u32 },
    /// The answer to `Effect::ReadCgroup`, or what a view has read (then `id` is 0). `by_id`: whoever is in the
    /// cgroup of this id has this path and no other, so it need not be read again.
    Cgroup { key: Key, id: u64, cgroup: Option<String>, by_id: bool },
}

/// A job of `jobwarden exec`, before its root's first instruction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecJob {
    pub root: Key,
    pub name: String,
    /// The `exec` process; None: nobody supervises it.
    pub supervisor: Option<Key>,
    /// The number under which `exec` has already entered it into the kernel; None: the engine gives one, and asks for
    /// the labelling.
    pub number: Option<u64>,
    pub policy: JobPolicy,
}

/// Why a command was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Refused {
    #[error("no job {0}: `jobwarden jobs` lists them")]
    NoJob(String),
    #[error("no process {0}: it is not alive, and none of its descendants is")]
    NoProcess(String),
    #[error("job {0} has no deadline that could be extended")]
    NoDeadline(String),
    #[error("job {0} has ended already")]
    Ended(String),
    #[error("{0:?} is no target: expected a PID, an ID (PID:START), a JOB (j-PID:START-N) or name:NAME")]
    Target(String),
    #[error("{0} jobs are followed already: no more are taken")]
    TooManyJobs(usize),
    #[error("{0} is inside {1} nested jobs already: no job begins there, and those around hold it")]
    TooDeep(Key, usize),
}

/// What `tree` shows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeQuery {
    /// PID, ID or JOB: its ancestors, it, its descendants. None: all.
    pub of: Option<String>,
    /// Kernel threads too.
    pub all: bool,
    /// Only zombies, and the way to them.
    pub zombies: bool,
    /// Only orphans, and the way to them.
    pub orphans: bool,
    /// Only processes of this uid, and the way to them.
    pub uid: Option<u32>,
}

/// What a TARGET or a `why` argument names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    Process(Key),
    Job(JobId),
}

/// What `/metrics` shows of the engine, in the words of `metrics::Core`. Made without a walk over the processes.
#[derive(Clone, Debug)]
pub struct Gauges {
    pub processes: BTreeMap<&'static str, u64>,
    /// By `job_name`; "" = outside jobs, always there. At most `stats::MAX_JOB_NAMES`, then `stats::OTHER`.
    pub jobs: BTreeMap<String, JobNumbers>,
    pub unreaping_parents: u64,
    pub oldest_zombie_age_s: f64,
    pub reap_delay: Histogram,
    pub stores: Vec<StoreNumbers>,
    /// Every kind in every state, zeros too.
    pub alerts: BTreeMap<(AlertKind, &'static str), u64>,
    pub alerts_fired: BTreeMap<AlertKind, u64>,
    pub enforcement_enabled: bool,
    pub fuse_open: bool,
}
