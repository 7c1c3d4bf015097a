//! The receivers: each turns alerts into requests (or a program's input) and says what became of them. Nothing here
//! knows of queues, and nothing that is said names a secret or the path of a URL.

mod alertmanager;
mod exec;
mod family;
mod http;
mod pagerduty;
mod text;
mod transport;
mod webhook;

use std::time::Duration;

pub use self::http::TargetError;
use crate::config::{Receiver, ReceiverKind};
use crate::model::schema::Alert;

/// How one alert fared.
#[derive(Clone, Debug, PartialEq)]
pub enum DeliveryResult {
    Delivered {
        /// What came back, in words.
        answer: String,
    },
    /// To be tried again.
    Failed {
        reason: Reason,
        error: String,
        /// What the receiver asked for.
        retry_after: Option<Duration>,
    },
    /// Refused for good.
    Refused { error: String },
}

impl DeliveryResult {
    fn failed(reason: Reason, error: impl Into<String>) -> Self {
        Self::Failed { reason, error: error.into(), retry_after: None }
    }
}

/// Why an attempt failed: the `reason` label, so few values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// No connection, or it broke.
    Connect,
    Timeout,
    /// 429.
    RateLimited,
    /// 408, 425 and 5xx.
    Unavailable,
    /// Any other answer: it is parked.
    Refused,
    /// The file of a secret could not be read.
    Secret,
    /// The program did not start or failed.
    Program,
}

impl Reason {
    pub const ALL: [Self; 7] = [
        Self::Connect,
        Self::Timeout,
        Self::RateLimited,
        Self::Unavailable,
        Self::Refused,
        Self::Secret,
        Self::Program,
    ];

    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Timeout => "timeout",
            Self::RateLimited => "rate_limited",
            Self::Unavailable => "unavailable",
            Self::Refused => "refused",
            Self::Secret => "secret",
            Self::Program => "program",
        }
    }
}

/// A receiver that is ready to be sent to.
#[derive(Debug)]
pub(super) enum Target {
    Alertmanager(alertmanager::Alertmanager),
    Pagerduty(pagerduty::Pagerduty),
    Webhook(webhook::Webhook),
    Exec(exec::Exec),
}

impl Target {
    /// Builds the client and looks at every file that it will need.
    pub(super) fn new(r: &Receiver) -> Result<Self, TargetError> {
        Ok(match &r.kind {
            ReceiverKind::Alertmanager { urls, bearer_token_file, ca_file } => {
                let client = http::Client::new(r, ca_file.as_deref(), bearer_token_file.clone())?;
                Self::Alertmanager(alertmanager::Alertmanager::new(client, urls)?)
            }
            ReceiverKind::Pagerduty { url, routing_key_file, ca_file } => {
                let client = http::Client::new(r, ca_file.as_deref(), None)?;
                Self::Pagerduty(pagerduty::Pagerduty::new(client, url, routing_key_file)?)
            }
            ReceiverKind::Webhook { url, secret_file, bearer_token_file, ca_file } => {
                let client = http::Client::new(r, ca_file.as_deref(), bearer_token_file.clone())?;
                Self::Webhook(webhook::Webhook::new(client, url, secret_file.clone())?)
            }
            ReceiverKind::Exec { command } => Self::Exec(exec::Exec::new(command, r.timeout)),
        })
    }

    /// How many alerts one [`send`](Self::send) takes.
    pub(super) const fn batch(&self) -> usize {
        match self {
            Self::Alertmanager(_) => 64,
            Self::Webhook(_) => 32,
            Self::Pagerduty(_) | Self::Exec(_) => 1,
        }
    }

    /// How many sends may run at once.
    pub(super) const fn width(&self) -> usize {
        match self {
            Self::Exec(_) => 4,
            _ => 1,
        }
    }

    /// The least time between two sends once the first few are out: PagerDuty takes 120 events a minute for a key.
    pub(super) const fn spacing(&self) -> Duration {
        match self {
            Self::Pagerduty(_) => Duration::from_millis(500),
            _ => Duration::from_millis(100),
        }
    }

    /// Whether a firing alert must be told again and again.
    pub(super) const fn resends(kind: &ReceiverKind) -> bool {
        matches!(kind, ReceiverKind::Alertmanager { .. })
    }

    /// One fate for each alert, in order. What is refused for good in one request is tried again each on its own, so that
    /// one bad alert costs no other. `now` in milliseconds since the epoch.
    pub(super) async fn send(&self, alerts: &[Alert], now: i64) -> Vec<DeliveryResult> {
        let mut fates = Vec::with_capacity(alerts.len());
        for part in alerts.chunks(self.batch()) {
            let fate = self.post(part, now).await;
            if part.len() == 1 || !matches!(fate, DeliveryResult::Refused { .. }) {
                fates.extend(part.iter().map(|_| fate.clone()));
                continue;
            }
            for one in part.chunks(1) {
                fates.push(self.post(one, now).await);
            }
        }
        fates
    }

    async fn post(&self, alerts: &[Alert], now: i64) -> DeliveryResult {
        match (self, alerts) {
            (Self::Alertmanager(t), all) => t.post(all, now).await,
            (Self::Webhook(t), all) => t.post(all).await,
            (Self::Pagerduty(t), [one, ..]) => t.post(one).await,
            (Self::Exec(t), [one, ..]) => t.run(one).await,
            (_, []) => DeliveryResult::Delivered { answer: String::new() },
        }
    }
}
