//! The probes' accounts: records by kind and CPU, runs of each program, fill of each map.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use aya::maps::MapData;
use monitor_abi::{Counter, KINDS, KillCounter};

use super::offsets::{EXEC, EXIT, FORK, FREE, Kind, PROBES, SYS_ENTER};
use super::{Kernel, sys};

/// One program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeStat {
    pub name: &'static str,
    /// It hangs on nothing and is run when it is wanted.
    pub by_hand: bool,
    pub attached: bool,
    /// Why it was not loaded.
    pub off: Option<String>,
    /// Runs that the kernel skipped because the program was active on that CPU already: each counts as loss. None
    /// before Linux 5.12, which does not count them.
    pub recursion_misses: Option<u64>,
    /// While `kernel.bpf_stats_enabled` is 1.
    pub run_time_ns: u64,
    pub runs: u64,
}

/// How full a map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    pub name: &'static str,
    pub entries: u64,
    pub max: u64,
}

/// The programs that write records, and of which kind (that of exits writes leaders' too).
const KIND_OF: &[(&str, u16)] = &[
    (FORK, monitor_abi::KIND_FORK),
    (EXEC, monitor_abi::KIND_EXEC),
    (EXIT, monitor_abi::KIND_EXIT),
    (FREE, monitor_abi::KIND_REAP),
    ("signal", monitor_abi::KIND_SIGNAL),
];

pub(super) fn max_entries(map: &OwnedFd) -> io::Result<u32> {
    let info = MapData::from_fd(sys::dup(map.as_fd())?).and_then(|m| m.info()).map_err(io::Error::other)?;
    Ok(info.max_entries())
}

impl Kernel {
    /// By CPU, then by kind (`monitor_abi::KIND_*`). For each `hits = sent + lost + filtered` when it stands still.
    pub fn counters(&self) -> io::Result<Vec<[Counter; KINDS]>> {
        self.maps.counters()
    }

    /// The counters of all CPUs, by kind. Runs that the kernel skipped are hits that were lost, of the kind that the program
    /// is for.
    pub fn totals(&self) -> io::Result<[Counter; KINDS]> {
        let mut sum = [Counter::default(); KINDS];
        for (name, kind) in KIND_OF {
            let skipped = self.missed(name)?;
            let c = &mut sum[usize::from(*kind)];
            c.hits += skipped;
            c.lost += skipped;
        }
        for cpu in self.counters()? {
            for (s, c) in sum.iter_mut().zip(cpu) {
                s.hits += c.hits;
                s.sent += c.sent;
                s.lost += c.lost;
                s.filtered += c.filtered;
            }
        }
        Ok(sum)
    }

    /// All that was lost since the maps were made: records that found no room, and runs that the kernel skipped.
    pub fn lost(&self) -> io::Result<u64> {
        Ok(self.totals()?.iter().map(|c| c.lost).sum())
    }

    /// What became of the probes' own SIGKILLs.
    pub fn kills(&self) -> io::Result<KillCounter> {
        self.maps.kills()
    }

    /// Every program, the ones that are off too.
    pub fn probes(&self) -> io::Result<Vec<ProbeStat>> {
        PROBES
            .iter()
            .filter(|p| !p.is_tracer() && p.is_of_use())
            .map(|p| {
                let info = self.programs.get(p.name).map(|fd| sys::prog_info(fd.as_fd())).transpose()?;
                let info = info.unwrap_or_default();
                Ok(ProbeStat {
                    name: p.name,
                    by_hand: p.kind == Kind::ByHand,
                    attached: self.links.contains_key(p.name)
                        || (p.name == SYS_ENTER && self.doom_attached()),
                    off: self.off.iter().find(|(n, _)| *n == p.name).map(|(_, why)| why.clone()),
                    recursion_misses: info.recursion_misses,
                    run_time_ns: info.run_time_ns,
                    runs: info.runs,
                })
            })
            .collect()
    }

    /// How far the ring has been read, and written, in bytes since it was made.
    #[must_use]
    pub fn ring_positions(&self) -> (u64, u64) {
        self.gauge.positions()
    }

    /// Entries that the lineage map has room for.
    #[must_use]
    pub fn lineage_max(&self) -> u32 {
        self.lineage_max
    }

    /// Bytes in the ring that are not read yet.
    #[must_use]
    pub fn ring_used(&self) -> u64 {
        self.gauge.used()
    }

    #[must_use]
    pub fn ring_size(&self) -> u64 {
        self.gauge.size()
    }

    /// The kernel's maps, by the names that the metrics give them. It walks them: not for a hot path.
    pub fn fills(&self) -> io::Result<Vec<Fill>> {
        let (lineage, dead) = (self.lineage_max as usize, self.dead_max as usize);
        let fill = |name, entries: usize, max: usize| Fill {
            name,
            entries: entries.min(max) as u64,
            max: max as u64,
        };
        Ok(vec![
            fill("kernel_lineage", self.maps.lineage.keys(lineage)?.len(), lineage),
            fill("kernel_dead", self.maps.dead.keys(dead)?.len(), dead),
            fill("kernel_jobs", self.maps.jobs.keys(super::JOBS_MAX)?.len(), super::JOBS_MAX),
        ])
    }
}
