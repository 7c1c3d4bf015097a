//! The thread that owns queue and store. All that changes them comes as a command, is written in one transaction with
//! whatever else was waiting, and is answered when it is on the disk.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::sync::{mpsc, oneshot, watch};

use super::clock::{Clock, Millis, parse_rfc3339, rfc3339};
use super::queue::{Counts, Filter, Outcome, Queue, Slot, Submitted};
use super::store::{Change, Store, StoreError};
use super::{Submission, SubmitError, Undelivered};
use crate::model::schema::{self, Alert, AlertState};

/// Commands taken into one transaction.
const TOGETHER: usize = 256;
/// While the disk takes nothing, so many alerts are kept in memory.
const MAX_UNSAVED: usize = 2_000;
/// Of history, at most.
const MAX_LISTED: usize = 5_000;
pub(super) const EXPIRE_EVERY: Millis = 60_000;

pub(super) enum Command {
    Submit {
        all: Vec<Submission>,
        reply: oneshot::Sender<Result<(), SubmitError>>,
    },
    Pick {
        receiver: String,
        max: usize,
        reply: oneshot::Sender<Picked>,
    },
    Done {
        receiver: String,
        results: Vec<Done>,
        reply: oneshot::Sender<()>,
    },
    /// The receiver's worker has ended, with or without its answers.
    Land {
        receiver: String,
    },
    Receivers {
        filters: Vec<Filter>,
        reply: oneshot::Sender<()>,
    },
    History {
        since: Option<Millis>,
        reply: oneshot::Sender<Vec<Alert>>,
    },
    Undelivered {
        reply: oneshot::Sender<Vec<Undelivered>>,
    },
    Firing {
        reply: oneshot::Sender<Vec<Alert>>,
    },
    /// Time has passed: try the disk again, forget what is old.
    Tick,
    Stop {
        reply: oneshot::Sender<()>,
    },
}

/// What is to be sent now, or when to ask again.
#[derive(Debug, Default)]
pub(super) struct Picked {
    pub(super) items: Vec<Item>,
    pub(super) wake: Option<Millis>,
}

#[derive(Debug)]
pub(super) struct Item {
    pub(super) seq: u64,
    pub(super) version: u32,
    pub(super) attempts: u32,
    pub(super) alert: Alert,
}

pub(super) struct Done {
    pub(super) seq: u64,
    pub(super) version: u32,
    pub(super) outcome: Outcome,
}

/// What others may look at without asking the thread.
#[derive(Debug, Default)]
pub(super) struct QueueStats {
    pub(super) counts: BTreeMap<String, Counts>,
    /// Episodes that fire or that somebody is still owed.
    pub(super) held: usize,
    /// Deliveries given up, by receiver.
    pub(super) dropped: BTreeMap<String, u64>,
}

pub(super) struct Keeper {
    pub(super) queue: Queue,
    pub(super) store: Store,
    /// A damaged file that was moved aside, for the texts of alerts that are not in the new one yet.
    pub(super) salvage: Option<PathBuf>,
    /// The engine has been told what fires; what is read later it does not know.
    pub(super) started: bool,
    /// When opening was last tried.
    pub(super) opened_at: Option<Instant>,
    /// When a damaged file was last moved aside.
    pub(super) replaced_at: Option<Instant>,
    /// Episodes to be written; with their text where that is new.
    pub(super) dirty: BTreeMap<u64, Option<String>>,
    gone: BTreeSet<u64>,
    expired_at: Millis,
    pub(super) clock: Clock,
    board: Arc<Mutex<QueueStats>>,
    pub(super) changed: watch::Sender<u64>,
    /// What the disk said last, until it takes something again.
    error: watch::Sender<Option<String>>,
}

impl Keeper {
    /// Opens the store and reads what is in it. One that cannot be opened is tried again each second; until then alerts are
    /// kept in memory and sent from there.
    pub(super) fn open(
        state_dir: &Path,
        filters: Vec<Filter>,
        clock: Clock,
        board: Arc<Mutex<QueueStats>>,
        changed: watch::Sender<u64>,
        error: watch::Sender<Option<String>>,
    ) -> Self {
        let mut queue = Queue::default();
        queue.init_filters(filters);
        let mut keeper = Self {
            queue,
            store: Store::new(state_dir),
            salvage: None,
            started: false,
            opened_at: None,
            replaced_at: None,
            dirty: BTreeMap::new(),
            gone: BTreeSet::new(),
            expired_at: 0,
            clock,
            board,
            changed,
            error,
        };
        if let Err(e) = keeper.open_store() {
            keeper.failed(&e);
            // Above all numbers in a store that is read later.
            keeper.queue.number_from(keeper.clock.now().unsigned_abs().saturating_mul(1000));
        }
        keeper.started = true;
        keeper.publish();
        keeper
    }

    /// Serves until told to stop, or until nobody is left to ask.
    pub(super) fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let mut stopped = None;
        while let Some(first) = commands.blocking_recv() {
            let mut waiting = Vec::new();
            let mut next = Some(first);
            let mut taken = 0;
            let mut news = false;
            while let Some(command) = next.take() {
                taken += 1;
                match command {
                    Command::Stop { reply } => stopped = Some(reply),
                    other => news |= self.handle(other, &mut waiting),
                }
                if taken < TOGETHER && stopped.is_none() {
                    next = commands.try_recv().ok();
                }
            }
            let written = self.flush();
            self.publish();
            for w in waiting {
                w.answer(written.as_ref());
            }
            if news {
                self.changed.send_modify(|n| *n += 1);
            }
            if let Some(reply) = stopped {
                self.store.close();
                // Nobody may be waiting any more.
                let _ = reply.send(());
                return;
            }
        }
        self.store.close();
    }

    /// True if receivers may have something new to send.
    fn handle(&mut self, command: Command, waiting: &mut Vec<Waiting>) -> bool {
        let now = self.clock.now();
        // A receiver of an answer that is gone has lost interest; each `send` below may fail for that alone.
        match command {
            Command::Submit { all, reply } => {
                let refused = all.iter().filter_map(|s| self.submit(s, now).err()).last();
                waiting.push(Waiting { refused, reply });
                return true;
            }
            Command::Pick { receiver, max, reply } => {
                let _ = reply.send(self.pick(&receiver, max, now));
            }
            Command::Done { receiver, results, reply } => {
                self.done(&receiver, results, now);
                let _ = reply.send(());
                return true;
            }
            Command::Land { receiver } => {
                if let Some(r) = self.index(&receiver) {
                    self.queue.land(r);
                }
                return true;
            }
            Command::Receivers { filters, reply } => {
                self.queue.set_filters(filters, |_| false);
                if let Err(e) = self.store.set_receivers(self.queue.filters()) {
                    self.failed(&e);
                }
                let all: Vec<u64> = self.queue.episodes.keys().copied().collect();
                for seq in all {
                    self.dirty.entry(seq).or_insert(None);
                }
                let _ = reply.send(());
                return true;
            }
            Command::History { since, reply } => {
                let _ = reply.send(self.history(since));
            }
            Command::Undelivered { reply } => {
                let _ = reply.send(self.undelivered());
            }
            Command::Firing { reply } => {
                let firing: Vec<u64> = self
                    .queue
                    .episodes
                    .iter()
                    .filter(|(_, e)| e.resolved.is_none())
                    .map(|(&s, _)| s)
                    .collect();
                let _ = reply.send(firing.into_iter().filter_map(|seq| self.alert(seq)).collect());
            }
            Command::Tick => {
                self.expire(now);
                self.probe();
            }
            Command::Stop { .. } => {}
        }
        false
    }

    fn index(&self, receiver: &str) -> Option<usize> {
        self.queue.filters().iter().position(|f| f.name == receiver)
    }

    pub(super) fn submit(&mut self, s: &Submission, now: Millis) -> Result<(), SubmitError> {
        let failing = self.error.borrow().is_some();
        let unsaved = if failing { self.dirty.values().filter(|b| b.is_some()).count() } else { 0 };
        if unsaved >= MAX_UNSAVED {
            return Err(self.refuse(unsaved));
        }
        let alert = trimmed(&s.alert, now);
        let mut submitted = self.queue.submit(&alert, now);
        if submitted == Submitted::Full
            && let Some(seq) = self.queue.oldest_resolved()
        {
            self.forget(seq);
            submitted = self.queue.submit(&alert, now);
        }
        if let (Submitted::Changed(seq), Some(hold)) = (&submitted, s.hold) {
            self.queue.hold(*seq, now + hold.as_millis() as Millis);
        }
        match submitted {
            Submitted::Full => Err(self.refuse(self.queue.episodes.len())),
            Submitted::Nothing => Ok(()),
            Submitted::Changed(seq) | Submitted::Same(seq) => {
                let body = serde_json::to_string(&alert).map_err(|e| SubmitError::Json(e.to_string()))?;
                self.dirty.insert(seq, Some(body));
                Ok(())
            }
        }
    }

    /// What is not kept is not delivered to anybody, and counts so.
    fn refuse(&mut self, kept: usize) -> SubmitError {
        self.count_dropped(&vec![1; self.queue.filters().len()]);
        SubmitError::Full { kept }
    }

    pub(super) fn forget(&mut self, seq: u64) {
        let lost = self.queue.forget(seq);
        self.count_dropped(&lost.into_iter().map(u64::from).collect::<Vec<_>>());
        self.dirty.remove(&seq);
        self.gone.insert(seq);
    }

    fn count_dropped(&self, lost: &[u64]) {
        let mut board = self.lock();
        for (f, &n) in self.queue.filters().iter().zip(lost) {
            if n > 0 {
                tracing::warn!(receiver = %f.name, alerts = n, "given up: too old or too many");
                *board.dropped.entry(f.name.clone()).or_default() += n;
            }
        }
    }

    fn expire(&mut self, now: Millis) {
        if (0..EXPIRE_EVERY).contains(&(now - self.expired_at)) {
            return;
        }
        self.expired_at = now;
        let (old, lost) = self.queue.expire(now);
        self.count_dropped(&lost);
        for seq in old {
            self.dirty.remove(&seq);
            self.gone.insert(seq);
        }
    }

    fn pick(&mut self, receiver: &str, max: usize, now: Millis) -> Picked {
        let Some(r) = self.index(receiver) else { return Picked::default() };
        let (picked, wake) = self.queue.pick(r, now, max);
        let mut items = Vec::with_capacity(picked.len());
        for seq in picked {
            let (version, attempts) = match self.queue.episodes.get(&seq) {
                Some(e) => (e.version, e.slots.get(r).map_or(0, |s| s.attempts)),
                None => continue,
            };
            if let Some(alert) = self.alert(seq) {
                items.push(Item { seq, version, attempts, alert });
            } else {
                let error = "its text could not be read from the store".to_owned();
                self.queue.done(r, seq, version, Outcome::Later { not_before: now + 60_000, error }, now);
            }
        }
        Picked { items, wake }
    }

    fn done(&mut self, receiver: &str, results: Vec<Done>, now: Millis) {
        let Some(r) = self.index(receiver) else { return };
        for d in results {
            let resent = self
                .queue
                .episodes
                .get(&d.seq)
                .and_then(|e| e.slots.get(r))
                .is_some_and(|s| s.acked == d.version && d.outcome == Outcome::Delivered);
            // Telling the same again changes nothing that must outlive the process.
            if self.queue.done(r, d.seq, d.version, d.outcome, now) && !resent {
                self.dirty.entry(d.seq).or_insert(None);
            }
        }
    }

    /// The newest text of an episode, whether it is on the disk yet or not.
    fn alert(&mut self, seq: u64) -> Option<Alert> {
        let body = match self.dirty.get(&seq) {
            Some(Some(body)) => Some(body.clone()),
            _ => self.store.body(seq).unwrap_or_else(|e| {
                self.read_failed(&e);
                None
            }),
        };
        serde_json::from_str(&body?).ok()
    }

    fn history(&mut self, since: Option<Millis>) -> Vec<Alert> {
        let past = self
            .queue
            .episodes
            .iter()
            .rev()
            .filter(|(_, e)| e.resolved.is_some_and(|t| since.is_none_or(|since| t >= since)));
        let seqs: Vec<u64> = past.map(|(&seq, _)| seq).take(MAX_LISTED).collect();
        seqs.into_iter().filter_map(|seq| self.alert(seq)).collect()
    }

    fn undelivered(&mut self) -> Vec<Undelivered> {
        let mut owed = Vec::new();
        for (&seq, e) in &self.queue.episodes {
            let at = |(f, s, parked): (&Filter, &Slot, bool)| schema::Undelivered {
                receiver: f.name.clone(),
                parked,
                attempts: s.attempts,
                error: s.error.as_ref().map(ToString::to_string),
            };
            let receivers: Vec<_> = self.queue.undelivered(e).map(at).collect();
            if !receivers.is_empty() {
                owed.push((seq, receivers));
            }
        }
        owed.truncate(MAX_LISTED);
        let with_alert = |(seq, undelivered)| Some(Undelivered { alert: self.alert(seq)?, undelivered });
        owed.into_iter().filter_map(with_alert).collect()
    }

    /// Writes all that is not on the disk yet. What fails stays in memory and is tried again with the next command.
    fn flush(&mut self) -> Result<(), StoreError> {
        self.open_if_closed().inspect_err(|e| self.failed(e))?;
        if self.dirty.is_empty() && self.gone.is_empty() {
            return Ok(());
        }
        match self.write_changes() {
            // Into a new file, with all that can be read of the damaged one.
            Err(e) if e.is_damage() => {
                self.failed(&e);
                let replaced = self.replace(&e.to_string()).and_then(|()| self.open_if_closed());
                replaced.and_then(|()| self.write_changes()).inspect_err(|e| self.failed(e))
            }
            r => r.inspect_err(|e| self.failed(e)),
        }
    }

    fn write_changes(&mut self) -> Result<(), StoreError> {
        let mut changes: Vec<Change<'_>> =
            self.gone.iter().map(|&seq| Change { seq, episode: None, body: None }).collect();
        for (&seq, body) in &self.dirty {
            if let Some(e) = self.queue.episodes.get(&seq) {
                changes.push(Change { seq, episode: Some(e), body: body.as_deref() });
            }
        }
        self.store.write(self.queue.filters(), &changes)?;
        self.dirty.clear();
        self.gone.clear();
        self.works();
        Ok(())
    }

    pub(super) fn works(&self) {
        if self.error.borrow().is_some() {
            self.error.send_replace(None);
            tracing::info!("the alerts' store takes alerts again");
        }
    }

    /// What failed may have left nothing to be written: whether the disk takes something is found out with the names of
    /// the receivers, which are also what a reload could not write.
    fn probe(&mut self) {
        let waits = !self.store.is_open() || !self.dirty.is_empty() || !self.gone.is_empty();
        if self.error.borrow().is_none() || waits {
            return;
        }
        match self.store.set_receivers(self.queue.filters()) {
            Ok(()) => self.works(),
            Err(e) => self.failed(&e),
        }
    }

    pub(super) fn failed(&self, e: &StoreError) {
        // Why it is closed was said before.
        if matches!(e, StoreError::Closed { .. }) {
            return;
        }
        let text = e.to_string();
        if self.error.borrow().as_ref() != Some(&text) {
            tracing::error!("{text}");
            self.error.send_replace(Some(text));
        }
    }

    fn publish(&mut self) {
        let (counts, held) = (self.queue.counts(), self.queue.held());
        let mut board = self.lock();
        board.held = held;
        board.counts = self.queue.filters().iter().map(|f| f.name.clone()).zip(counts).collect();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, QueueStats> {
        // A panic of another holder leaves counts, which are whole at every moment.
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A submission that waits for the disk.
struct Waiting {
    refused: Option<SubmitError>,
    reply: oneshot::Sender<Result<(), SubmitError>>,
}

impl Waiting {
    fn answer(self, written: Result<&(), &StoreError>) {
        let result = match (self.refused, written) {
            (Some(e), _) => Err(e),
            (None, Err(e)) => Err(SubmitError::Storage(e.to_string())),
            (None, Ok(())) => Ok(()),
        };
        // Whoever submitted may have gone.
        let _ = self.reply.send(result);
    }
}

/// The alert as it is kept: bounded, and with an end where it has ended.
pub(super) fn trimmed(a: &Alert, now: Millis) -> Alert {
    const MAX_CHILDREN: usize = 64;
    const MAX_EVIDENCE: usize = 64;
    const MAX_ARGV: usize = 4 * 1024;
    const MAX_TEXT: usize = 16 * 1024;
    let mut a = a.clone();
    let cut = |s: &mut String| {
        if s.len() > MAX_TEXT {
            s.truncate((0..=MAX_TEXT).rev().find(|&i| s.is_char_boundary(i)).unwrap_or_default());
            s.push('…');
        }
    };
    for p in a.subject.iter_mut().chain(a.cause.iter_mut().map(|c| &mut c.process)) {
        p.children.truncate(MAX_CHILDREN);
        p.argv = crate::redact::cut(&p.argv, MAX_ARGV);
    }
    cut(&mut a.summary);
    if let Some(c) = &mut a.cause {
        c.evidence.truncate(MAX_EVIDENCE);
        cut(&mut c.summary);
        cut(&mut c.remedy);
    }
    if a.state == AlertState::Resolved && a.resolved_at.as_deref().and_then(parse_rfc3339).is_none() {
        a.resolved_at = Some(rfc3339(now));
    }
    a
}
