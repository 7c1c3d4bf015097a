//! `jobwarden audit`.

use std::process::ExitCode;
use std::time::Duration;

use jobwarden::api::wire::AuditQuery;
use jobwarden::api::{AuditLines, Target};
use jobwarden::render;

use super::output::Context;
use super::{Outcome, values};

/// Every signal that was sent, to whom, by whose order, and what came of it
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  jobwarden audit --since 1h
  jobwarden audit name:nightly")]
pub(crate) struct Args {
    /// So far back (`1h`)
    #[arg(long, value_name = "D", value_parser = values::duration)]
    since: Option<Duration>,
    /// Only about this job: JOB, or name:NAME
    #[arg(value_name = "JOB", value_parser = values::job)]
    job: Option<Target>,
}

impl Args {
    pub(super) fn run(self, context: &Context) -> Outcome {
        let query = AuditQuery { since_s: self.since.map(|d| d.as_secs_f64()), job: self.job };
        let lines: AuditLines = context.client()?.get("/v1/audit", &query)?;
        context.show(&lines, |style| render::audit(&lines.entries, style))?;
        Ok(ExitCode::SUCCESS)
    }
}
