//! Zombies: one alert for each parent that does not reap, however many there are. It fires only if /proc says Z with no
//! live thread at that moment, and as long as it waits or fires /proc is looked at, since the reap record may come late, or
//! never (`agent/reaps.rs` has how).

use std::collections::HashMap;

use super::alerts::{About, Raise};
use super::timers::Timer;
use super::{Effect, Engine, MS, PENDING, SECOND, summary};
use crate::engine::forest::{Fast, Flags, Idx, NONE, Seen};
use crate::model::key::Key;
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
pub(super) struct Watch {
    /// When it is looked through next.
    at: u64,
    round: usize,
    /// Where the last round ended.
    cursor: usize,
    /// The zombie that /proc is asked about before the alert fires.
    confirm: Option<Key>,
    shown: (usize, Option<Key>, u64),
    /// The oldest zombie that there was, and since when, for the words at the end.
    oldest: Option<(Key, String, u64)>,
    /// A look found one gone since the last round.
    found_gone: bool,
    /// Where they are (container, pid inside) has been asked for.
    placed: bool,
}

pub(super) type Watches = HashMap<Key, Watch, Fast>;

/// What a walk over a parent's zombies found.
struct Found {
    zombies: Vec<Idx>,
    oldest: Idx,
    /// The one that is due first, and when.
    next: (u64, Idx),
}

impl Engine {
    /// `i` has become a zombie, or a zombie got another parent.
    pub(super) fn zombie(&mut self, i: Idx, now: u64) {
        let n = self.forest.node(i);
        if n.parent == NONE {
            return;
        }
        let parent = self.forest.node(n.parent).key;
        self.plan(parent, self.waits_since(i).saturating_add(PENDING.min(self.zombie_after(i))).max(now));
    }

    fn plan(&mut self, parent: Key, at: u64) {
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
            self.timers.set(at, Timer::Zombies(parent));
        }
    }

    /// `zombie_after` of a new job may be shorter than what its zombies wait for.
    pub(super) fn zombies_of_group(&mut self, g: Idx, now: u64) {
        if self.forest.groups.get(g).is_some_and(|x| x.all.zombies > 0) {
            let all: Vec<Idx> = self.with_inner(g).into_iter().flat_map(|x| self.forest.members(x)).collect();
            for i in all {
                if self.forest.node(i).state == State::Zombie {
                    self.zombie(i, now);
                }
            }
        }
    }

    /// A zombie has gone from under `parent`: reaped, or it has another parent.
    pub(super) fn zombie_left(&mut self, parent: Idx, now: u64) {
        let Some(n) = self.forest.get(parent) else { return };
        let key = n.key;
        if let Some(w) = self.watches.get_mut(&key) {
            w.found_gone = true;
            self.plan(key, now.saturating_add(SOON));
        }
    }

    /// The innermost job that says so decides, else `[zombies].after`.
    pub(super) fn zombie_after(&self, i: Idx) -> u64 {
        let mut jobs = self.forest.groups.chain(self.forest.node(i).group);
        jobs.find_map(|g| self.jobs.get(g)?.record.policy.zombie_after_ns).unwrap_or(self.zombies_after)
    }

    /// Since its exit; for one whose parent died later: since it has the new parent, which deserves its own time.
    fn waits_since(&self, i: Idx) -> u64 {
        let n = self.forest.node(i);
        if n.flags.has(Flags::ORPHAN) { n.since.max(n.orphan_since) } else { n.since }
    }

    fn look_through(&self, parent: Idx) -> Option<Found> {
        let zombies: Vec<Idx> =
            self.forest.reapable(parent).filter(|&i| self.forest.node(i).state == State::Zombie).collect();
        let oldest = *zombies.iter().min_by_key(|&&i| self.forest.node(i).since)?;
        let due = |&i: &Idx| (self.waits_since(i).saturating_add(self.zombie_after(i)), i);
        let next = zombies.iter().map(due).min()?;
        Some(Found { zombies, oldest, next })
    }

    pub(super) fn zombies_due(&mut self, parent: Key, now: u64, fx: &mut Vec<Effect>) {
        match self.watches.get_mut(&parent) {
            Some(w) if w.at <= now => w.at = u64::MAX,
            _ => return,
        }
        let name = (AlertKind::Zombie, About::Process(parent));
        let node = self.forest.find(parent);
        let found = node.filter(|&i| self.forest.node(i).alive()).and_then(|i| self.look_through(i));
        let (Some(node), Some(f)) = (node, found) else {
            return self.no_zombies(parent, now, fx);
        };
        let firing = self.alerts.firing(name);
        if !self.placed(parent, node, f.oldest, fx) && f.next.0 <= now && !firing {
            return self.plan(parent, now.saturating_add(PLACE_WAIT));
        }
        if firing || f.next.0 > now {
            self.show_zombies(parent, node, &f, firing, now, fx);
        }
        if firing {
            self.look_round(parent, &f.zombies, now, fx);
            let crowd = self.watches.len() as u64 / CROWD;
            self.plan(parent, now.saturating_add(EVERY * (1 + crowd)));
        } else if f.next.0 <= now {
            // Only what /proc says at this moment makes it fire.
            let zombie = self.forest.node(f.next.1).key;
            if let Some(w) = self.watches.get_mut(&parent) {
                w.confirm = Some(zombie);
            }
            fx.push(Effect::Look(zombie));
            self.plan(parent, now.saturating_add(EVERY));
        } else {
            self.look_round(parent, &f.zombies, now, fx);
            self.plan(parent, f.next.0.min(now.saturating_add(SECOND)));
        }
    }

    /// Whether it is known, or has been asked for, where the parent and its oldest zombie are.
    fn placed(&mut self, parent: Key, node: Idx, oldest: Idx, fx: &mut Vec<Effect>) -> bool {
        let Some(w) = self.watches.get_mut(&parent) else { return true };
        if std::mem::replace(&mut w.placed, true) {
            return true;
        }
        let asked = [node, oldest].map(|i| self.ask_place(i, fx));
        !asked.contains(&true)
    }

    /// Looks at some of them; all come in turn.
    fn look_round(&mut self, parent: Key, zombies: &[Idx], now: u64, fx: &mut Vec<Effect>) {
        let Some(w) = self.watches.get_mut(&parent) else { return };
        w.round = if std::mem::take(&mut w.found_gone) { (w.round * 2).min(ROUND_MAX) } else { ROUND };
        let n = w.round.min(zombies.len());
        let from = w.cursor % zombies.len().max(1);
        w.cursor = from + n;
        let turn = zombies.iter().cycle().skip(from).take(n);
        for &i in turn {
            if self.alert_looks.take(now) {
                fx.push(Effect::Look(self.forest.node(i).key));
            }
        }
    }

    fn show_zombies(
        &mut self,
        parent: Key,
        node: Idx,
        f: &Found,
        firing: bool,
        now: u64,
        fx: &mut Vec<Effect>,
    ) {
        let oldest = self.forest.node(f.oldest);
        let (key, since, comm) = (oldest.key, oldest.since, oldest.comm);
        let shown = (f.zombies.len(), Some(key), now);
        let Some(w) = self.watches.get_mut(&parent) else { return };
        let same = w.shown.0 == shown.0 && w.shown.1 == shown.1 && now < w.shown.2.saturating_add(RENEW);
        w.oldest.get_or_insert_with(|| (key, crate::model::schema::text(comm.bytes()), since));
        if same && firing == self.alerts.firing((AlertKind::Zombie, About::Process(parent))) {
            return;
        }
        w.shown = shown;
        let g = self.forest.node(f.oldest).group;
        let job = self.jobs.get(g);
        let text = summary::zombies(self, node, f.oldest, f.zombies.len(), now);
        let raise = Raise {
            firing,
            severity: job.and_then(|j| j.record.policy.severity),
            job: (g != NONE).then_some(g),
            subject: Some(node),
            whose: Some(f.oldest),
            oldest: Some(key),
            count: f.zombies.len(),
            since,
            summary: text,
        };
        self.raise((AlertKind::Zombie, About::Process(parent)), &raise, now, fx);
    }

    fn no_zombies(&mut self, parent: Key, now: u64, fx: &mut Vec<Effect>) {
        let Some(w) = self.watches.remove(&parent) else { return };
        let text = summary::zombies_over(self, parent, w.oldest.as_ref(), now);
        self.clear((AlertKind::Zombie, About::Process(parent)), text, now, fx);
    }

    /// What /proc said of a zombie whose parent is about to be named in an alert.
    pub(super) fn confirmed(&mut self, key: Key, seen: Seen, now: u64, fx: &mut Vec<Effect>) {
        let Some(i) = self.forest.find(key) else { return };
        let n = self.forest.node(i);
        if n.state != State::Zombie || n.parent == NONE {
            return;
        }
        let Seen::Present(l) = seen else { return };
        let parent = n.parent;
        let pkey = self.forest.node(parent).key;
        let Some(w) = self.watches.get_mut(&pkey).filter(|w| w.confirm == Some(key)) else { return };
        w.confirm = None;
        if l.state != b'Z' || l.live_thread || !self.forest.node(parent).alive() {
            return;
        }
        if let Some(f) = self.look_through(parent).filter(|f| f.next.0 <= now) {
            self.show_zombies(pkey, parent, &f, true, now, fx);
        }
    }

    pub(super) fn zombie_restored(&mut self, parent: Option<Key>, now: u64, fx: &mut Vec<Effect>) {
        let Some(parent) = parent else { return };
        let Some(i) = self.forest.find(parent).filter(|&i| self.forest.node(i).alive()) else { return };
        let Some(f) = self.look_through(i) else { return };
        self.plan(parent, now);
        self.show_zombies(parent, i, &f, false, now, fx);
    }
}
