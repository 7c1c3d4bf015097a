//! `jobwarden replay`.

use std::io::{ErrorKind, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use jobwarden::recording::{self, ReplayError};

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
        let speed = self.speed.map(|x| if x > 0.0 { Ok(x) } else { Err(x) }).transpose();
        let speed = speed.map_err(|x| Failure::usage(format!("--speed {x}: expected a number above 0")))?;
        let stdout = std::io::stdout();
        let mut out = std::io::BufWriter::new(stdout.lock());
        let live = speed.is_some();
        let done = recording::replay(&self.file, speed, &mut |line| {
            serde_json::to_writer(&mut out, &line)?;
            out.write_all(b"\n")?;
            if live { out.flush() } else { Ok(()) }
        });
        match done.and_then(|()| out.flush().map_err(ReplayError::Output)) {
            Ok(()) => Ok(ExitCode::SUCCESS),
            // The reader went away: `| head`.
            Err(ReplayError::Output(e)) if e.kind() == ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
            Err(e) => Err(Failure::failed("replay", e.to_string())),
        }
    }
}
