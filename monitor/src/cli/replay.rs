//! `jobwarden replay`.

use std::path::PathBuf;

use super::output::Context;
use super::{Failure, Outcome};

/// Run a recording (`agent --record`) through the forest and the policy again, and show what they made of it
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  jobwarden replay incident.rec --speed 10")]
pub(crate) struct Args {
    /// The recording
    #[arg(value_name = "F")]
    file: PathBuf,
    /// Times as fast as it happened; without it, as fast as it goes
    #[arg(long, value_name = "X")]
    speed: Option<f64>,
}

impl Args {
    pub(super) fn run(self, _context: &Context) -> Outcome {
        let _ = self.speed;
        Err(Failure::failed("failed", format!("{}: this build has no policy", self.file.display())))
    }
}
