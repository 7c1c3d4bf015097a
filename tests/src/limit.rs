//! A cgroup of a test's own, under a limit of processes: without one no bomb is thrown.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};

use crate::{Ground, eventually, loudly, ms};

/// A cgroup with a `pids` limit, named as its test's tag. Removed when this is dropped, so all in it must have ended.
pub struct Limit(PathBuf);

impl Limit {
    /// None where there is no such controller.
    #[must_use]
    pub fn new(ground: &Ground, max: u32) -> Option<Self> {
        ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"].iter().find_map(|root| {
            let dir = Path::new(root).join(&ground.tag);
            std::fs::create_dir(&dir).ok()?;
            let limit = Self(dir);
            std::fs::write(limit.0.join("pids.max"), max.to_string()).ok().map(|()| limit)
        })
    }

    /// Whoever is written to this file is in it.
    #[must_use]
    pub fn procs(&self) -> PathBuf {
        self.0.join("cgroup.procs")
    }

    /// The command will be within the limit from its first instruction.
    pub fn holds(&self, c: &mut Command) {
        let procs = self.procs();
        // SAFETY: the child has one thread; open, write and close are all that happens.
        unsafe { c.pre_exec(move || std::fs::write(&procs, "0")) };
    }

    /// Nobody is in it, by the kernel's own count, which misses nobody: also the last zombie is reaped.
    pub fn empty(&self) -> Result<()> {
        eventually("an empty cgroup", ms(5000), || {
            let left = std::fs::read_to_string(self.0.join("pids.current"))?;
            ensure!(left.trim() == "0", "{left} are in it: {:?}", std::fs::read_to_string(self.procs())?);
            Ok(())
        })
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        let gone = eventually("rmdir", ms(5000), || Ok(std::fs::remove_dir(&self.0)?));
        if let Err(e) = gone {
            loudly(&format!("{}: {e:#}", self.0.display()));
        }
    }
}
