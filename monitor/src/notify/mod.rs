//! From an alert of the policy to its receivers, in effect once: kept on disk before it is accepted, sent until it is
//! taken. When something is an alert, and when it ends, is decided in `policy`; further routing is Alertmanager's.

mod clock;
mod queue;
mod queue_recovery;
mod queue_worker;
mod send;
mod store;
mod worker;

#[cfg(test)]
mod queue_tests;
#[cfg(test)]
mod receiver_tests;
#[cfg(test)]
mod recovery_tests;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

pub use self::clock::{Clock, Millis};
use self::queue::{Filter, MAX_EPISODES};
use self::queue_worker::{Command, EXPIRE_EVERY, Keeper, QueueStats};
use self::send::Target;
pub use self::send::{DeliveryResult, Reason, TargetError};
use self::worker::{Stats, Worker};
use crate::config::{Config, Receiver};
use crate::metrics::Notifications;
use crate::model::schema::{self, Alert, AlertKind, AlertState, Severity};
use crate::model::stats::StoreNumbers;

/// Commands that may wait for the thread; who has more to say waits.
const MAX_COMMANDS: usize = 1024;
/// A disk that takes nothing is tried again this often.
const RETRY_EVERY: Millis = 1_000;

/// Delivery could not be started, or its new config not be taken.
#[derive(Debug, thiserror::Error)]
pub enum AlertError {
    #[error(transparent)]
    Target(#[from] TargetError),
    #[error("the thread of the alerts' store cannot be started: {0}")]
    Thread(std::io::Error),
}

/// The alert is not on the disk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The disk did not take it. It is kept in memory, sent from there, and written as soon as that is possible.
    #[error("{0}")]
    Storage(String),
    /// There are too many that may not be forgotten. It was not kept.
    #[error("no room for another alert: {kept} are kept")]
    Full { kept: usize },
    #[error("the alert cannot be written as JSON: {0}")]
    Json(String),
    #[error("the delivery of alerts has stopped")]
    Stopped,
}

/// An alert to be kept and delivered.
#[derive(Clone, Debug, PartialEq)]
pub struct Submission {
    pub alert: Alert,
    /// It is on the disk at once, and sent after this time, or as soon as it is submitted again: what is still being
    /// found out about it goes out with it, in one message, and a crash in between loses nothing.
    pub hold: Option<Duration>,
}

impl From<Alert> for Submission {
    fn from(alert: Alert) -> Self {
        Self { alert, hold: None }
    }
}

/// An alert that somebody did not get yet.
#[derive(Clone, Debug, PartialEq)]
pub struct Undelivered {
    pub alert: Alert,
    pub undelivered: Vec<schema::Undelivered>,
}

/// What a test alert brought back.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NotifyReport {
    pub receiver: String,
    pub delivered: bool,
    /// One for the test alert's firing and one for its end.
    pub answers: Vec<String>,
    pub took_s: f64,
}

/// The delivery of alerts: one thread for the queue, one task for each receiver. Clones are the same one.
#[derive(Clone)]
pub struct AlertService {
    inner: Arc<Inner>,
}

struct Inner {
    commands: mpsc::Sender<Command>,
    board: Arc<Mutex<QueueStats>>,
    changed: watch::Receiver<u64>,
    error: watch::Receiver<Option<String>>,
    clock: Clock,
    running: Mutex<BTreeMap<String, Running>>,
    thread: Mutex<Option<thread::JoinHandle<()>>>,
}

/// One receiver at work.
struct Running {
    config: Receiver,
    target: Arc<Target>,
    stats: Arc<Mutex<Stats>>,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

/// Damaged stores that were moved aside, as long as they are there.
#[must_use]
pub fn damaged(state_dir: &Path) -> Vec<std::path::PathBuf> {
    store::damaged(state_dir)
}

/// Why receivers of `cfg` cannot be used here: certificates or secrets are missing. [`AlertService::start`] would refuse the first
/// of them. Opens no connection.
#[must_use]
pub fn check(cfg: &Config) -> Vec<TargetError> {
    cfg.receivers.iter().filter_map(|r| Target::new(r).err()).collect()
}

impl AlertService {
    /// Opens the store in `state_dir` and starts to send what is still owed. To be called in a tokio runtime. A store that is
    /// damaged is replaced; one that cannot be opened is an error of [`storage_error`](Self::storage_error), and tried again.
    ///
    /// # Errors
    /// A receiver's file cannot be read: nothing was started.
    pub fn start(cfg: &Config, state_dir: &Path, clock: Clock) -> Result<Self, AlertError> {
        let targets = targets(cfg)?;
        let (commands, inbox) = mpsc::channel(MAX_COMMANDS);
        let (news, changed) = watch::channel(0);
        let (storage, error) = watch::channel(None);
        let board = Arc::new(Mutex::new(QueueStats::default()));
        let keeper = Keeper::open(state_dir, filters(cfg), clock.clone(), Arc::clone(&board), news, storage);
        let thread = thread::Builder::new()
            .name("alerts".into())
            .spawn(move || keeper.run(inbox))
            .map_err(AlertError::Thread)?;
        let inner = Inner {
            commands,
            board,
            changed,
            error,
            clock,
            running: Mutex::default(),
            thread: Mutex::new(Some(thread)),
        };
        let center = Self { inner: Arc::new(inner) };
        for (receiver, target) in targets {
            center.start_worker(receiver, target, None);
        }
        center.start_ticks();
        Ok(center)
    }

    fn start_worker(&self, config: Receiver, target: Target, before: Option<Running>) {
        let target = Arc::new(target);
        let (stop, stopped) = watch::channel(false);
        let (stats, before) = before.map_or_else(Default::default, |b| (b.stats, Some(b.task)));
        let worker = Worker {
            name: config.name.clone(),
            target: Arc::clone(&target),
            clock: self.inner.clock.clone(),
            commands: self.inner.commands.clone(),
            stats: Arc::clone(&stats),
            changed: self.inner.changed.clone(),
            stop: stopped,
            before,
        };
        let task = tokio::spawn(worker.run());
        lock(&self.inner.running).insert(config.name.clone(), Running { config, target, stats, stop, task });
    }

    fn start_ticks(&self) {
        // Of the center it holds nothing, so that the thread ends with it.
        let commands = self.inner.commands.downgrade();
        let (mut error, clock) = (self.inner.error.clone(), self.inner.clock.clone());
        tokio::spawn(async move {
            while let Some(c) = commands.upgrade()
                && c.send(Command::Tick).await.is_ok()
            {
                drop(c);
                let next = if error.borrow_and_update().is_some() { RETRY_EVERY } else { EXPIRE_EVERY };
                tokio::select! {
                    () = clock.sleep(next) => {}
                    // At once would be as often as the disk refuses.
                    r = error.changed() => match r {
                        Ok(()) => clock.sleep(RETRY_EVERY).await,
                        Err(_) => return,
                    }
                }
            }
        });
    }

    /// Takes an alert as it stands now: fired, changed or resolved. Pending ones are nobody's business. When this returns
    /// `Ok` it is on the disk.
    ///
    /// # Errors
    /// See [`SubmitError`]; nothing panics and nothing stops, whatever the disk does.
    pub async fn submit(&self, alert: &Alert) -> Result<(), SubmitError> {
        self.submit_all(vec![alert.clone()]).await
    }

    /// As [`submit`](Self::submit), in one transaction.
    pub async fn submit_all(&self, alerts: Vec<Alert>) -> Result<(), SubmitError> {
        self.submit_each(alerts.into_iter().map(Submission::from).collect()).await
    }

    /// As [`submit_all`](Self::submit_all), each held as it says.
    pub async fn submit_each(&self, all: Vec<Submission>) -> Result<(), SubmitError> {
        if all.is_empty() {
            return Ok(());
        }
        self.ask(|reply| Command::Submit { all, reply }).await.unwrap_or(Err(SubmitError::Stopped))
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.inner.commands.send(command(reply)).await.ok()?;
        answer.await.ok()
    }

    /// The alerts that fired at the last stop, for the engine to go on with.
    pub async fn restore(&self) -> Vec<Alert> {
        self.ask(|reply| Command::Firing { reply }).await.unwrap_or_default()
    }

    /// Past alerts, the newest first; those that ended at or after `since` (milliseconds since the epoch).
    pub async fn history(&self, since: Option<Millis>) -> Vec<Alert> {
        self.ask(|reply| Command::History { since, reply }).await.unwrap_or_default()
    }

    /// What receivers did not get yet, the parked included, oldest first.
    pub async fn undelivered(&self) -> Vec<Undelivered> {
        self.ask(|reply| Command::Undelivered { reply }).await.unwrap_or_default()
    }

    /// What the disk said when it last refused to take something; None once it takes it again.
    #[must_use]
    pub fn storage_error(&self) -> watch::Receiver<Option<String>> {
        self.inner.error.clone()
    }

    /// How many deliveries are still tried, over all receivers.
    #[must_use]
    pub fn pending(&self) -> u64 {
        lock(&self.inner.board).counts.values().map(|c| c.pending).sum()
    }

    /// How much of the queue is taken by what may not be forgotten; history makes room by itself.
    #[must_use]
    pub fn store(&self) -> StoreNumbers {
        let board = lock(&self.inner.board);
        StoreNumbers {
            store: "alert_queue",
            entries: board.held as u64,
            max: MAX_EPISODES as u64,
            evictions: board.dropped.values().sum(),
        }
    }

    /// The numbers of `/metrics`, by receiver's name. Waits for nobody.
    #[must_use]
    pub fn notifications(&self) -> Vec<Notifications> {
        let board = lock(&self.inner.board);
        let running = lock(&self.inner.running);
        let of = |(name, r): (&String, &Running)| {
            let counts = board.counts.get(name).copied().unwrap_or_default();
            let stats = lock(&r.stats);
            Notifications {
                receiver: name.clone(),
                sent: stats.sent,
                failed: stats.failed.iter().map(|(r, n)| (r.as_str().to_owned(), *n)).collect(),
                pending: counts.pending,
                parked: counts.parked,
                dropped: board.dropped.get(name).copied().unwrap_or_default(),
                duration: stats.duration.clone(),
            }
        };
        running.iter().map(of).collect()
    }

    /// Sends a test alert, and its end, to one receiver past queue and filters. None if there is no such receiver.
    pub async fn notify(&self, receiver: &str) -> Option<NotifyReport> {
        let target = lock(&self.inner.running).get(receiver).map(|r| Arc::clone(&r.target))?;
        let started = Instant::now();
        let now = self.inner.clock.now();
        let mut alert = test_alert(now);
        let mut fates = target.send(std::slice::from_ref(&alert), now).await;
        if matches!(fates.first(), Some(DeliveryResult::Delivered { .. })) {
            alert.state = AlertState::Resolved;
            alert.resolved_at = Some(clock::rfc3339(self.inner.clock.now()));
            fates.extend(target.send(&[alert], now).await);
        }
        Some(NotifyReport {
            receiver: receiver.into(),
            delivered: fates.iter().all(|f| matches!(f, DeliveryResult::Delivered { .. })),
            answers: fates
                .into_iter()
                .map(|f| match f {
                    DeliveryResult::Delivered { answer } => answer,
                    DeliveryResult::Failed { error, .. } | DeliveryResult::Refused { error } => error,
                })
                .collect(),
            took_s: started.elapsed().as_secs_f64(),
        })
    }

    /// Takes over the receivers of a new config. Queue and progress stay; receivers that did not change go on; what was
    /// parked is tried once more.
    ///
    /// # Errors
    /// A receiver's file cannot be read: nothing was changed.
    pub async fn reload(&self, cfg: &Config) -> Result<(), AlertError> {
        let targets = targets(cfg)?;
        let mut old = std::mem::take(&mut *lock(&self.inner.running));
        let mut changed = Vec::new();
        for (config, target) in targets {
            match old.remove(&config.name) {
                Some(same) if same_config(&same.config, &config) => {
                    lock(&self.inner.running).insert(config.name.clone(), same);
                }
                before => changed.push((config, target, before)),
            }
        }
        for gone in old.values().chain(changed.iter().filter_map(|(_, _, b)| b.as_ref())) {
            gone.stop.send_replace(true);
        }
        // Before the new workers start, so that none asks for what it does not own yet.
        let filters = filters(cfg);
        self.ask(|reply| Command::Receivers { filters, reply }).await;
        for (config, target, before) in changed {
            self.start_worker(config, target, before);
        }
        Ok(())
    }

    /// Ends within about `grace`: what is being sent may end, what is not answered by then is sent again at the next
    /// start.
    pub async fn stop(&self, grace: Duration) {
        let running = std::mem::take(&mut *lock(&self.inner.running));
        for r in running.values() {
            r.stop.send_replace(true);
        }
        let deadline = tokio::time::Instant::now() + grace;
        for mut r in running.into_values() {
            if tokio::time::timeout_at(deadline, &mut r.task).await.is_err() {
                r.task.abort();
            }
        }
        self.ask(|reply| Command::Stop { reply }).await;
        let thread = lock(&self.inner.thread).take();
        if let Some(t) = thread {
            // It has answered, so it is about to end.
            let _ = tokio::task::spawn_blocking(move || t.join()).await;
        }
    }
}

impl std::fmt::Debug for AlertService {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AlertService").finish_non_exhaustive()
    }
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    // All that is under these locks is whole at every moment, so a panic elsewhere spoils nothing.
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

fn targets(cfg: &Config) -> Result<Vec<(Receiver, Target)>, TargetError> {
    cfg.receivers.iter().map(|r| Ok((r.clone(), Target::new(r)?))).collect()
}

fn filters(cfg: &Config) -> Vec<Filter> {
    let filter = |r: &Receiver| Filter {
        name: r.name.clone(),
        kinds: r.kinds.clone(),
        min_severity: r.min_severity,
        send_resolved: r.send_resolved,
        resend: Target::resends(&r.kind),
    };
    cfg.receivers.iter().map(filter).collect()
}

/// A certificate is read when the client is made, so a receiver with a `ca_file` is made anew.
fn same_config(a: &Receiver, b: &Receiver) -> bool {
    use crate::config::ReceiverKind::{Alertmanager, Exec, Pagerduty, Webhook};
    let ca = match &b.kind {
        Alertmanager { ca_file, .. } | Pagerduty { ca_file, .. } | Webhook { ca_file, .. } => {
            ca_file.as_ref()
        }
        Exec { .. } => None,
    };
    a == b && ca.is_none()
}

fn test_alert(now: Millis) -> Alert {
    let host = crate::sources::host::hostname();
    let id = format!("{:016x}", (now as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let label = |k: &str, v: &str| (k.to_owned(), v.to_owned());
    Alert {
        labels: BTreeMap::from([
            label("alertname", "JobwardenTest"),
            label("alert_id", &id),
            label("instance", &host),
            label("severity", Severity::Info.as_str()),
        ]),
        id,
        kind: AlertKind::Zombie,
        state: AlertState::Firing,
        severity: Severity::Info,
        job: None,
        job_name: String::new(),
        subject: None,
        count: 0,
        since: clock::rfc3339(now),
        resolved_at: None,
        summary: format!("A test by `jobwarden notify` on {host}: nothing is wrong"),
        cause: None,
    }
}
