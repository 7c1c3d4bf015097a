//! `cargo xtask package`: a .deb and a tarball under target/package. Needs dpkg-deb and tar; installs nothing on this machine.
//! `--check` installs, upgrades and purges the package in an empty tree and looks whether a trace is left.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::{cargo, needs, root};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Take the dev profile's program, then install, upgrade and purge the package in an empty tree
    #[arg(long)]
    check: bool,
}

/// What goes where, beside the program: source, target, mode.
const FILES: [(&str, &str, u32); 13] = [
    ("deploy/jobwarden.service", "usr/lib/systemd/system/jobwarden.service", 0o644),
    ("deploy/jobwarden.toml", "usr/share/doc/jobwarden/examples/jobwarden.toml", 0o644),
    ("deploy/prometheus/jobwarden.rules.yml", "usr/share/doc/jobwarden/examples/jobwarden.rules.yml", 0o644),
    ("deploy/prometheus/prometheus.yml", "usr/share/doc/jobwarden/examples/prometheus.yml", 0o644),
    ("deploy/alertmanager/alertmanager.yml", "usr/share/doc/jobwarden/examples/alertmanager.yml", 0o644),
    ("deploy/grafana/jobwarden.json", "usr/share/doc/jobwarden/examples/grafana.json", 0o644),
    ("README.md", "usr/share/doc/jobwarden/README.md", 0o644),
    ("CHANGELOG.md", "usr/share/doc/jobwarden/CHANGELOG.md", 0o644),
    ("LICENSE-MIT", "usr/share/doc/jobwarden/LICENSE-MIT", 0o644),
    ("LICENSE-APACHE", "usr/share/doc/jobwarden/LICENSE-APACHE", 0o644),
    ("deploy/debian/postinst", "DEBIAN/postinst", 0o755),
    ("deploy/debian/prerm", "DEBIAN/prerm", 0o755),
    ("deploy/debian/postrm", "DEBIAN/postrm", 0o755),
];

pub(crate) fn run(args: &Args) -> Result<bool> {
    if !needs::runs("dpkg-deb", "--version") {
        bail!("dpkg-deb is missing\n  to mend it: sudo apt-get install dpkg");
    }
    let binary = cargo::jobwarden(if args.check { "dev" } else { "release" })?;
    let folder = root::target().join("package");
    let tree = folder.join("tree");
    empty(&tree)?;
    stage(&binary, &tree)?;
    let name = format!("jobwarden_{}_amd64.deb", env!("CARGO_PKG_VERSION"));
    let deb = folder.join(name);
    quiet(
        Command::new("dpkg-deb").args(["--root-owner-group", "-Zxz", "-z1", "--build"]).arg(&tree).arg(&deb),
    )?;
    println!("{}", deb.display());
    let tarball = folder.join(format!("jobwarden-{}-x86_64.tar.gz", env!("CARGO_PKG_VERSION")));
    quiet(
        Command::new("tar")
            .args(["--owner=0", "--group=0", "--numeric-owner", "-czf"])
            .arg(&tarball)
            .arg("-C")
            .arg(tree.join("usr/bin"))
            .arg("jobwarden"),
    )?;
    println!("{}", tarball.display());
    if args.check {
        check(&deb, &folder.join("root"))?;
        println!("installed, upgraded and purged without a trace");
    }
    Ok(true)
}

/// Lays the files out as they will lie on a host.
fn stage(binary: &Path, tree: &Path) -> Result<()> {
    let program = tree.join("usr/bin/jobwarden");
    put(binary, &program, 0o755)?;
    quiet(Command::new("strip").arg("--strip-unneeded").arg(&program))?;
    for (from, to, mode) in FILES {
        put(&root::dir().join(from), &tree.join(to), mode)?;
    }
    fs::create_dir_all(tree.join("etc/jobwarden"))?;
    fs::write(tree.join("DEBIAN/control"), control(installed_kib(tree)?))?;
    Ok(())
}

fn put(from: &Path, to: &Path, mode: u32) -> Result<()> {
    let folder = to.parent().context("a file without a folder")?;
    fs::create_dir_all(folder)?;
    fs::copy(from, to).with_context(|| format!("{}", from.display()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(mode))?;
    Ok(())
}

fn control(size_kib: u64) -> String {
    format!(
        "Package: jobwarden\n\
         Version: {}\n\
         Architecture: amd64\n\
         Maintainer: The jobwarden authors <jobwarden@localhost>\n\
         Installed-Size: {size_kib}\n\
         Depends: libc6 (>= 2.34), libgcc-s1\n\
         Section: admin\n\
         Priority: optional\n\
         Homepage: {}\n\
         Description: {}\n \
         Follows every process of a host through eBPF, says which parent does not reap\n \
         its zombies and why, which processes outlived the job that started them, and\n \
         ends whole jobs so that nothing of them escapes.\n",
        env!("CARGO_PKG_VERSION"),
        env!("CARGO_PKG_REPOSITORY"),
        "zombies, orphans, why, and whole jobs ended",
    )
}

fn installed_kib(tree: &Path) -> Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(tree)? {
        let entry = entry?;
        let of = entry.metadata()?;
        sum += if of.is_dir() { installed_kib(&entry.path())? } else { of.len().div_ceil(1024) };
    }
    Ok(sum)
}

/// Install, upgrade, purge, by dpkg with an empty tree as its root. The package's scripts run on this machine and keep to
/// `DPKG_ROOT`, as dpkg tells them.
fn check(deb: &Path, tree: &Path) -> Result<()> {
    empty(tree)?;
    let admin = tree.join("var/lib/dpkg");
    for folder in ["info", "updates", "triggers"] {
        fs::create_dir_all(admin.join(folder))?;
    }
    fs::write(admin.join("status"), "")?;
    let dpkg = |args: &[&str], what: &Path| {
        let mut command = root::command("dpkg", []);
        command.arg(format!("--root={}", tree.display()));
        command.args(["--force-script-chrootless", "--force-depends", "--force-not-root"]);
        quiet(command.args(args).arg(what))
    };
    dpkg(&["-i"], deb)?;
    ensure!(tree.join("usr/bin/jobwarden").exists(), "the package has no program");
    let state = tree.join("var/lib/jobwarden");
    let pins = tree.join("sys/fs/bpf/jobwarden");
    for folder in [&state, &pins] {
        fs::create_dir_all(folder)?;
        fs::write(folder.join("kept"), "")?;
    }
    dpkg(&["-i"], deb)?;
    ensure!(state.join("kept").exists() && pins.join("kept").exists(), "an upgrade lost state or pins");
    dpkg(&["--purge"], Path::new("jobwarden"))?;
    let left: Vec<PathBuf> = traces(tree)?.into_iter().filter(|p| !p.starts_with(&admin)).collect();
    ensure!(left.is_empty(), "after a purge there is still {left:?}");
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

fn empty(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder)?;
    }
    fs::create_dir_all(folder).with_context(|| format!("{}", folder.display()))
}

fn quiet(command: &mut Command) -> Result<()> {
    let out = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    if !out.status.success() {
        bail!("{command:?} ended with {}: {}", out.status, String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(())
}
