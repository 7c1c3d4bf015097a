//! The command line: what can be given, to whom it is handed, and how an end is told (text or JSON, exit status).

mod agent;
mod alerts;
mod audit;
mod check;
mod doctor;
mod enforcement;
mod events;
mod exec;
mod failure;
mod generate;
mod jobs;
mod journal;
mod kill;
mod log_format;
mod notify;
mod output;
mod reload;
mod replay;
mod status;
mod tree;
mod unpin;
mod values;
mod why;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::LazyLock;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};

use failure::Failure;
use output::{Color, Context};

/// What a command comes to: done, or a status of its own, or why not.
type Outcome = Result<ExitCode, Failure>;

fn version() -> &'static str {
    static TEXT: LazyLock<String> = LazyLock::new(|| {
        format!("{} (commit {}, probes {})", jobwarden::VERSION, jobwarden::REVISION, doctor::object_hash())
    });
    &TEXT
}

const ABOUT: &str =
    "Follows every process by who started whom; says which zombies are not reaped and why; ends whole jobs";

const EXIT: &str = "\
Exit status: 0 done; 1 failed or negative; 2 usage; 3 the agent is not reachable or does not permit it; 4 no such process, \
job or alert. `exec` has its own.

Example:
  jobwarden tree --zombies     # who is not reaped
  jobwarden why                # and why, with the command that cures it";

#[derive(Debug, Parser)]
#[command(name = "jobwarden", version = version(), about = ABOUT, after_help = EXIT, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

const GLOBAL: &str = "Global options";

#[derive(Clone, Debug, clap::Args)]
struct Global {
    /// The agent's control socket [default: the config's, else /run/jobwarden/jobwarden.sock]
    #[arg(long, global = true, help_heading = GLOBAL, value_name = "PATH", env = "JOBWARDEN_SOCKET", hide_env_values = true)]
    socket: Option<PathBuf>,
    /// Print JSON, errors too
    #[arg(long, global = true, help_heading = GLOBAL)]
    json: bool,
    /// When to use colours; `auto` also heeds NO_COLOR
    #[arg(long, global = true, help_heading = GLOBAL, value_name = "WHEN", value_enum, default_value_t = Color::Auto)]
    color: Color,
}

#[derive(Debug, Subcommand)]
enum Command {
    Agent(agent::Args),
    #[command(after_help = exec_example())]
    Exec(exec::Args),
    Tree(tree::Args),
    Jobs(jobs::Args),
    Alerts(alerts::Args),
    Events(events::Args),
    Why(why::Args),
    Kill(kill::Args),
    Status(status::Args),
    Enforcement(enforcement::Args),
    Audit(audit::Args),
    Reload(reload::Args),
    Notify(notify::Args),
    Check(check::Args),
    Doctor(doctor::Args),
    Replay(replay::Args),
    Unpin(unpin::Args),
    #[command(hide = true)]
    Generate(generate::Args),
}

const fn exec_example() -> &'static str {
    "Example:
  jobwarden exec --name nightly --timeout 1h --grace 30s -- /usr/local/bin/backup --all"
}

/// Reads the command line, runs the command and says how it ended.
pub(crate) fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(e) => return usage(&e, json_was_asked(&args)),
    };
    let context = Context::new(cli.global);
    let json = context.json;
    // `exec` forks, tells its own end and must come before any runtime or thread.
    let outcome = match cli.command {
        Command::Exec(a) => return a.run(context.socket(), json),
        Command::Agent(a) => a.run(&context),
        Command::Tree(a) => a.run(&context),
        Command::Jobs(a) => a.run(&context),
        Command::Alerts(a) => a.run(&context),
        Command::Events(a) => a.run(&context),
        Command::Why(a) => a.run(&context),
        Command::Kill(a) => a.run(&context),
        Command::Status(a) => a.run(&context),
        Command::Enforcement(a) => a.run(&context),
        Command::Audit(a) => a.run(&context),
        Command::Reload(a) => a.run(&context),
        Command::Notify(a) => a.run(&context),
        Command::Check(a) => a.run(&context),
        Command::Doctor(a) => a.run(&context),
        Command::Replay(a) => a.run(),
        Command::Unpin(a) => a.run(&context),
        Command::Generate(a) => a.run(),
    };
    outcome.unwrap_or_else(|f| f.tell(json))
}

/// Whether `--json` stands before a `--`: what stands behind it is a command's own.
fn json_was_asked(args: &[OsString]) -> bool {
    args.iter().take_while(|a| *a != "--").any(|a| a == "--json")
}

/// Help and version are no errors; anything else is exit status 2, as JSON where it was asked for.
fn usage(e: &clap::Error, json: bool) -> ExitCode {
    if !json || matches!(e.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        // A closed pipe is no reason to complain.
        let _ = e.print();
        return ExitCode::from(u8::try_from(e.exit_code()).unwrap_or(2));
    }
    let text = e.render().to_string();
    let message = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
    Failure::usage(message).hint("see `jobwarden --help`").tell(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn every_command_is_well_formed_and_has_an_example() {
        let command = Cli::command();
        command.clone().debug_assert();
        for sub in command.get_subcommands() {
            let help = sub.clone().render_long_help().to_string();
            assert!(help.contains("Example"), "{} --help has no example", sub.get_name());
            assert!(sub.get_about().is_some(), "{}", sub.get_name());
        }
    }

    #[test]
    fn pages_and_completions_tell_every_command() {
        let dir = tempfile::tempdir().unwrap();
        let (man, shells) = (dir.path().join("man"), dir.path().join("shells"));
        let args = [
            "jobwarden",
            "generate",
            "--man",
            man.to_str().unwrap(),
            "--completions",
            shells.to_str().unwrap(),
        ];
        let Command::Generate(a) = Cli::try_parse_from(args).unwrap().command else { panic!("{args:?}") };
        a.run().unwrap();
        let read = |path: PathBuf| std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path:?}: {e}"));
        let overview = read(man.join("jobwarden.1"));
        let files = ["jobwarden.bash", "_jobwarden", "jobwarden.fish"].map(|f| read(shells.join(f)));
        for sub in Cli::command().get_subcommands().filter(|s| !s.is_hide_set()) {
            let name = sub.get_name();
            let page = read(man.join(format!("jobwarden-{name}.1")));
            assert!(page.contains("Example"), "{name}");
            assert!(overview.contains(&format!("jobwarden\\-{name}(1)")), "{name} is not in jobwarden(1)");
            assert!(files.iter().all(|f| f.contains(name)), "{name} is not completed");
        }
        assert!(!man.join("jobwarden-generate.1").exists());
    }

    #[test]
    fn globals_stand_before_or_after() {
        for args in [
            &["jobwarden", "--json", "--socket", "/s", "jobs"][..],
            &["jobwarden", "jobs", "--json", "--socket", "/s"],
        ] {
            let cli = Cli::try_parse_from(args).unwrap();
            assert!(cli.global.json);
            assert_eq!(cli.global.socket, Some("/s".into()));
        }
        let args = ["jobwarden", "exec", "--", "x", "--json"].map(OsString::from);
        assert!(!json_was_asked(&args));
    }
}
