//! Zombies: one alert for each parent that does not reap, however many there are. It fires only if /proc says Z with no
//! live thread at that moment, and as long as it waits or fires /proc is looked at, since the reap record may come late, or
//! never (`agent/missed_reaps.rs` has how).

use std::collections::{BTreeSet, HashMap, HashSet};

use super::alerts::{About, AlertStep, Name, Raise};
use super::facts;
use super::forest::{Fast, Flags, Forest, Idx, NONE, Seen};
use super::input::Settings;
use super::jobs::Jobs;
use super::output::Effect;
use super::proc_poll::Budget;
use super::summary;
use super::timers::Timer;
use super::turn::{MS, PENDING, SECOND, Turn};
use super::view::View;
use crate::model::key::Key;
use crate::model::outside::OutsideText;
use crate::model::schema::{AlertKind, State};

/// While an alert fires its zombies are looked at this often (with thousands of alerts less often); before, each second.
const EVERY: u64 = 250 * MS;
/// A zombie went: its siblings are looked through after this.
const SOON: u64 = 20 * MS;
/// How many zombies of one parent are looked at in a round, as long as each is still there; doubled while they are not.
const ROUND: usize = 16;
const ROUND_MAX: usize = 4_096;
/// With this many parents of zombies the time between two looks doubles.
const CROWD: u64 = 512;
/// How long an alert that is due waits for its labels.
const PLACE_WAIT: u64 = 30 * MS;
/// What an alert shows is renewed at least this often.
const RENEW: u64 = 10 * SECOND;

/// A parent with zombies.
#[derive(Debug)]
struct Watch {
    /// When it is looked through next.
    at: u64,
    round: usize,
    /// Where the last round ended.
    cursor: usize,
    /// The zombie that /proc is asked about before the alert fires.
    confirm: Option<Key>,
    shown: (usize, Option<Key>, u64),
    /// The oldest zombie that there was, and since when, for the last summary.
    oldest: Option<(Key, OutsideText, u64)>,
    /// A look found one gone since the last round.
    found_gone: bool,
    /// Where they are (container, pid inside) has been asked for.
    placed: bool,
}

/// What a walk over a parent's zombies found.
struct Found {
    zombies: Vec<Idx>,
    oldest: Idx,
    /// The one that is due first, and when.
    next: (u64, Idx),
}

/// All zombies, and their parents under watch.
#[derive(Debug)]
pub(super) struct Zombies {
    /// `[zombies].after`, ns.
    pub(super) after: u64,
    by_age: BTreeSet<(u64, Idx)>,
    watches: HashMap<Key, Watch, Fast>,
    looks: Budget,
}

fn alert_of(parent: Key) -> Name {
    (AlertKind::Zombie, About::Process(parent))
}

/// Since its exit; for one whose parent died later: since it has the new parent, which deserves its own time.
fn waits_since(i: Idx, forest: &Forest) -> u64 {
    let n = forest.node(i);
    if n.flags.has(Flags::ORPHAN) { n.since.max(n.orphan_since) } else { n.since }
}

impl Zombies {
    pub(super) fn new(after: u64) -> Self {
        Self { after, by_age: BTreeSet::new(), watches: HashMap::default(), looks: Budget::alerts() }
    }

    /// A zombie since `since`.
    pub(super) fn insert(&mut self, since: u64, i: Idx) {
        self.by_age.insert((since, i));
    }

    pub(super) fn remove(&mut self, since: u64, i: Idx) {
        self.by_age.remove(&(since, i));
    }

    pub(super) fn all(&self) -> Vec<Idx> {
        self.by_age.iter().map(|&(_, i)| i).collect()
    }

    /// Since when the oldest is one.
    pub(super) fn oldest_since(&self) -> Option<u64> {
        self.by_age.first().map(|&(since, _)| since)
    }

    /// Counted anew: zombies are few, and each has its present parent.
    pub(super) fn unreaping_parents(&self, forest: &Forest) -> u64 {
        let parents = self.by_age.iter().map(|&(_, i)| forest.node(i).parent);
        parents.filter(|&p| p != NONE).collect::<HashSet<Idx>>().len() as u64
    }

    pub(super) fn watches(&self, parent: Key) -> bool {
        self.watches.contains_key(&parent)
    }

    /// `i` has become a zombie, or a zombie got another parent, or its time is another one.
    pub(super) fn plan_for(&mut self, i: Idx, forest: &Forest, jobs: &Jobs, turn: &mut Turn<'_>) {
        let n = forest.node(i);
        if n.parent == NONE {
            return;
        }
        let parent = forest.node(n.parent).key;
        let wait = PENDING.min(self.after(i, forest, jobs));
        self.plan(parent, waits_since(i, forest).saturating_add(wait).max(turn.now), turn);
    }

    fn plan(&mut self, parent: Key, at: u64, turn: &mut Turn<'_>) {
        let w = self.watches.entry(parent).or_insert_with(|| Watch {
            at: u64::MAX,
            round: ROUND,
            cursor: 0,
            confirm: None,
            shown: (0, None, 0),
            oldest: None,
            found_gone: false,
            placed: false,
        });
        if at < w.at {
            w.at = at;
            turn.set(at, Timer::Zombies(parent));
        }
    }

    /// `zombie_after` of a job may be shorter than what its zombies wait for.
    pub(super) fn replan_group(&mut self, g: Idx, forest: &Forest, jobs: &Jobs, turn: &mut Turn<'_>) {
        if forest.groups.get(g).is_none_or(|x| x.all.zombies == 0) {
            return;
        }
        for i in jobs.with_inner(g, forest).into_iter().flat_map(|x| forest.members(x)) {
            if forest.node(i).state == State::Zombie {
                self.plan_for(i, forest, jobs, turn);
            }
        }
    }

    /// A zombie has gone from under `parent`: reaped, or it has another parent.
    pub(super) fn left(&mut self, parent: Idx, forest: &Forest, turn: &mut Turn<'_>) {
        let Some(n) = forest.get(parent) else { return };
        let key = n.key;
        if let Some(w) = self.watches.get_mut(&key) {
            w.found_gone = true;
            self.plan(key, turn.now.saturating_add(SOON), turn);
        }
    }

    /// The innermost job that sets `zombie_after` decides, else `[zombies].after`.
    fn after(&self, i: Idx, forest: &Forest, jobs: &Jobs) -> u64 {
        let mut chain = forest.groups.chain(forest.node(i).group);
        chain.find_map(|g| jobs.get(g)?.record.policy.zombie_after_ns).unwrap_or(self.after)
    }

    fn look_through(&self, parent: Idx, forest: &Forest, jobs: &Jobs) -> Option<Found> {
        let is_zombie = |&i: &Idx| forest.node(i).state == State::Zombie;
        let zombies: Vec<Idx> = forest.reapable(parent).filter(is_zombie).collect();
        let oldest = *zombies.iter().min_by_key(|&&i| forest.node(i).since)?;
        let due = |&i: &Idx| (waits_since(i, forest).saturating_add(self.after(i, forest, jobs)), i);
        let next = zombies.iter().map(due).min()?;
        Some(Found { zombies, oldest, next })
    }

    /// The zombies of `parent` are to be looked through. `firing`: their alert fires.
    pub(super) fn due(
        &mut self,
        parent: Key,
        firing: bool,
        forest: &mut Forest,
        (settings, jobs): (&Settings, &Jobs),
        turn: &mut Turn<'_>,
    ) -> Option<AlertStep> {
        match self.watches.get_mut(&parent) {
            Some(w) if w.at <= turn.now => w.at = u64::MAX,
            _ => return None,
        }
        let node = forest.find(parent);
        let found = node
            .filter(|&i| forest.node(i).alive())
            .and_then(|i| Some((i, self.look_through(i, forest, jobs)?)));
        let Some((node, f)) = found else {
            return self.over(parent, View { settings, forest, jobs }, turn.now);
        };
        let is_due = f.next.0 <= turn.now;
        if !self.place(parent, node, f.oldest, forest, turn) && is_due && !firing {
            self.plan(parent, turn.now.saturating_add(PLACE_WAIT), turn);
            return None;
        }
        let view = View { settings, forest, jobs };
        let step = if firing || !is_due {
            self.show(parent, node, &f, (firing, firing), view, turn.now)
        } else {
            None
        };
        if firing {
            self.look_round(parent, &f.zombies, forest, turn);
            let crowd = self.watches.len() as u64 / CROWD;
            self.plan(parent, turn.now.saturating_add(EVERY * (1 + crowd)), turn);
        } else if is_due {
            // Only what /proc says at this moment makes it fire.
            let zombie = forest.node(f.next.1).key;
            if let Some(w) = self.watches.get_mut(&parent) {
                w.confirm = Some(zombie);
            }
            turn.effect(Effect::Look(zombie));
            self.plan(parent, turn.now.saturating_add(EVERY), turn);
        } else {
            self.look_round(parent, &f.zombies, forest, turn);
            self.plan(parent, f.next.0.min(turn.now.saturating_add(SECOND)), turn);
        }
        step
    }

    /// Whether it is known, or has been asked for, where the parent and its oldest zombie are.
    fn place(
        &mut self,
        parent: Key,
        node: Idx,
        oldest: Idx,
        forest: &mut Forest,
        turn: &mut Turn<'_>,
    ) -> bool {
        let Some(w) = self.watches.get_mut(&parent) else { return true };
        if std::mem::replace(&mut w.placed, true) {
            return true;
        }
        let asked = [node, oldest].map(|i| facts::ask_place(i, forest, turn));
        !asked.contains(&true)
    }

    /// Looks at some of them; all come in turn.
    fn look_round(&mut self, parent: Key, zombies: &[Idx], forest: &Forest, turn: &mut Turn<'_>) {
        let Some(w) = self.watches.get_mut(&parent) else { return };
        w.round = if std::mem::take(&mut w.found_gone) { (w.round * 2).min(ROUND_MAX) } else { ROUND };
        let n = w.round.min(zombies.len());
        let from = w.cursor % zombies.len().max(1);
        w.cursor = from + n;
        for &i in zombies.iter().cycle().skip(from).take(n) {
            if self.looks.take(turn.now) {
                turn.effect(Effect::Look(forest.node(i).key));
            }
        }
    }

    /// The alert as it is now, if that differs from what it shows. `firing`: it is to fire, and it does so already.
    fn show(
        &mut self,
        parent: Key,
        node: Idx,
        f: &Found,
        firing: (bool, bool),
        view: View<'_>,
        now: u64,
    ) -> Option<AlertStep> {
        let oldest = view.forest.node(f.oldest);
        let (key, since, comm, group) = (oldest.key, oldest.since, oldest.comm, oldest.group);
        let shown = (f.zombies.len(), Some(key), now);
        let w = self.watches.get_mut(&parent)?;
        let same = w.shown.0 == shown.0 && w.shown.1 == shown.1 && now < w.shown.2.saturating_add(RENEW);
        w.oldest.get_or_insert_with(|| (key, OutsideText::from_bytes(comm.bytes()), since));
        if same && firing.0 == firing.1 {
            return None;
        }
        w.shown = shown;
        let raise = Raise {
            firing: firing.0,
            severity: view.jobs.get(group).and_then(|j| j.record.policy.severity),
            job: (group != NONE).then_some(group),
            subject: Some(node),
            whose: Some(f.oldest),
            oldest: Some(key),
            count: f.zombies.len(),
            since,
            summary: summary::zombies(view, node, f.oldest, f.zombies.len(), now),
        };
        Some(AlertStep::raise(alert_of(parent), raise))
    }

    fn over(&mut self, parent: Key, view: View<'_>, now: u64) -> Option<AlertStep> {
        let w = self.watches.remove(&parent)?;
        let text = summary::zombies_over(view, parent, w.oldest.as_ref(), now);
        Some(AlertStep::Clear(alert_of(parent), text))
    }

    /// What /proc said of a zombie whose parent is about to be named in an alert; `firing`: of the alert of that parent.
    pub(super) fn confirmed(
        &mut self,
        key: Key,
        seen: Seen,
        firing: impl Fn(Name) -> bool,
        view: View<'_>,
        now: u64,
    ) -> Option<AlertStep> {
        let n = view.forest.node(view.forest.find(key)?);
        if n.state != State::Zombie || n.parent == NONE {
            return None;
        }
        let Seen::Present(l) = seen else { return None };
        let parent = n.parent;
        let parent_key = view.forest.node(parent).key;
        let w = self.watches.get_mut(&parent_key).filter(|w| w.confirm == Some(key))?;
        w.confirm = None;
        if l.state != b'Z' || l.live_thread || !view.forest.node(parent).alive() {
            return None;
        }
        let f = self.look_through(parent, view.forest, view.jobs).filter(|f| f.next.0 <= now)?;
        self.show(parent_key, parent, &f, (true, firing(alert_of(parent_key))), view, now)
    }

    /// An alert about this parent fired before a restart.
    pub(super) fn restored(
        &mut self,
        parent: Option<Key>,
        firing: impl Fn(Name) -> bool,
        view: View<'_>,
        turn: &mut Turn<'_>,
    ) -> Option<AlertStep> {
        let parent = parent?;
        let i = view.forest.find(parent).filter(|&i| view.forest.node(i).alive())?;
        let f = self.look_through(i, view.forest, view.jobs)?;
        self.plan(parent, turn.now, turn);
        self.show(parent, i, &f, (false, firing(alert_of(parent))), view, turn.now)
    }
}
