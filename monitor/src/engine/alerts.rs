//! The life of an alert: pending, firing, resolved. What makes one stands in `zombies`, `orphans` and `deadlines`; here is
//! what all have in common: identity, labels that freeze when it first fires, a floor between updates, and damping: one that
//! keeps coming back is resolved only when its reason has stayed away for a while.

use std::collections::{BTreeMap, HashMap};

use sha2::{Digest as _, Sha256};

use super::timers::Timer;
use super::{AlertChange, Effect, Engine, SECOND};
use crate::engine::forest::{Idx, NO_UID};
use crate::model::key::Key;
use crate::model::schema::{Alert, AlertKind, AlertState, Cause, Severity};

/// Updates of one firing alert come no closer than this.
const UPDATE_FLOOR: u64 = 10 * SECOND;
/// Fired this often ..
const FLAPS: u32 = 3;
/// .. each time within this of the last: it flaps.
const FLAP_WINDOW: u64 = 600 * SECOND;
/// How long the reason of a flapping alert must stay away.
const CALM: u64 = 60 * SECOND;
/// Most resolved alerts whose firings are remembered for damping.
const PAST_MAX: usize = 4_096;

/// What an alert is about: with the kind, its identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum About {
    Process(Key),
    /// The job's number.
    Job(u64),
    Host,
}

pub(super) type Name = (AlertKind, About);

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) alert: Alert,
    /// The oldest zombie or orphan.
    pub(super) oldest: Option<Key>,
    serial: u64,
    sent_at: u64,
    /// What the receivers were last told.
    sent: (usize, Option<Cause>, Severity),
    fired: u32,
    /// Its reason has gone at this time; it waits out its calm.
    calm_since: Option<u64>,
    end: String,
    timer: bool,
}

/// What is known of an alert when it is raised, or raised again.
pub(super) struct Raise {
    pub(super) firing: bool,
    pub(super) severity: Option<Severity>,
    pub(super) job: Option<Idx>,
    /// Whom the alert is about in the contract's sense.
    pub(super) subject: Option<Idx>,
    /// The process whose container and user are in the labels.
    pub(super) whose: Option<Idx>,
    pub(super) oldest: Option<Key>,
    pub(super) count: usize,
    pub(super) since: u64,
    pub(super) summary: String,
}

#[derive(Debug, Default)]
pub(super) struct Alerts {
    table: HashMap<Name, Entry>,
    by_id: HashMap<String, Name>,
    by_serial: HashMap<u64, Name>,
    serial: u64,
    /// Damping: how often each fired and when last.
    past: HashMap<Name, (u32, u64)>,
    pub(super) fired: BTreeMap<AlertKind, u64>,
    pub(super) refused: u64,
    /// From before a restart, until `ready`.
    pub(super) restored: HashMap<String, Alert>,
}

impl Alerts {
    pub(super) fn get(&self, name: Name) -> Option<&Entry> {
        self.table.get(&name)
    }
    pub(super) fn firing(&self, name: Name) -> bool {
        self.get(name).is_some_and(|e| e.alert.state == AlertState::Firing)
    }
    pub(super) fn by_id(&self, id: &str) -> Option<&Entry> {
        self.table.get(self.by_id.get(id)?)
    }
    pub(super) fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.table.values()
    }
    pub(super) fn len(&self) -> usize {
        self.table.len()
    }
    fn remove(&mut self, name: Name) -> Option<Entry> {
        let e = self.table.remove(&name)?;
        self.by_id.remove(&e.alert.id);
        self.by_serial.remove(&e.serial);
        Some(e)
    }
}

impl Engine {
    /// First 16 hex digits of SHA-256 over machine id, boot id, kind, rule and subject ID, each ended by a NUL.
    pub(super) fn alert_id(&self, kind: AlertKind, rule: &str, subject: &str) -> String {
        let mut h = Sha256::new();
        for part in [&self.settings.machine_id, &self.settings.boot_id, kind.as_str(), rule, subject] {
            h.update(part.as_bytes());
            h.update([0]);
        }
        h.finalize()[..8].iter().fold(String::new(), |id, b| id + &format!("{b:02x}"))
    }

    /// The reason holds (again). Pending alerts may become firing, firing ones stay so.
    pub(super) fn raise(&mut self, name: Name, r: &Raise, now: u64, fx: &mut Vec<Effect>) {
        if !self.alerts.table.contains_key(&name) && !self.enter(name, r, now, fx) {
            return;
        }
        let subject = r.subject.and_then(|i| self.describe(i, now));
        let Some(e) = self.alerts.table.get_mut(&name) else { return };
        e.calm_since = None;
        e.oldest = r.oldest;
        e.alert.count = r.count;
        e.alert.summary.clone_from(&r.summary);
        if subject.is_some() || name.0 == AlertKind::Orphan {
            e.alert.subject = subject;
        }
        if let Some(s) = r.severity {
            e.alert.severity = s;
        }
        match e.alert.state {
            AlertState::Firing => self.update(name, now, fx),
            _ if r.firing => {
                let labels = self.labels(&self.alerts.table[&name].alert, r);
                let Some(e) = self.alerts.table.get_mut(&name) else { return };
                e.alert.state = AlertState::Firing;
                e.alert.labels = labels;
                e.sent_at = now;
                e.sent = (e.alert.count, None, e.alert.severity);
                let past = self.alerts.past.get(&name).filter(|p| now.saturating_sub(p.1) < FLAP_WINDOW);
                e.fired = past.map_or(0, |p| p.0).saturating_add(1);
                *self.alerts.fired.entry(name.0).or_default() += 1;
                fx.push(Effect::Alert { change: AlertChange::Fired, alert: Box::new(e.alert.clone()) });
            }
            _ => {}
        }
    }

    /// A new entry, pending; or, if it was firing before a restart, firing as it was.
    fn enter(&mut self, name: Name, r: &Raise, now: u64, fx: &mut Vec<Effect>) -> bool {
        // The few about the host always have a place.
        if name.1 != About::Host && self.alerts.table.len() >= self.settings.limits.alerts {
            self.alerts.refused += 1;
            self.check_capacity(now, fx);
            return false;
        }
        let job = r.job.and_then(|g| self.jobs.get(g)).map(|j| &j.record);
        let rule = job.map_or("", |j| j.rule.as_deref().unwrap_or(&j.name));
        let subject = match name.1 {
            About::Process(k) => k.to_string(),
            About::Job(_) => job.map(|j| j.id.to_string()).unwrap_or_default(),
            About::Host => String::new(),
        };
        let id = self.alert_id(name.0, rule, &subject);
        let restored = self.alerts.restored.remove(&id);
        let (job_id, job_name) = (job.map(|j| j.id), job.map(|j| j.name.clone()).unwrap_or_default());
        let again = restored.is_some();
        let alert = restored.unwrap_or_else(|| Alert {
            id: id.clone(),
            kind: name.0,
            state: AlertState::Pending,
            severity: r.severity.unwrap_or(name.0.default_severity()),
            job: job_id,
            job_name,
            subject: None,
            count: r.count,
            since: self.wall(r.since),
            resolved_at: None,
            summary: String::new(),
            labels: BTreeMap::new(),
            cause: None,
        });
        self.alerts.serial += 1;
        let serial = self.alerts.serial;
        let sent = (alert.count, alert.cause.clone(), alert.severity);
        let e = Entry {
            sent_at: now,
            sent,
            oldest: r.oldest,
            serial,
            fired: u32::from(again),
            calm_since: None,
            end: String::new(),
            timer: false,
            alert,
        };
        if !again && !r.firing {
            let mut shown = e.alert.clone();
            shown.summary.clone_from(&r.summary);
            fx.push(Effect::Alert { change: AlertChange::Pending, alert: Box::new(shown) });
        }
        self.alerts.table.insert(name, e);
        self.alerts.by_id.insert(id, name);
        self.alerts.by_serial.insert(serial, name);
        true
    }

    /// Tells the receivers if something changed materially, but not too often.
    fn update(&mut self, name: Name, now: u64, fx: &mut Vec<Effect>) {
        let Some(e) = self.alerts.table.get_mut(&name) else { return };
        let (count, cause, severity) = &e.sent;
        let (few, many) = (e.alert.count.min(*count), e.alert.count.max(*count));
        // A count matters when it has doubled or halved; a cause when its verdict is another, or what is to be done.
        let counts = many > few && many / 2 >= few;
        let same = match (cause, &e.alert.cause) {
            (Some(was), Some(is)) => was.verdict == is.verdict && was.remedy == is.remedy,
            (was, is) => was.is_some() == is.is_some(),
        };
        if !counts && same && *severity == e.alert.severity {
            return;
        }
        let first_cause = cause.is_none() && e.alert.cause.is_some();
        let at = if first_cause { now } else { e.sent_at.saturating_add(UPDATE_FLOOR) };
        if at > now {
            if !std::mem::replace(&mut e.timer, true) {
                self.timers.set(at, Timer::Alert(e.serial));
            }
            return;
        }
        e.sent_at = now;
        e.sent = (e.alert.count, e.alert.cause.clone(), e.alert.severity);
        fx.push(Effect::Alert { change: AlertChange::Updated, alert: Box::new(e.alert.clone()) });
    }

    /// The reason has gone. `end`: the last summary, in plain words.
    pub(super) fn clear(&mut self, name: Name, end: String, now: u64, fx: &mut Vec<Effect>) {
        let Some(e) = self.alerts.table.get_mut(&name) else { return };
        if e.alert.state == AlertState::Firing && e.fired >= FLAPS {
            e.end = end;
            if e.calm_since.is_none() {
                e.calm_since = Some(now);
                self.timers.set(now.saturating_add(CALM), Timer::Alert(e.serial));
            }
            return;
        }
        self.resolve_alert(name, end, now, fx);
    }

    fn resolve_alert(&mut self, name: Name, end: String, now: u64, fx: &mut Vec<Effect>) {
        let Some(mut e) = self.alerts.remove(name) else { return };
        let change = if e.alert.state == AlertState::Firing {
            if self.alerts.past.len() >= PAST_MAX {
                self.alerts.past.retain(|_, p| now.saturating_sub(p.1) < FLAP_WINDOW);
            }
            if self.alerts.past.len() < PAST_MAX {
                self.alerts.past.insert(name, (e.fired, now));
            }
            AlertChange::Resolved
        } else {
            AlertChange::Dropped
        };
        self.finish(&mut e.alert, end, now);
        fx.push(Effect::Alert { change, alert: Box::new(e.alert) });
    }

    fn finish(&self, a: &mut Alert, end: String, now: u64) {
        a.state = AlertState::Resolved;
        a.resolved_at = Some(self.wall(now));
        a.summary = end;
        a.count = 0;
        if a.kind == AlertKind::Orphan {
            a.subject = None;
        }
    }

    pub(super) fn alert_timer(&mut self, serial: u64, now: u64, fx: &mut Vec<Effect>) {
        let Some(name) = self.alerts.by_serial.get(&serial).copied() else { return };
        let Some(e) = self.alerts.table.get_mut(&name) else { return };
        e.timer = false;
        match e.calm_since {
            Some(since) if since.saturating_add(CALM) <= now => {
                let end = std::mem::take(&mut e.end);
                self.resolve_alert(name, end, now, fx);
            }
            Some(_) => {}
            None => self.update(name, now, fx),
        }
    }

    pub(super) fn cause(&mut self, id: &str, cause: Cause, now: u64, fx: &mut Vec<Effect>) {
        let Some(name) = self.alerts.by_id.get(id).copied() else { return };
        if let Some(e) = self.alerts.table.get_mut(&name) {
            e.alert.cause = Some(cause);
            if e.alert.state == AlertState::Firing {
                self.update(name, now, fx);
            }
        }
    }

    fn labels(&self, a: &Alert, r: &Raise) -> BTreeMap<String, String> {
        let mut l = self.static_labels.clone();
        let mut put = |k: &str, v: String| l.insert(k.to_owned(), v);
        put("alertname", a.kind.alertname().to_owned());
        put("alert_id", a.id.clone());
        put("instance", self.settings.host.clone());
        put("kind", a.kind.as_str().to_owned());
        put("severity", a.severity.as_str().to_owned());
        put("job_name", a.job_name.clone());
        let uid = r.whose.map(|i| self.forest.node(i).uid).filter(|&u| u != NO_UID);
        let user = uid.map(|u| self.settings.users.get(&u).cloned().unwrap_or_else(|| u.to_string()));
        put("user", user.unwrap_or_default());
        if let Some(c) = r.whose.and_then(|i| self.container_of(i)) {
            put("container", c.id);
            if let Some(pod) = c.pod {
                put("pod", pod);
            }
        }
        l
    }

    /// Those from before a restart, now that it is known what still holds.
    pub(super) fn settle_alerts(&mut self, now: u64, fx: &mut Vec<Effect>) {
        let mut restored: Vec<Alert> = self.alerts.restored.values().cloned().collect();
        restored.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        for a in restored {
            match a.kind {
                AlertKind::Zombie => self.zombie_restored(a.subject.as_ref().map(|p| p.id), now, fx),
                AlertKind::KillFailed if a.job.is_none() => {
                    if let Some(root) = a.subject.as_ref().map(|p| p.id) {
                        self.process_alert_restored(root, now, fx);
                    }
                }
                AlertKind::Orphan | AlertKind::JobTimeout | AlertKind::KillFailed => {
                    self.job_alert_restored(a.kind, a.job, now, fx);
                }
                AlertKind::EventsLost => self.loss_restored(&a, now, fx),
                AlertKind::EnforcementStopped => self.fuse_alert(now, fx),
                AlertKind::StorageFailed | AlertKind::Capacity => {
                    let r = Raise { summary: a.summary.clone(), ..Raise::host(now) };
                    self.raise((a.kind, About::Host), &r, now, fx);
                    if a.kind == AlertKind::Capacity {
                        self.watch_room(now);
                    }
                }
            }
        }
        // What was not taken over above ended while nobody watched.
        let mut over: Vec<Alert> = std::mem::take(&mut self.alerts.restored).into_values().collect();
        over.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        for mut alert in over {
            self.finish(&mut alert, "It ended while jobwarden was down.".into(), now);
            fx.push(Effect::Alert { change: AlertChange::Resolved, alert: Box::new(alert) });
        }
    }

    pub(super) fn restore_alert_list(
        &mut self,
        list: Vec<Alert>,
        here: bool,
        now: u64,
        fx: &mut Vec<Effect>,
    ) {
        for mut a in list {
            if here {
                self.alerts.restored.insert(a.id.clone(), a);
            } else {
                self.finish(&mut a, "The host was booted anew: nothing of then is left.".into(), now);
                fx.push(Effect::Alert { change: AlertChange::Resolved, alert: Box::new(a) });
            }
        }
    }

    pub(super) fn view_alerts(&self, all: bool) -> Vec<Alert> {
        let shown = |e: &&Entry| all || e.alert.state == AlertState::Firing;
        let mut v: Vec<Alert> = self.alerts.iter().filter(shown).map(|e| e.alert.clone()).collect();
        v.extend(self.alerts.restored.values().cloned());
        v.sort_unstable_by(|a, b| (&a.since, &a.id).cmp(&(&b.since, &b.id)));
        v
    }
}

impl Raise {
    /// A firing alert about the host.
    pub(super) fn host(now: u64) -> Self {
        Self {
            firing: true,
            severity: None,
            job: None,
            subject: None,
            whose: None,
            oldest: None,
            count: 1,
            since: now,
            summary: String::new(),
        }
    }
}
