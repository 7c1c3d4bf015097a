//! One line of `events`, in two steps: what the forest knows of an event's processes when it comes ([`EventContext`], kept for
//! each event, made without allocating), and the line told from it, perhaps much later, when they are long gone.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Value, json};

use super::forest::signals::Signal;
use super::view::View;
use crate::model::argv::split_argv;
use crate::model::event::{Body, Comm, Event, SignalResult, WaitStatus};
use crate::model::key::Key;
use crate::model::outside::OutsideText;
use crate::model::schema::{EventLine, JobId, Ref, SignalBy};

/// What was known at an event's time and does not stand in its record.
#[derive(Clone, Debug)]
pub struct EventContext {
    process: Named,
    /// The parent of a fork, the sender of a signal, of an end by signal the one who sent it.
    other: Option<(Key, Named)>,
    /// Of a signal.
    by: Option<SignalBy>,
}

#[derive(Clone, Debug)]
struct Named {
    comm: Comm,
    /// NUL-separated, shared with the forest.
    argv: Option<Arc<[u8]>>,
}

impl Named {
    fn reference(&self, key: Key) -> Ref {
        let argv =
            split_argv(self.argv.as_deref().unwrap_or_default()).map(OutsideText::from_bytes).collect();
        Ref { id: key, pid: key.pid, comm: OutsideText::from_bytes(self.comm.bytes()), argv }
    }
}

impl View<'_> {
    pub(super) fn context_of(&self, e: &Event<'_>) -> EventContext {
        let mut by = None;
        let (comm, other) = match e.body {
            Body::Fork { parent, comm, .. } => (comm, Some((parent, self.named(parent, comm)))),
            // The record has the name and argv of what it became.
            Body::Exec { comm, .. } => {
                return EventContext { process: Named { comm, argv: None }, other: None, by: None };
            }
            Body::Exit { status, comm } | Body::LeaderExit { status, comm } => {
                (comm, self.killed_by(e.process, status))
            }
            Body::Reap { status } => (Comm::default(), self.killed_by(e.process, status)),
            Body::Signal { sender, .. } => {
                let s = Signal::by(sender);
                by = Some(self.signal_by(&s));
                (Comm::default(), s.sender_key().map(|k| (k, self.named(k, Comm::default()))))
            }
            Body::Kill { .. } => (Comm::default(), None),
        };
        EventContext { process: self.named(e.process, comm), other, by }
    }

    /// Of a process that may be unknown: then by the name that the record gives.
    fn named(&self, key: Key, comm: Comm) -> Named {
        self.forest.find(key).map_or(Named { comm, argv: None }, |i| {
            let n = self.forest.node(i);
            Named { comm: n.comm, argv: self.forest.strings.shared(n.argv) }
        })
    }

    fn killed_by(&self, key: Key, status: WaitStatus) -> Option<(Key, Named)> {
        let killer = self.forest.killer(self.forest.find(key)?, status.signal()?)?;
        let sender = killer.sender_key()?;
        Some((sender, self.named(sender, killer.sender_comm)))
    }
}

impl EventContext {
    pub(super) fn line(&self, e: &Event<'_>, at: String, job: Option<JobId>) -> EventLine {
        let mut more = BTreeMap::new();
        let mut put = |k: &str, v: Value| more.insert(k.to_owned(), v);
        let other = self.other.as_ref().map(|(k, n)| n.reference(*k));
        let mut process = self.process.reference(e.process);
        let kind = match e.body {
            Body::Fork { lineage_parent, .. } => {
                put("lineage_parent", json!(lineage_parent));
                put("parent", json!(other));
                "fork"
            }
            Body::Exec { filename, argv, argv_cut, uid, .. } => {
                process.argv = split_argv(argv).map(OutsideText::from_bytes).collect();
                put("filename", json!(OutsideText::from_bytes(filename)));
                put("argv", json!(process.argv));
                put("argv_cut", json!(argv_cut));
                put("uid", json!(uid));
                "exec"
            }
            Body::Exit { status, .. } => {
                put("exit", exit(status, other));
                "exit"
            }
            Body::LeaderExit { status, .. } => {
                put("exit", exit(status, other));
                "leader-exit"
            }
            Body::Reap { status } => {
                put("exit", exit(status, other));
                "reap"
            }
            Body::Signal { signal, result, .. } => {
                put("signal", json!(crate::model::signal::name(signal)));
                put("by", json!(self.by));
                put("sender", json!(other));
                put("outcome", json!(outcome(result)));
                "signal"
            }
            Body::Kill { result, .. } => {
                put("signal", json!("SIGKILL"));
                put("by", json!("jobwarden"));
                put("sender", Value::Null);
                put("outcome", json!(if result == 0 { "delivered" } else { "ignored" }));
                put("result", json!(result));
                "signal"
            }
        };
        put("job", json!(job));
        EventLine { at, kind: kind.to_owned(), process: Some(process), more }
    }
}

fn exit(status: WaitStatus, sender: Option<Ref>) -> Value {
    match status.signal() {
        None => json!({ "code": status.code() }),
        Some(s) => {
            json!({ "signal": crate::model::signal::name(s), "core": status.core(), "sender": sender })
        }
    }
}

const fn outcome(r: SignalResult) -> &'static str {
    match r {
        SignalResult::Delivered | SignalResult::Overflow | SignalResult::LostInfo => "delivered",
        SignalResult::Ignored => "ignored",
        SignalResult::AlreadyPending => "already-pending",
    }
}
