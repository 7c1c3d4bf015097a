//! `jobwarden reload`.

use std::fmt::Write as _;
use std::process::ExitCode;

use jobwarden::api::Reloaded;
use jobwarden::render::escape;

use super::Outcome;
use super::output::Context;

/// Have the agent read its config again; one with a mistake in it is refused, and the old one stays in force
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  jobwarden check && jobwarden reload")]
pub(crate) struct Args {}

impl Args {
    pub(super) fn run(self, context: &Context) -> Outcome {
        let Self {} = self;
        let r: Reloaded = context.client()?.post("/v1/reload", &())?;
        context.show(&r, |_| {
            let file = r.config.as_ref().map_or_else(|| "no file".into(), |p| escape(&p.to_string_lossy()));
            let mut out = format!("in force: {file}, {} job rules, {} receivers\n", r.jobs, r.receivers);
            for key in &r.needs_restart {
                // Writing to a String cannot fail.
                let _ = writeln!(out, "{} changes only with a restart", escape(key));
            }
            out
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
