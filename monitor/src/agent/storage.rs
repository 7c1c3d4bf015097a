//! What is wrong with the stores on the disk, each by itself: there is one alert for all of them, and it ends when every
//! one of them takes again what it is given.

use std::borrow::Cow;
use std::time::Duration;

use super::core::Core;
use crate::engine::{AlertChange, Input, Output};
use crate::model::schema::AlertKind;
use crate::sources::host;
use crate::sources::kernel::Ring;
use crate::state::{Report, State};

/// A kill or a reply waits so long for the disk to take what it is about, and then goes on without.
const SAVED_WITHIN: Duration = Duration::from_millis(100);
/// The ring's records of jobs that are not saved are kept so long, and with them all that come after.
const KEPT_FOR: Duration = Duration::from_secs(1);
/// How long the end waits for the disk, each time.
const LAST_SAVE: Duration = Duration::from_secs(1);

/// The stores of the state directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Jobs,
    Alerts,
    Audit,
    /// Damaged files that were moved aside and are still there.
    Damage,
}

/// How it stands with something that an alert is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Health {
    Well,
    Wrong(String),
}

impl Health {
    pub(super) fn of(wrong: Vec<String>) -> Self {
        if wrong.is_empty() { Self::Well } else { Self::Wrong(wrong.join("; ")) }
    }

    /// As the engine takes it.
    pub(super) fn wrong(self) -> Option<String> {
        match self {
            Self::Well => None,
            Self::Wrong(text) => Some(text),
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Storage {
    wrong: [Option<String>; 4],
    told: Option<Health>,
}

impl Storage {
    pub(super) fn set(&mut self, of: Source, wrong: Option<String>) {
        self.wrong[of as usize] = wrong;
    }

    /// Each store's trouble.
    pub(super) fn troubles(&self) -> Vec<String> {
        self.wrong.iter().flatten().cloned().collect()
    }

    pub(super) fn failed(&self, of: Source) -> bool {
        self.wrong[of as usize].is_some()
    }

    /// What the engine is to be told, if that is new. That all is well is said only when it is `ready`: until then it has
    /// not taken over an alert from before a restart, which this ends.
    pub(super) fn news(&mut self, ready: bool) -> Option<Health> {
        let now = Health::of(self.troubles());
        if self.told.as_ref() == Some(&now) || (now == Health::Well && !ready) {
            return None;
        }
        self.told = Some(now.clone());
        Some(now)
    }
}

impl Core {
    /// Jobs, orders and the operator's word, as they must be saved.
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

    /// Gives what has changed to the writer. While that is busy, changes pile up: its [`Report`] brings the next state.
    pub(super) fn save(&mut self) {
        if self.state_dirty && !self.writer.is_busy() {
            self.writer.put(self.state(), self.word_changed);
            (self.state_dirty, self.word_changed) = (false, false);
        }
    }

    /// The number of the state that holds all changes until now.
    pub(super) fn unsaved(&self) -> u64 {
        self.writer.last() + u64::from(self.state_dirty)
    }

    /// Comes back when all changes until now are saved, so that a SIGKILL of the agent does not lose what a client was promised;
    /// or after a short time, so that a disk that hangs or refuses holds up nobody.
    pub(super) fn when_saved(&self) -> impl Future<Output = ()> + Send + 'static {
        self.writer.wait(self.unsaved(), SAVED_WITHIN)
    }

    /// Lets go the ring's records of jobs that are saved.
    pub(super) fn release_saved(&mut self, ring: &mut Ring) {
        if !ring.is_keeping() {
            return;
        }
        self.save();
        let hangs = self.writer.busy_since().is_some_and(|since| since.elapsed() > KEPT_FOR);
        if hangs {
            tracing::warn!("the disk does not answer: a job's registration is in memory only");
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
        self.tell_storage();
        self.save();
    }

    /// At the end: all of it, synced. Waits for the disk, but not without end.
    pub(super) async fn save_last(&mut self) {
        self.writer.wait(self.writer.last(), LAST_SAVE).await;
        (self.state_dirty, self.word_changed) = (true, true);
        self.save();
        self.writer.wait(self.writer.last(), LAST_SAVE).await;
        if self.state_dirty || self.writer.is_busy() {
            tracing::error!("the last state is not saved: the disk does not answer");
        }
    }

    /// All firing alerts, to a store that works again: a new one lacks those whose texts were damaged. One that it has already
    /// is not sent again.
    pub(super) fn resubmit(&mut self) {
        for alert in self.engine.alerts(false) {
            self.alert(AlertChange::Updated, alert);
        }
    }

    /// What could not be written is tried again.
    pub(super) fn check_storage(&mut self) {
        if self.storage.failed(Source::Jobs) {
            self.state_dirty = true;
            self.save();
        }
        self.audit.retry();
        self.storage.set(Source::Audit, self.audit.error());
        self.tell_storage();
    }

    pub(super) fn tell_storage(&mut self) {
        let ready = self.ready.borrow().ready;
        let Some(health) = self.storage.news(ready) else { return };
        let mut out = Output::default();
        self.engine.handle(
            Input::Condition { kind: AlertKind::StorageFailed, problem: health.wrong().map(Cow::Owned) },
            host::boot_now(),
            &mut out,
        );
        self.alerts_of(out);
    }
}

fn damage(files: &[String]) -> Option<String> {
    let files = (!files.is_empty()).then(|| files.join(", "))?;
    Some(format!("damaged files were moved aside, look at them and remove them: {files}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_store_that_works_does_not_clear_what_another_one_says() {
        let mut s = Storage::default();
        assert_eq!(s.news(false), None);
        s.set(Source::Alerts, Some("a".into()));
        assert_eq!(s.news(false), Some(Health::Wrong("a".into())));
        s.set(Source::Jobs, None);
        assert_eq!(s.news(true), None);
        s.set(Source::Jobs, Some("j".into()));
        assert_eq!(s.news(true), Some(Health::Wrong("j; a".into())));
        s.set(Source::Alerts, None);
        assert!(s.failed(Source::Jobs) && !s.failed(Source::Alerts) && !s.failed(Source::Audit));
        assert_eq!(s.news(true), Some(Health::Wrong("j".into())));
        s.set(Source::Jobs, None);
        assert_eq!(s.news(false), None, "nobody is there yet whose alert could end");
        assert_eq!(s.news(true), Some(Health::Well));
        assert_eq!(s.news(true), None);
    }

    #[test]
    fn all_well_is_said_once_for_an_alert_of_before_a_restart() {
        let mut s = Storage::default();
        assert_eq!((s.news(false), s.news(true), s.news(true)), (None, Some(Health::Well), None));
    }
}
