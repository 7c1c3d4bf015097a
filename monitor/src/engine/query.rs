//! What the engine is asked without being changed, and the shapes of its answers.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::model::key::Key;
use crate::model::schema::{AlertKind, JobId};
use crate::model::stats::{Histogram, JobNumbers, StoreNumbers};

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
