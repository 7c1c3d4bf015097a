//! What `exec` is asked to do, and why it could not begin.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// The options of the command line, checked.
#[derive(Clone, Debug)]
pub struct Options {
    /// Never empty.
    pub command: Vec<OsString>,
    pub name: String,
    /// None = no deadline.
    pub timeout: Option<Duration>,
    pub grace: Duration,
    /// Stop signal's number.
    pub signal: u8,
    pub orphan_after: Duration,
    pub keep_orphans: bool,
    pub preserve_status: bool,
    /// Name or uid.
    pub user: Option<String>,
    pub cgroup: bool,
    pub report: Option<PathBuf>,
    pub verbose: bool,
    /// The agent's control socket.
    pub socket: PathBuf,
    /// The cgroup that was made for it.
    pub(super) cage: Option<PathBuf>,
}

impl Options {
    /// A command with the defaults of the contract.
    #[must_use]
    pub fn new(command: Vec<OsString>, socket: PathBuf) -> Self {
        let name = command
            .first()
            .map(|c| PathBuf::from(c).file_name().map(OsString::from))
            .map(Option::unwrap_or_default);
        Self {
            name: job_name(&name.unwrap_or_default().to_string_lossy()),
            command,
            timeout: None,
            grace: Duration::from_secs(10),
            signal: crate::model::signal::SIGTERM,
            orphan_after: Duration::ZERO,
            keep_orphans: false,
            preserve_status: false,
            user: None,
            cgroup: false,
            report: None,
            verbose: false,
            socket,
            cage: None,
        }
    }
}

impl Options {
    /// From the start of CMD. Zero is no deadline, as with timeout(1).
    pub(super) fn deadline(&self) -> Option<Duration> {
        self.timeout.filter(|t| !t.is_zero())
    }
}

/// What a job may be called (`[A-Za-z0-9_.-]{1,64}`), made of a program's name.
fn job_name(s: &str) -> String {
    let ok = |c: char| if c.is_ascii_alphanumeric() || "_.-".contains(c) { c } else { '_' };
    let name: String = s.chars().take(64).map(ok).collect();
    if name.is_empty() { "exec".into() } else { name }
}

/// Why the command was not started: exit status 125.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    #[error("cannot {doing}: {source}")]
    Io { doing: &'static str, source: std::io::Error },
    #[error("no such user: {0}")]
    User(String),
    #[error("an argument of the command has a NUL byte in it")]
    Nul,
    #[error("this process has {0} threads already; a process with threads must not fork")]
    Threads(usize),
    #[error("--cgroup needs a mounted cgroup v2 hierarchy")]
    NoCgroup,
    #[error("the guards cannot be read: {0}")]
    Config(#[from] crate::config::ConfigError),
    #[error("no agent holds the job ({agent}), and without one: {alone}")]
    NoWarden { agent: String, alone: Box<ExecError> },
    #[error("{0}")]
    Kernel(String),
    #[error("the watcher did not start")]
    Watcher,
}

impl ExecError {
    pub(super) fn io(doing: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { doing, source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_named_after_its_program() {
        let name = |c: &str| Options::new(vec![c.into()], PathBuf::new()).name;
        assert_eq!(name("/usr/bin/make"), "make");
        assert_eq!(name("a b\n"), "a_b_");
        assert_eq!(name("/"), "exec");
        assert_eq!(name(&"x".repeat(99)).len(), 64);
    }
}
