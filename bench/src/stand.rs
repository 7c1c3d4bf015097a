//! The loads seen from the benchmark: run to their end, or standing by until dropped.

use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::load;
use crate::stop::going_on;
use crate::watch::{bound, terminate};

/// This program as a load.
pub(crate) fn command(kind: &str, n: u64) -> Result<Command> {
    going_on()?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["load", kind, &n.to_string()]).stdin(Stdio::null());
    bound(&mut command);
    Ok(command)
}

/// Runs a load to its end; how long it took. `kept`: it and its children stay on one processor.
pub(crate) fn spent(kind: &str, n: u64, kept: bool) -> Result<Duration> {
    let mut command = command(kind, n)?;
    if kept {
        // SAFETY: the child calls nothing but what is async-signal-safe.
        unsafe { command.pre_exec(keep_to_last_processor) };
    }
    let begun = Instant::now();
    let status = command.stdout(Stdio::null()).status()?;
    ensure!(status.success(), "load {kind} {n} ended with {status}");
    Ok(begun.elapsed())
}

/// The last one that it may run on.
fn keep_to_last_processor() -> std::io::Result<()> {
    let size = size_of::<libc::cpu_set_t>();
    // SAFETY: a set is plain bits, and is valid for reading and writing.
    let done = unsafe {
        let (mut may, mut one): (libc::cpu_set_t, libc::cpu_set_t) = std::mem::zeroed();
        libc::sched_getaffinity(0, size, &raw mut may) == 0
            && (0..libc::CPU_SETSIZE as usize).rfind(|&n| libc::CPU_ISSET(n, &may)).is_some_and(|last| {
                libc::CPU_SET(last, &mut one);
                libc::sched_setaffinity(0, size, &raw const one) == 0
            })
    };
    if done { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Runs a load to its end; what it says.
pub(crate) fn told<T: std::str::FromStr>(kind: &str, n: u64) -> Result<T> {
    let out = command(kind, n)?.stderr(Stdio::inherit()).output()?;
    ensure!(out.status.success(), "load {kind} {n} ended with {}", out.status);
    load::fact(&out.stdout)
}

/// One load on each processor; what they say, added up.
pub(crate) fn everywhere(kind: &str, n: u64) -> Result<u64> {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let all: Vec<Child> = (0..processors)
        .map(|_| Ok(command(kind, n)?.stdout(Stdio::piped()).spawn()?))
        .collect::<Result<_>>()?;
    let mut sum = 0;
    for one in all {
        let out = one.wait_with_output()?;
        ensure!(out.status.success(), "load {kind} {n} ended with {}", out.status);
        sum += if out.stdout.is_empty() { n } else { load::fact(&out.stdout)? };
    }
    Ok(sum)
}

/// A load that waits beside the measurement, ended when dropped.
pub(crate) struct Standing {
    child: Child,
    input: Option<ChildStdin>,
    /// The process that it named.
    pub(crate) named: u32,
}

impl Standing {
    pub(crate) fn new(kind: &str, n: u64) -> Result<Self> {
        Self::marked(kind, n, None)
    }

    pub(crate) fn marked(kind: &str, n: u64, mark: Option<&str>) -> Result<Self> {
        let mut command = command(kind, n)?;
        let mut child = command.args(mark).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let input = child.stdin.take();
        let output = child.stdout.take().context("the load has no output")?;
        let mut standing = Self { child, input, named: 0 };
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line)?;
        let pid = line.strip_prefix("ready ").and_then(|l| l.trim().parse().ok());
        standing.named = pid.with_context(|| format!("load {kind} was not ready: {line:?}"))?;
        Ok(standing)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the family's head is gone, at most 30 s.
    pub(crate) fn gone(&mut self) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(30);
        while self.child.try_wait()?.is_none() {
            if Instant::now() > end {
                bail!("the family still lives");
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        // It ends its family when its stdin is closed.
        drop(self.input.take());
        let end = Instant::now() + Duration::from_secs(20);
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(2));
        }
        terminate(&mut self.child);
    }
}
