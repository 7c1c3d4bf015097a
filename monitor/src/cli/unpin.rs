//! `jobwarden unpin`.

use std::path::PathBuf;

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

impl Args {
    pub(super) fn run(self, _context: &Context) -> Outcome {
        let _ = self.bpffs;
        Err(Failure::failed("failed", "this build has no probes"))
    }
}
