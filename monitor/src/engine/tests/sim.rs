//! A small kernel: processes that fork, exit, are reaped and adopted, the records that the probes would write of it, and
//! what /proc and a snapshot would say. It is the oracle that the forest is compared with.

use std::collections::{BTreeMap, HashMap};

use crate::engine::forest::{Look, Row, RowLineage, RowState, Seen, Snapshot};
use crate::model::event::{Body, Comm, Event, Sender, SignalResult, WaitStatus};
use crate::model::key::Key;
use crate::model::schema::State;

pub(super) const S: u64 = 1_000_000_000;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct P {
    pub(super) key: Key,
    pub(super) parent: u32,
    pub(super) birth: Key,
    pub(super) lineage: Option<Key>,
    pub(super) state: State,
    pub(super) status: i32,
    pub(super) subreaper: bool,
    pub(super) session: i32,
    pub(super) comm: Comm,
    pub(super) argv: Vec<u8>,
    pub(super) job: u64,
}

#[derive(Debug)]
pub(super) struct Sim {
    pub(super) now: u64,
    pub(super) procs: BTreeMap<u32, P>,
    /// Records that nobody has taken yet.
    pub(super) ring: Vec<Event<'static>>,
    /// The kernel's lineage map, the dead included.
    pub(super) lineage: HashMap<Key, Key>,
    next: u32,
    /// The id of the cgroup in which who execs next is.
    pub(super) cgroup: u64,
}

pub(super) fn comm(s: &str) -> Comm {
    Comm::from_bytes(s.as_bytes())
}

impl Sim {
    /// PID 1, and whatever ran before the probes.
    pub(super) fn new() -> Self {
        let mut s = Self {
            now: S,
            procs: BTreeMap::new(),
            ring: Vec::new(),
            lineage: HashMap::new(),
            next: 2,
            cgroup: 0,
        };
        let init = P {
            key: Key::new(1, 1),
            parent: 0,
            birth: Key::default(),
            lineage: None,
            state: State::Running,
            status: 0,
            subreaper: true,
            session: 1,
            comm: comm("init"),
            argv: b"/sbin/init".to_vec(),
            job: 0,
        };
        s.procs.insert(1, init);
        s
    }

    pub(super) fn pass(&mut self, ns: u64) -> u64 {
        self.now += ns;
        self.now
    }

    pub(super) fn key(&self, pid: u32) -> Key {
        self.procs[&pid].key
    }

    fn emit(&mut self, process: Key, body: Body<'static>) {
        self.now += 1_000;
        self.ring.push(Event { at: self.now, cpu: 0, process, body });
    }

    pub(super) fn fork(&mut self, by: u32) -> u32 {
        while self.procs.contains_key(&self.next) {
            self.next += 1;
        }
        let pid = self.next;
        self.next += 1;
        self.fork_as(by, pid, false);
        pid
    }

    /// With this pid, which must be free.
    pub(super) fn fork_as(&mut self, by: u32, pid: u32, clone_parent: bool) {
        let p = self.procs[&by].clone();
        assert!(p.state == State::Running || p.state == State::LeaderExited);
        self.now += 1_000;
        let key = Key::new(pid, self.now);
        let parent = if clone_parent { p.parent } else { by };
        let birth = self.procs[&parent].key;
        let child = P {
            key,
            parent,
            birth,
            lineage: Some(p.key),
            state: State::Running,
            subreaper: false,
            ..p.clone()
        };
        self.lineage.insert(key, p.key);
        self.procs.insert(pid, child);
        self.emit(
            key,
            Body::Fork {
                lineage_parent: p.key,
                parent: birth,
                job: p.job,
                uid: 1000,
                comm: p.comm,
                kernel_thread: false,
                no_entry: false,
            },
        );
    }

    pub(super) fn exec(&mut self, pid: u32, argv: &str) {
        let file = argv.split(' ').next().unwrap().to_owned();
        let name = comm(file.rsplit('/').next().unwrap());
        let nul: Vec<u8> = argv.replace(' ', "\0").into_bytes();
        let p = self.procs.get_mut(&pid).unwrap();
        (p.comm, p.argv) = (name, nul.clone());
        p.state = State::Running;
        let key = p.key;
        self.emit(
            key,
            Body::Exec {
                old_tid: pid,
                uid: 1000,
                cgroup: self.cgroup,
                comm: name,
                filename: Box::leak(file.into_bytes().into_boxed_slice()),
                argv: Box::leak(nul.into_boxed_slice()),
                argv_cut: false,
            },
        );
    }

    pub(super) fn spawn(&mut self, by: u32, argv: &str) -> u32 {
        let pid = self.fork(by);
        self.exec(pid, argv);
        pid
    }

    pub(super) fn leader_exit(&mut self, pid: u32) {
        let p = self.procs.get_mut(&pid).unwrap();
        p.state = State::LeaderExited;
        let (key, comm) = (p.key, p.comm);
        self.emit(key, Body::LeaderExit { status: WaitStatus(0), comm });
    }

    /// The exit event: files are not closed yet, children have no adopter.
    pub(super) fn exit(&mut self, pid: u32, status: i32) {
        let p = self.procs.get_mut(&pid).unwrap();
        p.state = State::Exiting;
        p.status = status;
        let (key, comm) = (p.key, p.comm);
        self.emit(key, Body::Exit { status: WaitStatus(status), comm });
    }

    /// `exit_notify`: children get an adopter, the zombie stands.
    pub(super) fn notify(&mut self, pid: u32) {
        let mut up = self.procs[&pid].parent;
        let alive = |s: &Self, p: u32| {
            s.procs.get(&p).is_some_and(|p| matches!(p.state, State::Running | State::LeaderExited))
        };
        while up != 1 && !(self.procs.get(&up).is_some_and(|p| p.subreaper) && alive(self, up)) {
            up = self.procs.get(&up).map_or(1, |p| p.parent);
        }
        for p in self.procs.values_mut() {
            if p.parent == pid {
                p.parent = up;
            }
        }
        self.procs.get_mut(&pid).unwrap().state = State::Zombie;
    }

    pub(super) fn reap(&mut self, pid: u32) {
        let p = self.procs.remove(&pid).unwrap();
        assert_eq!(p.state, State::Zombie);
        self.emit(p.key, Body::Reap { status: WaitStatus(p.status) });
    }

    pub(super) fn die(&mut self, pid: u32, status: i32) {
        self.exit(pid, status);
        self.notify(pid);
    }

    /// Dies and is reaped.
    pub(super) fn end(&mut self, pid: u32, status: i32) {
        self.die(pid, status);
        self.reap(pid);
    }

    pub(super) fn signal(&mut self, from: u32, to: u32, signal: u8) {
        let (sender, target) = (self.key(from), self.key(to));
        self.emit(
            target,
            Body::Signal {
                sender: Sender::Process(sender),
                sender_uid: 0,
                target_tid: to,
                signal,
                code: 0,
                result: SignalResult::Delivered,
            },
        );
    }

    pub(super) fn seen(&self, key: Key) -> Seen {
        match self.procs.get(&key.pid).filter(|p| p.key == key) {
            None => Seen::Absent,
            Some(p) => {
                let dead_leader = matches!(p.state, State::Zombie | State::LeaderExited);
                Seen::Present(Look {
                    state: if dead_leader { b'Z' } else { b'S' },
                    ppid: p.parent,
                    pgrp: p.session,
                    session: p.session,
                    live_thread: p.state != State::Zombie,
                })
            }
        }
    }

    /// `lineage`: whether the kernel's map has entries (not for those who ran before the probes).
    pub(super) fn snapshot(&self, lineage: bool) -> Snapshot {
        let rows = self
            .procs
            .values()
            .map(|p| Row {
                key: p.key,
                parent: self.procs.get(&p.parent).map(|p| p.key),
                lineage: self
                    .lineage
                    .get(&p.key)
                    .filter(|_| lineage)
                    .map(|&parent| RowLineage { parent, mended: false }),
                job: p.job,
                state: match p.state {
                    State::Running => RowState::Running,
                    State::LeaderExited => RowState::LeaderExited,
                    State::Exiting => RowState::Exiting,
                    State::Zombie => RowState::Zombie,
                    State::Gone => RowState::Gone,
                },
                status: p.status,
                uid: Some(1000),
                comm: p.comm,
                kernel_thread: false,
                adopts: p.subreaper,
                argv: Some(p.argv.clone()),
                exe: None,
            })
            .collect();
        Snapshot { t0: self.now, rows }
    }
}
