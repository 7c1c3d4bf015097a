//! `jobwarden replay`.

use std::io::{BufWriter, ErrorKind, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use jobwarden::model::outside::escape_json;
use jobwarden::output::error_line;
use jobwarden::recording::{self, Line, ReplayError};

use super::{Failure, Outcome};

/// Run a recording (`agent --record`) through the forest and the policy again, and show what they made of it
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Prints JSON, a line each: the events, the changes of alerts, and last the jobs and the tree.

Example:
  jobwarden replay incident.rec --speed 10")]
pub(crate) struct Args {
    /// The recording
    #[arg(value_name = "F")]
    file: PathBuf,
    /// Times as fast as it happened; without it, as fast as it goes
    #[arg(long, value_name = "X", value_parser = speed)]
    speed: Option<f64>,
}

fn speed(s: &str) -> Result<f64, String> {
    let x = s.parse().ok().filter(|x: &f64| x.is_finite() && *x > 0.0);
    x.ok_or_else(|| format!("{s:?}: expected a number above 0"))
}

impl Args {
    pub(super) fn run(self) -> Outcome {
        let mut out = BufWriter::new(std::io::stdout().lock());
        let live = self.speed.is_some();
        let mut broken = false;
        let done = recording::replay(&self.file, self.speed, &mut |line| {
            broken |= matches!(line, Line::End { truncated: true, .. });
            writeln!(out, "{}", escape_json(&serde_json::to_string(&line)?))?;
            if live { out.flush() } else { Ok(()) }
        });
        match done.and_then(|()| out.flush().map_err(ReplayError::Output)) {
            Ok(()) => {
                if broken {
                    error_line(format_args!("{}: the recording breaks off here", self.file.display()));
                }
                Ok(ExitCode::SUCCESS)
            }
            // The reader went away: `| head`.
            Err(ReplayError::Output(e)) if e.kind() == ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
            Err(e) => Err(Failure::failed("replay", e.to_string())),
        }
    }
}
