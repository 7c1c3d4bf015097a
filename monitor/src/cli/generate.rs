//! `jobwarden generate`, hidden: man pages and completions from the definitions of the commands, for packages.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::CommandFactory as _;
use clap_complete::Shell;

use super::{Cli, Failure, Outcome};

/// Write man pages and shell completions
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  jobwarden generate --man /usr/local/share/man/man1 --completions /tmp/completions")]
pub(crate) struct Args {
    /// A page for jobwarden and one for each command
    #[arg(long, value_name = "D")]
    man: Option<PathBuf>,
    /// For bash, zsh and fish
    #[arg(long, value_name = "D")]
    completions: Option<PathBuf>,
}

impl Args {
    pub(super) fn run(self) -> Outcome {
        let write = || -> io::Result<()> {
            if let Some(dir) = &self.man {
                std::fs::create_dir_all(dir)?;
                // Without the hash of the probes: a page does not change with them.
                clap_mangen::generate_to(Cli::command().version(jobwarden::VERSION), dir)?;
            }
            if let Some(dir) = &self.completions {
                std::fs::create_dir_all(dir)?;
                for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
                    clap_complete::generate_to(shell, &mut Cli::command(), "jobwarden", dir)?;
                }
            }
            Ok(())
        };
        write().map_err(|e| Failure::failed("failed", e.to_string()))?;
        Ok(ExitCode::SUCCESS)
    }
}
