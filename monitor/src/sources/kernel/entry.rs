//! Single entries of the lineage map, and who of a job lives: what the agent asks and mends beside whole labellings.

use std::collections::HashSet;
use std::io;

use monitor_abi::{LINEAGE_MENDED, handed_down};

use super::Kernel;
use super::lineage::{Edit, outwards};
use crate::model::key::Key;
use crate::sources::proc::{self, Proc};

/// A map has no room: preallocated ones say E2BIG, others ENOMEM.
pub(super) fn is_full(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::E2BIG | libc::ENOMEM))
}

impl Kernel {
    /// Enters a process that the fork probe could not, or puts it into its job (0: none) if it is in none: a kill may have put
    /// it into one of its own meanwhile. Who is gone is not entered.
    pub fn enter(&self, key: Key, parent: Key, job: u64) -> io::Result<()> {
        let _guard = super::lock(&self.editing);
        let spared = self.lineage_of(parent)?.map_or(0, |l| handed_down(l.flags));
        let has = self.maps.lineage.get(&key.into())?.map_or(0, |l| l.job);
        let job = (job != 0 && has == 0).then_some(job);
        let made = self.edit(&Edit { parent: Some(parent), job, set: spared, create: true, ..Edit::of(key) });
        // Looked at afterwards: who is there now is freed later, and its entry goes then.
        match Proc::default().stat(key.pid) {
            Ok(s) if s.start_ticks == self.ns_to_ticks(key.start) => {}
            Err(e) if !proc::is_absence(&e) => {}
            _ => return self.maps.lineage.delete(&key.into()).map(drop),
        }
        made?;
        // That parent is the fork probe's own word.
        if self.maps.lineage.get(&key.into())?.is_some_and(|l| Key::from(l.parent) == parent) {
            self.edit(&Edit { clear: LINEAGE_MENDED, ..Edit::of(key) })?;
        }
        Ok(())
    }

    /// Which of these jobs have a member with a live thread, members of inner jobs included.
    pub fn jobs_alive(&self, wanted: &[u64]) -> io::Result<HashSet<u64>> {
        let jobs = self.jobs()?;
        let mut alive = HashSet::new();
        for r in self.rows()?.iter().filter(|r| r.known != 0 && r.live != 0 && r.lineage.job != 0) {
            alive.extend(outwards(&jobs, r.lineage.job).filter(|j| wanted.contains(j)));
        }
        Ok(alive)
    }
}
