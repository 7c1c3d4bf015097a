//! What is due: timers, deadlines, orphans, kills by policy.

use crate::engine::alerts::{About, AlertStep};
use crate::engine::deadlines::DeadlineKill;
use crate::engine::forest::Idx;
use crate::engine::orphans::{OrphanKill, OrphanStep};
use crate::engine::timers::Timer;
use crate::engine::turn::Turn;
use crate::engine::view::View;
use crate::engine::{Engine, Output, conditions, deadlines, kills, summary};
use crate::model::key::Key;
use crate::model::kill::{Reason, What};
use crate::model::schema::{AlertKind, JobId, KillReport};

impl Engine {
    pub(in crate::engine) fn run_timers(&mut self, out: &mut Output) {
        while let Some(t) = self.timers.due(self.now) {
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

    pub(in crate::engine) fn zombies_due(&mut self, parent: Key, out: &mut Output) {
        let firing = self.alerts.firing((AlertKind::Zombie, About::Process(parent)));
        let known = (&self.settings, &self.jobs);
        let step = self.zombies.due(parent, firing, &mut self.forest, known, turn!(self, out));
        self.alert(step, out);
    }

    pub(in crate::engine) fn orphans_due(&mut self, number: u64, out: &mut Output) {
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

    pub(in crate::engine) fn deadline_due(&mut self, number: u64, out: &mut Output) {
        let Some(passed) = deadlines::due(number, self.ready, &mut self.jobs, turn!(self, out)) else {
            return;
        };
        let kill = match passed.kill {
            DeadlineKill::No => None,
            DeadlineKill::Waits => {
                Some("It passed while jobwarden was down; the job has one more grace.".to_owned())
            }
            // As for a supervisor that died, neither the fuse nor the enforcement setting is asked: `exec` ordered this end.
            DeadlineKill::InPlaceOfSupervisor => {
                let (g, jobs) = (passed.group, &mut self.jobs);
                kills::order(g, Reason::Exec, What::Whole, None, jobs, turn!(self, out));
                Some("Its `exec` did not act on it in time: it is being ended.".to_owned())
            }
            DeadlineKill::BySupervisor => Some("It is being ended.".to_owned()),
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

    /// Whether policy may end this job now; the alert about the fuse fires if that opens it.
    pub(in crate::engine) fn permit(&mut self, g: Idx, out: &mut Output) -> Result<(), &'static str> {
        let known = (&self.forest, &self.jobs, &self.settings);
        let open = self.enforcement.state.fuse_open;
        let permitted = self.enforcement.permit(g, self.ready.is_some(), known, turn!(self, out));
        if self.enforcement.state.fuse_open && !open {
            self.fuse_alert(out);
        }
        permitted
    }

    pub(in crate::engine) fn fuse_alert(&mut self, out: &mut Output) {
        if self.enforcement.state.fuse_open {
            let text = summary::fuse(self.enforcement.max_per_minute);
            self.alert(conditions::problem(AlertKind::EnforcementStopped, text, self.now), out);
        }
    }

    pub(in crate::engine) fn set_enforcement(&mut self, on: bool, lasts: Option<u64>, out: &mut Output) {
        let until = lasts.map(|d| self.now.saturating_add(d));
        if self.enforcement.operator(on, until, turn!(self, out)) {
            let text = "Enforcement was switched on again: the fuse is closed.".to_owned();
            self.alert(AlertStep::Clear((AlertKind::EnforcementStopped, About::Host), text), out);
        }
        self.reconsider(out);
    }

    /// What was only reported may now be done.
    pub(in crate::engine) fn reconsider(&mut self, out: &mut Output) {
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
    pub(in crate::engine) fn supervisor_died(&mut self, key: Key, out: &mut Output) {
        for g in self.jobs.supervised_by(key) {
            let live = self.forest.groups.get(g).is_some_and(|x| x.all.live > 0);
            if live && self.jobs.get(g).is_some_and(|j| j.killing.is_none()) {
                kills::order(g, Reason::Exec, What::Whole, Some(0), &mut self.jobs, turn!(self, out));
            }
        }
    }

    pub(in crate::engine) fn kill_finished(
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
        // This kill was under way at the deadline, and was not about all of the job.
        if self.jobs.get(g).is_some_and(|j| !j.timed_kill) {
            self.set_deadline(g, out);
        }
        self.orphans.plan(g, self.now, &self.jobs, turn!(self, out));
    }
}
