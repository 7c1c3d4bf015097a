//! What a test stands on: a folder of its own, a token that marks all it starts, and the check at the end that
//! nothing of it was left behind.
//!
//! Signals go only to processes whose environment carries the token, by pidfd, looked at again after it was opened.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::str::FromStr;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::wait::{eventually, loudly, ms};

const TOKEN: &str = "JWTEST_TOKEN";

/// Why no agent can run here, if so.
#[must_use]
pub fn missing() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        Some("needs root")
    } else if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        Some("this kernel has no BTF (/sys/kernel/btf/vmlinux)")
    } else {
        None
    }
}

/// Where the pids controller is: v1's hierarchy, or v2's.
pub(crate) const PIDS: [&str; 2] = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"];

/// The folder of the compiled programs: beside the test binary's `deps`, or `JWTEST_BIN`.
fn programs() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("JWTEST_BIN") {
        return Ok(dir.into());
    }
    let exe = std::env::current_exe()?;
    let dir = exe.parent().context("a test binary without a folder")?;
    Ok(if dir.ends_with("deps") { dir.parent().unwrap_or(dir) } else { dir }.to_owned())
}

/// A compiled program: `jobwarden`, `shape-fork`, ..
pub fn program(name: &str) -> Result<PathBuf> {
    let path = programs()?.join(name);
    if !path.exists() {
        bail!("{} is missing: `cargo build --workspace` first (cargo xtask test does)", path.display());
    }
    Ok(path)
}

/// Declare it first in a test: it is dropped last, and then all that the test started must be gone.
pub struct Fixture {
    test: String,
    /// Random; in the environment and the argv of all that the test starts. A rule of the test matches on it.
    pub tag: String,
    dir: tempfile::TempDir,
}

impl Fixture {
    pub fn new(test: &str) -> Result<Self> {
        let mut b = [0u8; 8];
        std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut b)?;
        let tag = format!("jwt-{:016x}", u64::from_ne_bytes(b));
        Ok(Self { test: test.into(), tag, dir: tempfile::Builder::new().prefix("jwt-").tempdir()? })
    }

    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A command marked with the token. It ends with the thread that starts it, should the test be killed.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut c = Command::new(program);
        c.env(TOKEN, &self.tag).env_remove("JOBWARDEN_SOCKET").current_dir(self.dir.path());
        // SAFETY: prctl is async-signal-safe.
        unsafe {
            c.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        c
    }

    /// Live processes that carry the token.
    #[must_use]
    pub fn alive(&self) -> Vec<i32> {
        let Ok(dir) = std::fs::read_dir("/proc") else { return Vec::new() };
        dir.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok()).filter(|&p| self.carries(p)).collect()
    }

    fn carries(&self, pid: i32) -> bool {
        let mark = format!("{TOKEN}={}", self.tag);
        // Empty for zombies and kernel threads.
        std::fs::read(format!("/proc/{pid}/environ"))
            .is_ok_and(|b| b.split(|&c| c == 0).any(|v| v == mark.as_bytes()))
    }

    /// Signals a process, if it carries the token.
    pub fn signal(&self, pid: i32, signal: Signal) -> Result<()> {
        let raw = Pid::from_raw(pid).context("no pid")?;
        let fd = pidfd_open(raw, PidfdFlags::empty()).with_context(|| format!("pidfd_open {pid}"))?;
        // After it was opened: the pid may have been somebody else's before.
        if !self.carries(pid) {
            bail!("{pid} was not started by this test");
        }
        Ok(pidfd_send_signal(fd, signal)?)
    }

    /// Ends all that carry the token.
    #[must_use]
    pub fn clear(&self) -> Vec<String> {
        let mut names = Vec::new();
        for pid in self.alive() {
            let argv = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let argv = String::from_utf8_lossy(&argv).replace('\0', " ");
            if self.signal(pid, Signal::KILL).is_ok() {
                names.push(format!("{pid} {argv}"));
            }
        }
        names
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        let end = Instant::now() + ms(1500);
        while !self.alive().is_empty() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(10));
        }
        let left = self.clear();
        while !self.alive().is_empty() && Instant::now() < end + ms(1000) {
            std::thread::sleep(Duration::from_millis(10));
            let _ = self.clear();
        }
        if left.is_empty() {
            return;
        }
        remove_left(&self.tag);
        let text = format!("{}: left behind (ended now): {}", self.test, left.join("; "));
        if std::thread::panicking() {
            loudly(&text);
        } else {
            panic!("{text}");
        }
    }
}

/// A running helper program: its facts, its steps, its end.
pub struct Shape {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    facts: BTreeMap<String, Vec<String>>,
}

impl Shape {
    /// Starts `shape-NAME ARGS.. TAG`.
    pub fn start(fixture: &Fixture, name: &str, args: &[&str]) -> Result<Self> {
        let mut c = fixture.command(program(&format!("shape-{name}"))?);
        c.args(args).arg(&fixture.tag);
        Self::spawn(name, c)
    }

    /// Runs a prepared command as a helper.
    pub fn spawn(name: &str, mut c: Command) -> Result<Self> {
        let mut child = c
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {name}"))?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().context("no stdout")?;
        let (tx, lines) = channel();
        // Ends when the last process that holds the helper's stdout does.
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if tx.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { name: name.into(), child, stdin, lines, facts: BTreeMap::new() })
    }

    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn take(&mut self, line: &str) {
        if let Some((name, value)) = line.split_once('=') {
            self.facts.entry(name.into()).or_default().push(value.into());
        }
    }

    /// All values of a fact, once there are `n`.
    pub fn facts<T: FromStr>(&mut self, name: &str, n: usize) -> Result<Vec<T>> {
        let end = Instant::now() + ms(20_000);
        while self.facts.get(name).map_or(0, Vec::len) < n {
            if let Some(why) = self.facts.get("failed") {
                bail!("{} failed: {}", self.name, why.join("; "));
            }
            let left = end.saturating_duration_since(Instant::now());
            let line = self
                .lines
                .recv_timeout(left)
                .with_context(|| format!("{}: no {name} among {:?}", self.name, self.facts))?;
            self.take(&line);
        }
        self.facts[name]
            .iter()
            .map(|v| v.parse().ok().with_context(|| format!("{}: {name}={v}", self.name)))
            .collect()
    }

    /// A fact, waited for.
    pub fn fact<T: FromStr>(&mut self, name: &str) -> Result<T> {
        self.facts(name, 1)?.into_iter().next_back().context("no fact")
    }

    /// Lets it go on.
    pub fn step(&mut self) -> Result<()> {
        let stdin = self.stdin.as_mut().context("stdin is closed")?;
        stdin.write_all(b"\n").with_context(|| format!("step of {}", self.name))
    }

    /// Closes its stdin: whoever lingers ends.
    pub fn close(&mut self) {
        self.stdin = None;
    }

    /// Whether it has ended, and how; it is reaped by this.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits for its end with stdin left as it is.
    pub fn wait(&mut self, within: Duration) -> Result<ExitStatus> {
        let name = self.name.clone();
        eventually(&format!("end of {name}"), within, || self.ended()?.context("it still runs"))
    }

    /// Closes stdin and waits for the end.
    pub fn finish(mut self) -> Result<ExitStatus> {
        self.close();
        self.wait(ms(10_000))
    }

    /// Kills it (not what it started) and reaps it: the raw wait status.
    pub fn kill(mut self) -> Result<i32> {
        self.child.kill()?;
        Ok(self.child.wait()?.into_raw())
    }
}

impl Drop for Shape {
    fn drop(&mut self) {
        self.close();
        // Not reaped by us yet, so the pid is its own; what it started ends with stdin or is ended by the ground.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a failed test's [`crate::Limit`] could not remove, since somebody was left in it: by now that one is ended.
fn remove_left(tag: &str) {
    for dir in PIDS.iter().map(|r| Path::new(r).join(tag)).filter(|d| d.exists()) {
        if let Err(e) = eventually("rmdir", ms(2000), || Ok(std::fs::remove_dir(&dir)?)) {
            loudly(&format!("{}: {e:#}", dir.display()));
        }
    }
}
