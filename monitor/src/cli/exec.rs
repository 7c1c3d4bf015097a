//! `jobwarden exec`: the command line. It forks, so it runs before any runtime or thread is started.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use jobwarden::config::parse_duration;
use jobwarden::exec::{self, Options};
use jobwarden::model::schema::is_job_name;
use jobwarden::model::signal;

use super::Failure;

/// jobwarden itself failed; the command was not started.
const FAILED: u8 = 125;

/// Run CMD as a job, registered before its first instruction; at the deadline, or when CMD ends, nothing of it stays
///
/// Exit status: CMD's; 124 if the deadline passed; 125 if jobwarden failed and CMD was not started; 126 if CMD cannot be run;
/// 127 if it was not found. If a signal killed CMD, exec ends itself by the same one.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Name of the job [default: the name of CMD]
    #[arg(long, value_name = "N", value_parser = name)]
    name: Option<String>,
    /// The deadline, from the start of CMD (`90s`, `1h30m`); 0 = none
    #[arg(long, value_name = "D", value_parser = duration)]
    timeout: Option<Duration>,
    /// From the stop signal to SIGKILL; 0 = SIGKILL at once
    #[arg(long, value_name = "D", value_parser = duration, default_value = "10s")]
    grace: Duration,
    /// The stop signal, by name or number
    #[arg(short, long, value_name = "SIG", value_parser = signal::parse, default_value = "TERM")]
    signal: u8,
    /// How long what CMD leaves behind may take to end by itself
    #[arg(long, value_name = "D", value_parser = duration, default_value = "0")]
    orphan_after: Duration,
    /// Leave and list what CMD leaves behind
    #[arg(long, conflicts_with = "orphan_after")]
    keep_orphans: bool,
    /// At the deadline, end as CMD did instead of with 124
    #[arg(long)]
    preserve_status: bool,
    /// Run CMD as this user (name or uid)
    #[arg(long, value_name = "U")]
    user: Option<String>,
    /// Put CMD into a cgroup (v2) of its own
    #[arg(long)]
    cgroup: bool,
    /// Write how it ended, as JSON, to this file
    #[arg(long, value_name = "F")]
    report: Option<PathBuf>,
    /// Say on stderr what is done
    #[arg(short, long)]
    verbose: bool,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "CMD")]
    command: Vec<OsString>,
}

fn duration(s: &str) -> Result<Duration, String> {
    if s == "0" { Ok(Duration::ZERO) } else { parse_duration(s) }
}

fn name(s: &str) -> Result<String, String> {
    if is_job_name(s) {
        Ok(s.into())
    } else {
        Err("expected 1 to 64 letters, digits, `_`, `.` or `-`".into())
    }
}

impl Args {
    /// Ends this process as the command did, or returns with what `main` shall return.
    pub(crate) fn run(self, socket: PathBuf, json: bool) -> ExitCode {
        let mut o = Options::new(self.command, socket);
        if let Some(name) = self.name {
            o.name = name;
        }
        o.timeout = self.timeout;
        o.grace = self.grace;
        o.signal = self.signal;
        o.orphan_after = self.orphan_after;
        o.keep_orphans = self.keep_orphans;
        o.preserve_status = self.preserve_status;
        o.user = self.user;
        o.cgroup = self.cgroup;
        o.report = self.report;
        o.verbose = self.verbose;
        // A panic has ended the job on its way here, and is one of jobwarden's own failures.
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| exec::run(&o)));
        let Ok(done) = done else { return ExitCode::from(FAILED) };
        match done {
            Ok(finish) => finish.code(),
            Err(e) => {
                let command = o.command[0].to_string_lossy().into_owned();
                // The status is exec's own; only the telling is that of every command.
                let _ = Failure::failed("not-started", format!("{command} was not started: {e}")).tell(json);
                ExitCode::from(FAILED)
            }
        }
    }
}
