//! The life of an alert: pending, firing, resolved. What makes one stands in `zombies`, `orphans` and `deadlines`; here is
//! what all have in common: identity, labels that freeze when it first fires, a floor between updates, and damping: one that
//! keeps coming back is resolved only when its reason has stayed away for a while.

use std::collections::{BTreeMap, HashMap};

use sha2::{Digest as _, Sha256};

use super::forest::{Idx, NO_UID};
use super::output::{AlertChange, Change};
use super::timers::Timer;
use super::turn::{SECOND, Turn};
use super::view::View;
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
    /// What was last sent to the receivers.
    sent: (usize, Option<Cause>, Severity),
    fired: u32,
    /// Its reason has gone at this time; it waits out its calm.
    calm_since: Option<u64>,
    end: String,
    timer: bool,
}

/// What is known of an alert when it is raised, or raised again.
#[derive(Debug)]
pub(super) struct Raise {
    pub(super) firing: bool,
    pub(super) severity: Option<Severity>,
    pub(super) job: Option<Idx>,
    /// `subject` of the contract.
    pub(super) subject: Option<Idx>,
    /// The process whose container and user are in the labels.
    pub(super) whose: Option<Idx>,
    pub(super) oldest: Option<Key>,
    pub(super) count: usize,
    pub(super) since: u64,
    pub(super) summary: String,
}

/// What a part of the engine wants of an alert.
#[derive(Debug)]
pub(super) enum AlertStep {
    /// Its reason holds.
    Raise(Name, Box<Raise>),
    /// Its reason has gone; the last summary.
    Clear(Name, String),
}

impl AlertStep {
    pub(super) fn raise(name: Name, raise: Raise) -> Self {
        Self::Raise(name, Box::new(raise))
    }
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
    /// From before a restart, until `Ready`.
    restored: HashMap<String, Alert>,
    pub(super) static_labels: BTreeMap<String, String>,
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

/// First 16 hex digits of SHA-256 over machine id, boot id, kind, rule and subject ID, each ended by a NUL.
fn alert_id(view: View<'_>, kind: AlertKind, rule: &str, subject: &str) -> String {
    let mut h = Sha256::new();
    for part in [&view.settings.machine_id, &view.settings.boot_id, kind.as_str(), rule, subject] {
        h.update(part.as_bytes());
        h.update([0]);
    }
    h.finalize()[..8].iter().fold(String::new(), |id, b| id + &format!("{b:02x}"))
}

// The life of an alert.
impl Alerts {
    /// The reason holds (again). Pending alerts may become firing, firing ones stay so. False: there is no room for another alert.
    pub(super) fn raise(&mut self, name: Name, r: &Raise, view: View<'_>, turn: &mut Turn<'_>) -> bool {
        if !self.table.contains_key(&name) && !self.enter(name, r, view, turn) {
            return false;
        }
        let now = turn.now;
        let subject = r.subject.and_then(|i| view.describe(i, now));
        let Some(e) = self.table.get_mut(&name) else { return true };
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
        if e.alert.state == AlertState::Firing {
            self.update(name, turn);
        } else if r.firing {
            self.fire(name, r, view, turn);
        }
        true
    }

    /// A new entry, pending; or, if it was firing before a restart, firing as it was.
    fn enter(&mut self, name: Name, r: &Raise, view: View<'_>, turn: &mut Turn<'_>) -> bool {
        // The few about the host always have a place.
        if name.1 != About::Host && self.table.len() >= view.settings.limits.alerts {
            self.refused += 1;
            return false;
        }
        let job = r.job.and_then(|g| view.jobs.get(g)).map(|j| &j.record);
        let rule = job.map_or("", |j| j.rule.as_deref().unwrap_or(&j.name));
        let subject = match name.1 {
            About::Process(k) => k.to_string(),
            About::Job(_) => job.map(|j| j.id.to_string()).unwrap_or_default(),
            About::Host => String::new(),
        };
        let id = alert_id(view, name.0, rule, &subject);
        let restored = self.restored.remove(&id);
        let again = restored.is_some();
        let alert = restored.unwrap_or_else(|| Alert {
            id: id.clone(),
            kind: name.0,
            state: AlertState::Pending,
            severity: r.severity.unwrap_or(name.0.default_severity()),
            job: job.map(|j| j.id),
            job_name: job.map(|j| j.name.clone()).unwrap_or_default(),
            subject: None,
            count: r.count,
            since: view.wall(r.since),
            resolved_at: None,
            summary: String::new(),
            labels: BTreeMap::new(),
            cause: None,
        });
        self.serial += 1;
        let serial = self.serial;
        let e = Entry {
            sent_at: turn.now,
            sent: (alert.count, alert.cause.clone(), alert.severity),
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
            turn.change(Change::Alert { change: AlertChange::Pending, alert: Box::new(shown) });
        }
        self.table.insert(name, e);
        self.by_id.insert(id, name);
        self.by_serial.insert(serial, name);
        true
    }

    fn fire(&mut self, name: Name, r: &Raise, view: View<'_>, turn: &mut Turn<'_>) {
        let now = turn.now;
        let Some(e) = self.table.get_mut(&name) else { return };
        e.alert.state = AlertState::Firing;
        let labels = labels(&self.static_labels, &e.alert, r, view);
        e.alert.labels = labels;
        e.sent_at = now;
        e.sent = (e.alert.count, None, e.alert.severity);
        let past = self.past.get(&name).filter(|p| now.saturating_sub(p.1) < FLAP_WINDOW);
        e.fired = past.map_or(0, |p| p.0).saturating_add(1);
        *self.fired.entry(name.0).or_default() += 1;
        turn.change(Change::Alert { change: AlertChange::Fired, alert: Box::new(e.alert.clone()) });
    }

    /// Reports a material change, but not too often.
    fn update(&mut self, name: Name, turn: &mut Turn<'_>) {
        let Some(e) = self.table.get_mut(&name) else { return };
        let (count, cause, severity) = &e.sent;
        let (few, many) = (e.alert.count.min(*count), e.alert.count.max(*count));
        // A count matters when it has doubled or halved; a cause when its verdict or its remedy is another.
        let counts = many > few && many / 2 >= few;
        let same = match (cause, &e.alert.cause) {
            (Some(was), Some(is)) => was.verdict == is.verdict && was.remedy == is.remedy,
            (was, is) => was.is_some() == is.is_some(),
        };
        if !counts && same && *severity == e.alert.severity {
            return;
        }
        let first_cause = cause.is_none() && e.alert.cause.is_some();
        let at = if first_cause { turn.now } else { e.sent_at.saturating_add(UPDATE_FLOOR) };
        if at > turn.now {
            if !std::mem::replace(&mut e.timer, true) {
                turn.set(at, Timer::Alert(e.serial));
            }
            return;
        }
        e.sent_at = turn.now;
        e.sent = (e.alert.count, e.alert.cause.clone(), e.alert.severity);
        turn.change(Change::Alert { change: AlertChange::Updated, alert: Box::new(e.alert.clone()) });
    }

    /// The reason has gone. `end`: the last summary.
    pub(super) fn clear(&mut self, name: Name, end: String, view: View<'_>, turn: &mut Turn<'_>) {
        let Some(e) = self.table.get_mut(&name) else { return };
        if e.alert.state == AlertState::Firing && e.fired >= FLAPS {
            e.end = end;
            if e.calm_since.is_none() {
                e.calm_since = Some(turn.now);
                turn.set(turn.now.saturating_add(CALM), Timer::Alert(e.serial));
            }
            return;
        }
        self.resolve(name, end, view, turn);
    }

    fn resolve(&mut self, name: Name, end: String, view: View<'_>, turn: &mut Turn<'_>) {
        let Some(mut e) = self.remove(name) else { return };
        let now = turn.now;
        let change = if e.alert.state == AlertState::Firing {
            if self.past.len() >= PAST_MAX {
                self.past.retain(|_, p| now.saturating_sub(p.1) < FLAP_WINDOW);
            }
            if self.past.len() < PAST_MAX {
                self.past.insert(name, (e.fired, now));
            }
            AlertChange::Resolved
        } else {
            AlertChange::Dropped
        };
        finish(&mut e.alert, end, view, now);
        turn.change(Change::Alert { change, alert: Box::new(e.alert) });
    }

    /// An update that was held back is due, or the calm of a flapping alert is over.
    pub(super) fn due(&mut self, serial: u64, view: View<'_>, turn: &mut Turn<'_>) {
        let Some(name) = self.by_serial.get(&serial).copied() else { return };
        let Some(e) = self.table.get_mut(&name) else { return };
        e.timer = false;
        match e.calm_since {
            Some(since) if since.saturating_add(CALM) <= turn.now => {
                let end = std::mem::take(&mut e.end);
                self.resolve(name, end, view, turn);
            }
            Some(_) => {}
            None => self.update(name, turn),
        }
    }

    pub(super) fn set_cause(&mut self, id: &str, cause: Cause, turn: &mut Turn<'_>) {
        let Some(name) = self.by_id.get(id).copied() else { return };
        if let Some(e) = self.table.get_mut(&name) {
            e.alert.cause = Some(cause);
            if e.alert.state == AlertState::Firing {
                self.update(name, turn);
            }
        }
    }
}

// Alerts from before a restart.
impl Alerts {
    pub(super) fn restore(&mut self, list: Vec<Alert>, this_boot: bool, view: View<'_>, turn: &mut Turn<'_>) {
        for mut a in list {
            if this_boot {
                self.restored.insert(a.id.clone(), a);
            } else {
                finish(
                    &mut a,
                    "The host was rebooted: nothing from before the boot is left.".into(),
                    view,
                    turn.now,
                );
                turn.change(Change::Alert { change: AlertChange::Resolved, alert: Box::new(a) });
            }
        }
    }

    /// Those that wait for a decision, in order.
    pub(super) fn restored(&self) -> Vec<Alert> {
        let mut restored: Vec<Alert> = self.restored.values().cloned().collect();
        restored.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        restored
    }

    /// What no part took over ended while the agent was down.
    pub(super) fn resolve_unclaimed(&mut self, view: View<'_>, turn: &mut Turn<'_>) {
        for mut alert in self.restored() {
            finish(&mut alert, "It ended while jobwarden was down.".into(), view, turn.now);
            turn.change(Change::Alert { change: AlertChange::Resolved, alert: Box::new(alert) });
        }
        self.restored.clear();
    }

    pub(super) fn list(&self, all: bool) -> Vec<Alert> {
        let shown = |e: &&Entry| all || e.alert.state == AlertState::Firing;
        let mut v: Vec<Alert> = self.iter().filter(shown).map(|e| e.alert.clone()).collect();
        v.extend(self.restored.values().cloned());
        v.sort_unstable_by(|a, b| (&a.since, &a.id).cmp(&(&b.since, &b.id)));
        v
    }
}

fn finish(a: &mut Alert, end: String, view: View<'_>, now: u64) {
    a.state = AlertState::Resolved;
    a.resolved_at = Some(view.wall(now));
    a.summary = end;
    a.count = 0;
    if a.kind == AlertKind::Orphan {
        a.subject = None;
    }
}

fn labels(
    static_labels: &BTreeMap<String, String>,
    a: &Alert,
    r: &Raise,
    view: View<'_>,
) -> BTreeMap<String, String> {
    let mut l = static_labels.clone();
    let mut put = |k: &str, v: String| l.insert(k.to_owned(), v);
    put("alertname", a.kind.alertname().to_owned());
    put("alert_id", a.id.clone());
    put("instance", view.settings.host.clone());
    put("kind", a.kind.as_str().to_owned());
    put("severity", a.severity.as_str().to_owned());
    put("job_name", a.job_name.clone());
    let uid = r.whose.map(|i| view.forest.node(i).uid).filter(|&u| u != NO_UID);
    let user = uid.map(|u| view.settings.users.get(&u).cloned().unwrap_or_else(|| u.to_string()));
    put("user", user.unwrap_or_default());
    if let Some(c) = r.whose.and_then(|i| view.container_of(i)) {
        put("container", c.id.to_string());
        if let Some(pod) = c.pod {
            put("pod", pod);
        }
    }
    l
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

    /// A firing alert about a job; its root is the subject, as far as it is known.
    pub(super) fn job(g: Idx, view: View<'_>, now: u64) -> Self {
        let j = view.jobs.get(g);
        let root = j.and_then(|j| j.root);
        Self {
            job: Some(g),
            severity: j.and_then(|j| j.record.policy.severity),
            subject: root,
            whose: root,
            count: view.forest.groups.get(g).map_or(0, |g| g.all.live as usize),
            ..Self::host(now)
        }
    }
}
