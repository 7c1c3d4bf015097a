//! `jobwarden why`.

use std::process::ExitCode;

use jobwarden::api::WhyQuery;
use jobwarden::api::wire::Causes;
use jobwarden::render;

use super::output::Context;
use super::{Failure, Outcome, values};

/// Why a zombie is not reaped or an orphan was left: the cause, the evidence, and the command that cures it
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  jobwarden why                    # of every firing alert
  jobwarden why 4123
  jobwarden why 7 --container 3f4e1c2d")]
pub(crate) struct Args {
    /// None: of every firing alert
    #[arg(value_name = "PID|ID|ALERT_ID", value_parser = values::question)]
    target: Option<WhyQuery>,
    /// The pid is one inside this container (its id, or the beginning of it)
    #[arg(long, value_name = "ID", requires = "target")]
    container: Option<String>,
}

impl Args {
    pub(super) fn run(self, context: &Context) -> Outcome {
        let asked = self.target.is_some();
        let query = WhyQuery { container: self.container, ..self.target.unwrap_or_default() };
        let mut found: Causes = context.client()?.get("/v1/why", &query)?;
        // One that was asked for is one CAUSE; a name may fit several jobs.
        if asked && found.causes.len() == 1 {
            let one = found.causes.remove(0);
            context.show(&one, |style| render::why(&one, style))?;
        } else if asked && found.causes.is_empty() {
            return Err(Failure::failed("failed", "the agent found no cause"));
        } else {
            context.show(&found, |style| {
                let all: Vec<String> = found.causes.iter().map(|c| render::why(c, style)).collect();
                let more = match found.more {
                    0 => String::new(),
                    n => format!("\n{n} more were not looked for; ask for one: jobwarden why ALERT_ID\n"),
                };
                if all.is_empty() && more.is_empty() {
                    "no alert is firing\n".into()
                } else {
                    all.join("\n") + &more
                }
            })?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
