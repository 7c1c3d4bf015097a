//! A kill as every part names it, from the command line to the state file: who asked, why, and what it covers.

use serde::{Deserialize, Serialize};

use crate::model::key::Key;
use crate::model::outside::OutsideText;

/// Why a job is ended: the `reason` of `jobwarden_job_kills_total` and of the audit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// Policy: the deadline has passed.
    Timeout,
    /// Policy: `on_orphan = "kill"`.
    Orphan,
    /// `jobwarden kill`.
    Operator,
    /// `jobwarden exec`: its deadline, what its command left behind, or the death of its supervisor.
    Exec,
}

impl Reason {
    pub const ALL: [Self; 4] = [Self::Timeout, Self::Orphan, Self::Operator, Self::Exec];

    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::Orphan => "orphan",
            Self::Operator => "operator",
            Self::Exec => "exec",
        }
    }
}

/// Who asked: a client of the control socket, or a rule.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AskedBy {
    pub uid: Option<u32>,
    pub pid: Option<u32>,
    pub exe: Option<OutsideText>,
    /// The rule's name, when policy asked.
    pub rule: Option<String>,
}

/// Whom an [`Order`] is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// All members of the job `Order::job`, which is labelled already.
    Whole,
    /// These processes and all who descend from them, and nobody else of the job: orphans, or the target of `kill PID`.
    /// Each becomes a job of its own inside `Order::job` (0 = none) while it is ended, numbered `number`, `number + 1`, ..:
    /// the caller keeps as many numbers free as there are roots.
    Descendants { number: u64, roots: Vec<Key> },
}
