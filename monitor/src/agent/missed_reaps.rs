//! `reap` lines of processes whose reap record does not come. The record comes an RCU grace period after the reap, mostly within
//! milliseconds; but a kernel that hides a process from tracing (a microVM's PID 1, say) runs no probe while that process is on the
//! CPU, and a task that is freed meanwhile leaves no record. /proc shows in either case that the process is gone.

use std::collections::HashMap;

use super::recorded_engine::RecordedEngine;
use crate::api::{Chain, Feed, innermost};
use crate::engine::EventContext;
use crate::model::event::{Body, Event, WaitStatus};
use crate::model::key::Key;
use crate::model::schema::EventLine;
use crate::redact::Redactor;

/// Time limit for the record, ns.
const RECORD: u64 = 1_000_000_000;
/// How long a record that comes after its line is recognized as such: RCU may delay callbacks by ten seconds.
const LATE: u64 = 60 * 1_000_000_000;
/// Processes beyond this number get a line only if their record comes.
const MAX: usize = 8_192;

/// A process that is gone and whose record may still come.
#[derive(Debug)]
pub(super) struct Missed {
    at: u64,
    /// None: its exit was not seen either.
    status: Option<WaitStatus>,
    context: EventContext,
    jobs: Chain,
    announced: bool,
}

/// Processes that /proc showed to be gone before their record came.
#[derive(Debug, Default)]
pub(super) struct MissedReaps(HashMap<Key, Missed>);

impl MissedReaps {
    /// The record has come. False: its line was written already.
    pub(super) fn record_seen(&mut self, key: Key) -> bool {
        self.0.remove(&key).is_none_or(|m| !m.announced)
    }

    /// What the `reap` line of a process says. To be asked before the engine gets the observation of `at`: afterwards the process is
    /// gone. None if it is gone already.
    pub(super) fn prepare(engine: &mut RecordedEngine, feed: &mut Feed, key: Key, at: u64) -> Option<Missed> {
        if engine.is_gone(key) {
            return None;
        }
        let status = engine.wait_status(key);
        let context = engine.event_context(&reap(key, status, at));
        Some(Missed { at, status, context, jobs: feed.chain(engine.named_jobs(key)), announced: false })
    }

    /// An observation of /proc showed it gone.
    pub(super) fn mark_missed(&mut self, key: Key, missed: Missed) {
        if self.0.len() < MAX {
            self.0.insert(key, missed);
        }
    }

    /// Each second: writes the lines of processes whose record did not come in time.
    pub(super) fn announce_overdue(
        &mut self,
        engine: &RecordedEngine,
        redact: &Redactor,
        feed: &mut Feed,
        now: u64,
    ) {
        self.0.retain(|_, m| now.saturating_sub(m.at) < LATE);
        for (key, m) in &mut self.0 {
            if !m.announced && now.saturating_sub(m.at) >= RECORD {
                m.announced = true;
                feed.announce(m.at, m.line(*key, engine, redact), m.jobs.clone());
            }
        }
    }
}

impl Missed {
    fn line(&self, key: Key, engine: &RecordedEngine, redact: &Redactor) -> EventLine {
        let event = reap(key, self.status, self.at);
        let mut line = engine.event_formatter(redact)(&event, &self.context, innermost(&self.jobs));
        if self.status.is_none() {
            line.more.insert("exit".into(), serde_json::Value::Null);
        }
        line.more.insert("source".into(), "proc".into());
        line
    }
}

fn reap(key: Key, status: Option<WaitStatus>, at: u64) -> Event<'static> {
    let status = status.unwrap_or(WaitStatus(0));
    Event { at, cpu: 0, process: key, body: Body::Reap { status } }
}
