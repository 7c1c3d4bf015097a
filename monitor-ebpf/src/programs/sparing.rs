//! Reading lineage entries that other CPUs may write, and the switches of the control map that the lineage programs obey.

use monitor_abi::{Lineage, ProcKey};

use super::CONTROL;

#[inline(always)]
pub(crate) fn job_and_flags(l: &Lineage) -> (u64, u32) {
    // SAFETY: volatile, since `update_lineage` may write the entry at the same time on another CPU.
    unsafe { ((&raw const l.job).read_volatile(), (&raw const l.flags).read_volatile()) }
}

/// The epoch of sparing.
#[inline(always)]
pub(crate) fn epoch() -> u32 {
    // SAFETY: volatile, the agent may change it at any time.
    CONTROL.get(0).map_or(0, |c| unsafe { (&raw const c.spares).read_volatile() })
}

/// Whether the agent is labelling a family.
#[inline(always)]
pub(crate) fn is_labelling() -> bool {
    // SAFETY: volatile, the agent may change it at any time.
    CONTROL.get(0).is_some_and(|c| unsafe { (&raw const c.labelling).read_volatile() != 0 })
}

/// Job, flags and parent of an entry, or `None` if it was deleted while it was read. A slot of a hash map is reused as soon as it is free, but
/// a key never comes back: if the key still leads to the same slot afterwards, the values belong to it.
#[inline(always)]
pub(crate) fn read_entry(get: impl Fn() -> Option<&'static Lineage>) -> Option<(u64, u32, ProcKey)> {
    let l = get()?;
    let (job, flags) = job_and_flags(l);
    let up = l.parent;
    get().is_some_and(|now| core::ptr::eq(now, l)).then_some((job, flags, up))
}
