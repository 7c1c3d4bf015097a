//! Fork, death and reap of processes, and the lineage map that follows them.
//!
//! Where programs can be preempted (Linux 7, real-time kernels) the kernel skips a program for a task if a preempted task on the same CPU
//! is still inside it. There each program has a second one attached behind it, `_again`, that does the work for skipped tasks: without it a
//! chain would lose its lineage and escape its job, and an exit would be lost. If one task is preempted in the first program and another
//! in the second, a third task's fork is skipped by both. Its child is entered when the child forks, or when its parent ends, before the child
//! is adopted: in each case before lineage is passed on.

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::macros::btf_tracepoint;
use aya_ebpf::programs::BtfTracePointContext;
use monitor_abi::{
    EXIT_GROUP, Exit, FORK_NO_ENTRY, Fork, KERNEL_THREAD, KIND_EXIT, KIND_FORK, KIND_LEADER_EXIT, KIND_REAP,
    LABEL_DEPTH, LIFE_ENDED, LIFE_FORKED, LINEAGE_MENDED, LINEAGE_SPARED, LINEAGE_SPARES_CHILDREN, Lineage,
    MISSED_CHILDREN_MAX, ProcKey, Reap, SPARES_SHIFT, handed_down, is_spared,
};

use super::sparing::{epoch, is_labelling, job_and_flags, read_entry};
use super::task::{self, Ptr};
use super::{DEAD, JOBS, LINEAGE, doom, frozen, job_bitmap, ring};

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
            record_fork(ctx.arg(0), child, task::key(child));
        } else {
            ring::filtered(KIND_FORK);
        }
    }
    0
}

/// A missing entry means that `fork` was skipped for this task.
#[btf_tracepoint(function = "sched_process_fork")]
pub(crate) fn fork_again(ctx: BtfTracePointContext) -> i32 {
    let child: Ptr = ctx.arg(1);
    // SAFETY: an argument of the tracepoint.
    unsafe {
        let (pid, tgid) = task::ids(child);
        let key = task::key(child);
        if pid == tgid && LINEAGE.get(key).is_none() {
            record_fork(ctx.arg(0), child, key);
        }
    }
    0
}

/// # Safety
/// Arguments of `sched_process_fork`.
#[inline(always)]
unsafe fn record_fork(forker: Ptr, child: Ptr, key: ProcKey) {
    // SAFETY: the caller's.
    unsafe {
        let lineage_parent = task::key(forker);
        if frozen!(FEATURES.preempted) != 0 && LINEAGE.get(lineage_parent).is_none() {
            enter_missed(lineage_parent, task::parent_key(forker));
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
        // A doomed forker dies here and not only at its next system call; the child dies at its own first one.
        if job != 0 && !spared && lineage_parent.tgid != 1 && doom::is_doomed(job) {
            doom::send_sigkill(lineage_parent, job);
        }
    }
}

/// The innermost job of a forker, by its entry, and its flags.
#[inline(always)]
fn inherited(l: &Lineage) -> (u64, u32) {
    let (job, flags) = job_and_flags(l);
    if job != 0 || !is_labelling() {
        return (job, flags);
    }
    let found = inherited_job(l.parent.tgid, l.parent.start);
    let spared = LINEAGE_SPARED | LINEAGE_SPARES_CHILDREN | (epoch() << SPARES_SHIFT);
    (found & !SPARED_BIT, if found & SPARED_BIT != 0 { spared } else { flags })
}

/// Set in the result of [`inherited_job`] if that ancestor is spared with its descendants. Job numbers are boot-time nanoseconds, which are smaller.
const SPARED_BIT: u64 = 1 << 63;

/// The job of the nearest ancestor that has one, from this process upwards; 0 = none. A chain in which each process forks one successor and
/// exits is faster than the agent's labelling: the processes that the agent has read are ancestors of the chain's head by then, mostly dead
/// ones, and the child that the head forks next finds their job here.
///
/// With a symbol of its own it is verified once, and not again for each path that leads to it.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn inherited_job(tgid: u32, start: u64) -> u64 {
    let mut at = ProcKey { start, tgid, pad: 0 };
    for _ in 0..LABEL_DEPTH {
        // PID 1 and kernel threads are in no job.
        if at.tgid <= 1 {
            return 0;
        }
        // SAFETY: map values stay mapped; what they hold is checked there.
        let read = unsafe { read_entry(|| LINEAGE.get(at)).or_else(|| read_entry(|| DEAD.get(at))) };
        let Some((job, flags, up)) = read else { return 0 };
        if job != 0 {
            // A job that is over leaves its number in the entries of the dead.
            // SAFETY: only whether there is an entry is asked.
            if unsafe { JOBS.get(job) }.is_none() {
                return 0;
            }
            return if is_spared(handed_down(flags), epoch()) { job | SPARED_BIT } else { job };
        }
        at = up;
    }
    0
}

/// Enters a process whose fork was skipped; its present parent stands for its lineage parent.
#[inline(always)]
fn enter_missed(key: ProcKey, parent: ProcKey) {
    enter_late(key.tgid, key.start, parent.tgid, parent.start);
}

/// With a symbol of its own, as [`inherited_job`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn enter_late(tgid: u32, start: u64, parent_tgid: u32, parent_start: u64) -> u32 {
    let key = ProcKey { start, tgid, pad: 0 };
    // SAFETY: only whether there is an entry is asked.
    if unsafe { LINEAGE.get(key) }.is_some() {
        return 0;
    }
    // The parent may be an adopter by now: marked as mended, since this did not come from the fork probe.
    let (_, _, entered) =
        enter(&key, &ProcKey { start: parent_start, tgid: parent_tgid, pad: 0 }, LINEAGE_MENDED);
    entered.into()
}

/// Enters the child with what it inherits and with its `own` flags. Gives its innermost job, whether its forker is spared, and whether there
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
        job_and_flags(&*l)
    });
    job_bitmap::mark(key.tgid, false);
    let new = Lineage { parent: *forker, job, flags: handed_down(flags) | own, life: 0, told: 0, pad: 0 };
    let made = LINEAGE.insert(key, new, u64::from(BPF_NOEXIST));
    if let Err(e) = made
        && e != EEXIST
    {
        return (job, is_spared(flags, epoch()), false);
    }
    // Safe against labelling by the agent at the same time: the agent may have written or made the forker's entry after it was read above and
    // looked for children before this one was entered, or entered this child itself. So the forker is read once more.
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
        job_bitmap::mark(key.tgid, true);
    }
    (now_job, is_spared(now_flags, epoch()), true)
}

/// `sched_process_exit(struct task_struct *p[, bool group_dead])`: for each thread, before files are closed, children
/// are given away and the task becomes a zombie. `signal->live` has been counted down.
#[btf_tracepoint(function = "sched_process_exit")]
pub(crate) fn exit(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: the tracepoint's context.
    unsafe { record_exit(&ctx, false) }
}

/// A task for which `exit` was skipped is neither marked as ended nor reported.
#[btf_tracepoint(function = "sched_process_exit")]
pub(crate) fn exit_again(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: as above.
    unsafe { record_exit(&ctx, true) }
}

/// # Safety
/// The context of `sched_process_exit`.
#[inline(always)]
unsafe fn record_exit(ctx: &BtfTracePointContext, again: bool) -> i32 {
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
            enter_missed_children(task, leader, key);
        }
        let unreported =
            if dead { mark_ended(&key, again) } else { pid == tgid && is_unreported(&key, again) };
        if !unreported {
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

/// Children of this thread whose forks were skipped are entered before they are reparented. Each thread has children of its own; they go to
/// another thread of the group first if one lives.
///
/// The list is read without its lock. A child that another thread reaps at the same time ends the walk, or makes it circle up to the bound. No
/// child is freed while this RCU reader runs.
///
/// # Safety
/// As [`task::load`]; `leader` is the task's.
#[inline(always)]
unsafe fn enter_missed_children(task: Ptr, leader: Ptr, key: ProcKey) {
    let head = task.wrapping_add(frozen!(OFFSETS.task_children) as usize);
    // SAFETY: the caller's.
    let mut at: Ptr = unsafe { task::load(task, frozen!(OFFSETS.task_children)) };
    if at == head {
        return;
    }
    // Its own fork may have been skipped too.
    // SAFETY: the caller's; only whether there is an entry is asked.
    unsafe {
        if LINEAGE.get(key).is_none() {
            enter_missed(key, task::parent_key(leader));
        }
    }
    for _ in 0..MISSED_CHILDREN_MAX {
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
        enter_missed(ProcKey { start, tgid, pad: 0 }, key);
        at = next;
    }
}

/// Marks the group as ended; false if it was already. Not atomic, and the entry may be missing: the two last threads can both
/// get true, and the forest takes the first record of a key.
#[inline(always)]
fn mark_ended(key: &ProcKey, again: bool) -> bool {
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

/// Whether this program (the first, or the second if `again`) has to report an exec or the exit of a leader. Both programs run in one task, and no
/// other task of the group is at either at the same time: an exec waits for the leader's end. A process without an entry is reported by the first only.
#[inline(always)]
pub(crate) fn is_unreported(key: &ProcKey, again: bool) -> bool {
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

/// `sched_process_free(struct task_struct *p)`: an RCU grace period after the parent, or the kernel itself, reaped it.
#[btf_tracepoint(function = "sched_process_free")]
pub(crate) fn free(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: the tracepoint's context.
    unsafe { record_reap(&ctx, false) }
}

/// A remaining entry means that `free` was skipped for this task.
#[btf_tracepoint(function = "sched_process_free")]
pub(crate) fn free_again(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: as above.
    unsafe { record_reap(&ctx, true) }
}

/// # Safety
/// The context of `sched_process_free`.
#[inline(always)]
unsafe fn record_reap(ctx: &BtfTracePointContext, again: bool) -> i32 {
    let task: Ptr = ctx.arg(0);
    // SAFETY: an argument of the tracepoint.
    unsafe {
        let (pid, tgid) = task::ids(task);
        // A thread, or (after the exec of another thread) the old leader, whose pid went to that thread.
        if pid != tgid {
            if !again {
                ring::filtered(KIND_REAP);
            }
            return 0;
        }
        let key = task::key(task);
        match LINEAGE.get(key) {
            Some(entry) => {
                // No chain of lineage leads through a process that never forked. Whether one from before the probes did is not known.
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
