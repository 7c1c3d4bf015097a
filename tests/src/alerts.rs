//! Alerts to deliver, and an HTTP server that takes them as a webhook and flaps.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use jobwarden::config::{self, Config, Overrides};
use jobwarden::model::schema::{Alert, AlertKind, AlertState, Severity};

/// A config with these receivers, as a file would have them.
pub fn receivers(text: &str) -> Result<Config> {
    Ok(config::parse(Path::new("receivers.toml"), text, &BTreeMap::new(), &Overrides::default())?)
}

/// One webhook.
pub fn webhook(url: &str) -> Result<Config> {
    receivers(&format!(
        "[[receiver]]\nname = \"hook\"\ntype = \"webhook\"\nurl = \"{url}\"\ntimeout = \"500ms\""
    ))
}

/// A firing zombie alert number `n`, which began at `since` (RFC 3339).
#[must_use]
pub fn alert(n: u64, since: &str) -> Alert {
    let id = format!("{n:016x}");
    let label = |k: &str, v: &str| (k.to_owned(), v.to_owned());
    Alert {
        labels: BTreeMap::from([
            label("alertname", AlertKind::Zombie.alertname()),
            label("alert_id", &id),
            label("instance", "scenario"),
            label("kind", "zombie"),
            label("severity", "warning"),
            label("job_name", "queue"),
        ]),
        id,
        kind: AlertKind::Zombie,
        state: AlertState::Firing,
        severity: Severity::Warning,
        job: None,
        job_name: "queue".into(),
        subject: None,
        count: 1,
        since: since.into(),
        resolved_at: None,
        summary: format!("worker {n} does not reap"),
        cause: None,
    }
}

/// The end of `a`, at `at`.
#[must_use]
pub fn resolved(a: &Alert, at: &str) -> Alert {
    Alert { state: AlertState::Resolved, resolved_at: Some(at.into()), ..a.clone() }
}

/// Takes webhook bodies; while it flaps, one request in three gets 503, one no answer at all.
pub struct Hook {
    pub url: String,
    pub flap: Arc<AtomicBool>,
    taken: Arc<Mutex<Vec<Alert>>>,
}

impl Hook {
    pub fn start() -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let url = format!("http://{}/", listener.local_addr()?);
        let hook =
            Self { url, flap: Arc::new(AtomicBool::new(false)), taken: Arc::new(Mutex::new(Vec::new())) };
        let (flap, taken) = (Arc::clone(&hook.flap), Arc::clone(&hook.taken));
        // Lives as long as the test's process; each connection ends with its client.
        std::thread::spawn(move || {
            for (n, stream) in listener.incoming().flatten().enumerate() {
                let (flap, taken) = (Arc::clone(&flap), Arc::clone(&taken));
                std::thread::spawn(move || serve(stream, n, &flap, &taken));
            }
        });
        Ok(hook)
    }

    /// (alert id, state) of all that was taken, in order.
    #[must_use]
    pub fn told(&self) -> Vec<(String, AlertState)> {
        self.taken().into_iter().map(|a| (a.id, a.state)).collect()
    }

    /// All that was taken, in order.
    #[must_use]
    pub fn taken(&self) -> Vec<Alert> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn serve(mut s: TcpStream, n: usize, flap: &AtomicBool, taken: &Mutex<Vec<Alert>>) {
    let _ = s.set_read_timeout(Some(Duration::from_secs(5)));
    let Some(body) = request(&mut s) else { return };
    let status = match (flap.load(Ordering::SeqCst), n % 3) {
        (true, 0) => "503 Service Unavailable",
        (true, 1) => return,
        _ => "200 OK",
    };
    if status.starts_with("200") {
        let Ok(body) = serde_json::from_slice::<serde_json::Value>(&body) else { return };
        let alerts: Vec<Alert> = serde_json::from_value(body["alerts"].clone()).unwrap_or_default();
        // Before the answer: what was answered is in the list, whatever happens to the client.
        let mut all = taken.lock().unwrap_or_else(PoisonError::into_inner);
        all.extend(alerts);
    }
    let _ = write!(s, "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
}

fn request(s: &mut TcpStream) -> Option<Vec<u8>> {
    let mut all = Vec::new();
    let mut buf = [0; 16_384];
    loop {
        if let Some(end) = all.windows(4).position(|w| w == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&all[..end]).to_ascii_lowercase();
            let length =
                head.lines().find_map(|l| l.strip_prefix("content-length: "))?.parse::<usize>().ok()?;
            if all.len() >= end + 4 + length {
                return Some(all[end + 4..end + 4 + length].to_vec());
            }
        }
        match s.read(&mut buf) {
            Ok(n @ 1..) => all.extend_from_slice(&buf[..n]),
            _ => return None,
        }
    }
}

/// One request with a body to a server on loopback: status and body.
pub fn ask(port: u16, method: &str, path: &str, body: &str) -> Result<(u16, serde_json::Value)> {
    let head = format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len());
    let mut s = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    s.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(s, "{method} {path} HTTP/1.0\r\nHost: localhost\r\n{head}\r\n{body}")?;
    let mut answer = String::new();
    s.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).context("no HTTP status")?;
    Ok((status, serde_json::from_str(body).unwrap_or_default()))
}
