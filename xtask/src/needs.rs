//! What a subcommand needs from this machine, looked at before anything is built, and the one command that mends
//! what is missing. Under CI, as root, that command is run; otherwise nothing is changed.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::root;

/// One thing that is needed, as found.
#[derive(Clone, Debug)]
pub(crate) struct Need {
    what: String,
    met: fn() -> bool,
    /// The command that mends it, as root where it starts with `apt-get`, `mount`.
    mend: &'static str,
    /// Whether CI may run it.
    automatic: bool,
}

const MIN_KERNEL: (u32, u32) = (5, 10);

/// For building and for running the agent.
pub(crate) fn for_agent() -> Vec<Need> {
    let need = |what: &str, met, mend, automatic| Need { what: what.to_owned(), met, mend, automatic };
    vec![
        need("the Rust toolchain of rust-toolchain.toml", has_toolchain, "rustup toolchain install", true),
        need("a C compiler", || runs("cc", "--version"), "sudo apt-get install -y build-essential", true),
        need("Linux 5.10 or later", new_enough, "boot a newer kernel", false),
        need(
            "the kernel's BTF (/sys/kernel/btf/vmlinux)",
            || Path::new("/sys/kernel/btf/vmlinux").exists(),
            "boot a kernel built with CONFIG_DEBUG_INFO_BTF=y, as every current distribution's is",
            false,
        ),
        need(
            "root, or sudo",
            || root::is_root() || runs("sudo", "--version"),
            "su -c 'apt-get install sudo'",
            false,
        ),
        need("bpffs", has_bpffs, "sudo mount -t bpf bpf /sys/fs/bpf", true),
    ]
}

/// For booting other kernels.
pub(crate) fn for_vm() -> Vec<Need> {
    let mend = "sudo apt-get install -y --no-install-recommends qemu-system-x86 busybox-static binutils dpkg";
    let need = |what: &str, met| Need { what: what.to_owned(), met, mend, automatic: true };
    vec![
        need("QEMU (qemu-system-x86_64)", || runs("qemu-system-x86_64", "--version")),
        need("a static busybox", has_static_busybox),
        need("dpkg-deb", || runs("dpkg-deb", "--version")),
    ]
}

/// For the demo's worker.
pub(crate) fn for_demo() -> Need {
    Need {
        what: "Python 3".to_owned(),
        met: || runs("python3", "--version"),
        mend: "sudo apt-get install -y python3",
        automatic: true,
    }
}

/// An error that names everything that is missing with what mends it.
pub(crate) fn check(needs: &[Need]) -> Result<()> {
    let mut missing: Vec<&Need> = needs.iter().filter(|n| !(n.met)()).collect();
    if root::is_ci() && root::is_root() {
        let mut ran: Vec<&str> = Vec::new();
        for need in missing.iter().filter(|n| n.automatic) {
            if !ran.contains(&need.mend) {
                ran.push(need.mend);
                mend(need)?;
            }
        }
        missing.retain(|n| !(n.met)());
    }
    if missing.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> =
        missing.iter().map(|n| format!("  missing: {}\n  to mend it: {}", n.what, n.mend)).collect();
    bail!("this machine lacks something\n{}", lines.join("\n"))
}

/// Whether nobody listens there yet.
pub(crate) fn check_port(listen: SocketAddr) -> Result<()> {
    if TcpListener::bind(listen).is_ok() {
        return Ok(());
    }
    let free = TcpListener::bind((listen.ip(), 0))?.local_addr()?;
    bail!("something listens on {listen} already\n  to mend it: cargo xtask run --listen {free}")
}

/// Whether `program ARG` starts and ends well.
pub(crate) fn runs(program: &str, arg: &str) -> bool {
    let quiet = Command::new(program)
        .arg(arg)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    quiet.is_ok_and(|s| s.success())
}

fn mend(need: &Need) -> Result<()> {
    println!("missing: {}; running: {}", need.what, need.mend);
    let command = need.mend.strip_prefix("sudo ").unwrap_or(need.mend);
    let done = Command::new("sh")
        .args(["-c", command])
        .env("DEBIAN_FRONTEND", "noninteractive")
        .current_dir(root::dir())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .context("sh could not be started")?;
    if !done.success() {
        eprintln!("`{command}` failed ({done})");
    }
    Ok(())
}

fn has_toolchain() -> bool {
    let rustc = Command::new("rustc").arg("--version").current_dir(root::dir()).output();
    let version = rustc.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    numbers(version.trim_start_matches("rustc ")).is_some_and(|v| v >= (1, 95))
}

fn new_enough() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    numbers(&release).is_some_and(|v| v >= MIN_KERNEL)
}

/// The first two numbers of a version.
fn numbers(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Mounted, or known to the kernel: then the agent mounts it itself.
fn has_bpffs() -> bool {
    let listed = |file: &str| fs::read_to_string(file).is_ok_and(|t| t.lines().any(|l| l.ends_with("\tbpf")));
    let mounted = fs::read_to_string("/proc/mounts")
        .is_ok_and(|t| t.lines().any(|l| l.split_whitespace().nth(2) == Some("bpf")));
    mounted || listed("/proc/filesystems")
}

fn has_static_busybox() -> bool {
    let ldd = Command::new("ldd").arg("/bin/busybox").stdin(Stdio::null()).output();
    Path::new("/bin/busybox").exists() && ldd.is_ok_and(|o| !o.status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_compared_by_number() {
        assert!(numbers("5.10.0-30-cloud-amd64").expect("a version") >= MIN_KERNEL);
        assert!(numbers("5.9.16").expect("a version") < MIN_KERNEL);
        assert!(numbers("6.1").expect("a version") >= MIN_KERNEL);
        assert!(numbers("unknown").is_none());
    }

    #[test]
    fn what_is_missing_is_named_with_what_mends_it() {
        let need = |met| Need { what: "a moon".to_owned(), met, mend: "wait", automatic: false };
        check(&[need(|| true)]).expect("met");
        let error = check(&[need(|| false)]).expect_err("missing").to_string();
        assert!(error.contains("missing: a moon") && error.contains("to mend it: wait"), "{error}");
    }

    #[test]
    fn a_port_in_use_is_refused_with_a_free_one() {
        let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
        let at = taken.local_addr().expect("bound");
        let error = check_port(at).expect_err("taken").to_string();
        assert!(error.contains(&at.to_string()) && error.contains("--listen 127.0.0.1:"), "{error}");
    }
}
