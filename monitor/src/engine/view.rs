//! What is asked of the engine: the tree, targets, gauges.

use std::collections::{BTreeMap, HashSet};

use super::{Engine, Gauges, Refused, Target, TreeQuery};
use crate::engine::forest::{Flags, Idx, NONE, Node};
use crate::model::key::Key;
use crate::model::schema::{AlertKind, AlertState, JobId, JobState, State, Tree};
use crate::model::stats::{self, JobNumbers, StoreNumbers};

const STATES: [JobState; 5] =
    [JobState::Running, JobState::Lingering, JobState::Expired, JobState::Killing, JobState::Done];

impl Engine {
    pub(super) fn view_tree(&self, q: &TreeQuery, now: u64) -> Result<Tree, Refused> {
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
            at: self.wall(now),
            host: self.settings.host.clone(),
            processes: shown.into_iter().filter_map(|i| self.describe(i, now)).collect(),
            unread: Vec::new(),
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
        for t in self.targets(of)? {
            let tops: Vec<Idx> = match t {
                Target::Process(k) => self.forest.find(k).into_iter().collect(),
                Target::Job(id) => self.members_of(id),
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

    pub(super) fn members_of(&self, id: JobId) -> Vec<Idx> {
        let Some(g) = self.jobs.by_id(id) else { return Vec::new() };
        let mut all: Vec<Idx> = self.with_inner(g).into_iter().flat_map(|g| self.forest.members(g)).collect();
        all.extend(self.jobs.get(g).and_then(|j| j.root));
        all.sort_unstable();
        all.dedup();
        all
    }

    pub(super) fn targets(&self, t: &str) -> Result<Vec<Target>, Refused> {
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

    pub(super) fn numbers(&self, now: u64) -> Gauges {
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
            n.orphans += self.orphans_in(g, true) as u64;
            *n.states.entry(stats::job_state_label(self.state_of(j))).or_default() += 1;
        }
        for n in jobs.values_mut() {
            for s in STATES {
                n.states.entry(stats::job_state_label(s)).or_default();
            }
        }
        let oldest = self.zombies.first().map_or(0, |&(since, _)| now.saturating_sub(since));
        Gauges {
            processes,
            jobs,
            unreaping_parents: self.unreaping_parents(),
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

    /// Counted anew: zombies are few, and each has its parent now, whoever that was before.
    fn unreaping_parents(&self) -> u64 {
        let parents = self.zombies.iter().map(|&(_, i)| self.forest.node(i).parent);
        parents.filter(|&p| p != NONE).collect::<HashSet<Idx>>().len() as u64
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
            one("strings", f.strings.len(), 3 * f.max(), 0),
            one("jobs", self.jobs.len(), l.jobs, self.jobs.refused),
            one("alerts", self.alerts.len(), l.alerts, self.alerts.refused),
            one("signals", f.signals.len(), f.signals.max(), f.signals.evicted),
            one("tombstones", f.tombstones(), f.max_tombstones(), 0),
            // Each process has at most one, each job, alert and parent of zombies a few.
            one("timers", self.timers.len(), 2 * (f.max() + l.jobs + l.alerts), 0),
        ]
    }
}
