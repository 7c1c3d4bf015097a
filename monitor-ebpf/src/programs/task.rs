//! Reading the kernel's structures at offsets that the verifier sees as constants.

use aya_ebpf::helpers::bpf_probe_read_kernel;
use monitor_abi::{COMM_LEN, ProcKey};

use super::frozen;

/// An address in the kernel: of a `task_struct` or of what hangs on one.
pub(crate) type Ptr = *const u8;

/// `include/linux/sched.h`.
pub(crate) const PF_EXITING: u32 = 0x4;
pub(crate) const PF_KTHREAD: u32 = 0x0020_0000;
/// `include/linux/sched/signal.h`.
const SIGNAL_GROUP_EXIT: u32 = 4;
const SIGNAL_UNKILLABLE: u32 = 0x40;

/// A load through a pointer that the verifier knows by its BTF type (an address that is bad reads as 0).
///
/// # Safety
/// `base` is an argument of a tracing program or was loaded from one, and is not null.
#[inline(always)]
pub(crate) unsafe fn load<T: Copy>(base: Ptr, offset: u32) -> T {
    // SAFETY: the caller's; the verifier checks it once more.
    unsafe { base.add(offset as usize).cast::<T>().read_volatile() }
}

/// A load through any address, by helper; `None` if it faults.
#[inline(always)]
pub(crate) fn probe<T>(base: Ptr, offset: u32) -> Option<T> {
    // SAFETY: the helper takes any address.
    unsafe { bpf_probe_read_kernel(base.wrapping_add(offset as usize).cast::<T>()) }.ok()
}

/// The pointer at `offset`, if it is not null. Each pointer is compared before it is followed: kernels whose BTF has
/// type tags (`__rcu`) call some of them nullable.
///
/// # Safety
/// As [`load`].
#[inline(always)]
pub(crate) unsafe fn follow(base: Ptr, offset: u32) -> Option<Ptr> {
    // SAFETY: the caller's.
    let p: Ptr = unsafe { load(base, offset) };
    if p.is_null() { None } else { Some(p) }
}

/// The key of a task's process.
///
/// # Safety
/// As [`load`], `task` being a task.
#[inline(always)]
pub(crate) unsafe fn key(task: Ptr) -> ProcKey {
    // SAFETY: the caller's; a task always has a group leader. A thread has a start of its own, hence the leader's.
    unsafe {
        match follow(task, frozen!(OFFSETS.task_group_leader)) {
            Some(leader) => ProcKey {
                start: load(leader, frozen!(OFFSETS.task_start_boottime)),
                tgid: load(leader, frozen!(OFFSETS.task_tgid)),
                pad: 0,
            },
            None => ProcKey { start: 0, tgid: 0, pad: 0 },
        }
    }
}

/// The key of the process that would reap this task's.
///
/// # Safety
/// As [`load`], `task` being a task.
#[inline(always)]
pub(crate) unsafe fn parent_key(task: Ptr) -> ProcKey {
    // SAFETY: the caller's.
    unsafe {
        match follow(task, frozen!(OFFSETS.task_real_parent)) {
            Some(parent) => key(parent),
            None => ProcKey { start: 0, tgid: 0, pad: 0 },
        }
    }
}

/// `(pid, tgid)` of a task.
///
/// # Safety
/// As [`load`], `task` being a task.
#[inline(always)]
pub(crate) unsafe fn ids(task: Ptr) -> (u32, u32) {
    // SAFETY: the caller's.
    unsafe { (load(task, frozen!(OFFSETS.task_pid)), load(task, frozen!(OFFSETS.task_tgid))) }
}

/// The real uid.
///
/// # Safety
/// As [`load`], `task` being a task.
#[inline(always)]
pub(crate) unsafe fn uid(task: Ptr) -> u32 {
    // SAFETY: the caller's.
    unsafe {
        match follow(task, frozen!(OFFSETS.task_cred)) {
            Some(cred) => load(cred, frozen!(OFFSETS.cred_uid)),
            None => 0,
        }
    }
}

/// Threads that are not exiting, and the wait status as it stands: the group's, if it was ended as one, else the
/// leader's (`wait_task_zombie()` in `kernel/exit.c`).
///
/// # Safety
/// As [`load`], `leader` being a group leader.
#[inline(always)]
pub(crate) unsafe fn live_and_status(leader: Ptr) -> (u32, i32, bool) {
    // SAFETY: the caller's.
    unsafe {
        let own: i32 = load(leader, frozen!(OFFSETS.task_exit_code));
        let Some(signal) = follow(leader, frozen!(OFFSETS.task_signal)) else { return (0, own, false) };
        let live: u32 = load(signal, frozen!(OFFSETS.signal_live));
        let flags: u32 = load(signal, frozen!(OFFSETS.signal_flags));
        if flags & SIGNAL_GROUP_EXIT != 0 {
            (live, load(signal, frozen!(OFFSETS.signal_group_exit_code)), true)
        } else {
            (live, own, false)
        }
    }
}

/// Whether it adopts orphans: the init of a pid namespace (marked unkillable), or a subreaper.
///
/// # Safety
/// As [`load`], `leader` being a group leader.
#[inline(always)]
pub(crate) unsafe fn adopts(leader: Ptr) -> bool {
    // SAFETY: the caller's.
    unsafe {
        let Some(signal) = follow(leader, frozen!(OFFSETS.task_signal)) else { return false };
        let flags: u32 = load(signal, frozen!(OFFSETS.signal_flags));
        let bits: u8 = probe(signal, frozen!(OFFSETS.signal_subreaper)).unwrap_or(0);
        flags & SIGNAL_UNKILLABLE != 0 || u32::from(bits) & frozen!(OFFSETS.signal_subreaper_mask) != 0
    }
}

/// # Safety
/// As [`load`], `task` being a task.
#[inline(always)]
pub(crate) unsafe fn is_kernel_thread(task: Ptr) -> bool {
    // SAFETY: the caller's.
    let flags: u32 = unsafe { load(task, frozen!(OFFSETS.task_flags)) };
    flags & PF_KTHREAD != 0
}

/// # Safety
/// As [`load`], `task` being a task.
#[inline(always)]
pub(crate) unsafe fn comm(task: Ptr) -> [u8; COMM_LEN] {
    let at = frozen!(OFFSETS.task_comm);
    // SAFETY: the caller's. Whole words of the array; its place in the struct need not be aligned for the compiler.
    let words: [u64; 2] = unsafe { [load(task, at), load(task, at + 8)] };
    // SAFETY: the same bytes.
    unsafe { core::mem::transmute(words) }
}
