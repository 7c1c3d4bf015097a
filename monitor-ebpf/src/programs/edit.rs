//! The agent's hand in the lineage map. It is run by `BPF_PROG_TEST_RUN` and attached nowhere.
//!
//! An update from user space would put a new element in the place of the old one and free that for other use while a
//! probe on another CPU may still read it; here the fields are written in place.

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::programs::RawTracePointContext;
use core::ffi::c_void;
use monitor_abi as abi;
use monitor_abi::{Lineage, ProcKey, handed_down};

use super::{LINEAGE, life, member};

const EEXIST: i32 = -17;

/// Arguments by the `EDIT_*` indices of the ABI; gives `EDIT_CHANGED`, `EDIT_UNCHANGED`, `EDIT_MISSING` or -errno.
///
/// Section and context are written out: aya's macro makes a program that returns 0 whatever its function does.
#[unsafe(no_mangle)]
#[unsafe(link_section = "raw_tp/sys_enter")]
pub(crate) extern "C" fn edit(ctx: *mut c_void) -> i32 {
    let ctx = RawTracePointContext::new(ctx);
    let key = ProcKey { start: ctx.arg(abi::EDIT_START), tgid: ctx.arg(abi::EDIT_TGID), pad: 0 };
    let parent =
        ProcKey { start: ctx.arg(abi::EDIT_PARENT_START), tgid: ctx.arg(abi::EDIT_PARENT_TGID), pad: 0 };
    let job: u64 = ctx.arg(abi::EDIT_JOB);
    let flags: u32 = ctx.arg(abi::EDIT_FLAGS);
    let clear: u32 = ctx.arg(abi::EDIT_CLEAR);
    let what: u64 = ctx.arg(abi::EDIT_WHAT);
    if LINEAGE.get_ptr_mut(key).is_none() {
        if what & abi::EDIT_CREATE == 0 {
            return abi::EDIT_MISSING;
        }
        // One whose fork no probe saw inherits now.
        // SAFETY: map values stay mapped; what they hold is checked there.
        let (above, inherited, _) = life::checked(|| unsafe { LINEAGE.get(parent) }).unwrap_or_default();
        let job = if what & abi::EDIT_SET_JOB != 0 { job } else { above };
        let flags = flags | handed_down(inherited) | abi::LINEAGE_MENDED;
        let new = Lineage { parent, job, flags, life: 0, told: 0, pad: 0 };
        match LINEAGE.insert(key, new, u64::from(BPF_NOEXIST)) {
            Ok(()) => {
                if job != 0 {
                    member::mark(key.tgid, true);
                }
                return abi::EDIT_CHANGED;
            }
            // The fork probe was faster.
            Err(EEXIST) => {}
            Err(e) => return e,
        }
    }
    let Some(entry) = LINEAGE.get_ptr_mut(key) else { return abi::EDIT_MISSING };
    let mut answer = abi::EDIT_UNCHANGED;
    // SAFETY: a map value; only this program and the fork probe of the process itself write these fields.
    unsafe {
        let (job_at, flags_at) = (&raw mut (*entry).job, &raw mut (*entry).flags);
        if what & abi::EDIT_SET_JOB != 0 {
            if job_at.read_volatile() != job {
                job_at.write_volatile(job);
                answer = abi::EDIT_CHANGED;
            }
            if job != 0 {
                member::mark(key.tgid, true);
            }
        }
        let old = flags_at.read_volatile();
        let new = (old | flags) & !clear;
        if new != old {
            flags_at.write_volatile(new);
            answer = abi::EDIT_CHANGED;
        }
    }
    answer
}
