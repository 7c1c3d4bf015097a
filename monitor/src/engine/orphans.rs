//! Orphans inside jobs: one alert for each job whose members outlived their parents, and `on_orphan = "kill"`.

use std::collections::{HashMap, HashSet};

use super::alerts::{About, AlertStep, Name, Raise};
use super::facts;
use super::forest::{Flags, Forest, Idx, NONE, Seen};
use super::input::Settings;
use super::jobs::Jobs;
use super::output::Effect;
use super::summary;
use super::timers::Timer;
use super::turn::{MS, PENDING, Turn};
use super::view::View;
use crate::model::daemon::daemonized;
use crate::model::key::Key;
use crate::model::schema::AlertKind;

/// A member came or went: the job's orphans are looked through after this.
const SOON: u64 = 20 * MS;
/// More keys than this of one job are looked through for those that are gone.
const KEPT: usize = 1_024;

/// What is known of the orphans of one job.
#[derive(Debug)]
struct Plan {
    /// When they are looked through next; `u64::MAX`: not planned.
    at: u64,
    /// Roots of kills by `on_orphan` that were ordered already: what survived or was spared is not tried again.
    tried: HashSet<Key>,
    /// Sessions of orphans that were looked at.
    sessions: HashMap<Key, i32>,
}

/// The orphans of jobs, by the job's number.
#[derive(Debug, Default)]
pub(super) struct Orphans {
    plans: HashMap<u64, Plan>,
}

/// The orphans of a job, looked through.
pub(super) struct DueOrphans {
    pub(super) group: Idx,
    name: Name,
    oldest: Idx,
    since: u64,
    count: usize,
    /// Orphans for as long as `orphan_after`.
    due: Vec<Idx>,
    /// What `on_orphan = "kill"` asks for.
    pub(super) kill: OrphanKill,
}

/// Whether, and what, a rule would have ended of its orphans.
pub(super) enum OrphanKill {
    /// The rule does not ask for it, or none is due.
    No,
    /// Nothing to be ordered now, and why.
    Not(&'static str),
    /// These and what descends from them; `whole`: that is the whole job.
    Order { roots: Vec<Key>, whole: bool },
}

impl DueOrphans {
    /// The alert. `kill`: what is done about them, as a sentence.
    pub(super) fn alert(&self, kill: Option<&str>, view: View<'_>, now: u64) -> AlertStep {
        let raise = Raise {
            firing: !self.due.is_empty(),
            severity: view.jobs.get(self.group).and_then(|j| j.record.policy.severity),
            job: Some(self.group),
            subject: Some(self.oldest),
            whose: Some(self.oldest),
            oldest: Some(view.forest.node(self.oldest).key),
            count: self.count,
            since: self.since,
            summary: summary::orphans(view, self.group, self.oldest, self.count, kill, now),
        };
        AlertStep::raise(self.name, raise)
    }
}

/// What the orphans of a job that are due lead to.
pub(super) enum OrphanStep {
    None,
    /// There are none any more.
    Over(AlertStep),
    Due(DueOrphans),
}

fn orphan_after(g: Idx, jobs: &Jobs) -> Option<u64> {
    jobs.get(g).filter(|j| j.done.is_none())?.record.policy.orphan_after_ns
}

/// When it has been an orphan for as long as its job allows.
fn due_at(i: Idx, g: Idx, forest: &Forest, jobs: &Jobs) -> u64 {
    let after = jobs.get(g).and_then(|j| j.record.policy.orphan_after_ns).unwrap_or(0);
    forest.node(i).orphan_since.saturating_add(after)
}

/// Left its session and its parent on purpose.
fn is_daemon(i: Idx, session: i32, view: View<'_>, now: u64) -> bool {
    let Some(me) = view.describe(i, now) else { return false };
    let above: Vec<_> = view.forest.ancestors(i).filter_map(|a| view.describe(a, now)).collect();
    daemonized(&me, session as u32, &above.iter().collect::<Vec<_>>())
}

impl Orphans {
    /// `i` has become an orphan.
    pub(super) fn added(&mut self, i: Idx, forest: &Forest, jobs: &Jobs, turn: &mut Turn<'_>) {
        let g = forest.node(i).group;
        let Some(after) = orphan_after(g, jobs) else { return };
        let since = forest.node(i).orphan_since;
        self.plan(g, since.saturating_add(after.min(PENDING)).max(turn.now), jobs, turn);
    }

    /// The number of its orphans went down. `alerted`: there is an alert about them.
    pub(super) fn left(&mut self, g: Idx, alerted: bool, jobs: &Jobs, turn: &mut Turn<'_>) {
        if alerted {
            self.plan(g, turn.now.saturating_add(SOON), jobs, turn);
        }
    }

    /// A job that begins with orphans in it, or goes on after a restart.
    pub(super) fn watch(&mut self, g: Idx, forest: &Forest, jobs: &Jobs, turn: &mut Turn<'_>) {
        if jobs.orphans_in(g, true, forest) > 0 {
            self.plan(g, turn.now, jobs, turn);
        }
    }

    pub(super) fn plan(&mut self, g: Idx, at: u64, jobs: &Jobs, turn: &mut Turn<'_>) {
        let Some(number) = jobs.number(g) else { return };
        let plan = self.entry(number);
        if at < plan.at {
            plan.at = at;
            turn.set(at, Timer::Orphans(number));
        }
    }

    fn entry(&mut self, number: u64) -> &mut Plan {
        let new = || Plan { at: u64::MAX, tried: HashSet::new(), sessions: HashMap::new() };
        self.plans.entry(number).or_insert_with(new)
    }

    /// The job is forgotten.
    pub(super) fn forget(&mut self, number: u64) {
        self.plans.remove(&number);
    }

    /// An alert about the orphans of this job fired before a restart.
    pub(super) fn restored(&mut self, number: u64, now: u64) {
        self.entry(number).at = now;
    }

    pub(super) fn due(
        &mut self,
        number: u64,
        forest: &mut Forest,
        (settings, jobs): (&Settings, &Jobs),
        turn: &mut Turn<'_>,
    ) -> OrphanStep {
        let Some(group) = jobs.by_number(number) else { return OrphanStep::None };
        match self.plans.get_mut(&number) {
            Some(p) if p.at <= turn.now => p.at = u64::MAX,
            _ => return OrphanStep::None,
        }
        let Some(after) = orphan_after(group, jobs) else { return OrphanStep::None };
        let name = (AlertKind::Orphan, About::Job(number));
        let root = jobs.get(group).and_then(|j| j.root);
        let mut orphans: Vec<(u64, Idx)> = forest
            .members(group)
            .filter(|&i| Some(i) != root && forest.node(i).orphan())
            .map(|i| (forest.node(i).orphan_since, i))
            .collect();
        orphans.sort_unstable();
        let Some(&(since, oldest)) = orphans.first() else {
            let text = summary::orphans_over(View { settings, forest, jobs }, group);
            return OrphanStep::Over(AlertStep::Clear(name, text));
        };
        // With the usual times this is at the pending alert, well before it fires and its labels are frozen.
        facts::ask_place(oldest, forest, turn);
        let is_due = |s: u64| s.saturating_add(after) <= turn.now;
        let due: Vec<Idx> = orphans.iter().filter(|&&(s, _)| is_due(s)).map(|&(_, i)| i).collect();
        if let Some(&(next, _)) = orphans.get(due.len()) {
            self.plan(group, next.saturating_add(after), jobs, turn);
        }
        let kill = if due.is_empty() {
            OrphanKill::No
        } else {
            self.kill(group, &due, View { settings, forest, jobs }, turn)
        };
        OrphanStep::Due(DueOrphans { group, name, oldest, since, count: orphans.len(), due, kill })
    }

    /// What is to be ended of those that have been orphans for long enough.
    fn kill(&mut self, g: Idx, due: &[Idx], view: View<'_>, turn: &mut Turn<'_>) -> OrphanKill {
        let Some(j) = view.jobs.get(g).filter(|j| j.record.policy.kill_on_orphan) else {
            return OrphanKill::No;
        };
        if j.killing.is_some() {
            return OrphanKill::Not("It is being ended.");
        }
        let plan = self.entry(j.record.number);
        let mut roots = Vec::new();
        let mut asked = false;
        for &i in due {
            let key = view.forest.node(i).key;
            if plan.tried.contains(&key) {
                continue;
            }
            match (j.record.policy.kill_daemons, plan.sessions.get(&key)) {
                (true, _) => roots.push(i),
                (false, Some(&session)) if !is_daemon(i, session, view, turn.now) => roots.push(i),
                (false, Some(_)) => {}
                (false, None) => {
                    asked = true;
                    turn.effect(Effect::Look(key));
                }
            }
        }
        // A root that descends from another one is ended with it.
        let is_top = |&i: &Idx| !view.forest.ancestors(i).any(|a| roots.contains(&a));
        let tops: Vec<Key> = roots.iter().copied().filter(is_top).map(|i| view.forest.node(i).key).collect();
        if tops.is_empty() {
            let why = if asked { "Its session is being looked at." } else { "It is daemonized: left alone." };
            return OrphanKill::Not(why);
        }
        let root_gone = j.root.is_none_or(|i| !view.forest.node(i).alive());
        let whole = root_gone && !asked && roots.len() == view.jobs.orphans_in(g, false, view.forest);
        OrphanKill::Order { roots: tops, whole }
    }

    /// The kill of these was ordered.
    pub(super) fn ordered(&mut self, number: u64, roots: &[Key], forest: &Forest) {
        let plan = self.entry(number);
        if plan.tried.len() + plan.sessions.len() > KEPT {
            plan.tried.retain(|k| forest.find(*k).is_some());
            plan.sessions.retain(|k, _| forest.find(*k).is_some());
        }
        plan.tried.extend(roots.iter().copied());
    }

    /// The session of an orphan that a rule may end.
    pub(super) fn session_seen(
        &mut self,
        key: Key,
        seen: Seen,
        forest: &Forest,
        jobs: &Jobs,
        turn: &mut Turn<'_>,
    ) {
        let Some(i) = forest.find(key) else { return };
        let g = forest.node(i).group;
        if g == NONE || !forest.node(i).flags.has(Flags::ORPHAN) {
            return;
        }
        let Seen::Present(look) = seen else { return };
        let Some(job) = jobs.get(g).filter(|j| j.record.policy.kill_on_orphan) else { return };
        if self.entry(job.record.number).sessions.insert(key, look.session).is_none() {
            self.plan(g, due_at(i, g, forest, jobs).max(turn.now), jobs, turn);
        }
    }
}
