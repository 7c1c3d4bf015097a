//! A kill as every part names it, from the command line to the state file: who asked, why, and what it covers.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::model::key::Key;
use crate::model::outside::OutsideText;
use crate::model::schema::JobId;

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

/// The processes that a kill covers. In the state file the roots: none for a whole job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<Key>", into = "Vec<Key>")]
pub enum What {
    /// All members of the job [`KillSpec::number`], which is labelled already.
    Whole,
    /// These processes and their descendants, and no other member of the job: orphans, or the target of `kill PID`. Each root becomes
    /// the root of a job of its own inside that job (0 = none) during the kill, numbered `number`, `number + 1`, ..: the caller
    /// reserves one number for each root.
    Descendants { number: u64, roots: Vec<Key> },
}

impl From<Vec<Key>> for What {
    fn from(roots: Vec<Key>) -> Self {
        if roots.is_empty() { Self::Whole } else { Self::Descendants { number: 0, roots } }
    }
}

impl From<What> for Vec<Key> {
    fn from(what: What) -> Self {
        match what {
            What::Whole => Self::new(),
            What::Descendants { roots, .. } => roots,
        }
    }
}

/// One kill of a job or of some processes: as policy, a client or `exec` asks for it, as enforcement carries it out, and as the state
/// file keeps it over a restart. The file has the fields that mean something to the next agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KillSpec {
    /// None for processes outside of jobs.
    pub job: Option<JobId>,
    /// The job's number in the kernel, 0 = none.
    #[serde(skip)]
    pub number: u64,
    /// The job's name, "" if it has none.
    #[serde(skip)]
    pub name: String,
    /// Signalled first, so that it can end its descendants itself.
    pub root: Key,
    /// `KillReport::target`.
    pub target: String,
    #[serde(rename = "roots")]
    pub what: What,
    /// The stop signal; SIGKILL (9) skips the grace.
    pub signal: u8,
    /// 0 = SIGKILL at once.
    #[serde(skip)]
    pub grace: Duration,
    /// How long the members may take to end by themselves before the first signal (`exec --orphan-after`).
    #[serde(skip)]
    pub delay: Duration,
    /// How long after SIGKILL the kill goes on with no process ending before the rest are survivors.
    #[serde(skip, default = "settle")]
    pub settle: Duration,
    /// Only kills of operators are in the state file.
    #[serde(skip, default = "operator")]
    pub reason: Reason,
    pub asked_by: AskedBy,
    /// Nothing is signalled, flagged or doomed: the report says what would be.
    #[serde(skip)]
    pub dry_run: bool,
    /// The v2 cgroup that the job owns (`exec --cgroup`): `cgroup.kill` comes first if all processes in it are members and none is
    /// spared. Linux 5.14.
    #[serde(skip)]
    pub cgroup: Option<PathBuf>,
}

impl KillSpec {
    /// A kill with SIGTERM and no grace, outside of jobs.
    #[must_use]
    pub fn new(root: Key, what: What, reason: Reason) -> Self {
        Self {
            job: None,
            number: 0,
            name: String::new(),
            root,
            target: root.to_string(),
            what,
            signal: libc::SIGTERM as u8,
            grace: Duration::ZERO,
            delay: Duration::ZERO,
            settle: settle(),
            reason,
            asked_by: AskedBy::default(),
            dry_run: false,
            cgroup: None,
        }
    }

    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.what == What::Whole
    }
}

const fn settle() -> Duration {
    Duration::from_secs(5)
}

const fn operator() -> Reason {
    Reason::Operator
}
