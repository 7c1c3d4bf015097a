//! `jobwarden agent`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use jobwarden::config::{self, Overrides};

use super::journal::{self, Levelled};
use super::output::Context;
use super::{Failure, Outcome, check};

/// The agent, in the foreground
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Flags go over the environment (JOBWARDEN_AGENT_LISTEN, ..), which goes over the file.

Example:
  jobwarden agent --config /etc/jobwarden/jobwarden.toml
  jobwarden --socket /tmp/j.sock agent --no-pin --state-dir /tmp/j --listen 127.0.0.1:19751")]
pub(crate) struct Args {
    /// [default: /etc/jobwarden/jobwarden.toml, if it is there]
    #[arg(long, value_name = "F")]
    config: Option<PathBuf>,
    /// Where Prometheus finds /metrics
    #[arg(long, value_name = "A")]
    listen: Option<SocketAddr>,
    /// Where alerts and jobs are kept over a restart
    #[arg(long, value_name = "D")]
    state_dir: Option<PathBuf>,
    /// The bpf filesystem for the pins
    #[arg(long, value_name = "D")]
    bpffs: Option<PathBuf>,
    /// Keep nothing in the kernel while the agent is down
    #[arg(long)]
    no_pin: bool,
    /// Record all that the agent is told, for `jobwarden replay`
    #[arg(long, value_name = "F")]
    record: Option<PathBuf>,
    /// Log the probes' own lines
    #[arg(long)]
    trace_probes: bool,
}

impl Args {
    pub(super) fn run(self, context: &Context) -> Outcome {
        let overrides = Overrides {
            socket: context.given_socket().map(whole),
            listen: self.listen,
            state_dir: self.state_dir.map(whole),
            bpffs: self.bpffs.map(whole),
            no_pin: self.no_pin,
        };
        let config = check::load(self.config.as_deref(), &overrides)?;
        log_to_stderr(&config);
        let env = config::environment();
        for warning in config::unknown_environment(&env) {
            tracing::warn!("{warning}");
        }
        let options = jobwarden::agent::Options {
            config,
            config_path: self.config,
            overrides,
            env,
            record: self.record,
            trace_probes: self.trace_probes,
            listening: None,
        };
        match jobwarden::agent::run(options) {
            Ok(()) => Ok(ExitCode::SUCCESS),
            Err(e) => Err(Failure::failed("agent", e.to_string())),
        }
    }
}

/// A path on the command line may be relative to where one stands; in the config, in effect or recorded, none is.
fn whole(path: PathBuf) -> PathBuf {
    std::path::absolute(&path).unwrap_or(path)
}

/// `[agent] log` is a `tracing` filter, checked when the config was read. In a pipe no colours.
fn log_to_stderr(config: &config::Config) {
    use std::io::IsTerminal as _;
    let filter = tracing_subscriber::EnvFilter::try_new(&config.agent.log).unwrap_or_default();
    let to = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match (config.agent.log_json, journal::reads_stderr()) {
        (true, true) => to.json().map_event_format(Levelled).init(),
        (true, false) => to.json().init(),
        (false, true) => to.without_time().map_event_format(Levelled).init(),
        (false, false) => to.init(),
    }
}
