//! What must survive a restart: jobs as they are saved, and the operator's setting of enforcement.

use std::collections::VecDeque;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::model::key::Key;
use crate::model::kill::{KillSpec, Reason, What};
use crate::model::schema::{JobId, Severity};
use crate::model::stats::Outcome;

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

impl JobRecord {
    /// A kill of this job or of some of its members, with the stop signal and the grace of its policy.
    #[must_use]
    pub fn kill(&self, what: What, reason: Reason) -> KillSpec {
        KillSpec {
            job: Some(self.id),
            number: self.number,
            name: self.name.clone(),
            target: self.id.to_string(),
            signal: self.policy.stop_signal,
            grace: Duration::from_nanos(self.policy.grace_ns),
            ..KillSpec::new(self.id.root, what, reason)
        }
    }
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

/// What `enforcement on|off --for` and the fuse left behind; saved by the agent, given back by `Input::RestoreEnforcement`.
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
