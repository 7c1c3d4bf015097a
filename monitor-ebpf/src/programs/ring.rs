//! The one way into the ring buffer, and the accounts: for each kind and CPU `hits = sent + lost + filtered`.

use aya_ebpf::helpers::{bpf_get_smp_processor_id, bpf_ktime_get_boot_ns};
use monitor_abi::{Counter, Header, ProcKey};

use super::{COUNTERS, EVENTS};

/// Adds one. Atomic, because another program (or an interrupt's) may count in the same place on this CPU; without a
/// result, because 5.10 has no fetching atomics.
///
/// # Safety
/// `at` is a map value.
#[inline(always)]
pub(crate) unsafe fn add_one(at: *mut u64) {
    // SAFETY: the caller's.
    unsafe {
        core::intrinsics::atomic_xadd::<u64, u64, { core::intrinsics::AtomicOrdering::Relaxed }>(at, 1)
    };
}

#[inline(always)]
fn counter(kind: u16) -> Option<*mut Counter> {
    COUNTERS.get_ptr_mut(u32::from(kind))
}

/// Counts a hit for which no record is wanted.
#[inline(always)]
pub(crate) fn filtered(kind: u16) {
    let Some(c) = counter(kind) else { return };
    // SAFETY: `c` is this CPU's value in the map.
    unsafe {
        add_one(&raw mut (*c).hits);
        add_one(&raw mut (*c).filtered);
    }
}

/// Counts a hit. The result counts separately what becomes of it.
#[inline(always)]
pub(crate) fn hit(kind: u16) -> Option<*mut Counter> {
    let c = counter(kind)?;
    // SAFETY: this CPU's value in the map.
    unsafe { add_one(&raw mut (*c).hits) };
    Some(c)
}

/// A hit: reserves `size_of::<T>()` bytes, lets `write` fill every one of them, and sends them; or counts them lost.
#[inline(always)]
pub(crate) fn emit<T: 'static>(kind: u16, write: impl FnOnce(*mut T)) {
    let Some(c) = hit(kind) else { return };
    emit_if(c, |r| {
        write(r);
        true
    });
}

/// Of the hit that is counted in `c`. What `write` says no to is given back, and false.
///
/// It is counted before it is submitted, so the agent never receives more than was sent.
#[inline(always)]
pub(crate) fn emit_if<T: 'static>(c: *mut Counter, write: impl FnOnce(*mut T) -> bool) -> bool {
    if let Some(mut entry) = EVENTS.reserve_untyped::<T>(0) {
        if !write(entry.as_mut_ptr()) {
            // It wakes a reader as a record would: the next one does not, since this stands before it.
            entry.discard(0);
            return false;
        }
        // SAFETY: `c` is this CPU's value in the map.
        unsafe { add_one(&raw mut (*c).sent) };
        entry.submit(0);
    } else {
        // SAFETY: as above.
        unsafe { add_one(&raw mut (*c).lost) };
    }
    true
}

#[inline(always)]
pub(crate) fn header(kind: u16, flags: u16, key: ProcKey) -> Header {
    Header {
        kind,
        flags,
        // SAFETY: helpers without arguments.
        cpu: unsafe { bpf_get_smp_processor_id() },
        // SAFETY: as above.
        at: unsafe { bpf_ktime_get_boot_ns() },
        key,
    }
}
