//! `jobwarden unpin`.

use std::path::PathBuf;
use std::process::ExitCode;

use jobwarden::config;
use serde::Serialize;

use super::output::Context;
use super::{Failure, Outcome};

/// Remove all pins: the kernel forgets lineage and jobs. Refused while an agent runs
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  systemctl stop jobwarden && jobwarden unpin")]
pub(crate) struct Args {
    /// The bpf filesystem [default: the config's, else /sys/fs/bpf]
    #[arg(long, value_name = "D")]
    bpffs: Option<PathBuf>,
}

#[derive(Serialize)]
struct Removed {
    bpffs: PathBuf,
    removed: usize,
}

impl Args {
    pub(super) fn run(self, context: &Context) -> Outcome {
        let root = self.bpffs.unwrap_or_else(|| {
            config::load(None, &config::environment(), &config::Overrides::default())
                .map_or_else(|_| config::DEFAULT_BPFFS.into(), |c| c.agent.bpffs)
        });
        let removed =
            jobwarden::sources::kernel::unpin(&root).map_err(|e| Failure::failed("failed", e.to_string()))?;
        context.show(&Removed { bpffs: root, removed }, |_| format!("{removed} pins removed\n"))?;
        Ok(ExitCode::SUCCESS)
    }
}
