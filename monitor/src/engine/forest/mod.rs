//! The live forest: every process by *who started whom*, the dead ancestors that somebody alive descends from, and how
//! far each has come. Pure: it reads no clock, opens no file and knows nothing of rules, alerts or the kernel side.
//!
//! `apply` takes events, `look` what /proc said, `merge` snapshots; `keep` drops what nobody needs. Each change is noted
//! in `changes`, which the policy takes after each call; nodes are dropped only after that, by [`Forest::collect`].

pub(crate) mod apply;
mod arena;
pub(crate) mod groups;
mod hash;
mod keep;
mod look;
mod merge;
mod node;
mod pids;
pub mod row;
pub(crate) mod signals;
mod strings;

use std::collections::{HashMap, HashSet};

use groups::{Counts, Group, Groups};
pub(crate) use hash::Fast;
pub(crate) use node::{Flags, Idx, NO_UID, NONE, Node};
use pids::Pids;
pub use row::{ARGV_MAX, Facts, Look, Merge, Row, RowLineage, RowState, Seen, Snapshot};
use signals::{Signal, Signals};
pub(crate) use strings::Str;
use strings::Strings;

use crate::model::key::Key;
use crate::model::schema::State;

/// What an input changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NodeChange {
    /// A process that was not known.
    Born(Idx),
    State(Moved),
    /// Its parent died.
    Orphan(Idx),
    /// Another parent than before.
    Parent {
        node: Idx,
        from: Idx,
    },
    Exec(Idx),
    /// It is known by name only, or its parent is not known: /proc must be asked.
    Ask(Idx),
}

/// From one state to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Moved {
    pub(crate) node: Idx,
    pub(crate) from: State,
    pub(crate) to: State,
    /// Since when it was in `from`.
    pub(crate) since: u64,
    pub(crate) at: u64,
}

/// Who sent the signal that killed a process, and its pid namespace if that is not the host's.
#[derive(Clone, Debug, Default)]
pub(crate) struct Extra {
    pub(crate) killer: Option<Signal>,
    pub(crate) pid_ns: Option<u64>,
    pub(crate) ns_pid: Option<u32>,
}

#[derive(Debug)]
pub(crate) struct Forest {
    nodes: Vec<Node>,
    free: Vec<Idx>,
    /// pid -> the newest process with that pid; older ones hang on it by `older`.
    pids: Pids,
    pub(crate) strings: Strings,
    pub(crate) signals: Signals,
    pub(crate) groups: Groups,
    extras: HashMap<Idx, Extra, Fast>,
    /// Of all processes; `live` counts leader-exited ones too.
    totals: [u64; 5],
    orphans: u64,
    /// Zombies and orphans outside any group.
    pub(crate) outside: Counts,
    changes: Vec<NodeChange>,
    /// Gone ones whose turn to be dropped has come, perhaps.
    queue: Vec<Idx>,
    /// Reaped since the snapshot under way began; None: no snapshot is under way.
    tombstones: Option<HashSet<Key, Fast>>,
    /// Execed since it began: their rows may be older than that.
    execed: HashSet<Key, Fast>,
    /// When it began.
    t0: u64,
    max_nodes: usize,
    max_tombstones: usize,
    overrun: bool,
    /// Processes that were not entered because the arena was full.
    pub(crate) refused: u64,
    /// Dead ancestors folded into "n more".
    pub(crate) folded: u64,
}

impl Forest {
    pub(crate) fn new(max_nodes: usize, max_tombstones: usize, max_signals: usize) -> Self {
        Self {
            nodes: Vec::new(),
            free: Vec::new(),
            pids: Pids::default(),
            strings: Strings::default(),
            signals: Signals::new(max_signals),
            groups: Groups::default(),
            extras: HashMap::default(),
            totals: [0; 5],
            orphans: 0,
            outside: Counts::default(),
            changes: Vec::new(),
            queue: Vec::new(),
            tombstones: None,
            execed: HashSet::default(),
            t0: 0,
            max_nodes,
            max_tombstones,
            overrun: false,
            refused: 0,
            folded: 0,
        }
    }

    // Reading.

    pub(crate) fn find(&self, key: Key) -> Option<Idx> {
        let mut at = self.pids.get(key.pid)?;
        while let Some(n) = self.get(at) {
            if n.key.start == key.start {
                return Some(at);
            }
            at = n.older;
        }
        None
    }

    /// Fetches what the forks of these are going to need, for all of them beside each other: handled one by one, each waits for memory
    /// three times, for the pid's place, for the node, and for the string that the child shares.
    pub(crate) fn expect(&self, forkers: &[Key]) {
        let places = || forkers.iter().filter_map(|k| self.pids.get(k.pid));
        let nodes = || places().filter_map(|i| self.get(i));
        let found = places().fold(0, |all, i| all ^ i);
        // The node's two lines.
        let lines = nodes().fold(0, |all, n| all ^ n.lchild ^ n.lnext);
        let strings = nodes().fold(0, |all, n| all ^ self.strings.holders(n.argv));
        std::hint::black_box((found, lines, strings));
    }

    /// The newest process with this pid.
    pub(crate) fn current(&self, pid: u32) -> Option<Idx> {
        self.pids.get(pid)
    }

    pub(crate) fn get(&self, i: Idx) -> Option<&Node> {
        self.nodes.get(i as usize)
    }

    /// Of an index that is known to be one: of a link, or of what `find` gave since the last `collect`.
    pub(crate) fn node(&self, i: Idx) -> &Node {
        &self.nodes[i as usize]
    }

    pub(crate) fn node_mut(&mut self, i: Idx) -> &mut Node {
        &mut self.nodes[i as usize]
    }

    /// Whether the slot still holds the tenant that a timer was set for.
    pub(crate) fn is(&self, i: Idx, generation: u32) -> bool {
        self.get(i).is_some_and(|n| n.generation == generation && !n.flags.has(Flags::FREE))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Idx, &Node)> {
        let used = |n: &Node| !n.flags.has(Flags::FREE);
        self.nodes.iter().enumerate().filter(move |(_, n)| used(n)).map(|(i, n)| (i as Idx, n))
    }

    pub(crate) fn children(&self, i: Idx) -> impl Iterator<Item = Idx> + '_ {
        self.list(self.node(i).lchild, |n| n.lnext)
    }

    fn first_child(&self, i: Idx) -> Option<Idx> {
        self.children(i).next()
    }

    pub(crate) fn first_reapable(&self, i: Idx) -> Option<Idx> {
        self.reapable(i).next()
    }

    /// Those whom it would reap now.
    pub(crate) fn reapable(&self, i: Idx) -> impl Iterator<Item = Idx> + '_ {
        self.list(self.node(i).pchild, |n| n.pnext)
    }

    /// Members whose innermost group it is.
    pub(crate) fn members(&self, g: Idx) -> impl Iterator<Item = Idx> + '_ {
        self.list(self.groups.get(g).map_or(NONE, |g| g.head), |n| n.gnext)
    }

    fn list<'a>(&'a self, first: Idx, next: impl Fn(&Node) -> Idx + 'a) -> impl Iterator<Item = Idx> + 'a {
        let mut at = first;
        std::iter::from_fn(move || {
            let n = self.get(at)?;
            Some(std::mem::replace(&mut at, next(n)))
        })
    }

    pub(crate) fn in_group(&self, i: Idx, g: Idx) -> bool {
        self.groups.chain(self.node(i).group).any(|x| x == g)
    }

    /// Ancestors by lineage, nearest first.
    pub(crate) fn ancestors(&self, i: Idx) -> impl Iterator<Item = Idx> + '_ {
        self.list(self.node(i).lineage, |n| n.lineage)
    }

    /// It and all who descend from it by lineage, each after its parent. No recursion: chains may be long.
    pub(crate) fn descend(&self, i: Idx) -> impl Iterator<Item = Idx> + '_ {
        let mut stack = vec![i];
        std::iter::from_fn(move || {
            let at = stack.pop()?;
            stack.extend(self.children(at));
            Some(at)
        })
    }

    pub(crate) fn extra(&self, i: Idx) -> Option<&Extra> {
        if self.node(i).flags.has(Flags::EXTRA) { self.extras.get(&i) } else { None }
    }

    /// Processes in this state.
    pub(crate) fn total(&self, s: State) -> u64 {
        self.totals[node::rank(s) as usize]
    }

    pub(crate) fn len(&self) -> usize {
        self.nodes.len() - self.free.len()
    }

    pub(crate) fn max(&self) -> usize {
        self.max_nodes
    }

    pub(crate) fn take_changes(&mut self, into: &mut Vec<NodeChange>) {
        into.clear();
        std::mem::swap(&mut self.changes, into);
    }

    // Writing, with the numbers kept.

    /// The one place where a node's state, orphanhood or group changes: all counts follow.
    fn change<R>(&mut self, i: Idx, f: impl FnOnce(&mut Node) -> R) -> R {
        let n = &mut self.nodes[i as usize];
        let (before, rank, orphan) = (Counts::of(n), node::rank(n.state), n.orphan());
        let r = f(n);
        let (after, now, group) = (Counts::of(n), node::rank(n.state), n.group);
        if before == after && rank == now {
            return r;
        }
        self.totals[rank as usize] -= 1;
        self.totals[now as usize] += 1;
        self.orphans = self.orphans - u64::from(orphan) + u64::from(after.orphans == 1);
        self.count(group, after.minus(before));
        r
    }

    fn count(&mut self, group: Idx, d: Counts) {
        if group == NONE {
            self.outside.add(d);
        } else {
            self.groups.count(group, d);
        }
    }

    fn set_state(&mut self, i: Idx, to: State, at: u64) {
        let Node { state: from, since, .. } = *self.node(i);
        if from == to {
            return;
        }
        self.change(i, |n| {
            n.state = to;
            // A zombie is one since its exit, which was seen earlier.
            if !(from == State::Exiting && to == State::Zombie) {
                n.since = at;
            }
        });
        self.changes.push(NodeChange::State(Moved { node: i, from, to, since, at }));
    }

    /// Makes `i` a member of `g` (NONE: of none) instead of where it is now.
    pub(crate) fn set_group(&mut self, i: Idx, g: Idx) {
        let n = self.node(i);
        let (old, next, prev, weight) = (n.group, n.gnext, n.gprev, Counts::of(n));
        if old == g {
            return;
        }
        if next != NONE {
            self.nodes[next as usize].gprev = prev;
        }
        if prev != NONE {
            self.nodes[prev as usize].gnext = next;
        } else if let Some(old) = self.groups.get_mut(old) {
            old.head = next;
        }
        self.count(old, Counts::default().minus(weight));
        let head = self.groups.get_mut(g).map_or(NONE, |g| std::mem::replace(&mut g.head, i));
        if head != NONE {
            self.nodes[head as usize].gprev = i;
        }
        let n = &mut self.nodes[i as usize];
        (n.group, n.gnext, n.gprev) = (g, head, NONE);
        self.count(g, weight);
    }

    pub(crate) fn add_group(&mut self, outer: Idx) -> Idx {
        self.groups.add(outer)
    }

    /// Puts `inner` (with all in it) into `outer`; it must be in the group that is around `outer` now. Refused if `outer` is
    /// inside `inner`: groups never form a circle, so every walk outwards ends.
    pub(crate) fn nest(&mut self, inner: Idx, outer: Idx) {
        if self.groups.outwards(outer).any(|g| g == inner) {
            return;
        }
        let Some(g) = self.groups.get_mut(inner) else { return };
        let all = g.all;
        g.outer = outer;
        // Those around `outer` had it counted already.
        if let Some(o) = self.groups.get_mut(outer) {
            o.all.add(all);
        }
    }

    /// Forgets a group: its members fall back to the one around it.
    pub(crate) fn remove_group(&mut self, g: Idx) {
        let Some(Group { outer, .. }) = self.groups.get(g).cloned() else { return };
        while let Some(i) = self.groups.get(g).map(|g| g.head).filter(|&i| i != NONE) {
            self.set_group(i, outer);
        }
        let inner: Vec<Idx> = self.groups.iter().filter(|(_, x)| x.outer == g).map(|(i, _)| i).collect();
        for i in inner {
            if let Some(x) = self.groups.get_mut(i) {
                x.outer = outer;
            }
        }
        self.groups.remove(g);
    }

    fn extra_mut(&mut self, i: Idx) -> &mut Extra {
        self.nodes[i as usize].flags.set(Flags::EXTRA);
        self.extras.entry(i).or_default()
    }
}
