//! Tells the crate which commit it is built from.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=JOBWARDEN_REVISION");
    println!("cargo::rustc-env=JOBWARDEN_REVISION={}", revision());
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
