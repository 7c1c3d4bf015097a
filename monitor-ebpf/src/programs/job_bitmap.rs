//! Which pids may be in a job. `sys_enter` reads it at each system call of the host, where a lookup in the lineage map costs several
//! times as much.
//!
//! A byte is cleared at fork before the child has an entry, and set with each job that is written into an entry. So it may be set
//! without a job (the job was taken away), but is never missing.

use monitor_abi::MEMBERS_BLOCK;

use super::MEMBERS;

#[inline(always)]
fn place(tgid: u32) -> (u32, usize) {
    (tgid / MEMBERS_BLOCK as u32, tgid as usize % MEMBERS_BLOCK)
}

#[inline(always)]
pub(crate) fn mark(tgid: u32, member: bool) {
    let (block, at) = place(tgid);
    if let Some(b) = MEMBERS.get_ptr_mut(block) {
        // SAFETY: a map value, and within it.
        unsafe { b.cast::<u8>().add(at).write_volatile(member.into()) };
    }
}

/// True also for a pid beyond the map (`kernel.pid_max` was raised).
#[inline(always)]
pub(crate) fn may_be(tgid: u32) -> bool {
    let (block, at) = place(tgid);
    match MEMBERS.get_ptr_mut(block) {
        // SAFETY: as above.
        Some(b) => unsafe { b.cast::<u8>().add(at).read_volatile() != 0 },
        None => true,
    }
}
