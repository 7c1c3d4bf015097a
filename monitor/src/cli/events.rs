//! `jobwarden events`.

use std::time::Duration;

use jobwarden::api::{Class, EventFilter, Target};
use jobwarden::model::schema::EventLine;
use jobwarden::render;

use super::output::{Context, print, print_json};
use super::{Failure, Outcome, values};

/// Forks, execs, exits, reaps and signals, one line each, live
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  jobwarden events --job name:nightly
  jobwarden events --since 5m --pid 4123")]
pub(crate) struct Args {
    /// Those before too, so far back as the agent remembers (`5m`)
    #[arg(long, value_name = "D", value_parser = values::duration)]
    since: Option<Duration>,
    /// Only of a job's members: JOB, or name:NAME
    #[arg(long, value_name = "J", value_parser = values::job)]
    job: Option<Target>,
    /// Only of the process with this pid
    #[arg(long, value_name = "P", value_parser = clap::value_parser!(u32).range(1..))]
    pid: Option<u32>,
}

impl Args {
    pub(super) fn run(self, context: &Context) -> Outcome {
        let filter =
            EventFilter { since_s: self.since.map(|d| d.as_secs_f64()), job: self.job, pid: self.pid };
        let style = context.style();
        let mut failed = None;
        context.client()?.lines("/v1/events", &filter, |line| {
            let printed = if context.json {
                print_json(String::from_utf8_lossy(line).into_owned())
            } else {
                print(&match serde_json::from_slice::<EventLine>(line) {
                    Ok(e) => render::event(&e, style),
                    Err(e) => format!("a line that this client does not understand: {e}\n"),
                })
            };
            failed = printed.err();
            failed.is_none()
        })?;
        // Only the agent's end, or ours, ends them.
        Err(failed.unwrap_or_else(|| {
            Failure::new(Class::Unavailable, "stopping", "the agent has ended the events")
        }))
    }
}
