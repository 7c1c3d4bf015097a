//! `jobwarden check`.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use jobwarden::config::{self, Overrides};
use jobwarden::notify;
use jobwarden::render::{argv, escape};
use jobwarden::rule_check;
use jobwarden::rule_check::host::{Survey, survey};
use jobwarden::sources::proc::Proc;
use serde_json::json;

use super::output::{Context, print};
use super::{Failure, Outcome};

/// For reading all processes; one that holds up whoever reads it does not hold up this command.
const SURVEY: Duration = Duration::from_secs(10);

/// Read a config as the agent would, and say every mistake with its place
///
/// Valid rules that would end more than their job (a rule that kills and matches every process, every process of root, sshd or
/// the agent) are named as warnings. Warnings do not change the exit status.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  jobwarden check --config ./jobwarden.toml
  jobwarden check --against-host   # what each rule matches now, on this host
  jobwarden check --print          # the effective config: file, environment and defaults")]
pub(crate) struct Args {
    /// [default: /etc/jobwarden/jobwarden.toml, if it is there]
    #[arg(long, value_name = "F")]
    config: Option<PathBuf>,
    /// Print the effective config
    #[arg(long)]
    print: bool,
    /// Show what each rule matches on this host at this moment, and warn of what its jobs would contain
    #[arg(long)]
    against_host: bool,
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
        let mut other = config::unknown_environment(&config::environment());
        other.extend(rule_check::warnings(&c));
        let this = (std::process::id(), "this command");
        let host = self.against_host.then(|| survey(&c, &Proc::default(), this, SURVEY));
        other.extend(host.iter().flat_map(|s| s.warnings.iter().cloned()));
        let mut value = json!({
            "valid": true,
            "warnings": here.iter().chain(&other).collect::<Vec<_>>(),
            "config": there.then_some(&path),
            "jobs": c.jobs.len(),
            "receivers": c.receivers.len(),
        });
        if self.print {
            value["effective"] = c.to_toml().into();
        }
        if let Some(s) = &host {
            value["host"] = json!(s);
        }
        context.show(&value, |_| {
            let what = if there { escape(&path.to_string_lossy()) } else { "no file, the defaults".into() };
            let mut out =
                format!("valid: {what}: {} job rules, {} receivers\n", c.jobs.len(), c.receivers.len());
            out.extend(host.as_ref().map(matched));
            out.extend(
                here.iter().map(|w| format!("warning: {}; the agent would not start here\n", escape(w))),
            );
            out.extend(other.iter().map(|w| format!("warning: {}\n", escape(w))));
            out
        })?;
        Ok(ExitCode::SUCCESS)
    }
}

/// A line for each rule and for each of its examples, and what could not be read.
fn matched(s: &Survey) -> String {
    let mut out = String::new();
    for r in &s.rules {
        // Writing to a String cannot fail.
        let _ = writeln!(
            out,
            "rule {}: matches {} of {} processes; its jobs contain {}",
            escape(&r.name),
            r.matches,
            s.processes,
            r.members
        );
        for e in &r.examples {
            let _ = writeln!(out, "  {} {} {}", e.pid, e.comm, argv(&e.argv));
        }
        if r.matches > r.examples.len() {
            let _ = writeln!(out, "  and {} more", r.matches - r.examples.len());
        }
    }
    if s.unreadable > 0 {
        let _ = writeln!(
            out,
            "note: the executables of {} processes may not be read: `exe` was not compared there (run as root)",
            s.unreadable
        );
    }
    if s.incomplete {
        let _ = writeln!(out, "note: not all processes could be read within {} s", SURVEY.as_secs());
    }
    out
}

/// As the agent reads it: flags over environment over the file.
pub(super) fn load(path: Option<&std::path::Path>, overrides: &Overrides) -> Result<config::Config, Failure> {
    config::load(path, &config::environment(), overrides).map_err(|e| {
        let code = if e.problems().is_empty() { "unreadable-config" } else { "invalid-config" };
        Failure::failed(code, e.to_string())
    })
}
