//! Records, observations, and what they change in the forest.

use crate::engine::forest::{Facts, Flags, Idx, Moved, NONE, NodeChange, apply};
use crate::engine::turn::Turn;
use crate::engine::view::View;
use crate::engine::{Effect, Engine, Observation, Output, facts};
use crate::model::event::{Body, Event};
use crate::model::key::Key;
use crate::model::schema::State;

impl Engine {
    pub(in crate::engine) fn record(&mut self, e: &Event<'_>, out: &mut Output) {
        self.now = self.now.max(e.at).min(u64::MAX - 1);
        let key = e.process;
        match e.body {
            Body::Fork { lineage_parent, parent, job, uid, comm, kernel_thread, no_entry } => {
                let group = if job == 0 { None } else { self.jobs.by_number(job) };
                let born =
                    apply::Born { child: key, lineage_parent, parent, group, uid, comm, kernel_thread };
                match self.forest.fork(&born, e.at) {
                    Some(i) => self.enter_kernel(i, lineage_parent, job, no_entry, out),
                    None => self.store_full(out),
                }
            }
            Body::Exec { uid, comm, filename: file, argv, argv_cut: cut, cgroup, .. } => {
                self.forest.exec(key, &apply::Execed { uid, comm, file, argv, cut }, e.at);
                self.cgroups.execed_in(key, cgroup, &mut self.forest, turn!(self, out));
            }
            Body::Exit { status, comm } => self.forest.exit(key, status, comm, e.at),
            Body::LeaderExit { comm, .. } => self.forest.leader_exit(key, comm, e.at),
            Body::Reap { status } => self.forest.reap(key, status, e.at),
            Body::Signal { sender, signal, result, .. } => {
                return self.forest.signal(key, signal, sender, result, e.at);
            }
            Body::Kill { result, .. } => return self.forest.probe_kill(key, result, e.at),
        }
        self.follow_changes(out);
    }

    /// The kernel put the child of `parent` into `job`. If it had no room, or into none though the child belongs to one here
    /// (its forker was not in the map either), it is entered. (A job that is not known here is that of a kill of some: the
    /// kernel is right.)
    pub(in crate::engine) fn enter_kernel(
        &self,
        i: Idx,
        parent: Key,
        job: u64,
        missed: bool,
        out: &mut Output,
    ) {
        let ours = self.jobs.get(self.forest.node(i).group).filter(|j| !j.ended);
        let ours = ours.map_or(0, |j| j.record.number);
        if missed || (job == 0 && ours != 0) {
            let job = if ours == 0 { job } else { ours };
            let process = self.forest.node(i).key;
            out.effects.push(Effect::EnterProcess { process, parent, job, missed });
        }
    }

    /// Hands out what changed in the forest, until nothing does any more; then what is not needed is dropped.
    pub(in crate::engine) fn follow_changes(&mut self, out: &mut Output) {
        let mut changes = std::mem::take(&mut self.changes);
        loop {
            self.forest.take_changes(&mut changes);
            if changes.is_empty() {
                break;
            }
            for c in &changes {
                self.changed(*c, out);
            }
        }
        self.changes = changes;
        self.forest.collect();
    }

    pub(in crate::engine) fn changed(&mut self, c: NodeChange, out: &mut Output) {
        match c {
            NodeChange::Born(i) => {
                if self.forest.node(i).group != NONE {
                    self.member_appeared(i, out);
                }
                if self.merging {
                    facts::ask_argv(i, &mut self.forest, turn!(self, out));
                }
            }
            NodeChange::State(m) => self.moved(m, out),
            NodeChange::Orphan(i) => self.orphans.added(i, &self.forest, &self.jobs, turn!(self, out)),
            NodeChange::Parent { node, from } => self.reparented(node, from, out),
            NodeChange::Exec(i) => self.try_rules(i, out),
            NodeChange::Ask(i) => facts::ask_all(i, &mut self.forest, turn!(self, out)),
        }
    }

    pub(in crate::engine) fn reparented(&mut self, node: Idx, from: Idx, out: &mut Output) {
        if self.forest.node(node).state == State::Zombie {
            self.plan_zombie(node, out);
            self.zombie_left(from, out);
        }
        let parent = self.forest.node(node).parent;
        // Whether an adopter is the init of a namespace or of a container.
        if self.forest.get(parent).is_some_and(|p| p.key.pid != 1 && p.alive()) {
            facts::ask_place(parent, &mut self.forest, turn!(self, out));
        }
        if self.forest.get(parent).is_some_and(|p| !p.alive()) {
            self.look_soon(parent, self.now, out);
        }
    }

    pub(in crate::engine) fn moved(&mut self, m: Moved, out: &mut Output) {
        let Moved { node: i, from, to, since, at } = m;
        let lived = |s| matches!(s, State::Running | State::LeaderExited);
        if from == State::Zombie {
            self.zombies.remove(since, i);
            let parent = self.forest.node(i).parent;
            self.zombie_left(parent, out);
        }
        match to {
            State::Exiting => self.look_soon(i, at, out),
            State::Zombie => {
                // Gone again within one input: its own change follows, and finds what it expects.
                self.zombies.insert(if from == State::Exiting { since } else { at }, i);
                self.plan_zombie(i, out);
                if lived(from) {
                    self.look_soon(i, at, out);
                }
            }
            State::Gone => {
                if !lived(from) {
                    self.reap_delay.observe(at.saturating_sub(since) as f64 / 1e9);
                } else if self.forest.reapable(i).next().is_some() {
                    self.look_soon(i, at, out);
                }
                self.jobs.root_ended(i, &self.forest);
            }
            State::Running | State::LeaderExited => {}
        }
        if matches!(to, State::Zombie | State::Gone) && !self.survivors.is_empty() {
            let steps = self.survivors.ended(self.forest.node(i).key, view!(self));
            self.alerts_all(steps, out);
        }
        if lived(from) && !lived(to) {
            self.died(i, at, out);
        }
    }

    pub(in crate::engine) fn died(&mut self, i: Idx, at: u64, out: &mut Output) {
        let n = self.forest.node(i);
        let (key, group) = (n.key, n.group);
        if n.flags.has(Flags::ORPHAN) {
            self.orphan_left(group, out);
        }
        self.jobs.root_ended(i, &self.forest);
        if self.zombies.watches(key) {
            self.zombie_left(i, out);
        }
        if self.jobs.supervises(key) {
            self.supervisor_died(key, out);
        }
        for g in self.forest.groups.chain(group).collect::<Vec<_>>() {
            if self.forest.groups.get(g).is_some_and(|x| x.all.live == 0) {
                self.job_emptied(g, at, out);
            }
        }
    }

    pub(in crate::engine) fn member_appeared(&mut self, i: Idx, out: &mut Output) {
        if !self.forest.node(i).alive() {
            return;
        }
        for g in self.forest.groups.chain(self.forest.node(i).group).collect::<Vec<_>>() {
            self.revive(g, out);
        }
    }

    pub(in crate::engine) fn observed(&mut self, o: Observation, out: &mut Output) {
        match o {
            Observation::Look { key, at, seen } => {
                self.forest.looked(key, seen, at);
                self.follow_changes(out);
                let firing = |name| self.alerts.firing(name);
                let step = self.zombies.confirmed(key, seen, firing, view!(self), self.now);
                self.alert(step, out);
                self.orphans.session_seen(key, seen, &self.forest, &self.jobs, turn!(self, out));
            }
            Observation::Facts { key, facts } => {
                // What is the host's own is not stored with each process.
                let facts = facts.map(|f| {
                    let own = f.ns_pid.is_none_or(|n| n == key.pid);
                    let host = f.pid_ns.map_or(own, |ns| Some(ns) == self.settings.pid_ns);
                    if host { Facts { pid_ns: None, ns_pid: None, ..f } } else { f }
                });
                self.forest.facts(key, facts.as_ref());
                for i in self.rules.waited_for(key, &mut self.forest) {
                    self.try_rules(i, out);
                }
                if self.rules.scan_got(key) {
                    self.scan_now(out);
                }
            }
            Observation::Inside { key, pid_ns, ns_pid } => {
                let host = Some(pid_ns) == self.settings.pid_ns;
                self.forest.inside(key, (!host).then_some((pid_ns, ns_pid)));
            }
            Observation::Cgroup { key, id, cgroup, by_id } => {
                self.cgroups.answered(key, id, cgroup.as_deref(), by_id, &mut self.forest, turn!(self, out));
            }
        }
        self.follow_changes(out);
    }
}
