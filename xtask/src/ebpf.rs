//! The probe object: built from monitor-ebpf/, kept in the repository beside the fingerprint of its sources.
//!
//! The plain build needs neither rust-src nor bpf-linker; only this does, and fetches both when they are absent. The
//! bytes are the same on every machine: paths are mapped away, tools are pinned, and debug sections are cut off.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use crate::{cargo, root, sources};

/// The last one that uses rustc's own LLVM.
const BPF_LINKER: &str = "0.10.4";
const TARGET: &str = "bpfel-unknown-none";
pub(crate) const OBJECT: &str = "monitor/probes/probes.o";
pub(crate) const SOURCES: &str = "monitor/probes/probes.sources";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Build it again and compare the bytes with the ones in the repository; change nothing
    #[arg(long)]
    check: bool,
}

/// `cargo xtask ebpf [--check]`.
pub(crate) fn run(args: &Args) -> Result<bool> {
    let dir = root::dir();
    let sysroot = sysroot()?;
    rust_src(&sysroot)?;
    let object = build(&dir, &sysroot, &bpf_linker()?)?;
    let fingerprint = sources::fingerprint(&dir).context("the probes' sources cannot be read")?;
    let (kept, beside) = (dir.join(OBJECT), dir.join(SOURCES));
    let fresh = fs::read(&object).with_context(|| object.display().to_string())?;
    if args.check {
        let same = fs::read(&kept).is_ok_and(|b| b == fresh);
        ensure!(
            same,
            "{OBJECT} is not what its sources give (a copy that is stands in {}): run `cargo xtask ebpf` and commit the result",
            object.display()
        );
        let told = fs::read_to_string(&beside).unwrap_or_default();
        ensure!(told.trim() == fingerprint, "{SOURCES} does not match the sources: run `cargo xtask ebpf`");
        println!("{OBJECT}: {} bytes, as its sources give it", fresh.len());
        return Ok(true);
    }
    fs::create_dir_all(dir.join("monitor/probes"))?;
    fs::write(&kept, &fresh)?;
    fs::write(&beside, format!("{fingerprint}\n"))?;
    println!("{OBJECT}: {} bytes", fresh.len());
    Ok(true)
}

fn output(command: &mut Command) -> Result<String> {
    let out = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
    Ok(String::from_utf8(out.stdout)?.trim().to_owned())
}

fn rustc() -> Command {
    let mut rustc = Command::new("rustc");
    rustc.current_dir(root::dir());
    rustc
}

fn sysroot() -> Result<PathBuf> {
    Ok(output(rustc().args(["--print", "sysroot"]))?.into())
}

/// `core` is built for the BPF target from its source.
fn rust_src(sysroot: &Path) -> Result<()> {
    if sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").exists() {
        return Ok(());
    }
    let done =
        Command::new("rustup").args(["component", "add", "rust-src"]).current_dir(root::dir()).status();
    if !done.is_ok_and(|s| s.success()) {
        bail!("rust-src is not there and could not be fetched: run `rustup component add rust-src`");
    }
    Ok(())
}

/// The pinned linker, under target/tools.
fn bpf_linker() -> Result<PathBuf> {
    let tools = root::target().join("tools");
    let linker = tools.join("bin/bpf-linker");
    let version = |p: &Path| output(Command::new(p).arg("--version")).unwrap_or_default();
    if version(&linker).ends_with(BPF_LINKER) {
        return Ok(linker);
    }
    eprintln!("bpf-linker {BPF_LINKER} is built into {} (one to two minutes)", tools.display());
    let status = cargo::command()
        .args(["install", "--locked", "--force", "--root"])
        .arg(&tools)
        .arg(format!("bpf-linker@{BPF_LINKER}"))
        .status()?;
    ensure!(status.success(), "bpf-linker {BPF_LINKER} could not be installed");
    Ok(linker)
}

/// Builds and strips; where the object is.
fn build(dir: &Path, sysroot: &Path, linker: &Path) -> Result<PathBuf> {
    let to = root::target().join("ebpf");
    let status = cargo::command()
        .args(["build", "--locked", "--release", "-p", "monitor-ebpf", "--bin", "monitor-ebpf"])
        .args(["--target", TARGET, "-Z", "build-std=core", "--target-dir"])
        .arg(&to)
        // Stable has what is needed, behind a switch.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags(dir, sysroot, linker)?)
        .envs([
            ("CARGO_PROFILE_RELEASE_STRIP", "none"),
            ("CARGO_PROFILE_RELEASE_LTO", "false"),
            ("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1"),
            ("CARGO_PROFILE_RELEASE_PANIC", "abort"),
            ("CARGO_PROFILE_RELEASE_DEBUG", "2"),
            ("CARGO_PROFILE_RELEASE_OPT_LEVEL", "3"),
            ("CARGO_INCREMENTAL", "0"),
        ])
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTFLAGS")
        .status()?;
    ensure!(status.success(), "the probes do not build: what the compiler said stands above");
    let built = to.join(TARGET).join("release/monitor-ebpf");
    let object = to.join("probes.o");
    strip(sysroot, &built, &object)?;
    Ok(object)
}

/// Debug sections were needed to make BTF from, and are ten times its size.
fn strip(sysroot: &Path, from: &Path, to: &Path) -> Result<()> {
    let host = output(rustc().args(["--print", "host-tuple"]))?;
    let objcopy = sysroot.join("lib/rustlib").join(host).join("bin/rust-objcopy");
    output(
        Command::new(&objcopy)
            .arg("--strip-debug")
            .arg(from)
            .arg(to)
            .env("LD_LIBRARY_PATH", sysroot.join("lib")),
    )
    .map(drop)
}

/// Debug information for BTF, and no path of this machine in it.
fn flags(dir: &Path, sysroot: &Path, linker: &Path) -> Result<OsString> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from).or_else(|| {
        let user = std::env::var_os("HOME")?;
        Some(PathBuf::from(user).join(".cargo"))
    });
    let mut all: Vec<OsString> = vec!["-Cdebuginfo=2".into(), "-Clink-arg=--btf".into()];
    let mut link_with = OsString::from("-Clinker=");
    link_with.push(linker);
    all.push(link_with);
    let mut remap = |from: &Path, to: &str| {
        let mut flag = OsString::from("--remap-path-prefix=");
        flag.push(from);
        flag.push("=");
        flag.push(to);
        all.push(flag);
    };
    remap(dir, ".");
    remap(sysroot, "/rust");
    // The folder's name holds a hash of the registry's address, which a mirror changes.
    let registries = home.map(|h| h.join("registry/src"));
    for entry in registries.iter().filter_map(|r| fs::read_dir(r).ok()).flatten() {
        remap(&entry?.path(), "/crates");
    }
    let mut joined = OsString::new();
    for (i, flag) in all.iter().enumerate() {
        if i > 0 {
            joined.push("\u{1f}");
        }
        joined.push(flag);
    }
    Ok(joined)
}
