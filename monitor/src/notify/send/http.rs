//! One POST, bounded in time and in what is read of the answer, and what its status means. Redirects are not followed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{self, HeaderMap, HeaderValue, RETRY_AFTER};
use hyper::{Request, Response, StatusCode, Uri};
use hyper_util::client::proxy::matcher::Matcher;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use tokio::time::{Instant, timeout_at};

use super::transport::Transport;
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
    transport: Transport,
    /// For a request and its answer together.
    timeout: Duration,
    token_file: Option<PathBuf>,
}

impl Client {
    pub(super) fn new(
        r: &Receiver,
        ca_file: Option<&Path>,
        token_file: Option<PathBuf>,
    ) -> Result<Self, TargetError> {
        let mut own = None;
        if let Some(path) = ca_file {
            let file = |source| TargetError::File { receiver: r.name.clone(), path: path.into(), source };
            let bad =
                |why: String| TargetError::Certificate { receiver: r.name.clone(), path: path.into(), why };
            let pem = files::read_regular(path, MAX_CERTIFICATES).map_err(file)?;
            let certs: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
            let certs = certs.map_err(|e| bad(e.to_string()))?;
            if certs.is_empty() {
                return Err(bad("none found".into()));
            }
            // Only these: a receiver that names a CA does not trust the system's as well.
            own = Some(certs);
        }
        let transport = Transport::new(own, r.timeout, Matcher::from_env())
            .map_err(|e| TargetError::Client { receiver: r.name.clone(), why: e.to_string() })?;
        let client = Self { receiver: r.name.clone(), transport, timeout: r.timeout, token_file };
        if let Some(path) = &client.token_file {
            client.check_secret(path)?;
        }
        Ok(client)
    }

    pub(super) fn url(&self, s: &str) -> Result<Uri, TargetError> {
        s.parse().map_err(|_| TargetError::Url { receiver: self.receiver.clone() })
    }

    /// Whether the file can be read now; it is read again at each use, so that a secret can be changed in place.
    pub(super) fn check_secret(&self, path: &Path) -> Result<(), TargetError> {
        let failed =
            |source| TargetError::File { receiver: self.receiver.clone(), path: path.into(), source };
        secret(path).map(drop).map_err(failed)
    }

    /// POSTs JSON. The answer is one result for all that is in the body.
    pub(super) fn post(
        &self,
        url: &Uri,
        body: Vec<u8>,
        headers: HeaderMap,
    ) -> impl Future<Output = DeliveryResult> + Send + 'static {
        let request = self.request(url, body, headers);
        let host = url.host().unwrap_or_default().to_owned();
        let (transport, timeout) = (self.transport.clone(), self.timeout);
        async move {
            match request {
                Ok(request) => send(&host, &transport, request, Instant::now() + timeout).await,
                Err(result) => result,
            }
        }
    }

    fn request(
        &self,
        url: &Uri,
        body: Vec<u8>,
        mut headers: HeaderMap,
    ) -> Result<Request<Full<Bytes>>, DeliveryResult> {
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(header::ACCEPT, HeaderValue::from_static("*/*"));
        let agent = HeaderValue::from_static(concat!("jobwarden/", env!("CARGO_PKG_VERSION")));
        headers.insert(header::USER_AGENT, agent);
        if let Some(v) = self.transport.proxy_authorization(url) {
            headers.insert(header::PROXY_AUTHORIZATION, v);
        }
        if let Some(path) = &self.token_file {
            let token = HeaderValue::try_from(format!("Bearer {}", read_secret(path)?));
            let unfit = |_| format!("{} holds more than one line, or what no header may", path.display());
            let mut token = token.map_err(unfit).map_err(|e| DeliveryResult::failed(Reason::Secret, e))?;
            token.set_sensitive(true);
            headers.insert(header::AUTHORIZATION, token);
        }
        let mut request = Request::new(Full::from(body));
        (*request.method_mut(), *request.uri_mut()) = (hyper::Method::POST, url.clone());
        *request.headers_mut() = headers;
        Ok(request)
    }
}

async fn send(
    host: &str,
    transport: &Transport,
    request: Request<Full<Bytes>>,
    deadline: Instant,
) -> DeliveryResult {
    match timeout_at(deadline, transport.pool.request(request)).await {
        Ok(Ok(answer)) => judge(host, answer, deadline).await,
        Ok(Err(e)) => {
            let reason = if is_timeout(&e) { Reason::Timeout } else { Reason::Connect };
            DeliveryResult::failed(reason, format!("{host}: {}", chain(&e)))
        }
        Err(_) => DeliveryResult::failed(Reason::Timeout, format!("{host}: no answer within its timeout")),
    }
}

/// Whether the connection was not made in time.
fn is_timeout(e: &(dyn std::error::Error + 'static)) -> bool {
    std::iter::successors(Some(e), |e| e.source())
        .any(|e| e.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::TimedOut))
}

async fn judge(host: &str, answer: Response<Incoming>, deadline: Instant) -> DeliveryResult {
    let status = answer.status();
    let retry_after = answer.headers().get(RETRY_AFTER).and_then(parse_retry_after);
    let mut body = answer.into_body();
    let (mut text, mut late) = (Vec::new(), false);
    while text.len() < MAX_ANSWER {
        match timeout_at(deadline, body.frame()).await {
            Ok(Some(Ok(frame))) => {
                let bytes = frame.into_data().unwrap_or_default();
                text.extend_from_slice(&bytes[..bytes.len().min(MAX_ANSWER - text.len())]);
            }
            Ok(Some(Err(_)) | None) => break,
            Err(_) => {
                late = true;
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
        _ if late => DeliveryResult::Failed { reason: Reason::Timeout, error: said, retry_after },
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
