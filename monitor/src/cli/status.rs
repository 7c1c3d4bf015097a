//! `jobwarden status`.

use std::process::ExitCode;
use std::time::SystemTime;

use jobwarden::api::Status;
use jobwarden::render;

use super::Outcome;
use super::output::Context;

/// How the agent is: synced, events lost, enforcement and its fuse, alerts, what is undelivered
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  jobwarden status
  jobwarden --json status | jq .synced")]
pub(crate) struct Args {}

impl Args {
    pub(super) fn run(self, context: &Context) -> Outcome {
        let Self {} = self;
        let status: Status = context.client()?.get("/v1/status", &())?;
        context.show(&status, |style| render::status(&status, SystemTime::now(), style))?;
        Ok(ExitCode::SUCCESS)
    }
}
