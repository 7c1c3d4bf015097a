//! The package on a minimal Debian of its own, in a chroot: apt resolves what it depends on, the agent is started as it is
//! installed with its default paths, the package is upgraded, removed and purged, and what is there then is compared with
//! what was there before.
//!
//! All of it happens in a mount namespace of one thread, over an overlay in memory: when the thread ends, however it ends,
//! nothing is mounted and nothing is written. The tree itself is made once, by debootstrap, and kept under target/package.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::steps::{empty, quiet};
use crate::{needs, root, vm};

/// Other packages' and the package managers' own records: they are changed by any package that comes and goes.
const NOT_OURS: [&str; 6] =
    ["var/lib/dpkg", "var/lib/apt", "var/cache", "var/log", "etc/ssl", "usr/local/share/ca-certificates"];
const CONFIG: &str = "etc/jobwarden/jobwarden.toml";
const STATE: &str = "var/lib/jobwarden";
const PINS: &str = "sys/fs/bpf/jobwarden";
const OPERATORS: &str = "# the operator's\n[zombies]\nafter = \"7s\"\n";

pub(super) fn run(debs: [&Path; 2], folder: &Path) -> Result<()> {
    if !root::is_root() || !Path::new("/sys/kernel/btf/vmlinux").exists() {
        println!("SKIPPED: package on a bare tree: needs root and a kernel with BTF");
        return Ok(());
    }
    let tree = match tree(folder) {
        Ok(tree) => tree,
        Err(e) => {
            println!("SKIPPED: package on a bare tree: {e:#}");
            return Ok(());
        }
    };
    let at = folder.join("bare-mount");
    fs::create_dir_all(&at)?;
    let thread = std::thread::scope(|s| s.spawn(|| in_namespace(debs, &tree, &at)).join());
    fs::remove_dir(&at).context("something of the bare tree is still mounted, or was written")?;
    thread.map_err(|_| anyhow!("the check of the bare tree panicked"))??;
    println!("on a bare Debian: installed by apt, started, upgraded, removed and purged without a trace");
    Ok(())
}

/// A minimal tree of this machine's suite with what the package depends on in apt's cache, made where there is none yet.
pub(super) fn tree(folder: &Path) -> Result<PathBuf> {
    let release = fs::read_to_string("/etc/os-release")?;
    let suite = release.lines().find_map(|l| l.strip_prefix("VERSION_CODENAME="));
    let suite = suite.context("no VERSION_CODENAME in /etc/os-release")?;
    let tree = folder.join(format!("bare-{suite}"));
    if tree.exists() {
        return Ok(tree);
    }
    if !needs::runs("debootstrap", "--version") {
        ensure!(needs::may_set_up(), "no debootstrap (Debian's package debootstrap)");
        quiet(Command::new("apt-get").args(["install", "-y", "debootstrap"]))
            .context("no debootstrap (Debian's package debootstrap)")?;
    }
    let half = folder.join(format!("bare-{suite}.new"));
    empty(&half)?;
    // In a mount namespace: what it mounts in the tree is gone with it, also where it is broken off.
    let mut make = Command::new("unshare");
    make.args(["--mount", "debootstrap", "--variant=minbase", suite]).arg(&half).arg(vm::machine_uri());
    quiet(&mut make).context("the mirror is out of reach")?;
    // The list and the packages, so that no later run needs the mirror.
    quiet(chroot(&half, "apt-get").arg("update"))?;
    quiet(chroot(&half, "apt-get").args(["install", "-y", "--download-only", "ca-certificates"]))?;
    fs::rename(&half, &tree)?;
    Ok(tree)
}

pub(super) fn chroot(tree: &Path, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("chroot");
    command.arg(tree).arg(program).env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C");
    command
}

/// From here on what this thread and its children mount is theirs alone, and gone with them.
pub(super) fn private_mounts() -> Result<()> {
    // SAFETY: no memory effects. Of this thread alone: the file system attributes go with the namespace.
    if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
        bail!("unshare: {}", std::io::Error::last_os_error());
    }
    quiet(Command::new("mount").args(["--make-rprivate", "/"]))
}

fn in_namespace(debs: [&Path; 2], tree: &Path, at: &Path) -> Result<()> {
    private_mounts()?;
    let mount = |args: &[&str], to: &Path| quiet(Command::new("mount").args(args).arg(to));
    mount(&["-t", "tmpfs", "tmpfs"], at)?;
    let [upper, work, merged] = ["upper", "work", "merged"].map(|n| at.join(n));
    for folder in [&upper, &work, &merged] {
        fs::create_dir(folder)?;
    }
    let layers =
        format!("lowerdir={},upperdir={},workdir={}", tree.display(), upper.display(), work.display());
    mount(&["-t", "overlay", "overlay", "-o", &layers], &merged)?;
    mount(&["-t", "proc", "proc"], &merged.join("proc"))?;
    mount(&["--rbind", "/sys"], &merged.join("sys"))?;
    mount(&["--rbind", "/dev"], &merged.join("dev"))?;
    // The host's own pins lie below it and are not seen.
    mount(&["-t", "bpf", "bpf"], &merged.join("sys/fs/bpf"))?;
    life(debs, &merged)
}

fn life([deb, next]: [&Path; 2], tree: &Path) -> Result<()> {
    for (from, to) in [(deb, "one.deb"), (next, "next.deb")] {
        fs::copy(from, tree.join("tmp").join(to))?;
    }
    let apt = |args: &[&str]| {
        let mut command = chroot(tree, "apt-get");
        command.args(["-y", "--no-install-recommends", "-o", "Dpkg::Options::=--force-confold"]);
        quiet(command.args(args))
    };
    let (before, others) = (files(tree)?, packages(tree)?);
    apt(&["install", "/tmp/one.deb"])?;
    let certificates = tree.join("etc/ssl/certs/ca-certificates.crt");
    ensure!(certificates.exists(), "apt did not bring what the package depends on");
    start_and_stop(tree)?;
    fs::write(tree.join(CONFIG), OPERATORS)?;
    let kept = || -> Result<[BTreeSet<PathBuf>; 2]> { Ok([under(tree, STATE)?, under(tree, PINS)?]) };
    let made = kept()?;
    ensure!(made.iter().all(|m| !m.is_empty()), "the agent left no state or no pins: {made:?}");
    apt(&["install", "/tmp/next.deb"])?;
    ensure!(kept()? == made, "an upgrade changed state or pins: {made:?}");
    ensure!(fs::read_to_string(tree.join(CONFIG))? == OPERATORS, "an upgrade changed the operator's config");
    start_and_stop(tree)?;
    let made = kept()?;
    apt(&["remove", "jobwarden"])?;
    ensure!(!tree.join("usr/bin/jobwarden").exists(), "the program is still there");
    ensure!(kept()? == made, "a removal took state or pins with it");
    apt(&["purge", "jobwarden"])?;
    // What came with it is not its trace. (`autoremove` leaves it where it takes it for wanted.)
    let now = packages(tree)?;
    let brought: Vec<&str> = now.difference(&others).map(String::as_str).collect();
    ensure!(!brought.iter().any(|n| n.starts_with("jobwarden")), "dpkg still knows it: {brought:?}");
    apt(&[&["purge"], brought.as_slice()].concat())?;
    ensure!(!tree.join(PINS).exists(), "a purge left pins");
    let after = files(tree)?;
    let left: Vec<_> = after.difference(&before).collect();
    ensure!(left.is_empty(), "after a purge there is still {left:?}");
    let lost: Vec<_> = before.difference(&after).collect();
    ensure!(lost.is_empty(), "the purge took what was there before: {lost:?}");
    Ok(())
}

/// Those that dpkg has files of.
fn packages(tree: &Path) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(tree.join("var/lib/dpkg/info"))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        names.extend(name.strip_suffix(".list").map(str::to_owned));
    }
    Ok(names)
}

/// As the unit starts it, with the default paths; until it is synced, and a clean stop.
fn start_and_stop(tree: &Path) -> Result<()> {
    let log = tree.join("tmp/agent.log");
    let mut agent = chroot(tree, "/usr/bin/jobwarden")
        .args(["agent", "--listen", "127.0.0.1:0"])
        .stdin(Stdio::null())
        .stderr(fs::File::create(&log)?)
        .spawn()?;
    let answered = answers(tree, &mut agent);
    // Not reaped yet, so the pid is its own.
    // SAFETY: no memory effects.
    unsafe { libc::kill(agent.id().cast_signed(), libc::SIGTERM) };
    let status = agent.wait()?;
    let said = fs::read_to_string(&log)?;
    fs::remove_file(&log)?;
    answered.context(said)?;
    ensure!(status.success(), "the agent in the bare tree ended {status}");
    Ok(())
}

fn answers(tree: &Path, agent: &mut Child) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(30);
    while Instant::now() < end {
        if let Some(status) = agent.try_wait()? {
            bail!("the agent in the bare tree ended {status}");
        }
        let said = chroot(tree, "/usr/bin/jobwarden").args(["status", "--json"]).output()?;
        let status: Option<serde_json::Value> = serde_json::from_slice(&said.stdout).ok();
        if status.is_some_and(|s| s["synced"] == true) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    bail!("the agent in the bare tree did not answer")
}

/// All files and folders of the tree, without what is mounted in it and [`NOT_OURS`].
fn files(tree: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut found = under(tree, "")?;
    found.retain(|p| !NOT_OURS.iter().any(|n| p.starts_with(n)));
    Ok(found)
}

/// What is below a folder of the tree, by its path in there. Nothing where there is no such folder.
fn under(tree: &Path, folder: &str) -> Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    let mut open = vec![tree.join(folder)];
    while let Some(folder) = open.pop() {
        if !folder.exists() {
            continue;
        }
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            let path = entry.path();
            let inside = path.strip_prefix(tree)?.to_owned();
            // Mounts of the kernel's, not of the tree.
            let mounted = ["proc", "sys", "dev"].iter().any(|m| inside == Path::new(m));
            if entry.file_type()?.is_dir() && !mounted {
                open.push(path);
            }
            found.insert(inside);
        }
    }
    Ok(found)
}
