//! Decides what is a job, an alert or a kill. Pure: it reads no clock and opens no file, so a recorded stream replays to the
//! same result. [`Engine::handle`] takes every [`Input`] and adds to an [`Output`]; queries change nothing.
//!
//! Each part owns its state and returns what follows from a call; only this file passes it on to other parts.

mod alerts;
mod cgroups;
mod conditions;
mod deadlines;
mod enforcement;
mod event_context;
mod facts;
pub mod forest;
pub mod input;
mod jobs;
mod kills;
mod names;
mod orphans;
pub mod output;
mod proc_poll;
mod queries;
pub mod query;
pub mod record;
mod rules;
mod summary;
#[cfg(test)]
mod tests;
mod timers;
mod turn;
mod view;
mod zombies;

use std::borrow::Cow;

pub use event_context::EventContext;
pub use input::{ExecJob, Input, Limits, Observation, Settings};
pub use output::{AlertChange, Answer, Change, Effect, KillOrder, Output, Refused};
pub use proc_poll::LOOKS_PER_S;
pub use query::{Gauges, Target, TreeQuery};
pub use record::{EnforcementState, JobEnded, JobPolicy, JobRecord};

use self::alerts::{About, AlertStep, Alerts};
use self::conditions::{Capacity, Losses};
use self::deadlines::DeadlineKill;
use self::forest::{Facts, Flags, Forest, Idx, Merge, Moved, NONE, NodeChange, RowState, Snapshot, apply};
use self::jobs::{Jobs, NewJob, policy_of};
use self::orphans::{OrphanKill, OrphanStep, Orphans};
use self::proc_poll::ExitPolls;
use self::timers::{Timer, Timers};
use self::turn::{Turn, nanos};
use self::view::View;
use crate::config::Config;
use crate::model::event::{Body, Event};
use crate::model::key::Key;
use crate::model::kill::{Reason, What};
use crate::model::schema::{Alert, AlertKind, JobId, KillReport, State};
use crate::model::stats::{Histogram, REAP_DELAY_BOUNDS};

/// Nanoseconds by which the wall clock is set at least, if it is; less is slewed.
const CLOCK_STEP: u64 = 10_000_000;

/// The forest and all decisions over it. Times are boot-time nanoseconds and may not go back between two inputs (a time
/// that does counts as the last one).
///
/// Order of a start: `new`, the `Restore` inputs, attach the probes, `SnapshotStarted`, take the snapshot while records go on
/// being handled or after it, `Snapshot`, and when it was taken without loss, `Ready`.
#[derive(Debug)]
pub struct Engine {
    settings: Settings,
    forest: Forest,
    jobs: Jobs,
    timers: Timers,
    alerts: Alerts,
    zombies: zombies::Zombies,
    orphans: Orphans,
    enforcement: enforcement::Enforcement,
    survivors: kills::Survivors,
    rules: rules::Rules,
    cgroups: cgroups::Cgroups,
    exit_polls: ExitPolls,
    /// Values of the `job_name` label.
    names: names::Names,
    losses: Losses,
    capacity: Capacity,
    reap_delay: Histogram,
    /// When the forest was first synced.
    ready: Option<u64>,
    /// Records were lost and no snapshot has been merged since.
    unsynced: bool,
    merging: bool,
    changes: Vec<NodeChange>,
    now: u64,
}

/// The turn of an input: the fields that every part may write, borrowed beside the part itself.
macro_rules! turn {
    ($engine:ident, $out:ident) => {
        &mut Turn { now: $engine.now, timers: &mut $engine.timers, out: &mut *$out }
    };
}

/// What the parts describe processes and jobs with, borrowed beside the part itself.
macro_rules! view {
    ($engine:ident) => {
        View { settings: &$engine.settings, forest: &$engine.forest, jobs: &$engine.jobs }
    };
}

impl Engine {
    #[must_use]
    pub fn new(settings: Settings, config: &Config) -> Self {
        let l = settings.limits;
        let mut engine = Self {
            forest: Forest::new(l.processes, l.tombstones, l.signals),
            jobs: Jobs::default(),
            timers: Timers::default(),
            alerts: Alerts::default(),
            zombies: zombies::Zombies::new(nanos(config.zombies.after)),
            orphans: Orphans::default(),
            enforcement: enforcement::Enforcement::new(&config.enforcement),
            survivors: kills::Survivors::default(),
            rules: rules::Rules::default(),
            cgroups: cgroups::Cgroups::default(),
            exit_polls: ExitPolls::default(),
            names: names::Names::default(),
            losses: Losses::default(),
            capacity: Capacity::default(),
            reap_delay: Histogram::new(REAP_DELAY_BOUNDS),
            ready: None,
            unsynced: false,
            merging: false,
            changes: Vec::new(),
            now: 0,
            settings,
        };
        engine.configure(config);
        engine
    }

    fn configure(&mut self, config: &Config) {
        self.alerts.static_labels.clone_from(&config.agent.labels);
        self.zombies.after = nanos(config.zombies.after);
        self.enforcement.configure(&config.enforcement);
        self.rules.set(&config.jobs);
        self.names.set_rules(config.jobs.iter().map(|r| r.name.as_str()), self.now);
    }

    fn view(&self) -> View<'_> {
        view!(self)
    }

    /// The one door: applies an input at boot time `now` (ns) and adds to `out` what follows from it. A record brings its own time.
    pub fn handle(&mut self, input: Input<'_>, now: u64, out: &mut Output) -> Answer {
        // Time does not go back.
        self.now = self.now.max(now);
        match input {
            Input::Record { event, .. } => self.record(event, out),
            Input::SnapshotStarted { t0 } => {
                self.now = self.now.max(t0);
                self.forest.snapshot_started(t0);
            }
            Input::Snapshot(s) => return Answer::Merged(self.merge(&s, out)),
            Input::Ready => self.become_ready(out),
            Input::Observation(o) => self.observed(o.into_owned(), out),
            Input::Tick => self.run_timers(out),
            Input::Clock { boot_to_wall_ns } => self.set_clock(boot_to_wall_ns),
            Input::RestoreEnforcement(s) => self.enforcement.restore(s.into_owned(), turn!(self, out)),
            Input::RestoreJobs(jobs) => self.restore_jobs(&jobs),
            Input::RestoreAlerts { alerts, this_boot } => {
                self.alerts.restore(alerts.into_owned(), this_boot, view!(self), turn!(self, out));
            }
            Input::Reload(config) => self.reload(&config, out),
            Input::RegisterJob(job) => return Answer::Job(self.register(job.into_owned(), out)),
            Input::ExtendJob { job, by } => return Answer::Job(self.extend(job, by, out)),
            Input::ReleaseJob { job } => return Answer::Job(self.release(job, out)),
            Input::ReserveNumbers { count } => {
                return Answer::Number(self.jobs.reserve_numbers(count, self.now));
            }
            Input::KillStarted { job, reason } => kills::started(job, reason, &mut self.jobs),
            Input::KillFinished { job, reason, whole, report } => {
                self.kill_finished(job, reason, whole, report.as_deref().map_err(AsRef::as_ref), out);
            }
            Input::ProcessKillFinished { root, report } => {
                let report = report.as_deref().map_err(AsRef::as_ref);
                let step = self.survivors.finished(root, report, view!(self), self.now);
                self.survivor_alert(root, step, out);
            }
            Input::Enforcement { on, lasts } => self.set_enforcement(on, lasts.map(nanos), out),
            Input::EventsLost { count } => {
                self.unsynced = true;
                let alerted = self.alerts.get((AlertKind::EventsLost, About::Host)).is_some();
                let step = self.losses.add(count, alerted, turn!(self, out));
                self.alert(step, out);
            }
            Input::Condition { kind, problem } => self.condition(kind, problem.map(Cow::into_owned), out),
            Input::JobCounted { number, alive } => self.job_counted(number, alive, out),
            Input::Cause { alert, cause } => {
                self.alerts.set_cause(&alert, cause.into_owned(), turn!(self, out));
            }
        }
        Answer::None
    }

    /// Both clocks run at one rate, and a smaller difference comes from reading one after the other: the start of a process must
    /// not read differently each time.
    fn set_clock(&mut self, boot_to_wall_ns: i64) {
        if self.settings.boot_to_wall_ns.abs_diff(boot_to_wall_ns) >= CLOCK_STEP {
            self.settings.boot_to_wall_ns = boot_to_wall_ns;
        }
    }

    /// The forkers of the records that come next ([`event::forker`](crate::model::event::forker)). Changes nothing: they are fetched from
    /// memory beside each other. Among a million processes handling a fork is mostly waiting for its forker; all others are young, and near.
    pub fn expect(&self, forkers: &[Key]) {
        self.forest.expect(forkers);
    }

    /// When `Input::Tick` has something to do next.
    #[must_use]
    pub fn next_wake(&self) -> Option<u64> {
        self.timers.next()
    }

    // What the parts ask of each other.

    /// An alert is raised or cleared.
    fn alert(&mut self, step: impl Into<Option<AlertStep>>, out: &mut Output) {
        match step.into() {
            None => {}
            Some(AlertStep::Raise(name, raise)) => {
                if !self.alerts.raise(name, &raise, view!(self), turn!(self, out)) {
                    self.store_full(out);
                }
            }
            Some(AlertStep::Clear(name, end)) => self.alerts.clear(name, end, view!(self), turn!(self, out)),
        }
    }

    fn alerts_all(&mut self, steps: Vec<AlertStep>, out: &mut Output) {
        for step in steps {
            self.alert(step, out);
        }
    }

    /// Something was refused because a store is full.
    fn store_full(&mut self, out: &mut Output) {
        let stores = (&self.forest, &self.jobs, &self.alerts);
        let step = Capacity::refused(self.settings.limits, stores, turn!(self, out));
        self.alert(step, out);
    }

    /// The `kill-failed` alert of a process outside of jobs. Without room for the alert its survivors are not followed.
    fn survivor_alert(&mut self, root: Key, step: impl Into<Option<AlertStep>>, out: &mut Output) {
        self.alert(step, out);
        if self.alerts.get((AlertKind::KillFailed, About::Process(root))).is_none() {
            self.survivors.forget(root);
        }
    }

    fn plan_zombie(&mut self, i: Idx, out: &mut Output) {
        self.zombies.plan_for(i, &self.forest, &self.jobs, turn!(self, out));
    }

    fn zombie_left(&mut self, parent: Idx, out: &mut Output) {
        self.zombies.left(parent, &self.forest, turn!(self, out));
    }

    fn look_soon(&mut self, i: Idx, at: u64, out: &mut Output) {
        ExitPolls::begin(i, at, &mut self.forest, turn!(self, out));
    }

    fn watch_orphans(&mut self, g: Idx, out: &mut Output) {
        self.orphans.watch(g, &self.forest, &self.jobs, turn!(self, out));
    }

    fn orphan_left(&mut self, g: Idx, out: &mut Output) {
        let Some(number) = self.jobs.number(g) else { return };
        let alerted = self.alerts.get((AlertKind::Orphan, About::Job(number))).is_some();
        self.orphans.left(g, alerted, &self.jobs, turn!(self, out));
    }

    fn set_deadline(&mut self, g: Idx, out: &mut Output) {
        deadlines::set(g, &self.jobs, turn!(self, out));
    }

    fn clear_job_alerts(&mut self, kinds: &[AlertKind], g: Idx, why: &str, out: &mut Output) {
        let steps = deadlines::clear(kinds, g, why, view!(self));
        self.alerts_all(steps, out);
    }

    // Records, and what changes in the forest.

    fn record(&mut self, e: &Event<'_>, out: &mut Output) {
        self.now = self.now.max(e.at);
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
    fn enter_kernel(&self, i: Idx, parent: Key, job: u64, missed: bool, out: &mut Output) {
        let ours = self.jobs.get(self.forest.node(i).group).filter(|j| !j.ended);
        let ours = ours.map_or(0, |j| j.record.number);
        if missed || (job == 0 && ours != 0) {
            let job = if ours == 0 { job } else { ours };
            let process = self.forest.node(i).key;
            out.effects.push(Effect::EnterProcess { process, parent, job, missed });
        }
    }

    /// Hands out what changed in the forest, until nothing does any more; then what is not needed is dropped.
    fn follow_changes(&mut self, out: &mut Output) {
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

    fn changed(&mut self, c: NodeChange, out: &mut Output) {
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

    fn reparented(&mut self, node: Idx, from: Idx, out: &mut Output) {
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

    fn moved(&mut self, m: Moved, out: &mut Output) {
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

    fn died(&mut self, i: Idx, at: u64, out: &mut Output) {
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

    fn member_appeared(&mut self, i: Idx, out: &mut Output) {
        if !self.forest.node(i).alive() {
            return;
        }
        for g in self.forest.groups.chain(self.forest.node(i).group).collect::<Vec<_>>() {
            self.revive(g, out);
        }
    }

    fn observed(&mut self, o: Observation, out: &mut Output) {
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

    // Snapshots and the start.

    fn merge(&mut self, s: &Snapshot, out: &mut Output) -> Merge {
        for row in s.rows.iter().filter(|r| r.job != 0) {
            if let Some(j) = self.jobs.by_number(row.job).and_then(|g| self.jobs.get_mut(g)) {
                j.in_kernel = true;
            }
        }
        let jobs = &self.jobs;
        let mut missing = Vec::new();
        let m = self.forest.merge(s, &|n| jobs.by_number(n), &mut missing, self.now);
        self.merging = true;
        self.follow_changes(out);
        self.merging = false;
        out.effects.extend(missing.into_iter().map(Effect::Look));
        self.unsynced = m.overrun;
        if self.ready.is_some() {
            self.recount_jobs(out);
            self.scan(false, out);
            self.enter_rows(s, out);
        }
        self.follow_changes(out);
        m
    }

    /// Members by lineage that the kernel does not have in their job: their fork found no room, or their forker's did.
    fn enter_rows(&self, s: &Snapshot, out: &mut Output) {
        for row in s.rows.iter().filter(|r| r.job == 0 && r.state != RowState::Gone) {
            let Some(i) = self.forest.find(row.key).filter(|&i| self.forest.node(i).group != NONE) else {
                continue;
            };
            let parent = self.forest.get(self.forest.node(i).lineage).map(|n| n.key).or(row.parent);
            self.enter_kernel(i, parent.unwrap_or_default(), 0, false, out);
        }
    }

    /// A snapshot may have brought members of jobs that seemed empty, or shown that the last one is gone.
    fn recount_jobs(&mut self, out: &mut Output) {
        for g in self.jobs.groups() {
            let live = self.forest.groups.get(g).map_or(0, |x| x.all.live);
            let done = self.jobs.get(g).is_some_and(|j| j.done.is_some());
            match (live, done) {
                (0, false) => self.job_emptied(g, self.now, out),
                (1.., true) => self.revive(g, out),
                _ => {}
            }
            // Some may be no orphans after all.
            self.orphan_left(g, out);
        }
    }

    fn restore_jobs(&mut self, jobs: &[JobRecord]) {
        self.jobs.restore(jobs, &mut self.forest, self.settings.limits);
        for record in jobs.iter().filter(|r| self.jobs.by_number(r.number).is_some()) {
            self.names.job(&record.name, self.now);
        }
    }

    fn become_ready(&mut self, out: &mut Output) {
        if self.ready.is_some() {
            return;
        }
        self.ready = Some(self.now);
        for g in self.jobs.find_restored(&mut self.forest) {
            if self.forest.groups.get(g).is_some_and(|x| x.all.live > 0) {
                self.jobs.resume(g, turn!(self, out));
                self.set_deadline(g, out);
                self.watch_orphans(g, out);
            } else {
                self.job_emptied(g, self.now, out);
            }
        }
        self.follow_changes(out);
        for alert in self.alerts.restored() {
            self.alert_restored(&alert, out);
        }
        self.alerts.resolve_unclaimed(view!(self), turn!(self, out));
        self.fuse_alert(out);
        // Supervisors of `exec` that died while the agent was down.
        let dead = |k: &Key| self.forest.find(*k).is_none_or(|i| !self.forest.node(i).alive());
        let dead: Vec<Key> = self.jobs.supervisors().filter(dead).collect();
        for key in dead {
            self.supervisor_died(key, out);
        }
        // Deadlines that passed before are looked at again.
        for g in self.jobs.groups() {
            self.set_deadline(g, out);
        }
        self.scan(true, out);
        self.run_timers(out);
    }

    /// An alert fired before the restart: the part that it is about decides whether it still holds.
    fn alert_restored(&mut self, a: &Alert, out: &mut Output) {
        let subject = a.subject.as_ref().map(|p| p.id);
        let job = a.job.and_then(|id| self.jobs.by_id(id));
        let job = job.filter(|&g| self.jobs.get(g).is_some_and(|j| j.done.is_none()));
        match (a.kind, job) {
            (AlertKind::Zombie, _) => {
                let firing = |name| self.alerts.firing(name);
                let step = self.zombies.restored(subject, firing, view!(self), turn!(self, out));
                self.alert(step, out);
            }
            (AlertKind::KillFailed, _) if a.job.is_none() => {
                if let Some(root) = subject
                    && let Some(step) = self.survivors.restored(root, view!(self), self.now)
                {
                    self.survivor_alert(root, step, out);
                }
            }
            (AlertKind::KillFailed, Some(g)) => {
                let step = kills::alert_restored(g, view!(self), self.now);
                self.alert(step, out);
            }
            (AlertKind::Orphan, Some(g)) => {
                if let Some(number) = self.jobs.number(g) {
                    self.orphans.restored(number, self.now);
                    self.orphans_due(number, out);
                }
            }
            (AlertKind::JobTimeout, Some(g)) => {
                let expired = self.jobs.get(g).filter(|j| j.record.expired).map(|j| j.record.number);
                if let Some(number) = expired {
                    self.deadline_due(number, out);
                }
            }
            (AlertKind::Orphan | AlertKind::JobTimeout | AlertKind::KillFailed, None) => {}
            (AlertKind::EventsLost, _) => {
                if self.alerts.get((a.kind, About::Host)).is_none() {
                    let step = self.losses.restored(a, turn!(self, out));
                    self.alert(step, out);
                }
            }
            (AlertKind::EnforcementStopped, _) => self.fuse_alert(out),
            (AlertKind::StorageFailed | AlertKind::Capacity, _) => {
                self.alert(conditions::problem(a.kind, a.summary.clone(), self.now), out);
                if a.kind == AlertKind::Capacity {
                    Capacity::watch(turn!(self, out));
                }
            }
        }
    }

    // Time.

    /// Runs what is due at the beginning; a timer that is set meanwhile waits for the next tick, so each tick ends.
    fn run_timers(&mut self, out: &mut Output) {
        for t in self.timers.take_due(self.now) {
            match t {
                Timer::Look(i, generation) => {
                    self.exit_polls.due(i, generation, &mut self.forest, turn!(self, out));
                }
                Timer::Zombies(parent) => self.zombies_due(parent, out),
                Timer::Orphans(job) => self.orphans_due(job, out),
                Timer::Deadline(job) => self.deadline_due(job, out),
                Timer::Ended(job) => self.jobs.end_due(job, self.unsynced, turn!(self, out)),
                Timer::Forget(job) => self.forget_job(job, out),
                Timer::LossOver => {
                    let step = self.losses.due(self.now);
                    self.alert(step, out);
                }
                Timer::EnforcementOver => {
                    if self.enforcement.operator_over(turn!(self, out)) {
                        self.reconsider(out);
                    }
                }
                Timer::Alert(serial) => self.alerts.due(serial, view!(self), turn!(self, out)),
                Timer::Capacity => self.check_room(out),
                Timer::Names => {
                    let carried = self.jobs.iter().map(|(_, j)| j.record.name.as_str());
                    self.names.due(carried, turn!(self, out));
                }
                Timer::Scan => {
                    if self.rules.scan_is_due(self.now) {
                        self.scan_now(out);
                    }
                }
            }
        }
        self.follow_changes(out);
    }

    fn zombies_due(&mut self, parent: Key, out: &mut Output) {
        let firing = self.alerts.firing((AlertKind::Zombie, About::Process(parent)));
        let known = (&self.settings, &self.jobs);
        let step = self.zombies.due(parent, firing, &mut self.forest, known, turn!(self, out));
        self.alert(step, out);
    }

    fn orphans_due(&mut self, number: u64, out: &mut Output) {
        let known = (&self.settings, &self.jobs);
        let due = match self.orphans.due(number, &mut self.forest, known, turn!(self, out)) {
            OrphanStep::None => return,
            OrphanStep::Over(step) => return self.alert(step, out),
            OrphanStep::Due(due) => due,
        };
        let kill = match &due.kill {
            OrphanKill::No => None,
            OrphanKill::Not(why) => Some((*why).to_owned()),
            OrphanKill::Order { roots, whole } => Some(match self.permit(due.group, out) {
                Ok(()) => {
                    self.orphans.ordered(number, roots, &self.forest);
                    let what = if *whole {
                        What::Whole
                    } else {
                        let first = self.jobs.reserve_numbers(roots.len() as u32, self.now);
                        What::Descendants { number: first, roots: roots.clone() }
                    };
                    kills::order(due.group, Reason::Orphan, what, None, &mut self.jobs, turn!(self, out));
                    "It is being ended.".to_owned()
                }
                Err(why) => format!("It would have been ended: {why}."),
            }),
        };
        let step = due.alert(kill.as_deref(), view!(self), self.now);
        self.alert(step, out);
    }

    fn deadline_due(&mut self, number: u64, out: &mut Output) {
        let Some(passed) = deadlines::due(number, self.ready, &mut self.jobs, turn!(self, out)) else {
            return;
        };
        let kill = match passed.kill {
            DeadlineKill::No => None,
            DeadlineKill::Waits => {
                Some("It passed while jobwarden was down; the job has one more grace.".to_owned())
            }
            DeadlineKill::Order => Some(match self.permit(passed.group, out) {
                Ok(()) => {
                    let (g, jobs) = (passed.group, &mut self.jobs);
                    kills::order(g, Reason::Timeout, What::Whole, None, jobs, turn!(self, out));
                    "It is being ended.".to_owned()
                }
                Err(why) => format!("It would have been ended: {why}."),
            }),
        };
        let step = passed.alert(kill.as_deref(), view!(self), self.now);
        self.alert(step, out);
    }

    // Enforcement and kills.

    /// Whether policy may end this job now; the alert about the fuse fires if that opens it.
    fn permit(&mut self, g: Idx, out: &mut Output) -> Result<(), &'static str> {
        let known = (&self.forest, &self.jobs, &self.settings);
        let open = self.enforcement.state.fuse_open;
        let permitted = self.enforcement.permit(g, self.ready.is_some(), known, turn!(self, out));
        if self.enforcement.state.fuse_open && !open {
            self.fuse_alert(out);
        }
        permitted
    }

    fn fuse_alert(&mut self, out: &mut Output) {
        if self.enforcement.state.fuse_open {
            let text = summary::fuse(self.enforcement.max_per_minute);
            self.alert(conditions::problem(AlertKind::EnforcementStopped, text, self.now), out);
        }
    }

    fn set_enforcement(&mut self, on: bool, lasts: Option<u64>, out: &mut Output) {
        let until = lasts.map(|d| self.now.saturating_add(d));
        if self.enforcement.operator(on, until, turn!(self, out)) {
            let text = "Enforcement was switched on again: the fuse is closed.".to_owned();
            self.alert(AlertStep::Clear((AlertKind::EnforcementStopped, About::Host), text), out);
        }
        self.reconsider(out);
    }

    /// What was only reported may now be done.
    fn reconsider(&mut self, out: &mut Output) {
        if !self.enforcement.on(self.now) {
            return;
        }
        for g in self.jobs.groups() {
            let expired = self.jobs.get(g).filter(|j| j.record.expired).map(|j| j.record.number);
            if let Some(number) = expired {
                self.timers.set(self.now, Timer::Deadline(number));
            }
            self.watch_orphans(g, out);
        }
    }

    /// A process died that supervised jobs: they end with it. As the watcher of an `exec` without an agent does it, without a grace.
    fn supervisor_died(&mut self, key: Key, out: &mut Output) {
        for g in self.jobs.supervised_by(key) {
            let live = self.forest.groups.get(g).is_some_and(|x| x.all.live > 0);
            if live && self.jobs.get(g).is_some_and(|j| j.killing.is_none()) {
                kills::order(g, Reason::Exec, What::Whole, Some(0), &mut self.jobs, turn!(self, out));
            }
        }
    }

    fn kill_finished(
        &mut self,
        id: JobId,
        reason: Reason,
        whole: bool,
        report: Result<&KillReport, &str>,
        out: &mut Output,
    ) {
        let Some(g) = kills::finished(id, whole, &mut self.jobs, &self.forest) else { return };
        let step = kills::alert(g, reason, report, view!(self), self.now);
        self.alert(step, out);
        self.orphans.plan(g, self.now, &self.jobs, turn!(self, out));
    }

    // Jobs.

    /// Makes a job of `root`, and gives it to all parts that have to do with it.
    fn begin(&mut self, root: Idx, new: NewJob, out: &mut Output) -> Result<Idx, Refused> {
        let limits = self.settings.limits;
        let g = self.jobs.begin(root, new, &mut self.forest, limits, turn!(self, out))?;
        if let Some(j) = self.jobs.get(g) {
            self.names.job(&j.record.name, self.now);
        }
        facts::ask_place(root, &mut self.forest, turn!(self, out));
        self.set_deadline(g, out);
        self.watch_orphans(g, out);
        self.zombies.replan_group(g, &self.forest, &self.jobs, turn!(self, out));
        Ok(g)
    }

    fn job_of(&self, g: Idx) -> Result<Box<JobRecord>, Refused> {
        let known = self.jobs.get(g).ok_or_else(|| Refused::NoJob(g.to_string()))?;
        Ok(Box::new(known.record.clone()))
    }

    fn register(&mut self, j: ExecJob, out: &mut Output) -> Result<Box<JobRecord>, Refused> {
        if let Some(g) = self.jobs.by_id(JobId { root: j.root, ordinal: 0 }) {
            return self.job_of(g);
        }
        let full = || Refused::TooManyJobs(self.settings.limits.jobs);
        let root = self.forest.ensure(j.root, self.now).ok_or_else(full)?;
        let new = NewJob {
            ordinal: 0,
            name: j.name,
            rule: None,
            policy: j.policy,
            existing: false,
            supervisor: j.supervisor,
            number: j.number,
        };
        let begun = self.begin(root, new, out).and_then(|g| self.job_of(g));
        self.follow_changes(out);
        begun
    }

    fn extend(
        &mut self,
        id: JobId,
        by: std::time::Duration,
        out: &mut Output,
    ) -> Result<Box<JobRecord>, Refused> {
        let g = self.jobs.extend(id, by, turn!(self, out))?;
        self.clear_job_alerts(&[AlertKind::JobTimeout], g, "its deadline was extended", out);
        self.set_deadline(g, out);
        self.job_of(g)
    }

    fn release(&mut self, id: JobId, out: &mut Output) -> Result<Box<JobRecord>, Refused> {
        let g = self.jobs.release(id, turn!(self, out))?;
        let kinds = [AlertKind::Orphan, AlertKind::JobTimeout];
        self.clear_job_alerts(&kinds, g, "its `exec` is over and left it alone", out);
        self.job_of(g)
    }

    /// No member of `g` has a live thread any more.
    fn job_emptied(&mut self, g: Idx, at: u64, out: &mut Output) {
        if self.jobs.end(g, at, self.ready.is_some(), turn!(self, out)) {
            let kinds = [AlertKind::Orphan, AlertKind::JobTimeout, AlertKind::KillFailed];
            self.clear_job_alerts(&kinds, g, "no process of it is left", out);
        }
    }

    fn revive(&mut self, g: Idx, out: &mut Output) {
        if self.jobs.revive(g, turn!(self, out)) {
            self.set_deadline(g, out);
            self.watch_orphans(g, out);
        }
    }

    /// The kernel has counted the members of a job that seemed over.
    fn job_counted(&mut self, number: u64, alive: bool, out: &mut Output) {
        if self.jobs.is_counted(number) {
            // Until a snapshot has shown who it is.
            self.unsynced |= alive;
        }
        if let Some(ended) = self.jobs.counted(number, self.unsynced, turn!(self, out)) {
            let numbers = self.names.ended(&ended.name, self.now);
            *numbers.finished.entry(ended.outcome).or_default() += 1;
            numbers.duration.observe(ended.ended.saturating_sub(ended.started) as f64 / 1e9);
        }
    }

    fn forget_job(&mut self, number: u64, out: &mut Output) {
        let Some(job) = self.jobs.forget(number, &mut self.forest, turn!(self, out)) else { return };
        self.orphans.forget(number);
        self.names.job(&job.record.name, self.now);
        self.names.plan(turn!(self, out));
        self.forest.collect();
    }

    // Rules and the config.

    /// The process has execed, or facts that it waited for have come.
    fn try_rules(&mut self, i: Idx, out: &mut Output) {
        if let Some(rule) = self.rules.matching(i, &mut self.forest, turn!(self, out)) {
            self.matched(i, rule, false, out);
        }
    }

    /// The first rule that matches `i` is `rule`: it begins a job, unless `i` is in one of the same rule already.
    fn matched(&mut self, i: Idx, rule: usize, existing: bool, out: &mut Output) {
        let Some(new) = self.rules.job(rule, existing) else { return };
        let name = new.name.clone();
        let n = self.forest.node(i);
        let (key, group, alive) = (n.key, n.group, n.alive());
        let same = |g| self.jobs.get(g).is_some_and(|j| j.record.rule.as_ref() == Some(&name));
        if !alive || self.forest.groups.chain(group).any(same) {
            return;
        }
        if let Some(g) = self.jobs.saved(key, &name) {
            self.jobs.enroll(g, group, i, &mut self.forest);
        } else if let Err(refused @ Refused::TooDeep(..)) = self.begin(i, new, out) {
            let text = format!("Rule {name} matches, but {refused}.");
            let step = Capacity::report(text, &self.alerts, turn!(self, out));
            self.alert(step, out);
        }
    }

    fn scan(&mut self, existing: bool, out: &mut Output) {
        if self.rules.scan(existing, &mut self.forest, turn!(self, out)) {
            self.scan_now(out);
        }
    }

    fn scan_now(&mut self, out: &mut Output) {
        let (candidates, all_existing) = self.rules.scan_candidates(&self.forest, turn!(self, out));
        for i in candidates {
            if let Some(rule) = self.rules.matching_now(i, &self.forest) {
                let start = self.forest.node(i).key.start;
                let existing = all_existing || self.ready.is_none_or(|r| start < r);
                self.matched(i, rule, existing, out);
            }
        }
    }

    fn reload(&mut self, c: &Config, out: &mut Output) {
        self.configure(c);
        self.names.plan(turn!(self, out));
        for g in self.jobs.groups() {
            let of_job = |r: &&crate::config::Rule| {
                self.jobs.get(g).is_some_and(|j| j.record.rule.as_ref() == Some(&r.name))
            };
            let Some(rule) = c.jobs.iter().find(of_job) else { continue };
            if !self.jobs.set_policy(g, policy_of(rule), turn!(self, out)) {
                continue;
            }
            if self.jobs.get(g).is_some_and(|j| !j.record.expired) {
                self.clear_job_alerts(&[AlertKind::JobTimeout], g, "it has another deadline now", out);
            }
            self.set_deadline(g, out);
            self.watch_orphans(g, out);
            self.zombies.replan_group(g, &self.forest, &self.jobs, turn!(self, out));
        }
        self.reconsider(out);
        for i in self.zombies.all() {
            self.plan_zombie(i, out);
        }
        if self.ready.is_some() {
            self.scan(true, out);
        }
        self.follow_changes(out);
    }

    // Conditions of the host.

    fn condition(&mut self, kind: AlertKind, problem: Option<String>, out: &mut Output) {
        if kind == AlertKind::Capacity {
            self.capacity.set(problem.clone());
        }
        match problem {
            Some(text) => self.alert(conditions::problem(kind, text, self.now), out),
            None if kind == AlertKind::Capacity => self.check_room(out),
            None => self.alert(conditions::over(kind), out),
        }
    }

    fn check_room(&mut self, out: &mut Output) {
        let stores = (&self.forest, &self.jobs, &self.alerts);
        let step = self.capacity.due(self.settings.limits, stores, turn!(self, out));
        self.alert(step, out);
    }
}
