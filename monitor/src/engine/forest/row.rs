//! What the forest is told by a snapshot and by a look at /proc. Plain facts, made at the edge, judged here.

use serde::{Deserialize, Serialize};

use crate::model::event::Comm;
use crate::model::key::Key;

/// How far a process has come, as a row of a snapshot says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RowState {
    /// The leader runs.
    Running,
    /// The leader is dead (`exit_state` Z) and `signal->live` is not 0.
    LeaderExited,
    /// No live thread, not yet a zombie (`live == 0`, leader's `exit_state` 0).
    Exiting,
    /// The leader's `exit_state` is Z and `live == 0`.
    Zombie,
    /// Only known from the kernel's map of the dead: an ancestor of somebody alive.
    Gone,
}

/// One process of a snapshot: `iter/task`'s row, or what /proc said of one that the iterator did not return.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    pub key: Key,
    /// The real parent now; None = pid 0, or not known.
    pub parent: Option<Key>,
    /// Who forked it, where the kernel's lineage map has an entry for it.
    pub lineage: Option<RowLineage>,
    /// Innermost job's number, 0 = none (and 0 if the lineage map has no entry).
    pub job: u64,
    pub state: RowState,
    /// Wait status; means something from `Exiting` on.
    pub status: i32,
    pub uid: Option<u32>,
    pub comm: Comm,
    pub kernel_thread: bool,
    /// It adopts orphans: PID 1 of its pid namespace, or a known subreaper. PID 1 of the host counts without it.
    pub adopts: bool,
    /// NUL-separated, if it has been read; None makes the engine ask for it by `Effect::ReadFacts`.
    pub argv: Option<Vec<u8>>,
    /// The resolved path, if it has been read.
    pub exe: Option<Vec<u8>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowLineage {
    pub parent: Key,
    /// `LINEAGE_MENDED`: not the fork probe's word, but what /proc or a snapshot said when the entry was made.
    pub mended: bool,
}

/// A snapshot, whole. `t0` is the boot time (ns) noted before its first row was read.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    pub t0: u64,
    pub rows: Vec<Row>,
}

/// What a merge did; for the log line and for tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Merge {
    pub rows: usize,
    pub added: usize,
    /// Known ones whose state, parent or job the snapshot corrected.
    pub corrected: usize,
    /// Rows of processes that were reaped while the snapshot was taken.
    pub tombstoned: usize,
    /// Missing in the snapshot though forked before T0: /proc is asked for each, and decides.
    pub missing: usize,
    /// More were reaped meanwhile than tombstones are kept: take the snapshot again.
    pub overrun: bool,
}

/// What one look at /proc/PID said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Seen {
    /// No such pid, or another process has it now (start ticks differ).
    Absent,
    Present(Look),
}

/// The fields of /proc/PID/stat that matter here, and whether any thread is alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Look {
    /// `R`, `S`, `D`, `T`, `t`, `Z`, `X`, `I`.
    pub state: u8,
    pub ppid: u32,
    pub pgrp: i32,
    pub session: i32,
    /// `Proc::has_live_thread`; need only be read when `state` is Z, else true.
    pub live_thread: bool,
}

/// Most bytes of argv that are kept of one process.
pub const ARGV_MAX: usize = 64 << 10;

/// What is not in the events and is read from /proc only for those that need it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// NUL-separated, as /proc/PID/cmdline has it; up to [`ARGV_MAX`] bytes.
    pub argv: Option<Vec<u8>>,
    /// The resolved path of /proc/PID/exe.
    pub exe: Option<Vec<u8>>,
    /// As `container::Cgroups::kept` has it: the path that is shown first.
    pub cgroup: Option<String>,
    pub uid: Option<u32>,
    /// Inode of /proc/PID/ns/pid.
    pub pid_ns: Option<u64>,
    /// Its pid in its own (innermost) pid namespace.
    pub ns_pid: Option<u32>,
}
