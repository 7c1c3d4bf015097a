//! Fork, death and reap of processes, and the lineage map that follows them.
//!
//! Where programs are preempted (Linux 7, real-time kernels) the kernel skips one that another process on the same CPU is in the
//! middle of. There each has a second program behind it, `_again`, that does its work for whom it passed over: a chain that lost
//! its lineage so would escape its job, and an exit that nobody tells is an event lost. Two of whom one is preempted in the first
//! and one in the second let a third's fork pass both. Its child is entered when it forks itself, or when its parent ends, before
//! somebody adopts it: whatever comes first, so that lineage has no gap where it is handed on.

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::macros::btf_tracepoint;
use aya_ebpf::programs::BtfTracePointContext;
use monitor_abi::{
    EXIT_GROUP, Exit, FORK_NO_ENTRY, Fork, HEIRS_MAX, KERNEL_THREAD, KIND_EXIT, KIND_FORK, KIND_LEADER_EXIT,
    KIND_REAP, LABEL_DEPTH, LIFE_ENDED, LIFE_FORKED, LINEAGE_HEIRS, LINEAGE_MENDED, LINEAGE_SPARED, Lineage,
    ProcKey, Reap, SPARES_SHIFT, handed_down, is_spared,
};

use super::task::{self, Ptr};
use super::{CONTROL, DEAD, JOBS, LINEAGE, doom, frozen, member, ring};

const EEXIST: i32 = -17;

/// `sched_process_fork(struct task_struct *parent, struct task_struct *child)`: after `copy_process` succeeded, before
/// the child first runs.
#[btf_tracepoint(function = "sched_process_fork")]
pub(crate) fn fork(ctx: BtfTracePointContext) -> i32 {
    let child: Ptr = ctx.arg(1);
    // SAFETY: an argument of the tracepoint.
    unsafe {
        let (pid, tgid) = task::ids(child);
        if pid == tgid {
            born(ctx.arg(0), child, task::key(child));
        } else {
            ring::filtered(KIND_FORK);
        }
    }
    0
}

/// Whom `fork` passed over has no entry.
#[btf_tracepoint(function = "sched_process_fork")]
pub(crate) fn fork_again(ctx: BtfTracePointContext) -> i32 {
    let child: Ptr = ctx.arg(1);
    // SAFETY: an argument of the tracepoint.
    unsafe {
        let (pid, tgid) = task::ids(child);
        let key = task::key(child);
        if pid == tgid && LINEAGE.get(key).is_none() {
            born(ctx.arg(0), child, key);
        }
    }
    0
}

/// # Safety
/// Arguments of `sched_process_fork`.
#[inline(always)]
unsafe fn born(forker: Ptr, child: Ptr, key: ProcKey) {
    // SAFETY: the caller's.
    unsafe {
        let lineage_parent = task::key(forker);
        if frozen!(FEATURES.preempted) != 0 && LINEAGE.get(lineage_parent).is_none() {
            late(lineage_parent, task::parent_key(forker));
        }
        let (job, spared, entered) = enter(&key, &lineage_parent, 0);
        let mut flags = if entered { 0 } else { FORK_NO_ENTRY };
        if task::is_kernel_thread(child) {
            flags |= KERNEL_THREAD;
        }
        ring::emit::<Fork>(KIND_FORK, |r| {
            r.write(Fork {
                hdr: ring::header(KIND_FORK, flags, key),
                lineage_parent,
                parent: task::parent_key(child),
                job,
                uid: task::uid(child),
                pad: 0,
                comm: task::comm(child),
            });
        });
        // A doomed forker dies here rather than at its next system call; the child at its own first one.
        if job != 0 && !spared && lineage_parent.tgid != 1 && doom::is_doomed(job) {
            doom::strike(lineage_parent, job);
        }
    }
}

/// The innermost job of the forker, whose entry this is, and its flags.
#[inline(always)]
fn inherited(l: &Lineage) -> (u64, u32) {
    let (job, flags) = word(l);
    if job != 0 || !labelling() {
        return (job, flags);
    }
    let above = above(l.parent.tgid, l.parent.start);
    let spared = LINEAGE_SPARED | LINEAGE_HEIRS | (spares() << SPARES_SHIFT);
    (above & !SPARED_BIT, if above & SPARED_BIT != 0 { spared } else { flags })
}

#[inline(always)]
fn word(l: &Lineage) -> (u64, u32) {
    // SAFETY: volatile, since `edit` may write the entry meanwhile on another CPU.
    unsafe { ((&raw const l.job).read_volatile(), (&raw const l.flags).read_volatile()) }
}

#[inline(always)]
pub(crate) fn spares() -> u32 {
    // SAFETY: volatile, the agent may change it meanwhile.
    CONTROL.get(0).map_or(0, |c| unsafe { (&raw const c.spares).read_volatile() })
}

#[inline(always)]
fn labelling() -> bool {
    // SAFETY: volatile, the agent may change it meanwhile.
    CONTROL.get(0).is_some_and(|c| unsafe { (&raw const c.labelling).read_volatile() != 0 })
}

/// Set in what [`above`] gives if that ancestor is spared with its heirs. Job numbers are boot-time nanoseconds, which are smaller.
const SPARED_BIT: u64 = 1 << 63;

/// The job of the nearest ancestor that has one, from this one upwards. A chain in which each process forks one successor and
/// exits is faster than the agent, which labels whom it has read of; those are ancestors of the chain's head by then, dead ones
/// mostly, and what its head forks next is told here.
///
/// With a symbol of its own it is verified once and by itself, not again for each way that leads to it.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn above(tgid: u32, start: u64) -> u64 {
    let mut at = ProcKey { start, tgid, pad: 0 };
    for _ in 0..LABEL_DEPTH {
        // PID 1 and the kernel's own are in no job.
        if at.tgid <= 1 {
            return 0;
        }
        // SAFETY: map values stay mapped; what they hold is checked there.
        let read = unsafe { checked(|| LINEAGE.get(at)).or_else(|| checked(|| DEAD.get(at))) };
        let Some((job, flags, up)) = read else { return 0 };
        if job != 0 {
            // One that is forgotten leaves its number with the dead.
            // SAFETY: only whether there is an entry is asked.
            if unsafe { JOBS.get(job) }.is_none() {
                return 0;
            }
            return if is_spared(handed_down(flags), spares()) { job | SPARED_BIT } else { job };
        }
        at = up;
    }
    0
}

/// What an entry says. A slot is used again as soon as it is free, for anybody; no key comes back. So what still has the key had it
/// while it was read; else it may have moved from the living to the dead.
#[inline(always)]
pub(crate) fn checked(get: impl Fn() -> Option<&'static Lineage>) -> Option<(u64, u32, ProcKey)> {
    let l = get()?;
    let (job, flags) = word(l);
    let up = l.parent;
    get().is_some_and(|now| core::ptr::eq(now, l)).then_some((job, flags, up))
}

/// Enters one whose fork was passed over, from who would reap it now.
#[inline(always)]
fn late(key: ProcKey, parent: ProcKey) {
    enter_late(key.tgid, key.start, parent.tgid, parent.start);
}

/// With a symbol of its own, as [`above`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn enter_late(tgid: u32, start: u64, parent_tgid: u32, parent_start: u64) -> u32 {
    let key = ProcKey { start, tgid, pad: 0 };
    // SAFETY: only whether there is an entry is asked.
    if unsafe { LINEAGE.get(key) }.is_some() {
        return 0;
    }
    // Who adopted it may be its parent by now, so the fork probe's own word this is not.
    let (_, _, entered) =
        enter(&key, &ProcKey { start: parent_start, tgid: parent_tgid, pad: 0 }, LINEAGE_MENDED);
    entered.into()
}

/// Enters the child with what it inherits, and with `own` flags: its innermost job, whether its forker is spared, and whether there
/// was room.
#[inline(always)]
fn enter(key: &ProcKey, forker: &ProcKey, own: u32) -> (u64, bool, bool) {
    // The forker is `current`, or `current`'s parent at the time that this program, an RCU reader, began: its entry is deleted
    // only when it is freed, and is edited in place.
    let above = LINEAGE.get_ptr_mut(forker);
    // SAFETY: as said.
    let (job, flags) = above.map_or((0, 0), |l| unsafe {
        let life = &raw mut (*l).life;
        let before = life.read_volatile();
        if before & LIFE_FORKED == 0 {
            life.write_volatile(before | LIFE_FORKED);
        }
        word(&*l)
    });
    member::mark(key.tgid, false);
    let new = Lineage { parent: *forker, job, flags: handed_down(flags) | own, life: 0, told: 0, pad: 0 };
    let made = LINEAGE.insert(key, new, u64::from(BPF_NOEXIST));
    if let Err(e) = made
        && e != EEXIST
    {
        return (job, is_spared(flags, spares()), false);
    }
    // The agent may be labelling: it wrote the forker's entry after it was read above, or made it, and looked for children
    // before this one was entered; or it entered this child itself. So the forker is read once more.
    // SAFETY: as said.
    let (now_job, now_flags) =
        above.or_else(|| LINEAGE.get_ptr_mut(forker)).map_or((0, 0), |l| unsafe { inherited(&*l) });
    if now_job != job || handed_down(now_flags) != handed_down(flags) || made.is_err() {
        if let Some(entry) = LINEAGE.get_ptr_mut(key) {
            // SAFETY: the child is not freed yet, so its entry stays.
            unsafe {
                (&raw mut (*entry).parent).write_volatile(*forker);
                (&raw mut (*entry).job).write_volatile(now_job);
                (&raw mut (*entry).flags).write_volatile(handed_down(now_flags) | own);
            }
        }
    }
    if now_job != 0 {
        member::mark(key.tgid, true);
    }
    (now_job, is_spared(now_flags, spares()), true)
}

/// `sched_process_exit(struct task_struct *p[, bool group_dead])`: for each thread, before files are closed, children
/// are given away and the task becomes a zombie. `signal->live` has been counted down.
#[btf_tracepoint(function = "sched_process_exit")]
pub(crate) fn exit(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: the tracepoint's context.
    unsafe { died(&ctx, false) }
}

/// Whom `exit` passed over is not marked dead, nor told of.
#[btf_tracepoint(function = "sched_process_exit")]
pub(crate) fn exit_again(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: as above.
    unsafe { died(&ctx, true) }
}

/// # Safety
/// The context of `sched_process_exit`.
#[inline(always)]
unsafe fn died(ctx: &BtfTracePointContext, again: bool) -> i32 {
    let task: Ptr = ctx.arg(0);
    // SAFETY: an argument of the tracepoint; a task's group leader is a task.
    unsafe {
        let Some(leader) = task::follow(task, frozen!(OFFSETS.task_group_leader)) else { return 0 };
        let (live, status, group) = task::live_and_status(leader);
        let (pid, tgid) = task::ids(task);
        let dead =
            if frozen!(FEATURES.exit_group_dead) != 0 { ctx.arg::<u64>(1) & 1 != 0 } else { live == 0 };
        let key = task::key(task);
        if frozen!(FEATURES.preempted) != 0 {
            heirs(task, leader, key);
        }
        let news = if dead { first_death(&key, again) } else { pid == tgid && is_news(&key, again) };
        if !news {
            if !again {
                ring::filtered(KIND_EXIT);
            }
            return 0;
        }
        let kind = if dead { KIND_EXIT } else { KIND_LEADER_EXIT };
        ring::emit::<Exit>(kind, |r| {
            r.write(Exit {
                hdr: ring::header(kind, if group { EXIT_GROUP } else { 0 }, key),
                status,
                live,
                comm: task::comm(leader),
            });
        });
    }
    0
}

/// Children of this thread whose forks were passed over are entered before they are given away. Each thread has children of its own,
/// who go to another thread of the group first if one lives.
///
/// The list is read without its lock: one that is reaped meanwhile by another thread ends the walk, or leads round in it until the
/// bound. No child is freed while this RCU reader runs.
///
/// # Safety
/// As [`task::load`]; `leader` is the task's.
#[inline(always)]
unsafe fn heirs(task: Ptr, leader: Ptr, key: ProcKey) {
    let head = task.wrapping_add(frozen!(OFFSETS.task_children) as usize);
    // SAFETY: the caller's.
    let mut at: Ptr = unsafe { task::load(task, frozen!(OFFSETS.task_children)) };
    if at == head {
        return;
    }
    // Its own fork may have been passed over too.
    // SAFETY: the caller's; only whether there is an entry is asked.
    unsafe {
        if LINEAGE.get(key).is_none() {
            late(key, task::parent_key(leader));
        }
    }
    for _ in 0..HEIRS_MAX {
        if at == head {
            return;
        }
        let child = at.wrapping_sub(frozen!(OFFSETS.task_sibling) as usize);
        let (Some(start), Some(tgid), Some(next)) = (
            task::probe::<u64>(child, frozen!(OFFSETS.task_start_boottime)),
            task::probe::<u32>(child, frozen!(OFFSETS.task_tgid)),
            task::probe::<Ptr>(at, 0),
        ) else {
            return;
        };
        late(ProcKey { start, tgid, pad: 0 }, key);
        at = next;
    }
}

/// Marks the group dead; false if it was already. Not atomic, and the entry may be missing: two last threads can both
/// get true, and the forest takes the first record per key.
#[inline(always)]
fn first_death(key: &ProcKey, again: bool) -> bool {
    let Some(entry) = LINEAGE.get_ptr_mut(key) else { return !again };
    // SAFETY: the entry is deleted only when the leader is freed, and its thread here is not yet dead.
    unsafe {
        let life = &raw mut (*entry).life;
        let before = life.read_volatile();
        if before & LIFE_ENDED != 0 {
            return false;
        }
        life.write_volatile(before | LIFE_ENDED);
    }
    true
}

/// Whether an exec, or a leader's exit, is still to be told of by this program, the first or the second. Both run in one task, and
/// no other of its group is at either meanwhile: an exec waits for the leader's end. Who has no entry is told of by the first only.
#[inline(always)]
pub(crate) fn is_news(key: &ProcKey, again: bool) -> bool {
    if frozen!(FEATURES.preempted) == 0 {
        return !again;
    }
    let Some(entry) = LINEAGE.get_ptr_mut(key) else { return !again };
    // SAFETY: the entry is deleted only when the leader is freed, and its group lives.
    unsafe {
        let told = &raw mut (*entry).told;
        let before = told.read_volatile();
        told.write_volatile(u8::from(!again));
        !again || before == 0
    }
}

/// `sched_process_free(struct task_struct *p)`: an RCU grace period after somebody, or the kernel, reaped it.
#[btf_tracepoint(function = "sched_process_free")]
pub(crate) fn free(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: the tracepoint's context.
    unsafe { freed(&ctx, false) }
}

/// Whom `free` passed over still has an entry.
#[btf_tracepoint(function = "sched_process_free")]
pub(crate) fn free_again(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: as above.
    unsafe { freed(&ctx, true) }
}

/// # Safety
/// The context of `sched_process_free`.
#[inline(always)]
unsafe fn freed(ctx: &BtfTracePointContext, again: bool) -> i32 {
    let task: Ptr = ctx.arg(0);
    // SAFETY: an argument of the tracepoint.
    unsafe {
        let (pid, tgid) = task::ids(task);
        // A thread, or (after the exec of another thread) the old leader, which gave its pid away.
        if pid != tgid {
            if !again {
                ring::filtered(KIND_REAP);
            }
            return 0;
        }
        let key = task::key(task);
        match LINEAGE.get(key) {
            Some(entry) => {
                // No chain of lineage leads through one without children. Of one from before the probes that is not known.
                if entry.life & LIFE_FORKED != 0 || entry.flags & LINEAGE_MENDED != 0 {
                    // Copied first: the slot may be used again as soon as it is deleted.
                    let entry = *entry;
                    let _ = DEAD.insert(key, entry, 0);
                }
                let _ = LINEAGE.remove(key);
            }
            None if again => return 0,
            None => {}
        }
        let (_, status, _) = task::live_and_status(task);
        ring::emit::<Reap>(KIND_REAP, |r| {
            r.write(Reap { hdr: ring::header(KIND_REAP, 0, key), status, pad: 0 });
        });
    }
    0
}
