//! The JSON that others' scripts read, to the letter: keys and enum values may be added, never changed or taken away.
//!
//! The agent's answers, the alerts' bodies and the output of `--json` are all made of these types.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::model::key::{Key, Name};
use crate::model::outside::OutsideText;

/// `"j-" ID "-" ordinal`: the job's root and the ordinal of its rule (1 = the first of the file; 0 = `exec`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId {
    pub root: Key,
    pub ordinal: u32,
}

impl JobId {
    fn name(self) -> Name {
        Name::default().text("j-").key(self.root).text("-").number(self.ordinal)
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name().as_str())
    }
}

/// Not of the form `j-PID:START-N`.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is no job: expected j-PID:START-N, as `jobwarden jobs` prints it")]
pub struct JobIdError(pub String);

impl std::str::FromStr for JobId {
    type Err = JobIdError;
    fn from_str(s: &str) -> Result<Self, JobIdError> {
        let bad = || JobIdError(s.chars().take(96).collect());
        let (id, ordinal) = s.strip_prefix("j-").and_then(|r| r.rsplit_once('-')).ok_or_else(bad)?;
        Ok(Self { root: id.parse().map_err(|_| bad())?, ordinal: ordinal.parse().map_err(|_| bad())? })
    }
}

impl Serialize for JobId {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(self.name().as_str())
    }
}

impl<'de> Deserialize<'de> for JobId {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        crate::model::key::parsed(d)
    }
}

/// REF: a process, named shortly.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ref {
    pub id: Key,
    pub pid: u32,
    pub comm: OutsideText,
    pub argv: Vec<OutsideText>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    Running,
    LeaderExited,
    Exiting,
    Zombie,
    Gone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LineageKnown {
    Known,
    Unknown,
}

/// How a process ended: `{"code":N}` or `{"signal","core","sender"}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Exit {
    Code { code: i32 },
    Signal { signal: String, core: bool, sender: Option<Ref> },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    pub id: OutsideText,
    pub runtime: Option<String>,
    pub pod: Option<String>,
}

/// PROCESS.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Process {
    pub id: Key,
    pub pid: u32,
    /// None when gone.
    pub ppid: Option<u32>,
    pub lineage_parent: Option<Key>,
    pub lineage: LineageKnown,
    pub adopter: Option<Ref>,
    pub state: State,
    /// One letter, as /proc/PID/stat gives it at this moment.
    pub kernel_state: Option<String>,
    pub orphan: bool,
    /// Seconds since it came into `state`.
    pub state_s: f64,
    /// RFC 3339, UTC.
    pub started: String,
    pub comm: OutsideText,
    pub exe: Option<OutsideText>,
    pub argv: Vec<OutsideText>,
    pub uid: Option<u32>,
    /// Innermost job.
    pub job: Option<JobId>,
    /// Innermost first.
    pub jobs: Vec<JobId>,
    pub container: Option<Container>,
    pub cgroup: Option<OutsideText>,
    pub pid_ns: Option<u64>,
    pub ns_pid: Option<u32>,
    pub kernel_thread: bool,
    pub exit: Option<Exit>,
    pub children: Vec<Key>,
    /// Dead ancestors between it and `lineage_parent` that are not kept: "n more".
    #[serde(default, skip_serializing_if = "is_zero")]
    pub elided: u32,
    /// There is more of argv: it was longer than a record, or could not be read, and nobody has asked /proc for it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub argv_cut: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
const fn is_zero(n: &u32) -> bool {
    *n == 0
}

impl Process {
    #[must_use]
    pub fn to_ref(&self) -> Ref {
        Ref { id: self.id, pid: self.pid, comm: self.comm.clone(), argv: self.argv.clone() }
    }
}

/// `tree`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tree {
    pub at: String,
    pub host: String,
    pub processes: Vec<Process>,
    /// What of them could not be read, because it is held up.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unread: Vec<Unread>,
}

/// A read of a process that has not come back.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Unread {
    pub pid: u32,
    /// `memory` (its argv lies there), ..
    pub what: String,
    /// For how long.
    pub blocked_s: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobState {
    Running,
    Lingering,
    Expired,
    Killing,
    Done,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Job {
    pub id: JobId,
    pub name: String,
    pub root: Key,
    pub state: JobState,
    pub started: String,
    pub deadline: Option<String>,
    /// Members with a live thread.
    pub processes: usize,
    pub zombies: usize,
    pub orphans: usize,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Jobs {
    pub jobs: Vec<Job>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AlertKind {
    Zombie,
    Orphan,
    JobTimeout,
    KillFailed,
    EventsLost,
    EnforcementStopped,
    StorageFailed,
    Capacity,
}

impl AlertKind {
    pub const ALL: [Self; 8] = [
        Self::Zombie,
        Self::Orphan,
        Self::JobTimeout,
        Self::KillFailed,
        Self::EventsLost,
        Self::EnforcementStopped,
        Self::StorageFailed,
        Self::Capacity,
    ];

    /// As in JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Zombie => "zombie",
            Self::Orphan => "orphan",
            Self::JobTimeout => "job-timeout",
            Self::KillFailed => "kill-failed",
            Self::EventsLost => "events-lost",
            Self::EnforcementStopped => "enforcement-stopped",
            Self::StorageFailed => "storage-failed",
            Self::Capacity => "capacity",
        }
    }

    /// The `alertname` label.
    #[must_use]
    pub const fn alertname(self) -> &'static str {
        match self {
            Self::Zombie => "JobwardenZombie",
            Self::Orphan => "JobwardenOrphan",
            Self::JobTimeout => "JobwardenJobTimeout",
            Self::KillFailed => "JobwardenKillFailed",
            Self::EventsLost => "JobwardenEventsLost",
            Self::EnforcementStopped => "JobwardenEnforcementStopped",
            Self::StorageFailed => "JobwardenStorageFailed",
            Self::Capacity => "JobwardenCapacity",
        }
    }

    #[must_use]
    pub const fn default_severity(self) -> Severity {
        match self {
            Self::KillFailed | Self::EnforcementStopped | Self::StorageFailed => Severity::Critical,
            Self::JobTimeout => Severity::Error,
            Self::Zombie | Self::Orphan | Self::Capacity => Severity::Warning,
            Self::EventsLost => Severity::Info,
        }
    }
}

impl fmt::Display for AlertKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AlertState {
    Pending,
    Firing,
    Resolved,
}

/// Ordered from the least to the most severe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    Info,
    Warning,
    Error,
    Critical,
}

impl Severity {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
            Self::Critical => "critical",
        }
    }
}

/// ALERT.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Alert {
    /// First 16 hex digits of SHA-256 over machine id, boot id, kind, rule, subject ID.
    pub id: String,
    pub kind: AlertKind,
    pub state: AlertState,
    pub severity: Severity,
    pub job: Option<JobId>,
    pub job_name: String,
    pub subject: Option<Process>,
    pub count: usize,
    pub since: String,
    pub resolved_at: Option<String>,
    pub summary: String,
    /// Frozen when it first fires.
    pub labels: BTreeMap<String, String>,
    pub cause: Option<Cause>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Alerts {
    pub alerts: Vec<Alert>,
    /// With `--undelivered`: who has not got each of them, by the alert's id.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub undelivered: BTreeMap<String, Vec<Undelivered>>,
}

/// A receiver that has not got an alert yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Undelivered {
    pub receiver: String,
    /// Refused for good; else it is still tried.
    pub parked: bool,
    pub attempts: u32,
    /// What came back last.
    pub error: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    HeldByTracer,
    ParentStopped,
    ParentTraced,
    ParentUninterruptible,
    InitNotReaping,
    ParentBlockedOnPipe,
    ParentWaitingForOtherChild,
    ParentBlocked,
    ParentBusy,
    BeingReaped,
    IgnoredSignal,
    Daemonized,
    ParentKilled,
    ParentExited,
    LeaderExited,
    StillExiting,
    NotAZombie,
    Unknown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SignalBy {
    Process,
    Kernel,
    ParentDeath,
    Timer,
    Jobwarden,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SignalOutcome {
    Delivered,
    Ignored,
    AlreadyPending,
    Blocked,
}

/// One fact behind a verdict; each can be checked by hand.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Evidence {
    Blocked {
        /// Whose thread; None in what older versions stored.
        #[serde(default)]
        process: Option<Ref>,
        thread: u32,
        syscall: String,
        fd: Option<u32>,
        /// `pipe:[N]`, `socket:[N]`, a path.
        inode: Option<OutsideText>,
    },
    Holder {
        process: Ref,
        fd: u32,
        mode: String,
        inode: OutsideText,
        relation: String,
    },
    Signal {
        signal: String,
        sender: Option<Ref>,
        by: SignalBy,
        target: Ref,
        outcome: SignalOutcome,
    },
    ParentExit {
        process: Ref,
        exit: Option<Exit>,
    },
    Python {
        thread: u64,
        file: OutsideText,
        line: u32,
        function: OutsideText,
        source: Option<OutsideText>,
    },
    Wchan {
        process: Ref,
        thread: u32,
        wchan: String,
    },
    Tracer {
        process: Ref,
    },
    WaitsFor {
        process: Ref,
    },
    /// A further fact in words, where no other kind fits.
    Note {
        text: String,
    },
}

/// CAUSE.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cause {
    pub process: Process,
    pub verdict: Verdict,
    pub summary: String,
    pub evidence: Vec<Evidence>,
    /// A command to copy, or what to do in words.
    pub remedy: String,
    pub alert: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SignalledOutcome {
    Ended,
    AlreadyGone,
    Survived,
    Spared,
    /// `--dry-run`: would be signalled.
    DryRun,
}

impl SignalledOutcome {
    pub const ALL: [Self; 5] = [Self::Ended, Self::AlreadyGone, Self::Survived, Self::Spared, Self::DryRun];

    /// As in JSON and in the `outcome` label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ended => "ended",
            Self::AlreadyGone => "already-gone",
            Self::Survived => "survived",
            Self::Spared => "spared",
            Self::DryRun => "dry-run",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Signalled {
    pub process: Ref,
    pub signal: String,
    pub outcome: SignalledOutcome,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spared {
    pub process: Ref,
    pub why: String,
}

/// What a survivor waits for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stuck {
    pub process: Ref,
    /// One letter, as /proc/PID/stat gives it.
    pub state: String,
    pub wchan: Option<String>,
    pub tracer: Option<Ref>,
    /// In a frozen cgroup.
    pub frozen: bool,
}

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}) in state {}", self.process.comm, self.process.id, self.state)?;
        if let Some(w) = &self.wchan {
            write!(f, " waiting in {w}")?;
        }
        if let Some(t) = &self.tracer {
            write!(f, " held by tracer {} ({})", t.comm, t.id)?;
        }
        if self.frozen {
            f.write_str(" in a frozen cgroup")?;
        }
        Ok(())
    }
}

/// `kill`.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct KillReport {
    pub target: String,
    pub signalled: Vec<Signalled>,
    pub survivors: Vec<Ref>,
    /// Each survivor again, with what it waits for.
    #[serde(default)]
    pub stuck: Vec<Stuck>,
    pub spared: Vec<Spared>,
    pub zombies: Vec<Ref>,
    pub took_s: f64,
}

/// One line of `events`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EventLine {
    pub at: String,
    pub kind: String,
    /// None for `lost`.
    pub process: Option<Ref>,
    #[serde(flatten)]
    pub more: BTreeMap<String, serde_json::Value>,
}

/// With `--json`, an error on stderr: `{"error":{..}}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    pub error: ErrorInfo,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorInfo {
    pub code: String,
    pub message: String,
    pub hint: Option<String>,
    /// Where several matched and nothing was done.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub matches: Vec<crate::api::Matched>,
}

/// What a job may be called: `[A-Za-z0-9_.-]{1,64}`.
#[must_use]
pub fn is_job_name(name: &str) -> bool {
    let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    (1..=64).contains(&name.len()) && name.bytes().all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn job_id_round_trip() {
        let id = JobId { root: Key::new(7, 8), ordinal: 3 };
        assert_eq!(id.to_string(), "j-7:8-3");
        assert_eq!("j-7:8-3".parse(), Ok(id));
        assert!("j-7-3".parse::<JobId>().is_err());
        let longest = JobId { root: Key::new(u32::MAX, u64::MAX), ordinal: u32::MAX };
        assert_eq!(longest.to_string(), "j-4294967295:18446744073709551615-4294967295");
        let json = serde_json::to_string(&longest).unwrap();
        assert_eq!(serde_json::from_str::<JobId>(&json).unwrap(), longest);
        assert!(
            serde_json::from_str::<JobId>("\"j-7-3\"").is_err()
                && serde_json::from_str::<JobId>("7").is_err()
        );
    }

    #[test]
    fn names_of_jobs() {
        assert!(is_job_name("a_B.9-") && is_job_name(&"x".repeat(64)));
        for bad in ["", "a b", "a\n", "\x1b[2J", "é", "name:x", &"x".repeat(65)] {
            assert!(!is_job_name(bad), "{bad:?}");
        }
    }

    #[test]
    fn exit_is_one_of_two_shapes() {
        let s = serde_json::to_string(&Exit::Code { code: 3 }).unwrap();
        assert_eq!(s, r#"{"code":3}"#);
        let e: Exit = serde_json::from_str(r#"{"signal":"SIGTERM","core":false,"sender":null}"#).unwrap();
        assert!(matches!(e, Exit::Signal { .. }));
    }
}
