//! The events of the probes as lines of aya-log, for `agent --trace-probes`.
//!
//! Programs of their own on the same tracepoints: they are attached, behind the others, only while the agent reads the
//! lines, so they cost nothing else, and a verifier that refuses them takes nothing else with it.

use aya_ebpf::macros::btf_tracepoint;
use aya_ebpf::programs::BtfTracePointContext;
use aya_log_ebpf::info;

use super::task::{self, Ptr};
use super::{CONTROL, LINEAGE, frozen};

#[inline(always)]
fn wanted() -> bool {
    // SAFETY: volatile, the agent may change it meanwhile.
    CONTROL.get(0).is_some_and(|c| unsafe { (&raw const c.trace).read_volatile() != 0 })
}

#[btf_tracepoint(function = "sched_process_fork")]
pub(crate) fn trace_fork(ctx: BtfTracePointContext) -> i32 {
    let (forker, child): (Ptr, Ptr) = (ctx.arg(0), ctx.arg(1));
    // SAFETY: arguments of the tracepoint.
    let ((pid, tgid), by, key) = unsafe { (task::ids(child), task::key(forker), task::key(child)) };
    if pid == tgid && wanted() {
        // SAFETY: the child does not run yet, so its entry stays.
        let job = unsafe { LINEAGE.get(key) }.map_or(u64::MAX, |l| l.job);
        info!(&ctx, "fork {}:{} by {}:{}, job {}", key.tgid, key.start, by.tgid, by.start, job);
    }
    0
}

#[btf_tracepoint(function = "sched_process_exec")]
pub(crate) fn trace_exec(ctx: BtfTracePointContext) -> i32 {
    let task: Ptr = ctx.arg(0);
    let old_tid: u32 = ctx.arg(1);
    // SAFETY: an argument of the tracepoint.
    let key = unsafe { task::key(task) };
    if wanted() {
        info!(&ctx, "exec {}:{}, thread {}", key.tgid, key.start, old_tid);
    }
    0
}

#[btf_tracepoint(function = "sched_process_exit")]
pub(crate) fn trace_exit(ctx: BtfTracePointContext) -> i32 {
    let task: Ptr = ctx.arg(0);
    // SAFETY: an argument of the tracepoint; a task's group leader is a task.
    unsafe {
        let Some(leader) = task::follow(task, frozen!(OFFSETS.task_group_leader)) else { return 0 };
        let (live, status, _) = task::live_and_status(leader);
        let (key, (pid, _)) = (task::key(task), task::ids(task));
        if wanted() {
            info!(&ctx, "exit {}:{}, thread {}, {} live, status {}", key.tgid, key.start, pid, live, status);
        }
    }
    0
}

#[btf_tracepoint(function = "sched_process_free")]
pub(crate) fn trace_free(ctx: BtfTracePointContext) -> i32 {
    let task: Ptr = ctx.arg(0);
    // SAFETY: an argument of the tracepoint.
    let ((pid, tgid), key) = unsafe { (task::ids(task), task::key(task)) };
    if pid == tgid && wanted() {
        info!(&ctx, "free {}:{}", key.tgid, key.start);
    }
    0
}
