//! The wall clock as an argument: in milliseconds since the epoch, and able to run faster, so that an hour's outage is
//! tried in a second.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Milliseconds since the epoch.
pub type Millis = i64;

#[derive(Clone, Debug)]
pub struct Clock {
    /// None: the system's own clock, read at each call, so that its steps are followed.
    fast: Option<Fast>,
}

#[derive(Clone, Debug)]
struct Fast {
    base: Millis,
    since: Instant,
    speed: u32,
}

impl Default for Clock {
    fn default() -> Self {
        Self::system()
    }
}

impl Clock {
    #[must_use]
    pub const fn system() -> Self {
        Self { fast: None }
    }

    /// Starts at the system's time and runs `speed` times as fast. Requests' own timeouts stay real.
    #[must_use]
    pub fn fast(speed: u32) -> Self {
        Self { fast: Some(Fast { base: system_now(), since: Instant::now(), speed: speed.max(1) }) }
    }

    #[must_use]
    pub fn now(&self) -> Millis {
        self.fast.as_ref().map_or_else(system_now, |f| {
            let passed = f.since.elapsed().as_millis() as i64;
            f.base.saturating_add(passed.saturating_mul(i64::from(f.speed)))
        })
    }

    /// Sleeps for `ms` of this clock.
    pub async fn sleep(&self, ms: Millis) {
        let us = (ms.max(0) as u64).saturating_mul(1000);
        let real = self.fast.as_ref().map_or(us, |f| us / u64::from(f.speed));
        tokio::time::sleep(Duration::from_micros(real)).await;
    }
}

fn system_now() -> Millis {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as i64)
}

/// RFC 3339 in UTC.
pub(super) fn rfc3339(ms: Millis) -> String {
    crate::model::time::rfc3339((ms.max(0) as u64).saturating_mul(1_000_000))
}

/// None if it is no RFC 3339 time in UTC.
pub(super) fn parse_rfc3339(s: &str) -> Option<Millis> {
    let t = humantime::parse_rfc3339(s).ok()?;
    t.duration_since(UNIX_EPOCH).ok().map(|d| d.as_millis() as i64)
}
