//! `cargo xtask test`: every test binary of the workspace, built as the caller and run as root, one after the other,
//! within a time limit. Counts what they say and names what they skipped.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::cargo::{self, Built};
use crate::report::Tally;
use crate::{needs, root, unpack, vm};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Also the long rounds and the VMs
    #[arg(long)]
    all: bool,
    /// With --all: leave the VMs out
    #[arg(long)]
    no_vm: bool,
    /// Only the hostile suite: damaged files, hung or malicious clients and processes, outputs that cannot be written
    #[arg(long, conflicts_with = "only")]
    attack: bool,
    /// Only test binaries whose name contains this
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// For the test binaries: a filter, or libtest's own options
    #[arg(last = true)]
    libtest: Vec<String>,
}

/// The scenarios of the hostile suite. Part of every whole run, too.
const HOSTILE: [&str; 7] =
    ["bad_input", "exec_robust", "logging", "read_rights", "replay", "sockets", "storage"];

/// For everything but the VMs.
const LIMIT: Duration = Duration::from_mins(15);
const LIMIT_ALL: Duration = Duration::from_mins(40);

pub(crate) fn run(args: &Args) -> Result<bool> {
    needs::check(&needs::for_agent())?;
    for lacking in needs::missing(&needs::for_tests()) {
        println!("missing: {lacking}: the tests that use it are skipped");
    }
    unpack::prometheus();
    // The scenarios start the agent and the helper programs: those are built first, so that none is stale.
    cargo::build(&["build", "--workspace", "--bins"])?;
    let built = cargo::build(&["test", "--no-run", "--workspace"])?;
    let named = |b: &Built, only: &String| b.name.contains(only) || b.package.contains(only);
    let wanted = |b: &&Built| {
        b.is_test
            && args.only.as_ref().is_none_or(|only| named(b, only))
            && (!args.attack || HOSTILE.contains(&b.name.as_str()))
    };
    let started = Instant::now();
    let limit = if args.all { LIMIT_ALL } else { LIMIT };
    let slow = slowness()?;
    let mut total = Tally::default();
    for test in built.iter().filter(wanted) {
        let left = limit.saturating_sub(started.elapsed());
        total.add(one(test, args, slow, left)?, &format!("{}: ", test.name));
    }
    if args.all && !args.no_vm && args.only.is_none() && !args.attack {
        if let Err(error) = vm::run_tests(&mut total) {
            total.fail(format!("vm: {error:#}"));
        }
    } else if !args.no_vm {
        total.skip("vm", "other kernels are booted with --all, or by cargo xtask vm");
    }
    total.print();
    Ok(total.failed == 0)
}

/// The caller's path, and what was unpacked for the tests behind it.
fn path() -> String {
    let caller = std::env::var("PATH").unwrap_or_default();
    format!("{caller}:/usr/sbin:/sbin:{}", unpack::bin().display())
}

/// How many times longer than written a test's deadlines are here: they are for a machine where a process's life takes a
/// millisecond, and there are some where it takes ten.
fn slowness() -> Result<u32> {
    let mut lives = Vec::new();
    for _ in 0..51 {
        let begun = Instant::now();
        Command::new("true").status().context("`true` could not be started")?;
        lives.push(begun.elapsed());
    }
    lives.sort_unstable();
    let life = lives[lives.len() / 2].as_secs_f64() * 1e3;
    let slow = life.ceil().clamp(1.0, 20.0) as u32;
    println!("a process's life takes {life:.1} ms here: JWTEST_SLOW={slow} unless it is given");
    Ok(slow)
}

/// Runs one test binary for at most `left`.
fn one(test: &Built, args: &Args, slow: u32, left: Duration) -> Result<Tally> {
    let mut tally = Tally::default();
    println!("\n== {} ({})", test.name, test.package);
    if left.is_zero() {
        tally.fail("not started: the time for all tests is used up".to_owned());
        return Ok(tally);
    }
    let mut command = command(test, args, slow, left);
    if args.all {
        command.arg("--include-ignored");
    }
    // They load the whole machine (floods, fork bombs, chains whose dead wait for PID 1 and fill the pid space): one at a time,
    // or they fail each other's forks.
    command.arg("--test-threads=1");
    let mut child = command.args(&args.libtest).spawn().context("the test could not be started")?;
    let out = child.stdout.take().context("the test has no output")?;
    for bytes in BufReader::new(out).split(b'\n') {
        let line = String::from_utf8_lossy(&bytes?).into_owned();
        tally.line(&line);
        println!("{line}");
    }
    let status = child.wait()?;
    match status.code() {
        Some(0) => {}
        Some(124 | 137) => tally.fail(format!("ended at its time limit of {} s", left.as_secs())),
        _ if tally.failed > 0 => {}
        _ => tally.fail(format!("ended with {status}")),
    }
    Ok(tally)
}

/// The test binary as cargo would run it, through `timeout` and as root, stderr in one stream with stdout.
fn command(test: &Built, args: &Args, slow: u32, left: Duration) -> Command {
    let mut env = vec![("CARGO_MANIFEST_DIR", test.package_dir.display().to_string())];
    env.push(("PATH", path()));
    // What the caller says comes after these and wins.
    env.push(("JWTEST_SLOW", slow.to_string()));
    let passed: Vec<(String, String)> = std::env::vars()
        .filter(|(name, _)| name.starts_with("JWTEST_") || ["CI", "RUST_BACKTRACE"].contains(&name.as_str()))
        .collect();
    if args.all {
        env.push(("JWTEST_SCRAPE_SECONDS", "60".to_owned()));
    }
    env.extend(passed.iter().map(|(name, value)| (name.as_str(), value.clone())));
    let mut command = root::command("timeout", env);
    // In the foreground, so that Ctrl-C reaches the test. What it left behind is its own to clean up.
    command.args(["--foreground", "--kill-after=10", &left.as_secs().max(1).to_string()]);
    command.args(["sh", "-c", "exec \"$@\" 2>&1", "sh"]);
    command.arg(&test.executable).current_dir(&test.package_dir).stdin(Stdio::null()).stdout(Stdio::piped());
    command
}
