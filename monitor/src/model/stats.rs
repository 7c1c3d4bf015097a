//! Counts that several parts share: how jobs end, histograms with their bounds, how full a bounded table is.

use std::collections::BTreeMap;

use crate::model::schema::{AlertState, JobState, State};

/// Most values of the `job_name` label; further names are counted under [`OTHER`].
pub const MAX_JOB_NAMES: usize = 200;
/// The label value of all job names beyond [`MAX_JOB_NAMES`].
pub const OTHER: &str = "_other";

/// Seconds; a job lasts from moments to days.
pub const JOB_DURATION_BOUNDS: &[f64] =
    &[0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 43_200.0, 86_400.0];
/// Seconds between a process's last thread and its reap.
pub const REAP_DELAY_BOUNDS: &[f64] = &[0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 30.0, 300.0, 3600.0];
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

/// A bounded table and how full it is.
#[derive(Clone, Debug)]
pub struct StoreNumbers {
    pub store: &'static str,
    pub entries: u64,
    pub max: u64,
    pub evictions: u64,
}

/// A histogram with fixed bounds; its last count is that of `+Inf`.
#[derive(Clone, Debug, PartialEq)]
pub struct Histogram {
    pub(crate) bounds: &'static [f64],
    pub(crate) counts: Vec<u64>,
    pub(crate) sum: f64,
}

impl Histogram {
    #[must_use]
    pub fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: vec![0; bounds.len() + 1], sum: 0.0 }
    }

    pub fn observe(&mut self, v: f64) {
        let i = self.bounds.partition_point(|b| *b < v);
        self.counts[i] += 1;
        self.sum += v;
    }

    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
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
