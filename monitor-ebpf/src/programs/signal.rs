//! Signals as the kernel generates them, delivered or not.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::bpf_get_current_task;
use aya_ebpf::macros::btf_tracepoint;
use aya_ebpf::programs::BtfTracePointContext;
use monitor_abi::{
    INFO_KERNEL, INFO_NOINFO, INFO_SIGINFO, KIND_SIGNAL, ProcKey, SIGNAL_GROUP, SIGNAL_SENDER_EXITING, Signal,
};

use super::task::{self, PF_EXITING, Ptr};
use super::{CONTROL, frozen, ring};

/// `signal_generate(int sig, struct kernel_siginfo *info, struct task_struct *task, int group, int result)`, in any
/// context, interrupts too.
#[btf_tracepoint(function = "signal_generate")]
pub(crate) fn signal(ctx: BtfTracePointContext) -> i32 {
    let number: u32 = ctx.arg(0);
    let wanted = match CONTROL.get(0) {
        // SAFETY: volatile, the agent may change it meanwhile.
        Some(c) => unsafe {
            (&raw const c.signal_mask).read_volatile() >> (number.wrapping_sub(1) & 63) & 1 != 0
        },
        None => false,
    };
    if !wanted {
        ring::filtered(KIND_SIGNAL);
        return 0;
    }
    let target: Ptr = ctx.arg(2);
    let group: u32 = ctx.arg(3);
    let result: u32 = ctx.arg(4);
    // `info` is 0, 1 or a pointer; the verifier takes it for a pointer that is never null and would drop the branch
    // for 0, so the word is read by helper.
    let info = task::probe::<u64>(ctx.as_ptr().cast(), 8).unwrap_or(1);
    let (info, code) = match info {
        0 => (INFO_NOINFO, 0),
        1 => (INFO_KERNEL, 0),
        p => (INFO_SIGINFO, task::probe::<i32>(p as Ptr, frozen!(OFFSETS.siginfo_code)).unwrap_or(0)),
    };
    let (sender, sender_uid, exiting) = current();
    let mut flags = if group & 1 != 0 { SIGNAL_GROUP } else { 0 };
    if exiting {
        flags |= SIGNAL_SENDER_EXITING;
    }
    ring::emit::<Signal>(KIND_SIGNAL, |r| {
        // SAFETY: an argument of the tracepoint, and reserved ring space.
        unsafe {
            r.write(Signal {
                hdr: ring::header(KIND_SIGNAL, flags, task::key(target)),
                sender,
                target_tid: task::ids(target).0,
                sender_uid,
                code,
                signal: number as u16,
                info,
                result: result as u8,
            });
        }
    });
    0
}

/// Who runs here, its real uid, and whether it is exiting. Read by helper: `bpf_get_current_task_btf` is 5.11.
#[inline(always)]
fn current() -> (ProcKey, u32, bool) {
    // SAFETY: a helper without arguments.
    let task = unsafe { bpf_get_current_task() } as Ptr;
    let leader = task::probe::<Ptr>(task, frozen!(OFFSETS.task_group_leader)).unwrap_or(task);
    let key = ProcKey {
        start: task::probe(leader, frozen!(OFFSETS.task_start_boottime)).unwrap_or(0),
        tgid: task::probe(leader, frozen!(OFFSETS.task_tgid)).unwrap_or(0),
        pad: 0,
    };
    let uid = task::probe::<Ptr>(task, frozen!(OFFSETS.task_cred))
        .and_then(|cred| task::probe(cred, frozen!(OFFSETS.cred_uid)))
        .unwrap_or(0);
    let flags: u32 = task::probe(task, frozen!(OFFSETS.task_flags)).unwrap_or(0);
    (key, uid, flags & PF_EXITING != 0)
}
