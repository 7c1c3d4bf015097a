//! Who is owed what: each episode of an alert (from its firing to its end) and, for each receiver, how far it was told.
//! Pure: the time is an argument, nothing is sent and nothing is written here.
//!
//! There is no list of messages. A receiver is owed an episode while the version it took is older than the episode's:
//! so intermediate updates coalesce, a resolve cannot overtake its firing (one state is sent, the newest), and an episode
//! that began and ended within an outage is delivered once, as resolved. A later episode of the same alert waits for the
//! earlier one.

use std::collections::{BTreeMap, HashMap};

use super::clock::Millis;
use crate::model::schema::{Alert, AlertKind, AlertState, Severity};

/// Episodes kept, history included.
pub(super) const MAX_EPISODES: usize = 20_000;
/// What was delivered is history for so long.
const HISTORY_AGE: Millis = 30 * 86_400_000;
/// What is resolved and could not be delivered in this time is given up.
const OWED_AGE: Millis = 7 * 86_400_000;
/// Alertmanager is told again before its copy ends.
pub(super) const RESEND_AFTER: Millis = 60_000;
/// No wait is longer, not even one that a receiver asked for; a stored time further off comes from a clock that was set
/// back.
pub(super) const LONGEST_WAIT: Millis = 3_600_000;

/// What of a receiver's config decides what it is owed.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Filter {
    pub(super) name: String,
    /// Empty: all.
    pub(super) kinds: Vec<AlertKind>,
    pub(super) min_severity: Severity,
    pub(super) send_resolved: bool,
    /// Firing alerts are sent again and again.
    pub(super) resend: bool,
}

/// How far one receiver is with one episode.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Slot {
    /// The version that it took; 0 = none.
    pub(super) acked: u32,
    /// The version that it refused for good; 0 = none.
    pub(super) parked: u32,
    pub(super) attempts: u32,
    pub(super) error: Option<Box<str>>,
    pub(super) not_before: Millis,
    pub(super) resend_at: Millis,
    pub(super) in_flight: bool,
}

#[derive(Clone, Debug)]
pub(super) struct Episode {
    pub(super) id: Box<str>,
    pub(super) kind: AlertKind,
    pub(super) severity: Severity,
    pub(super) resolved: Option<Millis>,
    /// Grows with each change that receivers must hear of; from 1.
    pub(super) version: u32,
    /// Nobody is told before: its cause is still looked for. Of this process only, so a restart ends it.
    hold: Millis,
    /// The episode of the same alert before this one.
    earlier: Option<u64>,
    /// Hash of what makes a change material.
    digest: u64,
    /// As in `Queue::filters`.
    pub(super) slots: Vec<Slot>,
}

/// What became of one delivery.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Outcome {
    Delivered,
    /// Try again, not before that time.
    Later {
        not_before: Millis,
        error: String,
    },
    /// Nothing will change its mind.
    Refused {
        error: String,
    },
}

#[derive(Debug, Default)]
pub(super) struct Queue {
    pub(super) episodes: BTreeMap<u64, Episode>,
    latest: HashMap<Box<str>, u64>,
    next: u64,
    filters: Vec<Filter>,
}

/// What [`Queue::submit`] did.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Submitted {
    /// This episode is new or has changed.
    Changed(u64),
    /// The stored text may be newer, but no receiver needs to hear of it.
    Same(u64),
    /// A pending alert, or the end of what had ended already.
    Nothing,
    /// There is no room; nothing was done.
    Full,
}

/// How many are owed and how many parked, for one receiver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) pending: u64,
    pub(super) parked: u64,
}

impl Filter {
    fn passes(&self, e: &Episode) -> bool {
        e.severity >= self.min_severity && (self.kinds.is_empty() || self.kinds.contains(&e.kind))
    }
}

/// Whether this receiver must still hear of this episode; parked or not.
fn owed(f: &Filter, e: &Episode, s: &Slot) -> bool {
    f.passes(e)
        && s.acked < e.version
        // Who does not want resolves still hears of what ended before it could be told.
        && (e.resolved.is_none() || f.send_resolved || s.acked == 0)
}

const fn parked(e: &Episode, s: &Slot) -> bool {
    s.parked == e.version
}

impl Queue {
    /// An episode as it was stored, oldest first.
    pub(super) fn load(
        &mut self,
        seq: u64,
        alert: &Alert,
        version: u32,
        resolved: Option<Millis>,
        slots: Vec<Slot>,
    ) {
        self.insert(seq, alert, version, resolved, slots);
    }

    /// New episodes are numbered from here on. A store that could not be read yet holds lower numbers.
    pub(super) fn number_from(&mut self, seq: u64) {
        self.next = self.next.max(seq);
    }

    /// The newest episode of this alert.
    pub(super) fn latest(&self, id: &str) -> Option<u64> {
        self.latest.get(id).copied()
    }

    /// As [`load`](Self::load), where the same alert has had a later episode already: that one tells what is so now, and
    /// nobody is told of this one any more.
    pub(super) fn load_superseded(
        &mut self,
        seq: u64,
        alert: &Alert,
        version: u32,
        resolved: Option<Millis>,
        now: Millis,
    ) {
        let latest = self.latest(&alert.id);
        let told = vec![Slot { acked: version, ..Slot::default() }; self.filters.len()];
        self.insert(seq, alert, version, Some(resolved.unwrap_or(now)), told);
        self.latest.extend(latest.map(|newer| (alert.id.as_str().into(), newer)));
    }

    fn insert(&mut self, seq: u64, alert: &Alert, version: u32, resolved: Option<Millis>, slots: Vec<Slot>) {
        let id: Box<str> = alert.id.as_str().into();
        let earlier = self.latest.insert(id.clone(), seq);
        let episode = Episode {
            id,
            kind: alert.kind,
            severity: alert.severity,
            resolved,
            version,
            hold: 0,
            earlier,
            digest: digest(alert),
            slots,
        };
        self.episodes.insert(seq, episode);
        self.next = self.next.max(seq + 1);
    }

    pub(super) fn filters(&self) -> &[Filter] {
        &self.filters
    }

    /// Replaces the receivers. One that is new is owed what fires now and what comes, not the past; `known` says who is
    /// not new. What is parked gets another chance, unless the alert has fired again since: an old end must not be taken
    /// for the end of what fires now.
    pub(super) fn set_filters(&mut self, filters: Vec<Filter>, known: impl Fn(&str) -> bool) {
        let before: HashMap<&str, usize> =
            self.filters.iter().enumerate().map(|(i, f)| (f.name.as_str(), i)).collect();
        for (seq, e) in &mut self.episodes {
            let newest = self.latest.get(&e.id) == Some(seq);
            let fresh = |name: &str| Slot {
                acked: if e.resolved.is_some() && !known(name) { e.version } else { 0 },
                ..Slot::default()
            };
            e.slots = filters
                .iter()
                .map(|f| match before.get(f.name.as_str()).and_then(|&i| e.slots.get(i)) {
                    Some(s) if newest => Slot { parked: 0, not_before: 0, ..s.clone() },
                    Some(s) => s.clone(),
                    None => fresh(&f.name),
                })
                .collect();
        }
        self.filters = filters;
    }

    /// As [`set_filters`](Self::set_filters), right after loading: the slots are those of `filters` already.
    pub(super) fn init_filters(&mut self, filters: Vec<Filter>) {
        self.filters = filters;
    }

    pub(super) fn submit(&mut self, alert: &Alert, now: Millis) -> Submitted {
        let latest = self.latest.get(alert.id.as_str()).copied();
        let open = latest.filter(|seq| self.episodes.get(seq).is_some_and(|e| e.resolved.is_none()));
        match (alert.state, open) {
            (AlertState::Pending, _) => Submitted::Nothing,
            (AlertState::Resolved, None) if latest.is_some_and(|seq| self.ended(seq, alert)) => {
                Submitted::Nothing
            }
            (_, None) => {
                if self.episodes.len() >= MAX_EPISODES {
                    return Submitted::Full;
                }
                let resolved = (alert.state == AlertState::Resolved).then_some(now);
                let seq = self.next.max(1);
                self.insert(seq, alert, 1, resolved, vec![Slot::default(); self.filters.len()]);
                self.settle(seq);
                Submitted::Changed(seq)
            }
            (state, Some(seq)) => {
                let Some(e) = self.episodes.get_mut(&seq) else { return Submitted::Nothing };
                let digest = digest(alert);
                e.hold = 0;
                if digest == e.digest {
                    return Submitted::Same(seq);
                }
                e.digest = digest;
                e.severity = alert.severity;
                e.version += 1;
                e.resolved = (state == AlertState::Resolved).then_some(now);
                for s in &mut e.slots {
                    s.not_before = 0;
                    s.attempts = 0;
                }
                self.settle(seq);
                Submitted::Changed(seq)
            }
        }
    }

    /// Nobody is told of this episode before `until`, or before it is submitted again.
    pub(super) fn hold(&mut self, seq: u64, until: Millis) {
        if let Some(e) = self.episodes.get_mut(&seq) {
            e.hold = until;
        }
    }

    /// Who is not owed an episode that has ended counts as told: a change of filters must not bring up the past.
    fn settle(&mut self, seq: u64) {
        let Some(e) = self.episodes.get(&seq).filter(|e| e.resolved.is_some()) else { return };
        let told: Vec<bool> = self.filters.iter().zip(&e.slots).map(|(f, s)| !owed(f, e, s)).collect();
        if let Some(e) = self.episodes.get_mut(&seq) {
            for s in e.slots.iter_mut().zip(told).filter_map(|(s, told)| told.then_some(s)) {
                s.acked = e.version;
            }
        }
    }

    /// Whether `alert`, which is resolved, is the end of the episode `seq` that has ended already.
    fn ended(&self, seq: u64, alert: &Alert) -> bool {
        self.episodes.get(&seq).is_some_and(|e| e.resolved.is_some() && e.digest == digest(alert))
    }

    /// Up to `max` episodes to send to receiver `r` now, those that failed least first and by age; they count as in flight
    /// until [`done`](Self::done). With nothing to send, when to ask again.
    pub(super) fn pick(&mut self, r: usize, now: Millis, max: usize) -> (Vec<u64>, Option<Millis>) {
        let Some(f) = self.filters.get(r) else { return (Vec::new(), None) };
        let mut due = Vec::new();
        let mut wake: Option<Millis> = None;
        for (&seq, e) in &self.episodes {
            let Some(s) = e.slots.get(r) else { continue };
            let owes = owed(f, e, s);
            let again = !owes && f.resend && e.resolved.is_none() && f.passes(e);
            if s.in_flight || parked(e, s) || !(owes || again) || self.waits_for_earlier(f, e, r) {
                continue;
            }
            let at = if owes { s.not_before } else { s.resend_at.max(s.not_before) }.max(e.hold);
            if at <= now || at > now + LONGEST_WAIT {
                due.push((again, s.attempts, seq));
            } else {
                wake = Some(wake.map_or(at, |w| w.min(at)));
            }
        }
        due.sort_unstable();
        due.truncate(max);
        let picked: Vec<u64> = due.into_iter().map(|(_, _, seq)| seq).collect();
        for seq in &picked {
            if let Some(s) = self.slot(*seq, r) {
                s.in_flight = true;
            }
        }
        (picked, wake)
    }

    fn waits_for_earlier(&self, f: &Filter, e: &Episode, r: usize) -> bool {
        let earlier = e.earlier.and_then(|seq| self.episodes.get(&seq));
        // One step back is enough: the earlier one was not settled before those that came before it.
        earlier
            .and_then(|e| e.slots.get(r).map(|s| (e, s)))
            .is_some_and(|(e, s)| s.in_flight || (owed(f, e, s) && !parked(e, s)))
    }

    fn slot(&mut self, seq: u64, r: usize) -> Option<&mut Slot> {
        self.episodes.get_mut(&seq)?.slots.get_mut(r)
    }

    /// What became of the delivery of `version`. False if the episode is gone.
    pub(super) fn done(&mut self, r: usize, seq: u64, version: u32, outcome: Outcome, now: Millis) -> bool {
        let Some(s) = self.slot(seq, r) else { return false };
        s.in_flight = false;
        match outcome {
            Outcome::Delivered => {
                s.acked = s.acked.max(version);
                s.attempts = 0;
                s.error = None;
                s.not_before = 0;
                s.resend_at = now + RESEND_AFTER;
            }
            Outcome::Later { not_before, error } => {
                s.attempts += 1;
                s.not_before = not_before;
                s.error = Some(error.into());
            }
            Outcome::Refused { error } => {
                s.attempts += 1;
                s.parked = version;
                s.error = Some(error.into());
            }
        }
        true
    }

    /// Nothing of receiver `r` is in flight any more: its worker has ended.
    pub(super) fn land(&mut self, r: usize) {
        for s in self.episodes.values_mut().filter_map(|e| e.slots.get_mut(r)) {
            s.in_flight = false;
        }
    }

    /// Forgets what is too old; gives what went and how many deliveries were given up with it, by receiver.
    pub(super) fn expire(&mut self, now: Millis) -> (Vec<u64>, Vec<u64>) {
        let old: Vec<u64> = self
            .episodes
            .iter()
            .filter(|(_, e)| {
                let age = if self.is_owed(e) { OWED_AGE } else { HISTORY_AGE };
                e.resolved.is_some_and(|t| t + age < now) && e.slots.iter().all(|s| !s.in_flight)
            })
            .map(|(&seq, _)| seq)
            .collect();
        let mut dropped = vec![0; self.filters.len()];
        for &seq in &old {
            for (n, lost) in dropped.iter_mut().zip(self.forget(seq)) {
                *n += u64::from(lost);
            }
        }
        (old, dropped)
    }

    fn is_owed(&self, e: &Episode) -> bool {
        self.filters.iter().zip(&e.slots).any(|(f, s)| owed(f, e, s))
    }

    /// The episode that is to be forgotten when there is no room: the oldest resolved one, rather one that all know of.
    pub(super) fn oldest_resolved(&self) -> Option<u64> {
        let idle = |e: &&Episode| e.slots.iter().all(|s| !s.in_flight);
        let resolved = || self.episodes.iter().filter(|(_, e)| e.resolved.is_some() && idle(e));
        let oldest = |it: &mut dyn Iterator<Item = (&u64, &Episode)>| {
            it.min_by_key(|(seq, e)| (e.resolved, **seq)).map(|(&seq, _)| seq)
        };
        oldest(&mut resolved().filter(|(_, e)| !self.is_owed(e))).or_else(|| oldest(&mut resolved()))
    }

    /// Forgets one episode; says for each receiver whether it was still owed.
    pub(super) fn forget(&mut self, seq: u64) -> Vec<bool> {
        let Some(e) = self.episodes.remove(&seq) else { return Vec::new() };
        if self.latest.get(&e.id) == Some(&seq) {
            self.latest.remove(&e.id);
        }
        self.filters.iter().zip(&e.slots).map(|(f, s)| owed(f, &e, s)).collect()
    }

    /// It may not be forgotten: it fires, or somebody is owed it.
    pub(super) fn is_held(&self, e: &Episode) -> bool {
        e.resolved.is_none() || self.is_owed(e)
    }

    /// How many may not be forgotten: those that fire, and those that somebody is owed.
    pub(super) fn held(&self) -> usize {
        self.episodes.values().filter(|e| self.is_held(e)).count()
    }

    pub(super) fn counts(&self) -> Vec<Counts> {
        let mut all = vec![Counts::default(); self.filters.len()];
        for e in self.episodes.values() {
            for ((c, f), s) in all.iter_mut().zip(&self.filters).zip(&e.slots) {
                if owed(f, e, s) {
                    if parked(e, s) { c.parked += 1 } else { c.pending += 1 }
                }
            }
        }
        all
    }

    /// What is owed of one episode: receiver, slot, and whether it is parked.
    pub(super) fn undelivered<'a>(
        &'a self,
        e: &'a Episode,
    ) -> impl Iterator<Item = (&'a Filter, &'a Slot, bool)> {
        let all = self.filters.iter().zip(&e.slots);
        all.filter(|(f, s)| owed(f, e, s)).map(|(f, s)| (f, s, parked(e, s)))
    }
}

/// What of an alert receivers must hear of when it changes. Ages and the like change all the time and are not in it.
fn digest(a: &Alert) -> u64 {
    use std::hash::{DefaultHasher, Hash as _, Hasher as _};
    let mut h = DefaultHasher::new();
    (a.state == AlertState::Resolved).hash(&mut h);
    (a.severity, &a.since, a.count, &a.summary, &a.resolved_at).hash(&mut h);
    a.subject.as_ref().map(|s| s.id).hash(&mut h);
    a.cause.as_ref().map(|c| (c.verdict, c.process.id, &c.summary, &c.remedy)).hash(&mut h);
    h.finish()
}
