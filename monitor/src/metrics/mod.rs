//! What Prometheus scrapes: the contract's table, encoded from one [`Sources`]. It gathers nothing by itself: whoever
//! scrapes hands over the numbers, so the encoding can be tested without an agent.

pub mod encode;
pub mod own;
mod table;

use std::collections::BTreeMap;

use monitor_abi::{KIND_NAMES, KINDS, KillCounter};

use crate::contract::{AlertState, JobState, SignalledOutcome, State};
use crate::enforce::Reason;
use crate::policy::Gauges;
use encode::Histogram;

/// Most values of the `job_name` label; further names are counted under [`OTHER`].
pub const MAX_JOB_NAMES: usize = 200;
/// The label value of all job names beyond [`MAX_JOB_NAMES`].
pub const OTHER: &str = "_other";

/// Seconds; a job lasts from moments to days.
pub const JOB_DURATION_BOUNDS: &[f64] =
    &[0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 43_200.0, 86_400.0];
/// Seconds between a process's last thread and its reap.
pub const REAP_DELAY_BOUNDS: &[f64] = &[0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 30.0, 300.0, 3600.0];
/// Seconds between the probe and the forest.
pub const EVENT_LAG_BOUNDS: &[f64] = &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 10.0];
/// Seconds that one delivery took.
pub const NOTIFICATION_BOUNDS: &[f64] =
    &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

/// How jobs ended, as a label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Completed,
    Failed,
    TimedOut,
    Killed,
}

impl Outcome {
    pub const ALL: [Self; 4] = [Self::Completed, Self::Failed, Self::TimedOut, Self::Killed];

    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::TimedOut => "timed_out",
            Self::Killed => "killed",
        }
    }
}

/// One job name's numbers.
#[derive(Clone, Debug)]
pub struct JobNumbers {
    pub zombies: u64,
    pub orphans: u64,
    pub states: BTreeMap<&'static str, u64>,
    pub finished: BTreeMap<Outcome, u64>,
    pub duration: Histogram,
}

impl Default for JobNumbers {
    fn default() -> Self {
        Self {
            zombies: 0,
            orphans: 0,
            states: BTreeMap::new(),
            finished: BTreeMap::new(),
            duration: Histogram::new(JOB_DURATION_BOUNDS),
        }
    }
}

/// What the agent counts beside the engine.
#[derive(Clone, Debug)]
pub struct Counts {
    pub event_lag: Histogram,
    /// Received, by kind.
    pub events: [u64; KINDS],
    /// By reason: start, loss, request.
    pub resyncs: BTreeMap<&'static str, u64>,
    pub synced: bool,
    /// Processes for which the kernel's lineage map had no room.
    pub lineage_inserts_failed: u64,
    /// By why, and `ended` or `survived`.
    pub job_kills: BTreeMap<(Reason, &'static str), u64>,
    /// By signal number and what became of the process.
    pub signals_sent: BTreeMap<(u8, SignalledOutcome), u64>,
    /// By signal number: what `exec` passed on. What became of the processes is theirs.
    pub signals_passed: BTreeMap<u8, u64>,
    pub reload_ok: bool,
    /// Seconds since the epoch.
    pub reload_at: f64,
}

impl Default for Counts {
    fn default() -> Self {
        Self {
            event_lag: Histogram::new(EVENT_LAG_BOUNDS),
            events: [0; KINDS],
            resyncs: BTreeMap::new(),
            synced: false,
            lineage_inserts_failed: 0,
            job_kills: BTreeMap::new(),
            signals_sent: BTreeMap::new(),
            signals_passed: BTreeMap::new(),
            reload_ok: true,
            reload_at: 0.0,
        }
    }
}

/// A bounded table and how full it is.
#[derive(Clone, Debug)]
pub struct StoreNumbers {
    pub store: &'static str,
    pub entries: u64,
    pub max: u64,
    pub evictions: u64,
}

/// What the probes and their maps say. None: it could not be read, and absent is not zero.
#[derive(Clone, Debug, Default)]
pub struct Kernel {
    /// By kind: hits, sent, filtered, lost (the skipped runs of each program included).
    pub counters: Option<[monitor_abi::Counter; KINDS]>,
    pub ring_used: u64,
    pub ring_size: u64,
    pub kills: Option<KillCounter>,
    pub probes: Vec<Probe>,
    /// How full the kernel's maps and the alerts' queue are.
    pub stores: Vec<StoreNumbers>,
}

#[derive(Clone, Debug)]
pub struct Probe {
    pub name: String,
    pub attached: bool,
    /// Seconds and runs, where `kernel.bpf_stats_enabled` is on.
    pub run: Option<(f64, u64)>,
}

/// One receiver's delivery.
#[derive(Clone, Debug)]
pub struct Notifications {
    pub receiver: String,
    pub sent: u64,
    /// By reason.
    pub failed: BTreeMap<String, u64>,
    pub pending: u64,
    pub parked: u64,
    pub dropped: u64,
    pub duration: Histogram,
}

/// All that is exported.
#[derive(Debug)]
pub struct Sources<'a> {
    pub version: &'a str,
    pub revision: &'a str,
    pub object: &'a str,
    pub gauges: &'a Gauges,
    pub counts: &'a Counts,
    pub kernel: &'a Kernel,
    pub notifications: &'a [Notifications],
    pub proc: &'a crate::proc::Proc,
    pub boot_to_wall_ns: u64,
}

/// States use underscores in labels.
#[must_use]
pub const fn state_label(s: State) -> &'static str {
    match s {
        State::Running => "running",
        State::LeaderExited => "leader_exited",
        State::Exiting => "exiting",
        State::Zombie => "zombie",
        State::Gone => "gone",
    }
}

#[must_use]
pub const fn job_state_label(s: JobState) -> &'static str {
    match s {
        JobState::Running => "running",
        JobState::Lingering => "lingering",
        JobState::Expired => "expired",
        JobState::Killing => "killing",
        JobState::Done => "done",
    }
}

#[must_use]
pub const fn alert_state_label(s: AlertState) -> &'static str {
    match s {
        AlertState::Pending => "pending",
        AlertState::Firing => "firing",
        AlertState::Resolved => "resolved",
    }
}

/// The whole page.
#[must_use]
pub fn encode(s: &Sources<'_>, format: encode::Format) -> String {
    let mut e = encode::Encoder::new(format);
    e.gauge("jobwarden_build_info", "1; the version, the revision and the probe object in its labels.")
        .sample(&[("version", s.version), ("revision", s.revision), ("object", s.object)], 1.0);
    own::encode(&mut e, s.proc, s.boot_to_wall_ns);
    table::core(&mut e, s.gauges, s.counts, &s.kernel.stores);
    table::kernel(&mut e, s.counts, s.kernel);
    table::notifications(&mut e, s.notifications);
    e.finish()
}

/// The `kind` label's values, in the order of the records' kinds.
fn kinds() -> impl Iterator<Item = (usize, &'static str)> {
    KIND_NAMES.iter().copied().enumerate()
}
