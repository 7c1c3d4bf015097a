//! Doom and spare flags, and whose they are: orders to end jobs overlap (an outer job and its inner one, policy and an
//! operator on the same job), so a mark goes when the last order that set it is over.

use std::collections::{HashMap, HashSet};
use std::io;

use monitor_abi::{
    LINEAGE_SPARED, LINEAGE_SPARES_CHILDREN, SPARES_BITS, SPARES_MAX, SPARES_SHIFT, TaskRow, is_spared,
};

use super::lineage::{Edit, Edited, no_job};
use super::offsets::SYS_ENTER;
use super::{Kernel, sys};
use crate::enforce::OrderId;
use crate::model::key::Key;

/// The lineage flags of one that is spared under the epoch `spares`, and with `heirs` whom it forks.
pub(super) fn spared(spares: u32, heirs: bool) -> u32 {
    LINEAGE_SPARED | if heirs { LINEAGE_SPARES_CHILDREN } else { 0 } | (spares << SPARES_SHIFT)
}

/// What orders that are carried out have marked. Guarded by `Kernel::editing`'s lock, as the maps are that it tells of.
#[derive(Debug, Default)]
pub(super) struct Marks {
    /// Up to when each order wants each job doomed.
    dooms: HashMap<u64, HashMap<OrderId, u64>>,
    /// Whom each order spares, and whether with all who descend from him.
    spared: HashMap<Key, HashMap<OrderId, bool>>,
    /// After a clean stop nobody would renew a doom or see it through.
    stopped: bool,
}

impl Marks {
    fn doom_until(&self, job: u64) -> u64 {
        self.dooms.get(&job).and_then(|d| d.values().max()).copied().unwrap_or(0)
    }

    /// No order may doom it any more: its number is never used again.
    pub(super) fn forgotten(&mut self, job: u64) {
        self.dooms.remove(&job);
    }
}

impl Kernel {
    /// Attaches `sys_enter` while a doom is in force, and only then. Called after each change of a doom, and from time to
    /// time, since a doom also ends by expiring.
    pub fn attach_while_doomed(&self) -> io::Result<()> {
        // Read under the lock: whoever takes it last has seen all that was written before.
        let mut link = super::lock(&self.doom);
        let now = self.now();
        let doomed = self.jobs()?.values().any(|j| j.doom_until > now);
        if doomed == link.is_some() {
            return Ok(());
        }
        *link = if doomed { Some(sys::attach_tp_btf(self.program(SYS_ENTER)?)?) } else { None };
        self.pins.as_ref().map_or(Ok(()), |p| p.keep_doom(link.as_ref()))
    }

    /// Whether `sys_enter` is attached: each system call on the host pays for it.
    pub fn doom_attached(&self) -> bool {
        super::lock(&self.doom).is_some()
    }

    /// Ends every doom and refuses new ones, as a clean stop does: orders that are carried out go on until this process ends.
    pub fn stop_dooms(&self) -> io::Result<()> {
        {
            let mut marks = super::lock(&self.editing);
            marks.stopped = true;
            marks.dooms.clear();
            for id in self.jobs()?.into_keys() {
                self.write_doom(id, 0)?;
            }
        }
        self.attach_while_doomed()
    }

    /// At a start, before the first snapshot: what an agent that was killed in the middle of an order left in the pinned maps
    /// is taken away: all dooms, all spare flags, and jobs that are not among `known` (those that an order made for its own
    /// time). How many jobs were forgotten.
    pub fn take_leftovers_away(&self, known: &HashSet<u64>) -> io::Result<usize> {
        let unknown: Vec<u64> = {
            let mut marks = super::lock(&self.editing);
            marks.dooms.clear();
            let jobs = self.jobs()?;
            for &id in jobs.keys() {
                self.write_doom(id, 0)?;
            }
            marks.spared.clear();
            self.end_spares()?;
            jobs.into_keys().filter(|id| !known.contains(id)).collect()
        };
        for &id in &unknown {
            crate::enforce::Lineage::forget(self, id)?;
        }
        self.attach_while_doomed()?;
        Ok(unknown.len())
    }

    pub(super) fn mark_doomed(&self, job: u64, until: u64, by: OrderId) -> io::Result<()> {
        {
            let mut marks = super::lock(&self.editing);
            if marks.stopped {
                return Err(io::Error::other("jobwarden is stopping: no job is doomed any more"));
            }
            if self.maps.jobs.get(&job)?.is_none() {
                return Err(no_job(job));
            }
            marks.dooms.entry(job).or_default().insert(by, until);
            self.write_doom(job, marks.doom_until(job))?;
        }
        self.attach_while_doomed()
    }

    pub(super) fn mark_spared(&self, key: Key, heirs: bool, by: OrderId) -> io::Result<()> {
        let mut marks = super::lock(&self.editing);
        marks.spared.entry(key).or_default().insert(by, heirs);
        let spares = self.spares()?;
        // One that descends from who is spared with his heirs stays as it is.
        let has =
            |l: monitor_abi::Lineage| is_spared(l.flags, spares) && l.flags & LINEAGE_SPARES_CHILDREN != 0;
        let heirs = heirs || self.maps.lineage.get(&key.into())?.is_some_and(has);
        let set = spared(spares, heirs);
        let mut e = Edit { set, clear: SPARES_BITS & !set, ..Edit::of(key) };
        if self.edit(&e)? != Edited::Missing {
            return Ok(());
        }
        let row = self.rows()?.into_iter().find(|r| Key::from(r.key) == key);
        // Who is in no row is gone, or hidden from the iterator as PID 1 may be; then no probe signals it either.
        if let Some(row) = row {
            e.parent = (row.parent.tgid != 0).then(|| row.parent.into());
            e.create = true;
            self.edit(&e)?;
        }
        Ok(())
    }

    /// The epoch of sparing.
    pub(super) fn spares(&self) -> io::Result<u32> {
        Ok(self.maps.control.get(&0)?.unwrap_or_default().spares)
    }

    /// From now on nobody is spared, those included who are forked meanwhile. The caller holds the lock of edits, and no order
    /// that spares somebody dooms any more.
    fn end_spares(&self) -> io::Result<()> {
        self.control(|c| c.spares = (c.spares + 1) & SPARES_MAX)
    }

    /// Takes away what this order marked and no other one did: first the dooms, so that nobody loses a flag under one.
    pub(super) fn unmark(&self, by: OrderId) -> io::Result<()> {
        {
            let mut marks = super::lock(&self.editing);
            let mine: Vec<u64> =
                marks.dooms.iter().filter(|(_, d)| d.contains_key(&by)).map(|(&j, _)| j).collect();
            for job in mine {
                if let Some(d) = marks.dooms.get_mut(&job) {
                    d.remove(&by);
                }
                marks.dooms.retain(|_, d| !d.is_empty());
                self.write_doom(job, marks.doom_until(job))?;
            }
            let flags = marks.spared.values().any(|o| o.contains_key(&by));
            marks.spared.retain(|_, o| {
                o.remove(&by);
                !o.is_empty()
            });
            if flags && marks.spared.is_empty() {
                self.end_spares()?;
            } else if flags {
                self.sweep(&marks)?;
            }
        }
        self.attach_while_doomed()
    }

    /// Takes the flag from all who have it and neither are marked nor descend from one who is marked with his heirs: those that
    /// only an order spared that is over while others go on. A chain may outrun this.
    pub(super) fn sweep(&self, marks: &Marks) -> io::Result<()> {
        let with_heirs = marks.spared.iter().filter(|(_, o)| o.values().any(|&heirs| heirs));
        let with_heirs: Vec<Key> = with_heirs.map(|(&k, _)| k).collect();
        let spares = self.spares()?;
        self.to_a_fixpoint(|| {
            let rows = self.rows()?;
            let flagged = |r: &&TaskRow| r.known != 0 && is_spared(r.lineage.flags, spares);
            if !rows.iter().any(|r| flagged(&r)) {
                return Ok(false);
            }
            let family = self.family(&rows, &with_heirs)?;
            let mut changed = false;
            for r in rows.iter().filter(flagged).filter(|r| !family.contains(&r.key.into())) {
                let key = Key::from(r.key);
                let clear =
                    if marks.spared.contains_key(&key) { LINEAGE_SPARES_CHILDREN } else { SPARES_BITS };
                changed |= self.edit(&Edit { clear, ..Edit::of(key) })? == Edited::Changed;
            }
            Ok(changed)
        })
    }

    /// The caller holds the lock of edits. A job that is gone is not doomed.
    fn write_doom(&self, job: u64, until: u64) -> io::Result<()> {
        let Some(mut j) = self.maps.jobs.get(&job)? else { return Ok(()) };
        if j.doom_until == until {
            return Ok(());
        }
        j.doom_until = until;
        self.maps.jobs.put(&job, &j)
    }
}
