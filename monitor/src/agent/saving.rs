//! Saving the state, so that a SIGKILL of the agent loses nothing that a client was promised, and the alert about stores that fail.

use std::borrow::Cow;
use std::time::Duration;

use super::core::Core;
use super::storage::Source;
use crate::engine::{AlertChange, Change, Input};
use crate::model::schema::AlertKind;
use crate::sources::host;
use crate::sources::kernel::Ring;
use crate::state::{Report, State};

/// Time limit for the disk before a kill or a reply goes on without it.
const SAVED_WITHIN: Duration = Duration::from_millis(100);
/// How long records of jobs that are not saved are kept in the ring, and with them all that come after.
const KEPT_FOR: Duration = Duration::from_secs(1);
/// Time limit for each of the last two writes at the end.
const LAST_SAVE: Duration = Duration::from_secs(1);

impl Core {
    /// Jobs, kills and the operator's setting of enforcement, as they are saved.
    fn state(&self) -> State {
        State {
            boot_id: self.boot_id.clone(),
            jobs: self.engine.job_records(),
            enforcement: self.engine.enforcement_state(),
            version: crate::state::VERSION,
            boot_to_wall: host::boot_to_wall(),
            lost: self.sync.lost,
            kills: self.kills.values().cloned().collect(),
        }
    }

    /// Hands the state to the writer if it has changed. While the writer is busy, changes pile up; its [`Report`] starts the next write.
    pub(super) fn save(&mut self) {
        if self.state_dirty && !self.writer.is_busy() {
            self.writer.put(self.state(), self.sync_needed);
            (self.state_dirty, self.sync_needed) = (false, false);
        }
    }

    /// The number of the state that holds all changes until now.
    pub(super) fn unsaved(&self) -> u64 {
        self.writer.last() + u64::from(self.state_dirty)
    }

    /// Completes when all changes until now are saved, or after a short time, so that a disk that hangs or fails delays nothing.
    pub(super) fn when_saved(&self) -> impl Future<Output = ()> + Send + 'static {
        self.writer.wait(self.unsaved(), SAVED_WITHIN)
    }

    /// Releases the ring's records of jobs that are saved.
    pub(super) fn release_saved(&mut self, ring: &mut Ring) {
        if !ring.is_keeping() {
            return;
        }
        self.save();
        let hangs = self.writer.busy_since().is_some_and(|since| since.elapsed() > KEPT_FOR);
        if hangs {
            tracing::warn!("the disk does not answer: a job registration is only in memory");
        }
        ring.let_go(if hangs { u64::MAX } else { self.writer.tried() });
    }

    pub(super) fn saved(&mut self, report: Report) {
        match &report.error {
            Some(e) if !self.storage.failed(Source::Jobs) => {
                tracing::error!(error = %e, "jobs could not be saved; it is tried again each second");
            }
            None if self.storage.failed(Source::Jobs) => tracing::info!("jobs are saved again"),
            _ => {}
        }
        self.storage.set(Source::Jobs, report.error);
        self.storage.set(Source::Damage, damage(&report.damaged));
        self.update_storage_alert();
        self.save();
    }

    /// At the end: the whole state, synced, with a time limit.
    pub(super) async fn save_last(&mut self) {
        self.writer.wait(self.writer.last(), LAST_SAVE).await;
        (self.state_dirty, self.sync_needed) = (true, true);
        self.save();
        self.writer.wait(self.writer.last(), LAST_SAVE).await;
        if self.state_dirty || self.writer.is_busy() {
            tracing::error!("the last state is not saved: the disk does not answer");
        }
    }

    /// Queues all firing alerts for a store that works again: a new store lacks the alerts whose rows were damaged. An alert that
    /// it has already is not delivered again.
    pub(super) fn resubmit_alerts(&mut self) {
        for alert in self.engine.alerts(false) {
            let change = Change::Alert { change: AlertChange::Updated, alert: Box::new(alert) };
            self.queue.changes.push(change);
        }
    }

    /// Each second: writes again what could not be written.
    pub(super) fn check_storage(&mut self) {
        if self.storage.failed(Source::Jobs) {
            self.state_dirty = true;
            self.save();
        }
        self.audit.retry();
        self.storage.set(Source::Audit, self.audit.error());
        self.update_storage_alert();
    }

    pub(super) fn update_storage_alert(&mut self) {
        let ready = self.ready.borrow().ready;
        let Some(health) = self.storage.news(ready) else { return };
        let problem = health.wrong().map(Cow::Owned);
        self.handle(Input::Condition { kind: AlertKind::StorageFailed, problem });
    }
}

fn damage(files: &[String]) -> Option<String> {
    let files = (!files.is_empty()).then(|| files.join(", "))?;
    Some(format!("damaged files were moved aside, look at them and remove them: {files}"))
}
