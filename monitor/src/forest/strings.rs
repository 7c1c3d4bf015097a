//! Interned byte strings: argv, exe and cgroup paths, which thousands of processes share. Counted, so that the last
//! process that goes takes its strings with it. It knows nothing of processes.

use std::collections::HashMap;
use std::sync::Arc;

use super::hash::Fast;

/// An interned string; [`Str::NONE`] is "unknown", which is not the same as empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Str(u32);

impl Str {
    pub(crate) const NONE: Self = Self(u32::MAX);

    pub(crate) fn is_known(self) -> bool {
        self != Self::NONE
    }
}

#[derive(Debug, Default)]
pub(crate) struct Strings {
    by_bytes: HashMap<Arc<[u8]>, u32, Fast>,
    slots: Vec<(Arc<[u8]>, u32)>,
    free: Vec<u32>,
}

impl Strings {
    /// Counts one more holder. Allocates only for bytes that nobody holds yet.
    pub(crate) fn intern(&mut self, bytes: &[u8]) -> Str {
        if let Some(&i) = self.by_bytes.get(bytes) {
            self.slots[i as usize].1 += 1;
            return Str(i);
        }
        let shared: Arc<[u8]> = Arc::from(bytes);
        let i = if let Some(i) = self.free.pop() {
            self.slots[i as usize] = (shared.clone(), 1);
            i
        } else {
            self.slots.push((shared.clone(), 1));
            self.slots.len() as u32 - 1
        };
        self.by_bytes.insert(shared, i);
        Str(i)
    }

    /// One more holder of a string that is held already.
    pub(crate) fn share(&mut self, s: Str) -> Str {
        if s.is_known() {
            self.slots[s.0 as usize].1 += 1;
        }
        s
    }

    pub(crate) fn release(&mut self, s: Str) {
        if !s.is_known() {
            return;
        }
        let slot = &mut self.slots[s.0 as usize];
        slot.1 -= 1;
        if slot.1 == 0 {
            let bytes = std::mem::replace(&mut slot.0, Arc::from(&b""[..]));
            self.by_bytes.remove(&bytes);
            self.free.push(s.0);
        }
    }

    pub(crate) fn get(&self, s: Str) -> Option<&[u8]> {
        if s.is_known() { self.slots.get(s.0 as usize).map(|(b, _)| &**b) } else { None }
    }

    /// The string itself, which stays with whoever holds it when the last process that has it goes.
    pub(crate) fn shared(&self, s: Str) -> Option<Arc<[u8]>> {
        if s.is_known() { self.slots.get(s.0 as usize).map(|(b, _)| Arc::clone(b)) } else { None }
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
