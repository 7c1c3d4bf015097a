//! Jobs: a root and all who descend from it. They begin here (by a rule, by `exec`, from the saved state) and end here,
//! when no member has a live thread. Members and their numbers are the forest's groups; deadlines, orphans and kills
//! have files of their own.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use super::timers::Timer;
use super::{Effect, Engine, ExecJob, JobEnded, JobPolicy, JobRecord, Refused, SECOND, nanos};
use crate::config::{Action, Rule};
use crate::engine::forest::groups::DEPTH;
use crate::engine::forest::{Idx, NONE};
use crate::model::event::WaitStatus;
use crate::model::key::Key;
use crate::model::kill::Reason;
use crate::model::schema::{self, JobId, JobState};
use crate::model::stats::Outcome;

/// How long an ended job stays in `jobs`.
const REMEMBERED: u64 = 60 * SECOND;
/// An empty job is told to have ended after this: if records were lost, a member may turn up until then.
const SETTLES: u64 = SECOND;
/// Most ended jobs that stay.
const DONE_MAX: usize = 1_000;

#[derive(Debug)]
pub(super) struct Job {
    pub(super) record: JobRecord,
    /// The root's node while it is kept.
    pub(super) root: Option<Idx>,
    pub(super) root_status: Option<WaitStatus>,
    pub(super) killing: Option<Reason>,
    /// It was ended on somebody's order.
    pub(super) killed: bool,
    /// Its end was ordered because its deadline had passed, or by its `exec`: the deadline is not acted on again.
    pub(super) timed_kill: bool,
    /// Boot-time ns of its end.
    pub(super) done: Option<u64>,
    /// `JobEnded` was said: it does not come back.
    pub(super) told: bool,
    /// From the saved state: what expired while the agent was down is not killed at once.
    pub(super) restored: bool,
    /// A row of a snapshot had its number: the kernel knows it.
    pub(super) in_kernel: bool,
    /// Roots of kills by `on_orphan` that were ordered already: what survived or was spared is not tried again.
    pub(super) tried: HashSet<Key>,
    /// Sessions of orphans that were looked at.
    pub(super) sessions: HashMap<Key, i32>,
    /// When its orphans are looked through next; `u64::MAX`: not planned.
    pub(super) orphans_at: u64,
}

impl Job {
    fn new(record: JobRecord) -> Self {
        Self {
            record,
            root: None,
            root_status: None,
            killing: None,
            killed: false,
            timed_kill: false,
            done: None,
            told: false,
            restored: false,
            in_kernel: false,
            tried: HashSet::new(),
            sessions: HashMap::new(),
            orphans_at: u64::MAX,
        }
    }
}

/// The table of jobs; the index is that of the forest's group.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    slots: HashMap<Idx, Job>,
    by_number: HashMap<u64, Idx>,
    by_id: HashMap<JobId, Idx>,
    pub(super) done: usize,
    pub(super) last_number: u64,
    pub(super) refused: u64,
}

impl Jobs {
    pub(super) fn get(&self, g: Idx) -> Option<&Job> {
        self.slots.get(&g)
    }
    pub(super) fn get_mut(&mut self, g: Idx) -> Option<&mut Job> {
        self.slots.get_mut(&g)
    }
    pub(super) fn by_number(&self, n: u64) -> Option<Idx> {
        self.by_number.get(&n).copied()
    }
    pub(super) fn by_id(&self, id: JobId) -> Option<Idx> {
        self.by_id.get(&id).copied()
    }
    pub(super) fn iter(&self) -> impl Iterator<Item = (Idx, &Job)> {
        self.slots.iter().map(|(g, j)| (*g, j))
    }
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    fn insert(&mut self, g: Idx, j: Job) {
        self.by_number.insert(j.record.number, g);
        self.by_id.insert(j.record.id, g);
        self.last_number = self.last_number.max(j.record.number);
        self.slots.insert(g, j);
    }

    fn remove(&mut self, g: Idx) -> Option<Job> {
        let j = self.slots.remove(&g)?;
        self.by_number.remove(&j.record.number);
        if self.by_id.get(&j.record.id) == Some(&g) {
            self.by_id.remove(&j.record.id);
        }
        Some(j)
    }

    /// Never given twice in a boot.
    pub(super) fn free_number(&mut self, now: u64) -> u64 {
        self.last_number = now.max(self.last_number + 1);
        self.last_number
    }
}

/// What a rule means for its jobs.
pub(super) fn policy_of(r: &Rule) -> JobPolicy {
    JobPolicy {
        timeout_ns: r.timeout.map(nanos),
        zombie_after_ns: r.zombie_after.map(nanos),
        orphan_after_ns: Some(nanos(r.orphan_after)),
        kill_on_timeout: r.on_timeout == Action::Kill,
        kill_on_orphan: r.on_orphan == Action::Kill,
        kill_daemons: r.kill_daemons,
        enforce_existing: r.enforce_existing,
        stop_signal: r.stop_signal,
        grace_ns: nanos(r.grace),
        severity: r.severity,
    }
}

/// What a new job is made of.
pub(super) struct Begin {
    pub(super) ordinal: u32,
    pub(super) name: String,
    pub(super) rule: Option<String>,
    pub(super) policy: JobPolicy,
    pub(super) existing: bool,
    pub(super) supervisor: Option<Key>,
    pub(super) number: Option<u64>,
}

impl Engine {
    pub(super) fn begin(
        &mut self,
        root: Idx,
        b: Begin,
        now: u64,
        fx: &mut Vec<Effect>,
    ) -> Result<JobRecord, Refused> {
        let outer = self.forest.node(root).group;
        let refused = if self.forest.groups.chain(outer).count() >= DEPTH {
            Some(Refused::TooDeep(self.forest.node(root).key, DEPTH))
        } else if self.jobs.len() >= self.settings.limits.jobs {
            Some(Refused::TooManyJobs(self.settings.limits.jobs))
        } else {
            None
        };
        if let Some(refused) = refused {
            self.jobs.refused += 1;
            return Err(refused);
        }
        let key = self.forest.node(root).key;
        let number = b.number.unwrap_or_else(|| self.jobs.free_number(now));
        // CMD of an `exec` was forked a while ago, and starts as soon as this is answered.
        let from = if b.rule.is_some() { key.start } else { now };
        let record = JobRecord {
            number,
            id: JobId { root: key, ordinal: b.ordinal },
            name: b.name,
            rule: b.rule,
            outer: self.jobs.get(outer).map_or(0, |j| j.record.number),
            started: key.start,
            deadline: b.policy.timeout_ns.map(|t| from.saturating_add(t)),
            policy: b.policy,
            existing: b.existing,
            supervisor: b.supervisor,
            expired: false,
            members: Vec::new(),
        };
        let g = self.forest.add_group(outer);
        let job = Job { root: Some(root), ..Job::new(record.clone()) };
        self.forest.hold(root);
        if let Some(s) = record.supervisor {
            *self.supervisors.entry(s).or_default() += 1;
        }
        self.jobs.insert(g, job);
        self.names.job(&record.name, now);
        self.enroll(g, outer, root);
        fx.push(Effect::Job { job: Box::new(record.clone()), label: b.number.is_none() });
        self.ask_place(root, fx);
        self.set_deadline(g);
        self.watch_orphans(g, now);
        self.zombies_of_group(g, now);
        Ok(record)
    }

    /// Makes `root` and all who descend from it members of `g`, which is new inside `outer`; inner groups that are there
    /// already become inner groups of it.
    pub(super) fn enroll(&mut self, g: Idx, outer: Idx, root: Idx) {
        let family: Vec<Idx> = self.forest.descend(root).collect();
        for i in family {
            let own = self.forest.node(i).group;
            if own == outer {
                self.forest.set_group(i, g);
            } else if own != g {
                let inner = self
                    .forest
                    .groups
                    .chain(own)
                    .find(|&x| x != g && self.forest.groups.get(x).is_some_and(|x| x.outer == outer));
                if let Some(inner) = inner.filter(|&x| self.rooted_below(x, root)) {
                    self.forest.nest(inner, g);
                    let number = self.jobs.get(g).map(|j| j.record.number);
                    if let (Some(j), Some(number)) = (self.jobs.get_mut(inner), number) {
                        j.record.outer = number;
                    }
                }
            }
        }
    }

    fn rooted_below(&self, g: Idx, root: Idx) -> bool {
        let inner = self.jobs.get(g).and_then(|j| self.forest.find(j.record.id.root));
        inner.is_some_and(|i| self.forest.descends(i, root))
    }

    pub(super) fn exec_job(
        &mut self,
        j: ExecJob,
        now: u64,
        fx: &mut Vec<Effect>,
    ) -> Result<JobRecord, Refused> {
        let id = JobId { root: j.root, ordinal: 0 };
        if let Some(known) = self.jobs.by_id(id).and_then(|g| self.jobs.get(g)) {
            return Ok(known.record.clone());
        }
        let full = || Refused::TooManyJobs(self.settings.limits.jobs);
        let root = self.forest.ensure(j.root, now).ok_or_else(full)?;
        let begin = Begin {
            ordinal: 0,
            name: j.name,
            rule: None,
            policy: j.policy,
            existing: false,
            supervisor: j.supervisor,
            number: j.number,
        };
        let r = self.begin(root, begin, now, fx);
        self.settle(now, fx);
        r
    }

    /// No member of `g` has a live thread any more.
    pub(super) fn end(&mut self, g: Idx, at: u64, fx: &mut Vec<Effect>) {
        let restoring = self.ready.is_none();
        let Some(j) = self.jobs.get_mut(g).filter(|j| j.done.is_none() && !(j.restored && restoring)) else {
            return;
        };
        j.done = Some(at);
        let number = j.record.number;
        self.jobs.done += 1;
        self.timers.set(at + SETTLES, Timer::Ended(number));
        self.clear_job_alerts(g, at, fx);
    }

    /// The job is still empty, nothing was lost and nobody is killing it. The forest may be wrong all the same, and a job
    /// that is forgotten lets its members go: the kernel is asked first.
    pub(super) fn ended(&mut self, number: u64, now: u64, fx: &mut Vec<Effect>) {
        let Some(j) = self.jobs.by_number(number).and_then(|g| self.jobs.get(g)) else { return };
        if j.told || j.done.is_none() {
            return;
        }
        if self.unsynced || j.killing.is_some() {
            return self.timers.set(now + SETTLES, Timer::Ended(number));
        }
        fx.push(Effect::Emptied(number));
    }

    /// What the kernel says to that.
    pub(super) fn counted(&mut self, number: u64, alive: bool, now: u64, fx: &mut Vec<Effect>) {
        let Some(g) = self.jobs.by_number(number) else { return };
        let Some(j) = self.jobs.get(g).filter(|j| !j.told) else { return };
        let Some(at) = j.done else { return };
        // Until a snapshot has shown who it is.
        self.unsynced |= alive;
        if self.unsynced || j.killing.is_some() {
            return self.timers.set(now + SETTLES, Timer::Ended(number));
        }
        let outcome = match j.root_status.and_then(WaitStatus::code) {
            _ if j.killed => Outcome::Killed,
            _ if j.record.expired => Outcome::TimedOut,
            Some(0) => Outcome::Completed,
            _ => Outcome::Failed,
        };
        let r = &j.record;
        let ended = JobEnded {
            number: r.number,
            id: r.id,
            name: r.name.clone(),
            outcome,
            started: r.started,
            ended: at,
        };
        let numbers = self.names.ended(&ended.name, now);
        *numbers.finished.entry(outcome).or_default() += 1;
        numbers.duration.observe(at.saturating_sub(ended.started) as f64 / 1e9);
        fx.push(Effect::JobEnded(Box::new(ended)));
        if let Some(j) = self.jobs.get_mut(g) {
            j.told = true;
        }
        let stay = if self.jobs.done > DONE_MAX { 0 } else { REMEMBERED };
        self.timers.set(at + stay, Timer::Forget(number));
    }

    /// A member that was not known of turned up alive: it had not ended.
    pub(super) fn revive(&mut self, g: Idx, now: u64, fx: &mut Vec<Effect>) {
        let Some(j) = self.jobs.get_mut(g) else { return };
        if !j.told && j.done.take().is_some() {
            let job = Box::new(j.record.clone());
            self.jobs.done -= 1;
            fx.push(Effect::Job { job, label: false });
            self.set_deadline(g);
            self.watch_orphans(g, now);
        }
    }

    /// The time to remember an ended job is over; its zombies keep it a while longer.
    pub(super) fn forget(&mut self, number: u64, now: u64) {
        let Some(g) = self.jobs.by_number(number) else { return };
        if self.jobs.get(g).is_none_or(|j| j.done.is_none()) {
            return;
        }
        let zombies = self.forest.groups.get(g).is_some_and(|g| g.all.zombies > 0);
        if zombies && self.jobs.done <= DONE_MAX {
            return self.timers.set(now + REMEMBERED, Timer::Forget(number));
        }
        self.jobs.done -= 1;
        self.forest.remove_group(g);
        let Some(job) = self.jobs.remove(g) else { return };
        self.names.job(&job.record.name, now);
        self.plan_names(now);
        if let Some(root) = job.root {
            self.forest.release(root);
        }
        self.supervisor_left(job.record.supervisor);
        self.forest.collect();
    }

    /// One job less that this process supervises.
    pub(super) fn supervisor_left(&mut self, s: Option<Key>) {
        if let Some(s) = s
            && let Some(n) = self.supervisors.get_mut(&s)
        {
            *n -= 1;
            if *n == 0 {
                self.supervisors.remove(&s);
            }
        }
    }

    pub(super) fn extend_job(
        &mut self,
        id: JobId,
        by: Duration,
        now: u64,
        fx: &mut Vec<Effect>,
    ) -> Result<JobRecord, Refused> {
        let g = self.jobs.by_id(id).ok_or_else(|| Refused::NoJob(id.to_string()))?;
        let j = self.jobs.get_mut(g).ok_or_else(|| Refused::NoJob(id.to_string()))?;
        if j.done.is_some() {
            return Err(Refused::Ended(id.to_string()));
        }
        let deadline = j.record.deadline.ok_or_else(|| Refused::NoDeadline(id.to_string()))?;
        j.record.deadline = Some(deadline.max(now).saturating_add(nanos(by)));
        j.record.expired = false;
        let record = j.record.clone();
        fx.push(Effect::Job { job: Box::new(record.clone()), label: false });
        self.clear_timeout(g, "its deadline was extended", now, fx);
        self.set_deadline(g);
        Ok(record)
    }

    /// Before the first snapshot: the groups must be there when the rows come.
    pub(super) fn restore(&mut self, jobs: Vec<JobRecord>) {
        let outers: Vec<(u64, u64)> = jobs.iter().map(|r| (r.number, r.outer)).collect();
        for record in jobs {
            if self.jobs.by_number(record.number).is_some() || self.jobs.len() >= self.settings.limits.jobs {
                continue;
            }
            let g = self.forest.add_group(NONE);
            if let Some(s) = record.supervisor {
                *self.supervisors.entry(s).or_default() += 1;
            }
            self.names.job(&record.name, self.now);
            let job = Job { restored: true, ..Job::new(record) };
            self.jobs.insert(g, job);
        }
        for (number, outer) in outers {
            if let (Some(g), Some(o)) = (self.jobs.by_number(number), self.jobs.by_number(outer))
                && !self.forest.groups.chain(o).any(|x| x == g)
            {
                self.forest.nest(g, o);
            }
        }
    }

    /// After the first snapshot: roots are found again, members that only the saved state knows are entered, and what
    /// ended while the agent was down is ended.
    pub(super) fn settle_restored(&mut self, now: u64, fx: &mut Vec<Effect>) {
        let mut restored: Vec<(u64, Idx)> =
            self.jobs.iter().filter(|(_, j)| j.restored).map(|(g, j)| (j.record.number, g)).collect();
        // Outer ones first, as far as they were made first.
        restored.sort_unstable();
        for &(_, g) in &restored {
            let Some(j) = self.jobs.get_mut(g) else { continue };
            let members = std::mem::take(&mut j.record.members);
            let (root, in_kernel) = (j.record.id.root, j.in_kernel);
            if let Some(i) = self.forest.find(root) {
                self.forest.hold(i);
                if let Some(j) = self.jobs.get_mut(g) {
                    j.root = Some(i);
                }
            }
            // The rows of the others have said it, if the kernel knows the job.
            let members = if in_kernel { Vec::new() } else { members };
            let known: Vec<Idx> =
                members.iter().chain([&root]).filter_map(|&k| self.forest.find(k)).collect();
            let outer = self.forest.groups.get(g).map_or(NONE, |g| g.outer);
            for i in known {
                self.enroll(g, outer, i);
                // The saved state of before wins over an outer job that has just been entered.
                if self.forest.node(i).group == NONE {
                    self.forest.set_group(i, g);
                }
            }
        }
        for (_, g) in restored {
            if self.forest.groups.get(g).is_some_and(|x| x.all.live > 0) {
                let Some(j) = self.jobs.get(g) else { continue };
                let (job, label) = (Box::new(j.record.clone()), !j.in_kernel);
                fx.push(Effect::Job { job, label });
                self.set_deadline(g);
                self.watch_orphans(g, now);
            } else {
                self.end(g, now, fx);
            }
        }
    }

    pub(super) fn state_of(&self, j: &Job) -> JobState {
        let root_lives = j.root.is_some_and(|i| self.forest.node(i).alive());
        match (j.done, j.killing, j.record.expired) {
            (Some(_), ..) => JobState::Done,
            (_, Some(_), _) => JobState::Killing,
            (.., true) => JobState::Expired,
            _ if root_lives => JobState::Running,
            _ => JobState::Lingering,
        }
    }

    /// Orphans among the members; the root is not one of its own job's, whoever started it.
    pub(super) fn orphans_in(&self, g: Idx, own: bool) -> usize {
        let (Some(x), Some(j)) = (self.forest.groups.get(g), self.jobs.get(g)) else { return 0 };
        let root = j.root.filter(|&i| self.forest.node(i).orphan());
        let n = if own { x.own.orphans } else { x.all.orphans } as usize;
        n - usize::from(root.is_some_and(|i| !own || self.forest.node(i).group == g)).min(n)
    }

    pub(super) fn view_jobs(&self) -> Vec<schema::Job> {
        let mut all: Vec<(Idx, &Job)> = self.jobs.iter().collect();
        all.sort_unstable_by_key(|(_, j)| j.record.number);
        all.into_iter().filter_map(|(g, j)| self.view_job(g, j)).collect()
    }

    fn view_job(&self, g: Idx, j: &Job) -> Option<schema::Job> {
        let all = self.forest.groups.get(g)?.all;
        Some(schema::Job {
            id: j.record.id,
            name: j.record.name.clone(),
            root: j.record.id.root,
            state: self.state_of(j),
            started: self.wall(j.record.started),
            deadline: j.record.deadline.map(|d| self.wall(d)),
            processes: all.live as usize,
            zombies: all.zombies as usize,
            orphans: self.orphans_in(g, false),
        })
    }

    /// It and the jobs inside it.
    pub(super) fn with_inner(&self, g: Idx) -> Vec<Idx> {
        self.jobs.iter().map(|(i, _)| i).filter(|&i| self.forest.groups.chain(i).any(|x| x == g)).collect()
    }

    pub(super) fn records(&self) -> Vec<JobRecord> {
        let mut all: Vec<JobRecord> = Vec::new();
        for (g, j) in self.jobs.iter().filter(|(_, j)| j.done.is_none()) {
            let members = self.forest.members(g).map(|i| self.forest.node(i)).filter(|n| n.alive());
            all.push(JobRecord { members: members.map(|n| n.key).collect(), ..j.record.clone() });
        }
        all.sort_unstable_by_key(|r| r.number);
        all
    }
}
