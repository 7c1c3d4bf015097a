//! File, environment and flags to one validated [`Config`]. Nothing starts on a config that is not valid as a whole.
//!
//! `read` walks the file, `value` reads single values, `section` keeps the places for the messages, `print` writes the
//! effective config back. Nothing here opens a secret or a socket; the only lookups are those of users and groups.

mod error;
mod names;
mod pattern;
mod print;
mod read;
mod section;
mod value;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use regex::Regex;

pub use self::error::{ConfigError, Place, Problem};
pub use self::names::{group_id, user_id, user_name};
pub use self::pattern::Pattern;
pub use self::read::{environment, load, parse, parse_recorded, unknown_environment};
pub use self::value::{duration_text, parse_duration};
use crate::model::schema::{AlertKind, Severity};

/// Where the config is looked for when no `--config` is given; absent is fine.
pub const DEFAULT_PATH: &str = "/etc/jobwarden/jobwarden.toml";
pub const DEFAULT_SOCKET: &str = "/run/jobwarden/jobwarden.sock";
pub const DEFAULT_STATE_DIR: &str = "/var/lib/jobwarden";
pub const DEFAULT_LISTEN: &str = "127.0.0.1:19750";
pub const DEFAULT_PORT: u16 = 19750;
pub const DEFAULT_BPFFS: &str = "/sys/fs/bpf";

/// Of the ring between the probes and the agent.
pub const DEFAULT_RING_BYTES: u32 = 4 << 20;

pub const DEFAULT_AFTER: Duration = Duration::from_secs(30);
pub const DEFAULT_GRACE: Duration = Duration::from_secs(10);
pub const DEFAULT_RECEIVER_TIMEOUT: Duration = Duration::from_secs(10);
pub const PAGERDUTY_URL: &str = "https://events.pagerduty.com/v2/enqueue";

/// What the command line says; each overrides the environment, which overrides the file.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    pub socket: Option<PathBuf>,
    pub listen: Option<SocketAddr>,
    pub state_dir: Option<PathBuf>,
    pub bpffs: Option<PathBuf>,
    /// `--no-pin`.
    pub no_pin: bool,
}

#[derive(Clone, Debug, Default)]
pub struct Config {
    pub agent: Agent,
    pub zombies: Zombies,
    pub enforcement: Enforcement,
    /// In file order: the first match wins.
    pub jobs: Vec<Rule>,
    pub receivers: Vec<Receiver>,
}

#[derive(Clone, Debug)]
pub struct Agent {
    pub socket: PathBuf,
    /// Empty: root only.
    pub socket_group: String,
    pub state_dir: PathBuf,
    pub listen: SocketAddr,
    /// Needed for a `listen` address other than loopback.
    pub allow_plain: bool,
    pub pin: bool,
    pub bpffs: PathBuf,
    /// A power of two, at least a page. What does not fit is lost, counted and mended.
    pub ring_bytes: u32,
    /// Of the kernel's lineage map; 0: as many processes as there can be, up to 65,536.
    pub lineage_entries: u32,
    /// A `tracing` filter, `"info"`.
    pub log: String,
    pub log_json: bool,
    /// Static labels of every alert.
    pub labels: BTreeMap<String, String>,
    /// What is masked in argv wherever it is shown.
    pub redact: Vec<Regex>,
}

impl Default for Agent {
    fn default() -> Self {
        Self {
            socket: DEFAULT_SOCKET.into(),
            socket_group: String::new(),
            state_dir: DEFAULT_STATE_DIR.into(),
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, DEFAULT_PORT)),
            allow_plain: false,
            pin: true,
            bpffs: DEFAULT_BPFFS.into(),
            ring_bytes: DEFAULT_RING_BYTES,
            lineage_entries: 0,
            log: "info".into(),
            log_json: false,
            labels: BTreeMap::new(),
            redact: Vec::new(),
        }
    }
}

#[derive(Clone, Debug)]
pub struct Zombies {
    pub after: Duration,
}

impl Default for Zombies {
    fn default() -> Self {
        Self { after: DEFAULT_AFTER }
    }
}

#[derive(Clone, Debug)]
pub struct Enforcement {
    pub enabled: bool,
    pub max_job_kills_per_minute: u32,
    pub protect: Vec<Match>,
    pub protect_defaults: bool,
}

impl Default for Enforcement {
    fn default() -> Self {
        Self { enabled: false, max_job_kills_per_minute: 10, protect: Vec::new(), protect_defaults: true }
    }
}

impl Enforcement {
    /// `protect`, and the defaults unless they are switched off: what is never signalled.
    #[must_use]
    pub fn protected(&self) -> Vec<Match> {
        let defaults = self.protect_defaults.then(protect_defaults).unwrap_or_default();
        self.protect.iter().cloned().chain(defaults).collect()
    }
}

/// The contract's `protect_defaults`: by the path of the executable, run by uid 0.
///
/// A package upgrade unlinks the running executable, and the kernel then appends ` (deleted)` to its path (proc(5)).
#[must_use]
pub fn protect_defaults() -> Vec<Match> {
    const NAMES: [&str; 9] = [
        "systemd[^/]*",
        "dbus-daemon",
        "sshd",
        "containerd",
        "containerd-shim[^/]*",
        "dockerd",
        "crio",
        "conmon",
        "kubelet",
    ];
    NAMES
        .iter()
        .filter_map(|n| Pattern::new(&format!(r"^/(?:.*/)?{n}(?: \(deleted\))?$")).ok())
        .map(|exe| Match {
            exe: Some(exe),
            user: Some(User { given: "0".into(), uid: 0 }),
            ..Match::default()
        })
        .collect()
}

/// All given fields must match; a Match with none is refused by the reader.
#[derive(Clone, Debug, Default)]
pub struct Match {
    /// Over argv joined by one space.
    pub argv: Option<Pattern>,
    pub exe: Option<Pattern>,
    pub comm: Option<Pattern>,
    pub user: Option<User>,
    pub cgroup: Option<Pattern>,
    /// Container id prefix, or name.
    pub container: Option<String>,
    /// The lineage parent.
    pub parent: Option<Box<Match>>,
}

/// A user, resolved when the config is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    pub given: String,
    pub uid: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Alert,
    Kill,
}

/// One `[[job]]`.
#[derive(Clone, Debug)]
pub struct Rule {
    pub name: String,
    pub matches: Match,
    pub timeout: Option<Duration>,
    /// None: not set by the rule, so an outer job or `[zombies].after` decides; the default of 30 s equals that of
    /// `[zombies]`.
    pub zombie_after: Option<Duration>,
    pub orphan_after: Duration,
    pub on_timeout: Action,
    pub on_orphan: Action,
    pub kill_daemons: bool,
    pub enforce_existing: bool,
    /// Signal number.
    pub stop_signal: u8,
    pub grace: Duration,
    pub severity: Option<Severity>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receiver {
    pub name: String,
    pub kind: ReceiverKind,
    /// Empty: all.
    pub kinds: Vec<AlertKind>,
    pub min_severity: Severity,
    pub send_resolved: bool,
    pub timeout: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReceiverKind {
    Alertmanager {
        urls: Vec<String>,
        bearer_token_file: Option<PathBuf>,
        ca_file: Option<PathBuf>,
    },
    Pagerduty {
        url: String,
        routing_key_file: PathBuf,
        ca_file: Option<PathBuf>,
    },
    Webhook {
        url: String,
        secret_file: Option<PathBuf>,
        bearer_token_file: Option<PathBuf>,
        ca_file: Option<PathBuf>,
    },
    Exec {
        command: Vec<String>,
    },
}

impl ReceiverKind {
    /// As `type` has it.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Alertmanager { .. } => "alertmanager",
            Self::Pagerduty { .. } => "pagerduty",
            Self::Webhook { .. } => "webhook",
            Self::Exec { .. } => "exec",
        }
    }
}
