//! `jobwarden replay`.

use std::collections::HashMap;
use std::io::{BufWriter, ErrorKind, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use jobwarden::config::user_name;
use jobwarden::recording::{self, Line, ReplayError};
use jobwarden::render::{self, Style, TreeView};

use super::output::Context;
use super::{Failure, Outcome};

/// Run a recording (`agent --record`) through the forest and the policy again, and show what they made of it
#[derive(Debug, clap::Args)]
#[command(after_help = "\
With --json a line each: the events, the changes of alerts, and last the jobs and the tree.

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
    pub(super) fn run(self, context: &Context) -> Outcome {
        let style = context.style();
        let mut out = BufWriter::new(std::io::stdout().lock());
        let live = self.speed.is_some();
        let done = recording::replay(&self.file, self.speed, &mut |line| {
            if context.json {
                serde_json::to_writer(&mut out, &line)?;
                out.write_all(b"\n")?;
            } else {
                out.write_all(text(&line, style).as_bytes())?;
            }
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

fn text(line: &Line, style: Style) -> String {
    match line {
        Line::Event(e) => render::event(e, style),
        Line::Alert { alert, .. } => {
            let state = jobwarden::metrics::alert_state_label(alert.state);
            let summary = render::escape(&alert.summary);
            format!("  alert {} {} {state}: {summary}\n", alert.id, alert.kind)
        }
        Line::End { truncated, events, jobs, tree, .. } => {
            let broken = if *truncated { "; the recording breaks off here" } else { "" };
            let names: HashMap<_, _> = jobs.iter().map(|j| (j.id, j.name.clone())).collect();
            let causes = HashMap::new();
            let view =
                TreeView { tree, jobs: &names, users: &user_name, causes: &causes, kernel_threads: false };
            let count = jobs.len();
            format!("\n{}\n{events} events, {count} jobs{broken}\n", render::tree(&view, style))
        }
    }
}
