//! Groups of processes (the policy's jobs), nested, with their members as lists and their numbers kept up to date at
//! each change, so that nobody ever counts by walking. What a job *is* stands in `policy`.

use super::node::{Idx, NONE, Node};
use crate::model::schema::State;

/// How many of each there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// With a live thread.
    pub(crate) live: u32,
    pub(crate) zombies: u32,
    pub(crate) orphans: u32,
    /// In any state.
    pub(crate) members: u32,
}

impl Counts {
    pub(super) fn of(n: &Node) -> Self {
        Self {
            live: n.alive().into(),
            zombies: (n.state == State::Zombie).into(),
            orphans: n.orphan().into(),
            members: 1,
        }
    }

    // Wrapping: a difference may be negative in one field; sums are right again in u32.
    pub(super) fn add(&mut self, o: Self) {
        self.live = self.live.wrapping_add(o.live);
        self.zombies = self.zombies.wrapping_add(o.zombies);
        self.orphans = self.orphans.wrapping_add(o.orphans);
        self.members = self.members.wrapping_add(o.members);
    }

    pub(super) fn minus(self, o: Self) -> Self {
        Self {
            live: self.live.wrapping_sub(o.live),
            zombies: self.zombies.wrapping_sub(o.zombies),
            orphans: self.orphans.wrapping_sub(o.orphans),
            members: self.members.wrapping_sub(o.members),
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Group {
    pub(crate) outer: Idx,
    pub(super) head: Idx,
    /// Of those whose innermost group it is.
    pub(crate) own: Counts,
    /// With those of inner groups.
    pub(crate) all: Counts,
    pub(super) used: bool,
}

impl Default for Group {
    fn default() -> Self {
        Self { outer: NONE, head: NONE, own: Counts::default(), all: Counts::default(), used: true }
    }
}

/// How deep groups may nest; the kernel's walk has the same bound (`JOB_DEPTH`).
pub(crate) const DEPTH: usize = monitor_abi::JOB_DEPTH;

#[derive(Debug, Default)]
pub(crate) struct Groups {
    slots: Vec<Group>,
    free: Vec<Idx>,
}

impl Groups {
    pub(super) fn add(&mut self, outer: Idx) -> Idx {
        let g = Group { outer, ..Group::default() };
        if let Some(i) = self.free.pop() {
            self.slots[i as usize] = g;
            i
        } else {
            self.slots.push(g);
            self.slots.len() as Idx - 1
        }
    }

    pub(super) fn remove(&mut self, g: Idx) {
        self.slots[g as usize].used = false;
        self.free.push(g);
    }

    pub(crate) fn get(&self, g: Idx) -> Option<&Group> {
        self.slots.get(g as usize).filter(|g| g.used)
    }

    pub(super) fn get_mut(&mut self, g: Idx) -> Option<&mut Group> {
        self.slots.get_mut(g as usize).filter(|g| g.used)
    }

    /// `g` and the groups around it, innermost first.
    pub(crate) fn chain(&self, g: Idx) -> impl Iterator<Item = Idx> + Clone + '_ {
        self.outwards(g).take(DEPTH * 2)
    }

    /// The same, however deep.
    pub(super) fn outwards(&self, g: Idx) -> impl Iterator<Item = Idx> + Clone + '_ {
        let mut at = g;
        std::iter::from_fn(move || {
            let this = self.get(at)?;
            Some(std::mem::replace(&mut at, this.outer))
        })
    }

    /// A member of `g` changed by `d`.
    pub(super) fn count(&mut self, g: Idx, d: Counts) {
        if let Some(own) = self.get_mut(g) {
            own.own.add(d);
        }
        let mut at = g;
        for _ in 0..DEPTH * 2 {
            let Some(this) = self.get_mut(at) else { return };
            this.all.add(d);
            at = this.outer;
        }
    }

    /// The used ones.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Idx, &Group)> {
        self.slots.iter().enumerate().filter(|(_, g)| g.used).map(|(i, g)| (i as Idx, g))
    }
}
