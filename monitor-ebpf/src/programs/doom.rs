//! Doomed jobs: a member that enters a system call is killed. `sys_enter` is attached only while a job is doomed.
//!
//! Killing forkers alone does not stop a chain in which each process forks one successor and exits; at the entry of
//! its first system call the successor has not forked yet, and a pending SIGKILL makes its fork fail.

use aya_ebpf::helpers::generated::bpf_send_signal;
use aya_ebpf::helpers::{bpf_get_current_pid_tgid, bpf_get_current_task, bpf_ktime_get_boot_ns};
use aya_ebpf::macros::btf_tracepoint;
use aya_ebpf::programs::BtfTracePointContext;
use monitor_abi::{JOB_DEPTH, KIND_KILL, Kill, ProcKey, is_spared};

use super::sparing::epoch;
use super::task::{self, Ptr};
use super::{JOBS, KILLS, LINEAGE, frozen, job_bitmap, ring};

const SIGKILL: u32 = 9;
const EPERM: i64 = -1;
const EBUSY: i64 = -16;

/// Whether this job, or one around it, is doomed and the doom has not expired.
#[inline(always)]
pub(crate) fn is_doomed(job: u64) -> bool {
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_boot_ns() };
    let mut at = job;
    for _ in 0..JOB_DEPTH {
        if at == 0 {
            return false;
        }
        // SAFETY: the slot may be given to another job while it is read: `id`, read last, tells.
        let Some(j) = (unsafe { JOBS.get(at) }) else { return false };
        // SAFETY: volatile reads in this order, see `Job::id`.
        let (until, outer, id) = unsafe {
            (
                (&raw const j.doom_until).read_volatile(),
                (&raw const j.outer).read_volatile(),
                (&raw const j.id).read_volatile(),
            )
        };
        if id != at {
            return false;
        }
        if until > now {
            return true;
        }
        at = outer;
    }
    false
}

/// SIGKILL to `current`, counted and recorded.
#[inline(always)]
pub(crate) fn send_sigkill(key: ProcKey, job: u64) {
    // SAFETY: the helper signals `current` only.
    let result = unsafe { bpf_send_signal(SIGKILL) };
    if let Some(k) = KILLS.get_ptr_mut(0) {
        // SAFETY: this CPU's value in the map.
        unsafe {
            match result {
                0 => ring::add_one(&raw mut (*k).ok),
                EBUSY => ring::add_one(&raw mut (*k).busy),
                EPERM => ring::add_one(&raw mut (*k).perm),
                _ => ring::add_one(&raw mut (*k).other),
            }
        }
    }
    ring::emit::<Kill>(KIND_KILL, |r| {
        // SAFETY: reserved ring space.
        unsafe { r.write(Kill { hdr: ring::header(KIND_KILL, 0, key), job, result: result as i32, pad: 0 }) };
    });
}

/// `sys_enter(struct pt_regs *regs, long id)`: each system call of each process on the host, so it does little.
#[btf_tracepoint(function = "sys_enter")]
pub(crate) fn sys_enter(_: BtfTracePointContext) -> i32 {
    let tgid = (bpf_get_current_pid_tgid() >> 32) as u32;
    // The kernel's own protection of init does not hold against a probe's signal.
    if tgid == 1 || !job_bitmap::may_be(tgid) {
        return 0;
    }
    // SAFETY: a helper without arguments.
    let task = unsafe { bpf_get_current_task() } as Ptr;
    let Some(leader) = task::probe::<Ptr>(task, frozen!(OFFSETS.task_group_leader)) else { return 0 };
    let Some(start) = task::probe(leader, frozen!(OFFSETS.task_start_boottime)) else { return 0 };
    let key = ProcKey { start, tgid, pad: 0 };
    // SAFETY: `current` lives, so its entry stays; it is edited in place, hence volatile.
    let Some((job, flags)) = (unsafe {
        LINEAGE.get(key).map(|l| ((&raw const l.job).read_volatile(), (&raw const l.flags).read_volatile()))
    }) else {
        return 0;
    };
    if job == 0 || is_spared(flags, epoch()) || !is_doomed(job) {
        return 0;
    }
    send_sigkill(key, job);
    0
}
