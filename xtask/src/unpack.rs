//! Debian's packages unpacked under target/tools, for programs whose packages would start a daemon.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Result, bail};

use crate::{needs, root};

fn folder() -> PathBuf {
    root::target().join("tools/debian")
}

/// Where the programs are.
pub(crate) fn bin() -> PathBuf {
    folder().join("usr/bin")
}

/// Prometheus' own programs, where this machine has none. The scenarios that miss them say so themselves.
pub(crate) fn prometheus() {
    let programs = ["promtool", "prometheus", "prometheus-alertmanager", "amtool"];
    let there = |p: &str| needs::runs(p, "--version") || bin().join(p).exists();
    if programs.iter().all(|p| there(p)) || !needs::may_set_up() {
        return;
    }
    if let Err(error) = unpack(&folder(), &["prometheus", "prometheus-alertmanager"]) {
        eprintln!("{error:#}\n  to mend it: sudo apt-get install prometheus prometheus-alertmanager");
    }
}

/// Downloads packages with the machine's own apt and unpacks them into a folder.
fn unpack(folder: &Path, packages: &[&str]) -> Result<()> {
    fs::create_dir_all(folder)?;
    println!("fetching {} into {} (--no-setup leaves it)", packages.join(", "), folder.display());
    let quiet = |command: &mut Command| -> Result<()> {
        let done = command.current_dir(folder).stdin(Stdio::null()).stdout(Stdio::null()).status()?;
        if !done.success() {
            bail!("{} ended with {done}", command.get_program().display());
        }
        Ok(())
    };
    let download = |update: bool| -> Result<()> {
        if update {
            quiet(root::command("apt-get", []).args(["-q", "update"]))?;
        }
        quiet(
            Command::new("apt-get").args(["-q", "-o", "APT::Sandbox::User=root", "download"]).args(packages),
        )
    };
    // A new machine has no package lists.
    download(false).or_else(|_| download(true))?;
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "deb") {
            quiet(Command::new("dpkg-deb").arg("-x").arg(&path).arg("."))?;
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}
