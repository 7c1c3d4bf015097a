//! A cgroup of a test's own, under a limit of processes: without one no bomb is thrown.

use std::path::{Path, PathBuf};

use anyhow::Result;

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

    /// How many processes and threads are in it: the kernel's own count, which misses nobody.
    pub fn count(&self) -> Result<u32> {
        Ok(std::fs::read_to_string(self.0.join("pids.current"))?.trim().parse()?)
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
