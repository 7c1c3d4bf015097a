//! Writes into the lineage map for the agent. Run by `BPF_PROG_TEST_RUN`, attached nowhere.
//!
//! An update from user space would put a new element in the place of the old one and free that for other use while a
//! probe on another CPU may still read it; here the fields are written in place.

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::programs::RawTracePointContext;
use core::ffi::c_void;
use monitor_abi as abi;
use monitor_abi::{Lineage, ProcKey, handed_down};

use super::sparing::read_entry;
use super::{LINEAGE, job_bitmap};

const EEXIST: i32 = -17;

/// Arguments by the `UPDATE_*` indices of the ABI; gives `UPDATE_CHANGED`, `UPDATE_UNCHANGED`, `UPDATE_MISSING` or -errno.
///
/// Section and context are written out: aya's macro makes a program that returns 0 whatever its function does.
#[unsafe(no_mangle)]
#[unsafe(link_section = "raw_tp/sys_enter")]
pub(crate) extern "C" fn update_lineage(ctx: *mut c_void) -> i32 {
    let ctx = RawTracePointContext::new(ctx);
    let key = ProcKey { start: ctx.arg(abi::UPDATE_START), tgid: ctx.arg(abi::UPDATE_TGID), pad: 0 };
    let parent =
        ProcKey { start: ctx.arg(abi::UPDATE_PARENT_START), tgid: ctx.arg(abi::UPDATE_PARENT_TGID), pad: 0 };
    let job: u64 = ctx.arg(abi::UPDATE_JOB);
    let flags: u32 = ctx.arg(abi::UPDATE_FLAGS);
    let clear: u32 = ctx.arg(abi::UPDATE_CLEAR);
    let what: u64 = ctx.arg(abi::UPDATE_WHAT);
    if LINEAGE.get_ptr_mut(key).is_none() {
        if what & abi::UPDATE_CREATE == 0 {
            return abi::UPDATE_MISSING;
        }
        // A process whose fork no probe saw inherits now.
        // SAFETY: map values stay mapped; what they hold is checked there.
        let (above, inherited, _) = read_entry(|| unsafe { LINEAGE.get(parent) }).unwrap_or_default();
        let job = if what & abi::UPDATE_SET_JOB != 0 { job } else { above };
        let flags = flags | handed_down(inherited) | abi::LINEAGE_MENDED;
        let new = Lineage { parent, job, flags, life: 0, told: 0, pad: 0 };
        match LINEAGE.insert(key, new, u64::from(BPF_NOEXIST)) {
            Ok(()) => {
                if job != 0 {
                    job_bitmap::mark(key.tgid, true);
                }
                return abi::UPDATE_CHANGED;
            }
            // The fork probe has entered it at the same time.
            Err(EEXIST) => {}
            Err(e) => return e,
        }
    }
    let Some(entry) = LINEAGE.get_ptr_mut(key) else { return abi::UPDATE_MISSING };
    let mut answer = abi::UPDATE_UNCHANGED;
    // SAFETY: a map value; only this program and the fork probe of the process itself write these fields.
    unsafe {
        let (job_at, flags_at) = (&raw mut (*entry).job, &raw mut (*entry).flags);
        if what & abi::UPDATE_SET_JOB != 0 {
            if job_at.read_volatile() != job {
                job_at.write_volatile(job);
                answer = abi::UPDATE_CHANGED;
            }
            if job != 0 {
                job_bitmap::mark(key.tgid, true);
            }
        }
        let old = flags_at.read_volatile();
        let new = (old | flags) & !clear;
        if new != old {
            flags_at.write_volatile(new);
            answer = abi::UPDATE_CHANGED;
        }
    }
    answer
}
