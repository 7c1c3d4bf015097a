//! What Prometheus scrapes: the contract's table, encoded from one [`Sources`]. It gathers nothing by itself: whoever
//! scrapes hands over the numbers, so the encoding can be tested without an agent.

pub mod encode;
pub mod own;
mod table;

use std::collections::BTreeMap;

use monitor_abi::{KIND_NAMES, KINDS, KillCounter};

use crate::engine::Gauges;
use crate::model::kill::Reason;
use crate::model::schema::SignalledOutcome;
use crate::model::stats::{Histogram, StoreNumbers};

/// Seconds between the probe and the forest.
pub const EVENT_LAG_BOUNDS: &[f64] = &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 10.0];
/// Seconds that one delivery took.
pub const NOTIFICATION_BOUNDS: &[f64] =
    &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

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
    /// Lines of the agent's log.
    pub log_dropped: u64,
    pub proc: &'a crate::sources::proc::Proc,
    pub boot_to_wall_ns: u64,
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
    e.counter(
        "jobwarden_log_dropped_total",
        "Lines of the agent's log that were dropped: it could not be written, or not as fast.",
    )
    .sample(&[], s.log_dropped as f64);
    e.finish()
}

/// The `kind` label's values, in the order of the records' kinds.
fn kinds() -> impl Iterator<Item = (usize, &'static str)> {
    KIND_NAMES.iter().copied().enumerate()
}
