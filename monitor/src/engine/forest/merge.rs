//! Snapshots, merged by key. A snapshot is not atomic: a row may be older than a reap that was handled already, and a
//! process forked behind the iterator's cursor is missing.

use std::collections::HashSet;

use super::node::{Flags, rank};
use super::{Forest, Idx, Merge, NONE, NodeChange, Row, RowState, Snapshot};
use crate::model::key::Key;
use crate::model::schema::State;

const fn state(s: RowState) -> State {
    match s {
        RowState::Running => State::Running,
        RowState::LeaderExited => State::LeaderExited,
        RowState::Exiting => State::Exiting,
        RowState::Zombie => State::Zombie,
        RowState::Gone => State::Gone,
    }
}

impl Forest {
    /// From here on reaps leave tombstones, until `merge`.
    pub(crate) fn snapshot_started(&mut self, t0: u64) {
        self.t0 = t0;
        self.tombstones = Some(HashSet::default());
        self.execed = HashSet::default();
        self.overrun = false;
    }

    pub(crate) fn tombstones(&self) -> usize {
        self.tombstones.as_ref().map_or(0, HashSet::len) + self.execed.len()
    }

    pub(crate) fn max_tombstones(&self) -> usize {
        self.max_tombstones.saturating_mul(2)
    }

    /// `group` tells the group of a job's number. Missing ones are named in `missing`: /proc decides about them.
    pub(crate) fn merge(
        &mut self,
        s: &Snapshot,
        group: &dyn Fn(u64) -> Option<Idx>,
        missing: &mut Vec<Key>,
        now: u64,
    ) -> Merge {
        let mut m = Merge { rows: s.rows.len(), overrun: self.overrun, ..Merge::default() };
        let dead = self.tombstones.take().unwrap_or_default();
        let execed = std::mem::take(&mut self.execed);
        let rows = || s.rows.iter().filter(|r| !dead.contains(&r.key));
        m.tombstoned = s.rows.len() - rows().count();
        // First all nodes, then the links between them: rows come in no order.
        for row in rows() {
            let known = self.find(row.key);
            let Some(i) = known.or_else(|| self.insert(row.key, now)) else { continue };
            if known.is_none() {
                m.added += 1;
                self.node_mut(i).flags.set(Flags::NAMED);
                self.changes.push(NodeChange::Born(i));
            }
            self.node_mut(i).flags.set(Flags::SEEN);
            if row.adopts {
                self.node_mut(i).flags.set(Flags::ADOPTS);
            }
        }
        let mut placed = Vec::new();
        for row in rows() {
            if let Some(i) = self.find(row.key) {
                let n = self.node(i);
                if n.parent == NONE || !n.flags.has(Flags::LINEAGE) || n.flags.has(Flags::INFERRED) {
                    placed.push(i);
                }
                m.corrected += usize::from(self.row(i, row, s.t0, execed.contains(&row.key), group, now));
            }
        }
        placed.sort_unstable();
        // When it is known of all of them who lives.
        for row in rows() {
            self.orphaned_in_row(row, &placed, s.t0, now);
        }
        self.inherit_groups(s);
        for i in 0..self.nodes.len() as Idx {
            let n = self.node_mut(i);
            if n.flags.has(Flags::SEEN) {
                n.flags.clear(Flags::SEEN);
            } else if !n.flags.has(Flags::FREE) && n.state != State::Gone && n.key.start < s.t0 {
                missing.push(n.key);
            }
        }
        m.missing = missing.len();
        m
    }

    /// One row; whether it corrected what was believed of a known process. `execed`: since T0, so what the row says of
    /// its program may be older.
    fn row(
        &mut self,
        i: Idx,
        row: &Row,
        t0: u64,
        execed: bool,
        group: &dyn Fn(u64) -> Option<Idx>,
        now: u64,
    ) -> bool {
        let new = self.node(i).flags.has(Flags::NAMED);
        let n = self.node_mut(i);
        n.flags.clear(Flags::NAMED);
        // A lost exec shows by another name, or is the first one: by the rows alone no more can be known.
        let doubted = !new && !execed && n.alive() && (n.comm != row.comm || n.flags.has(Flags::INHERITED));
        if (rank(n.state) < rank(State::Exiting) && !execed) || new {
            n.comm = row.comm;
            n.uid = row.uid.unwrap_or(n.uid);
        }
        if row.kernel_thread {
            n.flags.set(Flags::KERNEL);
        }
        if let Some(argv) = row.argv.as_ref().filter(|_| !execed) {
            self.set_str(i, |n| &mut n.argv, argv.strip_suffix(&[0]).unwrap_or(argv));
            self.node_mut(i).flags.clear(Flags::CUT);
        }
        if let Some(exe) = row.exe.as_ref().filter(|_| !execed) {
            self.set_str(i, |n| &mut n.exe, exe);
        }
        if doubted && row.argv.is_none() {
            let n = self.node_mut(i);
            n.flags.set(Flags::DOUBTED);
            n.flags.clear(Flags::READ);
            self.changes.push(NodeChange::Ask(i));
        }
        let mut corrected = self.row_parents(i, row, t0, now);
        if let Some(g) = group(row.job)
            && self.node(i).group != g
            && !self.groups.chain(self.node(i).group).any(|x| x == g)
        {
            self.set_group(i, g);
            corrected = true;
        }
        let (from, to) = (self.node(i).state, state(row.state));
        // The one way back, the exec of another thread, may have been taken since the row was read.
        let back = to == State::LeaderExited && execed;
        if rank(to) > rank(from) && !back {
            let n = self.node_mut(i);
            if rank(to) >= rank(State::Exiting) && row.state != RowState::Gone && row.status != 0 {
                n.status = row.status;
                n.flags.set(Flags::STATUS);
            }
            if to == State::Gone {
                self.gone(i, now);
            } else {
                self.set_state(i, to, now);
                if rank(from) < rank(State::Exiting) && rank(to) >= rank(State::Exiting) {
                    self.orphan_children(i, now);
                }
            }
            corrected = true;
        } else if from == State::LeaderExited && to == State::Running && self.node(i).since < t0 {
            // The exec of another thread was not heard of. (A leader that exited since T0 may be younger than the row.)
            self.set_state(i, to, now);
            corrected = true;
        }
        corrected && !new
    }

    /// The two parents of a row. Lineage comes from the kernel's map; a parent that never adopts forked its children; all
    /// else is unknown.
    fn row_parents(&mut self, i: Idx, row: &Row, t0: u64, now: u64) -> bool {
        let parent = row.parent.and_then(|k| self.named(k, now));
        let old = self.node(i).parent;
        let flags = self.node(i).flags;
        if !flags.has(Flags::LINEAGE) || flags.has(Flags::INFERRED) {
            // Pid 0 (an entry mended for PID 1 or kthreadd has it) is no process.
            let named = row.lineage.filter(|l| l.parent.pid != 0);
            let sure = named.filter(|l| !l.mended || row.parent != Some(l.parent));
            if let Some(l) = sure {
                // Older than the snapshot, in no row and never heard of: it is dead, and only its key is known.
                let dead = self.find(l.parent).is_none() && l.parent.start < t0;
                if let Some(li) = self.named(l.parent, now)
                    && !self.descends(li, i)
                {
                    self.link_lineage(i, li);
                    let n = self.node_mut(i);
                    n.flags.set(Flags::LINEAGE);
                    n.flags.clear(Flags::INFERRED);
                    if dead {
                        self.gone(li, now);
                    }
                }
            } else if flags.has(Flags::LINEAGE) {
                // As inferred before.
            } else if row.parent.is_none() {
                self.node_mut(i).flags.set(Flags::LINEAGE);
            } else if let Some(p) = parent
                && !self.adopts(p)
                && !self.descends(p, i)
            {
                self.link_lineage(i, p);
                self.inferred(i);
            }
        }
        let Some(p) = parent.filter(|&p| p != i) else { return false };
        let n = self.node(i);
        if n.lineage == p && n.flags.has(Flags::LINEAGE) && !n.flags.has(Flags::INFERRED) {
            // With whom forked it: never given to another, whatever was believed. (/proc names parents by pid, and that may
            // have been taken for its predecessor, who is dead.)
            self.unorphan(i);
            if p == old {
                return false;
            }
            self.link_parent(i, p);
            self.changes.push(NodeChange::Parent { node: i, from: old });
            return old != NONE;
        }
        if p == old {
            return false;
        }
        if old != NONE {
            self.move_to(i, p, now);
            return true;
        }
        self.link_parent(i, p);
        self.changes.push(NodeChange::Parent { node: i, from: NONE });
        false
    }

    fn unorphan(&mut self, i: Idx) {
        if self.node(i).flags.has(Flags::ORPHAN) {
            self.change(i, |n| {
                n.flags.clear(Flags::ORPHAN);
                n.flags.clear(Flags::ADOPTED);
            });
            self.changes.retain(|c| *c != NodeChange::Orphan(i));
        }
    }

    /// A living process whose parent is dying; or that is with an adopter, and its fork was never heard of (`placed`): its
    /// own parent died unheard.
    fn orphaned_in_row(&mut self, row: &Row, placed: &[Idx], t0: u64, now: u64) {
        let Some(i) = self.find(row.key).filter(|&i| self.node(i).alive()) else { return };
        let (p, l) = (self.node(i).parent, self.node(i).lineage);
        let dead = |f: &Self, x: Idx| x != NONE && rank(f.node(x).state) >= rank(State::Exiting);
        // Believed to live and in no row: its death was not heard of either.
        let missing =
            |f: &Self, x: Idx| f.get(x).is_some_and(|n| !n.flags.has(Flags::SEEN) && n.key.start < t0);
        if dead(self, p) {
            self.orphan(i, now);
        } else if p != NONE
            && l != p
            && (dead(self, l) || missing(self, l))
            && self.adopts(p)
            && placed.binary_search(&i).is_ok()
        {
            // CLONE_PARENT leaves a forker beside the parent, dead or alive; but only who adopts has got another's child.
            self.adopted(i, now);
        }
    }

    /// Those whose fork was lost belong where their lineage parent does, if the kernel's map did not say better.
    fn inherit_groups(&mut self, s: &Snapshot) {
        let mut rows: Vec<Key> = s.rows.iter().filter(|r| r.job == 0).map(|r| r.key).collect();
        rows.sort_unstable_by_key(|k| k.start);
        for k in rows {
            let Some(i) = self.find(k) else { continue };
            let l = self.node(i).lineage;
            if l != NONE && self.node(i).group == NONE {
                let g = self.node(l).group;
                self.set_group(i, g);
            }
        }
    }
}
