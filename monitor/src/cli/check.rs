//! `jobwarden check`.

use std::path::PathBuf;
use std::process::ExitCode;

use jobwarden::config::{self, Overrides};
use jobwarden::notify;
use jobwarden::render::escape;
use serde_json::json;

use super::output::{Context, print};
use super::{Failure, Outcome};

/// Read a config as the agent would, and say every mistake with its place
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  jobwarden check --config ./jobwarden.toml
  jobwarden check --print          # the effective config: file, environment and defaults")]
pub(crate) struct Args {
    /// [default: /etc/jobwarden/jobwarden.toml, if it is there]
    #[arg(long, value_name = "F")]
    config: Option<PathBuf>,
    /// Print the effective config
    #[arg(long)]
    print: bool,
}

impl Args {
    pub(super) fn run(self, context: &Context) -> Outcome {
        let overrides = Overrides { socket: context.given_socket(), ..Overrides::default() };
        let c = load(self.config.as_deref(), &overrides)?;
        if self.print && !context.json {
            print(&c.to_toml())?;
            return Ok(ExitCode::SUCCESS);
        }
        let path = self.config.unwrap_or_else(|| config::DEFAULT_PATH.into());
        let there = path.exists();
        // The file may be meant for another host, so this is no mistake of it.
        let here: Vec<String> = notify::check(&c).iter().map(ToString::to_string).collect();
        let ignored = config::unknown_environment(&config::environment());
        let all: Vec<&String> = here.iter().chain(&ignored).collect();
        let mut value = json!({
            "valid": true,
            "warnings": all,
            "config": there.then_some(&path),
            "jobs": c.jobs.len(),
            "receivers": c.receivers.len(),
        });
        if self.print {
            value["effective"] = c.to_toml().into();
        }
        context.show(&value, |_| {
            let what = if there { escape(&path.to_string_lossy()) } else { "no file, the defaults".into() };
            let fatal =
                here.iter().map(|w| format!("warning: {}; the agent would not start here\n", escape(w)));
            let other = ignored.iter().map(|w| format!("warning: {}\n", escape(w)));
            let warnings: String = fatal.chain(other).collect();
            format!("valid: {what}: {} job rules, {} receivers\n{warnings}", c.jobs.len(), c.receivers.len())
        })?;
        Ok(ExitCode::SUCCESS)
    }
}

/// As the agent reads it: flags over environment over the file.
pub(super) fn load(path: Option<&std::path::Path>, overrides: &Overrides) -> Result<config::Config, Failure> {
    config::load(path, &config::environment(), overrides).map_err(|e| {
        let code = if e.problems().is_empty() { "unreadable-config" } else { "invalid-config" };
        Failure::failed(code, e.to_string())
    })
}
