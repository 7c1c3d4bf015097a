//! All processes at one time: by `iter/task`, by /proc what that does not return, and the dead that the living
//! descend from. It reads; what the rows mean is for the forest.

use std::collections::{HashMap, HashSet};
use std::io;

use monitor_abi as abi;
use monitor_abi::{ABI_VERSION, TaskRow};

use super::Kernel;
use super::lineage::Edited;
use crate::engine::forest::{Row, RowLineage, RowState, Snapshot};
use crate::model::event::Comm;
use crate::model::key::Key;
use crate::sources::proc::{Proc, Stat};

/// Dead ancestors that are read for one living process.
const DEAD_CHAIN: usize = 64;
/// `exit_state` of a zombie, `include/linux/sched.h` (EXIT_ZOMBIE); EXIT_DEAD is 0x10.
const EXIT_ZOMBIE: u32 = 0x20;

const _: () = assert!(ABI_VERSION == 5);

/// A snapshot, and what was lost around it: it is whole only if nothing was lost between the two.
#[derive(Clone, Debug)]
pub struct Taken {
    pub snapshot: Snapshot,
    /// Records lost since the maps were made, before the first row was read and after the last.
    pub lost_before: u64,
    pub lost_after: u64,
    /// Processes that the iterator did not return and /proc did (PID 1 on some hosts).
    pub from_proc: usize,
    /// Processes for which the lineage map had no room.
    pub unentered: usize,
}

/// Nanoseconds of boot time, of the initial time namespace if `offset` is this one's.
pub(super) fn boot_now(offset_ns: i64) -> u64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let ns = t.tv_sec.saturating_mul(1_000_000_000).saturating_add(t.tv_nsec);
    ns.saturating_sub(offset_ns).max(0) as u64
}

fn real(key: abi::ProcKey) -> Option<Key> {
    // Kernel threads hang on pid 0, which is no process.
    (key.tgid != 0).then(|| key.into())
}

pub(super) fn state(row: &TaskRow) -> RowState {
    match (row.exit_state & EXIT_ZOMBIE != 0, row.live) {
        (true, 0) => RowState::Zombie,
        (true, _) => RowState::LeaderExited,
        // EXIT_DEAD: being reaped at this moment.
        (false, 0) => RowState::Exiting,
        (false, _) => RowState::Running,
    }
}

fn lineage(l: &abi::Lineage) -> RowLineage {
    RowLineage { parent: l.parent.into(), mended: l.flags & abi::LINEAGE_MENDED != 0 }
}

/// `knows_subreapers`: else everybody may adopt.
fn row(r: &TaskRow, knows_subreapers: bool) -> Row {
    Row {
        key: r.key.into(),
        parent: real(r.parent),
        // Pid 0 is no process: who hangs on it has no lineage parent.
        lineage: (r.known != 0 && r.lineage.parent.tgid != 0).then(|| lineage(&r.lineage)),
        job: r.lineage.job,
        state: state(r),
        status: r.exit_code,
        uid: Some(r.uid),
        comm: Comm::from_bytes(&r.comm),
        kernel_thread: r.flags & u32::from(abi::KERNEL_THREAD) != 0,
        adopts: r.flags & abi::ROW_ADOPTS != 0 || !knows_subreapers,
        argv: None,
        exe: None,
    }
}

impl Kernel {
    /// Takes a snapshot. Afterwards the lineage map has an entry for each row, marked as mended where it was made here
    /// (its parent is then the present one), and none for who is gone.
    ///
    /// A row may be older than a reap record already read, and a process forked behind the iterator's cursor is
    /// missing: `t0` tells which.
    pub fn snapshot(&self) -> io::Result<Taken> {
        let lost_before = self.lost()?;
        let t0 = self.now();
        let tasks = self.rows()?;
        let mut rows: Vec<Row> = tasks.iter().map(|r| row(r, self.knows_subreapers)).collect();
        let from_proc = self.add_from_proc(&mut rows, t0)?;
        let unentered = self.mend(&mut rows, t0)?;
        self.add_dead_ancestors(&mut rows)?;
        let lost_after = self.lost()?;
        Ok(Taken { snapshot: Snapshot { t0, rows }, lost_before, lost_after, from_proc, unentered })
    }

    /// Who is in /proc, was there before the snapshot began, and is not in `rows`.
    fn add_from_proc(&self, rows: &mut Vec<Row>, t0: u64) -> io::Result<usize> {
        let proc = Proc::default();
        let have: HashSet<u32> = rows.iter().map(|r| r.key.pid).collect();
        let parents: HashMap<u32, Key> = rows
            .iter()
            .filter_map(|r| r.parent)
            .filter(|p| !have.contains(&p.pid))
            .map(|p| (p.pid, p))
            .collect();
        let before = rows.len();
        for pid in proc.pids()?.into_iter().filter(|p| !have.contains(p)) {
            let Ok(stat) = proc.stat(pid) else { continue };
            let about = self.ticks_to_ns(stat.start_ticks);
            if about >= t0 {
                // Forked meanwhile: its fork record is in the ring.
                continue;
            }
            let key = match parents.get(&pid) {
                // The start to the nanosecond, as its children's rows have it.
                Some(k) => *k,
                None => self.entry_with(pid, stat.start_ticks)?.unwrap_or(Key::new(pid, about)),
            };
            rows.push(Row {
                key,
                parent: (stat.ppid != 0)
                    .then(|| rows.iter().find(|r| r.key.pid == stat.ppid).map(|r| r.key))
                    .flatten(),
                lineage: None,
                job: 0,
                state: proc_state(&proc, &stat),
                status: 0,
                uid: proc.status(pid).ok().and_then(|s| s.uid),
                comm: stat.comm,
                kernel_thread: stat.flags & 0x0020_0000 != 0,
                adopts: pid == 1,
                argv: None,
                exe: None,
            });
        }
        Ok(rows.len() - before)
    }

    /// The lineage map's entry with this pid and start tick, if there is exactly one.
    fn entry_with(&self, pid: u32, ticks: u64) -> io::Result<Option<Key>> {
        let mut found = self
            .maps
            .lineage
            .keys(self.lineage_max as usize * 2)?
            .into_iter()
            .filter(|k| k.tgid == pid && self.ns_to_ticks(k.start) == ticks);
        Ok(found.next().filter(|_| found.next().is_none()).map(Key::from))
    }

    /// Entries for rows that have none, and no entries for who is gone. How many rows found no room: a full map is no reason
    /// to know nothing of them.
    fn mend(&self, rows: &mut [Row], t0: u64) -> io::Result<usize> {
        let mut unentered = 0;
        for r in rows.iter_mut().filter(|r| r.lineage.is_none()) {
            match self.edit(&super::Edit { parent: r.parent, create: true, ..super::Edit::of(r.key) }) {
                Ok(Edited::Changed) => {
                    r.lineage = r.parent.map(|parent| RowLineage { parent, mended: true });
                    continue;
                }
                Err(e) if super::entry::is_full(&e) => unentered += 1,
                done => drop(done?),
            }
            // As the map has it now: the fork probe may have been faster.
            if let Some(l) = self.maps.lineage.get(&r.key.into())? {
                r.lineage = Some(lineage(&l));
                r.job = l.job;
            }
        }
        self.bury(&rows.iter().map(|r| r.key).collect(), t0)?;
        Ok(unentered)
    }

    /// Moves entries of processes that are gone to the dead: whoever was there before `t0` and neither the iterator (`have`,
    /// read after it) nor /proc has. How many those were.
    fn bury(&self, have: &HashSet<Key>, t0: u64) -> io::Result<usize> {
        let proc = Proc::default();
        let mut buried = 0;
        for key in self.maps.lineage.keys(self.lineage_max as usize * 2)? {
            let k = Key::from(key);
            if have.contains(&k) || k.start >= t0 {
                continue;
            }
            // It may have been hidden from the iterator: gone is only what /proc does not have either.
            match proc.stat(k.pid) {
                Ok(s) if s.start_ticks == self.ns_to_ticks(k.start) => continue,
                Err(e) if !crate::sources::proc::is_absence(&e) => continue,
                _ => {}
            }
            if let Some(l) = self.maps.lineage.get(&key)? {
                self.maps.dead.put(&key, &l)?;
                self.maps.lineage.delete(&key)?;
                buried += 1;
            }
        }
        Ok(buried)
    }

    /// Entries whose end no probe saw leave the lineage map. (A kernel may skip a probe: the one this was tried on often runs
    /// none where a process that PID 1 reaped is freed.) How many those were.
    pub fn sweep_stale_lineage(&self) -> io::Result<usize> {
        let t0 = self.now();
        let have = self.rows()?.iter().map(|r| r.key.into()).collect();
        self.bury(&have, t0)
    }

    /// The dead through whom the lineage of the living leads.
    fn add_dead_ancestors(&self, rows: &mut Vec<Row>) -> io::Result<()> {
        let mut have: HashSet<Key> = rows.iter().map(|r| r.key).collect();
        let parents: Vec<Key> = rows.iter().filter_map(|r| r.lineage.map(|l| l.parent)).collect();
        for mut key in parents {
            for _ in 0..DEAD_CHAIN {
                if key.pid == 0 || !have.insert(key) {
                    break;
                }
                let Some(l) = self.lineage_of(key)? else { break };
                rows.push(Row {
                    key,
                    parent: None,
                    lineage: Some(lineage(&l)),
                    job: l.job,
                    state: RowState::Gone,
                    status: 0,
                    uid: None,
                    comm: Comm::default(),
                    kernel_thread: false,
                    adopts: false,
                    argv: None,
                    exe: None,
                });
                key = l.parent.into();
            }
        }
        Ok(())
    }

    /// The letter of /proc/PID/stat, and the name, of all processes that `iter/task` returns: for many a hundredth of what reading
    /// their files costs.
    pub fn task_states(&self) -> io::Result<HashMap<Key, (u8, Comm)>> {
        let rows = self.rows()?;
        let mut letters = HashMap::with_capacity(rows.len());
        letters.extend(
            rows.iter().map(|r| (r.key.into(), (letter(r.state, r.exit_state), Comm::from_bytes(&r.comm)))),
        );
        Ok(letters)
    }

    /// All processes that `iter/task` returns, now.
    pub(super) fn rows(&self) -> io::Result<Vec<TaskRow>> {
        Ok(super::sys::rows_of(&self.read_iter(super::offsets::TASKS)?))
    }
}

/// As `task_state_index()` has it in `include/linux/sched.h`.
fn letter(state: u32, exit_state: u32) -> u8 {
    /// Everything of `TASK_REPORT`, running, sleeping, .. parked.
    const LETTERS: &[u8; 8] = b"RSDTtXZP";
    const TASK_REPORT: u32 = 0x7f;
    const TASK_IDLE: u32 = 0x402;
    /// A lock of a real-time kernel; frozen (6.1).
    const AS_UNINTERRUPTIBLE: [u32; 2] = [0x1000, 0x8000];
    if state & TASK_IDLE == TASK_IDLE {
        return b'I';
    }
    if AS_UNINTERRUPTIBLE.iter().any(|bit| state & bit != 0) {
        return b'D';
    }
    let reported = (state | exit_state) & TASK_REPORT;
    LETTERS[(u32::BITS - reported.leading_zeros()) as usize]
}

fn proc_state(proc: &Proc, stat: &Stat) -> RowState {
    match stat.state {
        b'Z' if proc.has_live_thread(stat.pid) => RowState::LeaderExited,
        b'Z' => RowState::Zombie,
        b'X' | b'x' => RowState::Exiting,
        _ => RowState::Running,
    }
}
