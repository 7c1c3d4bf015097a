//! Interned byte strings: argv, exe and cgroup paths, which thousands of processes share. Counted, so that the last
//! process that goes takes its strings with it. It knows nothing of processes.

use std::hash::Hasher as _;
use std::sync::Arc;

use super::hash::Mix;

/// How many strings are found again.
const RECENT: usize = 8192;

/// An interned string; [`Str::NONE`] is "unknown", which is not the same as empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Str(u32);

impl Str {
    pub(crate) const NONE: Self = Self(u32::MAX);

    pub(crate) fn is_known(self) -> bool {
        self != Self::NONE
    }
}

#[derive(Debug)]
struct Slot {
    bytes: Arc<[u8]>,
    /// 0: the slot is free.
    holders: u32,
    /// It is compared before the bytes, which are elsewhere in memory.
    hash: u32,
}

#[derive(Debug)]
pub(crate) struct Strings {
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// The slot of the string that was interned last, by its hash. What thousands share comes often and is found here; what two
    /// share may be kept twice. An index of all strings would be as large as they are, and is fetched from memory at each exec.
    recent: Box<[u32]>,
}

impl Default for Strings {
    fn default() -> Self {
        Self { slots: Vec::new(), free: Vec::new(), recent: vec![u32::MAX; RECENT].into() }
    }
}

impl Strings {
    /// Counts one more holder. Allocates only for bytes that are not found.
    pub(crate) fn intern(&mut self, bytes: &[u8]) -> Str {
        let mut h = Mix::default();
        h.write(bytes);
        let hash = h.finish() as u32;
        let recent = &mut self.recent[hash as usize % RECENT];
        if let Some(s) = self.slots.get_mut(*recent as usize)
            && (s.hash, s.holders > 0) == (hash, true)
            && *s.bytes == *bytes
        {
            s.holders += 1;
            return Str(*recent);
        }
        let slot = Slot { bytes: Arc::from(bytes), holders: 1, hash };
        let i = self.free.pop().unwrap_or(self.slots.len() as u32);
        match self.slots.get_mut(i as usize) {
            Some(s) => *s = slot,
            None => self.slots.push(slot),
        }
        *recent = i;
        Str(i)
    }

    /// One more holder of a string that is held already.
    pub(crate) fn share(&mut self, s: Str) -> Str {
        if s.is_known() {
            self.slots[s.0 as usize].holders += 1;
        }
        s
    }

    pub(crate) fn release(&mut self, s: Str) {
        if !s.is_known() {
            return;
        }
        let slot = &mut self.slots[s.0 as usize];
        slot.holders -= 1;
        if slot.holders == 0 {
            slot.bytes = Arc::default();
            self.free.push(s.0);
        }
    }

    /// How many hold it.
    pub(crate) fn holders(&self, s: Str) -> u32 {
        self.slots.get(s.0 as usize).map_or(0, |s| s.holders)
    }

    pub(crate) fn get(&self, s: Str) -> Option<&[u8]> {
        if s.is_known() { self.slots.get(s.0 as usize).map(|s| &*s.bytes) } else { None }
    }

    /// The string itself, which stays with whoever holds it when the last process that has it goes.
    pub(crate) fn shared(&self, s: Str) -> Option<Arc<[u8]>> {
        if s.is_known() { self.slots.get(s.0 as usize).map(|s| Arc::clone(&s.bytes)) } else { None }
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counted_and_reused() {
        let mut s = Strings::default();
        let a = s.intern(b"a");
        let b = s.intern(b"b");
        assert_eq!(s.intern(b"a"), a);
        assert_eq!(s.share(b), b);
        s.release(a);
        assert_eq!(s.get(a), Some(&b"a"[..]));
        s.release(a);
        assert_eq!(s.len(), 1);
        let c = s.intern(b"");
        assert_eq!((c, s.get(c)), (a, Some(&b""[..])));
        s.release(Str::NONE);
        assert_eq!(s.get(Str::NONE), None);
    }

    #[test]
    fn a_freed_slot_is_not_taken_for_what_it_held() {
        let mut s = Strings::default();
        let gone = s.intern(b"gone");
        s.release(gone);
        let other = s.intern(b"other");
        assert_eq!((other, s.get(other)), (gone, Some(&b"other"[..])));
        assert_ne!(s.intern(b"gone"), other);
        s.release(other);
        assert_eq!(s.len(), 1);
    }

    #[test]
    fn what_many_share_is_kept_once_among_many_others() {
        let mut s = Strings::default();
        let mut last = s.intern(b"shared");
        let mut kept = 0;
        for i in 0..100_000_u32 {
            s.intern(&i.to_ne_bytes());
            let now = s.intern(b"shared");
            // Another one took its place.
            kept += usize::from(now != last);
            last = now;
        }
        assert!(kept < 100, "{kept}");
        assert_eq!(s.len(), 100_001 + kept);
    }
}
