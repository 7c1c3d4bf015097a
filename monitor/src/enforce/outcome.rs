//! The outcome of a kill. Data only.

use std::collections::BTreeMap;

use crate::model::schema::{KillReport, SignalledOutcome};

/// The outcome of a kill.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub report: KillReport,
    /// For `jobwarden_signals_sent_total`: how many of each signal had which outcome (SIGCONT included).
    pub signals: BTreeMap<(u8, SignalledOutcome), u64>,
}

impl Outcome {
    /// Whether no member but zombies and the spared is left.
    #[must_use]
    pub fn ended(&self) -> bool {
        self.report.survivors.is_empty()
    }
}

/// The kernel side failed during a kill. The signals sent until then are in the audit.
#[derive(Debug, thiserror::Error)]
#[error("{doing} of job {job}: {source}")]
pub struct EnforceError {
    pub doing: &'static str,
    pub job: u64,
    pub source: std::io::Error,
}
