//! What the engine answers without being changed.

use std::collections::{BTreeMap, HashSet};

use super::event_context::EventContext;
use super::forest::{Flags, Idx, NONE, Node};
use super::output::Refused;
use super::query::{Gauges, Target, TreeQuery};
use super::record::{EnforcementState, JobRecord};
use super::{Engine, alerts, jobs};
use crate::model::event::{Event, WaitStatus};
use crate::model::key::Key;
use crate::model::question::Question;
use crate::model::schema::{
    Alert, AlertKind, AlertState, EventLine, Job, JobId, JobState, Process, Ref, State, Tree,
};
use crate::model::stats::{self, JobNumbers, StoreNumbers};

const STATES: [JobState; 5] =
    [JobState::Running, JobState::Lingering, JobState::Expired, JobState::Killing, JobState::Done];
/// Most processes that a question names: a job of ten thousand is not listed in full.
const FAMILY_MAX: usize = 4_096;

impl Engine {
    pub fn tree(&self, q: &TreeQuery, now: u64) -> Result<Tree, Refused> {
        let mut shown: Vec<Idx> = match &q.of {
            None => self.forest.iter().map(|(i, _)| i).collect(),
            Some(of) => self.family(of)?,
        };
        let wanted = |n: &Node| {
            (q.all || !n.flags.has(Flags::KERNEL))
                && (!q.zombies || n.state == State::Zombie)
                && (!q.orphans || n.orphan())
                && q.uid.is_none_or(|u| n.uid == u)
        };
        if !shown.iter().all(|&i| wanted(self.forest.node(i))) {
            self.keep_ways(&mut shown, wanted);
        }
        shown.sort_unstable_by_key(|&i| self.forest.node(i).key.start);
        Ok(Tree {
            at: self.view().wall(now),
            host: self.settings.host.clone(),
            processes: shown.into_iter().filter_map(|i| self.view().describe(i, now)).collect(),
            unread: Vec::new(),
        })
    }

    /// Newest last; the done ones that are still remembered too.
    #[must_use]
    pub fn jobs(&self) -> Vec<Job> {
        let mut all: Vec<(Idx, &jobs::Job)> = self.jobs.iter().collect();
        all.sort_unstable_by_key(|(_, j)| j.record.number);
        all.into_iter().filter_map(|(g, j)| self.job(g, j)).collect()
    }

    #[must_use]
    pub fn job_record(&self, id: JobId) -> Option<JobRecord> {
        Some(self.jobs.get(self.jobs.by_id(id)?)?.record.clone())
    }

    /// Every job that has not ended, as it must be saved.
    #[must_use]
    pub fn job_records(&self) -> Vec<JobRecord> {
        self.jobs.records(&self.forest)
    }

    /// Members of the job and of its inner jobs, zombies too.
    #[must_use]
    pub fn members(&self, id: JobId) -> Vec<Key> {
        let in_it = |&i: &Idx| self.jobs.by_id(id).is_some_and(|g| self.forest.in_group(i, g));
        let all = self.jobs.members_of(id, &self.forest);
        all.into_iter().filter(in_it).map(|i| self.forest.node(i).key).collect()
    }

    /// Firing ones; with `all` the pending too.
    #[must_use]
    pub fn alerts(&self, all: bool) -> Vec<Alert> {
        self.alerts.list(all)
    }

    #[must_use]
    pub fn process(&self, key: Key, now: u64) -> Option<Process> {
        self.view().describe(self.forest.find(key)?, now)
    }

    #[must_use]
    pub fn reference(&self, key: Key) -> Option<Ref> {
        self.forest.find(key).map(|i| self.view().ref_of(i))
    }

    /// The process that has this pid now, or had it last and is still known.
    #[must_use]
    pub fn current(&self, pid: u32) -> Option<Key> {
        self.forest.current(pid).map(|i| self.forest.node(i).key)
    }

    /// What `why::explain` needs. The question of an alert is that of its oldest zombie or orphan.
    #[must_use]
    pub fn question(&self, key: Key, now: u64) -> Option<Question> {
        let i = self.forest.find(key)?;
        let n = self.forest.node(i);
        let mut family: Vec<Idx> = self.forest.ancestors(i).collect();
        if n.parent != NONE {
            family.push(n.parent);
            family.extend(self.forest.ancestors(n.parent));
        }
        let near = family.len();
        family.extend(self.forest.children(i));
        family.extend(self.forest.reapable(i));
        // The siblings that the same parent would have to reap, and the members of all its jobs.
        if n.parent != NONE && self.forest.node(n.parent).key.pid != 1 {
            family.extend(self.forest.reapable(n.parent));
        }
        let outermost = self.forest.groups.chain(n.group).last();
        if let Some(g) = outermost {
            family.extend(
                self.jobs.with_inner(g, &self.forest).into_iter().flat_map(|g| self.forest.members(g)),
            );
        }
        let mut seen = std::collections::HashSet::from([i]);
        family.retain(|&x| seen.insert(x));
        family.truncate(FAMILY_MAX.max(near));
        let about: std::collections::HashSet<Key> =
            family.iter().chain([&i]).map(|&x| self.forest.node(x).key).collect();
        let signals = self.forest.signals.iter().filter(|s| about.contains(&s.target));
        let alert = self.alerts.iter().find(|e| {
            let subject = e.alert.subject.as_ref().map(|p| p.id);
            e.alert.state == AlertState::Firing && (subject == Some(key) || e.oldest == Some(key))
        });
        Some(Question {
            subject: self.view().describe(i, now)?,
            family: family.into_iter().filter_map(|x| self.view().describe(x, now)).collect(),
            signals: signals.map(|s| self.view().signal_seen(s)).collect(),
            lost: Some(self.losses.last).filter(|&at| at > 0),
            alert: alert.map(|e| e.alert.id.clone()),
        })
    }

    /// The process that an alert's cause is about: the oldest zombie or orphan.
    #[must_use]
    pub fn alert_subject(&self, alert: &str) -> Option<Key> {
        let e = self.alerts.by_id(alert)?;
        e.oldest.or_else(|| e.alert.subject.as_ref().map(|p| p.id))
    }

    /// The firing alerts that have a cause, each with the process that it is about.
    pub fn to_explain(&self) -> impl Iterator<Item = (&str, Key)> {
        let explained = |e: &&alerts::Entry| {
            let kind = matches!(e.alert.kind, AlertKind::Zombie | AlertKind::Orphan);
            kind && e.alert.state == AlertState::Firing
        };
        self.alerts.iter().filter(explained).filter_map(|e| {
            let subject = e.oldest.or_else(|| e.alert.subject.as_ref().map(|p| p.id))?;
            Some((e.alert.id.as_str(), subject))
        })
    }

    /// PID, ID, JOB or name:NAME; the several matches of a name oldest first. Empty never: that is `Refused`.
    pub fn resolve(&self, t: &str) -> Result<Vec<Target>, Refused> {
        if let Some(name) = t.strip_prefix("name:") {
            let mut jobs: Vec<(u64, JobId)> = self
                .jobs
                .iter()
                .filter(|(_, j)| j.record.name == name && j.done.is_none())
                .map(|(_, j)| (j.record.number, j.record.id))
                .collect();
            jobs.sort_unstable();
            let jobs: Vec<Target> = jobs.into_iter().map(|(_, id)| Target::Job(id)).collect();
            return if jobs.is_empty() { Err(Refused::NoJob(t.to_owned())) } else { Ok(jobs) };
        }
        if t.starts_with("j-") {
            let id: JobId = t.parse().map_err(|_| Refused::Target(t.to_owned()))?;
            let known = self.jobs.by_id(id).is_some();
            return if known { Ok(vec![Target::Job(id)]) } else { Err(Refused::NoJob(t.to_owned())) };
        }
        let known = if let Ok(pid) = t.parse::<u32>() {
            self.forest.current(pid)
        } else {
            self.forest.find(t.parse::<Key>().map_err(|_| Refused::Target(t.to_owned()))?)
        };
        let i = known.ok_or_else(|| Refused::NoProcess(t.to_owned()))?;
        Ok(vec![Target::Process(self.forest.node(i).key)])
    }

    #[must_use]
    pub fn gauges(&self, now: u64) -> Gauges {
        let mut processes = BTreeMap::new();
        for s in [State::Running, State::LeaderExited, State::Exiting, State::Zombie] {
            processes.insert(stats::state_label(s), self.forest.total(s));
        }
        let outside = JobNumbers {
            zombies: self.forest.outside.zombies.into(),
            orphans: self.forest.outside.orphans.into(),
            ..JobNumbers::default()
        };
        let mut jobs: BTreeMap<String, JobNumbers> = BTreeMap::from([(String::new(), outside)]);
        jobs.extend(self.names.iter().map(|(name, ended)| (name.clone(), ended.clone())));
        for (g, j) in self.jobs.iter() {
            let own = self.forest.groups.get(g).map(|x| x.own).unwrap_or_default();
            let n = jobs.entry(self.names.label(&j.record.name).to_owned()).or_default();
            n.zombies += u64::from(own.zombies);
            n.orphans += self.jobs.orphans_in(g, true, &self.forest) as u64;
            *n.states.entry(stats::job_state_label(jobs::Jobs::state_of(j, &self.forest))).or_default() += 1;
        }
        for n in jobs.values_mut() {
            for s in STATES {
                n.states.entry(stats::job_state_label(s)).or_default();
            }
        }
        let oldest = self.zombies.oldest_since().map_or(0, |since| now.saturating_sub(since));
        Gauges {
            processes,
            jobs,
            unreaping_parents: self.zombies.unreaping_parents(&self.forest),
            oldest_zombie_age_s: oldest as f64 / 1e9,
            reap_delay: self.reap_delay.clone(),
            stores: self.stores(),
            alerts: self.alert_counts(),
            alerts_fired: AlertKind::ALL
                .into_iter()
                .map(|k| (k, self.alerts.fired.get(&k).copied().unwrap_or(0)))
                .collect(),
            enforcement_enabled: self.enforcement.on(now),
            fuse_open: self.enforcement.state.fuse_open,
        }
    }

    /// For `events`: call before `event`, since a reaped process is forgotten with its record.
    #[must_use]
    pub fn event_context(&self, e: &Event<'_>) -> EventContext {
        self.view().context_of(e)
    }

    /// Not in the forest, or there only as a dead ancestor.
    #[must_use]
    pub fn is_gone(&self, key: Key) -> bool {
        self.forest.find(key).is_none_or(|i| self.forest.node(i).state == State::Gone)
    }

    /// As far as its exit told.
    #[must_use]
    pub fn wait_status(&self, key: Key) -> Option<WaitStatus> {
        self.forest.node(self.forest.find(key)?).wait_status()
    }

    /// One line of `events`. `job` is the innermost of its process.
    #[must_use]
    pub fn event_line(&self, e: &Event<'_>, m: &EventContext, job: Option<JobId>) -> EventLine {
        m.line(e, self.view().wall(e.at), job)
    }

    /// The jobs (innermost first) of the process that an event is about.
    #[must_use]
    pub fn jobs_of(&self, key: Key) -> Vec<JobId> {
        self.named_jobs(key).map(|j| j.0).collect()
    }

    /// The same, with their names.
    pub fn named_jobs(&self, key: Key) -> impl Iterator<Item = (JobId, &str)> + Clone {
        let i = self.forest.find(key);
        let chain = i.into_iter().flat_map(|i| self.forest.groups.chain(self.forest.node(i).group));
        chain.filter_map(|g| self.jobs.get(g)).map(|j| (j.record.id, j.record.name.as_str()))
    }

    #[must_use]
    pub fn enforcement_state(&self) -> EnforcementState {
        self.enforcement.state.clone()
    }

    /// Whether policy kills now: config, operator and fuse taken together.
    #[must_use]
    pub fn enforcing(&self, now: u64) -> bool {
        self.enforcement.on(now) && !self.enforcement.state.fuse_open
    }

    /// How many jobs policy has ended within the last minute: what the fuse counts.
    #[must_use]
    pub fn kills_last_minute(&self, now: u64) -> u32 {
        self.enforcement.kills_last_minute(now)
    }
}

impl Engine {
    fn job(&self, g: Idx, j: &jobs::Job) -> Option<Job> {
        let all = self.forest.groups.get(g)?.all;
        Some(Job {
            id: j.record.id,
            name: j.record.name.clone(),
            root: j.record.id.root,
            state: jobs::Jobs::state_of(j, &self.forest),
            started: self.view().wall(j.record.started),
            deadline: j.record.deadline.map(|d| self.view().wall(d)),
            processes: all.live as usize,
            zombies: all.zombies as usize,
            orphans: self.jobs.orphans_in(g, false, &self.forest),
        })
    }

    /// Of `shown`, who is wanted and the way to them.
    fn keep_ways(&self, shown: &mut Vec<Idx>, wanted: impl Fn(&Node) -> bool) {
        let whole = shown.iter().copied().collect::<HashSet<Idx>>();
        let mut keep: HashSet<Idx> = HashSet::new();
        for &i in shown.iter().filter(|&&i| wanted(self.forest.node(i))) {
            // As soon as one of the way is kept, so is the rest.
            let mut way = std::iter::once(i).chain(self.forest.ancestors(i));
            while let Some(a) = way.next().filter(|a| whole.contains(a))
                && keep.insert(a)
            {}
        }
        shown.retain(|i| keep.contains(i));
    }

    /// Its ancestors, it, its descendants.
    fn family(&self, of: &str) -> Result<Vec<Idx>, Refused> {
        let mut all = Vec::new();
        for t in self.resolve(of)? {
            let tops: Vec<Idx> = match t {
                Target::Process(k) => self.forest.find(k).into_iter().collect(),
                Target::Job(id) => self.jobs.members_of(id, &self.forest),
            };
            for i in tops {
                all.extend(self.forest.ancestors(i));
                match t {
                    Target::Process(_) => all.extend(self.forest.descend(i)),
                    Target::Job(_) => all.push(i),
                }
            }
        }
        all.sort_unstable();
        all.dedup();
        Ok(all)
    }

    fn alert_counts(&self) -> BTreeMap<(AlertKind, &'static str), u64> {
        let mut all = BTreeMap::new();
        for k in AlertKind::ALL {
            for s in [AlertState::Pending, AlertState::Firing] {
                all.insert((k, stats::alert_state_label(s)), 0);
            }
        }
        for e in self.alerts.iter() {
            *all.entry((e.alert.kind, stats::alert_state_label(e.alert.state))).or_default() += 1;
        }
        all
    }

    fn stores(&self) -> Vec<StoreNumbers> {
        let l = &self.settings.limits;
        let one = |store, entries: usize, max: usize, evictions| StoreNumbers {
            store,
            entries: entries as u64,
            max: max as u64,
            evictions,
        };
        let f = &self.forest;
        vec![
            one("processes", f.len(), f.max(), f.refused),
            // A dead ancestor costs nothing of its own beyond `processes`; what is folded into "n more" counts here.
            one("ancestors", f.total(State::Gone) as usize, f.max(), f.folded),
            one("strings", f.strings.len(), f.max().saturating_mul(3), 0),
            one("jobs", self.jobs.len(), l.jobs, self.jobs.refused),
            one("alerts", self.alerts.len(), l.alerts, self.alerts.refused),
            one("signals", f.signals.len(), f.signals.max(), f.signals.evicted),
            one("tombstones", f.tombstones(), f.max_tombstones(), 0),
            // Each process has at most one, each job, alert and parent of zombies a few.
            one(
                "timers",
                self.timers.len(),
                f.max().saturating_add(l.jobs).saturating_add(l.alerts).saturating_mul(2),
                0,
            ),
        ]
    }
}
