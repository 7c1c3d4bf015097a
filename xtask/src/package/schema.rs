//! The Kubernetes files against Kubernetes' own schema, in the strict form that refuses unknown keys: by PyPI's
//! kubernetes-validate, which carries the schemas, in a venv of its own under target/tools.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};

use super::steps::quiet;
use crate::root;

const VALIDATOR: &str = "1.37.0";
/// The oldest with `appArmorProfile`, as the file says, and the newest that this validator knows.
const KUBERNETES: [&str; 2] = ["1.30", "1.37"];
const FILE: &str = "deploy/kubernetes/daemonset.yaml";

pub(super) fn run(folder: &Path) -> Result<()> {
    let validator = match validator() {
        Ok(validator) => validator,
        Err(e) => {
            println!("SKIPPED: the DaemonSet against Kubernetes' schema: {e:#}");
            return Ok(());
        }
    };
    let check = |version: &str, file: &Path| -> Result<Output> {
        Ok(Command::new(&validator).args(["--strict", "-k", version]).arg(file).output()?)
    };
    let file = root::dir().join(FILE);
    let wrong = folder.join("daemonset-wrong.yaml");
    for version in KUBERNETES {
        let out = check(version, &file)?;
        let said = text(&out);
        ensure!(out.status.success(), "Kubernetes {version} does not take {FILE}: {said}");
        ensure!(said.matches(" passed for ").count() == 3, "not all three resources were looked at: {said}");
        // One letter off: an API server drops such a key without a word, and the agent would not start.
        fs::write(&wrong, fs::read_to_string(&file)?.replace("hostPID:", "hostPid:"))?;
        let out = check(version, &wrong)?;
        ensure!(!out.status.success() && text(&out).contains("hostPid"), "it takes anything: {}", text(&out));
    }
    fs::remove_file(&wrong)?;
    println!("the DaemonSet is valid for Kubernetes {} and {}, strictly", KUBERNETES[0], KUBERNETES[1]);
    Ok(())
}

fn text(out: &Output) -> String {
    String::from_utf8_lossy(&[out.stdout.as_slice(), &out.stderr].concat()).into_owned()
}

/// The program, installed where it is not there yet.
fn validator() -> Result<PathBuf> {
    let venv = root::target().join("tools").join(format!("kubernetes-validate-{VALIDATOR}"));
    let program = venv.join("bin/kubernetes-validate");
    if program.exists() {
        return Ok(program);
    }
    let make = || quiet(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&venv));
    if make().is_err() {
        // Debian's python3 comes without what a venv is made of.
        ensure!(root::is_root(), "no venv can be made (Debian's package python3-venv)");
        quiet(Command::new("apt-get").args(["install", "-y", "--no-install-recommends", "python3-venv"]))?;
        make()?;
    }
    let package = format!("kubernetes-validate=={VALIDATOR}");
    quiet(Command::new(venv.join("bin/pip")).args([
        "install",
        "--quiet",
        "--retries=1",
        "--disable-pip-version-check",
        &package,
    ]))
    .context("PyPI is out of reach")?;
    Ok(program)
}
