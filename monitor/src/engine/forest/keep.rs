//! Who is kept though it is gone, and for how long: the dead from whom somebody alive descends, at most [`CHAIN`] in a row.

use super::{Flags, Forest, Idx, NONE};
use crate::model::schema::State;

/// Most dead ancestors in a row: the topmost and the nearest stay, the middle becomes a number.
pub(crate) const CHAIN: usize = 64;
/// Most dead descendants that one death looks through for chains that grew too long from above.
const LOOK_DOWN: usize = 4 * CHAIN;

impl Forest {
    /// A job's root is kept while its job is. A count that is full stays so: that root is kept for ever.
    pub(crate) fn hold(&mut self, i: Idx) {
        let n = self.node_mut(i);
        n.held = n.held.saturating_add(1);
    }

    pub(crate) fn release(&mut self, i: Idx) {
        let n = self.node_mut(i);
        if n.held < u16::MAX {
            n.held = n.held.saturating_sub(1);
        }
        self.may_go(i);
    }

    pub(super) fn queue(&mut self, i: Idx) {
        if !self.node(i).flags.has(Flags::QUEUED) {
            self.node_mut(i).flags.set(Flags::QUEUED);
            self.queue.push(i);
        }
    }

    /// Somebody who needed it has let go.
    pub(super) fn may_go(&mut self, i: Idx) {
        if self.node(i).state == State::Gone {
            self.queue(i);
        }
    }

    /// Drops what nobody needs. Call it when the changes have been taken: they name nodes.
    pub(crate) fn collect(&mut self) {
        while let Some(i) = self.queue.pop() {
            let n = self.node_mut(i);
            n.flags.clear(Flags::QUEUED);
            if n.state != State::Gone {
                continue;
            }
            // Nobody can reap it any more; the policy has taken note of who could.
            self.link_parent(i, NONE);
            let n = self.node(i);
            if n.lchild == NONE && n.pchild == NONE && n.held == 0 {
                self.remove(i);
            } else if n.lchild != NONE {
                self.fold(i);
            }
        }
    }

    fn is_dead(&self, i: Idx) -> bool {
        i != NONE && self.node(i).state == State::Gone
    }

    fn foldable(&self, i: Idx) -> bool {
        let n = self.node(i);
        n.state == State::Gone && n.held == 0 && n.pchild == NONE
    }

    /// `i` is dead and stays: shortens the chains of dead that it is part of.
    fn fold(&mut self, i: Idx) {
        let above = self.ancestors(i).take(2 * CHAIN).take_while(|&a| self.is_dead(a)).count();
        // The end of each dead chain below `i`, and how many stand between. Mostly there is none below: its children live.
        let mut ends = Vec::new();
        let mut stack = vec![(i, above + 1)];
        let mut looked = 0;
        while let Some((at, depth)) = stack.pop() {
            looked += 1;
            let mut end = true;
            let mut c = self.node(at).lchild;
            while c != NONE && looked < LOOK_DOWN {
                if self.is_dead(c) {
                    end = false;
                    stack.push((c, depth + 1));
                }
                looked += 1;
                c = self.node(c).lnext;
            }
            if end && depth > CHAIN {
                ends.push(at);
            }
        }
        for end in ends {
            self.shorten(end);
        }
    }

    /// The chain of dead that ends with `end` (nearest to the living): its middle is taken out.
    fn shorten(&mut self, end: Idx) {
        let mut chain = vec![end];
        chain.extend(self.ancestors(end).take_while(|&a| self.is_dead(a)));
        // The last is the topmost; the nearest CHAIN - 1 stay.
        for &i in chain.iter().take(chain.len() - 1).skip(CHAIN - 1) {
            if self.foldable(i) {
                self.splice(i);
            }
        }
    }

    /// Takes one dead out; its children hang on its own lineage parent and count it.
    fn splice(&mut self, i: Idx) {
        let n = self.node(i);
        let (up, gap) = (n.lineage, n.elided.saturating_add(1));
        while let Some(c) = self.first_child(i) {
            self.link_lineage(c, up);
            let n = self.node_mut(c);
            n.elided = n.elided.saturating_add(gap);
        }
        self.folded += 1;
        self.queue(i);
    }
}
