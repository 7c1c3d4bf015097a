//! A cgroup of a test's own, under a limit of processes: without one no bomb is thrown.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};

use crate::fixture::{Fixture, PIDS};
use crate::wait::{eventually, loudly, ms};

/// A cgroup with a `pids` limit, named as its test's tag. Removed when this is dropped, so all in it must have ended.
pub struct Limit {
    dir: PathBuf,
    /// A folder that was made for it, if it was not there.
    above: Option<PathBuf>,
}

impl Limit {
    /// None where there is no such controller.
    #[must_use]
    pub fn new(fixture: &Fixture, max: u32) -> Option<Self> {
        PIDS.iter().find_map(|root| {
            let dir = Path::new(root).join(&fixture.tag);
            std::fs::create_dir(&dir).ok()?;
            let limit = Self { dir, above: None };
            std::fs::write(limit.dir.join("pids.max"), max.to_string()).ok().map(|()| limit)
        })
    }

    /// A group of the v1 hierarchy of pids alone, without a limit, called as Docker calls a container's there; and the
    /// container's id. None where there is no such hierarchy.
    #[must_use]
    pub fn docker_v1(fixture: &Fixture) -> Option<(Self, String)> {
        let root = Path::new(PIDS[0]);
        // What v2 has in each group is in none of v1.
        if !root.join("cgroup.procs").exists() || root.join("cgroup.controllers").exists() {
            return None;
        }
        let hex: String = fixture.tag.chars().filter(char::is_ascii_hexdigit).collect();
        let id: String = hex.chars().cycle().take(64).collect();
        let above = root.join("docker");
        let dir = above.join(&id);
        std::fs::create_dir_all(&dir).ok()?;
        Some((Self { dir, above: Some(above) }, id))
    }

    /// Whoever is written to this file is in it.
    #[must_use]
    pub fn procs(&self) -> PathBuf {
        self.dir.join("cgroup.procs")
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
            let left = std::fs::read_to_string(self.dir.join("pids.current"))?;
            ensure!(left.trim() == "0", "{left} are in it: {:?}", std::fs::read_to_string(self.procs())?);
            Ok(())
        })
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        let gone = eventually("rmdir", ms(5000), || Ok(std::fs::remove_dir(&self.dir)?));
        if let Err(e) = gone {
            loudly(&format!("{}: {e:#}", self.dir.display()));
        }
        if let Some(above) = &self.above {
            // Unless a Docker of the host's has containers in it.
            let _ = std::fs::remove_dir(above);
        }
    }
}
