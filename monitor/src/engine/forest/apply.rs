//! Events. Each may come twice, late, or for a process that was never heard of: what can be known is entered, nothing is
//! guessed, and nothing goes back.

use super::node::{NO_UID, rank};
use super::signals::Signal;
use super::strings::Str;
use super::{Flags, Forest, Idx, NONE, NodeChange};
use crate::model::event::{Comm, Sender, SignalResult, WaitStatus};
use crate::model::key::Key;
use crate::model::schema::State;

/// What a fork record says, the job resolved to a group.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Born {
    pub(crate) child: Key,
    pub(crate) lineage_parent: Key,
    pub(crate) parent: Key,
    /// None: that of the lineage parent.
    pub(crate) group: Option<Idx>,
    pub(crate) uid: u32,
    pub(crate) comm: Comm,
    pub(crate) kernel_thread: bool,
}

/// What an exec record says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Execed<'a> {
    pub(crate) uid: u32,
    pub(crate) comm: Comm,
    pub(crate) file: &'a [u8],
    /// NUL-separated.
    pub(crate) argv: &'a [u8],
    /// There is more of argv than that.
    pub(crate) cut: bool,
}

impl Forest {
    pub(crate) fn fork(&mut self, b: &Born, at: u64) -> Option<Idx> {
        if let Some(i) = self.find(b.child) {
            self.complete(i, b, at);
            return Some(i);
        }
        let lineage = self.named(b.lineage_parent, at);
        let parent =
            if b.parent == b.lineage_parent { lineage } else { self.named(b.parent, at) }.unwrap_or(NONE);
        let i = self.insert(b.child, at)?;
        let n = self.node_mut(i);
        (n.uid, n.comm) = (b.uid, b.comm);
        n.flags.set(Flags::LINEAGE);
        if b.kernel_thread {
            n.flags.set(Flags::KERNEL);
        }
        self.changes.push(NodeChange::Born(i));
        self.link_parent(i, parent);
        if let Some(l) = lineage {
            self.link_lineage(i, l);
            self.inherit(i, l);
        }
        let of_parent = lineage.map_or(NONE, |l| self.node(l).group);
        // The kernel may not have heard yet of the innermost job that the parent is in here.
        let kernel = b.group.filter(|&g| !self.groups.chain(of_parent).any(|x| x == g));
        self.set_group(i, kernel.unwrap_or(of_parent));
        self.orphaned_at_birth(i, at);
        Some(i)
    }

    /// A process that somebody named, or that a snapshot saw first: the fork record knows its lineage.
    fn complete(&mut self, i: Idx, b: &Born, at: u64) {
        let n = self.node_mut(i);
        if n.flags.has(Flags::NAMED) {
            n.flags.clear(Flags::NAMED);
            (n.uid, n.comm) = (b.uid, b.comm);
        }
        let inferred = n.flags.has(Flags::INFERRED);
        if n.flags.has(Flags::LINEAGE) && !inferred {
            return;
        }
        n.flags.set(Flags::LINEAGE);
        n.flags.clear(Flags::INFERRED);
        if b.kernel_thread {
            n.flags.set(Flags::KERNEL);
        }
        let Some(lineage) = self.named(b.lineage_parent, at) else { return };
        let Some(birth) = self.named(b.parent, at) else { return };
        self.link_lineage(i, lineage);
        if !self.node(i).argv.is_known() {
            self.inherit(i, lineage);
        }
        if self.node(i).group == NONE || inferred {
            let g = b.group.unwrap_or(self.node(lineage).group);
            self.set_group(i, g);
        }
        match self.node(i).parent {
            NONE => self.link_parent(i, birth),
            p if p != birth => self.adopted(i, at),
            _ => {}
        }
        self.orphaned_at_birth(i, at);
    }

    /// A child has its forker's memory, so its argv, exe and cgroup too, until it execs. Not its pid namespace: a forker
    /// may have made one for its children (`unshare -p`), and the child's pid inside is another in any case.
    fn inherit(&mut self, i: Idx, from: Idx) {
        let n = self.node(from);
        let (argv, exe, cgroup) = (n.argv, n.exe, n.cgroup);
        for f in [Flags::CUT, Flags::DOUBTED] {
            if self.node(from).flags.has(f) {
                self.node_mut(i).flags.set(f);
            }
        }
        self.node_mut(i).flags.set(Flags::INHERITED);
        self.share_str(i, |n| &mut n.argv, argv);
        self.share_str(i, |n| &mut n.exe, exe);
        self.share_str(i, |n| &mut n.cgroup, cgroup);
        if self.node(from).uid == NO_UID {
            // Named only by this fork: the child's are the forker's.
            let (uid, comm) = (self.node(i).uid, self.node(i).comm);
            let n = self.node_mut(from);
            (n.uid, n.comm) = (uid, comm);
        }
    }

    /// CLONE_PARENT can give a child to a parent that is dying at that moment.
    fn orphaned_at_birth(&mut self, i: Idx, at: u64) {
        let p = self.node(i).parent;
        if self.node(i).alive() && p != NONE && rank(self.node(p).state) >= rank(State::Exiting) {
            self.orphan(i, at);
            self.changes.push(NodeChange::Ask(i));
        }
    }

    /// Its parent is not the one it was born with.
    pub(super) fn adopted(&mut self, i: Idx, at: u64) {
        self.node_mut(i).flags.set(Flags::ADOPTED);
        self.orphan(i, at);
    }

    pub(super) fn orphan(&mut self, i: Idx, at: u64) {
        if self.node(i).flags.has(Flags::ORPHAN) {
            return;
        }
        self.change(i, |n| {
            n.flags.set(Flags::ORPHAN);
            n.orphan_since = at;
        });
        if self.node(i).alive() {
            self.changes.push(NodeChange::Orphan(i));
        }
    }

    /// Its program is another one.
    pub(crate) fn exec(&mut self, key: Key, e: &Execed<'_>, at: u64) {
        let Execed { uid, comm, file, argv, cut } = *e;
        let Some(i) = self.known(key, at) else { return };
        match self.node(i).state {
            State::Running => {}
            // de_thread: another thread took over the leader's place.
            State::LeaderExited => self.set_state(i, State::Running, at),
            // Said before it died, heard after.
            _ => return,
        }
        if self.tombstones.is_some() && at >= self.t0 {
            if self.execed.len() < self.max_tombstones {
                self.execed.insert(key);
            } else {
                self.overrun = true;
            }
        }
        let n = self.node_mut(i);
        (n.uid, n.comm) = (uid, comm);
        for f in [Flags::READ, Flags::NAMED, Flags::CUT, Flags::INHERITED, Flags::DOUBTED] {
            n.flags.clear(f);
        }
        if cut {
            n.flags.set(Flags::CUT);
        }
        // Who starts containers moves a child into its group before it lets it exec.
        self.share_str(i, |n| &mut n.cgroup, Str::NONE);
        self.set_str(i, |n| &mut n.exe, file);
        self.set_str(i, |n| &mut n.argv, argv.strip_suffix(&[0]).unwrap_or(argv));
        self.changes.push(NodeChange::Exec(i));
    }

    /// The last thread exits. Twice for one death is no harm.
    pub(crate) fn exit(&mut self, key: Key, status: WaitStatus, comm: Comm, at: u64) {
        let Some(i) = self.known(key, at) else { return };
        if rank(self.node(i).state) >= rank(State::Exiting) {
            return;
        }
        let n = self.node_mut(i);
        n.status = status.0;
        n.comm = comm;
        n.flags.set(Flags::STATUS);
        self.killed_by(i);
        self.set_state(i, State::Exiting, at);
        self.orphan_children(i, at);
    }

    pub(crate) fn leader_exit(&mut self, key: Key, comm: Comm, at: u64) {
        let Some(i) = self.known(key, at) else { return };
        match self.node(i).state {
            State::Running => {
                self.node_mut(i).comm = comm;
                self.set_state(i, State::LeaderExited, at);
            }
            // Once more: the exec of another thread between the two was lost. A row from between them must not win.
            State::LeaderExited if at > self.node(i).since => self.node_mut(i).since = at,
            _ => {}
        }
    }

    /// The kernel let go of it. Its status is final.
    pub(crate) fn reap(&mut self, key: Key, status: WaitStatus, at: u64) {
        let Some(i) = self.find(key) else { return self.tombstone(key) };
        let n = self.node_mut(i);
        n.status = status.0;
        let first = !n.flags.has(Flags::STATUS);
        n.flags.set(Flags::STATUS);
        if first {
            self.killed_by(i);
        }
        self.gone(i, at);
    }

    fn tombstone(&mut self, key: Key) {
        if let Some(t) = &mut self.tombstones {
            if t.len() < self.max_tombstones {
                t.insert(key);
            } else {
                self.overrun = true;
            }
        }
    }

    /// It is no longer in the kernel.
    pub(crate) fn gone(&mut self, i: Idx, at: u64) {
        let from = self.node(i).state;
        if from == State::Gone {
            return;
        }
        self.tombstone(self.node(i).key);
        self.set_state(i, State::Gone, at);
        if rank(from) < rank(State::Exiting) {
            self.orphan_children(i, at);
        }
        self.queue(i);
    }

    pub(super) fn orphan_children(&mut self, i: Idx, at: u64) {
        let mut c = self.node(i).pchild;
        while c != NONE {
            self.orphan(c, at);
            c = self.node(c).pnext;
        }
    }

    /// Remembers who sent the signal that killed it.
    fn killed_by(&mut self, i: Idx) {
        let n = self.node(i);
        if let Some(number) = WaitStatus(n.status).signal()
            && let Some(s) = self.signals.last(n.signal, n.key, number).copied()
        {
            self.extra_mut(i).killer = Some(s);
        }
    }

    /// The signal that killed it, or would explain a death by `number`.
    pub(crate) fn killer(&self, i: Idx, number: u8) -> Option<Signal> {
        let n = self.node(i);
        let known = self.extra(i).and_then(|x| x.killer);
        known.or_else(|| self.signals.last(n.signal, n.key, number).copied())
    }

    pub(crate) fn signal(&mut self, target: Key, signal: u8, by: Sender, result: SignalResult, at: u64) {
        let sender = match by {
            Sender::Process(k) | Sender::ParentDeath(k) => self.find(k),
            Sender::Timer | Sender::Kernel => None,
        };
        let sender_comm = sender.map(|s| self.node(s).comm).unwrap_or_default();
        self.remember(Signal {
            at,
            sender: by,
            sender_comm,
            target,
            number: signal,
            result,
            ..Signal::default()
        });
    }

    /// A SIGKILL from one of our probes; only one that went out counts as a signal.
    pub(crate) fn probe_kill(&mut self, target: Key, result: i32, at: u64) {
        if result == 0 {
            self.remember(Signal { at, probe: true, target, number: 9, ..Signal::default() });
        }
    }

    fn remember(&mut self, mut s: Signal) {
        let target = self.find(s.target);
        let prev = target.map_or(0, |t| self.node(t).signal);
        s.target_comm = target.map(|t| self.node(t).comm).unwrap_or_default();
        let n = self.signals.push(s, prev);
        if let Some(t) = target {
            self.node_mut(t).signal = n;
        }
    }

    /// The node of a process that an event is about, made without lineage if it is not known.
    fn known(&mut self, key: Key, at: u64) -> Option<Idx> {
        if let Some(i) = self.find(key) {
            return Some(i);
        }
        // Reaped while the snapshot under way was taken: a record of before must not bring it back.
        if self.tombstones.as_ref().is_some_and(|t| t.contains(&key)) {
            return None;
        }
        let i = self.insert(key, at)?;
        self.changes.push(NodeChange::Born(i));
        self.changes.push(NodeChange::Ask(i));
        Some(i)
    }
}
