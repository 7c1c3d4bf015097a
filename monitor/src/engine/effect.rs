//! What the engine wants done in the world. The edge does it and answers with an `Observation` or a command.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::model::key::Key;
use crate::model::kill::{Reason, What};
use crate::model::schema::{Alert, JobId, Severity};
use crate::model::stats::Outcome;

#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Read /proc/PID/stat (and, when it says Z, whether a thread lives) and answer with `Observation::Look`.
    /// Bounded: at most [`super::LOOKS_PER_S`] of them a second on average, alerts' own looks beside them.
    Look(Key),
    /// Read argv, exe, cgroup, uid and pid namespace and answer with `Observation::Facts` (`None` when it is gone).
    /// A process that cannot be read must be answered too: a rule may wait for it.
    ReadFacts(Key),
    /// Read /proc/PID/cgroup and answer with `Observation::Cgroup`, also when it cannot be read.
    ReadCgroup { key: Key, id: u64 },
    /// A job began (or was moved, on `extend`/`reload`): save the record. If `label` is set, first write it into the
    /// kernel: `Lineage::label(job.number, job.outer, job.id.root)`.
    Job { job: Box<JobRecord>, label: bool },
    /// The kernel's lineage map lacks this process, or its job in it (a full map, a lost fork record): enter it. Whoever is
    /// not in it escapes kills. `missed`: the fork probe found no room.
    Enter { process: Key, parent: Key, job: u64, missed: bool },
    /// The job with this number seems to be over. Ask the kernel who of it lives and answer with `Engine::emptied`.
    Emptied(u64),
    /// The job has ended: `Lineage::forget(number)`, drop its record, write its history.
    JobEnded(Box<JobEnded>),
    /// An alert changed; the whole alert as it is now.
    Alert { change: AlertChange, alert: Box<Alert> },
    /// Policy has decided to kill. The edge runs it and answers with `kill_finished`; `kill_started` is not needed.
    Kill(Box<KillOrder>),
    /// Save this: it must survive a restart.
    Enforcement(EnforcementState),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AlertChange {
    /// Shown by `alerts --all`; never sent.
    Pending,
    /// A pending one that came to nothing: forget it. Never sent.
    Dropped,
    Fired,
    /// Count, cause or severity of a firing one changed materially.
    Updated,
    Resolved,
}

/// A kill decided by policy. The guards are the edge's: whom to spare is decided by `enforce`.
#[derive(Clone, Debug, PartialEq)]
pub struct KillOrder {
    pub job: JobId,
    pub number: u64,
    pub job_name: String,
    /// Name of the rule; None for `exec` jobs.
    pub rule: Option<String>,
    pub reason: Reason,
    /// `Descendants` come with as many free job numbers as there are roots.
    pub what: What,
    /// The job's root: signalled first if it is among those who are ended.
    pub root: Key,
    /// Stop signal's number.
    pub signal: u8,
    pub grace_ns: u64,
}

/// What a job may do and what is done to it; frozen from its rule when it begins, renewed on reload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobPolicy {
    pub timeout_ns: Option<u64>,
    pub zombie_after_ns: Option<u64>,
    /// None: no orphan alert and no orphan kill (`exec --keep-orphans`).
    pub orphan_after_ns: Option<u64>,
    pub kill_on_timeout: bool,
    pub kill_on_orphan: bool,
    pub kill_daemons: bool,
    pub enforce_existing: bool,
    pub stop_signal: u8,
    pub grace_ns: u64,
    pub severity: Option<Severity>,
}

/// A job as it is saved: enough to go on with it after a restart. Times are boot-time ns of the boot it belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobRecord {
    /// The kernel's number of it: boot-time ns of its registration, never reused in a boot.
    pub number: u64,
    pub id: JobId,
    pub name: String,
    /// The rule that made it; None for `exec`.
    pub rule: Option<String>,
    /// Number of the job around it, 0 = none.
    pub outer: u64,
    pub started: u64,
    pub deadline: Option<u64>,
    pub policy: JobPolicy,
    /// The root already ran when its rule first saw it: alert-only, unless the rule says `enforce_existing`.
    pub existing: bool,
    /// The process of `jobwarden exec` that supervises it: when that one dies, the job is ended.
    pub supervisor: Option<Key>,
    /// The deadline has passed.
    pub expired: bool,
    /// Who is in it now. Only `Engine::job_records` fills it: without pins they keep their membership by it.
    #[serde(default)]
    pub members: Vec<Key>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobEnded {
    pub number: u64,
    pub id: JobId,
    pub name: String,
    pub outcome: Outcome,
    /// Boot-time ns.
    pub started: u64,
    pub ended: u64,
}

/// What `enforcement on|off --for` and the fuse left behind; saved by the edge, given back by `restore_enforcement`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnforcementState {
    /// What an operator said; None: the config decides.
    pub by_operator: Option<bool>,
    /// Until when (boot-time ns) the operator's word holds; None: until the next word.
    pub until: Option<u64>,
    pub fuse_open: bool,
    /// Jobs ended by policy in the last minute, which the fuse counts: when (boot-time ns), and which.
    #[serde(default)]
    pub ended: VecDeque<(u64, u64)>,
}
