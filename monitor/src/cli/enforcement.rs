//! `jobwarden enforcement on|off`.

use std::process::ExitCode;
use std::time::Duration;

use clap::ValueEnum;
use jobwarden::api::EnforcementStatus;
use jobwarden::api::wire::EnforcementBody;
use jobwarden::render;

use super::output::Context;
use super::{Outcome, values};

/// Switch kills that policy decides on or off; `on` closes the fuse again
#[derive(Debug, clap::Args)]
#[command(after_help = "\
`kill` and `exec` act either way.

Example:
  jobwarden enforcement off --for 2h     # maintenance
  jobwarden enforcement on")]
pub(crate) struct Args {
    #[arg(value_enum)]
    switch: Switch,
    /// For so long, then as the config says (`2h`)
    #[arg(long = "for", value_name = "D", value_parser = values::duration)]
    lasting: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

impl Args {
    pub(super) fn run(self, context: &Context) -> Outcome {
        let body =
            EnforcementBody { on: self.switch == Switch::On, for_s: self.lasting.map(|d| d.as_secs_f64()) };
        let now: EnforcementStatus = context.client()?.post("/v1/enforcement", &body)?;
        context.show(&now, |style| render::enforcement(&now, style))?;
        Ok(ExitCode::SUCCESS)
    }
}
