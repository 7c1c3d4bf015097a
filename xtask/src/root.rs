//! Where things are, and how a program is run as root. Starts nothing itself.

use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

/// The top folder of this repository.
pub(crate) fn dir() -> PathBuf {
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    manifest.parent().map_or(manifest.clone(), Path::to_path_buf)
}

/// What only this repository's tools write, ignored by git.
pub(crate) fn target() -> PathBuf {
    dir().join("target")
}

/// Whether the effective uid is 0: /proc/self belongs to it.
pub(crate) fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0)
}

/// Whether nobody is there to answer, and missing packages may be installed.
pub(crate) fn is_ci() -> bool {
    std::env::var_os("CI").is_some_and(|v| !v.is_empty() && v != "false")
}

/// A command that runs `program` as root: itself when the caller is root, else through sudo, with `env` kept.
pub(crate) fn command<'a>(
    program: impl AsRef<OsStr>,
    env: impl IntoIterator<Item = (&'a str, String)>,
) -> Command {
    if is_root() {
        let mut command = Command::new(program);
        command.envs(env);
        return command;
    }
    let mut command = Command::new("sudo");
    // sudo drops the environment; `env` behind it gives back what the program must see.
    command.arg("env");
    for (key, value) in env {
        command.arg(format!("{key}={value}"));
    }
    command.arg(program);
    command
}

/// Starts a program and from then on leaves Ctrl-C to it, which gets it from the terminal too and stops in order.
pub(crate) fn spawn_for_terminal(command: &mut Command) -> std::io::Result<Child> {
    let child = command.spawn()?;
    // SAFETY: SIG_IGN is a valid disposition for SIGINT, and no handler of this process is replaced.
    unsafe {
        libc::signal(libc::SIGINT, libc::SIG_IGN);
    }
    Ok(child)
}
