//! Everything that changes the engine: records of the ring, snapshots, observations, commands, the time. What stands in a
//! recording is an [`Input`], so a replay makes the same calls.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::record::{EnforcementState, JobPolicy, JobRecord};
use crate::config::Config;
use crate::engine::forest::{Facts, Seen, Snapshot};
use crate::model::event::Event;
use crate::model::key::Key;
use crate::model::kill::Reason;
use crate::model::schema::{Alert, AlertKind, Cause, JobId, KillReport};

/// One input of [`Engine::handle`](super::Engine::handle). What is large is borrowed.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(clippy::large_enum_variant, reason = "one at a time, by reference; the hot ones are small")]
pub enum Input<'a> {
    /// A record of the ring, decoded, and its bytes as the kernel wrote them (a recording keeps the bytes). May come twice; a late one
    /// never touches a successor of its pid.
    #[serde(skip)]
    Record { event: &'a Event<'a>, bytes: &'a [u8] },
    /// From here on reaped keys leave tombstones, until `Snapshot`. `t0`: boot time before the first row is read.
    SnapshotStarted { t0: u64 },
    /// A snapshot, merged by key. May come without `SnapshotStarted` when no record was handled meanwhile.
    Snapshot(Cow<'a, Snapshot>),
    /// First synced: rules are tried on what already runs, restored alerts are held or resolved, and the grace of restored jobs
    /// past their deadline begins. Later ones do nothing.
    Ready,
    /// The answer to `Effect::Look`, `ReadFacts` or `ReadCgroup`, or what a query has read.
    Observation(Cow<'a, Observation>),
    /// Time passes. Due at [`Engine::next_wake`](super::Engine::next_wake), or more often.
    Tick,
    /// Wall clock minus boot clock, ns.
    Clock { boot_to_wall_ns: i64 },
    /// The saved setting of the operator and the fuse. Before the first snapshot, like the next two.
    RestoreEnforcement(Cow<'a, EnforcementState>),
    /// Saved jobs of this boot. Records of another boot must not be given.
    RestoreJobs(Cow<'a, [JobRecord]>),
    /// Alerts that were firing. Of this boot: they stay firing until `Ready` decides. Of another boot: they resolve at once.
    RestoreAlerts { alerts: Cow<'a, [Alert]>, this_boot: bool },
    /// A new config. Jobs and alerts stay; jobs of a rule that is still there take its new settings; running processes are
    /// matched against the new rules.
    Reload(#[serde(with = "as_toml")] Cow<'a, Config>),
    /// A job of `jobwarden exec`. If a job has this root already (the client retried): the same record again.
    RegisterJob(Cow<'a, ExecJob>),
    /// `jobs extend`: the deadline moves by `by`, from now if it has passed.
    ExtendJob { job: JobId, by: Duration },
    /// `exec --keep-orphans` is over: neither the death of the supervisor nor policy ends the job any more.
    ReleaseJob { job: JobId },
    /// Reserves this many job numbers in a row.
    ReserveNumbers { count: u32 },
    /// A kill of this job begins (`kill` or `exec`).
    KillStarted { job: JobId, reason: Reason },
    /// A kill is over. `Err`: it could not be carried out, and why. `whole`: it was about the whole job.
    KillFinished {
        job: JobId,
        reason: Reason,
        whole: bool,
        report: Result<Cow<'a, KillReport>, Cow<'a, str>>,
    },
    /// The same for a process and its descendants outside of jobs.
    ProcessKillFinished { root: Key, report: Result<Cow<'a, KillReport>, Cow<'a, str>> },
    /// `enforcement on|off [--for D]`. `on` closes the fuse.
    Enforcement { on: bool, lasts: Option<Duration> },
    /// The kernel lost records.
    EventsLost { count: u64 },
    /// `storage-failed` or `capacity` as the agent finds it; None: the condition is over.
    Condition { kind: AlertKind, problem: Option<Cow<'a, str>> },
    /// The answer to `Effect::CountMembers`. `alive` also when the kernel could not be asked; then a snapshot follows.
    JobCounted { number: u64, alive: bool },
    /// The cause of a firing alert.
    Cause { alert: Cow<'a, str>, cause: Cow<'a, Cause> },
}

/// A config in a recording is TOML, as `check --print` writes it.
mod as_toml {
    use std::borrow::Cow;

    use serde::de::Error as _;
    use serde::{Deserialize as _, Deserializer, Serializer};

    use crate::config::{self, Config};

    pub(super) fn serialize<S: Serializer>(c: &Config, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&c.to_toml())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Cow<'static, Config>, D::Error> {
        let text = String::deserialize(d)?;
        config::parse_recorded(&text).map(Cow::Owned).map_err(D::Error::custom)
    }
}

/// What is fixed for the agent's life.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Settings {
    /// The host's name: label `instance`, and `host` in `tree`.
    pub host: String,
    pub machine_id: String,
    pub boot_id: String,
    /// The agent itself: it and its ancestors are never enforced upon.
    pub agent: Key,
    /// Inode of the host's pid namespace, if known: it is shown for those whose facts say nothing else.
    pub pid_ns: Option<u64>,
    /// Names of users, for the label `user`; a uid that is not in it is shown as a number.
    #[serde(default)]
    pub users: BTreeMap<u32, String>,
    /// Wall clock minus boot clock, in ns. May be moved later with `set_clock`.
    pub boot_to_wall_ns: i64,
    pub limits: Limits,
}

/// Bounds of what the engine keeps.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Limits {
    /// Processes, dead ancestors included. More are not entered; that is counted and raises `capacity`.
    pub processes: usize,
    /// Jobs, done ones included.
    pub jobs: usize,
    /// Alerts, pending and firing.
    pub alerts: usize,
    /// Signals remembered for `why`.
    pub signals: usize,
    /// Reaped keys remembered while a snapshot is under way.
    pub tombstones: usize,
}

impl Limits {
    /// The lower of each: a recording cannot ask for more than an agent has.
    #[must_use]
    pub fn at_most(&self, o: &Self) -> Self {
        Self {
            processes: self.processes.min(o.processes),
            jobs: self.jobs.min(o.jobs),
            alerts: self.alerts.min(o.alerts),
            signals: self.signals.min(o.signals),
            tombstones: self.tombstones.min(o.tombstones),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self { processes: 1 << 22, jobs: 1 << 16, alerts: 1 << 14, signals: 1 << 13, tombstones: 1 << 18 }
    }
}

/// The answer to an effect, or what a view has read meanwhile.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Observation {
    /// `at`: boot time (ns) just before /proc was read.
    Look { key: Key, at: u64, seen: Seen },
    /// None: it is gone, or cannot be read.
    Facts { key: Key, facts: Option<Facts> },
    /// Its pid namespace and its pid there, which stay what they are. Read by views.
    Inside { key: Key, pid_ns: u64, ns_pid: u32 },
    /// The answer to `Effect::ReadCgroup`, or what a view has read (then `id` is 0). `by_id`: whoever is in the
    /// cgroup of this id has this path and no other, so it need not be read again.
    Cgroup { key: Key, id: u64, cgroup: Option<String>, by_id: bool },
}

/// A job of `jobwarden exec`, before its root's first instruction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecJob {
    pub root: Key,
    pub name: String,
    /// The `exec` process; None: nobody supervises it.
    pub supervisor: Option<Key>,
    /// The number under which `exec` has already entered it into the kernel; None: the engine gives one, and asks for
    /// the labelling.
    pub number: Option<u64>,
    pub policy: JobPolicy,
}
