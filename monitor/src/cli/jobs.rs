//! `jobwarden jobs` and `jobwarden jobs extend`.

use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use jobwarden::api::wire::ExtendBody;
use jobwarden::api::{ExtendReply, Target};
use jobwarden::model::schema::Jobs;
use jobwarden::render;

use super::output::Context;
use super::{Outcome, values};

/// The jobs, their members and their deadlines
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  jobwarden jobs
  jobwarden jobs extend j-4110:8123456789-1 30m")]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Option<Sub>,
}

#[derive(Debug, clap::Subcommand)]
enum Sub {
    /// Move a job's deadline: D later than it is
    Extend {
        /// JOB, or name:NAME
        #[arg(value_parser = values::job)]
        job: Target,
        /// How much later (`30m`)
        #[arg(value_name = "D", value_parser = values::duration)]
        by: Duration,
    },
}

impl Args {
    pub(super) fn run(self, context: &Context) -> Outcome {
        let client = context.client()?;
        match self.command {
            None => {
                let jobs: Jobs = client.get("/v1/jobs", &())?;
                context.show(&jobs, |style| render::jobs(&jobs, SystemTime::now(), style))?;
            }
            Some(Sub::Extend { job, by }) => {
                let body = ExtendBody { job, by_s: by.as_secs_f64() };
                let r: ExtendReply = client.post("/v1/extend", &body)?;
                context.show(&r, |_| {
                    let until = r.deadline.as_deref().unwrap_or("none");
                    format!("{}: deadline {}\n", r.job, render::escape(until))
                })?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}
