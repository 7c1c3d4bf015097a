//! Commands about jobs, jobs from the saved state, and what is asked about jobs.

use std::time::Duration;

use super::{Job, Jobs};
use crate::engine::forest::{Forest, Idx, NONE};
use crate::engine::input::Limits;
use crate::engine::output::{Change, Effect, Refused};
use crate::engine::record::{JobPolicy, JobRecord};
use crate::engine::turn::{Turn, nanos};
use crate::model::schema::{JobId, JobState};

// Commands and the saved state.
impl Jobs {
    pub(in crate::engine) fn known(&self, id: JobId) -> Result<Idx, Refused> {
        self.by_id(id).ok_or_else(|| Refused::NoJob(id.to_string()))
    }

    /// The deadline moves by `by`, from now if it has passed.
    pub(in crate::engine) fn extend(
        &mut self,
        id: JobId,
        by: Duration,
        turn: &mut Turn<'_>,
    ) -> Result<Idx, Refused> {
        let g = self.known(id)?;
        let j = self.get_mut(g).ok_or_else(|| Refused::NoJob(id.to_string()))?;
        if j.done.is_some() {
            return Err(Refused::Ended(id.to_string()));
        }
        let deadline = j.record.deadline.ok_or_else(|| Refused::NoDeadline(id.to_string()))?;
        j.record.deadline = Some(deadline.max(turn.now).saturating_add(nanos(by)));
        j.record.expired = false;
        turn.change(Change::Job(Box::new(j.record.clone())));
        Ok(g)
    }

    /// `exec --keep-orphans` is over: the job has no supervisor and no deadline any more. It is followed until its last member ends.
    pub(in crate::engine) fn release(&mut self, id: JobId, turn: &mut Turn<'_>) -> Result<Idx, Refused> {
        let g = self.known(id)?;
        let j = self.get_mut(g).ok_or_else(|| Refused::NoJob(id.to_string()))?;
        let supervisor = j.record.supervisor.take();
        j.record.deadline = None;
        j.record.policy.orphan_after_ns = None;
        turn.change(Change::Job(Box::new(j.record.clone())));
        self.drop_supervisor(supervisor);
        Ok(g)
    }

    /// A job of a rule takes the rule's new policy. False: nothing is different.
    pub(in crate::engine) fn set_policy(&mut self, g: Idx, new: JobPolicy, turn: &mut Turn<'_>) -> bool {
        let Some(j) = self.get_mut(g).filter(|j| j.done.is_none() && j.record.policy != new) else {
            return false;
        };
        let after = |t: Option<u64>| t.map(|t| j.record.started.saturating_add(t));
        // A deadline that was extended by hand stays.
        if j.record.deadline == after(j.record.policy.timeout_ns) {
            j.record.deadline = after(new.timeout_ns);
        }
        j.record.expired &= j.record.deadline.is_some_and(|d| d <= turn.now);
        j.record.policy = new;
        turn.change(Change::Job(Box::new(j.record.clone())));
        true
    }

    /// Before the first snapshot: the groups must be there when the rows come. Gives the names of the jobs.
    pub(in crate::engine) fn restore(&mut self, jobs: &[JobRecord], forest: &mut Forest, limits: Limits) {
        for record in jobs {
            if self.by_number(record.number).is_some() || self.len() >= limits.jobs {
                continue;
            }
            let g = forest.add_group(NONE);
            self.insert(g, Job { restored: true, ..Job::new(record.clone()) });
        }
        for record in jobs {
            if let (Some(g), Some(o)) = (self.by_number(record.number), self.by_number(record.outer))
                && !forest.groups.chain(o).any(|x| x == g)
            {
                forest.nest(g, o);
            }
        }
    }

    /// After the first snapshot: roots are found again, and members that only the saved state knows are entered. Gives the restored
    /// jobs, outer ones first as far as they were made first.
    pub(in crate::engine) fn find_restored(&mut self, forest: &mut Forest) -> Vec<Idx> {
        let mut restored: Vec<(u64, Idx)> =
            self.iter().filter(|(_, j)| j.restored).map(|(g, j)| (j.record.number, g)).collect();
        restored.sort_unstable();
        for &(_, g) in &restored {
            let Some(j) = self.get_mut(g) else { continue };
            let members = std::mem::take(&mut j.record.members);
            let (root, in_kernel) = (j.record.id.root, j.in_kernel);
            if let Some(i) = forest.find(root) {
                forest.hold(i);
                j.root = Some(i);
            }
            // The rows of the others have told it, if the kernel knows the job.
            let members = if in_kernel { Vec::new() } else { members };
            let known: Vec<Idx> = members.iter().chain([&root]).filter_map(|&k| forest.find(k)).collect();
            let outer = forest.groups.get(g).map_or(NONE, |g| g.outer);
            for i in known {
                self.enroll(g, outer, i, forest);
                // The saved state of before wins over an outer job that has just been entered.
                if forest.node(i).group == NONE {
                    forest.set_group(i, g);
                }
            }
        }
        restored.into_iter().map(|(_, g)| g).collect()
    }

    /// A restored job goes on.
    pub(in crate::engine) fn resume(&self, g: Idx, turn: &mut Turn<'_>) {
        let Some(j) = self.get(g) else { return };
        turn.change(Change::Job(Box::new(j.record.clone())));
        if !j.in_kernel {
            turn.effect(Effect::LabelJob(Box::new(j.record.clone())));
        }
    }
}

// Reading.
impl Jobs {
    pub(in crate::engine) fn state_of(j: &Job, forest: &Forest) -> JobState {
        let root_lives = j.root.is_some_and(|i| forest.node(i).alive());
        match (j.done, j.killing, j.record.expired) {
            (Some(_), ..) => JobState::Done,
            (_, Some(_), _) => JobState::Killing,
            (.., true) => JobState::Expired,
            _ if root_lives => JobState::Running,
            _ => JobState::Lingering,
        }
    }

    /// Orphans among the members; the root is not one of its own job's, whatever started it.
    pub(in crate::engine) fn orphans_in(&self, g: Idx, own: bool, forest: &Forest) -> usize {
        let (Some(x), Some(j)) = (forest.groups.get(g), self.get(g)) else { return 0 };
        let root = j.root.filter(|&i| forest.node(i).orphan());
        let n = if own { x.own.orphans } else { x.all.orphans } as usize;
        n - usize::from(root.is_some_and(|i| !own || forest.node(i).group == g)).min(n)
    }

    /// It and the jobs inside it.
    pub(in crate::engine) fn with_inner(&self, g: Idx, forest: &Forest) -> Vec<Idx> {
        self.iter().map(|(i, _)| i).filter(|&i| forest.groups.chain(i).any(|x| x == g)).collect()
    }

    /// Its members and those of its inner jobs, the root included.
    pub(in crate::engine) fn members_of(&self, id: JobId, forest: &Forest) -> Vec<Idx> {
        let Some(g) = self.by_id(id) else { return Vec::new() };
        let mut all: Vec<Idx> =
            self.with_inner(g, forest).into_iter().flat_map(|g| forest.members(g)).collect();
        all.extend(self.get(g).and_then(|j| j.root));
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Every job that has not ended, as it must be saved.
    pub(in crate::engine) fn records(&self, forest: &Forest) -> Vec<JobRecord> {
        let mut all: Vec<JobRecord> = Vec::new();
        for (g, j) in self.iter().filter(|(_, j)| j.done.is_none()) {
            let members = forest.members(g).map(|i| forest.node(i)).filter(|n| n.alive());
            all.push(JobRecord { members: members.map(|n| n.key).collect(), ..j.record.clone() });
        }
        all.sort_unstable_by_key(|r| r.number);
        all
    }
}
