//! File and flags to one validated [`Config`]. Nothing starts on a config that is not valid as a whole.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use regex::Regex;

use crate::contract::{AlertKind, Severity};

/// Where the config is looked for when no `--config` is given; absent is fine.
pub const DEFAULT_PATH: &str = "/etc/jobwarden/jobwarden.toml";
pub const DEFAULT_SOCKET: &str = "/run/jobwarden/jobwarden.sock";
pub const DEFAULT_STATE_DIR: &str = "/var/lib/jobwarden";
pub const DEFAULT_LISTEN: &str = "127.0.0.1:19750";
pub const DEFAULT_BPFFS: &str = "/sys/fs/bpf";

#[derive(Clone, Debug)]
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
    pub listen: std::net::SocketAddr,
    /// Needed for a `listen` address other than loopback.
    pub allow_plain: bool,
    pub pin: bool,
    pub bpffs: PathBuf,
    /// A `tracing` filter, `"info"`.
    pub log: String,
    pub log_json: bool,
    /// Static labels of every alert.
    pub labels: BTreeMap<String, String>,
    /// What is masked in argv wherever it is shown.
    pub redact: Vec<Regex>,
}

#[derive(Clone, Debug)]
pub struct Zombies {
    pub after: Duration,
}

#[derive(Clone, Debug)]
pub struct Enforcement {
    pub enabled: bool,
    pub max_job_kills_per_minute: u32,
    pub protect: Vec<Match>,
    pub protect_defaults: bool,
}

/// All given fields must match; a Match with none is refused by the reader.
#[derive(Clone, Debug, Default)]
pub struct Match {
    /// Over argv joined by one space.
    pub argv: Option<Regex>,
    pub exe: Option<Regex>,
    pub comm: Option<Regex>,
    pub user: Option<User>,
    pub cgroup: Option<Regex>,
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

#[derive(Clone, Debug)]
pub struct Receiver {
    pub name: String,
    pub kind: ReceiverKind,
    /// Empty: all.
    pub kinds: Vec<AlertKind>,
    pub min_severity: Severity,
    pub send_resolved: bool,
    pub timeout: Duration,
}

#[derive(Clone, Debug)]
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
