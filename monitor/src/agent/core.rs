//! The one task that owns the engine: it hands over the ring's records, the time and the answers from /proc, and does
//! or passes on what the engine wants done. Everything slow (reading a process's memory, killing, explaining, sending)
//! runs beside it and comes back as an [`Internal`] message, so the ring is always read in time.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::time::Instant;

use super::missed_reaps::MissedReaps;
use super::proc_reader::ProcReader;
use super::recorded_engine::RecordedEngine;
use super::reload::Reloads;
use super::service_manager::ServiceManager;
use super::storage::{Source, Storage};
use super::sync::Sync;
use super::{AgentError, Options};
use crate::api::{Feed, Peer, Readiness, Reloaded, Reply, Request};
use crate::config::Config;
use crate::enforce::{Audit, Enforcer};
use crate::engine::forest::Facts;
use crate::engine::{AlertChange, Change, Effect, EventContext, Gauges, Input, Observation, Output};
use crate::metrics::Counts;
use crate::model::event::{self, Body, Event};
use crate::model::key::Key;
use crate::model::kill::Reason;
use crate::model::schema::{Alert, AlertKind, Cause, EventLine, JobId};
use crate::notify::{AlertService, Submission};
use crate::redact::Redactor;
use crate::sources::host;
use crate::sources::kernel::{Kernel, Ring};
use crate::state::{Kill, Report, StateWriter};

/// How often the loss counters are read, and programs that the kernel skipped counted.
const CHECK: Duration = Duration::from_secs(1);
/// Records that are expected together, and handled with one reading of the clock.
const BATCH: usize = 64;
/// Most records that one drain handles, so that a flood cannot keep the core from everything else.
const DRAIN_MAX: usize = 128 * BATCH;
/// How long a new alert waits for its cause before it is sent without.
const CAUSE_WAIT: Duration = Duration::from_millis(700);
/// It is on the disk meanwhile, held back for a little longer than that: the core says when the wait is over.
const HOLD: Duration = Duration::from_millis(1_500);
/// What a look shows may ask for another one at once; the rest waits for the next turn.
const LOOKS_A_TURN: usize = 8;
/// And no more once they have taken this long: before what a look saw is told, the ring is read up to it, which takes its
/// time when it is full.
const LOOKS_TIME: Duration = Duration::from_millis(20);
/// Keys whose facts are read by one blocking task: one process that blocks its readers holds up only so many.
const FACTS_BATCH: usize = 64;
/// How long such a task waits for its turn at most.
const FACTS_WAIT: Duration = Duration::from_secs(1);

/// What comes back from the work that runs beside the core.
#[derive(Debug)]
pub(super) enum Internal {
    Facts(Vec<(Key, Option<Facts>)>),
    Cgroups(Vec<Observation>),
    Cause {
        alert: String,
        cause: Option<Box<Cause>>,
    },
    /// A kill is over. `job` is None for one of processes, `root` and what descends from it, whatever job they are in.
    Killed {
        job: Option<JobId>,
        root: Key,
        reason: Reason,
        whole: bool,
        /// Its place in [`Core::kills`].
        order: Option<u64>,
        result: Result<Box<crate::enforce::Outcome>, String>,
    },
    /// The state was written or could not be, or files of the state directory are damaged.
    Saved(Report),
    /// The client of this `exec` job did not get the reply to its registration.
    Unheard(JobId),
    /// An alert could not be stored, or could be again.
    Storage(Option<String>),
    /// Stores outside of the engine are full, or have room again.
    Full(Option<String>),
    Reloaded {
        result: Result<Box<Config>, String>,
        peer: Option<Peer>,
        reply: Option<Reply<Reloaded>>,
    },
    Scrape(oneshot::Sender<(Gauges, Counts)>),
}

pub(super) struct Core {
    pub engine: RecordedEngine,
    pub kernel: Arc<Kernel>,
    pub proc_reader: ProcReader,
    pub enforcer: Enforcer,
    pub audit: Arc<Audit>,
    pub center: AlertService,
    /// To the task that hands alerts over for delivery, one after the other.
    pub alerts: mpsc::UnboundedSender<Submission>,
    pub redact: Arc<Redactor>,
    pub feed: Feed,
    pub counts: Counts,
    pub config: Config,
    pub options: Options,
    pub started: u64,
    pub boot_id: String,
    pub ready: watch::Sender<Readiness>,
    pub internal: mpsc::UnboundedSender<Internal>,
    /// Where all that takes time runs.
    pub beside: Handle,
    pub causes: super::cause::CauseCache,
    /// New alerts that wait for their cause, as they are to be sent.
    waiting: HashMap<String, Alert>,
    /// Jobs that are labelled but could not be: what went wrong, for whoever asked.
    pub label_error: Option<String>,
    /// The cgroups that jobs of `exec --cgroup` own.
    pub cgroups: HashMap<JobId, PathBuf>,
    /// What operators have ordered and is not done, in the order of its coming.
    pub(super) kills: BTreeMap<u64, Kill>,
    pub(super) service_manager: ServiceManager,
    pub(super) writer: StateWriter,
    pub(super) storage: Storage,
    pub(super) reloads: Reloads,
    /// What is to be saved has changed since the last state was given to the writer.
    pub(super) state_dirty: bool,
    /// Of the change, what must survive a power cut.
    pub(super) word_changed: bool,
    facts_wanted: Vec<Key>,
    facts_turns: Arc<Semaphore>,
    cgroups_wanted: Vec<(Key, u64)>,
    pub(super) looks_wanted: Vec<Key>,
    /// Time of the last record that was read.
    read_to: u64,
    pub(super) sync: Sync,
    pub(super) reaps: MissedReaps,
    /// Lost records that an earlier agent has told of.
    told: u64,
}

/// What [`Core::new`] is made of.
pub(super) struct Parts {
    pub engine: RecordedEngine,
    pub kernel: Arc<Kernel>,
    pub proc_reader: ProcReader,
    pub enforcer: Enforcer,
    pub audit: Arc<Audit>,
    pub center: AlertService,
    /// To the task that hands alerts over for delivery, one after the other.
    pub alerts: mpsc::UnboundedSender<Submission>,
    pub redact: Arc<Redactor>,
    pub config: Config,
    pub options: Options,
    pub boot_id: String,
    pub ready: watch::Sender<Readiness>,
    pub internal: mpsc::UnboundedSender<Internal>,
    /// Where all that takes time runs.
    pub beside: Handle,
    pub writer: StateWriter,
    /// Lost records that an earlier agent has told of.
    pub told: u64,
    /// Kills that an earlier agent was killed over.
    pub kills: Vec<Kill>,
}

impl Core {
    pub(super) fn new(p: Parts) -> Self {
        let mut counts = Counts { reload_ok: true, ..Counts::default() };
        counts.reload_at = wall_seconds();
        let holders = Arc::clone(&p.kernel) as Arc<dyn crate::why::Holders>;
        Self {
            causes: super::cause::CauseCache::new(p.proc_reader.clone(), holders),
            engine: p.engine,
            kernel: p.kernel,
            proc_reader: p.proc_reader,
            enforcer: p.enforcer,
            audit: p.audit,
            center: p.center,
            alerts: p.alerts,
            redact: p.redact,
            feed: Feed::default(),
            counts,
            config: p.config,
            options: p.options,
            started: host::boot_now(),
            boot_id: p.boot_id,
            ready: p.ready,
            internal: p.internal,
            beside: p.beside,
            waiting: HashMap::new(),
            label_error: None,
            cgroups: HashMap::new(),
            kills: (0..).zip(p.kills).collect(),
            service_manager: ServiceManager::from_env(),
            writer: p.writer,
            storage: Storage::default(),
            reloads: Reloads::default(),
            // So that a disk that takes nothing is known from the start.
            state_dirty: true,
            word_changed: false,
            facts_wanted: Vec::new(),
            facts_turns: Arc::new(Semaphore::new(
                std::thread::available_parallelism().map_or(1, usize::from),
            )),
            cgroups_wanted: Vec::new(),
            looks_wanted: Vec::new(),
            read_to: 0,
            sync: Sync::default(),
            reaps: MissedReaps::default(),
            told: p.told,
        }
    }

    /// Runs until `stop` says so.
    pub(super) async fn run(
        mut self,
        mut ring: Ring,
        mut requests: mpsc::Receiver<Request>,
        mut internal: mpsc::UnboundedReceiver<Internal>,
        mut stop: watch::Receiver<bool>,
        mut reload: mpsc::Receiver<()>,
    ) -> Result<(), AgentError> {
        self.first_sync(&mut ring, self.told)?;
        // An earlier agent's: each stays written down until it is begun anew, or is over.
        for place in self.kills.keys().copied().collect::<Vec<_>>() {
            if let Some(k) = self.kills.remove(&place) {
                super::kill::resume(&mut self, k);
            }
        }
        self.settle(&mut ring);
        let mut check = tokio::time::interval(CHECK);
        check.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            // However busy the ring is, each turn answers one who asked: a bomb must not keep its own end waiting.
            if let Ok(r) = requests.try_recv() {
                self.request(r, &mut ring);
            }
            if let Ok(m) = internal.try_recv() {
                self.message(m, &mut ring);
            }
            let wake = if self.looks_wanted.is_empty() { self.engine.next_wake() } else { Some(0) };
            let wake =
                wake.map(|at| Instant::now() + Duration::from_nanos(at.saturating_sub(host::boot_now())));
            tokio::select! {
                r = stop.changed() => {
                    if r.is_err() || *stop.borrow() { break }
                }
                r = ring.readable() => {
                    r.map_err(AgentError::Ring)?;
                    self.drain(&mut ring);
                }
                Some(m) = internal.recv() => self.message(m, &mut ring),
                Some(r) = requests.recv() => self.request(r, &mut ring),
                () = at(wake) => self.tick(),
                () = at(self.sync.resync_at) => self.resync("loss", &mut ring),
                _ = check.tick() => self.check(&mut ring),
                Some(()) = reload.recv() => self.reload(None, None),
            }
            self.settle(&mut ring);
        }
        self.service_manager.stopping();
        self.drain(&mut ring);
        self.settle(&mut ring);
        self.stop().await;
        Ok(())
    }

    fn request(&mut self, r: Request, ring: &mut Ring) {
        // An answer knows of all that happened before it was asked for.
        self.drain(ring);
        super::answer::answer(self, r);
    }

    fn message(&mut self, m: Internal, ring: &mut Ring) {
        if matches!(m, Internal::Scrape(_)) {
            self.drain(ring);
        }
        self.internal(m);
    }

    /// Reads what is in the ring, up to a bound of its own. A job is labelled at once, and its exec record is kept in the ring
    /// until its registration is saved: after a SIGKILL in between, the record comes again. Nothing waits for the disk: what
    /// comes behind a kept record is read all the same.
    pub(super) fn drain(&mut self, ring: &mut Ring) -> usize {
        self.release_saved(ring);
        let (mut out, mut forkers) = (Output::default(), Vec::new());
        let mut read = 0;
        while read < DRAIN_MAX {
            // Reading the clock costs more than handling a record.
            let now = host::boot_now();
            forkers.clear();
            forkers.extend(ring.unread().take(BATCH).filter_map(event::forker));
            self.engine.expect(&forkers);
            let batch = ring.drain_keeping(BATCH, &mut |bytes| match event::decode(bytes) {
                Ok(e) => self.event(&e, bytes, now, &mut out),
                Err(e) => {
                    tracing::error!(error = %e, "a record of the ring is unreadable");
                    None
                }
            });
            read += batch;
            if batch < BATCH {
                break;
            }
        }
        self.apply(out);
        read
    }

    /// The number of the state that must be saved before the record is let go, if it registered a job.
    fn event(&mut self, e: &Event<'_>, bytes: &[u8], now: u64, out: &mut Output) -> Option<u64> {
        self.read_to = e.at;
        self.counts.events[usize::from(e.kind())] += 1;
        // What pinned maps kept from before the start did not lag; it waited for an agent.
        if e.at >= self.started {
            self.counts.event_lag.observe(now.saturating_sub(e.at) as f64 / 1e9);
        }
        let moment = self.engine.event_context(e);
        let before = self.feed.chain(self.engine.named_jobs(e.process));
        self.engine.handle(Input::Record { event: e, bytes }, e.at, out);
        // A fork's child has its jobs only now, a reaped process only before.
        let jobs = before.or_else(|| self.feed.chain(self.engine.named_jobs(e.process)));
        if !matches!(e.body, Body::Reap { .. }) || self.reaps.came(e.process) {
            self.feed.publish(e, bytes, moment, jobs, &event_formatter(&self.engine, &self.redact));
        }
        let registers = out.effects.iter().any(|f| matches!(f, Effect::LabelJob(_)));
        if registers || out.effects.iter().any(|f| matches!(f, Effect::EnterProcess { .. })) {
            let taken = std::mem::take(out);
            self.apply(taken);
        }
        registers.then(|| self.unsaved())
    }

    fn tick(&mut self) {
        let mut out = Output::default();
        self.engine.handle(Input::Tick, host::boot_now(), &mut out);
        self.apply(out);
    }

    /// Does what the engine wants done. Looks and facts are only collected; [`Self::settle`] sees to them.
    pub(super) fn apply(&mut self, out: Output) {
        for change in out.changes {
            self.apply_change(change);
        }
        for effect in out.effects {
            match effect {
                Effect::Look(key) => self.looks_wanted.push(key),
                Effect::ReadFacts(key) => self.facts_wanted.push(key),
                Effect::ReadCgroup { key, id } => self.cgroups_wanted.push((key, id)),
                Effect::LabelJob(job) => {
                    if let Err(e) = self.label(&job) {
                        tracing::error!(job = %job.id, error = %e, "the job could not be entered into the kernel");
                        self.label_error = Some(e.to_string());
                    }
                    tracing::info!(job = %job.id, name = %job.name, "job registered");
                }
                Effect::EnterProcess { process, parent, job, missed } => {
                    self.enter(process, parent, job, missed);
                }
                Effect::CountMembers(number) => self.sync.emptied.push(number),
                Effect::Kill(order) => super::kill::policy(self, *order),
            }
        }
        self.save();
    }

    fn apply_change(&mut self, change: Change) {
        match change {
            Change::Job(_) => self.state_dirty = true,
            Change::Enforcement(_) => (self.state_dirty, self.word_changed) = (true, true),
            Change::JobEnded(job) => {
                self.state_dirty = true;
                self.cgroups.remove(&job.id);
                if let Err(e) = crate::enforce::Lineage::forget(&*self.kernel, job.number) {
                    tracing::warn!(job = %job.id, error = %e, "the job could not be taken out of the kernel");
                }
                let took = job.ended.saturating_sub(job.started) as f64 / 1e9;
                tracing::info!(job = %job.id, name = %job.name, outcome = job.outcome.as_str(), took_s = took, "job ended");
            }
            Change::Alert { change, alert } => self.alert(change, *alert),
        }
    }

    fn label(&self, job: &crate::engine::JobRecord) -> std::io::Result<()> {
        crate::enforce::Lineage::label(&*self.kernel, job.number, job.outer, job.id.root)
    }

    /// Not `apply`: an alert about what is done there must not come back to it. It is submitted like any other.
    pub(super) fn alerts_of(&mut self, out: Output) {
        for change in out.changes {
            if let Change::Alert { change, alert } = change {
                self.alert(change, *alert);
            }
        }
    }

    pub(super) fn alert(&mut self, change: AlertChange, mut alert: Alert) {
        alert.subject.iter_mut().for_each(|p| self.proc_reader.show(p));
        self.redact.alert(&mut alert);
        match change {
            AlertChange::Pending | AlertChange::Dropped => {}
            AlertChange::Fired if matches!(alert.kind, AlertKind::Zombie | AlertKind::Orphan) => {
                tracing::warn!(alert = %alert.id, kind = %alert.kind, job = %alert.job_name, "{}", alert.summary);
                let id = alert.id.clone();
                // At once: one that was only in memory would be lost by a SIGKILL, if it is cured while nobody watches.
                let _ = self.alerts.send(Submission { alert: alert.clone(), hold: Some(HOLD) });
                self.waiting.insert(id.clone(), alert);
                super::cause::of_alert(self, id, CAUSE_WAIT);
            }
            AlertChange::Fired => {
                tracing::warn!(alert = %alert.id, kind = %alert.kind, job = %alert.job_name, "{}", alert.summary);
                self.submit(alert);
            }
            AlertChange::Updated => match self.waiting.get_mut(&alert.id) {
                Some(w) => *w = alert,
                None => self.submit(alert),
            },
            AlertChange::Resolved => {
                tracing::info!(alert = %alert.id, kind = %alert.kind, job = %alert.job_name, "resolved: {}", alert.summary);
                self.waiting.remove(&alert.id);
                self.submit(alert);
            }
        }
    }

    fn submit(&self, alert: Alert) {
        // The task ends after this one.
        let _ = self.alerts.send(alert.into());
    }

    fn internal(&mut self, m: Internal) {
        let now = host::boot_now();
        let mut out = Output::default();
        match m {
            Internal::Facts(all) => {
                for (key, facts) in all {
                    self.engine.handle(
                        Input::Observation(Cow::Owned(Observation::Facts { key, facts })),
                        now,
                        &mut out,
                    );
                }
            }
            Internal::Cgroups(all) => {
                for o in all {
                    self.engine.handle(Input::Observation(Cow::Owned(o)), now, &mut out);
                }
            }
            Internal::Cause { alert, cause } => {
                if let Some(cause) = cause {
                    self.engine.handle(
                        Input::Cause { alert: Cow::Borrowed(&alert), cause: Cow::Borrowed(&cause) },
                        now,
                        &mut out,
                    );
                }
                self.apply(std::mem::take(&mut out));
                if let Some(a) = self.waiting.remove(&alert) {
                    self.submit(a);
                }
            }
            Internal::Killed { job, root, reason, whole, order, result } => {
                if order.is_some_and(|o| self.kills.remove(&o).is_some()) {
                    self.state_dirty = true;
                }
                if let Ok(o) = &result {
                    for (k, n) in &o.signals {
                        *self.counts.signals_sent.entry(*k).or_default() += n;
                    }
                }
                let report =
                    result.as_ref().map(|o| Cow::Borrowed(&o.report)).map_err(|e| Cow::Borrowed(e.as_str()));
                let input = if let Some(job) = job {
                    let ended = result.as_ref().is_ok_and(|o| o.ended());
                    let outcome = if ended { "ended" } else { "survived" };
                    *self.counts.job_kills.entry((reason, outcome)).or_default() += 1;
                    Input::KillFinished { job, reason, whole, report }
                } else {
                    Input::ProcessKillFinished { root, report }
                };
                self.engine.handle(input, now, &mut out);
            }
            Internal::Saved(report) => self.saved(report),
            Internal::Unheard(job) => super::answer::unregister(self, job),
            Internal::Storage(wrong) => {
                if wrong.is_none() {
                    self.resubmit();
                }
                self.storage.set(Source::Alerts, wrong);
                self.tell_storage();
            }
            Internal::Full(wrong) => {
                self.sync.stores_full = wrong;
                self.capacity(&mut out);
            }
            Internal::Reloaded { result, peer, reply } => self.reloaded(result, peer, reply),
            Internal::Scrape(reply) => {
                let _ = reply.send((self.engine.gauges(now), self.counts.clone()));
            }
        }
        self.apply(out);
    }

    /// Looks at /proc for the engine. What happened before the look is handed over before what it saw: where the ring lags, a
    /// process that /proc has no more may still have children in it, and would be forgotten with its lineage.
    fn look(&mut self, ring: &mut Ring) {
        let wanted = std::mem::take(&mut self.looks_wanted);
        let seen: Vec<_> =
            wanted.into_iter().map(|k| (k, host::boot_now(), self.proc_reader.look(k))).collect();
        let until = host::boot_now();
        while self.drain(ring) == DRAIN_MAX && self.read_to < until {}
        let mut out = Output::default();
        for (key, at, seen) in seen {
            let Some(seen) = seen else {
                self.sync.unseen.push(key);
                continue;
            };
            let reap = self.before_reap(key, at);
            self.engine.handle(
                Input::Observation(Cow::Owned(Observation::Look { key, at, seen })),
                host::boot_now(),
                &mut out,
            );
            if let Some(reap) = reap.filter(|_| self.engine.is_gone(key)) {
                self.reaps.gone(key, reap);
            }
        }
        self.apply(out);
    }

    /// After each turn: what was only collected is sent off.
    fn settle(&mut self, ring: &mut Ring) {
        let begun = Instant::now();
        for _ in 0..LOOKS_A_TURN {
            if self.looks_wanted.is_empty() || begun.elapsed() > LOOKS_TIME {
                break;
            }
            self.look(ring);
        }
        // BackgroundTasks the core: the file is written under a lock that a slow change of cgroups holds.
        let wanted = std::mem::take(&mut self.cgroups_wanted);
        if !wanted.is_empty() {
            let (proc_reader, tx) = (self.proc_reader.clone(), self.internal.clone());
            self.beside.spawn_blocking(move || {
                let all = wanted.into_iter().map(|(k, id)| proc_reader.cgroup(k, id)).collect();
                let _ = tx.send(Internal::Cgroups(all));
            });
        }
        self.count_emptied(ring);
        if self.facts_wanted.is_empty() {
            return;
        }
        let wanted = std::mem::take(&mut self.facts_wanted);
        for keys in wanted.chunks(FACTS_BATCH) {
            let (keys, proc_reader, tx) = (keys.to_vec(), self.proc_reader.clone(), self.internal.clone());
            let turns = self.facts_turns.clone();
            self.beside.spawn(async move {
                // As many at a time as there are processors, so that the core keeps its own; readers that are held up keep the
                // others waiting no longer than this.
                let turn = tokio::time::timeout(FACTS_WAIT, turns.acquire_owned()).await;
                tokio::task::spawn_blocking(move || {
                    let all = keys.into_iter().map(|k| (k, proc_reader.facts(k))).collect();
                    let _ = tx.send(Internal::Facts(all));
                    drop(turn);
                });
            });
        }
    }

    async fn stop(mut self) {
        // Pins stay after a clean stop, and nobody is there to renew a doom or to see it through.
        if let Err(e) = self.kernel.stop_dooms() {
            tracing::error!(error = %e, "the dooms in force could not be ended; they expire by themselves");
        }
        // Who asked is told that the agent stops; only a crash leaves an order in force.
        self.kills.clear();
        self.save_last().await;
        for (_, alert) in std::mem::take(&mut self.waiting) {
            self.submit(alert);
        }
        if let Err(e) = self.engine.finish() {
            tracing::error!(error = %e, "the recording could not be finished");
        }
    }
}

/// Makes a line of `events`, secrets masked.
pub(super) fn event_formatter(
    engine: &RecordedEngine,
    redact: &Redactor,
) -> impl Fn(&Event<'_>, &EventContext, Option<JobId>) -> EventLine {
    |e, m, job| {
        let mut line = engine.event_line(e, m, job);
        redact.event_line(&mut line);
        line
    }
}

/// The file that is read without `--config`, if it is there.
pub(super) fn default_config() -> Option<PathBuf> {
    let p = PathBuf::from(crate::config::DEFAULT_PATH);
    p.exists().then_some(p)
}

pub(super) fn wall_seconds() -> f64 {
    (host::boot_now() + host::boot_to_wall()) as f64 / 1e9
}

/// A moment that may be never.
async fn at(when: Option<Instant>) {
    match when {
        Some(t) => tokio::time::sleep_until(t).await,
        None => std::future::pending().await,
    }
}
