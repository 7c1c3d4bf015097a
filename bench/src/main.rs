//! jobwarden and its peers in the same run, measured in turn, printed as a table of ratios and written to
//! docs/BENCHMARKS.md. Needs root and a quiet machine; changes one sysctl and restores it. `cargo xtask bench` builds what is
//! measured and runs this program.

mod figure;
mod load;
mod measure;
mod options;
mod page;
mod row;
mod rows;
mod stand;
mod stop;
mod watch;

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::Result;
use clap::{Parser, Subcommand};

use self::options::Options;
use self::row::{FULL, Row, SHORT};

#[derive(Parser)]
#[command(name = "jobwarden-bench", about = "Measures jobwarden beside its peers")]
struct Cli {
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Measure
    Run(Args),
    /// What the benchmark starts
    Load(load::Args),
}

#[derive(clap::Args)]
struct Args {
    /// The agent's binary
    #[arg(long)]
    agent: PathBuf,
    /// The program built from `monitor/benches/forest.rs`
    #[arg(long)]
    forest: PathBuf,
    /// The page to write
    #[arg(long)]
    page: Option<PathBuf>,
    #[arg(long)]
    no_setup: bool,
    #[command(flatten)]
    options: Options,
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Action::Run(args) => run(&args),
        Action::Load(args) => load::run(&args).map(|()| true),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// `false`: with `--check`, a row has no figure.
fn run(args: &Args) -> Result<bool> {
    if !args.no_setup {
        install_peers();
    }
    let scale = if args.options.short { SHORT } else { FULL };
    stop::heed_signals();
    watch::own_mounts()?;
    let _tracefs = watch::tracefs();
    let rows = rows::all(&args.agent, &args.forest, scale, &args.options.only);
    stop::going_on()?;
    let command = if args.options.short { "cargo xtask bench --short" } else { "cargo xtask bench" };
    println!("\n{}", page::table(&rows));
    if args.options.json {
        println!("{}", page::as_json(&rows, scale, command));
    }
    if let Some(file) = &args.page {
        std::fs::write(file, page::page(&rows, scale, command))?;
        println!("written to {}", file.display());
    }
    let faults: Vec<String> = rows.iter().filter_map(Row::fault).collect();
    for fault in &faults {
        eprintln!("no figure: {fault}");
    }
    Ok(!args.options.check || faults.is_empty())
}

/// Each program that a row wants, with Debian's package of it.
const PACKAGES: [(&str, &str); 7] = [
    ("forkstat", "forkstat"),
    ("bpftrace", "bpftrace"),
    ("execsnoop", "libbpf-tools"),
    ("prometheus-process-exporter", "prometheus-process-exporter"),
    ("lsof", "lsof"),
    ("pkill", "procps"),
    ("ps", "procps"),
];

/// Where that is possible. The table names those that are missing.
fn install_peers() {
    let missing = PACKAGES.iter().filter(|(program, _)| watch::located(program).is_err());
    let mut packages: Vec<&str> = missing.map(|p| p.1).collect();
    let psutil = Command::new(watch::PYTHON).args(["-c", "import psutil"]).output();
    if !psutil.is_ok_and(|o| o.status.success()) {
        packages.push("python3-psutil");
    }
    if packages.is_empty() {
        return;
    }
    println!("installing {} ...", packages.join(", "));
    let done = Command::new("apt-get")
        .args(["-q", "install", "-y", "--no-install-recommends"])
        .args(&packages)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .output();
    if !done.is_ok_and(|o| o.status.success()) {
        eprintln!("apt-get install failed: peers that are missing are named in the table");
    }
}
