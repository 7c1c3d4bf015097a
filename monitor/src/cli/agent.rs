//! `jobwarden agent`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use jobwarden::config::{self, Overrides};
use jobwarden::logging::Log;

use super::journal;
use super::log_format::{escaped_fields, escaped_json, levelled};
use super::output::Context;
use super::{Failure, Outcome, check};

/// How long the last lines of the log may take at the end.
const FLUSH: Duration = Duration::from_secs(1);
/// What a Rust program that panicked ends with.
const PANICKED: i32 = 101;

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
        let log = Log::default();
        log_to_stderr(&config, &log);
        log_panics(log.clone());
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
            log: log.clone(),
            listening: None,
        };
        let done = jobwarden::agent::run(options);
        let flushed = log.flush(FLUSH);
        match done {
            Ok(()) => Ok(ExitCode::SUCCESS),
            // A stderr that takes no lines would hold this up for ever.
            Err(_) if !flushed => Ok(ExitCode::FAILURE),
            Err(e) => Err(Failure::failed("agent", e.to_string())),
        }
    }
}

/// A path on the command line may be relative to where one stands; in the config, in effect or recorded, none is.
fn whole(path: PathBuf) -> PathBuf {
    std::path::absolute(&path).unwrap_or(path)
}

/// `[agent] log` is a `tracing` filter, checked when the config was read. In a pipe no colours.
fn log_to_stderr(config: &config::Config, log: &Log) {
    use std::io::IsTerminal as _;
    let filter = tracing_subscriber::EnvFilter::try_new(&config.agent.log).unwrap_or_default();
    let to = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(log.clone())
        .log_internal_errors(false)
        .with_ansi(std::io::stderr().is_terminal());
    match (config.agent.log_json, journal::reads_stderr()) {
        (true, true) => to.json().map_event_format(|json| levelled(escaped_json(json))).init(),
        (true, false) => to.json().map_event_format(escaped_json).init(),
        (false, true) => to.fmt_fields(escaped_fields()).without_time().map_event_format(levelled).init(),
        (false, false) => to.fmt_fields(escaped_fields()).init(),
    }
}

/// A panic is a line of the log: the standard hook writes to stderr itself and waits for it. One of the core ends the agent at
/// once, as SIGKILL would; unwinding would wait for threads that may be blocked for ever. One of another thread ends that
/// thread's task.
fn log_panics(log: Log) {
    let core = std::thread::current().id();
    std::panic::set_hook(Box::new(move |panic| {
        let thread = std::thread::current();
        let location = panic.location().map(tracing::field::display);
        let what = panic.payload_as_str().unwrap_or("no message");
        tracing::error!(thread = thread.name(), location, "panic: {what}");
        if thread.id() == core {
            // Written or not: the agent ends.
            let _ = log.flush(FLUSH);
            std::process::exit(PANICKED);
        }
    }));
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::time::Instant;

    use super::*;

    const CHILD: &str = "JOBWARDEN_TEST_PANIC";

    /// In a process of its own, run by the test below: a task panics, then the core, while another thread never ends.
    #[test]
    fn panics_in_a_child() {
        if std::env::var_os(CHILD).is_none() {
            return;
        }
        let log = Log::default();
        log_to_stderr(&config::Config::default(), &log);
        log_panics(log.clone());
        log.start().unwrap();
        std::thread::scope(|s| {
            s.spawn(|| std::thread::sleep(Duration::from_mins(10)));
            let task =
                std::thread::Builder::new().name("task".into()).spawn_scoped(s, || panic!("of a task"));
            assert!(task.unwrap().join().is_err());
            panic!("of the core");
        });
    }

    #[test]
    fn a_panic_is_logged_and_one_of_the_core_ends_the_agent() {
        let (blocked, full) = std::io::pipe().unwrap();
        rustix::pipe::fcntl_setpipe_size(&full, 4096).unwrap();
        std::io::Write::write_all(&mut &full, &[b'\n'; 4096]).unwrap();
        let text = tempfile::NamedTempFile::new().unwrap();
        for stderr in [Stdio::from(text.reopen().unwrap()), Stdio::from(full)] {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "cli::agent::tests::panics_in_a_child", "--nocapture", "--test-threads=1"])
                .env(CHILD, "1")
                .stdout(Stdio::null())
                .stderr(stderr)
                .spawn()
                .unwrap();
            let until = Instant::now() + Duration::from_secs(30);
            let status = loop {
                if let Some(status) = child.try_wait().unwrap() {
                    break Some(status);
                }
                if Instant::now() > until {
                    child.kill().unwrap();
                    child.wait().unwrap();
                    break None;
                }
                std::thread::sleep(Duration::from_millis(10));
            };
            assert_eq!(status.and_then(|s| s.code()), Some(PANICKED));
        }
        drop(blocked);
        let said = std::fs::read_to_string(text.path()).unwrap();
        let lines: Vec<&str> = said.lines().filter(|l| l.contains("panic: ")).collect();
        assert_eq!(lines.len(), 2, "{said}");
        assert!(lines[0].contains("of a task") && lines[0].contains("thread=\"task\""), "{said}");
        assert!(lines[1].contains("of the core"), "{said}");
    }
}
