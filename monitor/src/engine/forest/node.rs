//! One process in the arena. Links are indices into it, so that a process costs a fixed number of bytes and no event
//! allocates.

use super::strings::Str;
use crate::model::event::{Comm, WaitStatus};
use crate::model::key::Key;
use crate::model::schema::State;

/// Index of a node or of a group.
pub(crate) type Idx = u32;
pub(crate) const NONE: Idx = u32::MAX;

/// Facts that are yes or no.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Flags(u32);

impl Flags {
    /// Who forked it is known from the kernel (or it has no lineage parent: PID 1, kthreadd).
    pub(crate) const LINEAGE: Self = Self(1);
    pub(crate) const ORPHAN: Self = Self(1 << 1);
    /// `parent` is not the parent that it was born with.
    pub(crate) const ADOPTED: Self = Self(1 << 2);
    pub(crate) const KERNEL: Self = Self(1 << 3);
    /// `status` says how it ended.
    pub(crate) const STATUS: Self = Self(1 << 4);
    /// In the snapshot that is being merged.
    pub(crate) const SEEN: Self = Self(1 << 5);
    /// Known only because others name it: never seen by itself.
    pub(crate) const NAMED: Self = Self(1 << 6);
    /// It adopts orphans.
    pub(crate) const ADOPTS: Self = Self(1 << 7);
    /// Waits in the list of those to be dropped.
    pub(crate) const QUEUED: Self = Self(1 << 8);
    /// The arena's slot is empty.
    pub(crate) const FREE: Self = Self(1 << 9);
    /// Something of it stands in the side table.
    pub(crate) const EXTRA: Self = Self(1 << 10);
    /// A look's timer is set.
    pub(crate) const LOOKING: Self = Self(1 << 11);
    /// Its facts have been asked for and have not come yet.
    pub(crate) const ASKED: Self = Self(1 << 12);
    /// Its facts have been read since its last exec.
    pub(crate) const READ: Self = Self(1 << 13);
    /// A rule waits for its facts.
    pub(crate) const MATCHING: Self = Self(1 << 14);

    /// Its lineage was told by its parent, not by the kernel: a CLONE_PARENT child's is corrected when the kernel speaks.
    pub(crate) const INFERRED: Self = Self(1 << 15);
    /// Its exec record had only the beginning of argv, or none of it; /proc has not been asked yet.
    pub(crate) const CUT: Self = Self(1 << 16);
    /// It has not execed since its fork: argv and exe are its forker's.
    pub(crate) const INHERITED: Self = Self(1 << 17);
    /// Records were lost, and its exec's may be among them: what is known of its program may be an older one's.
    pub(crate) const DOUBTED: Self = Self(1 << 18);

    /// In the host's pid namespace: read for a view.
    pub(crate) const OUTSIDE: Self = Self(1 << 19);

    pub(crate) const fn has(self, f: Self) -> bool {
        self.0 & f.0 != 0
    }
    pub(crate) const fn set(&mut self, f: Self) {
        self.0 |= f.0;
    }
    pub(crate) const fn clear(&mut self, f: Self) {
        self.0 &= !f.0;
    }
}

/// What a fork needs of the forker stands in the first line of the cache, what it needs of the child before in the second: with
/// a million processes each line that is touched is fetched from memory.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub(crate) struct Node {
    pub(crate) key: Key,
    /// Who would reap it now.
    pub(crate) parent: Idx,
    /// Who forked it, or the nearest ancestor that is kept (see `elided`).
    pub(crate) lineage: Idx,
    /// The first of its children by lineage, and of those that it would reap.
    pub(super) lchild: Idx,
    pub(super) pchild: Idx,
    /// Innermost group (job).
    pub(crate) group: Idx,
    /// The next older process with the same pid.
    pub(super) older: Idx,
    pub(crate) argv: Str,
    /// The executed file's name, until the resolved path is read.
    pub(crate) exe: Str,
    pub(crate) cgroup: Str,
    pub(crate) uid: u32,
    pub(crate) flags: Flags,
    /// Who needs it though it is gone: jobs whose root it is.
    pub(super) held: u16,
    pub(crate) state: State,
    /// How many looks it has had since its exit.
    pub(crate) step: u8,

    /// Its neighbours in the lists of children by lineage and by parent, and of the group's members.
    pub(super) lnext: Idx,
    pub(super) lprev: Idx,
    pub(super) pnext: Idx,
    pub(super) pprev: Idx,
    pub(super) gnext: Idx,
    pub(super) gprev: Idx,
    /// Boot-time ns since when it is in `state`; of a zombie: since its exit.
    pub(crate) since: u64,
    /// Means something with [`Flags::ORPHAN`].
    pub(crate) orphan_since: u64,
    pub(crate) status: i32,
    /// Dead ancestors between it and `lineage` that are not kept.
    pub(crate) elided: u32,
    /// Newest signal to it, in the log of signals.
    pub(super) signal: u32,
    /// Tells this tenant of the slot from the next one.
    pub(crate) generation: u32,
    pub(crate) comm: Comm,
}

/// No uid is known.
pub(crate) const NO_UID: u32 = u32::MAX;

impl Node {
    pub(super) fn new(key: Key, generation: u32) -> Self {
        Self {
            key,
            since: key.start,
            orphan_since: 0,
            parent: NONE,
            lineage: NONE,
            lchild: NONE,
            lnext: NONE,
            lprev: NONE,
            pchild: NONE,
            pnext: NONE,
            pprev: NONE,
            group: NONE,
            gnext: NONE,
            gprev: NONE,
            older: NONE,
            argv: Str::NONE,
            exe: Str::NONE,
            cgroup: Str::NONE,
            uid: NO_UID,
            status: 0,
            elided: 0,
            signal: 0,
            generation,
            held: 0,
            flags: Flags::default(),
            comm: Comm::default(),
            state: State::Running,
            step: 0,
        }
    }

    /// Has a thread that is not dead.
    pub(crate) fn alive(&self) -> bool {
        matches!(self.state, State::Running | State::LeaderExited)
    }

    pub(crate) fn orphan(&self) -> bool {
        self.alive() && self.flags.has(Flags::ORPHAN)
    }

    pub(crate) fn wait_status(&self) -> Option<WaitStatus> {
        self.flags.has(Flags::STATUS).then_some(WaitStatus(self.status))
    }
}

/// How far: states only go up, but for the exec of another thread.
pub(super) const fn rank(s: State) -> u8 {
    match s {
        State::Running => 0,
        State::LeaderExited => 1,
        State::Exiting => 2,
        State::Zombie => 3,
        State::Gone => 4,
    }
}

const _: () =
    assert!(size_of::<Node>() <= 192, "the bound is 500 bytes a process, index and strings included");
