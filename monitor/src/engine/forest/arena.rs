//! The arena: nodes, the lists that link them, the index by pid, and the strings that they hold.

use super::groups::Counts;
use super::strings::Str;
use super::{Flags, Forest, Idx, NONE, Node, NodeChange, node};
use crate::model::key::Key;
use crate::model::schema::State;

impl Forest {
    // Links.

    pub(super) fn link_lineage(&mut self, i: Idx, to: Idx) {
        let n = &self.nodes[i as usize];
        let (old, next, prev, start) = (n.lineage, n.lnext, n.lprev, n.key.start);
        // A child is younger than who forked it: so no records, however wrong, make a circle.
        let older = |p: &Node| p.key.start < start || (p.key.start == start && !self.descends(to, i));
        if old == to || self.get(to).is_some_and(|p| !older(p)) {
            return;
        }
        if old != NONE {
            if next != NONE {
                self.nodes[next as usize].lprev = prev;
            }
            if prev == NONE {
                self.nodes[old as usize].lchild = next;
            } else {
                self.nodes[prev as usize].lnext = next;
            }
            self.may_go(old);
        }
        let head = if to == NONE { NONE } else { std::mem::replace(&mut self.nodes[to as usize].lchild, i) };
        if head != NONE {
            self.nodes[head as usize].lprev = i;
        }
        let n = &mut self.nodes[i as usize];
        (n.lineage, n.lnext, n.lprev) = (to, head, NONE);
    }

    pub(super) fn link_parent(&mut self, i: Idx, to: Idx) {
        let n = &self.nodes[i as usize];
        let (old, next, prev) = (n.parent, n.pnext, n.pprev);
        if old == to {
            return;
        }
        if old != NONE {
            if next != NONE {
                self.nodes[next as usize].pprev = prev;
            }
            if prev == NONE {
                self.nodes[old as usize].pchild = next;
            } else {
                self.nodes[prev as usize].pnext = next;
            }
            self.may_go(old);
        }
        let head = if to == NONE { NONE } else { std::mem::replace(&mut self.nodes[to as usize].pchild, i) };
        if head != NONE {
            self.nodes[head as usize].pprev = i;
        }
        let n = &mut self.nodes[i as usize];
        (n.parent, n.pnext, n.pprev) = (to, head, NONE);
    }

    // The arena.

    /// A new node, entered under its pid. None: the arena is full. A pid has one living owner: an older process with
    /// this pid has been reaped, whatever has been heard of it; and one that is itself older than the pid's owner is gone.
    pub(super) fn insert(&mut self, key: Key, at: u64) -> Option<Idx> {
        if self.len() >= self.max_nodes {
            self.refused += 1;
            return None;
        }
        let i = if let Some(i) = self.free.pop() {
            let generation = self.nodes[i as usize].generation.wrapping_add(1);
            self.nodes[i as usize] = Node::new(key, generation);
            i
        } else {
            self.nodes.push(Node::new(key, 0));
            self.nodes.len() as Idx - 1
        };
        self.totals[0] += 1;
        self.outside.add(Counts::of(&self.nodes[i as usize]));
        match self.pids.get(key.pid) {
            None => self.pids.insert(key.pid, i),
            Some(head) if self.node(head).key.start < key.start => {
                self.nodes[i as usize].older = head;
                self.pids.insert(key.pid, i);
                if self.node(head).state != State::Gone {
                    self.gone(head, at);
                }
            }
            Some(head) => {
                let mut above = head;
                while let Some(n) = self.get(self.node(above).older)
                    && n.key.start > key.start
                {
                    above = self.node(above).older;
                }
                let below = std::mem::replace(&mut self.nodes[above as usize].older, i);
                self.nodes[i as usize].older = below;
                self.change(i, |n| n.state = State::Gone);
                self.queue(i);
            }
        }
        Some(i)
    }

    pub(super) fn remove(&mut self, i: Idx) {
        self.link_lineage(i, NONE);
        self.link_parent(i, NONE);
        self.set_group(i, NONE);
        let n = self.node(i);
        let (key, older, weight, rank) = (n.key, n.older, Counts::of(n), node::rank(n.state));
        let (argv, exe, cgroup, extra) = (n.argv, n.exe, n.cgroup, n.flags.has(Flags::EXTRA));
        self.outside.add(Counts::default().minus(weight));
        self.totals[rank as usize] -= 1;
        for s in [argv, exe, cgroup] {
            self.strings.release(s);
        }
        if extra {
            self.extras.remove(&i);
        }
        match self.pids.get(key.pid) {
            Some(head) if head == i => {
                if older == NONE {
                    self.pids.remove(key.pid);
                } else {
                    self.pids.insert(key.pid, older);
                }
            }
            Some(mut above) => {
                while let Some(n) = self.get(above) {
                    if n.older == i {
                        self.nodes[above as usize].older = older;
                        break;
                    }
                    above = n.older;
                }
            }
            None => {}
        }
        let n = &mut self.nodes[i as usize];
        n.flags = Flags::FREE;
        n.generation = n.generation.wrapping_add(1);
        n.older = NONE;
        self.free.push(i);
    }

    /// The node of a key that another process names, made if it is not known yet.
    pub(super) fn named(&mut self, key: Key, at: u64) -> Option<Idx> {
        if let Some(i) = self.find(key) {
            return Some(i);
        }
        let i = self.insert(key, at)?;
        self.node_mut(i).flags.set(Flags::NAMED);
        self.changes.push(NodeChange::Born(i));
        self.changes.push(NodeChange::Ask(i));
        Some(i)
    }

    /// The node of a process that a command names.
    pub(crate) fn ensure(&mut self, key: Key, at: u64) -> Option<Idx> {
        self.named(key, at)
    }

    pub(super) fn set_str(&mut self, i: Idx, field: impl Fn(&mut Node) -> &mut Str, bytes: &[u8]) {
        let new = self.strings.intern(bytes);
        let old = std::mem::replace(field(&mut self.nodes[i as usize]), new);
        self.strings.release(old);
    }

    pub(super) fn share_str(&mut self, i: Idx, field: impl Fn(&mut Node) -> &mut Str, s: Str) {
        let new = self.strings.share(s);
        let old = std::mem::replace(field(&mut self.nodes[i as usize]), new);
        self.strings.release(old);
    }
}
