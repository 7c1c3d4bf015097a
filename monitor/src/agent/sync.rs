//! What the agent remembers about keeping the forest equal to the kernel. [`super::resync`] and [`super::lineage_map`] do the work.

use std::collections::HashMap;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::model::key::Key;

#[derive(Debug, Default)]
pub(super) struct Sync {
    /// Lost records of all kinds that were announced, by this agent or by an earlier one with the same pins.
    pub lost: u64,
    /// `counts.events` continues where an earlier agent's ended.
    pub carried: bool,
    pub resync_at: Option<Instant>,
    pub resync_after: Duration,
    /// Processes without an entry in the lineage map, their parents and jobs.
    pub unentered: HashMap<Key, (Key, u64)>,
    /// When the lineage map was last full.
    pub full_at: Option<Instant>,
    /// Forks minus reaps, as the probes counted them, when the lineage map was last swept.
    pub swept_at: i64,
    pub sweep: Option<JoinHandle<()>>,
    /// Which stores outside of the engine are full.
    pub stores_full: Option<String>,
    /// Numbers of jobs that seem to have no member left.
    pub emptied: Vec<u64>,
    /// Processes whose /proc files could not be read because no descriptor was left.
    pub unseen: Vec<Key>,
}
