//! PagerDuty, Events API v2: trigger and resolve by dedup_key, within its size limits.

use std::path::{Path, PathBuf};

use hyper::Uri;
use hyper::header::HeaderMap;
use serde_json::{Value, json};

use super::http::{Client, TargetError, read_secret};
use super::{DeliveryResult, text};
use crate::model::schema::{Alert, AlertState};

/// The whole event, as its documentation has it.
const MAX_EVENT: usize = 512 * 1024;
/// Characters.
const MAX_SUMMARY: usize = 1024;

#[derive(Debug)]
pub(in crate::notify) struct Pagerduty {
    client: Client,
    url: Uri,
    key_file: PathBuf,
}

impl Pagerduty {
    pub(super) fn new(client: Client, url: &str, key_file: &Path) -> Result<Self, TargetError> {
        let url = client.url(url)?;
        client.check_secret(key_file)?;
        Ok(Self { client, url, key_file: key_file.into() })
    }

    pub(super) async fn post(&self, a: &Alert) -> DeliveryResult {
        let key = match read_secret(&self.key_file) {
            Ok(key) => key,
            Err(fate) => return fate,
        };
        let body = event(a, &key).to_string().into_bytes();
        self.client.post(&self.url, body, HeaderMap::new()).await
    }
}

/// What does not fit is left out, the largest first; the rest still pages.
fn event(a: &Alert, key: &str) -> Value {
    let mut notes = text::annotations(a);
    let runbook = notes.remove("runbook").unwrap_or_default();
    let summary = text::clip(&a.summary, MAX_SUMMARY);
    let summary = if summary.is_empty() { a.kind.alertname().to_owned() } else { summary };
    let label = |k: &str| a.labels.get(k).filter(|v| !v.is_empty()).cloned();
    let source = label("instance").unwrap_or_else(crate::sources::host::hostname);
    let mut details = json!({
        "labels": a.labels,
        "count": a.count,
        "job": a.job,
        "state": a.state,
        "remedy": notes.remove("remedy"),
        "cause": notes.remove("cause"),
        "tree": notes.remove("tree"),
        "evidence": a.cause.as_ref().map(|c| &c.evidence),
    });
    for drop in ["", "evidence", "tree", "cause", "labels", "remedy"] {
        if let Some(d) = details.as_object_mut() {
            d.remove(drop);
        }
        let event = json!({
            "routing_key": key,
            "event_action": if a.state == AlertState::Resolved { "resolve" } else { "trigger" },
            "dedup_key": a.id,
            "client": "jobwarden",
            "links": [{ "href": runbook, "text": "What it means and what to do" }],
            "payload": {
                "summary": summary,
                "source": source,
                "severity": a.severity,
                "timestamp": a.since,
                "component": a.job_name,
                "class": a.kind,
                "custom_details": details,
            },
        });
        if event.to_string().len() <= MAX_EVENT {
            return event;
        }
    }
    // Nothing that is left has a length of its own.
    json!({
        "routing_key": key,
        "event_action": if a.state == AlertState::Resolved { "resolve" } else { "trigger" },
        "dedup_key": a.id,
        "payload": { "summary": summary, "source": "jobwarden", "severity": a.severity },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::notify::testing::alert;

    #[test]
    fn the_largest_alert_is_cut_to_the_limits_and_still_pages() {
        let mut a = alert(7);
        a.summary = "é".repeat(5000);
        let mut big = a.clone();
        big.labels.insert("x".into(), "y".repeat(2 << 20));
        for a in [a, big] {
            let e = event(&a, "KEY");
            assert!(e.to_string().len() <= MAX_EVENT);
            let summary = e["payload"]["summary"].as_str().unwrap();
            assert_eq!(summary.chars().count(), MAX_SUMMARY);
            assert_eq!(
                (e["event_action"].as_str(), e["dedup_key"].as_str()),
                (Some("trigger"), Some(&*a.id))
            );
            assert_eq!(e["payload"]["severity"], "warning");
        }
    }
}
