//! Calls cargo and reads what it built from its JSON messages.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::root;

/// A program that cargo has built.
#[derive(Clone, Debug)]
pub(crate) struct Built {
    pub(crate) package: String,
    /// The target's name: the library, the binary or the file under tests/.
    pub(crate) name: String,
    /// `lib`, `bin` or `test`.
    pub(crate) kind: String,
    pub(crate) is_test: bool,
    pub(crate) executable: PathBuf,
    pub(crate) package_dir: PathBuf,
}

/// Cargo, without what `cargo run` has put into the environment for this program: build scripts that look at it (ring's does)
/// would be run again, and all that needs them built again, each time one goes from `cargo xtask` to plain `cargo`.
pub(crate) fn command() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&*name);
        }
    }
    command.env_remove("CARGO").current_dir(root::dir());
    command
}

/// Runs `cargo ARGS --message-format=json-render-diagnostics` and returns the programs it built, in order.
/// What the compiler has to say goes to stderr as usual.
pub(crate) fn build(args: &[&str]) -> Result<Vec<Built>> {
    let mut child = command()
        .args(args)
        .arg("--message-format=json-render-diagnostics")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cargo could not be started")?;
    let mut built = Vec::new();
    if let Some(out) = child.stdout.take() {
        for line in BufReader::new(out).lines() {
            built.extend(artifact(&line?));
        }
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("`cargo {}` failed ({status}): what the compiler said stands above", args.join(" "));
    }
    Ok(built)
}

/// The agent's binary, built in this profile.
pub(crate) fn jobwarden(profile: &str) -> Result<PathBuf> {
    let built = build(&["build", "--package", "jobwarden", "--bin", "jobwarden", "--profile", profile])?;
    let binary = built.into_iter().find(|b| b.name == "jobwarden" && b.kind == "bin");
    Ok(binary.context("cargo built no binary named jobwarden")?.executable)
}

fn artifact(line: &str) -> Option<Built> {
    let message: Value = serde_json::from_str(line).ok()?;
    if message["reason"] != "compiler-artifact" {
        return None;
    }
    let manifest = Path::new(message["manifest_path"].as_str()?);
    let package_dir = manifest.parent()?.to_path_buf();
    Some(Built {
        package: package_dir.file_name()?.to_string_lossy().into_owned(),
        name: message["target"]["name"].as_str()?.to_owned(),
        kind: message["target"]["kind"][0].as_str()?.to_owned(),
        is_test: message["profile"]["test"].as_bool()?,
        executable: PathBuf::from(message["executable"].as_str()?),
        package_dir,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_artifact_line_gives_the_program_and_others_give_none() {
        let line = r#"{"reason":"compiler-artifact","manifest_path":"/r/tests/Cargo.toml",
            "target":{"kind":["test"],"name":"lifecycle"},"profile":{"test":true},"executable":"/r/t/lifecycle-1"}"#;
        let built = artifact(line).expect("an artifact");
        assert_eq!(
            (built.package.as_str(), built.name.as_str(), built.is_test),
            ("tests", "lifecycle", true)
        );
        assert!(artifact(&line.replace("\"/r/t/lifecycle-1\"", "null")).is_none());
        assert!(artifact("{\"reason\":\"build-finished\"}").is_none());
        assert!(artifact("   Compiling x").is_none());
    }
}
