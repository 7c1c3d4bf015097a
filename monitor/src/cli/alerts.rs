//! `jobwarden alerts`.

use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use jobwarden::api::AlertQuery;
use jobwarden::model::schema::Alerts;
use jobwarden::render;

use super::output::Context;
use super::{Outcome, values};

/// What is wrong now: zombies that are not reaped, orphans, jobs over their deadline
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  jobwarden alerts
  jobwarden alerts --history --since 24h
  jobwarden alerts --undelivered")]
pub(crate) struct Args {
    /// Pending and lately resolved ones too
    #[arg(long)]
    all: bool,
    /// Past ones
    #[arg(long)]
    history: bool,
    /// Of the past, only so far back (`24h`)
    #[arg(long, value_name = "D", value_parser = values::duration, requires = "history")]
    since: Option<Duration>,
    /// Those that some receiver has not got yet
    #[arg(long)]
    undelivered: bool,
}

impl Args {
    pub(super) fn run(self, context: &Context) -> Outcome {
        let query = AlertQuery {
            all: self.all,
            history: self.history,
            since_s: self.since.map(|d| d.as_secs_f64()),
            undelivered: self.undelivered,
            ..AlertQuery::default()
        };
        let alerts: Alerts = context.client()?.get("/v1/alerts", &query)?;
        let none = match (self.history, self.undelivered, self.all) {
            (true, ..) => "no past alerts",
            (_, true, _) => "nothing is waiting to be delivered",
            (_, _, true) => "no alerts",
            _ => "no alert is firing",
        };
        context.show(&alerts, |style| render::alerts(&alerts, none, SystemTime::now(), style))?;
        Ok(ExitCode::SUCCESS)
    }
}
