//! What `why` is asked: the facts that the forest has about a process and its family.

use crate::model::event::SignalResult;
use crate::model::key::Key;
use crate::model::schema::{Process, Ref, SignalBy};

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
    /// When records were last lost (boot-time ns), a second later at most: signals may be among them.
    pub lost: Option<u64>,
    /// The firing alert that this is asked for, if any.
    pub alert: Option<String>,
}

impl Question {
    #[must_use]
    pub fn process(&self, key: Key) -> Option<&Process> {
        std::iter::once(&self.subject).chain(&self.family).find(|p| p.id == key)
    }
}
