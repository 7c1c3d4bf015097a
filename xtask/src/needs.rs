//! What a subcommand needs from this machine, checked before anything is built. What is missing is installed, by sudo where
//! the caller is not root, and named first; with `--no-setup` nothing is changed, and an error names what to run.

use std::collections::BTreeSet;
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, bail};

use crate::root;

/// One thing that is needed, as found.
#[derive(Clone, Debug)]
pub(crate) struct Need {
    what: String,
    met: fn() -> bool,
    mend: Mend,
}

/// What provides it.
#[derive(Clone, Copy, Debug)]
enum Mend {
    /// Debian's packages.
    Packages(&'static [&'static str]),
    /// A command, run as it is, as root where it begins with `sudo`.
    Command(&'static str),
    /// Only the operator can.
    ByHand(&'static str),
}

impl Mend {
    fn text(self) -> String {
        match self {
            Self::Packages(names) => {
                format!("sudo apt-get install -y --no-install-recommends {}", names.join(" "))
            }
            Self::Command(text) | Self::ByHand(text) => text.to_owned(),
        }
    }
}

const MIN_KERNEL: (u32, u32) = (5, 10);

fn need(what: &str, met: fn() -> bool, mend: Mend) -> Need {
    Need { what: what.to_owned(), met, mend }
}

/// For building and for running the agent.
pub(crate) fn for_agent() -> Vec<Need> {
    vec![
        need(
            "the Rust toolchain of rust-toolchain.toml",
            has_toolchain,
            Mend::Command("rustup toolchain install"),
        ),
        need("a C compiler", || runs("cc", "--version"), Mend::Packages(&["build-essential"])),
        need("Linux 5.10 or later", new_enough, Mend::ByHand("boot a newer kernel")),
        need(
            "the kernel's BTF (/sys/kernel/btf/vmlinux)",
            || Path::new("/sys/kernel/btf/vmlinux").exists(),
            Mend::ByHand(
                "boot a kernel built with CONFIG_DEBUG_INFO_BTF=y, as every current distribution's is",
            ),
        ),
        need(
            "root, or sudo",
            || root::is_root() || runs("sudo", "--version"),
            Mend::ByHand("su -c 'apt-get install sudo'"),
        ),
        need("bpffs", has_bpffs, Mend::Command("sudo mount -t bpf bpf /sys/fs/bpf")),
    ]
}

/// For booting other kernels.
pub(crate) fn for_vm() -> Vec<Need> {
    let qemu = Mend::Packages(&["qemu-system-x86"]);
    vec![
        need("QEMU (qemu-system-x86_64)", || runs("qemu-system-x86_64", "--version"), qemu),
        need("a static busybox", has_static_busybox, Mend::Packages(&["busybox-static"])),
        need("binutils", || runs("strip", "--version"), Mend::Packages(&["binutils"])),
        need("dpkg-deb", || runs("dpkg-deb", "--version"), Mend::Packages(&["dpkg"])),
    ]
}

/// For the demo's worker.
pub(crate) fn for_demo() -> Need {
    need("Python 3", || runs("python3", "--version"), Mend::Packages(&["python3"]))
}

/// For the tests of an ordinary run: without one of them the tests that use it are skipped, each by its name.
pub(crate) fn for_tests() -> Vec<Need> {
    vec![
        for_demo(),
        need("PyYAML", || runs_with("python3", &["-c", "import yaml"]), Mend::Packages(&["python3-yaml"])),
        need("openssl", || runs("openssl", "version"), Mend::Packages(&["openssl", "ca-certificates"])),
        need("runc", || runs("runc", "--version"), Mend::Packages(&["runc"])),
        need("podman", || runs("podman", "--version"), Mend::Packages(&["podman", "runc"])),
        need("systemd-analyze", || runs("systemd-analyze", "--version"), Mend::Packages(&["systemd"])),
        need("unshare", || runs("unshare", "--version"), Mend::Packages(&["util-linux"])),
        need("procps", || runs("ps", "--version"), Mend::Packages(&["procps"])),
    ]
}

static NO_SETUP: AtomicBool = AtomicBool::new(false);

/// From here on nothing is installed on this machine (`--no-setup`).
pub(crate) fn forbid_setup() {
    NO_SETUP.store(true, Ordering::Relaxed);
}

/// Whether something may be installed on this machine.
pub(crate) fn may_set_up() -> bool {
    !NO_SETUP.load(Ordering::Relaxed) && (root::is_root() || runs("sudo", "--version"))
}

/// Installs what is missing. An error names everything that still is, with what mends it.
pub(crate) fn check(needs: &[Need]) -> Result<()> {
    let missing = missing(needs);
    if missing.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> =
        missing.iter().map(|n| format!("  missing: {}\n  to mend it: {}", n.what, n.mend.text())).collect();
    bail!("this machine lacks something\n{}", lines.join("\n"))
}

/// What is missing after the installation of what can be installed.
pub(crate) fn missing(needs: &[Need]) -> Vec<&Need> {
    let unmet = || needs.iter().filter(|n| !(n.met)()).collect::<Vec<_>>();
    let missing = unmet();
    if missing.is_empty() || !may_set_up() {
        return missing;
    }
    let mut packages = BTreeSet::new();
    for need in missing {
        match need.mend {
            Mend::Packages(names) => packages.extend(names),
            Mend::Command(text) => {
                println!("missing: {}; running: {text}", need.what);
                run(text.strip_prefix("sudo ").unwrap_or(text), text.starts_with("sudo "));
            }
            Mend::ByHand(_) => {}
        }
    }
    install(&packages);
    unmet()
}

/// Installs by apt without starting any daemon that the packages bring: a `policy-rc.d` that forbids it stands there for that
/// time, unless the machine has one of its own. The package lists are fetched only where the packages are not found in them.
const INSTALL: &str = r#"
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
  trap 'rm -f $policy' EXIT
  trap 'exit 1' HUP INT TERM
  printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy
fi
export DEBIAN_FRONTEND=noninteractive
install() { apt-get -q install -y --no-install-recommends "$@" >/dev/null; }
install "$@" 2>/dev/null || { apt-get -q update >/dev/null && install "$@"; }
"#;

fn install(packages: &BTreeSet<&str>) {
    if packages.is_empty() || !runs("apt-get", "--version") {
        return;
    }
    let names: Vec<&str> = packages.iter().copied().collect();
    let how = if root::is_root() { "" } else { " by sudo" };
    println!("installing{how}: {} (--no-setup leaves it)", names.join(", "));
    let mut command = root::command("sh", []);
    command.args(["-c", INSTALL, "sh"]).args(&names).stdin(Stdio::null());
    if !command.status().is_ok_and(|s| s.success()) {
        eprintln!("they could not be installed: apt-get says above why");
    }
}

fn run(command: &str, as_root: bool) {
    let mut sh = if as_root { root::command("sh", []) } else { Command::new("sh") };
    let done =
        sh.args(["-c", command]).current_dir(root::dir()).stdin(Stdio::null()).stdout(Stdio::null()).status();
    if !done.is_ok_and(|s| s.success()) {
        eprintln!("`{command}` failed");
    }
}

impl std::fmt::Display for Need {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.what, self.mend.text())
    }
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
    runs_with(program, &[arg])
}

fn runs_with(program: &str, args: &[&str]) -> bool {
    let quiet = Command::new(program)
        .args(args)
        // Where the path of a user ends, and what the tests run as root.
        .env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    quiet.is_ok_and(|s| s.success())
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
        let moon = |met| need("a moon", met, Mend::ByHand("wait"));
        check(&[moon(|| true)]).expect("met");
        let error = check(&[moon(|| false)]).expect_err("missing").to_string();
        assert!(error.contains("missing: a moon") && error.contains("to mend it: wait"), "{error}");
        let package = need("a sun", || false, Mend::Packages(&["sun", "sky"]));
        assert_eq!(package.to_string(), "a sun (sudo apt-get install -y --no-install-recommends sun sky)");
    }

    #[test]
    fn a_port_in_use_is_refused_with_a_free_one() {
        let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
        let at = taken.local_addr().expect("bound");
        let error = check_port(at).expect_err("taken").to_string();
        assert!(error.contains(&at.to_string()) && error.contains("--listen 127.0.0.1:"), "{error}");
    }
}
