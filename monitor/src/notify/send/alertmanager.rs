//! Alertmanager, API v2. A cluster's peers do not share alerts with each other: each is posted to, and one that takes
//! them is enough. A firing alert that a peer missed is told again with all others; its end is told to that peer until it
//! takes it, or until the peer's own copy has ended by itself.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hyper::Uri;
use hyper::header::HeaderMap;
use serde::Serialize;
use tokio::time::Instant;

use super::http::{Client, TargetError};
use super::{DeliveryResult, Reason, text};
use crate::model::schema::{Alert, AlertState};
use crate::notify::clock::{parse_rfc3339, rfc3339};

/// Alertmanager ends an alert by itself when it was not told again by then.
const ENDS_AFTER: i64 = 4 * 60_000;
/// A peer that failed is left alone for so long while another takes the alerts, so that one that hangs slows nobody.
const REST: i64 = 20_000;

/// So long after an end was missed it is tried again.
const AGAIN: Duration = Duration::from_secs(3);
/// Ends kept for one peer; what is beyond ends there by itself.
const MAX_MISSED: usize = 2_048;
/// Of them in one request.
const MISSED_BATCH: usize = 64;

#[derive(Debug)]
pub(in crate::notify) struct Alertmanager {
    client: Arc<Client>,
    peers: Vec<Arc<Peer>>,
}

#[derive(Debug)]
struct Peer {
    url: Uri,
    /// Milliseconds since the epoch; 0 = it did not fail.
    failed_at: AtomicI64,
    /// By alert id: an end that only others took, and when its copy here ends by itself.
    missed: Mutex<BTreeMap<String, (Alert, Instant)>>,
    /// A task is at it.
    catching_up: AtomicBool,
}

impl Peer {
    fn missed(&self) -> MutexGuard<'_, BTreeMap<String, (Alert, Instant)>> {
        // The map is whole at every moment, so a panic elsewhere spoils nothing.
        self.missed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn told(&self, fate: &DeliveryResult, now: i64) {
        let failed = matches!(fate, DeliveryResult::Failed { .. });
        self.failed_at.store(if failed { now } else { 0 }, Ordering::Relaxed);
    }
}

/// `postableAlert` of its OpenAPI description.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Postable<'a> {
    labels: BTreeMap<&'a str, &'a str>,
    annotations: BTreeMap<&'static str, String>,
    starts_at: &'a str,
    ends_at: String,
}

impl Alertmanager {
    pub(super) fn new(client: Client, urls: &[String]) -> Result<Self, TargetError> {
        let peer = |u: &String| {
            let url = client.url(&format!("{}/api/v2/alerts", u.trim_end_matches('/')))?;
            Ok(Arc::new(Peer {
                url,
                failed_at: AtomicI64::new(0),
                missed: Mutex::default(),
                catching_up: AtomicBool::new(false),
            }))
        };
        let peers = urls.iter().map(peer).collect::<Result<_, TargetError>>()?;
        Ok(Self { client: Arc::new(client), peers })
    }

    pub(super) async fn post(&self, alerts: &[Alert], now: i64) -> DeliveryResult {
        let body: Vec<_> = alerts.iter().map(|a| postable(a, now)).collect();
        let Ok(body) = serde_json::to_vec(&body) else {
            return DeliveryResult::Refused { error: "the alert cannot be written as JSON".into() };
        };
        // What fires again has not ended: an end of before must not be told after this.
        for p in &self.peers {
            let mut missed = p.missed();
            for a in alerts {
                missed.remove(&a.id);
            }
        }
        let rests = |p: &Arc<Peer>| (0..REST).contains(&(now - p.failed_at.load(Ordering::Relaxed)));
        let all_rest = self.peers.iter().all(rests);
        let mut posts = tokio::task::JoinSet::new();
        let (mut fates, mut settled) = (Vec::new(), vec![false; self.peers.len()]);
        for (i, p) in self.peers.iter().enumerate().filter(|(_, p)| all_rest || !rests(p)) {
            let post = self.client.post(&p.url, body.clone(), HeaderMap::new());
            posts.spawn(async move { (i, post.await) });
        }
        while let Some(done) = posts.join_next().await {
            let Ok((i, fate)) = done else { continue };
            if let (Some(p), Some(settled)) = (self.peers.get(i), settled.get_mut(i)) {
                p.told(&fate, now);
                *settled = !matches!(fate, DeliveryResult::Failed { .. });
            }
            fates.push(fate);
        }
        let fate = combine(fates);
        // Taken by nobody it comes again, for all of them.
        if matches!(fate, DeliveryResult::Delivered { .. }) {
            for (p, _) in self.peers.iter().zip(settled).filter(|(_, settled)| !settled) {
                self.remember(p, alerts);
            }
        }
        fate
    }

    /// The ends among `alerts` are told to this peer later.
    fn remember(&self, peer: &Arc<Peer>, alerts: &[Alert]) {
        let ended = Instant::now() + Duration::from_millis(ENDS_AFTER.unsigned_abs());
        {
            let mut missed = peer.missed();
            for a in alerts.iter().filter(|a| a.state == AlertState::Resolved) {
                if missed.len() < MAX_MISSED {
                    missed.insert(a.id.clone(), (a.clone(), ended));
                }
            }
            if missed.is_empty() || peer.catching_up.swap(true, Ordering::Relaxed) {
                return;
            }
        }
        tokio::spawn(catch_up(Arc::clone(&self.client), Arc::clone(peer)));
    }
}

/// Tells a peer the ends that it missed, until it has them all or needs them no more. One that fires again meanwhile may
/// cross with its old end; it is told again within the minute.
async fn catch_up(client: Arc<Client>, peer: Arc<Peer>) {
    loop {
        tokio::time::sleep(AGAIN).await;
        let batch: Vec<Alert> = {
            let mut missed = peer.missed();
            missed.retain(|_, (_, until)| *until > Instant::now());
            if missed.is_empty() {
                // Under the lock, so that what is remembered from now on starts another one.
                peer.catching_up.store(false, Ordering::Relaxed);
                return;
            }
            missed.values().take(MISSED_BATCH).map(|(a, _)| a.clone()).collect()
        };
        // Each has its end's time, so the time of this attempt is in none of them.
        let body: Vec<_> = batch.iter().map(|a| postable(a, 0)).collect();
        let fate = match serde_json::to_vec(&body) {
            Ok(body) => client.post(&peer.url, body, HeaderMap::new()).await,
            Err(e) => DeliveryResult::Refused { error: e.to_string() },
        };
        tracing::debug!(peer = peer.url.host(), ends = batch.len(), ?fate, "ends that a peer missed");
        if !matches!(fate, DeliveryResult::Failed { .. }) {
            peer.failed_at.store(0, Ordering::Relaxed);
            let mut missed = peer.missed();
            for a in &batch {
                if missed.get(&a.id).is_some_and(|(now, _)| now == a) {
                    missed.remove(&a.id);
                }
            }
        }
    }
}

/// Taken by one is delivered; else a peer that may still take it counts more than one that refused.
fn combine(fates: Vec<DeliveryResult>) -> DeliveryResult {
    let (mut delivered, mut failed, mut refused) = (Vec::new(), None, None);
    for fate in fates {
        match fate {
            DeliveryResult::Delivered { answer } => delivered.push(answer),
            other @ DeliveryResult::Failed { .. } => failed = Some(other),
            other @ DeliveryResult::Refused { .. } => refused = Some(other),
        }
    }
    if !delivered.is_empty() {
        return DeliveryResult::Delivered { answer: delivered.join(", ") };
    }
    failed.or(refused).unwrap_or_else(|| DeliveryResult::failed(Reason::Connect, "no peer was reached"))
}

fn postable(a: &Alert, now: i64) -> Postable<'_> {
    // Alertmanager drops labels without a value; an alert without any is refused.
    let mut labels: BTreeMap<&str, &str> =
        a.labels.iter().map(|(k, v)| (k.as_str(), v.as_str())).filter(|(_, v)| !v.is_empty()).collect();
    labels.entry("alertname").or_insert_with(|| a.kind.alertname());
    labels.entry("alert_id").or_insert(&a.id);
    let ends = match a.state {
        AlertState::Resolved => a.resolved_at.as_deref().and_then(parse_rfc3339).unwrap_or(now),
        _ => now + ENDS_AFTER,
    };
    // It refuses an end that is not after the start, as a clock that was set back can make.
    let ends = ends.max(parse_rfc3339(&a.since).unwrap_or_default() + 1);
    Postable { labels, annotations: text::annotations(a), starts_at: &a.since, ends_at: rfc3339(ends) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_peer_that_takes_it_is_enough_and_a_refusal_waits_for_the_others() {
        let ok = || DeliveryResult::Delivered { answer: "a: 200".into() };
        let down = || DeliveryResult::failed(Reason::Connect, "down");
        let no = || DeliveryResult::Refused { error: "400".into() };
        assert!(matches!(combine(vec![down(), ok(), no()]), DeliveryResult::Delivered { .. }));
        assert!(matches!(combine(vec![no(), down()]), DeliveryResult::Failed { .. }));
        assert!(matches!(combine(vec![no(), no()]), DeliveryResult::Refused { .. }));
    }
}
