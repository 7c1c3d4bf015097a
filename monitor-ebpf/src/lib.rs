//! The interface of probes and agent: ring records, map keys and values, frozen offsets.
//!
//! No dependencies, and no logic but what both must do alike. Every type is `repr(C)` without implicit padding, so that
//! a record is defined byte for byte and a pinned map can be opened by another build whose layout hash is the same. The
//! agent never transmutes ring bytes into these: it reads integers at the offsets asserted below.
#![cfg_attr(target_arch = "bpf", no_std)]

/// Raised whenever a record or a map value changes its layout or its meaning; it is part of the pin folder's hash.
pub const ABI_VERSION: u32 = 5;

/// Bytes of a task's `comm`, with its NUL.
pub const COMM_LEN: usize = 16;
/// Most bytes of an executed file's name that a record carries.
pub const FILENAME_MAX: usize = 256;
/// Most bytes of argv that a record carries; what is longer is cut and marked with [`EXEC_ARGV_CUT`].
pub const ARGV_MAX: usize = 1024;

/// A process: thread group id and the group leader's `start_boottime` in nanoseconds. A bare pid is never a key.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProcKey {
    pub start: u64,
    pub tgid: u32,
    pub pad: u32,
}

/// Record kinds, and the index of each kind's [`Counter`].
pub const KIND_FORK: u16 = 0;
pub const KIND_EXEC: u16 = 1;
pub const KIND_EXIT: u16 = 2;
pub const KIND_LEADER_EXIT: u16 = 3;
pub const KIND_REAP: u16 = 4;
pub const KIND_SIGNAL: u16 = 5;
/// A SIGKILL that a probe sent to a doomed process.
pub const KIND_KILL: u16 = 6;
/// Number of kinds, rounded up so that an index can be masked.
pub const KINDS: usize = 8;
/// The names of the kinds, as metrics and `events` give them.
pub const KIND_NAMES: [&str; 7] = ["fork", "exec", "exit", "leader_exit", "reap", "signal", "kill"];

/// The first 32 bytes of every record. `key` is the process that the record is about (of a fork: the child).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Header {
    pub kind: u16,
    pub flags: u16,
    pub cpu: u32,
    /// `bpf_ktime_get_boot_ns`.
    pub at: u64,
    pub key: ProcKey,
}

/// Fork flag: the child could not be entered into the lineage map (it was full). Mended from /proc at once.
pub const FORK_NO_ENTRY: u16 = 1;
/// Fork and row flag: a kernel thread.
pub const KERNEL_THREAD: u16 = 2;

/// A new process. Threads give no record.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Fork {
    pub hdr: Header,
    /// The forker.
    pub lineage_parent: ProcKey,
    /// The process that will reap it: differs from `lineage_parent` with CLONE_PARENT.
    pub parent: ProcKey,
    /// Innermost job, 0 = none.
    pub job: u64,
    pub uid: u32,
    pub pad: u32,
    pub comm: [u8; COMM_LEN],
}

/// Exec flag: argv was longer than what the record holds.
pub const EXEC_ARGV_CUT: u16 = 1;
/// Exec flag: the file name was longer than what the record holds.
pub const EXEC_FILENAME_CUT: u16 = 2;
/// Exec flag: argv could not be read (its pages were not in memory); [`EXEC_ARGV_CUT`] is set too.
pub const EXEC_ARGV_UNREAD: u16 = 4;

/// An exec that succeeded. Behind this head: `filename_len` bytes, then `argv_len` bytes (NUL-separated), then
/// unused bytes up to the record's end (space in the ring is reserved in a few fixed sizes).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ExecHead {
    pub hdr: Header,
    /// cgroup v2 id of the task.
    pub cgroup: u64,
    /// The thread's id before the exec: differs from the tgid when a thread that is not the leader execs.
    pub old_tid: u32,
    pub uid: u32,
    pub filename_len: u16,
    pub argv_len: u16,
    pub pad: u32,
    pub comm: [u8; COMM_LEN],
}

/// Exit flag: the status came from `signal->group_exit_code` (SIGNAL_GROUP_EXIT was set).
pub const EXIT_GROUP: u16 = 1;

/// [`KIND_EXIT`]: the last thread is exiting. [`KIND_LEADER_EXIT`]: the leader is, and other threads live.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Exit {
    pub hdr: Header,
    /// As `waitpid` gives it: exit code << 8, or signal, with 0x80 for a core dump. Final only in the reap record.
    pub status: i32,
    pub live: u32,
    pub comm: [u8; COMM_LEN],
}

/// The process was freed: its parent, or the kernel itself, has reaped it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Reap {
    pub hdr: Header,
    pub status: i32,
    pub pad: u32,
}

/// `info` was SEND_SIG_NOINFO (0), SEND_SIG_PRIV (1) or a pointer to a siginfo (2).
pub const INFO_NOINFO: u8 = 0;
pub const INFO_KERNEL: u8 = 1;
pub const INFO_SIGINFO: u8 = 2;
/// Signal flag: sent to the whole thread group.
pub const SIGNAL_GROUP: u16 = 1;
/// Signal flag: `current` (the sender, by `sender`) was already exiting: PR_SET_PDEATHSIG.
pub const SIGNAL_SENDER_EXITING: u16 = 2;

/// A signal that the kernel generated, delivered or not.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Signal {
    pub hdr: Header,
    /// `current`'s process; whether it is the sender depends on `info` and `code` (see `KERNEL.md`'s table).
    pub sender: ProcKey,
    pub target_tid: u32,
    pub sender_uid: u32,
    pub code: i32,
    pub signal: u16,
    pub info: u8,
    /// TRACE_SIGNAL_*: 0 delivered, 1 ignored, 2 already pending, 3 overflow, 4 lost info.
    pub result: u8,
}

/// A probe's `bpf_send_signal(SIGKILL)` on a doomed process.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Kill {
    pub hdr: Header,
    pub job: u64,
    /// What the helper returned: 0, -EBUSY, -EPERM, ..
    pub result: i32,
    pub pad: u32,
}

/// Lineage flag: never signalled by a probe while the flags' epoch is the present one ([`is_spared`]).
pub const LINEAGE_SPARED: u32 = 1;
/// Lineage flag: its children inherit [`LINEAGE_SPARED`].
pub const LINEAGE_SPARES_CHILDREN: u32 = 2;
/// Lineage flag: made by labelling or mending, not by the fork probe: `parent` is what /proc or the snapshot said.
pub const LINEAGE_MENDED: u32 = 4;

/// Where the epoch of [`LINEAGE_SPARED`] and [`LINEAGE_SPARES_CHILDREN`] begins in the flags: the [`Control::spares`] that they
/// were set under. A new epoch takes them from all at once: they are inherited, and a chain in which each process forks
/// one successor and exits is faster than clearing them one after the other.
pub const SPARES_SHIFT: u32 = 8;
/// The bits of an epoch.
pub const SPARES_MAX: u32 = u32::MAX >> SPARES_SHIFT;
/// All bits of the flags that sparing uses.
pub const SPARES_BITS: u32 = LINEAGE_SPARED | LINEAGE_SPARES_CHILDREN | (SPARES_MAX << SPARES_SHIFT);

/// Whether a process with these lineage flags is spared under the epoch `spares`.
#[must_use]
#[inline]
pub const fn is_spared(flags: u32, spares: u32) -> bool {
    flags & LINEAGE_SPARED != 0 && flags >> SPARES_SHIFT == spares
}

/// The flags of a child whose forker has these.
#[must_use]
#[inline]
pub const fn handed_down(flags: u32) -> u32 {
    if flags & LINEAGE_SPARES_CHILDREN != 0 { flags & SPARES_BITS } else { 0 }
}

/// Value of the lineage map and of the map of the dead, both keyed by [`ProcKey`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lineage {
    pub parent: ProcKey,
    /// Innermost job, 0 = none.
    pub job: u64,
    /// `LINEAGE_*`, and the epoch of sparing. Written at fork and by `update_lineage` only.
    pub flags: u32,
    /// `LIFE_*`. A field of its own, so that the fork and exit probes never write the same word as `update_lineage`; and not at the same
    /// time as each other, since a forking thread is not the last of its group. (Entering a missed child may: then a death is reported twice, or
    /// a dead process is not kept.)
    pub life: u8,
    /// Where programs are preempted: not 0 = the first of two programs made the record of the exec, or of the leader's exit, that is
    /// under way; the second takes it away. A byte of its own, since other threads may fork meanwhile.
    pub told: u8,
    pub pad: u16,
}

/// The group's death has been reported (two last threads can both see `live == 0`).
pub const LIFE_ENDED: u8 = 1;
/// It has forked, so a chain of lineage may lead through it: it is kept among the dead.
pub const LIFE_FORKED: u8 = 2;

/// Value of the job map, keyed by the job's 64-bit number. The agent is its only writer.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Job {
    /// The entry's own key. A slot of a hash map is used again at once when its entry is deleted or replaced: a probe
    /// that still holds it reads `doom_until` first and this second, and believes neither when it is another's.
    pub id: u64,
    /// The job around this one, 0 = none.
    pub outer: u64,
    /// Boot-time nanoseconds up to which the job is doomed; 0 = not doomed.
    pub doom_until: u64,
    pub flags: u32,
    pub pad: u32,
}

/// Pids in one entry of the job bitmap.
pub const MEMBERS_BLOCK: usize = 64;

/// How many jobs may be nested for the probes' walk from the innermost outwards.
pub const JOB_DEPTH: usize = 8;

/// What happened to the records of one kind on one CPU. `hits = sent + lost + filtered`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counter {
    pub hits: u64,
    pub sent: u64,
    pub lost: u64,
    pub filtered: u64,
}

/// Results of the probes' `bpf_send_signal`, per CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KillCounter {
    pub ok: u64,
    pub busy: u64,
    pub perm: u64,
    pub other: u64,
}

/// How far up the fork probe looks for an ancestor with a job while a family is labelled.
pub const LABEL_DEPTH: usize = 256;

/// How many children the exit probe checks for skipped forks.
pub const MISSED_CHILDREN_MAX: usize = 256;

/// What may change while the maps are pinned; the one entry of an array map.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Control {
    /// Bit `n - 1` set: signal `n` is recorded.
    pub signal_mask: u64,
    /// Not 0: the probes log by aya-log.
    pub trace: u32,
    /// Not 0: a family is being labelled, and a process forked by one without a job gets the job of the nearest ancestor that has one.
    pub labelling: u32,
    /// The epoch of sparing, at most [`SPARES_MAX`].
    pub spares: u32,
    pub pad: u32,
}

/// Row flag: orphans of its namespace or its descendants are given to it (init of a pid namespace, or a subreaper).
pub const ROW_ADOPTS: u32 = 4;

/// One process, as `iter/task` gives it. Only group leaders give a row.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct TaskRow {
    pub key: ProcKey,
    /// The real parent's group leader, which would reap it now.
    pub parent: ProcKey,
    /// From the lineage map, if `known` is not 0.
    pub lineage: Lineage,
    pub known: u32,
    /// [`KERNEL_THREAD`], [`ROW_ADOPTS`].
    pub flags: u32,
    /// `task->__state` and `task->exit_state`.
    pub state: u32,
    pub exit_state: u32,
    /// Threads not yet exiting (`signal->live`).
    pub live: u32,
    pub exit_code: i32,
    pub uid: u32,
    pub pad: u32,
    pub comm: [u8; COMM_LEN],
}

/// One open file whose inode was asked for, as `iter/task_file` gives it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct FdRow {
    pub key: ProcKey,
    pub inode: u64,
    /// `super_block->s_dev`, in the kernel's encoding (major << 20 | minor).
    pub dev: u32,
    /// Of the thread whose file table it was read from.
    pub tid: u32,
    pub fd: u32,
    /// `file->f_mode`: 1 = open for reading, 2 = for writing.
    pub mode: u32,
}

/// Most inodes that one run of `iter/task_file` looks for.
pub const INODES_MAX: u32 = 256;

/// Arguments of `update_lineage`, by their index: the entry, and the parent that a new entry gets.
pub const UPDATE_TGID: usize = 0;
pub const UPDATE_START: usize = 1;
pub const UPDATE_PARENT_TGID: usize = 2;
pub const UPDATE_PARENT_START: usize = 3;
/// The job to write, if [`UPDATE_SET_JOB`] is set.
pub const UPDATE_JOB: usize = 4;
/// Lineage flags to add.
pub const UPDATE_FLAGS: usize = 5;
/// A mask of `UPDATE_SET_JOB` and `UPDATE_CREATE`.
pub const UPDATE_WHAT: usize = 6;
/// Lineage flags to take away.
pub const UPDATE_CLEAR: usize = 7;
pub const UPDATE_ARGS: usize = 8;
pub const UPDATE_SET_JOB: u64 = 1;
/// Make the entry if there is none ([`LINEAGE_MENDED`] is set in it).
pub const UPDATE_CREATE: u64 = 2;

/// Results of `update_lineage` (a negative errno otherwise).
pub const UPDATE_UNCHANGED: i32 = 0;
pub const UPDATE_CHANGED: i32 = 1;
pub const UPDATE_MISSING: i32 = 2;

/// What this kernel has beyond 5.10 and the probes make use of; frozen like [`Offsets`]. A branch that is off is
/// pruned by the verifier before it looks at what stands in it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Features {
    /// `sched_process_exit` has the argument `group_dead` (6.16).
    pub exit_group_dead: u32,
    /// A program may be preempted, and is skipped meanwhile on that CPU: the `_again` programs are attached.
    pub preempted: u32,
}

/// Offset of a field that this kernel does not have.
pub const ABSENT: u32 = u32::MAX;

/// Byte offsets in the running kernel's structures, from its BTF; frozen before load, so the verifier sees constants.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Offsets {
    pub task_pid: u32,
    pub task_tgid: u32,
    pub task_group_leader: u32,
    pub task_real_parent: u32,
    pub task_children: u32,
    pub task_sibling: u32,
    pub task_start_boottime: u32,
    pub task_flags: u32,
    pub task_state: u32,
    pub task_exit_state: u32,
    pub task_exit_code: u32,
    pub task_signal: u32,
    pub task_cred: u32,
    pub task_mm: u32,
    pub task_comm: u32,
    pub signal_live: u32,
    pub signal_flags: u32,
    pub signal_group_exit_code: u32,
    /// The byte of the bit field `is_child_subreaper`, and its bit in it.
    pub signal_subreaper: u32,
    pub signal_subreaper_mask: u32,
    pub cred_uid: u32,
    pub mm_arg_start: u32,
    pub mm_arg_end: u32,
    pub bprm_filename: u32,
    pub siginfo_code: u32,
    pub file_inode: u32,
    pub file_mode: u32,
    pub inode_ino: u32,
    pub inode_sb: u32,
    pub sb_dev: u32,
}

const _: () = {
    assert!(size_of::<ProcKey>() == 16);
    assert!(size_of::<Header>() == 32);
    assert!(size_of::<Fork>() == 96);
    assert!(size_of::<ExecHead>() == 72);
    assert!(size_of::<Exit>() == 56);
    assert!(size_of::<Reap>() == 40);
    assert!(size_of::<Signal>() == 64);
    assert!(size_of::<Kill>() == 48);
    assert!(size_of::<Lineage>() == 32);
    assert!(size_of::<Job>() == 32);
    assert!(size_of::<TaskRow>() == 112);
    assert!(size_of::<FdRow>() == 40);
    assert!(KIND_NAMES.len() <= KINDS);
};
