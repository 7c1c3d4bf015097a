//! Exec: file name and argv go into the record, since a short-lived process is gone before /proc can be read.
//!
//! The record is built in reserved ring space, whose size must be a constant: one of three is taken.

use aya_ebpf::helpers::{bpf_get_current_cgroup_id, generated as helpers};
use aya_ebpf::macros::btf_tracepoint;
use aya_ebpf::programs::BtfTracePointContext;
use monitor_abi::{
    ARGV_MAX, Counter, EXEC_ARGV_CUT, EXEC_ARGV_UNREAD, EXEC_FILENAME_CUT, ExecHead, FILENAME_MAX, KIND_EXEC,
};

use super::task::{self, Ptr};
use super::{frozen, lifecycle, ring};

/// An exec record with room for `F` bytes of file name and `A` of argv behind it. The two stand close together, so
/// the room is theirs in sum; `F` and `A` are what the verifier can check one by one.
#[repr(C, align(8))]
struct Record<const BYTES: usize> {
    head: ExecHead,
    bytes: [u8; BYTES],
}

const SMALL: (usize, usize) = (64, 120);
const MEDIUM: (usize, usize) = (128, 312);
const LARGE: (usize, usize) = (FILENAME_MAX, ARGV_MAX);

struct What {
    hit: *mut Counter,
    flags: u16,
    task: Ptr,
    old_tid: u32,
    filename: Ptr,
    argv: Ptr,
    argv_len: usize,
}

/// `sched_process_exec(struct task_struct *p, pid_t old_pid, struct linux_binprm *bprm)`: the exec has succeeded and
/// `current` has its new memory.
#[btf_tracepoint(function = "sched_process_exec")]
pub(crate) fn exec(ctx: BtfTracePointContext) -> i32 {
    execed(&ctx, false)
}

/// For tasks for which `exec` was skipped: see `lifecycle.rs`.
#[btf_tracepoint(function = "sched_process_exec")]
pub(crate) fn exec_again(ctx: BtfTracePointContext) -> i32 {
    execed(&ctx, true)
}

#[inline(always)]
fn execed(ctx: &BtfTracePointContext, again: bool) -> i32 {
    let task: Ptr = ctx.arg(0);
    // SAFETY: an argument of the tracepoint.
    if !lifecycle::is_unreported(&unsafe { task::key(task) }, again) {
        return 0;
    }
    let old_tid: u32 = ctx.arg(1);
    let bprm: Ptr = ctx.arg(2);
    // SAFETY: arguments of the tracepoint; what is loaded from the memory descriptor are plain words.
    let (filename, argv, argv_len) = unsafe {
        let filename: Ptr = task::load(bprm, frozen!(OFFSETS.bprm_filename));
        let (start, end): (u64, u64) = match task::follow(task, frozen!(OFFSETS.task_mm)) {
            Some(mm) => {
                (task::load(mm, frozen!(OFFSETS.mm_arg_start)), task::load(mm, frozen!(OFFSETS.mm_arg_end)))
            }
            None => (0, 0),
        };
        (filename, start as Ptr, end.wrapping_sub(start) as usize)
    };
    let (argv_len, flags) = if argv_len > ARGV_MAX { (ARGV_MAX, EXEC_ARGV_CUT) } else { (argv_len, 0) };
    let Some(hit) = ring::hit(KIND_EXEC) else { return 0 };
    let what = What { hit, flags, task, old_tid, filename, argv, argv_len };
    let small = argv_len <= SMALL.1 && send::<{ SMALL.0 }, { SMALL.1 }, { SMALL.0 + SMALL.1 }>(&what);
    let medium =
        !small && argv_len <= MEDIUM.1 && send::<{ MEDIUM.0 }, { MEDIUM.1 }, { MEDIUM.0 + MEDIUM.1 }>(&what);
    if !small && !medium {
        send::<{ LARGE.0 }, { LARGE.1 }, { LARGE.0 + LARGE.1 }>(&what);
    }
    0
}

/// A bound that the verifier sees right at the use: the compiler cannot know `n` to be smaller already.
#[inline(always)]
fn at_most(n: usize, max: usize) -> usize {
    let mut n = n as u64;
    // SAFETY: no instruction; it only keeps the compiler from dropping or moving the comparison below.
    unsafe { core::arch::asm!("/* {0} */", inout(reg) n) };
    if n > max as u64 { max } else { n as usize }
}

/// False: the file name needs a larger record, and nothing was sent.
#[inline(always)]
fn send<const F: usize, const A: usize, const BYTES: usize>(w: &What) -> bool {
    ring::emit_if::<Record<BYTES>>(w.hit, |r| {
        // SAFETY: `r` is reserved ring space of this size. Name and argv together never pass it: F - 1 + A < BYTES.
        unsafe {
            let bytes = (&raw mut (*r).bytes).cast::<u8>();
            // The helper gives the length it copied, with the NUL, cut to the buffer.
            let got = helpers::bpf_probe_read_kernel_str(bytes.cast(), F as u32, w.filename.cast());
            let mut flags = w.flags;
            if got >= F as i64 {
                if F < FILENAME_MAX {
                    return false;
                }
                flags |= EXEC_FILENAME_CUT;
            }
            let name = if got > 1 { at_most(got as usize - 1, F - 1) } else { 0 };
            let mut argv = at_most(w.argv_len, A);
            if argv > 0
                && helpers::bpf_probe_read_user(bytes.add(name).cast(), argv as u32, w.argv.cast()) != 0
            {
                argv = 0;
                flags |= EXEC_ARGV_CUT | EXEC_ARGV_UNREAD;
            }
            (&raw mut (*r).head).write(ExecHead {
                hdr: ring::header(KIND_EXEC, flags, task::key(w.task)),
                cgroup: bpf_get_current_cgroup_id(),
                old_tid: w.old_tid,
                uid: task::uid(w.task),
                filename_len: name as u16,
                argv_len: argv as u16,
                pad: 0,
                comm: task::comm(w.task),
            });
        }
        true
    })
}
