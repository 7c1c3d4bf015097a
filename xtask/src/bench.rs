//! `cargo xtask bench`: builds the agent, the forest benchmark and the benchmark program of `bench/`, and runs the last.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use self::options::Options;
use crate::{cargo, needs, root};

#[path = "../../bench/src/options.rs"]
mod options;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    options: Options,
    /// Do not write docs/BENCHMARKS.md
    #[arg(long)]
    no_page: bool,
    /// Another agent's binary, not one built here; writes no page
    #[arg(long)]
    agent: Option<PathBuf>,
}

pub(crate) fn run(args: &Args) -> Result<bool> {
    let options = &args.options;
    needs::check(&needs::for_agent())?;
    if !root::is_root() {
        bail!(
            "the benchmark measures other programs as root\n  to mend it: sudo -E env PATH=\"$PATH\" cargo xtask bench"
        );
    }
    let profile = if options.short { "dev" } else { "release" };
    let agent = match &args.agent {
        Some(binary) => binary.clone(),
        None => cargo::jobwarden(profile)?,
    };
    let forest = program("forest", &["--package", "jobwarden", "--bench", "forest", "--profile", profile])?;
    // The loads are the same program in every run, whatever is measured.
    let mut bench = Command::new(program("jobwarden-bench", &["--package", "jobwarden-bench"])?);
    bench.arg("run").arg("--agent").arg(agent).arg("--forest").arg(forest);
    let no_setup = !needs::may_set_up();
    for (given, flag) in [
        (options.short, "--short"),
        (options.check, "--check"),
        (options.json, "--json"),
        (no_setup, "--no-setup"),
    ] {
        bench.args(given.then_some(flag));
    }
    if !options.only.is_empty() {
        bench.arg("--only").arg(options.only.join(","));
    }
    if !args.no_page && !options.short && options.only.is_empty() && args.agent.is_none() {
        bench.arg("--page").arg(root::dir().join("docs/BENCHMARKS.md"));
    }
    let mut child = root::spawn_for_terminal(&mut bench).context("the benchmark could not be started")?;
    Ok(child.wait()?.success())
}

fn program(name: &str, args: &[&str]) -> Result<PathBuf> {
    let built = cargo::build(&[&["build"], args].concat())?.into_iter().find(|b| b.name == name);
    Ok(built.with_context(|| format!("cargo built no program named {name}"))?.executable)
}
