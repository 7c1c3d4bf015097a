//! Tells the crate which commit it is built from, and refuses a probe object that is older than its sources.

#[path = "../xtask/src/sources.rs"]
mod sources;

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=JOBWARDEN_REVISION");
    println!("cargo::rustc-env=JOBWARDEN_REVISION={}", revision());
    probes();
}

/// The object is kept in the repository, so that this build needs neither rust-src nor bpf-linker.
fn probes() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new(".."));
    let watched = [
        "monitor-ebpf/src",
        "monitor-ebpf/Cargo.toml",
        "rust-toolchain.toml",
        "Cargo.lock",
        "xtask/src/sources.rs",
    ];
    for path in watched.iter().chain(&["monitor/probes/probes.o", "monitor/probes/probes.sources"]) {
        println!("cargo::rerun-if-changed={}", root.join(path).display());
    }
    // A package made from this crate alone has the object and not the sources.
    let Ok(now) = sources::fingerprint(root) else { return };
    let built_from = std::fs::read_to_string(root.join("monitor/probes/probes.sources")).unwrap_or_default();
    if built_from.trim() != now {
        println!(
            "cargo::error=monitor/probes/probes.o was not built from monitor-ebpf/ as it is now: run `cargo xtask ebpf` and commit the result"
        );
    }
}

/// The environment's word (a package that is built outside the repository), else git's.
fn revision() -> String {
    if let Ok(r) = std::env::var("JOBWARDEN_REVISION") {
        return r;
    }
    // HEAD moves with a checkout, its log with every commit.
    for file in ["HEAD", "logs/HEAD"] {
        if let Some(path) = git(&["rev-parse", "--git-path", file])
            && Path::new(&path).exists()
        {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    git(&["rev-parse", "--short=12", "HEAD"]).unwrap_or_else(|| "unknown".into())
}

fn git(args: &[&str]) -> Option<String> {
    let out = Command::new("git").args(args).output().ok()?;
    let text = String::from_utf8(out.stdout).ok()?.trim().to_owned();
    (out.status.success() && !text.is_empty()).then_some(text)
}
