//! The engine's loop: inputs go to the forest, the forest says what changed, and each change is handed to whom it
//! concerns. No decision is made here.

use super::alerts::{About, Raise};
use super::jobs::policy_of;
use super::timers::Timer;
use super::{Effect, Engine, LOSS_OVER, Observation, SECOND, nanos, rules, summary};
use crate::config::Config;
use crate::engine::forest::{Change, Facts, Flags, Idx, Merge, Moved, NONE, RowState, Snapshot, apply};
use crate::model::event::{Body, Event};
use crate::model::key::Key;
use crate::model::schema::{Alert, AlertKind, State};

/// A store that was full has room again when it is filled to less than this, in percent.
const ROOM: usize = 90;

impl Engine {
    pub(super) fn apply(&mut self, e: &Event<'_>, fx: &mut Vec<Effect>) {
        let now = self.later(e.at);
        let key = e.process;
        match e.body {
            Body::Fork { lineage_parent, parent, job, uid, comm, kernel_thread, no_entry } => {
                let group = if job == 0 { None } else { self.jobs.by_number(job) };
                let born =
                    apply::Born { child: key, lineage_parent, parent, group, uid, comm, kernel_thread };
                match self.forest.fork(&born, e.at) {
                    Some(i) => self.enter_kernel(i, lineage_parent, job, no_entry, fx),
                    None => self.check_capacity(now, fx),
                }
            }
            Body::Exec { uid, comm, filename: file, argv, argv_cut: cut, cgroup, .. } => {
                self.forest.exec(key, &apply::Execed { uid, comm, file, argv, cut }, e.at);
                self.execed_in(key, cgroup, now, fx);
            }
            Body::Exit { status, comm } => self.forest.exit(key, status, comm, e.at),
            Body::LeaderExit { comm, .. } => self.forest.leader_exit(key, comm, e.at),
            Body::Reap { status } => self.forest.reap(key, status, e.at),
            Body::Signal { sender, signal, result, .. } => {
                return self.forest.signal(key, signal, sender, result, e.at);
            }
            Body::Kill { result, .. } => return self.forest.probe_kill(key, result, e.at),
        }
        self.settle(now, fx);
    }

    /// The kernel put the child of `parent` into `job`. If it had no room, or into none though the child belongs to one here
    /// (its forker was not in the map either), it is told. (A job that is not known here is that of a kill of some: the
    /// kernel is right.)
    fn enter_kernel(&self, i: Idx, parent: Key, job: u64, missed: bool, fx: &mut Vec<Effect>) {
        let told = self.jobs.get(self.forest.node(i).group).filter(|j| !j.told);
        let told = told.map_or(0, |j| j.record.number);
        if missed || (job == 0 && told != 0) {
            let job = if told == 0 { job } else { told };
            fx.push(Effect::Enter { process: self.forest.node(i).key, parent, job, missed });
        }
    }

    /// Hands out what changed, until nothing does any more; then what nobody needs is dropped.
    pub(super) fn settle(&mut self, now: u64, fx: &mut Vec<Effect>) {
        let mut changes = std::mem::take(&mut self.changes);
        loop {
            self.forest.take_changes(&mut changes);
            if changes.is_empty() {
                break;
            }
            for c in &changes {
                self.changed(*c, now, fx);
            }
        }
        self.changes = changes;
        self.forest.collect();
    }

    fn changed(&mut self, c: Change, now: u64, fx: &mut Vec<Effect>) {
        match c {
            Change::Born(i) => {
                if self.forest.node(i).group != NONE {
                    self.member_came(i, now, fx);
                }
                if self.merging {
                    self.ask_facts(i, fx);
                }
            }
            Change::State(m) => self.moved(m, now, fx),
            Change::Orphan(i) => self.orphaned(i, now),
            Change::Parent { node, from } => {
                if self.forest.node(node).state == State::Zombie {
                    self.zombie(node, now);
                    self.zombie_left(from, now);
                }
                let parent = self.forest.node(node).parent;
                // Whether an adopter is the init of a namespace or of a container.
                if self.forest.get(parent).is_some_and(|p| p.key.pid != 1 && p.alive()) {
                    self.ask_place(parent, fx);
                }
                if self.forest.get(parent).is_some_and(|p| !p.alive()) {
                    self.look_soon(parent, now);
                }
            }
            Change::Exec(i) => self.try_rules(i, now, fx),
            Change::Ask(i) => self.ask(i, fx),
        }
    }

    fn moved(&mut self, m: Moved, now: u64, fx: &mut Vec<Effect>) {
        let Moved { node: i, from, to, since, at } = m;
        let lived = |s| matches!(s, State::Running | State::LeaderExited);
        if from == State::Zombie {
            self.zombies.remove(&(since, i));
            let parent = self.forest.node(i).parent;
            self.zombie_left(parent, now);
        }
        match to {
            State::Exiting => self.look_soon(i, at),
            State::Zombie => {
                // Gone again within one input: its own change follows, and finds what it expects.
                self.zombies.insert((if from == State::Exiting { since } else { at }, i));
                self.zombie(i, now);
                if lived(from) {
                    self.look_soon(i, at);
                }
            }
            State::Gone => {
                if !lived(from) {
                    self.reap_delay.observe(at.saturating_sub(since) as f64 / 1e9);
                } else if self.forest.reapable(i).next().is_some() {
                    self.look_soon(i, at);
                }
                self.root_status(i);
            }
            State::Running | State::LeaderExited => {}
        }
        if matches!(to, State::Zombie | State::Gone) && !self.survivors.is_empty() {
            let key = self.forest.node(i).key;
            self.survivor_ended(key, now, fx);
        }
        if lived(from) && !lived(to) {
            self.died(i, at, now, fx);
        }
    }

    fn died(&mut self, i: Idx, at: u64, now: u64, fx: &mut Vec<Effect>) {
        let n = self.forest.node(i);
        let (key, group) = (n.key, n.group);
        if n.flags.has(Flags::ORPHAN) {
            self.orphan_left(group, now);
        }
        self.root_status(i);
        if self.watches.contains_key(&key) {
            self.zombie_left(i, now);
        }
        if self.supervisors.contains_key(&key) {
            self.supervisor_died(key, fx);
        }
        let mut g = group;
        while let Some(x) = self.forest.groups.get(g) {
            let (live, outer) = (x.all.live, x.outer);
            if live == 0 {
                self.end(g, at, fx);
            }
            g = outer;
        }
    }

    /// How the root of a job ended, as far as it is known by now: the reap record has the last word.
    fn root_status(&mut self, i: Idx) {
        let status = self.forest.node(i).wait_status();
        let mut g = self.forest.node(i).group;
        while let Some(x) = self.forest.groups.get(g) {
            if let Some(j) = self.jobs.get_mut(g).filter(|j| j.root == Some(i)) {
                j.root_status = status;
            }
            g = x.outer;
        }
    }

    fn member_came(&mut self, i: Idx, now: u64, fx: &mut Vec<Effect>) {
        if !self.forest.node(i).alive() {
            return;
        }
        let mut g = self.forest.node(i).group;
        while let Some(x) = self.forest.groups.get(g) {
            let outer = x.outer;
            if self.jobs.get(g).is_some_and(|j| j.done.is_some()) {
                self.revive(g, now, fx);
            }
            g = outer;
        }
    }

    pub(super) fn observed(&mut self, o: Observation, now: u64, fx: &mut Vec<Effect>) {
        match o {
            Observation::Look { key, at, seen } => {
                self.forest.looked(key, seen, at);
                self.settle(now, fx);
                self.confirmed(key, seen, now, fx);
                self.session_seen(key, seen, now);
            }
            Observation::Facts { key, facts } => {
                // What is the host's own is not stored with each process.
                let facts = facts.map(|f| {
                    let own = f.ns_pid.is_none_or(|n| n == key.pid);
                    let host = f.pid_ns.map_or(own, |ns| Some(ns) == self.settings.pid_ns);
                    if host { Facts { pid_ns: None, ns_pid: None, ..f } } else { f }
                });
                self.forest.facts(key, facts.as_ref());
                self.facts_came(key, now, fx);
            }
            Observation::Inside { key, pid_ns, ns_pid } => {
                let host = Some(pid_ns) == self.settings.pid_ns;
                self.forest.inside(key, (!host).then_some((pid_ns, ns_pid)));
            }
            Observation::Cgroup { key, id, cgroup, by_id } => {
                self.cgroup_came(key, id, cgroup.as_deref(), by_id, now, fx);
            }
        }
        self.settle(now, fx);
    }

    pub(super) fn merge(&mut self, s: &Snapshot, now: u64, fx: &mut Vec<Effect>) -> Merge {
        for row in s.rows.iter().filter(|r| r.job != 0) {
            if let Some(j) = self.jobs.by_number(row.job).and_then(|g| self.jobs.get_mut(g)) {
                j.in_kernel = true;
            }
        }
        let jobs = &self.jobs;
        let mut missing = Vec::new();
        let m = self.forest.merge(s, &|n| jobs.by_number(n), &mut missing, now);
        self.merging = true;
        self.settle(now, fx);
        self.merging = false;
        fx.extend(missing.into_iter().map(Effect::Look));
        self.unsynced = m.overrun;
        if self.ready.is_some() {
            self.recount_jobs(now, fx);
            self.scan(false, now, fx);
            self.enter_rows(s, fx);
        }
        self.settle(now, fx);
        m
    }

    /// Members by lineage whom the kernel does not have in their job: their fork found no room, or their forker's did.
    fn enter_rows(&self, s: &Snapshot, fx: &mut Vec<Effect>) {
        for row in s.rows.iter().filter(|r| r.job == 0 && r.state != RowState::Gone) {
            let Some(i) = self.forest.find(row.key).filter(|&i| self.forest.node(i).group != NONE) else {
                continue;
            };
            let parent = self.forest.get(self.forest.node(i).lineage).map(|n| n.key).or(row.parent);
            self.enter_kernel(i, parent.unwrap_or_default(), 0, false, fx);
        }
    }

    /// A snapshot may have brought members of jobs that seemed empty, or told that the last one is gone.
    fn recount_jobs(&mut self, now: u64, fx: &mut Vec<Effect>) {
        let all: Vec<Idx> = self.jobs.iter().map(|(g, _)| g).collect();
        for g in all {
            let live = self.forest.groups.get(g).map_or(0, |x| x.all.live);
            let done = self.jobs.get(g).is_some_and(|j| j.done.is_some());
            match (live, done) {
                (0, false) => self.end(g, now, fx),
                (1.., true) => self.revive(g, now, fx),
                _ => {}
            }
            // Some may be no orphans after all.
            self.orphan_left(g, now);
        }
    }

    pub(super) fn become_ready(&mut self, now: u64, fx: &mut Vec<Effect>) {
        if self.ready.is_some() {
            return;
        }
        self.ready = Some(now);
        self.settle_restored(now, fx);
        self.settle(now, fx);
        self.settle_alerts(now, fx);
        self.fuse_alert(now, fx);
        // Supervisors of `exec` that died while the agent was down.
        let dead = |k: &&Key| self.forest.find(**k).is_none_or(|i| !self.forest.node(i).alive());
        let dead: Vec<Key> = self.supervisors.keys().filter(dead).copied().collect();
        for key in dead {
            self.supervisor_died(key, fx);
        }
        // Deadlines that passed before are looked at again.
        let all: Vec<Idx> = self.jobs.iter().map(|(g, _)| g).collect();
        for g in all {
            self.set_deadline(g);
        }
        self.scan(true, now, fx);
        self.run_timers(now, fx);
    }

    pub(super) fn run_timers(&mut self, now: u64, fx: &mut Vec<Effect>) {
        while let Some(t) = self.timers.due(now) {
            match t {
                Timer::Look(i, generation) => self.look_due(i, generation, now, fx),
                Timer::Zombies(parent) => self.zombies_due(parent, now, fx),
                Timer::Orphans(job) => self.orphans_due(job, now, fx),
                Timer::Deadline(job) => self.deadline_due(job, now, fx),
                Timer::Ended(job) => self.ended(job, now, fx),
                Timer::Forget(job) => self.forget(job, now),
                Timer::LossOver => self.loss_over(now, fx),
                Timer::EnforcementOver => self.word_over(now, fx),
                Timer::Alert(serial) => self.alert_timer(serial, now, fx),
                Timer::Capacity => self.check_room(now, fx),
                Timer::Names => self.names_due(now),
                Timer::Scan => self.scan_late(now, fx),
            }
        }
        self.settle(now, fx);
    }

    pub(super) fn take_config(&mut self, c: &Config, now: u64, fx: &mut Vec<Effect>) {
        self.static_labels = c.agent.labels.clone();
        self.zombies_after = nanos(c.zombies.after);
        self.enforcement.configure(&c.enforcement);
        self.rules = rules::watched(&c.jobs);
        self.names.set_rules(c.jobs.iter().map(|r| r.name.as_str()), now);
        self.plan_names(now);
        let all: Vec<Idx> = self.jobs.iter().filter(|(_, j)| j.done.is_none()).map(|(g, _)| g).collect();
        for g in all {
            let Some(j) = self.jobs.get_mut(g) else { continue };
            let Some(rule) = c.jobs.iter().find(|r| Some(&r.name) == j.record.rule.as_ref()) else {
                continue;
            };
            let new = policy_of(rule);
            if new == j.record.policy {
                continue;
            }
            let after = |t: Option<u64>| t.map(|t| j.record.started.saturating_add(t));
            // A deadline that was extended by hand stays.
            if j.record.deadline == after(j.record.policy.timeout_ns) {
                j.record.deadline = after(new.timeout_ns);
            }
            j.record.expired &= j.record.deadline.is_some_and(|d| d <= now);
            j.record.policy = new;
            let (job, expired) = (Box::new(j.record.clone()), j.record.expired);
            fx.push(Effect::Job { job, label: false });
            if !expired {
                self.clear_timeout(g, "it has another deadline now", now, fx);
            }
            self.set_deadline(g);
            self.watch_orphans(g, now);
            self.zombies_of_group(g, now);
        }
        self.reconsider(now);
        let zombies: Vec<Idx> = self.zombies.iter().map(|&(_, i)| i).collect();
        for i in zombies {
            self.zombie(i, now);
        }
        if self.ready.is_some() {
            self.scan(true, now, fx);
        }
        self.settle(now, fx);
    }

    pub(super) fn loss(&mut self, n: u64, now: u64, fx: &mut Vec<Effect>) {
        if self.alerts.get((AlertKind::EventsLost, About::Host)).is_none() {
            self.lost = (0, now, now);
        }
        self.lost.0 = self.lost.0.saturating_add(n);
        self.lost.2 = now;
        let text = summary::lost(self.lost.0 as usize, now, self.lost.1);
        let raise =
            Raise { count: self.lost.0 as usize, since: self.lost.1, summary: text, ..Raise::host(now) };
        self.raise((AlertKind::EventsLost, About::Host), &raise, now, fx);
        self.timers.set(now.saturating_add(LOSS_OVER), Timer::LossOver);
    }

    /// It fired before a restart: what was said then stays, and it ends as late after this moment as after a loss.
    pub(super) fn loss_restored(&mut self, a: &Alert, now: u64, fx: &mut Vec<Effect>) {
        let name = (AlertKind::EventsLost, About::Host);
        if self.alerts.get(name).is_some() {
            return;
        }
        self.lost = (a.count as u64, now, now);
        let raise = Raise { count: a.count, summary: a.summary.clone(), ..Raise::host(now) };
        self.raise(name, &raise, now, fx);
        self.timers.set(now.saturating_add(LOSS_OVER), Timer::LossOver);
    }

    fn loss_over(&mut self, now: u64, fx: &mut Vec<Effect>) {
        if self.lost.2.saturating_add(LOSS_OVER) <= now {
            let text = format!("No record was lost in the last 5 minutes; {} were before.", self.lost.0);
            self.clear((AlertKind::EventsLost, About::Host), text, now, fx);
        }
    }

    pub(super) fn edge_condition(
        &mut self,
        kind: AlertKind,
        wrong: Option<String>,
        now: u64,
        fx: &mut Vec<Effect>,
    ) {
        if kind == AlertKind::Capacity {
            self.wrong.clone_from(&wrong);
        }
        match wrong {
            Some(text) => {
                let raise = Raise { summary: text, ..Raise::host(now) };
                self.raise((kind, About::Host), &raise, now, fx);
            }
            None if kind == AlertKind::Capacity => self.check_room(now, fx),
            None => {
                self.clear((kind, About::Host), "It works again.".into(), now, fx);
            }
        }
    }

    fn full(&self, percent: usize) -> Option<&'static str> {
        let l = &self.settings.limits;
        let at = |n: usize, max: usize| n.saturating_mul(100) >= max.saturating_mul(percent);
        [
            ("processes", self.forest.len(), l.processes),
            ("jobs", self.jobs.len(), l.jobs),
            ("alerts", self.alerts.len(), l.alerts),
        ]
        .into_iter()
        .find(|&(_, n, max)| at(n, max))
        .map(|(name, ..)| name)
    }

    /// Something was refused because a store is full.
    pub(super) fn check_capacity(&mut self, now: u64, fx: &mut Vec<Effect>) {
        if let Some(store) = self.full(100) {
            let text = format!("jobwarden's table of {store} is full: more are not followed.");
            self.capacity_told(text, now, fx);
        }
    }

    /// An alert that ends by itself when there is room again.
    pub(super) fn capacity_told(&mut self, summary: String, now: u64, fx: &mut Vec<Effect>) {
        let name = (AlertKind::Capacity, About::Host);
        if self.alerts.get(name).is_none() {
            self.raise(name, &Raise { summary, ..Raise::host(now) }, now, fx);
            self.watch_room(now);
        }
    }

    /// Whether there is room again is looked at until there is.
    pub(super) fn watch_room(&mut self, now: u64) {
        self.timers.set(now.saturating_add(10 * SECOND), Timer::Capacity);
    }

    fn check_room(&mut self, now: u64, fx: &mut Vec<Effect>) {
        if self.full(ROOM).is_some() {
            self.watch_room(now);
        } else if self.wrong.is_none() {
            self.clear((AlertKind::Capacity, About::Host), "There is room again.".into(), now, fx);
        }
    }
}
