//! One POST, bounded in time and in what is read of the answer, and what its status means. Redirects are not followed.

use std::path::{Path, PathBuf};
use std::sync::Once;
use std::time::Duration;

use reqwest::header::{HeaderMap, HeaderValue, RETRY_AFTER};
use reqwest::{StatusCode, Url};

use super::{DeliveryResult, Reason};
use crate::config::Receiver;
use crate::files;
use crate::model::outside::escape;

/// Of an answer no more is read; enough for what is shown of it.
const MAX_ANSWER: usize = 16 * 1024;
/// Of an answer no more is shown.
const MAX_SHOWN: usize = 300;
const MAX_SECRET: u64 = 16 * 1024;
const MAX_CERTIFICATES: u64 = 4 << 20;

/// Why a receiver cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    #[error("receiver {receiver}: cannot read {}: {source}", path.display())]
    File { receiver: String, path: PathBuf, source: std::io::Error },
    #[error("receiver {receiver}: {} holds no certificate in PEM form: {why}", path.display())]
    Certificate { receiver: String, path: PathBuf, why: String },
    #[error("receiver {receiver}: the HTTP client cannot be made: {why}")]
    Client { receiver: String, why: String },
    #[error("receiver {receiver}: its URL does not read")]
    Url { receiver: String },
}

#[derive(Debug)]
pub(super) struct Client {
    pub(super) receiver: String,
    http: reqwest::Client,
    token_file: Option<PathBuf>,
}

/// rustls is built without a provider of its own; whoever comes first installs it for the process.
fn install_provider() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // An error says that there is one already.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}

impl Client {
    pub(super) fn new(
        r: &Receiver,
        ca_file: Option<&Path>,
        token_file: Option<PathBuf>,
    ) -> Result<Self, TargetError> {
        install_provider();
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("jobwarden/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .timeout(r.timeout)
            .connect_timeout(r.timeout)
            .pool_idle_timeout(Duration::from_secs(90))
            .pool_max_idle_per_host(2);
        if let Some(path) = ca_file {
            let file = |source| TargetError::File { receiver: r.name.clone(), path: path.into(), source };
            let bad =
                |why: String| TargetError::Certificate { receiver: r.name.clone(), path: path.into(), why };
            let pem = files::read_regular(path, MAX_CERTIFICATES).map_err(file)?;
            let certs = reqwest::Certificate::from_pem_bundle(&pem).map_err(|e| bad(e.to_string()))?;
            if certs.is_empty() {
                return Err(bad("none found".into()));
            }
            // Only these: who names a CA does not mean any of the system's as well.
            builder = builder.tls_built_in_root_certs(false);
            for cert in certs {
                builder = builder.add_root_certificate(cert);
            }
        }
        let http = builder
            .build()
            .map_err(|e| TargetError::Client { receiver: r.name.clone(), why: chain(&e.without_url()) })?;
        let client = Self { receiver: r.name.clone(), http, token_file };
        if let Some(path) = &client.token_file {
            client.check_secret(path)?;
        }
        Ok(client)
    }

    pub(super) fn url(&self, s: &str) -> Result<Url, TargetError> {
        Url::parse(s).map_err(|_| TargetError::Url { receiver: self.receiver.clone() })
    }

    /// Whether the file can be read now; it is read again at each use, so that a secret can be changed in place.
    pub(super) fn check_secret(&self, path: &Path) -> Result<(), TargetError> {
        let failed =
            |source| TargetError::File { receiver: self.receiver.clone(), path: path.into(), source };
        secret(path).map(drop).map_err(failed)
    }

    /// POSTs JSON. What comes back is one fate for all that is in it.
    pub(super) fn post(
        &self,
        url: &Url,
        body: Vec<u8>,
        headers: HeaderMap,
    ) -> impl Future<Output = DeliveryResult> + Send + 'static {
        let request = self.request(url, body, headers);
        let host = url.host_str().unwrap_or_default().to_owned();
        async move {
            match request {
                Ok(request) => send(&host, request).await,
                Err(fate) => fate,
            }
        }
    }

    fn request(
        &self,
        url: &Url,
        body: Vec<u8>,
        headers: HeaderMap,
    ) -> Result<reqwest::RequestBuilder, DeliveryResult> {
        let request = self
            .http
            .post(url.clone())
            .headers(headers)
            .header(reqwest::header::CONTENT_TYPE, "application/json")
            .body(body);
        let Some(path) = &self.token_file else { return Ok(request) };
        Ok(request.bearer_auth(read_secret(path)?))
    }
}

async fn send(host: &str, request: reqwest::RequestBuilder) -> DeliveryResult {
    match request.send().await {
        Ok(answer) => judge(host, answer).await,
        Err(e) => {
            let reason = if e.is_timeout() { Reason::Timeout } else { Reason::Connect };
            DeliveryResult::failed(reason, format!("{host}: {}", chain(&e.without_url())))
        }
    }
}

async fn judge(host: &str, mut answer: reqwest::Response) -> DeliveryResult {
    let status = answer.status();
    let retry_after = answer.headers().get(RETRY_AFTER).and_then(parse_retry_after);
    let mut text = Vec::new();
    let mut broke = None;
    loop {
        match answer.chunk().await {
            Ok(Some(bytes)) if text.len() < MAX_ANSWER => {
                text.extend_from_slice(&bytes[..bytes.len().min(MAX_ANSWER - text.len())]);
            }
            Ok(_) => break,
            Err(e) => {
                broke = Some(e);
                break;
            }
        }
    }
    let said = format!("{host}: {status}{}", shown(&text));
    match status {
        // Taken, even if the rest of the answer was cut off.
        s if s.is_success() => DeliveryResult::Delivered { answer: said },
        StatusCode::TOO_MANY_REQUESTS => {
            DeliveryResult::Failed { reason: Reason::RateLimited, error: said, retry_after }
        }
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY => {
            DeliveryResult::Failed { reason: Reason::Unavailable, error: said, retry_after }
        }
        s if s.is_server_error() => {
            DeliveryResult::Failed { reason: Reason::Unavailable, error: said, retry_after }
        }
        s if s.is_redirection() => DeliveryResult::Refused {
            error: format!("{said} (redirects are not followed: give the final URL)"),
        },
        _ if broke.is_some_and(|e| e.is_timeout()) => {
            DeliveryResult::Failed { reason: Reason::Timeout, error: said, retry_after }
        }
        _ => DeliveryResult::Refused { error: said },
    }
}

/// Seconds, or a date.
fn parse_retry_after(v: &HeaderValue) -> Option<Duration> {
    let s = v.to_str().ok()?.trim();
    if let Ok(n) = s.parse::<u64>() {
        return Some(Duration::from_secs(n));
    }
    let at = http_date(s)?;
    Some(at.duration_since(std::time::SystemTime::now()).unwrap_or_default())
}

/// `Sun, 06 Nov 1994 08:49:37 GMT`, the only form that servers must send (RFC 9110, 5.6.7).
fn http_date(s: &str) -> Option<std::time::SystemTime> {
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let mut words = s.split_once(", ")?.1.split(' ');
    let day: u8 = words.next()?.parse().ok()?;
    let name = words.next()?;
    let month = MONTHS.iter().position(|m| *m == name)? + 1;
    let year: u16 = words.next()?.parse().ok()?;
    let time = words.next()?;
    humantime::parse_rfc3339(&format!("{year:04}-{month:02}-{day:02}T{time}Z")).ok()
}

fn shown(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let line: String = text.trim().chars().take(MAX_SHOWN).collect();
    if line.is_empty() { String::new() } else { format!(" ({})", escape(&line)) }
}

/// An error with its sources, each once.
fn chain(e: &dyn std::error::Error) -> String {
    let mut out = e.to_string();
    let mut next = e.source();
    while let Some(e) = next {
        let text = e.to_string();
        if !out.contains(&text) {
            out = format!("{out}: {text}");
        }
        next = e.source();
    }
    out
}

/// As [`secret`], for an attempt under way.
pub(super) fn read_secret(path: &Path) -> Result<String, DeliveryResult> {
    secret(path)
        .map_err(|e| DeliveryResult::failed(Reason::Secret, format!("cannot read {}: {e}", path.display())))
}

/// What the file holds, without the newline at its end. An empty one is an error.
fn secret(path: &Path) -> std::io::Result<String> {
    let bytes = files::read_regular(path, MAX_SECRET)?;
    let text = std::str::from_utf8(&bytes).map_err(std::io::Error::other)?.trim();
    if text.is_empty() {
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, "the file is empty"));
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let of = |s: &str| parse_retry_after(&HeaderValue::from_str(s).unwrap());
        assert_eq!(of("121"), Some(Duration::from_secs(121)));
        assert_eq!(of("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
        assert!(of("Sun, 06 Nov 2095 08:49:37 GMT").is_some_and(|d| d.as_secs() > 86_400));
        assert_eq!(of("soon"), None);
    }
}
