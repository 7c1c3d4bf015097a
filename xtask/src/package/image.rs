//! The image, really built and run: from the Containerfile as it is, on a base that debootstrap made where no registry of images
//! is asked, by podman with a storage of its own; run with the options that the Containerfile's first lines give. Host
//! folders are other ones: a bpffs, a state and a socket of its own under target/package.
//!
//! All of it happens in a mount namespace of one thread: when the thread ends, nothing is mounted.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;

use super::bare;
use super::steps::{empty, quiet};
use crate::{needs, root, vm};

const CONTAINERFILE: &str = "deploy/container/Containerfile";
const BASE: &str = "docker.io/library/debian:12-slim";
const IMAGE: &str = "jobwarden";
const READY_WITHIN: Duration = Duration::from_mins(1);

pub(super) fn run(deb: &Path, folder: &Path) -> Result<()> {
    let tree = match possible(folder).and_then(|()| bare::tree(folder)) {
        Ok(tree) => tree,
        Err(e) => {
            println!("SKIPPED: the image is not built: {e:#}");
            return Ok(());
        }
    };
    let at = folder.join("image");
    empty(&at)?;
    let podman = Podman { at: at.clone(), name: format!("jobwarden-package-{}", std::process::id()) };
    let thread = std::thread::scope(|s| s.spawn(|| podman.life(deb, &tree)).join());
    fs::remove_dir_all(&at).context("something of the image is left")?;
    let size = thread.map_err(|_| anyhow!("the check of the image panicked"))??;
    println!("the image ({size} MB) was built, run with a read-only root and few capabilities, and stopped");
    Ok(())
}

fn possible(folder: &Path) -> Result<()> {
    ensure!(
        root::is_root() && Path::new("/sys/kernel/btf/vmlinux").exists(),
        "needs root and a kernel with BTF"
    );
    if !needs::runs("podman", "--version") || !needs::runs("runc", "--version") {
        let packages = ["install", "-y", "--no-install-recommends", "podman", "runc"];
        quiet(Command::new("apt-get").args(packages)).context("no podman and runc (Debian's packages)")?;
    }
    // The Containerfile's own apt-get asks it.
    let release = format!("{}/dists/stable/InRelease", vm::machine_uri());
    let file = folder.join("InRelease");
    quiet(Command::new("/usr/lib/apt/apt-helper").args(["download-file", &release]).arg(&file))
        .context("the mirror is out of reach")?;
    fs::remove_file(file)?;
    Ok(())
}

/// podman with all that it keeps in one folder, and the one container.
struct Podman {
    at: PathBuf,
    name: String,
}

impl Podman {
    fn command(&self, command: &str) -> Command {
        let mut podman = Command::new("podman");
        for (option, folder) in [("--root", "storage"), ("--runroot", "run"), ("--tmpdir", "tmp")] {
            podman.arg(option).arg(self.at.join(folder));
        }
        podman.args(["--cgroup-manager=cgroupfs", "--storage-driver=vfs", "--runtime", "runc", command]);
        podman.stdin(Stdio::null());
        podman
    }

    /// Builds and runs; returns the image's size in MB.
    fn life(&self, deb: &Path, tree: &Path) -> Result<u64> {
        bare::private_mounts()?;
        // The machine's own storage is out of reach, and what podman keeps beside any storage comes here.
        fs::create_dir_all("/var/lib/containers")?;
        quiet(Command::new("mount").args(["-t", "tmpfs", "tmpfs", "/var/lib/containers"]))?;
        let size = self.build(deb, tree)?;
        let host = self.at.join("host");
        for folder in ["sys/fs/bpf", "var/lib/jobwarden", "run/jobwarden"] {
            fs::create_dir_all(host.join(folder))?;
        }
        let bpffs = host.join("sys/fs/bpf");
        quiet(Command::new("mount").args(["-t", "bpf", "bpf"]).arg(&bpffs))?;
        let log = self.at.join("log");
        let to = fs::File::create(&log)?;
        let mut container = self.run_as_told()?.stdout(to.try_clone()?).stderr(to).spawn()?;
        let works = self.works(&mut container, &bpffs);
        let stopped = quiet(self.command("stop").args(["--ignore", "--time", "20", &self.name]));
        if stopped.is_err() {
            quiet(self.command("rm").args(["--force", "--ignore", &self.name]))?;
        }
        let status = container.wait()?;
        quiet(self.command("rmi").args(["--all", "--force"]))?;
        let said = fs::read_to_string(&log)?;
        works.and(stopped).context(said)?;
        ensure!(status.success(), "stopped, the agent in the container ended {status}");
        Ok(size)
    }

    fn build(&self, deb: &Path, tree: &Path) -> Result<u64> {
        let base = self.at.join("base.tar");
        let mut tar = Command::new("tar");
        tar.arg("-C").arg(tree).args(["--exclude=./var/cache/apt", "--exclude=./var/lib/apt/lists", "-cf"]);
        quiet(tar.arg(&base).arg("."))?;
        quiet(self.command("import").arg(&base).arg(BASE))?;
        // What the first lines call target/package, with the one package that is meant.
        let context = self.at.join("context");
        fs::create_dir(&context)?;
        fs::copy(deb, context.join(deb.file_name().context("a package without a name")?))?;
        let mut build = self.command("build");
        build.args(["--pull=never", "--network=host", "--isolation=chroot", "--layers=false"]);
        quiet(build.args(["-t", IMAGE, "-f"]).arg(root::dir().join(CONTAINERFILE)).arg(&context))?;
        let out = self.command("image").args(["inspect", IMAGE]).output()?;
        let image: Value = serde_json::from_slice(&out.stdout).context("podman image inspect")?;
        ensure!(image[0]["Config"]["Entrypoint"][0] == "/usr/bin/jobwarden", "{image}");
        Ok(image[0]["Size"].as_u64().context("no size")? / 1_000_000)
    }

    /// `podman run` as the Containerfile tells it, with these host folders and a free port.
    fn run_as_told(&self) -> Result<Command> {
        let text = fs::read_to_string(root::dir().join(CONTAINERFILE))?;
        let mut run = self.command("run");
        run.args(["--pull=never", "--name", &self.name]);
        run.args(["--ulimit", "nofile=4096:4096", "--ulimit", "nproc=4096:4096"]);
        let had = bounding()?;
        for word in told(&text)? {
            if let Some(capability) = word.strip_prefix("--cap-add=") {
                // What is missing on this machine cannot be given (SYS_RESOURCE: only kernels before 5.11 need it).
                let number = number(capability)
                    .with_context(|| format!("{capability} is none that the agent needs"))?;
                if had & 1 << number == 0 {
                    println!("the image is run without {capability}, which this machine does not have");
                    continue;
                }
            }
            let host = word.split_once(':').filter(|_| word.starts_with('/'));
            match host {
                Some((host, inside)) => run.arg(format!("{}{host}:{inside}", self.at.join("host").display())),
                None => run.arg(&word),
            };
        }
        run.args(["agent", "--listen", "127.0.0.1:0"]);
        Ok(run)
    }

    fn works(&self, container: &mut Child, bpffs: &Path) -> Result<()> {
        let end = Instant::now() + READY_WITHIN;
        while !self.inside(&["status"]).is_ok_and(|s| s["synced"] == true) {
            if let Some(status) = container.try_wait()? {
                bail!("the container ended {status}");
            }
            ensure!(
                Instant::now() < end,
                "the agent in the container is not ready: {:?}",
                self.inside(&["status"])
            );
            std::thread::sleep(Duration::from_millis(200));
        }
        let doctor = self.inside(&["doctor"])?;
        ensure!(doctor["ok"] == true, "{doctor}");
        // This very program, which runs outside.
        let (pid, name) = (std::process::id(), fs::read_to_string("/proc/self/comm")?);
        let tree = self.inside(&["tree", &pid.to_string()])?;
        let own = tree["processes"].as_array().into_iter().flatten().find(|p| p["pid"] == pid);
        let own = own.context("it does not see a process of the host")?;
        ensure!(own["comm"] == name.trim() && own["container"].is_null(), "{own}");
        ensure!(fs::read_dir(bpffs.join("jobwarden"))?.count() > 0, "no pins in the host's bpffs");
        ensure!(
            self.at.join("host/run/jobwarden/jobwarden.sock").exists(),
            "no socket for the host's clients"
        );
        let write = self.command("exec").args([&self.name, "touch", "/usr/bin/probe"]).output()?;
        let said = String::from_utf8_lossy(&write.stderr);
        ensure!(!write.status.success() && said.contains("Read-only"), "its root can be written: {said}");
        Ok(())
    }

    /// A command of the client in the container.
    fn inside(&self, args: &[&str]) -> Result<Value> {
        let mut exec = self.command("exec");
        let out = exec.args([&self.name, "/usr/bin/jobwarden", "--json"]).args(args).output()?;
        let said = || String::from_utf8_lossy(&[out.stdout.as_slice(), &out.stderr].concat()).into_owned();
        serde_json::from_slice(&out.stdout).with_context(said)
    }
}

/// The words of `podman run` in the first lines, options and image.
fn told(text: &str) -> Result<Vec<String>> {
    let lines = text.lines().map_while(|l| l.strip_prefix('#')).skip_while(|l| !l.contains("podman run"));
    let mut words = Vec::new();
    for line in lines {
        let (line, more) = line.strip_suffix('\\').map_or((line, false), |l| (l, true));
        words.extend(line.split_whitespace().map(str::to_owned));
        if !more {
            break;
        }
    }
    ensure!(
        words.last().is_some_and(|w| w == IMAGE),
        "{CONTAINERFILE} does not tell how to run it: {words:?}"
    );
    Ok(words.split_off(2))
}

/// Those that the agent needs, by their numbers (capability.h).
fn number(capability: &str) -> Option<u32> {
    let known = [
        ("DAC_READ_SEARCH", 2),
        ("KILL", 5),
        ("SETPCAP", 8),
        ("SYS_PTRACE", 19),
        ("SYS_NICE", 23),
        ("SYS_RESOURCE", 24),
        ("PERFMON", 38),
        ("BPF", 39),
    ];
    known.iter().find(|k| k.0 == capability).map(|k| k.1)
}

/// The capabilities that this machine lets one have.
fn bounding() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let set = status.lines().find_map(|l| l.strip_prefix("CapBnd:")).context("no CapBnd")?;
    Ok(u64::from_str_radix(set.trim(), 16)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_options_are_read_from_the_first_lines() {
        let text =
            "# It:\n#   podman build x\n#   podman run --rm \\\n#     -v /a:/b jobwarden\n# More.\nFROM x\n";
        assert_eq!(told(text).expect("options"), ["--rm", "-v", "/a:/b", "jobwarden"]);
        assert!(told("FROM x\n").is_err());
    }
}
