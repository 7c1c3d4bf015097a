//! What an agent is started with, and why it did not start.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use crate::config::{Config, Overrides};
use crate::logging::Log;
use crate::sources::kernel;
use crate::state::StateDirError;
use crate::{api, notify, privileges, recording};

/// What the command line says, and the config that was read with it.
#[derive(Clone, Debug)]
pub struct Options {
    pub config: Config,
    pub config_path: Option<PathBuf>,
    /// For `reload`: flags and environment still override the file.
    pub overrides: Overrides,
    pub env: BTreeMap<String, String>,
    pub record: Option<PathBuf>,
    /// The probes' own aya-log lines go to the log.
    pub trace_probes: bool,
    pub log: Log,
    /// Set at start: where the TCP listener is.
    pub listening: Option<SocketAddr>,
}

/// Why the agent did not start, or stopped by itself.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error(transparent)]
    StateDir(#[from] StateDirError),
    #[error(transparent)]
    Kernel(#[from] kernel::KernelError),
    #[error(transparent)]
    Serve(#[from] api::ServeError),
    #[error(transparent)]
    Alerts(#[from] notify::AlertError),
    #[error(transparent)]
    Recording(#[from] recording::RecordingError),
    #[error("the probes' own lines cannot be shown: {0}")]
    Trace(#[source] std::io::Error),
    #[error("the ring buffer: {0}")]
    Ring(std::io::Error),
    #[error("a snapshot of the processes: {0}")]
    Snapshot(std::io::Error),
    #[error("the threads of the runtime: {0}")]
    Runtime(std::io::Error),
    #[error("the thread that writes the log: {0}")]
    Log(std::io::Error),
    #[error("a thread cannot be started: {0}")]
    Thread(std::io::Error),
    #[error("signal handlers: {0}")]
    Signals(std::io::Error),
    #[error(transparent)]
    Privileges(#[from] privileges::PrivilegeError),
    #[error("{what}: {source}")]
    Host { what: &'static str, source: std::io::Error },
}

/// The file that is read without `--config`, if it exists.
pub(super) fn default_config() -> Option<PathBuf> {
    let p = PathBuf::from(crate::config::DEFAULT_PATH);
    p.exists().then_some(p)
}
