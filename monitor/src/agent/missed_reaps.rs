//! `reap` lines of those whose reap no record tells. The record comes an RCU grace period after the reap, mostly milliseconds; but
//! a kernel that hides a process from tracing (a microVM's PID 1, say) runs no probe while that process is on the CPU, and what
//! is freed meanwhile is freed unseen. /proc shows that it is gone in either case.

use std::collections::HashMap;

use super::core::Core;
use crate::api::{Chain, innermost};
use crate::engine::EventContext;
use crate::model::event::{Body, Event, WaitStatus};
use crate::model::key::Key;
use crate::model::schema::EventLine;

/// How long the record is waited for, ns.
const RECORD: u64 = 1_000_000_000;
/// How long one that comes after its line is known as such: RCU may put callbacks off for ten seconds.
const LATE: u64 = 60 * 1_000_000_000;
/// Those beyond have a line only if their record comes.
const MAX: usize = 8_192;

/// One whose record may still come.
#[derive(Debug)]
pub(super) struct Seen {
    at: u64,
    /// None: its exit was not seen either.
    status: Option<WaitStatus>,
    context: EventContext,
    jobs: Chain,
    told: bool,
}

/// Found gone by /proc, and their record has not come.
#[derive(Debug, Default)]
pub(super) struct MissedReaps(HashMap<Key, Seen>);

impl MissedReaps {
    /// The record has come. False: what it tells was told.
    pub(super) fn came(&mut self, key: Key) -> bool {
        self.0.remove(&key).is_none_or(|s| !s.told)
    }

    /// A look found it gone.
    pub(super) fn gone(&mut self, key: Key, seen: Seen) {
        if self.0.len() < MAX {
            self.0.insert(key, seen);
        }
    }
}

fn reap(key: Key, status: Option<WaitStatus>, at: u64) -> Event<'static> {
    let status = status.unwrap_or(WaitStatus(0));
    Event { at, cpu: 0, process: key, body: Body::Reap { status } }
}

impl Core {
    /// What a `reap` line of it would say, before the forest hears of a look at `at`; None if it is known to be gone.
    pub(super) fn before_reap(&mut self, key: Key, at: u64) -> Option<Seen> {
        if self.engine.is_gone(key) {
            return None;
        }
        let status = self.engine.wait_status(key);
        let context = self.engine.event_context(&reap(key, status, at));
        Some(Seen { at, status, context, jobs: self.feed.chain(self.engine.named_jobs(key)), told: false })
    }

    /// Each second: the lines of those whose record does not come.
    pub(super) fn tell_reaps(&mut self, now: u64) {
        let mut all = std::mem::take(&mut self.reaps.0);
        all.retain(|_, s| now.saturating_sub(s.at) < LATE);
        for (key, s) in all.iter_mut().filter(|(_, s)| !s.told && now.saturating_sub(s.at) >= RECORD) {
            s.told = true;
            let line = self.reap_line(*key, s);
            self.feed.announce(s.at, line, s.jobs.clone());
        }
        self.reaps.0 = all;
    }

    fn reap_line(&self, key: Key, s: &Seen) -> EventLine {
        let tell = super::core::event_formatter(&self.engine, &self.redact);
        let mut line = tell(&reap(key, s.status, s.at), &s.context, innermost(&s.jobs));
        if s.status.is_none() {
            line.more.insert("exit".into(), serde_json::Value::Null);
        }
        line.more.insert("source".into(), "proc".into());
        line
    }
}
