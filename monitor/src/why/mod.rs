//! The cause of a zombie or an orphan: a reader of /proc (root injected) and a pure classifier over what it read.
//! It signals nobody and changes nothing.

use std::time::Duration;

use crate::contract::{Cause, Process, Ref, SignalBy, Verdict};
use crate::event::SignalResult;
use crate::key::Key;
use crate::proc::Proc;

pub mod holders;

pub use holders::{FdRow, Holders, ProcHolders};

/// A signal that the probes saw, as the forest remembers it.
#[derive(Clone, Debug, PartialEq)]
pub struct SignalSeen {
    /// Boot-time nanoseconds.
    pub at: u64,
    pub signal: u8,
    pub by: SignalBy,
    pub sender: Option<Ref>,
    pub target: Ref,
    pub result: SignalResult,
}

/// What the forest knows about a process that is asked about. The reader adds what /proc says at that moment.
#[derive(Clone, Debug)]
pub struct Question {
    pub subject: Process,
    /// The subject's ancestors by lineage (nearest first, the dead included), its present parent and adopter, its
    /// children, and the members of its jobs; each once.
    pub family: Vec<Process>,
    /// Signals seen by the subject, its parents and the members of its jobs, oldest first.
    pub signals: Vec<SignalSeen>,
    /// The firing alert that this is asked for, if any.
    pub alert: Option<String>,
}

impl Question {
    #[must_use]
    pub fn process(&self, key: Key) -> Option<&Process> {
        std::iter::once(&self.subject).chain(&self.family).find(|p| p.id == key)
    }
}

/// What one `explain` may cost.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// For everything but the Python frames.
    pub time: Duration,
    /// For the Python frames; zero: none are sought.
    pub python: Duration,
    /// How many processes a chain of causes is followed over.
    pub depth: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { time: Duration::from_secs(2), python: Duration::from_secs(2), depth: 8 }
    }
}

/// The cause, with its evidence. Blocking (`spawn_blocking`), bounded by `limits`; what could not be read is said in
/// the evidence and the verdict is then `unknown` rather than a guess.
#[must_use]
pub fn explain(q: &Question, _proc: &Proc, _holders: &dyn Holders, _limits: &Limits) -> Cause {
    Cause {
        process: q.subject.clone(),
        verdict: Verdict::Unknown,
        summary: String::new(),
        evidence: Vec::new(),
        remedy: String::new(),
        alert: q.alert.clone(),
    }
}
