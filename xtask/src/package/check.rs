//! The package's life by dpkg, with an empty tree as its root: installed, started, upgraded, started again, removed, purged.
//! The package's scripts run on this machine and keep to `DPKG_ROOT`, as dpkg tells them. Where it may load probes (as root)
//! the agent is started from the tree, with socket, state and a bpffs of its own in there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::steps::{empty, quiet};
use crate::root;

/// What a host must have of it, beside the program.
const INSTALLED: [&str; 9] = [
    "etc/jobwarden/jobwarden.toml",
    "usr/lib/systemd/system/jobwarden.service",
    "usr/share/doc/jobwarden/copyright",
    "usr/share/doc/jobwarden/examples/jobwarden.toml",
    "usr/share/man/man1/jobwarden.1.gz",
    "usr/share/man/man1/jobwarden-why.1.gz",
    "usr/share/man/man5/jobwarden.toml.5.gz",
    "usr/share/bash-completion/completions/jobwarden",
    "usr/share/zsh/vendor-completions/_jobwarden",
];

const STATE: &str = "var/lib/jobwarden";
const BPFFS: &str = "sys/fs/bpf";
/// In an empty tree nobody has enabled a unit, and there is a file of the operator's own.
const OPERATORS: &str = "# the operator's\n[zombies]\nafter = \"7s\"\n";

pub(super) fn run([deb, next]: [&Path; 2], tree: &Path) -> Result<()> {
    // A bpffs that an aborted run left in there would be emptied with the tree: not before it is unmounted.
    let _ = unmount(tree);
    empty(tree)?;
    let admin = tree.join("var/lib/dpkg");
    for folder in ["info", "updates", "triggers"] {
        fs::create_dir_all(admin.join(folder))?;
    }
    fs::write(admin.join("status"), "")?;
    let done = life(deb, next, tree);
    let unmounted = unmount(tree);
    done?;
    unmounted?;
    let left: Vec<PathBuf> = traces(tree)?.into_iter().filter(|p| !p.starts_with(&admin)).collect();
    ensure!(left.is_empty(), "after a purge there is still {left:?}");
    println!("installed, upgraded, removed and purged without a trace");
    Ok(())
}

fn life(deb: &Path, next: &Path, tree: &Path) -> Result<()> {
    let dpkg = |args: &[&str], what: &Path| {
        let mut command = root::command("dpkg", []);
        command.arg(format!("--root={}", tree.display()));
        command.args(["--force-script-chrootless", "--force-depends", "--force-not-root", "--force-confold"]);
        quiet(command.args(args).arg(what))
    };
    dpkg(&["-i"], deb)?;
    for file in INSTALLED.iter().chain(&["usr/bin/jobwarden"]) {
        ensure!(tree.join(file).is_file(), "the package has no {file}");
    }
    let starts = root::is_root() && Path::new("/sys/kernel/btf/vmlinux").exists();
    if starts {
        start_and_stop(tree)?;
    } else {
        println!("SKIPPED: package: the agent is not started: needs root and a kernel with BTF");
        for folder in [format!("{STATE}/kept"), format!("{BPFFS}/jobwarden/kept")] {
            fs::create_dir_all(tree.join(folder))?;
        }
    }
    fs::write(tree.join("etc/jobwarden/jobwarden.toml"), OPERATORS)?;
    let before = kept(tree)?;
    ensure!(before.iter().all(|n| *n > 0), "the agent left no state or no pins: {before:?}");
    dpkg(&["-i"], next)?;
    ensure!(kept(tree)? == before, "an upgrade changed state or pins: {before:?}, then {:?}", kept(tree)?);
    let config = fs::read_to_string(tree.join("etc/jobwarden/jobwarden.toml"))?;
    ensure!(config == OPERATORS, "an upgrade changed the operator's config");
    if starts {
        start_and_stop(tree)?;
    }
    let before = kept(tree)?;
    dpkg(&["--remove"], Path::new("jobwarden"))?;
    ensure!(!tree.join("usr/bin/jobwarden").exists(), "the program is still there");
    ensure!(kept(tree)? == before, "a removal took state or pins with it");
    dpkg(&["--purge"], Path::new("jobwarden"))?;
    ensure!(kept(tree)? == [0, 0], "a purge left state or pins: {:?}", kept(tree)?);
    Ok(())
}

/// How many files of state and how many pins there are.
fn kept(tree: &Path) -> Result<[usize; 2]> {
    let count = |folder: PathBuf| if folder.exists() { entries(&folder) } else { Ok(0) };
    Ok([count(tree.join(STATE))?, count(tree.join(BPFFS).join("jobwarden"))?])
}

fn entries(folder: &Path) -> Result<usize> {
    let mut n = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        n += 1 + if entry.file_type()?.is_dir() { entries(&entry.path())? } else { 0 };
    }
    Ok(n)
}

/// The agent as it is installed, until it answers; a clean stop.
fn start_and_stop(tree: &Path) -> Result<()> {
    let program = tree.join("usr/bin/jobwarden");
    fs::create_dir_all(tree.join(BPFFS))?;
    let socket = tree.join("run/jobwarden/jobwarden.sock");
    let mut agent = Command::new(&program)
        .arg("--socket")
        .arg(&socket)
        .args(["agent", "--listen", "127.0.0.1:0", "--config"])
        .arg(tree.join("etc/jobwarden/jobwarden.toml"))
        .arg("--state-dir")
        .arg(tree.join(STATE))
        .arg("--bpffs")
        .arg(tree.join(BPFFS))
        .stdin(Stdio::null())
        .stderr(fs::File::create(tree.join("agent.log"))?)
        .spawn()?;
    let answered = answers(&program, &socket, &mut agent);
    // Not reaped yet, so the pid is its own.
    // SAFETY: no memory effects.
    unsafe { libc::kill(agent.id().cast_signed(), libc::SIGTERM) };
    let status = agent.wait()?;
    let log = fs::read_to_string(tree.join("agent.log"))?;
    fs::remove_file(tree.join("agent.log"))?;
    answered.context(log)?;
    ensure!(status.success(), "the installed agent ended {status}");
    println!("the installed agent was started, answered and stopped");
    Ok(())
}

fn answers(program: &Path, socket: &Path, agent: &mut Child) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(30);
    while Instant::now() < end {
        if let Some(status) = agent.try_wait()? {
            bail!("the installed agent ended {status}");
        }
        let said = Command::new(program).arg("--socket").arg(socket).args(["status", "--json"]).output()?;
        let status: Option<serde_json::Value> = serde_json::from_slice(&said.stdout).ok();
        if status.is_some_and(|s| s["synced"] == true) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    bail!("the installed agent did not answer")
}

/// The bpffs that the agent has mounted in the tree.
fn unmount(tree: &Path) -> Result<()> {
    let at = tree.join(BPFFS);
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    if mounts.lines().any(|l| l.split(' ').nth(1) == at.to_str()) {
        quiet(root::command("umount", []).arg(&at))?;
    }
    Ok(())
}

/// What is named after the package, anywhere in a tree.
fn traces(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().contains("jobwarden") {
            found.push(entry.path());
        } else if entry.file_type()?.is_dir() {
            found.extend(traces(&entry.path())?);
        }
    }
    Ok(found)
}
