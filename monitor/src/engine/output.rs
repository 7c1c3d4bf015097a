//! What the engine hands out: effects to be carried out, changes to be kept or shown, and answers to commands.

use serde::{Deserialize, Serialize};

use super::forest::Merge;
use super::record::{EnforcementState, JobEnded, JobRecord};
use crate::model::key::Key;
use crate::model::kill::KillSpec;
use crate::model::schema::Alert;

/// What one or several inputs led to. The caller empties it: [`Engine::handle`](super::Engine::handle) only adds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Output {
    /// To be carried out, in this order.
    pub effects: Vec<Effect>,
    /// What is different now, for those who keep or show it.
    pub changes: Vec<Change>,
}

/// Work for the agent, which answers with an [`Input`](super::Input).
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Read /proc/PID/stat (and, when it says Z, whether a thread lives) and answer with `Observation::Look`.
    /// Bounded: at most [`super::LOOKS_PER_S`] a second on average, the looks of alerts beside them.
    Look(Key),
    /// Read argv, exe, cgroup, uid and pid namespace and answer with `Observation::Facts` (`None` when the process is gone).
    /// A process that cannot be read must be answered too: a rule may wait for it.
    ReadFacts(Key),
    /// Read /proc/PID/cgroup and answer with `Observation::Cgroup`, also when it cannot be read.
    ReadCgroup { key: Key, id: u64 },
    /// Write the job into the kernel: `Lineage::label(job.number, job.outer, job.id.root)`. It stands in `Change::Job` too and
    /// must be saved before the record that led to it leaves the ring.
    LabelJob(Box<JobRecord>),
    /// The kernel's lineage map lacks this process, or its job in it (a full map, a lost fork record): enter it. A process that is
    /// not in the map escapes kills. `missed`: the fork probe found no room.
    EnterProcess { process: Key, parent: Key, job: u64, missed: bool },
    /// No member of the job with this number seems to live. Ask the kernel and answer with `Input::JobCounted`.
    CountMembers(u64),
    /// Policy has decided to kill. The agent runs it and answers with `Input::KillFinished`; `KillStarted` is not needed. `Descendants`
    /// come with reserved job numbers.
    Kill(Box<KillSpec>),
}

/// What is different after an input.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// A job began, or its record is another one: it must survive a restart.
    Job(Box<JobRecord>),
    /// A job has ended: its number is free in the kernel (`Lineage::forget`), its record is over.
    JobEnded(Box<JobEnded>),
    /// An alert changed; the whole alert as it is now.
    Alert { change: AlertChange, alert: Box<Alert> },
    /// The operator's setting or the fuse: it must survive a restart.
    Enforcement(EnforcementState),
}

/// What a command comes to, for the one who gave it.
#[derive(Debug, PartialEq)]
pub enum Answer {
    /// The input asks for none.
    None,
    /// `RegisterJob`, `ExtendJob`, `ReleaseJob`: the record as it is now.
    Job(Result<Box<JobRecord>, Refused>),
    /// `Snapshot`.
    Merged(Merge),
    /// `ReserveNumbers`: the first number.
    Number(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AlertChange {
    /// Shown by `alerts --all`; never sent.
    Pending,
    /// A pending one that came to nothing: forget it. Never sent.
    Dropped,
    Fired,
    /// Count, cause or severity of a firing one changed materially.
    Updated,
    Resolved,
}

/// Why a command was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Refused {
    #[error("no job {0}: `jobwarden jobs` lists them")]
    NoJob(String),
    #[error("no process {0}: it is not alive, and none of its descendants is")]
    NoProcess(String),
    #[error("job {0} has no deadline that could be extended")]
    NoDeadline(String),
    #[error("job {0} has ended already")]
    Ended(String),
    #[error("{0:?} is no target: expected a PID, an ID (PID:START), a JOB (j-PID:START-N) or name:NAME")]
    Target(String),
    #[error("{0} jobs are followed already: no more are taken")]
    TooManyJobs(usize),
    #[error("{0} is inside {1} nested jobs already: no job begins there, and those around hold it")]
    TooDeep(Key, usize),
}
