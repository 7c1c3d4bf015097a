//! `jobwarden notify`.

use std::process::ExitCode;
use std::time::Duration;

use jobwarden::api::Notified;
use jobwarden::api::wire::NotifyBody;
use jobwarden::render::{age, escape};

use super::Outcome;
use super::output::Context;

/// Send a test alert to one receiver, and say what came back
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  jobwarden notify pager")]
pub(crate) struct Args {
    /// Its name in the config
    receiver: String,
}

/// More than any receiver's own timeout.
const RECEIVER: Duration = Duration::from_mins(10);

impl Args {
    pub(super) fn run(self, context: &Context) -> Outcome {
        let n: Notified =
            context.client()?.post_long("/v1/notify", &NotifyBody { receiver: self.receiver }, RECEIVER)?;
        context.show(&n, |_| {
            let word = if n.delivered { "delivered" } else { "NOT delivered" };
            format!("{}: {word} in {}: {}\n", escape(&n.receiver), age(n.took_s), escape(&n.answer))
        })?;
        Ok(if n.delivered { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
