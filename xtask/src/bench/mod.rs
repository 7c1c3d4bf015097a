//! `cargo xtask bench`: jobwarden and its peers in the same run, measured in turn, printed as a table of ratios and
//! written to docs/BENCHMARKS.md. Wants a quiet machine and root; changes one sysctl and puts it back.

mod figure;
pub(crate) mod load;
mod page;
mod rows;
mod stand;
mod watch;

use std::fs;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, bail, ensure};

use self::figure::{Figure, Goal};
use crate::{cargo, needs, root};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// A small part of everything and the dev profile: shows that each row yields a figure, not what it is
    #[arg(long)]
    short: bool,
    /// Fail if a row yields no figure, or a peer neither figure nor reason; never because of what a figure is
    #[arg(long)]
    check: bool,
    /// Print JSON too
    #[arg(long)]
    json: bool,
    /// Do not write docs/BENCHMARKS.md
    #[arg(long)]
    no_page: bool,
    /// Only these groups of rows (probes, spawn, flood, ..); writes no page
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Another agent's binary, not one built here; writes no page
    #[arg(long)]
    agent: Option<std::path::PathBuf>,
}

/// One row of the table.
struct Row {
    what: String,
    unit: &'static str,
    /// `Err`: why there is no figure.
    ours: Result<Figure>,
    goals: Vec<Goal>,
    peers: Vec<(String, Result<Figure>)>,
    /// What the same measure gives where nothing is started, if it was asked.
    noise: Option<Figure>,
}

/// How much is done.
#[derive(Clone, Copy)]
struct Scale {
    lives: u64,
    rounds: usize,
    seconds: u64,
    processes: u64,
    short: bool,
}

const FULL: Scale = Scale { lives: 200_000, rounds: 20, seconds: 60, processes: 10_000, short: false };
const SHORT: Scale = Scale { lives: 2_000, rounds: 1, seconds: 2, processes: 500, short: true };

static STOPPED: AtomicBool = AtomicBool::new(false);

extern "C" fn stop(_: libc::c_int) {
    STOPPED.store(true, Ordering::Relaxed);
}

/// From Ctrl-C on nothing more is started, so that all that was changed is put back on the way out.
fn heed_signals() {
    let handler = stop as extern "C" fn(libc::c_int);
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler only stores to an atomic.
        unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    }
}

/// Before anything is started.
fn going_on() -> Result<()> {
    ensure!(!STOPPED.load(Ordering::Relaxed), "interrupted");
    Ok(())
}

pub(crate) fn run(args: &Args) -> Result<bool> {
    needs::check(&needs::for_agent())?;
    if !root::is_root() {
        bail!(
            "the benchmark measures other programs as root\n  to mend it: sudo -E env PATH=\"$PATH\" cargo xtask bench"
        );
    }
    install_peers();
    let (scale, profile) = if args.short { (SHORT, "dev") } else { (FULL, "release") };
    let binary = match &args.agent {
        Some(b) => b.clone(),
        None => cargo::jobwarden(profile)?,
    };
    heed_signals();
    watch::own_mounts()?;
    let _tracefs = watch::tracefs();
    let rows = rows::all(&binary, scale, &args.only);
    going_on()?;
    let command = if args.short { "cargo xtask bench --short" } else { "cargo xtask bench" };
    println!("\n{}", page::table(&rows));
    if args.json {
        println!("{}", page::as_json(&rows, scale, command));
    }
    if !args.no_page && !args.short && args.only.is_empty() && args.agent.is_none() {
        fs::write(root::dir().join("docs/BENCHMARKS.md"), page::page(&rows, scale, command))?;
        println!("written to docs/BENCHMARKS.md");
    }
    let faults: Vec<String> = rows.iter().filter_map(Row::fault).collect();
    for fault in &faults {
        eprintln!("no figure: {fault}");
    }
    Ok(!args.check || faults.is_empty())
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

/// Where that is possible. Who is missing is named in the table.
fn install_peers() {
    let missing = PACKAGES.iter().filter(|(program, _)| watch::located(program).is_err());
    let mut packages: Vec<&str> = missing.map(|p| p.1).collect();
    let psutil = Command::new(rows::PYTHON).args(["-c", "import psutil"]).output();
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
