//! One receiver's own task: takes what is owed, sends it, and says what became of it. A receiver that hangs or is down
//! holds up nobody but itself.

use std::collections::BTreeMap;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};

use super::clock::{Clock, Millis};
use super::queue::{LONGEST_WAIT, Outcome};
use super::queue_worker::{Command, Done, Item, Picked};
use super::send::{DeliveryResult, Reason, Target};
use crate::metrics::NOTIFICATION_BOUNDS;
use crate::model::stats::Histogram;

/// The first retry, doubled with each failure in a row, up to the longest.
const FIRST_RETRY: Millis = 1_000;
const LONGEST_RETRY: Millis = 60_000;
/// So many sends may follow each other at once before the spacing holds.
const BURST: Millis = 10;
/// With nothing to do the queue is asked again all the same.
const IDLE: Millis = 60_000;

/// What a receiver's metrics show.
#[derive(Clone, Debug)]
pub(super) struct Stats {
    pub(super) sent: u64,
    pub(super) failed: BTreeMap<Reason, u64>,
    pub(super) duration: Histogram,
}

impl Default for Stats {
    fn default() -> Self {
        let failed = Reason::ALL.into_iter().map(|r| (r, 0)).collect();
        Self { sent: 0, failed, duration: Histogram::new(NOTIFICATION_BOUNDS) }
    }
}

pub(super) struct Worker {
    pub(super) name: String,
    pub(super) target: Arc<Target>,
    pub(super) clock: Clock,
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) stats: Arc<Mutex<Stats>>,
    /// The queue has something new.
    pub(super) changed: watch::Receiver<u64>,
    pub(super) stop: watch::Receiver<bool>,
    /// The worker of the same name before this one: two at once could overtake each other.
    pub(super) before: Option<JoinHandle<()>>,
}

/// One send that has ended.
struct Sent {
    items: Vec<Item>,
    fates: Vec<DeliveryResult>,
    took: Duration,
}

#[derive(Default)]
struct Pace {
    failures: u32,
    /// Nothing is sent before.
    hold: Millis,
    next: Millis,
}

impl Worker {
    pub(super) async fn run(mut self) {
        if let Some(before) = self.before.take() {
            // Whether it ended well or was aborted, it is over.
            let _ = before.await;
        }
        self.land().await;
        let mut pace = Pace::default();
        let mut sends: JoinSet<Sent> = JoinSet::new();
        while !*self.stop.borrow() {
            self.changed.mark_unchanged();
            let now = self.clock.now();
            let mut wake = now + IDLE;
            if sends.len() < self.target.width() {
                let ready = pace.ready(now);
                if ready > now {
                    wake = ready;
                } else {
                    let Some(picked) = self.pick().await else { break };
                    if !picked.items.is_empty() {
                        pace.sent(now, self.target.spacing());
                        self.send(&mut sends, picked.items, now);
                        continue;
                    }
                    wake = picked.wake.unwrap_or(wake).min(wake);
                }
            }
            let holding = pace.ready(now) > now;
            tokio::select! {
                // An error here is the end of the sender: the center is gone.
                r = self.stop.changed() => if r.is_err() { break },
                r = self.changed.changed(), if !holding => if r.is_err() { break },
                Some(done) = sends.join_next() => self.finish(done.ok(), &mut pace).await,
                () = self.clock.sleep((wake - now).max(1)) => {}
            }
        }
        while let Some(done) = sends.join_next().await {
            self.finish(done.ok(), &mut pace).await;
        }
    }

    /// What is in flight, left by a worker before this one, is owed again.
    async fn land(&self) {
        let receiver = self.name.clone();
        // An error means that the thread has ended, and with it all of this.
        let _ = self.commands.send(Command::Land { receiver }).await;
    }

    async fn pick(&self) -> Option<Picked> {
        let (reply, answer) = oneshot::channel();
        let (receiver, max) = (self.name.clone(), self.target.batch());
        self.commands.send(Command::Pick { receiver, max, reply }).await.ok()?;
        answer.await.ok()
    }

    fn send(&self, sends: &mut JoinSet<Sent>, items: Vec<Item>, now: Millis) {
        let target = Arc::clone(&self.target);
        sends.spawn(async move {
            let started = std::time::Instant::now();
            let alerts: Vec<_> = items.iter().map(|i| i.alert.clone()).collect();
            let fates = target.send(&alerts, now).await;
            Sent { items, fates, took: started.elapsed() }
        });
    }

    async fn finish(&self, sent: Option<Sent>, pace: &mut Pace) {
        let Some(Sent { items, fates, took }) = sent else {
            // A send that panicked has not told what it carried; what is in flight beside it may be sent twice.
            return self.land().await;
        };
        let now = self.clock.now();
        self.count(&fates, took);
        pace.learn(&fates, now);
        let mut results = Vec::with_capacity(items.len());
        for (item, fate) in items.iter().zip(fates) {
            let outcome = self.outcome(item, fate, now);
            results.push(Done { seq: item.seq, version: item.version, outcome });
        }
        let (reply, answer) = oneshot::channel();
        let receiver = self.name.clone();
        if self.commands.send(Command::Done { receiver, results, reply }).await.is_ok() {
            // The thread answers, or has ended.
            let _ = answer.await;
        }
    }

    fn outcome(&self, item: &Item, fate: DeliveryResult, now: Millis) -> Outcome {
        let (receiver, alert) = (&self.name, &item.alert.id);
        match fate {
            DeliveryResult::Delivered { answer } => {
                tracing::debug!(%receiver, %alert, %answer, "alert delivered");
                Outcome::Delivered
            }
            DeliveryResult::Failed { error, .. } => {
                tracing::warn!(%receiver, %alert, %error, attempt = item.attempts + 1, "alert not delivered yet");
                Outcome::Later { not_before: now + backoff(item.attempts + 1), error }
            }
            DeliveryResult::Refused { error } => {
                tracing::error!(%receiver, %alert, %error, "alert refused and parked");
                Outcome::Refused { error }
            }
        }
    }

    fn count(&self, fates: &[DeliveryResult], took: Duration) {
        // A panic of another holder leaves counters, which are whole at every moment.
        let mut stats = self.stats.lock().unwrap_or_else(PoisonError::into_inner);
        stats.duration.observe(took.as_secs_f64());
        for f in fates {
            match f {
                DeliveryResult::Delivered { .. } => stats.sent += 1,
                DeliveryResult::Failed { reason, .. } => *stats.failed.entry(*reason).or_default() += 1,
                DeliveryResult::Refused { .. } => *stats.failed.entry(Reason::Refused).or_default() += 1,
            }
        }
    }
}

impl Pace {
    fn ready(&self, now: Millis) -> Millis {
        // A hold far off comes from a clock that was set back.
        if self.hold > now + LONGEST_WAIT { now } else { self.hold.max(self.next.min(now + LONGEST_WAIT)) }
    }

    fn sent(&mut self, now: Millis, spacing: Duration) {
        let spacing = spacing.as_millis() as Millis;
        self.next = self.next.max(now - (BURST - 1) * spacing) + spacing;
    }

    /// A receiver that is down is left alone, longer each time. A program that fails does so for one alert only.
    fn learn(&mut self, fates: &[DeliveryResult], now: Millis) {
        let down = fates.iter().filter_map(|f| match f {
            DeliveryResult::Failed { reason: Reason::Program, .. } => None,
            DeliveryResult::Failed { retry_after, .. } => Some(retry_after.unwrap_or_default()),
            _ => None,
        });
        match down.max() {
            None => self.failures = 0,
            Some(asked) => {
                self.failures += 1;
                let asked = (asked.as_millis() as Millis).min(LONGEST_WAIT);
                self.hold = now + backoff(self.failures).max(asked);
            }
        }
    }
}

/// 1, 2, 4, .. 60 s, each less up to half of it, so that many agents do not come back at once.
fn backoff(failures: u32) -> Millis {
    let full = (FIRST_RETRY << failures.saturating_sub(1).min(10)).min(LONGEST_RETRY);
    let random = RandomState::new().build_hasher().finish();
    full / 2 + (random % (full as u64 / 2 + 1)) as Millis
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_grows_to_a_minute_with_jitter() {
        for (n, full) in [(1, 1000), (2, 2000), (6, 32_000), (7, 60_000), (1000, 60_000)] {
            let all: Vec<_> = (0..50).map(|_| backoff(n)).collect();
            assert!(all.iter().all(|d| (full / 2..=full).contains(d)), "{n} {all:?}");
            assert!(all.iter().any(|d| *d != all[0]), "{n}");
        }
    }

    #[test]
    fn a_burst_and_then_the_spacing() {
        let mut p = Pace::default();
        let spacing = Duration::from_millis(500);
        let mut now = 1_000_000;
        let mut sent = 0;
        while p.ready(now) <= now {
            p.sent(now, spacing);
            sent += 1;
        }
        assert_eq!(sent, BURST);
        now += 60_000;
        let mut in_a_minute = 0;
        for _ in 0..60_000 {
            if p.ready(now) <= now {
                p.sent(now, spacing);
                in_a_minute += 1;
            }
            now += 1;
        }
        assert!((119..=130).contains(&in_a_minute), "{in_a_minute}");
    }

    #[test]
    fn what_the_receiver_asks_for_is_honoured_up_to_an_hour() {
        let fate = |s| DeliveryResult::Failed {
            reason: Reason::RateLimited,
            error: String::new(),
            retry_after: Some(Duration::from_secs(s)),
        };
        let mut p = Pace::default();
        p.learn(&[fate(120)], 5);
        assert_eq!(p.ready(6), 120_005);
        p.learn(&[fate(u64::MAX / 2000)], 5);
        assert_eq!(p.ready(5), LONGEST_WAIT + 5);
    }
}
