//! Opening the queue's store, and a new one in the place of a damaged one: all that can still be read goes over.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::queue::{Filter, Slot};
use super::queue_worker::{Keeper, trimmed};
use super::store::{Change, Contents, Row, Store, StoreError};
use crate::model::schema::{Alert, AlertState};

/// A store that could not be opened is tried again this often.
const OPEN_EVERY: Duration = Duration::from_millis(900);
/// A file that is damaged again so soon is not replaced: whatever damages it would go on, and the first one is the evidence.
const REPLACE_EVERY: Duration = Duration::from_mins(1);
/// Episodes copied from a damaged file in one transaction.
const COPIED: usize = 256;

impl Keeper {
    /// Opens a store that is closed, at most once in [`OPEN_EVERY`].
    pub(super) fn open_if_closed(&mut self) -> Result<(), StoreError> {
        if self.store.is_open() {
            return Ok(());
        }
        if self.opened_at.is_some_and(|at| at.elapsed() < OPEN_EVERY) {
            return Err(self.store.closed());
        }
        self.open_store()
    }

    /// Opens the store and takes over what is in it. A damaged one is replaced.
    pub(super) fn open_store(&mut self) -> Result<(), StoreError> {
        self.opened_at = Some(Instant::now());
        let contents = self.store.open()?;
        if let Some(why) = contents.damage.clone() {
            self.take(contents);
            self.replace(&why)?;
            // It is empty.
            self.store.open()?;
        } else {
            self.take(contents);
        }
        if self.salvage.is_some() {
            self.copy_salvage()?;
        }
        self.store.set_receivers(self.queue.filters())?;
        self.works();
        // The receivers' workers may have something new to send.
        self.changed.send_modify(|n| *n += 1);
        Ok(())
    }

    /// What a store holds, into the queue. Once the agent has started, what the queue says is newer.
    fn take(&mut self, contents: Contents) {
        let known = contents.receivers;
        let now = self.clock.now();
        let mut over = Vec::new();
        for row in contents.rows {
            if self.queue.episodes.contains_key(&row.seq) {
                continue;
            }
            if self.queue.latest(&row.alert.id).is_some_and(|newest| newest > row.seq) {
                self.queue.load_superseded(row.seq, &row.alert, row.version, row.resolved, now);
                let ended = trimmed(&Alert { state: AlertState::Resolved, ..row.alert }, now);
                self.dirty.insert(row.seq, serde_json::to_string(&ended).ok());
                continue;
            }
            let slots = slots(&row, self.queue.filters(), &known);
            self.queue.load(row.seq, &row.alert, row.version, row.resolved, slots);
            if self.started && row.resolved.is_none() {
                over.push(row.alert);
            }
        }
        // The engine has decided without them: what still holds has fired anew.
        for alert in over {
            let ended = Alert { state: AlertState::Resolved, ..alert };
            if let Err(e) = self.submit(&ended.into(), now) {
                tracing::warn!(error = %e, "an alert of an earlier run is not resolved");
            }
        }
    }

    /// Reading has shown that the file is damaged: the next write goes to a new one.
    pub(super) fn read_failed(&mut self, e: &StoreError) {
        self.failed(e);
        if e.is_damage()
            && let Err(e) = self.replace(&e.to_string())
        {
            self.failed(&e);
        }
    }

    /// Moves the damaged file aside; the store is closed then.
    pub(super) fn replace(&mut self, why: &str) -> Result<(), StoreError> {
        if self.replaced_at.is_some_and(|at| at.elapsed() < REPLACE_EVERY) {
            return Err(self.store.damaged_again(why));
        }
        let bad = self.store.set_aside()?;
        tracing::error!(why, moved_to = %bad.display(), "the alerts' store is damaged; it was moved aside, and what can be read goes over to a new one");
        self.replaced_at = Some(Instant::now());
        // At once.
        self.opened_at = None;
        self.salvage = Some(bad);
        Ok(())
    }

    /// Every episode of the queue into the new store, with its text from the damaged one where that is not in memory. A firing
    /// alert without a text is submitted again by the core; a resolved one without is lost.
    fn copy_salvage(&mut self) -> Result<(), StoreError> {
        let old = self.salvage.as_deref().and_then(Store::salvage);
        let all: Vec<u64> = self.queue.episodes.keys().copied().collect();
        let mut lost = Vec::new();
        for some in all.chunks(COPIED) {
            let text = |seq: &u64| match self.dirty.get(seq) {
                Some(Some(body)) => Some(body.clone()),
                _ => old
                    .as_ref()?
                    .body(*seq)
                    .ok()
                    .flatten()
                    .filter(|b| serde_json::from_str::<Alert>(b).is_ok()),
            };
            let texts: Vec<(u64, Option<String>)> = some.iter().map(|seq| (*seq, text(seq))).collect();
            let mut changes = Vec::new();
            for (seq, body) in &texts {
                let Some(e) = self.queue.episodes.get(seq) else { continue };
                if body.is_some() || e.resolved.is_none() {
                    changes.push(Change { seq: *seq, episode: Some(e), body: body.as_deref() });
                } else {
                    lost.push(*seq);
                }
            }
            self.store.write(self.queue.filters(), &changes)?;
        }
        if !lost.is_empty() {
            tracing::error!(alerts = lost.len(), "could not be read from the damaged store and are lost");
        }
        for seq in lost {
            self.forget(seq);
        }
        self.salvage = None;
        Ok(())
    }
}

/// How far each receiver is with this episode.
fn slots(row: &Row, filters: &[Filter], known: &BTreeSet<String>) -> Vec<Slot> {
    let slot = |f: &Filter| match row.progress.get(&f.name) {
        Some(s) => s.clone(),
        // A new receiver is not told of the past.
        None if row.resolved.is_some() && !known.contains(&f.name) => {
            Slot { acked: row.version, ..Slot::default() }
        }
        None => Slot::default(),
    };
    filters.iter().map(slot).collect()
}
