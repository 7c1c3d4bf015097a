//! Entries that the kernel's lineage map lacks, sweeping it, and the alert about full stores.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use monitor_abi::{Counter, KINDS};
use tokio::time::Instant;

use super::core::Core;
use crate::engine::Input;
use crate::model::key::Key;
use crate::model::schema::AlertKind;

/// Most processes that wait for room in the lineage map; the next snapshot finds the others.
const UNENTERED_MAX: usize = 65_536;
/// The alert `capacity` about the lineage map ends this long after the last process for which there was no room.
const ROOM_AFTER: Duration = Duration::from_mins(1);

impl Core {
    /// Enters a process that the kernel's lineage map lacks, or has in no job. `missed`: the fork probe found no room.
    pub(super) fn enter(&mut self, key: Key, parent: Key, job: u64, missed: bool) {
        if missed {
            self.counts.lineage_inserts_failed += 1;
            self.lineage_full();
        }
        if let Err(e) = self.kernel.enter(key, parent, job) {
            tracing::debug!(process = %key, error = %e, "no entry in the kernel's lineage map; tried again");
            if self.sync.unentered.len() < UNENTERED_MAX {
                self.sync.unentered.insert(key, (parent, job));
            }
        }
    }

    /// Each second: enters the processes for which there was no room, and ends the alert when there is room again.
    pub(super) fn enter_waiting(&mut self) {
        for (key, (parent, job)) in std::mem::take(&mut self.sync.unentered) {
            self.enter(key, parent, job, false);
        }
        let over = self.sync.full_at.is_some_and(|at| at.elapsed() >= ROOM_AFTER);
        if over && self.sync.unentered.is_empty() {
            self.sync.full_at = None;
            self.update_capacity_alert();
        }
    }

    /// Each fork makes an entry in the kernel's lineage map and each reap removes one; where a reap is missed the entry stays. So the
    /// map is swept in the background when a quarter of it has been filled since the last sweep.
    pub(super) fn sweep(&mut self, totals: &[Counter; KINDS]) {
        let records =
            |kind: u16| (totals[usize::from(kind)].sent + totals[usize::from(kind)].lost).cast_signed();
        let entries = records(monitor_abi::KIND_FORK) - records(monitor_abi::KIND_REAP);
        let running = self.sync.sweep.as_ref().is_some_and(|s| !s.is_finished());
        if running || entries - self.sync.swept_at < i64::from(self.kernel.lineage_max() / 4) {
            return;
        }
        self.sync.swept_at = entries;
        let kernel = Arc::clone(&self.kernel);
        self.sync.sweep = Some(self.background.spawn_blocking(move || match kernel.sweep_stale_lineage() {
            Ok(n) => tracing::debug!(entries = n, "the lineage map was swept"),
            Err(e) => tracing::warn!(error = %e, "the lineage map could not be swept"),
        }));
    }

    pub(super) fn lineage_full(&mut self) {
        if self.sync.full_at.replace(Instant::now()).is_none() {
            tracing::error!(
                "the kernel's lineage map is full: kills do not reach processes without an entry"
            );
            self.update_capacity_alert();
        }
    }

    /// The one alert about full stores: the lineage map as the probes find it, and the stores as they were last examined.
    pub(super) fn update_capacity_alert(&mut self) {
        let map = self.sync.full_at.map(|_| {
            format!(
                "The kernel's lineage map ({} processes) is full: a kill does not reach processes without an entry",
                self.kernel.lineage_max()
            )
        });
        let said: Vec<String> = map.into_iter().chain(self.sync.stores_full.clone()).collect();
        let problem = (!said.is_empty()).then(|| Cow::Owned(said.join("; ")));
        self.handle(Input::Condition { kind: AlertKind::Capacity, problem });
    }
}
