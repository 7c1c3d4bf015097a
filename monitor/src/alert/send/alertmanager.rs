//! Alertmanager, API v2. A cluster's peers do not share alerts with each other: each is posted to, and one that takes
//! them is enough.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, Ordering};

use reqwest::Url;
use reqwest::header::HeaderMap;
use serde::Serialize;

use super::http::{Client, TargetError};
use super::{Fate, Reason, text};
use crate::alert::clock::{parse_rfc3339, rfc3339};
use crate::contract::{Alert, AlertState};

/// Alertmanager ends an alert by itself when it was not told again by then.
const ENDS_AFTER: i64 = 4 * 60_000;
/// A peer that failed is left alone for so long while another takes the alerts, so that one that hangs slows nobody.
const REST: i64 = 20_000;

#[derive(Debug)]
pub(in crate::alert) struct Alertmanager {
    client: Client,
    peers: Vec<Peer>,
}

#[derive(Debug)]
struct Peer {
    url: Url,
    /// Milliseconds since the epoch; 0 = it did not fail.
    failed_at: AtomicI64,
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
            Ok(Peer { url, failed_at: AtomicI64::new(0) })
        };
        let peers = urls.iter().map(peer).collect::<Result<_, TargetError>>()?;
        Ok(Self { client, peers })
    }

    pub(super) async fn post(&self, alerts: &[Alert], now: i64) -> Fate {
        let body: Vec<_> = alerts.iter().map(|a| postable(a, now)).collect();
        let Ok(body) = serde_json::to_vec(&body) else {
            return Fate::Refused { error: "the alert cannot be written as JSON".into() };
        };
        let rests = |p: &Peer| (0..REST).contains(&(now - p.failed_at.load(Ordering::Relaxed)));
        let all_rest = self.peers.iter().all(rests);
        let mut posts = tokio::task::JoinSet::new();
        let mut fates = Vec::new();
        for (i, p) in self.peers.iter().enumerate().filter(|(_, p)| all_rest || !rests(p)) {
            let post = self.client.post(&p.url, body.clone(), HeaderMap::new());
            posts.spawn(async move { (i, post.await) });
        }
        while let Some(done) = posts.join_next().await {
            let Ok((i, fate)) = done else { continue };
            let failed = matches!(fate, Fate::Failed { .. });
            if let Some(p) = self.peers.get(i) {
                p.failed_at.store(if failed { now } else { 0 }, Ordering::Relaxed);
            }
            fates.push(fate);
        }
        combine(fates)
    }
}

/// Taken by one is delivered; else a peer that may still take it counts more than one that refused.
fn combine(fates: Vec<Fate>) -> Fate {
    let (mut delivered, mut failed, mut refused) = (Vec::new(), None, None);
    for fate in fates {
        match fate {
            Fate::Delivered { answer } => delivered.push(answer),
            other @ Fate::Failed { .. } => failed = Some(other),
            other @ Fate::Refused { .. } => refused = Some(other),
        }
    }
    if !delivered.is_empty() {
        return Fate::Delivered { answer: delivered.join(", ") };
    }
    failed.or(refused).unwrap_or_else(|| Fate::failed(Reason::Connect, "no peer was reached"))
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
        let ok = || Fate::Delivered { answer: "a: 200".into() };
        let down = || Fate::failed(Reason::Connect, "down");
        let no = || Fate::Refused { error: "400".into() };
        assert!(matches!(combine(vec![down(), ok(), no()]), Fate::Delivered { .. }));
        assert!(matches!(combine(vec![no(), down()]), Fate::Failed { .. }));
        assert!(matches!(combine(vec![no(), no()]), Fate::Refused { .. }));
    }
}
