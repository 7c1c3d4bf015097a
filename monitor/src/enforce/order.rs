//! What is asked of enforcement, and what it answers. Data only.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use crate::model::key::Key;
use crate::model::kill::{AskedBy, Reason, What};
use crate::model::schema::{JobId, KillReport, SignalledOutcome, Stuck};

/// One order to end a job or a part of it.
#[derive(Clone, Debug)]
pub struct Order {
    /// The job's number in the kernel.
    pub job: u64,
    /// Its id in the contract, where it has one.
    pub id: Option<JobId>,
    /// Its name, "" where it has none.
    pub name: String,
    /// Signalled first, so that it can end its own.
    pub root: Key,
    /// `KillReport::target`.
    pub target: String,
    pub what: What,
    /// The stop signal; SIGKILL (9) skips the grace.
    pub signal: u8,
    /// 0 = SIGKILL at once.
    pub grace: Duration,
    /// How long the members may take to end by themselves before the first signal (`exec --orphan-after`).
    pub delay: Duration,
    /// How long SIGKILL may take with nobody ending before what is left is a survivor.
    pub settle: Duration,
    pub reason: Reason,
    pub asked_by: AskedBy,
    /// Nobody is signalled, flagged or doomed: the report says who would be.
    pub dry_run: bool,
    /// The v2 cgroup that the job owns (`exec --cgroup`): `cgroup.kill` comes first if all in it are members and none is
    /// spared. Linux 5.14.
    pub cgroup: Option<PathBuf>,
}

impl Order {
    /// [`Order::settle`] where nobody says otherwise.
    pub const SETTLE: Duration = Duration::from_secs(5);
}

/// What an order came to.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub report: KillReport,
    /// For `jobwarden_signals_sent_total`: how many of each signal had which outcome (SIGCONT included).
    pub signals: BTreeMap<(u8, SignalledOutcome), u64>,
}

impl Outcome {
    /// Whether no member but zombies and the spared is left.
    #[must_use]
    pub fn ended(&self) -> bool {
        self.report.survivors.is_empty()
    }

    /// One line about the survivors for the `kill-failed` alert: who, state, wchan, tracer.
    #[must_use]
    pub fn why_failed(&self) -> String {
        use std::fmt::Write as _;
        let one = |s: &Stuck| {
            let mut t = format!("{} ({}) in state {}", s.process.id, s.process.comm, s.state);
            if let Some(w) = &s.wchan {
                let _ = write!(t, ", waits in {w}");
            }
            if let Some(r) = &s.tracer {
                let _ = write!(t, ", held by tracer {} ({})", r.id, r.comm);
            }
            if s.frozen {
                t += ", in a frozen cgroup";
            }
            t
        };
        self.report.stuck.iter().map(one).collect::<Vec<_>>().join("; ")
    }
}

/// The kernel side failed while an order was carried out. What had been signalled until then is in the audit.
#[derive(Debug, thiserror::Error)]
#[error("{doing} of job {job}: {source}")]
pub struct EnforceError {
    pub doing: &'static str,
    pub job: u64,
    pub source: std::io::Error,
}
