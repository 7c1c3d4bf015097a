//! `jobwarden exec`: the command line. It forks, so it runs before any runtime or thread is started.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

/// Run CMD as a job, registered before its first instruction; at the deadline, or when CMD ends, nothing of it stays
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "CMD")]
    command: Vec<OsString>,
}

impl Args {
    pub(crate) fn run(self, _socket: PathBuf) -> ExitCode {
        eprintln!(
            "jobwarden: {} was not started: this build has no exec",
            self.command[0].to_string_lossy().escape_debug()
        );
        ExitCode::from(125)
    }
}
