//! Jobs in the kernel's maps: labelling, members, lineage. Doom and spare flags stand in `marks`. Entries are edited in place by the `edit`
//! program, since the probes read them all the time.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::AsFd as _;

use monitor_abi as abi;
use monitor_abi::{Job, LINEAGE_MENDED, TaskRow, is_spared};

use super::offsets::{FORK, PROBES, UPDATE_LINEAGE};
use super::{Kernel, sys};
use crate::enforce::{Lineage, Member, OrderId};
use crate::model::event::Comm;
use crate::model::key::Key;

/// A family that is labelled stands still after two or three passes, even while it forks; this many is a fault.
const PASSES: usize = 64;
/// Ancestors that a chain of lineage is followed through.
const CHAIN: usize = 4096;

/// One run of the `edit` program.
#[derive(Clone, Copy, Debug)]
pub(super) struct Edit {
    pub(super) key: Key,
    pub(super) parent: Option<Key>,
    pub(super) job: Option<u64>,
    pub(super) set: u32,
    pub(super) clear: u32,
    pub(super) create: bool,
}

impl Edit {
    pub(super) fn of(key: Key) -> Self {
        Self { key, parent: None, job: None, set: 0, clear: 0, create: false }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Edited {
    Changed,
    Unchanged,
    Missing,
}

/// The jobs from `job` outwards, itself first.
pub(super) fn outwards(jobs: &HashMap<u64, Job>, job: u64) -> impl Iterator<Item = u64> {
    let mut at = job;
    // More than that is a circle, which the agent never makes.
    std::iter::from_fn(move || {
        let this = at;
        at = jobs.get(&at).map_or(0, |j| j.outer);
        (this != 0).then_some(this)
    })
    .take(64)
}

impl Kernel {
    pub(super) fn edit(&self, e: &Edit) -> io::Result<Edited> {
        let mut args = [0_u64; abi::UPDATE_ARGS];
        let parent = e.parent.unwrap_or_default();
        args[abi::UPDATE_TGID] = e.key.pid.into();
        args[abi::UPDATE_START] = e.key.start;
        args[abi::UPDATE_PARENT_TGID] = parent.pid.into();
        args[abi::UPDATE_PARENT_START] = parent.start;
        args[abi::UPDATE_JOB] = e.job.unwrap_or(0);
        args[abi::UPDATE_FLAGS] = e.set.into();
        args[abi::UPDATE_CLEAR] = e.clear.into();
        args[abi::UPDATE_WHAT] = if e.job.is_some() { abi::UPDATE_SET_JOB } else { 0 }
            | if e.create { abi::UPDATE_CREATE } else { 0 };
        match sys::run(self.program(UPDATE_LINEAGE)?, &args)? {
            abi::UPDATE_CHANGED => Ok(Edited::Changed),
            abi::UPDATE_UNCHANGED => Ok(Edited::Unchanged),
            abi::UPDATE_MISSING => Ok(Edited::Missing),
            errno => Err(io::Error::from_raw_os_error(-errno)),
        }
    }

    pub(super) fn jobs(&self) -> io::Result<HashMap<u64, Job>> {
        let mut all = HashMap::new();
        for id in self.maps.jobs.keys(super::JOBS_MAX * 2)? {
            if let Some(j) = self.maps.jobs.get(&id)? {
                all.insert(id, j);
            }
        }
        Ok(all)
    }

    /// The numbers of the jobs that the kernel knows, with the number of the job around each (0 = none).
    pub fn job_numbers(&self) -> io::Result<Vec<(u64, u64)>> {
        Ok(self.jobs()?.into_iter().map(|(id, j)| (id, j.outer)).collect())
    }

    /// What the lineage map, or that of the dead, has on a process.
    pub fn lineage_of(&self, key: Key) -> io::Result<Option<abi::Lineage>> {
        match self.maps.lineage.get(&key.into())? {
            Some(l) => Ok(Some(l)),
            None => self.maps.dead.get(&key.into()),
        }
    }

    /// Who of `rows` is one of `roots` or descends from one.
    pub(super) fn family(&self, rows: &[TaskRow], roots: &[Key]) -> io::Result<HashSet<Key>> {
        let by_key: HashMap<Key, &TaskRow> = rows.iter().map(|r| (r.key.into(), r)).collect();
        let mut verdicts: HashMap<Key, bool> = roots.iter().map(|&k| (k, true)).collect();
        for r in rows {
            let mut path = Vec::new();
            let mut at = Key::from(r.key);
            let verdict = loop {
                if let Some(&v) = verdicts.get(&at) {
                    break v;
                }
                if at.pid == 0 || path.len() > CHAIN {
                    break false;
                }
                path.push(at);
                at = match by_key.get(&at) {
                    Some(row) => {
                        let lineage = Key::from(row.lineage.parent);
                        // A dead ancestor that is in no map any more ends the chain; but who adopted the process was
                        // one of its ancestors too, unless it came into its namespace from outside.
                        let known = row.known != 0
                            && (by_key.contains_key(&lineage)
                                || roots.contains(&lineage)
                                || self.lineage_of(lineage)?.is_some());
                        if known { lineage } else { row.parent.into() }
                    }
                    // Dead; until it is freed its entry is still among the living's.
                    None => match self.lineage_of(at)? {
                        Some(l) => l.parent.into(),
                        None => break false,
                    },
                };
            };
            verdicts.extend(path.into_iter().map(|k| (k, verdict)));
        }
        Ok(verdicts.into_iter().filter_map(|(k, v)| v.then_some(k)).collect())
    }

    /// One pass of labelling; whether it changed anything.
    fn label_pass(&self, job: u64, outer: u64, before: u64, root: Key) -> io::Result<bool> {
        let mut rows = self.rows()?;
        // The youngest first: chains are run after by their heads.
        rows.sort_unstable_by_key(|r| std::cmp::Reverse(r.key.start));
        let family = self.family(&rows, &[root])?;
        let mut jobs = self.jobs()?;
        let mut changed = false;
        for r in rows.iter().filter(|r| family.contains(&r.key.into())) {
            let now = r.lineage.job;
            if outwards(&jobs, now).any(|j| j == job) {
                continue;
            }
            if now == 0 || now == outer || now == before || !jobs.contains_key(&now) {
                let parent = (r.parent.tgid != 0).then(|| r.parent.into());
                let create = r.known == 0;
                let e = Edit { parent, job: Some(job), create, ..Edit::of(r.key.into()) };
                changed |= match self.edit(&e)? {
                    Edited::Missing => self.label_dead(r.key.into(), job)?,
                    edited => edited == Edited::Changed,
                };
                continue;
            }
            // In a job of its own that began inside the family: the outermost such becomes an inner job of this one.
            let inner = outwards(&jobs, now).take_while(|&j| j != outer && j != before).last();
            if let Some(inner) = inner
                && let Some(j) = jobs.get_mut(&inner)
            {
                j.outer = job;
                self.maps.jobs.put(&inner, j)?;
                changed = true;
            }
        }
        Ok(changed)
    }

    /// One that was freed since it was read: its successors look for their job with it.
    fn label_dead(&self, key: Key, job: u64) -> io::Result<bool> {
        let Some(l) = self.maps.dead.get(&key.into())? else { return Ok(false) };
        self.maps.dead.put(&key.into(), &abi::Lineage { job, ..l })?;
        Ok(true)
    }

    /// The caller holds the lock of edits.
    fn enter_job(&self, job: u64, outer: u64, root: Key) -> io::Result<()> {
        if job == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "job numbers begin at 1"));
        }
        let before = self.maps.lineage.get(&root.into())?.map_or(0, |l| l.job);
        let old = self.maps.jobs.get(&job)?.unwrap_or_default();
        self.maps.jobs.put(&job, &Job { id: job, outer, ..old })?;
        // The root first: who forks from now on hands it down.
        let e = Edit { job: Some(job), ..Edit::of(root) };
        self.edit(&e)?;
        self.control(|c| c.labelling = 1)?;
        let done = self.to_a_fixpoint(|| self.label_pass(job, outer, before, root));
        self.control(|c| c.labelling = 0)?;
        done
    }

    /// Repeats `pass` until one changes nothing, and the fork probe missed no fork meanwhile.
    pub(super) fn to_a_fixpoint(&self, mut pass: impl FnMut() -> io::Result<bool>) -> io::Result<()> {
        let mut missed = self.missed(FORK)?;
        for _ in 0..PASSES {
            let changed = pass()?;
            let now = self.missed(FORK)?;
            if !changed && now == missed {
                return Ok(());
            }
            missed = now;
        }
        Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("the family did not stand still in {PASSES} passes"),
        ))
    }
}

pub(super) fn no_job(job: u64) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("the kernel's map has no job {job}"))
}

impl Lineage for Kernel {
    fn label(&self, job: u64, outer: u64, root: Key) -> io::Result<()> {
        let _guard = super::lock(&self.editing);
        self.enter_job(job, outer, root)
    }

    fn label_inside(&self, job: u64, root: Key) -> io::Result<()> {
        // Under one lock: the job around it may be forgotten at any time, and is that of another order perhaps.
        let _guard = super::lock(&self.editing);
        let present = self.maps.lineage.get(&root.into())?.map_or(0, |l| l.job);
        let outer = if self.maps.jobs.get(&present)?.is_some() { present } else { 0 };
        self.enter_job(job, outer, root)
    }

    fn relabel(&self, job: u64, root: Key) -> io::Result<()> {
        let _guard = super::lock(&self.editing);
        let Some(known) = self.maps.jobs.get(&job)? else { return Err(no_job(job)) };
        self.enter_job(job, known.outer, root)
    }

    fn members(&self, job: u64) -> io::Result<Vec<Member>> {
        let jobs = self.jobs()?;
        let inside: HashSet<u64> =
            jobs.keys().copied().filter(|&j| outwards(&jobs, j).any(|o| o == job)).collect();
        let rows = self.rows()?;
        // Asked for afterwards: a flag of an epoch that ended meanwhile is none.
        let spares = self.spares()?;
        let members = rows.iter().filter(|r| r.known != 0 && inside.contains(&r.lineage.job));
        Ok(members.map(|r| member(r, spares)).collect())
    }

    fn spare(&self, key: Key, heirs: bool, by: OrderId) -> io::Result<()> {
        self.mark_spared(key, heirs, by)
    }

    fn disinherit(&self) -> io::Result<()> {
        self.sweep(&super::lock(&self.editing))
    }

    fn lineage_parent(&self, key: Key) -> io::Result<Option<Key>> {
        Ok(self.lineage_of(key)?.filter(|l| l.flags & LINEAGE_MENDED == 0).map(|l| l.parent.into()))
    }

    fn ancestor(&self, key: Key) -> io::Result<Option<Key>> {
        let up = self.lineage_of(key)?.map(|l| Key::from(l.parent));
        Ok(up.filter(|k| k.pid != 0))
    }

    fn doom(&self, job: u64, until: u64, by: OrderId) -> io::Result<()> {
        self.mark_doomed(job, until, by)
    }

    fn release(&self, by: OrderId) -> io::Result<()> {
        self.unmark(by)
    }

    fn forget(&self, job: u64) -> io::Result<()> {
        {
            let mut marks = super::lock(&self.editing);
            let Some(gone) = self.maps.jobs.get(&job)? else { return Ok(()) };
            for (id, j) in self.jobs()?.into_iter().filter(|(_, j)| j.outer == job) {
                self.maps.jobs.put(&id, &Job { outer: gone.outer, ..j })?;
            }
            self.to_a_fixpoint(|| {
                let mut changed = false;
                for r in self.rows()?.iter().filter(|r| r.known != 0 && r.lineage.job == job) {
                    let e = Edit { job: Some(gone.outer), ..Edit::of(r.key.into()) };
                    changed |= self.edit(&e)? == Edited::Changed;
                }
                Ok(changed)
            })?;
            self.maps.jobs.delete(&job)?;
            marks.forgotten(job);
        }
        self.attach_while_doomed()
    }

    fn start_of(&self, pid: u32) -> io::Result<Option<u64>> {
        let rows = self.rows()?;
        let mut live = rows.iter().filter(|r| r.key.tgid == pid && r.live != 0);
        let first = live.next().map(|r| r.key.start);
        Ok(first.filter(|_| live.next().is_none()))
    }
}

fn member(r: &TaskRow, spares: u32) -> Member {
    Member {
        key: r.key.into(),
        parent: r.parent.into(),
        comm: Comm::from_bytes(&r.comm),
        uid: r.uid,
        job: r.lineage.job,
        dead: r.live == 0,
        // EXIT_ZOMBIE and EXIT_DEAD, include/linux/sched.h.
        over: r.live == 0 && r.exit_state & 0x30 != 0,
        spared: is_spared(r.lineage.flags, spares),
    }
}

impl Kernel {
    /// All processes that the iterator returns, zombies too.
    pub fn keys(&self) -> io::Result<Vec<Key>> {
        Ok(self.rows()?.iter().map(|r| r.key.into()).collect())
    }

    pub(super) fn program(&self, name: &'static str) -> io::Result<std::os::fd::BorrowedFd<'_>> {
        self.programs.get(name).map(std::os::fd::AsFd::as_fd).ok_or_else(|| {
            let why = self.off.iter().find(|(n, _)| *n == name).map_or("it was not loaded", |(_, w)| w);
            io::Error::new(io::ErrorKind::Unsupported, format!("the program {name} is off: {why}"))
        })
    }

    /// Runs of an attached program that the kernel skipped because it was active on that CPU already, and that no other made up for:
    /// of two, those of the second (0 where it does not count).
    pub(super) fn missed(&self, name: &'static str) -> io::Result<u64> {
        let last = PROBES.iter().find(|p| p.behind == Some(name) && self.links.contains_key(p.name));
        let name = last.map_or(name, |p| p.name);
        if !self.links.contains_key(name) {
            return Ok(0);
        }
        Ok(sys::prog_info(self.program(name)?.as_fd())?.recursion_misses.unwrap_or(0))
    }
}
