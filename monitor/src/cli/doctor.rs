//! `jobwarden doctor`.

use super::output::Context;
use super::{Failure, Outcome};

/// What this kernel and this host offer, and what is off and why
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit status 1 if the agent cannot run here.

Example:
  jobwarden doctor")]
pub(crate) struct Args {}

/// Of the probe object in this program.
pub(super) fn object_hash() -> &'static str {
    jobwarden::kernel::object_hash()
}

impl Args {
    pub(super) fn run(self, _context: &Context) -> Outcome {
        let Self {} = self;
        Err(Failure::failed("failed", "this build has no probes"))
    }
}
