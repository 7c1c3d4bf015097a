//! `cargo xtask bench`: builds the agent, the forest benchmark and the benchmark program of `bench/`, and runs the last.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

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
    agent: Option<PathBuf>,
}

pub(crate) fn run(args: &Args) -> Result<bool> {
    needs::check(&needs::for_agent())?;
    if !root::is_root() {
        bail!(
            "the benchmark measures other programs as root\n  to mend it: sudo -E env PATH=\"$PATH\" cargo xtask bench"
        );
    }
    let profile = if args.short { "dev" } else { "release" };
    let agent = match &args.agent {
        Some(binary) => binary.clone(),
        None => cargo::jobwarden(profile)?,
    };
    let forest = program("forest", &["--package", "jobwarden", "--bench", "forest", "--profile", profile])?;
    // The loads are the same program in every run, whatever is measured.
    let mut bench = Command::new(program("jobwarden-bench", &["--package", "jobwarden-bench"])?);
    bench.arg("run").arg("--agent").arg(agent).arg("--forest").arg(forest);
    let no_setup = !needs::may_set_up();
    for (given, flag) in
        [(args.short, "--short"), (args.check, "--check"), (args.json, "--json"), (no_setup, "--no-setup")]
    {
        bench.args(given.then_some(flag));
    }
    if !args.only.is_empty() {
        bench.arg("--only").arg(args.only.join(","));
    }
    if !args.no_page && !args.short && args.only.is_empty() && args.agent.is_none() {
        bench.arg("--page").arg(root::dir().join("docs/BENCHMARKS.md"));
    }
    let mut child = root::spawn_for_terminal(&mut bench).context("the benchmark could not be started")?;
    Ok(child.wait()?.success())
}

fn program(name: &str, args: &[&str]) -> Result<PathBuf> {
    let built = cargo::build(&[&["build"], args].concat())?.into_iter().find(|b| b.name == name);
    Ok(built.with_context(|| format!("cargo built no program named {name}"))?.executable)
}
