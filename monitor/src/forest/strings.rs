//! Interned byte strings: argv, exe and cgroup paths, which thousands of processes share. Counted, so that the last
//! process that goes takes its strings with it. It knows nothing of processes.

use std::hash::Hasher as _;
use std::sync::Arc;

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;

use super::hash::Mix;

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
    holders: u32,
    /// The lower half of the hash: it is compared before the bytes, which are elsewhere in memory.
    hash: u32,
}

#[derive(Debug, Default)]
pub(crate) struct Strings {
    /// Indices of slots, by what they hold.
    by_bytes: HashTable<u32>,
    slots: Vec<Slot>,
    free: Vec<u32>,
}

fn hash(bytes: &[u8]) -> u32 {
    let mut h = Mix::default();
    h.write(bytes);
    h.finish() as u32
}

/// hashbrown takes the tag from the top bits.
const fn wide(hash: u32) -> u64 {
    (hash as u64) << 32 | hash as u64
}

impl Strings {
    /// Counts one more holder. Allocates only for bytes that nobody holds yet.
    pub(crate) fn intern(&mut self, bytes: &[u8]) -> Str {
        let hash = hash(bytes);
        let Self { by_bytes, slots, free } = self;
        let same = |&i: &u32| slots[i as usize].hash == hash && *slots[i as usize].bytes == *bytes;
        match by_bytes.entry(wide(hash), same, |&i| wide(slots[i as usize].hash)) {
            Entry::Occupied(e) => {
                let i = *e.get();
                slots[i as usize].holders += 1;
                Str(i)
            }
            Entry::Vacant(e) => {
                let slot = Slot { bytes: Arc::from(bytes), holders: 1, hash };
                let i = free.pop().unwrap_or(slots.len() as u32);
                e.insert(i);
                match slots.get_mut(i as usize) {
                    Some(s) => *s = slot,
                    None => slots.push(slot),
                }
                Str(i)
            }
        }
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
            if let Ok(e) = self.by_bytes.find_entry(wide(slot.hash), |&i| i == s.0) {
                e.remove();
            }
            self.free.push(s.0);
        }
    }

    pub(crate) fn get(&self, s: Str) -> Option<&[u8]> {
        if s.is_known() { self.slots.get(s.0 as usize).map(|s| &*s.bytes) } else { None }
    }

    /// The string itself, which stays with whoever holds it when the last process that has it goes.
    pub(crate) fn shared(&self, s: Str) -> Option<Arc<[u8]>> {
        if s.is_known() { self.slots.get(s.0 as usize).map(|s| Arc::clone(&s.bytes)) } else { None }
    }

    pub(crate) fn len(&self) -> usize {
        self.by_bytes.len()
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
}
