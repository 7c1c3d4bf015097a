//! The loads seen from the benchmark: run to their end, or standing by until dropped.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::watch::{bound, terminate};
use super::{going_on, load};

/// This program as a load.
pub(super) fn command(kind: &str, n: u64) -> Result<Command> {
    going_on()?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["load", kind, &n.to_string()]).stdin(Stdio::null());
    bound(&mut command);
    Ok(command)
}

/// Runs a load to its end; how long it took, and the CPU time of it and its children.
pub(super) fn spent(kind: &str, n: u64) -> Result<[Duration; 2]> {
    let begun = Instant::now();
    let child = command(kind, n)?.stdout(Stdio::null()).spawn()?;
    let mut status = 0;
    // SAFETY: of integers only, for which 0 is a value; both are valid for writing, and the child is ours and not reaped.
    let (reaped, used) = unsafe {
        let mut used: libc::rusage = std::mem::zeroed();
        (libc::wait4(child.id().cast_signed(), &raw mut status, 0, &raw mut used), used)
    };
    let took = begun.elapsed();
    ensure!(reaped > 0 && status == 0, "load {kind} {n} ended with status {status}");
    let time = |t: libc::timeval| Duration::new(t.tv_sec as u64, t.tv_usec as u32 * 1000);
    Ok([took, time(used.ru_utime) + time(used.ru_stime)])
}

/// Runs a load to its end; what it says.
pub(super) fn told<T: std::str::FromStr>(kind: &str, n: u64) -> Result<T> {
    let out = command(kind, n)?.stderr(Stdio::inherit()).output()?;
    ensure!(out.status.success(), "load {kind} {n} ended with {}", out.status);
    load::fact(&out.stdout)
}

/// One load on each processor; what they say, added up.
pub(super) fn everywhere(kind: &str, n: u64) -> Result<u64> {
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
pub(super) struct Standing {
    child: Child,
    input: Option<ChildStdin>,
    /// The process that it named.
    pub(super) named: u32,
}

impl Standing {
    pub(super) fn new(kind: &str, n: u64) -> Result<Self> {
        Self::marked(kind, n, None)
    }

    pub(super) fn marked(kind: &str, n: u64, mark: Option<&str>) -> Result<Self> {
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

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the family's head is gone, at most 30 s.
    pub(super) fn gone(&mut self) -> Result<()> {
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
