//! The newest process of each pid. The kernel hands pids out in sequence, so what is new stands together in here: a hash by pid
//! would fetch another line of memory for each.

use std::collections::HashMap;

use super::hash::Fast;
use super::{Idx, NONE};

/// Pids of one block.
const BLOCK: u32 = 64;

#[derive(Debug)]
struct Block {
    newest: [Idx; BLOCK as usize],
    used: u32,
}

#[derive(Debug, Default)]
pub(super) struct Pids {
    /// By `pid / BLOCK`: only blocks that hold a pid, however large pids are.
    places: HashMap<u32, u32, Fast>,
    blocks: Vec<Block>,
    free: Vec<u32>,
}

impl Pids {
    pub(super) fn get(&self, pid: u32) -> Option<Idx> {
        let place = *self.places.get(&(pid / BLOCK))?;
        let i = self.blocks[place as usize].newest[(pid % BLOCK) as usize];
        (i != NONE).then_some(i)
    }

    pub(super) fn insert(&mut self, pid: u32, i: Idx) {
        let place = *self.places.entry(pid / BLOCK).or_insert_with(|| {
            self.free.pop().unwrap_or_else(|| {
                self.blocks.push(Block { newest: [NONE; BLOCK as usize], used: 0 });
                self.blocks.len() as u32 - 1
            })
        });
        let block = &mut self.blocks[place as usize];
        let old = std::mem::replace(&mut block.newest[(pid % BLOCK) as usize], i);
        block.used += u32::from(old == NONE);
    }

    pub(super) fn remove(&mut self, pid: u32) {
        let Some(&place) = self.places.get(&(pid / BLOCK)) else { return };
        let block = &mut self.blocks[place as usize];
        let old = std::mem::replace(&mut block.newest[(pid % BLOCK) as usize], NONE);
        block.used -= u32::from(old != NONE);
        if block.used == 0 {
            self.places.remove(&(pid / BLOCK));
            self.free.push(place);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_used_again_when_its_last_pid_has_gone() {
        let mut p = Pids::default();
        for pid in [1, 63, 64, u32::MAX] {
            assert_eq!(p.get(pid), None);
            p.insert(pid, pid / 2);
        }
        p.insert(63, 7);
        assert_eq!(
            [1, 2, 63, 64, u32::MAX].map(|pid| p.get(pid)),
            [Some(0), None, Some(7), Some(32), Some(u32::MAX / 2)]
        );
        assert_eq!(p.blocks.len(), 3);
        p.remove(1);
        p.remove(1);
        assert_eq!((p.get(1), p.get(63)), (None, Some(7)));
        p.remove(63);
        p.remove(2);
        p.insert(1000, 9);
        assert_eq!((p.get(63), p.get(1000), p.get(40 + 960), p.blocks.len()), (None, Some(9), Some(9), 3));
    }
}
