//! The package under a systemd that is PID 1: a Debian with systemd is booted in QEMU, and the package is installed there by
//! dpkg while it runs. What is asked of it stands in `guest.rs`: this same program, started there as a unit.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::bare;
use super::steps::{empty, quiet};
use crate::vm::{self, Boot, End, Initramfs};
use crate::{needs, root};

/// Debian's own for its current stable release; cgroup v2 alone, as systemd mounts it.
const KERNEL: &str = "6.12";
const SILENCE: Duration = Duration::from_mins(6);
/// What nobody reads there.
const BARE: [&str; 10] = [
    "usr/share/doc",
    "usr/share/man",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/i18n",
    "usr/share/zoneinfo",
    "usr/lib/x86_64-linux-gnu/gconv",
    "var/cache",
    "var/lib/apt",
    "var/log",
];

/// Says how it went on the second serial port, as the VMs of the scenarios do, and ends the machine.
const UNIT: &str = "\
[Unit]
Description=What is asked of the package
SuccessAction=reboot-force
FailureAction=reboot-force

[Service]
Type=oneshot
StandardOutput=file:/dev/ttyS1
StandardError=inherit
ExecStart=/bin/sh -c '/usr/bin/xtask guest; echo \"VM-RC $$?\"'
";

pub(super) fn run([deb, next]: [&Path; 2], folder: &Path) -> Result<()> {
    let made =
        needs::check(&needs::for_vm()).and_then(|()| Ok((tree(folder)?, vm::kernels(&[KERNEL.to_owned()])?)));
    let (tree, kernels) = match made {
        Ok(made) => made,
        Err(e) => {
            println!("SKIPPED: package under systemd as PID 1: {e:#}");
            return Ok(());
        }
    };
    let image = folder.join("systemd.cpio");
    let size = pack(&tree, deb, next, &image)?;
    let boot = Boot {
        kernel: kernels.first().context("no kernel")?,
        initramfs: &image,
        // Unpacking holds the archive and the files at once.
        memory_mib: 320 + 2 * (size as u64 >> 20),
        silence: SILENCE,
        deadline: None,
        append: "systemd.getty_auto=no",
        logs: folder.join("systemd-logs"),
    };
    let end = boot.run(|line| println!("[systemd] {line}"));
    fs::remove_file(&image)?;
    let end = end?;
    ensure!(end == End::Status(0), "the package under systemd as PID 1: {end:?}");
    Ok(())
}

/// The bare tree with systemd, what the package depends on and a Python to look into, made where there is none yet.
fn tree(folder: &Path) -> Result<PathBuf> {
    ensure!(root::is_root(), "needs root");
    let bare = bare::tree(folder)?;
    let tree = PathBuf::from(format!("{}-systemd", bare.display()));
    if tree.exists() {
        return Ok(tree);
    }
    let half = PathBuf::from(format!("{}.new", tree.display()));
    empty(&half)?;
    quiet(Command::new("cp").arg("-a").arg(bare.join(".")).arg(&half))?;
    // The bare tree's lists may be old, and name what the mirror has no more.
    quiet(bare::chroot(&half, "apt-get").arg("update")).context("the mirror is out of reach")?;
    let mut apt = bare::chroot(&half, "apt-get");
    apt.args([
        "install",
        "-y",
        "--no-install-recommends",
        "systemd-sysv",
        "ca-certificates",
        "python3-minimal",
    ]);
    quiet(&mut apt)?;
    fs::rename(&half, &tree)?;
    Ok(tree)
}

/// Writes the guest's root and returns its size in bytes.
fn pack(tree: &Path, deb: &Path, next: &Path, image: &Path) -> Result<usize> {
    let mut root = Initramfs::new();
    root.symlink(Path::new("/init"), "usr/lib/systemd/systemd");
    let units = Path::new("/etc/systemd/system");
    root.file(&units.join("check.service"), 0o644, UNIT.as_bytes());
    root.symlink(&units.join("multi-user.target.wants/check.service"), "../check.service");
    root.tree(tree, &BARE)?;
    root.host_file_as(&std::env::current_exe()?, Path::new("/usr/bin/xtask"))?;
    for (from, to) in [(deb, "/root/one.deb"), (next, "/root/next.deb")] {
        root.file(Path::new(to), 0o644, &fs::read(from)?);
    }
    root.write(image)
}
