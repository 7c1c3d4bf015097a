//! `cargo xtask package`: a .deb and a tarball under target/package. Needs dpkg-deb and tar; installs nothing on this machine.
//! `--check` installs, starts, upgrades, removes and purges the package in an empty tree (`package/check.rs`), in a minimal
//! Debian by apt (`package/bare.rs`) and under systemd as PID 1 in a VM (`package/systemd.rs`); builds and runs the image
//! (`package/image.rs`) and holds the DaemonSet against Kubernetes' schema (`package/schema.rs`).
//!
//! By dpkg-deb and not cargo-deb: that is a minute's build of its own, and would still need the steps here that run the
//! program for its man pages and completions.

mod bare;
mod check;
pub(crate) mod guest;
mod image;
mod schema;
mod steps;
mod systemd;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use self::steps::{empty, quiet};
use crate::{cargo, needs, root};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Take the dev profile's program; then try the package in an empty tree, a bare Debian and a VM, the image and the DaemonSet
    #[arg(long)]
    check: bool,
}

/// What goes where, beside the program: source, target, mode.
const FILES: [(&str, &str, u32); 16] = [
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
    ("deploy/debian/copyright", "usr/share/doc/jobwarden/copyright", 0o644),
    ("deploy/debian/jobwarden.toml", "etc/jobwarden/jobwarden.toml", 0o644),
    ("deploy/man/jobwarden.toml.5", "usr/share/man/man5/jobwarden.toml.5", 0o644),
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
    let deb = build(&tree, &folder, env!("CARGO_PKG_VERSION"))?;
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
        let next = build(&tree, &folder, concat!(env!("CARGO_PKG_VERSION"), "+next"))?;
        let debs = [deb.as_path(), &next];
        let done = check::run(debs, &folder.join("root"))
            .and_then(|()| bare::run(debs, &folder))
            .and_then(|()| systemd::run(debs, &folder))
            .and_then(|()| image::run(&deb, &folder))
            .and_then(|()| schema::run(&folder));
        fs::remove_file(&next)?;
        done?;
    }
    Ok(true)
}

/// The package of the tree as this version.
fn build(tree: &Path, folder: &Path, version: &str) -> Result<PathBuf> {
    fs::write(tree.join("DEBIAN/control"), control(tree, version)?)?;
    let deb = folder.join(format!("jobwarden_{version}_amd64.deb"));
    quiet(
        Command::new("dpkg-deb").args(["--root-owner-group", "-Zxz", "-z1", "--build"]).arg(tree).arg(&deb),
    )?;
    Ok(deb)
}

/// Lays the files out as they will lie on a host.
fn stage(binary: &Path, tree: &Path) -> Result<()> {
    let program = tree.join("usr/bin/jobwarden");
    put(binary, &program, 0o755)?;
    quiet(Command::new("strip").arg("--strip-unneeded").arg(&program))?;
    for (from, to, mode) in FILES {
        put(&root::dir().join(from), &tree.join(to), mode)?;
    }
    fs::write(tree.join("DEBIAN/conffiles"), "/etc/jobwarden/jobwarden.toml\n")?;
    // The program itself knows its commands.
    let (man, shells) = (tree.join("usr/share/man/man1"), tree.join("shells"));
    quiet(Command::new(binary).arg("generate").arg("--man").arg(&man).arg("--completions").arg(&shells))?;
    for (from, to) in [
        ("jobwarden.bash", "usr/share/bash-completion/completions/jobwarden"),
        ("_jobwarden", "usr/share/zsh/vendor-completions/_jobwarden"),
        ("jobwarden.fish", "usr/share/fish/vendor_completions.d/jobwarden.fish"),
    ] {
        put(&shells.join(from), &tree.join(to), 0o644)?;
    }
    fs::remove_dir_all(shells)?;
    for folder in [man, tree.join("usr/share/man/man5")] {
        for page in fs::read_dir(folder)? {
            let page = page?.path();
            fs::set_permissions(&page, fs::Permissions::from_mode(0o644))?;
            quiet(Command::new("gzip").args(["-9n"]).arg(page))?;
        }
    }
    Ok(())
}

fn put(from: &Path, to: &Path, mode: u32) -> Result<()> {
    let folder = to.parent().context("a file without a folder")?;
    fs::create_dir_all(folder)?;
    fs::copy(from, to).with_context(|| format!("{}", from.display()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(mode))?;
    Ok(())
}

fn control(tree: &Path, version: &str) -> Result<String> {
    Ok(format!(
        "Package: jobwarden\n\
         Version: {version}\n\
         Architecture: amd64\n\
         Maintainer: The jobwarden authors <jobwarden@localhost>\n\
         Installed-Size: {}\n\
         Depends: libc6 (>= {}), libgcc-s1, ca-certificates\n\
         Section: admin\n\
         Priority: optional\n\
         Homepage: {}\n\
         Description: zombies, orphans, why, and whole jobs ended\n \
         Follows every process of a host through eBPF, says which parent does not reap\n \
         its zombies and why, which processes outlived the job that started them, and\n \
         ends whole jobs so that nothing of them escapes.\n",
        installed_kib(tree)?,
        libc_version(&tree.join("usr/bin/jobwarden"))?,
        env!("CARGO_PKG_REPOSITORY"),
    ))
}

/// The newest symbol version of glibc that the program asks for.
fn libc_version(program: &Path) -> Result<String> {
    let out = Command::new("objdump").arg("-T").arg(program).output().context("objdump (binutils)")?;
    let text = String::from_utf8_lossy(&out.stdout);
    let versions = text.split(|c: char| !(c.is_ascii_alphanumeric() || "_.".contains(c)));
    let numbers = |v: &str| v.split('.').map(|n| n.parse().ok()).collect::<Option<Vec<u32>>>();
    let newest = versions.filter_map(|v| numbers(v.strip_prefix("GLIBC_")?)).max();
    let newest = newest.context("the program asks for no glibc")?;
    Ok(newest.iter().map(ToString::to_string).collect::<Vec<_>>().join("."))
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
