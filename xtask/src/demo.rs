//! `cargo xtask demo`: builds the agent and starts tests/demo/demo.py, which tells the story and cleans up.

use std::process::Command;

use anyhow::{Context, Result};

use crate::{cargo, needs, root};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// No pauses for reading, as CI runs it
    #[arg(long)]
    check: bool,
}

pub(crate) fn run(args: &Args) -> Result<bool> {
    let mut needed = needs::for_agent();
    needed.push(needs::for_demo());
    needs::check(&needed)?;
    let binary = cargo::jobwarden("dev")?;
    let mut demo = Command::new("python3");
    demo.arg(root::dir().join("tests/demo/demo.py"));
    if args.check || root::is_ci() {
        demo.arg("--check");
    }
    let mut child = root::spawn_for_terminal(demo.arg(binary)).context("python3 could not be started")?;
    Ok(child.wait()?.success())
}
