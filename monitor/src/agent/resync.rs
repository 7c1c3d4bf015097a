//! Keeps the forest equal to the kernel: counts and announces lost records, merges snapshots, and asks the kernel about jobs that seem
//! to be over. What it all means is decided by the engine.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use monitor_abi::{Counter, KINDS};
use tokio::time::Instant;

use super::core::Core;
use super::effects;
use super::intake::catch_up;
use super::options::AgentError;
use crate::api::Readiness;
use crate::engine::{Answer, Input};
use crate::model::schema::EventLine;
use crate::model::time::rfc3339;
use crate::sources::host;
use crate::sources::kernel::Ring;

/// The interval between resyncs grows up to this while records keep being lost.
const RESYNC_MAX: Duration = Duration::from_secs(8);
/// Time limit for a moment at which the ring stands still; it is tried again each second.
const STILL: Duration = Duration::from_millis(50);

impl Core {
    /// At the start: reads the ring, counts what was lost while no agent ran, takes the first snapshot.
    pub(super) fn first_sync(&mut self, ring: &mut Ring) -> Result<(), AgentError> {
        // What was written to the pinned ring while no agent ran is older than the snapshot.
        catch_up(self, ring);
        self.carry_over(ring);
        if let Some(totals) = self.totals() {
            self.count_lost(&totals);
        }
        self.snapshot("start", ring).map_err(AgentError::Snapshot)
    }

    /// The probes' counters are pinned and this agent's are not: every record that was sent and is no longer in the ring was received, by
    /// this agent or by an earlier one. The number is exact while the ring stands still, which it does between two records.
    pub(super) fn carry_over(&mut self, ring: &mut Ring) {
        if !self.kernel.from_pins() {
            self.sync.carried = true;
        }
        let end = Instant::now() + STILL;
        while !self.sync.carried && Instant::now() < end {
            catch_up(self, ring);
            let before = (ring.position(), self.kernel.ring_positions().1);
            let Ok(totals) = self.kernel.totals() else { return };
            if before.0 == before.1 && self.kernel.ring_positions().1 == before.1 {
                for (n, c) in self.counts.events.iter_mut().zip(totals) {
                    *n = c.sent;
                }
                self.sync.carried = true;
            }
        }
    }

    /// The probes' counters.
    pub(super) fn totals(&self) -> Option<[Counter; KINDS]> {
        let read = self.kernel.totals();
        read.map_err(|e| tracing::error!(error = %e, "the probes' counters cannot be read")).ok()
    }

    /// Whether records were lost since the last time. Makes the forest doubtful until the next snapshot.
    pub(super) fn count_lost(&mut self, totals: &[Counter; KINDS]) -> bool {
        let lost = totals.iter().map(|c| c.lost).sum();
        if lost <= self.sync.lost {
            return false;
        }
        let n = lost - self.sync.lost;
        self.sync.lost = lost;
        tracing::warn!(records = n, "records were lost: resynchronizing from a kernel snapshot");
        let now = host::boot_now();
        self.handle_at(Input::EventsLost { count: n }, now);
        self.feed.announce(now, lost_line(n), None);
        // The number is saved with the jobs, so that the next agent does not announce the same records.
        self.state_dirty = true;
        effects::apply(self);
        self.counts.synced = false;
        true
    }

    /// Takes a snapshot. If that fails it is tried again later; the agent goes on with what it knows.
    pub(super) fn resync(&mut self, reason: &'static str, ring: &mut Ring) {
        if let Err(e) = self.snapshot(reason, ring) {
            tracing::error!(error = %e, "the snapshot failed; it is taken again");
            self.counts.synced = false;
            self.resync_later();
        }
    }

    fn resync_later(&mut self) {
        let after = (self.sync.resync_after * 2).clamp(Duration::from_millis(50), RESYNC_MAX);
        self.sync.resync_after = after;
        self.sync.resync_at = Some(Instant::now() + after);
    }

    /// Takes a snapshot and merges it. The forest is in sync if nothing was lost meanwhile.
    fn snapshot(&mut self, reason: &'static str, ring: &mut Ring) -> io::Result<()> {
        self.sync.resync_at = None;
        *self.counts.resyncs.entry(reason).or_default() += 1;
        let t0 = self.kernel.now();
        self.handle_at(Input::SnapshotStarted { t0 }, t0);
        let taken = self.kernel.snapshot()?;
        // No record older than the snapshot may be handled after it: a fork whose exit and reap were lost would make a process that
        // never ends.
        let caught_up = catch_up(self, ring);
        let now = host::boot_now();
        let answer = self.handle_at(Input::Snapshot(Cow::Owned(taken.snapshot)), now);
        let Answer::Merged(merge) = answer else { return Err(io::Error::other("no merge")) };
        tracing::debug!(?merge, reason, from_proc = taken.from_proc, "snapshot");
        if taken.unentered > 0 {
            self.counts.lineage_inserts_failed += taken.unentered as u64;
            self.lineage_full();
        }
        if taken.lost_before == taken.lost_after && !merge.overrun && caught_up {
            self.sync.resync_after = Duration::ZERO;
            self.counts.synced = true;
            self.handle_at(Input::Ready, now);
            let _ = self.ready.send(Readiness { ready: true, reasons: Vec::new() });
            self.service_manager.ready();
            host::trim();
        } else {
            self.resync_later();
        }
        effects::apply(self);
        Ok(())
    }

    /// Asks the kernel whether jobs without a live member in the forest are over. The ring is read after that, so a member that the
    /// kernel knows and the forest does not know was missed, not just forked.
    pub(super) fn count_emptied(&mut self, ring: &mut Ring) {
        let jobs = std::mem::take(&mut self.sync.emptied);
        if jobs.is_empty() {
            return;
        }
        let alive = self.kernel.jobs_alive(&jobs);
        if let Err(e) = &alive {
            tracing::error!(error = %e, "the members of a job cannot be read from the kernel");
        }
        catch_up(self, ring);
        let now = host::boot_now();
        let mut wrong = false;
        for job in jobs {
            let lives = alive.as_ref().is_ok_and(|a| a.contains(&job)) || alive.is_err();
            wrong |= lives;
            self.handle_at(Input::JobCounted { number: job, alive: lives }, now);
        }
        effects::apply(self);
        if wrong && self.sync.resync_at.is_none() {
            tracing::warn!("the kernel has members of a job without members in the forest: resynchronizing");
            self.counts.synced = false;
            self.resync_later();
        }
    }
}

/// The `lost` line of `events`.
fn lost_line(n: u64) -> EventLine {
    EventLine {
        at: rfc3339(host::boot_now() + host::boot_to_wall()),
        kind: "lost".into(),
        process: None,
        more: BTreeMap::from([("count".into(), n.into()), ("where".into(), "ring".into())]),
    }
}
