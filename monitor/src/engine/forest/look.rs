//! What one look at /proc said. A look may be older than events that were handled meanwhile, so it moves states forward
//! only, and never to a pid's successor.

use super::node::rank;
use super::strings::Str;
use super::{ARGV_MAX, Facts, Flags, Forest, Idx, Look, NONE, NodeChange, Seen};
use crate::model::key::Key;
use crate::model::schema::State;

impl Forest {
    pub(crate) fn looked(&mut self, key: Key, seen: Seen, at: u64) {
        let Some(i) = self.find(key) else { return };
        match seen {
            Seen::Present(l) if !matches!(l.state, b'X' | b'x') => self.present(i, l, at),
            _ => self.gone(i, at),
        }
    }

    fn present(&mut self, i: Idx, l: Look, at: u64) {
        // A pid's successor was seen in its place: this one has been reaped.
        if self.current(self.node(i).key.pid) != Some(i) {
            return self.gone(i, at);
        }
        self.node_mut(i).flags.clear(Flags::NAMED);
        self.parent_pid(i, l.ppid, at);
        let state = self.node(i).state;
        match (l.state == b'Z', l.live_thread) {
            (true, false) if rank(state) < rank(State::Zombie) => {
                self.set_state(i, State::Zombie, at);
                if rank(state) < rank(State::Exiting) {
                    self.orphan_children(i, at);
                }
            }
            // Its exit record was lost: the leader is dead and others live.
            (true, true) if state == State::Running => self.set_state(i, State::LeaderExited, at),
            _ => {}
        }
    }

    /// /proc says who its parent is. All children of a dead parent go to one and the same adopter (`forget_original_parent`
    /// in kernel/exit.c finds the reaper once), so one look moves them all.
    fn parent_pid(&mut self, i: Idx, ppid: u32, at: u64) {
        let old = self.node(i).parent;
        let Some(new) = self.current(ppid) else { return };
        if new == old || new == i || self.node(new).state == State::Gone {
            return;
        }
        if old == NONE {
            self.first_parent(i, new);
            return;
        }
        if rank(self.node(old).state) < rank(State::Exiting) {
            self.move_to(i, new, at);
            return;
        }
        while let Some(c) = self.first_reapable(old) {
            self.move_to(c, new, at);
        }
    }

    pub(super) fn move_to(&mut self, i: Idx, new: Idx, at: u64) {
        let from = self.node(i).parent;
        self.adopted(i, at);
        self.link_parent(i, new);
        self.changes.push(NodeChange::Parent { node: i, from });
    }

    /// The parent of a process whose fork was not seen. If that parent is no adopter, it forked it: only an adopter has
    /// children that others started.
    pub(super) fn first_parent(&mut self, i: Idx, parent: Idx) {
        self.link_parent(i, parent);
        if self.node(i).flags.has(Flags::LINEAGE) {
            return;
        }
        if !self.adopts(parent) && self.node(i).lineage == NONE && !self.descends(parent, i) {
            self.link_lineage(i, parent);
            self.inferred(i);
            if self.node(i).group == NONE {
                let g = self.node(parent).group;
                self.set_group(i, g);
            }
        }
        self.changes.push(NodeChange::Parent { node: i, from: NONE });
    }

    pub(super) fn inferred(&mut self, i: Idx) {
        let n = self.node_mut(i);
        n.flags.set(Flags::LINEAGE);
        n.flags.set(Flags::INFERRED);
    }

    pub(crate) fn adopts(&self, i: Idx) -> bool {
        let n = self.node(i);
        n.key.pid == 1 || n.flags.has(Flags::ADOPTS)
    }

    /// Whether `i` is `of` or descends from it.
    pub(crate) fn descends(&self, i: Idx, of: Idx) -> bool {
        i == of || self.ancestors(i).any(|a| a == of)
    }

    /// Its cgroup, already interned. It may come after a fork: then it is also that of who has not execed since, as if it had
    /// been there to inherit. (Of a zombie v1 tells none any more.)
    pub(crate) fn in_cgroup(&mut self, i: Idx, cgroup: Str) {
        let mut heirs = Vec::new();
        let mut at = Some(i);
        while let Some(i) = at {
            self.share_str(i, |n| &mut n.cgroup, cgroup);
            let mut c = self.node(i).lchild;
            while c != NONE {
                let n = self.node(c);
                if n.flags.has(Flags::INHERITED) && !n.cgroup.is_known() {
                    heirs.push(c);
                }
                c = n.lnext;
            }
            at = heirs.pop();
        }
    }

    pub(crate) fn facts(&mut self, key: Key, facts: Option<&Facts>) -> Option<Idx> {
        let i = self.find(key)?;
        self.node_mut(i).flags.clear(Flags::ASKED);
        self.node_mut(i).flags.set(Flags::READ);
        self.node_mut(i).flags.clear(Flags::DOUBTED);
        let Some(f) = facts else { return Some(i) };
        if let Some(argv) = &f.argv
            && !(argv.is_empty() && self.node(i).argv.is_known())
        {
            self.set_str(i, |n| &mut n.argv, argv.strip_suffix(&[0]).unwrap_or(argv));
            if argv.len() < ARGV_MAX {
                self.node_mut(i).flags.clear(Flags::CUT);
            } else {
                self.node_mut(i).flags.set(Flags::CUT);
            }
        }
        if let Some(exe) = &f.exe {
            self.set_str(i, |n| &mut n.exe, exe);
        }
        if let Some(cgroup) = &f.cgroup {
            self.set_str(i, |n| &mut n.cgroup, cgroup.as_bytes());
        }
        if let Some(uid) = f.uid {
            self.node_mut(i).uid = uid;
        }
        if f.pid_ns.is_some() || f.ns_pid.is_some() {
            self.set_inside(i, f.pid_ns, f.ns_pid);
        }
        Some(i)
    }

    /// The pid namespace that it is in, and its pid there; None: the host's.
    pub(crate) fn inside(&mut self, key: Key, ns: Option<(u64, u32)>) {
        let Some(i) = self.find(key) else { return };
        match ns {
            None => self.node_mut(i).flags.set(Flags::OUTSIDE),
            Some((ns, pid)) => self.set_inside(i, Some(ns), Some(pid)),
        }
    }

    fn set_inside(&mut self, i: Idx, pid_ns: Option<u64>, ns_pid: Option<u32>) {
        if ns_pid == Some(1) {
            self.node_mut(i).flags.set(Flags::ADOPTS);
        }
        let x = self.extra_mut(i);
        (x.pid_ns, x.ns_pid) = (pid_ns, ns_pid);
    }
}
