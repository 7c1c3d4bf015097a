//! What can be asked of the agent, with the arguments checked and the place for the reply. Data only.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::{ApiError, Matched, Subscription, Target};
use crate::enforce::audit;
use crate::model::audience::Audience;
use crate::model::kill::AskedBy;
use crate::model::outside::OutsideText;
use crate::model::schema::{Alerts, JobId, Jobs, KillReport, Tree};

pub type Reply<T> = oneshot::Sender<Result<T, ApiError>>;

/// Who is at the other end of the control socket, by the kernel's word (`SO_PEERCRED`) when it connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// In the agent's pid namespace; 0 if it is outside.
    pub pid: u32,
    pub uid: u32,
    pub gid: u32,
    pub exe: Option<OutsideText>,
    /// uid 0 in the agent's own pid namespace: may kill, exec, reload, notify, extend, and switch enforcement. The server
    /// has refused everything else to others before a [`Request`] is made of it.
    pub privileged: bool,
}

impl Peer {
    /// What may be shown to this client. uid 0 of another pid namespace is root too: whoever gave it the socket decided that.
    #[must_use]
    pub const fn audience(&self) -> Audience {
        if self.uid == 0 { Audience::Full } else { Audience::Reader { uid: self.uid, gid: self.gid } }
    }
}

impl From<&Peer> for AskedBy {
    fn from(p: &Peer) -> Self {
        Self { uid: Some(p.uid), pid: Some(p.pid), exe: p.exe.clone(), rule: None }
    }
}

/// `tree`: all of it, or what the fields select. Kernel threads are always among the answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TreeQuery {
    /// The server's word, never the client's; so in every query.
    #[serde(skip)]
    pub audience: Audience,
    /// Its ancestors, itself and its descendants.
    pub target: Option<Target>,
    /// Zombies, with their ancestors.
    pub zombies: bool,
    /// Orphans, with their ancestors.
    pub orphans: bool,
    pub uid: Option<u32>,
    /// A container's id, or its beginning: narrowed down by the server, not by the core.
    pub container: Option<String>,
    /// Only what the text shows: [`crate::model::tree_rows`].
    pub rows: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AlertQuery {
    #[serde(skip)]
    pub audience: Audience,
    /// Pending ones too, and the resolved that are still kept.
    pub all: bool,
    /// From the store: past ones.
    pub history: bool,
    /// Seconds back.
    pub since_s: Option<f64>,
    pub undelivered: bool,
}

/// Which lines of `events` are wanted. `lost` is always sent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EventFilter {
    /// Seconds back, as far as the agent remembers.
    pub since_s: Option<f64>,
    pub job: Option<Target>,
    pub pid: Option<u32>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WhyQuery {
    #[serde(skip)]
    pub audience: Audience,
    /// None: of every firing alert.
    pub target: Option<Target>,
    /// `target` is then a pid as it is in this container.
    pub container: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KillRequest {
    pub target: Target,
    /// Signal number; None: the job's own, else SIGTERM.
    pub signal: Option<u8>,
    /// Seconds; None: 10 s, whatever the job's rule says. 0 = SIGKILL at once.
    pub grace_s: Option<f64>,
    #[serde(default)]
    pub dry_run: bool,
    /// Only the orphans among them, and what descends from those.
    #[serde(default)]
    pub orphans: bool,
    /// Every match, where several match.
    #[serde(default)]
    pub all: bool,
}

/// `exec` asks for a job whose root it is about to let run. The agent is the watcher: when the client's process (the
/// supervisor) dies without [`Request::ExecEnd`], the job is ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecRequest {
    /// Forked by the peer, and held before its first instruction. The agent asks the kernel for its start: it must be a
    /// child of the peer, unreaped, so its pid cannot mean another.
    pub pid: u32,
    pub name: String,
    pub timeout_s: Option<f64>,
    /// Seconds.
    pub grace_s: f64,
    /// Signal number.
    pub signal: u8,
    pub orphan_after_s: Option<f64>,
    pub keep_orphans: bool,
    /// The v2 cgroup that the job owns, with `--cgroup`.
    pub cgroup: Option<PathBuf>,
    /// The number under which `exec` has entered the job into the kernel's maps already; None: the agent does.
    #[serde(default)]
    pub number: Option<u64>,
    /// Boot-time nanoseconds when the client asked. A client waits one second: if the
    /// agent was stopped meanwhile, the client holds the job without it by now, or is gone, and its pids may mean others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asked_at: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRegistered {
    pub job: JobId,
    /// The job's number in the kernel's maps.
    pub number: u64,
}

/// The deadline has come by the client's clock, or the command has ended: what is left of the job is to be ended now. The
/// client keeps the deadline; the engine shows it (`jobs`), moves it (`jobs extend`), and acts if the client does not.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecEnd {
    pub job: JobId,
    /// The deadline has passed; else the command has ended and this is about what it left.
    pub timed_out: bool,
    /// Nothing is signalled, the job is let go (`--keep-orphans`); who is left stands in the report as spared.
    pub keep: bool,
    /// Seconds that what is left may take to end by itself before its first signal (`--orphan-after`): `Order::delay`.
    pub after_s: f64,
    /// Seconds.
    pub grace_s: f64,
    /// Signal number.
    pub signal: u8,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExecEnded {
    /// None: `timed_out` was asked, and nothing was done, since the deadline has been moved.
    pub report: Option<KillReport>,
    /// Seconds from now to the moved deadline; None: there is none any more.
    pub left_s: Option<f64>,
    /// The job was ended because its deadline had passed, whoever acted on it.
    #[serde(default)]
    pub timed_out: bool,
}

/// A signal that `exec` got is passed on to all members, once (`Enforcer::pass`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecSignal {
    pub job: JobId,
    /// Signal number.
    pub signal: u8,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EnforcementStatus {
    pub enabled: bool,
    /// RFC 3339: when `enforcement on|off --for D` falls back to the config's word.
    pub until: Option<String>,
    pub fuse_open: bool,
    /// Jobs ended by policy within the last minute, and how many may be.
    pub kills_last_minute: u32,
    pub max_kills_per_minute: u32,
}

/// `status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub revision: String,
    /// Hash of the probe object.
    pub object: String,
    pub host: String,
    pub kernel: String,
    pub pid: u32,
    pub started: String,
    pub synced: bool,
    /// Why it is not ready; empty when it is.
    pub not_ready: Vec<String>,
    /// Events lost since the start, by kind; kinds that lost none may be left out.
    pub lost: BTreeMap<String, u64>,
    /// Received, by kind.
    pub events: BTreeMap<String, u64>,
    pub processes: usize,
    pub zombies: usize,
    pub orphans: usize,
    pub jobs: usize,
    pub enforcement: EnforcementStatus,
    pub alerts_firing: usize,
    pub alerts_pending: usize,
    pub undelivered: u64,
    /// What is wrong in the state directory; empty when nothing is.
    #[serde(default)]
    pub storage: Vec<String>,
    /// Probes that are not attached, with the reason.
    pub probes_off: BTreeMap<String, String>,
    pub config: Option<PathBuf>,
    pub config_ok: bool,
    pub listen: Option<String>,
    pub pinned: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExtendReply {
    pub job: JobId,
    pub deadline: Option<String>,
}

/// `audit`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AuditLines {
    pub entries: Vec<audit::Entry>,
}

/// `reload`: what is in force now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reloaded {
    pub config: Option<PathBuf>,
    pub jobs: usize,
    pub receivers: usize,
    /// What is only read at start and differs from what runs.
    pub needs_restart: Vec<String>,
}

/// `notify`: what the receiver said to a test alert.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Notified {
    pub receiver: String,
    pub delivered: bool,
    /// Status line or error.
    pub answer: String,
    pub took_s: f64,
}

/// Everything that can be asked. Those with a [`Peer`] change something and are to be audited.
#[derive(Debug)]
pub enum Request {
    /// Whether the core turns: a client that waits for something else asks this.
    Ping(Reply<()>),
    Tree(TreeQuery, Reply<Tree>),
    Jobs(Reply<Jobs>),
    Extend {
        job: Target,
        by: Duration,
        peer: Peer,
        reply: Reply<ExtendReply>,
    },
    Alerts(AlertQuery, Reply<Alerts>),
    Events(EventFilter, Reply<Subscription>),
    Why(WhyQuery, Reply<super::wire::Causes>),
    /// What a target means at this moment.
    Resolve(Target, Reply<Vec<Matched>>),
    Kill {
        kill: KillRequest,
        peer: Peer,
        reply: Reply<KillReport>,
    },
    Status(Reply<Status>),
    Enforcement {
        on: bool,
        lasting: Option<Duration>,
        peer: Peer,
        reply: Reply<EnforcementStatus>,
    },
    Audit {
        since: Option<Duration>,
        job: Option<Target>,
        reply: Reply<AuditLines>,
    },
    Reload {
        peer: Peer,
        reply: Reply<Reloaded>,
    },
    Notify {
        receiver: String,
        peer: Peer,
        reply: Reply<Notified>,
    },
    ExecRegister {
        exec: ExecRequest,
        peer: Peer,
        reply: Reply<ExecRegistered>,
    },
    /// The answer comes when the end is over.
    ExecEnd {
        end: ExecEnd,
        peer: Peer,
        reply: Reply<ExecEnded>,
    },
    /// Answered with how many got it.
    ExecSignal {
        signal: ExecSignal,
        peer: Peer,
        reply: Reply<usize>,
    },
}
