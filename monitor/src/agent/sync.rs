//! Keeping the forest equal to the kernel: losses counted and told, snapshots merged, entries that the kernel's lineage map
//! had no room for, jobs that seem to be over. What it all means is the engine's.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use monitor_abi::{Counter, KINDS};
use tokio::time::Instant;

use super::AgentError;
use super::core::Core;
use crate::api::Readiness;
use crate::engine::{Answer, Input, Output};
use crate::model::key::Key;
use crate::model::schema::AlertKind;
use crate::sources::host;
use crate::sources::kernel::Ring;

/// Resyncs back off up to this while records go on being lost.
const RESYNC_MAX: Duration = Duration::from_secs(8);
/// Turns without a record in which one that is being written at the ring's head is waited for.
const SPINS: usize = 1_000;
/// How long the ring is hoped to stand still for a moment; then the hope is put off.
const STILL: Duration = Duration::from_millis(50);
/// Processes that wait for room in the lineage map; the next snapshot finds those beyond.
const UNENTERED_MAX: usize = 65_536;
/// `capacity` for the lineage map ends this long after the last process that found no room.
const ROOM_AFTER: Duration = Duration::from_mins(1);

/// What this part remembers.
#[derive(Debug, Default)]
pub(super) struct Sync {
    /// Lost records of all kinds, as last told.
    pub lost: u64,
    /// `counts.events` goes on where an earlier agent's ended.
    carried: bool,
    pub resync_at: Option<Instant>,
    resync_after: Duration,
    /// Processes without an entry in the lineage map, their parents and jobs.
    unentered: HashMap<Key, (Key, u64)>,
    /// When the lineage map was full for the last time.
    full_at: Option<Instant>,
    /// Forks less reaps, as the probes counted them, when the lineage map was last swept.
    swept_at: i64,
    sweep: Option<tokio::task::JoinHandle<()>>,
    /// Which stores are full, as last looked at.
    pub stores_full: Option<String>,
    /// Jobs that seem to be over.
    pub emptied: Vec<u64>,
    /// Whom /proc could not be asked about: no descriptors were left.
    pub unseen: Vec<Key>,
}

impl Core {
    /// Before anything else: what the ring holds from before, the account of what was lost meanwhile, the first snapshot.
    /// `lost`: what an earlier agent with the same pins has told already.
    pub(super) fn first_sync(&mut self, ring: &mut Ring, lost: u64) -> Result<(), AgentError> {
        // Pinned maps: what was written while the agent was down is older than the snapshot.
        self.catch_up(ring);
        self.carry_over(ring);
        self.sync.lost = if self.kernel.from_pins() { lost } else { 0 };
        if let Some(totals) = self.totals() {
            self.count_lost(&totals);
        }
        self.snapshot("start", ring).map_err(AgentError::Snapshot)
    }

    /// The probes' counters are pinned and this agent's are not: all that was sent and is not in the ring any more was
    /// received, by this agent or by one before it. Known when the ring stands still, which it does between two records.
    fn carry_over(&mut self, ring: &mut Ring) {
        self.sync.carried = !self.kernel.from_pins();
        let end = Instant::now() + STILL;
        while !self.sync.carried && Instant::now() < end {
            self.catch_up(ring);
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

    /// Each second: whatever the probes lost since the last look makes the forest doubtful until the next snapshot.
    pub(super) fn check(&mut self, ring: &mut Ring) {
        self.service_manager.alive();
        let boot_to_wall_ns = host::boot_to_wall().cast_signed();
        self.engine.handle(Input::Clock { boot_to_wall_ns }, host::boot_now(), &mut Output::default());
        self.engine.flush();
        // A doom that nobody renewed has run out in the kernel; its probe costs each system call until it is detached.
        if self.kernel.doom_attached()
            && let Err(e) = self.kernel.attach_while_doomed()
        {
            tracing::error!(error = %e, "sys_enter could not be detached");
        }
        if !self.sync.carried {
            self.carry_over(ring);
        }
        let unseen = std::mem::take(&mut self.sync.unseen);
        if !unseen.is_empty() {
            tracing::warn!(processes = unseen.len(), "/proc could not be read; they are looked at again");
            self.looks_wanted.extend(unseen);
        }
        self.tell_reaps(host::boot_now());
        self.enter_waiting();
        self.check_storage();
        self.release_saved(ring);
        super::cause::renew(self);
        if let Some(totals) = self.totals() {
            self.sweep(&totals);
            if self.count_lost(&totals) {
                self.sync.resync_at.get_or_insert_with(Instant::now);
            }
        }
    }

    /// The probes' counters.
    fn totals(&self) -> Option<[Counter; KINDS]> {
        let read = self.kernel.totals();
        read.map_err(|e| tracing::error!(error = %e, "the probes' counters cannot be read")).ok()
    }

    /// Whether records were lost since the last time.
    fn count_lost(&mut self, totals: &[Counter; KINDS]) -> bool {
        let lost = totals.iter().map(|c| c.lost).sum();
        if lost <= self.sync.lost {
            return false;
        }
        let n = lost - self.sync.lost;
        self.sync.lost = lost;
        tracing::warn!(records = n, "records were lost: the forest is taken anew from the kernel");
        let now = host::boot_now();
        let mut out = Output::default();
        self.engine.handle(Input::EventsLost { count: n }, now, &mut out);
        self.feed.announce(now, super::answer::lost_line(n), None);
        // What was told is saved with the jobs, so that a restart does not tell it again.
        self.state_dirty = true;
        self.apply(out);
        self.counts.synced = false;
        true
    }

    /// A snapshot because of `reason`. One that fails is taken again later: the agent goes on with what it knows.
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

    /// A snapshot, merged. Synced if nothing was lost while it was taken.
    fn snapshot(&mut self, reason: &'static str, ring: &mut Ring) -> io::Result<()> {
        self.sync.resync_at = None;
        *self.counts.resyncs.entry(reason).or_default() += 1;
        let t0 = self.kernel.now();
        self.engine.handle(Input::SnapshotStarted { t0 }, t0, &mut Output::default());
        let taken = self.kernel.snapshot()?;
        // No record that is older than the snapshot may be handled after it: a fork whose exit and reap were lost would make
        // a process that nothing ever ends.
        let caught_up = self.catch_up(ring);
        let now = host::boot_now();
        let mut out = Output::default();
        let answer = self.engine.handle(Input::Snapshot(Cow::Owned(taken.snapshot)), now, &mut out);
        let Answer::Merged(merge) = answer else { return Err(io::Error::other("no merge")) };
        tracing::debug!(?merge, reason, from_proc = taken.from_proc, "snapshot");
        if taken.unentered > 0 {
            self.counts.lineage_inserts_failed += taken.unentered as u64;
            self.lineage_full(&mut out);
        }
        if taken.lost_before == taken.lost_after && !merge.overrun && caught_up {
            self.sync.resync_after = Duration::ZERO;
            self.counts.synced = true;
            self.engine.handle(Input::Ready, now, &mut out);
            let _ = self.ready.send(Readiness { ready: true, reasons: Vec::new() });
            self.service_manager.ready();
            host::trim();
        } else {
            self.resync_later();
        }
        self.apply(out);
        Ok(())
    }

    /// Reads the ring up to where it stands now. False: a record in it is being written all the while.
    fn catch_up(&mut self, ring: &mut Ring) -> bool {
        let (_, until) = self.kernel.ring_positions();
        let mut idle = 0;
        while ring.position() < until {
            if self.drain(ring) == 0 {
                idle += 1;
                if idle > SPINS {
                    return false;
                }
                std::thread::yield_now();
            }
        }
        true
    }

    /// A process whom the kernel's lineage map lacks, or has in no job. `missed`: the fork probe found no room.
    pub(super) fn enter(&mut self, key: Key, parent: Key, job: u64, missed: bool) {
        if missed {
            self.counts.lineage_inserts_failed += 1;
            let mut out = Output::default();
            self.lineage_full(&mut out);
            self.alerts_of(out);
        }
        if let Err(e) = self.kernel.enter(key, parent, job) {
            tracing::debug!(process = %key, error = %e, "no entry in the kernel's lineage map; tried again");
            if self.sync.unentered.len() < UNENTERED_MAX {
                self.sync.unentered.insert(key, (parent, job));
            }
        }
    }

    /// Each fork makes an entry in the kernel's lineage map and each reap takes one away; where a reap is missed it stays. So
    /// the map is swept, beside the core, when a quarter of it has been filled since the last time.
    fn sweep(&mut self, totals: &[Counter; KINDS]) {
        let records =
            |kind: u16| (totals[usize::from(kind)].sent + totals[usize::from(kind)].lost).cast_signed();
        let entries = records(monitor_abi::KIND_FORK) - records(monitor_abi::KIND_REAP);
        let under_way = self.sync.sweep.as_ref().is_some_and(|s| !s.is_finished());
        if under_way || entries - self.sync.swept_at < i64::from(self.kernel.lineage_max() / 4) {
            return;
        }
        self.sync.swept_at = entries;
        let kernel = Arc::clone(&self.kernel);
        self.sync.sweep = Some(self.beside.spawn_blocking(move || match kernel.sweep_stale_lineage() {
            Ok(n) => tracing::debug!(entries = n, "the lineage map was swept"),
            Err(e) => tracing::warn!(error = %e, "the lineage map could not be swept"),
        }));
    }

    fn lineage_full(&mut self, out: &mut Output) {
        if self.sync.full_at.replace(Instant::now()).is_none() {
            tracing::error!(
                "the kernel's lineage map is full: what it has no room for escapes kills until there is"
            );
            self.capacity(out);
        }
    }

    /// The one alert about what is full: the lineage map as the probes find it, and the stores as they are looked at.
    pub(super) fn capacity(&mut self, out: &mut Output) {
        let map = self.sync.full_at.map(|_| {
            format!(
                "The kernel's lineage map ({} processes) is full: a kill does not reach those it has no room for",
                self.kernel.lineage_max()
            )
        });
        let said: Vec<String> = map.into_iter().chain(self.sync.stores_full.clone()).collect();
        let wrong = (!said.is_empty()).then(|| said.join("; "));
        self.engine.handle(
            Input::Condition { kind: AlertKind::Capacity, problem: wrong.map(Cow::Owned) },
            host::boot_now(),
            out,
        );
    }

    fn enter_waiting(&mut self) {
        for (key, (parent, job)) in std::mem::take(&mut self.sync.unentered) {
            self.enter(key, parent, job, false);
        }
        let over = self.sync.full_at.is_some_and(|at| at.elapsed() >= ROOM_AFTER);
        if over && self.sync.unentered.is_empty() {
            self.sync.full_at = None;
            let mut out = Output::default();
            self.capacity(&mut out);
            self.apply(out);
        }
    }

    /// Whether jobs without a member that is known to live are over: the kernel has the last word. The ring is read after it
    /// was asked, so a member that it knows of and the forest does not is no news of this moment.
    pub(super) fn count_emptied(&mut self, ring: &mut Ring) {
        let jobs = std::mem::take(&mut self.sync.emptied);
        if jobs.is_empty() {
            return;
        }
        let alive = self.kernel.jobs_alive(&jobs);
        if let Err(e) = &alive {
            tracing::error!(error = %e, "the kernel could not be asked who is in a job");
        }
        self.catch_up(ring);
        let (now, mut out) = (host::boot_now(), Output::default());
        let mut wrong = false;
        for job in jobs {
            let lives = alive.as_ref().is_ok_and(|a| a.contains(&job)) || alive.is_err();
            wrong |= lives;
            self.engine.handle(Input::JobCounted { number: job, alive: lives }, now, &mut out);
        }
        self.apply(out);
        if wrong && self.sync.resync_at.is_none() {
            tracing::warn!(
                "a job seems to be over and the kernel has members of it: the forest is taken anew"
            );
            self.counts.synced = false;
            self.resync_later();
        }
    }
}
