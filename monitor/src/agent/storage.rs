//! Which stores on the disk fail, each by itself: there is one alert for all of them, and it ends when all of them work again.

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
