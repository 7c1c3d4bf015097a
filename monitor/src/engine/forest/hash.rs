//! A hash for keys that the kernel chose (pids, short strings of a machine's own processes): some multiplications. A user
//! who picks argv so that hashes collide slows his own host's agent at most to a walk over as many strings as he has
//! processes.

use std::hash::{BuildHasherDefault, Hasher};

pub(crate) type Fast = BuildHasherDefault<Mix>;

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Mix(u64);

// 2^64 divided by the golden ratio: spreads neighbouring numbers over the upper bits.
const K: u64 = 0x9e37_79b9_7f4a_7c15;

impl Mix {
    fn add(&mut self, v: u64) {
        let wide = u128::from(self.0 ^ v) * u128::from(K);
        self.0 = (wide as u64) ^ ((wide >> 64) as u64);
    }
}

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        // hashbrown takes the bucket from the low bits and the tag from the top seven.
        self.0 ^ (self.0 >> 32)
    }
    fn write(&mut self, bytes: &[u8]) {
        let mut chunks = bytes.chunks_exact(8);
        for c in &mut chunks {
            self.add(u64::from_ne_bytes(c.try_into().unwrap_or([0; 8])));
        }
        let mut rest = [0; 8];
        let tail = chunks.remainder();
        rest[..tail.len()].copy_from_slice(tail);
        self.add(u64::from_ne_bytes(rest) ^ ((bytes.len() as u64) << 56));
    }
    fn write_u32(&mut self, v: u32) {
        self.add(u64::from(v).wrapping_add(K));
    }
    fn write_u64(&mut self, v: u64) {
        self.add(v.wrapping_add(K));
    }
    fn write_usize(&mut self, v: usize) {
        self.add((v as u64).wrapping_add(K));
    }
}
