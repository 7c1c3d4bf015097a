//! `jobwarden kill`.

use std::process::ExitCode;
use std::time::Duration;

use jobwarden::api::{KillRequest, Target};
use jobwarden::config::DEFAULT_GRACE;
use jobwarden::model::schema::KillReport;
use jobwarden::render;

use super::output::Context;
use super::{Outcome, values};

/// How long the agent may take from the end of the grace to its report.
const KILL: Duration = Duration::from_mins(1);

/// End a process and all who descend from it, or a whole job, so that nothing of it escapes
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Where several match TARGET, they are listed and nothing is done, unless --all is given.

Example:
  jobwarden kill --dry-run name:nightly
  jobwarden kill --grace 30s j-4110:8123456789-1
  jobwarden kill --orphans j-4110:8123456789-1     # only what was left behind")]
pub(crate) struct Args {
    /// PID, ID, JOB or name:NAME
    #[arg(value_name = "TARGET", value_parser = values::target)]
    target: Target,
    /// Sent first, by name or number [default: the job's own, else TERM]
    #[arg(short, long, value_name = "S", value_parser = values::signal)]
    signal: Option<u8>,
    /// From there to SIGKILL (`30s`); 0 = SIGKILL at once [default: 10s]
    #[arg(long, value_name = "D", value_parser = values::duration)]
    grace: Option<Duration>,
    /// Say who would be signalled, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// Only the orphans among them, and what descends from those
    #[arg(long)]
    orphans: bool,
    /// All of them, where several match
    #[arg(long)]
    all: bool,
}

impl Args {
    pub(super) fn run(self, context: &Context) -> Outcome {
        let request = KillRequest {
            target: self.target,
            signal: self.signal,
            grace_s: self.grace.map(|d| d.as_secs_f64()),
            dry_run: self.dry_run,
            orphans: self.orphans,
            all: self.all,
        };
        let time = self.grace.unwrap_or(DEFAULT_GRACE).saturating_add(KILL);
        let report: KillReport = context.client()?.post_long("/v1/kill", &request, time)?;
        context.show(&report, |style| render::kill(&report, self.dry_run, style))?;
        Ok(if report.survivors.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
