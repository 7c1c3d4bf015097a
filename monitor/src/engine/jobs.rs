//! Jobs: a root and all who descend from it. They begin here (by a rule, by `exec`, from the saved state) and end here, when no
//! member has a live thread. Members and their counts are the groups of the forest; deadlines, orphans and kills have files of
//! their own.

mod saved;

use std::collections::HashMap;

use super::forest::groups::DEPTH;
use super::forest::{Fast, Forest, Idx};
use super::input::Limits;
use super::output::{Change, Effect, Refused};
use super::record::{JobEnded, JobPolicy, JobRecord};
use super::timers::Timer;
use super::turn::{SECOND, Turn, nanos};
use crate::config::{Action, Rule};
use crate::model::event::WaitStatus;
use crate::model::key::Key;
use crate::model::kill::Reason;
use crate::model::schema::JobId;
use crate::model::stats::Outcome;

/// How long an ended job stays in `jobs`.
const REMEMBERED: u64 = 60 * SECOND;
/// An empty job has ended after this: if records were lost, a member may turn up until then.
const EMPTY_FOR: u64 = SECOND;
/// Most ended jobs that stay.
const DONE_MAX: usize = 1_000;

#[derive(Debug)]
pub(super) struct Job {
    pub(super) record: JobRecord,
    /// The root's node while it is kept.
    pub(super) root: Option<Idx>,
    pub(super) root_status: Option<WaitStatus>,
    pub(super) killing: Option<Reason>,
    /// It was ended by an order.
    pub(super) killed: bool,
    /// Its end was ordered because its deadline had passed, or by its `exec`: the deadline is not acted on again.
    pub(super) timed_kill: bool,
    /// Boot-time ns of its end.
    pub(super) done: Option<u64>,
    /// `JobEnded` was reported: the job does not come back.
    pub(super) ended: bool,
    /// From the saved state: a deadline that passed while the agent was down does not kill at once.
    pub(super) restored: bool,
    /// A row of a snapshot had its number: the kernel knows it.
    pub(super) in_kernel: bool,
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
            ended: false,
            restored: false,
            in_kernel: false,
        }
    }
}

/// The table of jobs; the index is that of the forest's group.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    slots: HashMap<Idx, Job>,
    by_number: HashMap<u64, Idx>,
    by_id: HashMap<JobId, Idx>,
    /// Processes of `exec` that supervise jobs, and how many each.
    supervisors: HashMap<Key, usize, Fast>,
    done: usize,
    last_number: u64,
    pub(super) refused: u64,
}

/// What the settings of a rule mean for its jobs.
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
pub(super) struct NewJob {
    pub(super) ordinal: u32,
    pub(super) name: String,
    pub(super) rule: Option<String>,
    pub(super) policy: JobPolicy,
    pub(super) existing: bool,
    pub(super) supervisor: Option<Key>,
    /// The number under which the kernel has it already.
    pub(super) number: Option<u64>,
}

// The table.
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
    pub(super) fn number(&self, g: Idx) -> Option<u64> {
        self.get(g).map(|j| j.record.number)
    }
    pub(super) fn iter(&self) -> impl Iterator<Item = (Idx, &Job)> {
        self.slots.iter().map(|(g, j)| (*g, j))
    }
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }
    pub(super) fn groups(&self) -> Vec<Idx> {
        self.slots.keys().copied().collect()
    }

    fn insert(&mut self, g: Idx, j: Job) {
        self.by_number.insert(j.record.number, g);
        self.by_id.insert(j.record.id, g);
        self.last_number = self.last_number.max(j.record.number);
        if let Some(s) = j.record.supervisor {
            *self.supervisors.entry(s).or_default() += 1;
        }
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
    fn free_number(&mut self, now: u64) -> u64 {
        self.last_number = now.max(self.last_number.saturating_add(1));
        self.last_number
    }

    /// `count` free numbers in a row; the first. None of them is given again.
    pub(super) fn reserve_numbers(&mut self, count: u32, now: u64) -> u64 {
        let first = self.free_number(now);
        self.last_number = first.saturating_add(u64::from(count.max(1) - 1));
        first
    }

    // Supervisors.

    pub(super) fn supervises(&self, key: Key) -> bool {
        self.supervisors.contains_key(&key)
    }

    pub(super) fn supervisors(&self) -> impl Iterator<Item = Key> {
        self.supervisors.keys().copied()
    }

    /// One job less that this process supervises.
    fn drop_supervisor(&mut self, s: Option<Key>) {
        if let Some(s) = s
            && let Some(n) = self.supervisors.get_mut(&s)
        {
            *n -= 1;
            if *n == 0 {
                self.supervisors.remove(&s);
            }
        }
    }

    /// Jobs that have not ended and have this supervisor.
    pub(super) fn supervised_by(&self, key: Key) -> Vec<Idx> {
        let theirs = |j: &Job| j.record.supervisor == Some(key) && j.done.is_none();
        self.iter().filter(|(_, j)| theirs(j)).map(|(g, _)| g).collect()
    }
}

// Beginning.
impl Jobs {
    /// Makes `root` the root of a new job, inside the innermost job that it is in.
    pub(super) fn begin(
        &mut self,
        root: Idx,
        new: NewJob,
        forest: &mut Forest,
        limits: Limits,
        turn: &mut Turn<'_>,
    ) -> Result<Idx, Refused> {
        let (key, outer) = (forest.node(root).key, forest.node(root).group);
        let refused = if forest.groups.chain(outer).count() >= DEPTH {
            Some(Refused::TooDeep(key, DEPTH))
        } else if self.len() >= limits.jobs {
            Some(Refused::TooManyJobs(limits.jobs))
        } else {
            None
        };
        if let Some(refused) = refused {
            self.refused += 1;
            return Err(refused);
        }
        let in_kernel = new.number.is_some();
        let number = new.number.unwrap_or_else(|| self.free_number(turn.now));
        // CMD of an `exec` was forked a while ago, and starts as soon as this is answered.
        let from = if new.rule.is_some() { key.start } else { turn.now };
        let record = JobRecord {
            number,
            id: JobId { root: key, ordinal: new.ordinal },
            name: new.name,
            rule: new.rule,
            outer: self.number(outer).unwrap_or(0),
            started: key.start,
            deadline: new.policy.timeout_ns.map(|t| from.saturating_add(t)),
            policy: new.policy,
            existing: new.existing,
            supervisor: new.supervisor,
            expired: false,
            members: Vec::new(),
        };
        let g = forest.add_group(outer);
        forest.hold(root);
        self.insert(g, Job { root: Some(root), ..Job::new(record.clone()) });
        self.enroll(g, outer, root, forest);
        turn.change(Change::Job(Box::new(record.clone())));
        if !in_kernel {
            turn.effect(Effect::LabelJob(Box::new(record)));
        }
        Ok(g)
    }

    /// Makes `root` and all who descend from it members of `g`, which is new inside `outer`; inner groups that are there
    /// already become inner groups of it.
    pub(super) fn enroll(&mut self, g: Idx, outer: Idx, root: Idx, forest: &mut Forest) {
        let family: Vec<Idx> = forest.descend(root).collect();
        for i in family {
            let own = forest.node(i).group;
            if own == outer {
                forest.set_group(i, g);
            } else if own != g {
                let directly_inside = |x: Idx| forest.groups.get(x).is_some_and(|x| x.outer == outer);
                let inner = forest.groups.chain(own).find(|&x| x != g && directly_inside(x));
                if let Some(inner) = inner.filter(|&x| self.rooted_below(x, root, forest)) {
                    forest.nest(inner, g);
                    let number = self.number(g);
                    if let (Some(j), Some(number)) = (self.get_mut(inner), number) {
                        j.record.outer = number;
                    }
                }
            }
        }
    }

    fn rooted_below(&self, g: Idx, root: Idx, forest: &Forest) -> bool {
        let inner = self.get(g).and_then(|j| forest.find(j.record.id.root));
        inner.is_some_and(|i| forest.descends(i, root))
    }

    /// The saved job of a rule whose exec record comes again after a restart, before a row has told its members.
    pub(super) fn saved(&self, root: Key, rule: &str) -> Option<Idx> {
        let is_it = |j: &Job| {
            j.restored
                && j.done.is_none()
                && j.record.id.root == root
                && j.record.rule.as_deref() == Some(rule)
        };
        self.iter().find(|(_, j)| is_it(j)).map(|(g, _)| g)
    }
}

// Ending.
impl Jobs {
    /// No member of `g` has a live thread any more. False: it had ended before, or its members are not known yet.
    pub(super) fn end(&mut self, g: Idx, at: u64, ready: bool, turn: &mut Turn<'_>) -> bool {
        let Some(j) = self.get_mut(g).filter(|j| j.done.is_none() && (ready || !j.restored)) else {
            return false;
        };
        j.done = Some(at);
        let number = j.record.number;
        self.done += 1;
        turn.set(at.saturating_add(EMPTY_FOR), Timer::Ended(number));
        true
    }

    /// Time to find out whether an empty job has ended: nothing was lost and no kill is under way. The forest may be wrong all the
    /// same, and forgetting a job lets its members go: the kernel is asked first.
    pub(super) fn end_due(&mut self, number: u64, unsynced: bool, turn: &mut Turn<'_>) {
        let Some(j) = self.by_number(number).and_then(|g| self.get(g)) else { return };
        if j.ended || j.done.is_none() {
            return;
        }
        if unsynced || j.killing.is_some() {
            return turn.set(turn.now.saturating_add(EMPTY_FOR), Timer::Ended(number));
        }
        turn.effect(Effect::CountMembers(number));
    }

    /// The kernel knows no living member: the job has ended. None: it goes on, or must be counted again.
    pub(super) fn counted(
        &mut self,
        number: u64,
        unsynced: bool,
        turn: &mut Turn<'_>,
    ) -> Option<Box<JobEnded>> {
        let g = self.by_number(number)?;
        let too_many = self.done > DONE_MAX;
        let j = self.get_mut(g).filter(|j| !j.ended)?;
        let at = j.done?;
        if unsynced || j.killing.is_some() {
            turn.set(turn.now.saturating_add(EMPTY_FOR), Timer::Ended(number));
            return None;
        }
        j.ended = true;
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
        let stay = if too_many { 0 } else { REMEMBERED };
        turn.set(at.saturating_add(stay), Timer::Forget(number));
        let ended = Box::new(ended);
        turn.change(Change::JobEnded(ended.clone()));
        Some(ended)
    }

    /// Whether this job waits for the kernel's count of its members.
    pub(super) fn is_counted(&self, number: u64) -> bool {
        let job = self.by_number(number).and_then(|g| self.get(g));
        job.is_some_and(|j| !j.ended && j.done.is_some())
    }

    /// A member that was not known turned up alive: the job had not ended. False: it has.
    pub(super) fn revive(&mut self, g: Idx, turn: &mut Turn<'_>) -> bool {
        let Some(j) = self.get_mut(g) else { return false };
        if j.ended || j.done.take().is_none() {
            return false;
        }
        let job = Box::new(j.record.clone());
        self.done -= 1;
        turn.change(Change::Job(job));
        true
    }

    /// The time to remember an ended job is over; its zombies keep it a while longer. Gives the job that is gone.
    pub(super) fn forget(&mut self, number: u64, forest: &mut Forest, turn: &mut Turn<'_>) -> Option<Job> {
        let g = self.by_number(number)?;
        self.get(g)?.done?;
        let zombies = forest.groups.get(g).is_some_and(|g| g.all.zombies > 0);
        if zombies && self.done <= DONE_MAX {
            turn.set(turn.now.saturating_add(REMEMBERED), Timer::Forget(number));
            return None;
        }
        self.done -= 1;
        forest.remove_group(g);
        let job = self.remove(g)?;
        if let Some(root) = job.root {
            forest.release(root);
        }
        self.drop_supervisor(job.record.supervisor);
        Some(job)
    }

    /// How the root of a job ended, as far as it is known by now: the reap record has the last word.
    pub(super) fn root_ended(&mut self, i: Idx, forest: &Forest) {
        let status = forest.node(i).wait_status();
        for g in forest.groups.chain(forest.node(i).group) {
            if let Some(j) = self.get_mut(g).filter(|j| j.root == Some(i)) {
                j.root_status = status;
            }
        }
    }
}
