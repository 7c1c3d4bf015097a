//! What is wrong with the stores on the disk, each by itself: there is one alert for all of them, and it ends when every
//! one of them takes again what it is given.

use super::core::Core;
use crate::engine::{Input, Output};
use crate::model::schema::AlertKind;
use crate::sources::host;
use crate::state::State;
use std::borrow::Cow;

/// The stores of the state directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Jobs,
    Alerts,
    Audit,
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
    wrong: [Option<String>; 3],
    told: Option<Health>,
}

impl Storage {
    pub(super) fn set(&mut self, of: Source, wrong: Option<String>) {
        self.wrong[of as usize] = wrong;
    }

    pub(super) fn failed(&self, of: Source) -> bool {
        self.wrong[of as usize].is_some()
    }

    /// What the engine is to be told, if that is new. That all is well is said only when it is `ready`: until then it has
    /// not taken over an alert from before a restart, which this ends.
    pub(super) fn news(&mut self, ready: bool) -> Option<Health> {
        let now = Health::of(self.wrong.iter().flatten().cloned().collect());
        if self.told.as_ref() == Some(&now) || (now == Health::Well && !ready) {
            return None;
        }
        self.told = Some(now.clone());
        Some(now)
    }
}

impl Core {
    /// Jobs and the operator's word, at once: a SIGKILL of the agent right after loses nothing.
    pub(super) fn save(&mut self) {
        self.state_dirty = false;
        let state = State {
            boot_id: self.boot_id.clone(),
            jobs: self.engine.job_records(),
            enforcement: self.engine.enforcement_state(),
            version: crate::state::VERSION,
            boot_to_wall: host::boot_to_wall(),
            lost: self.sync.lost,
            kills: self.kills.values().cloned().collect(),
        };
        let wrong = self.store.save(&state).err().map(|e| e.to_string());
        match &wrong {
            Some(e) if !self.storage.failed(Source::Jobs) => {
                tracing::error!(error = %e, "jobs could not be saved; it is tried again each second");
            }
            None if self.storage.failed(Source::Jobs) => tracing::info!("jobs are saved again"),
            _ => {}
        }
        self.storage.set(Source::Jobs, wrong);
        self.tell_storage();
    }

    /// What could not be written is tried again.
    pub(super) fn check_storage(&mut self) {
        if self.storage.failed(Source::Jobs) {
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
