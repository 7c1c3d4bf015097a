//! What this module's tests share.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::config::{Config, Overrides};
use crate::model::schema::{Alert, AlertKind, AlertState, Severity};

/// A firing alert number `n`.
pub(super) fn alert(n: u64) -> Alert {
    let id = format!("{n:016x}");
    Alert {
        labels: BTreeMap::from([
            ("alertname".to_owned(), "JobwardenZombie".to_owned()),
            ("alert_id".to_owned(), id.clone()),
        ]),
        id,
        kind: AlertKind::Zombie,
        state: AlertState::Firing,
        severity: Severity::Warning,
        job: None,
        job_name: "queue".into(),
        subject: None,
        count: 1,
        since: "2026-01-01T00:00:00.000Z".into(),
        resolved_at: None,
        summary: format!("alert {n}"),
        cause: None,
    }
}

/// The end of `a`.
pub(super) fn resolved(a: &Alert) -> Alert {
    let resolved_at = Some("2026-01-01T00:01:00.000Z".into());
    Alert { state: AlertState::Resolved, resolved_at, ..a.clone() }
}

/// One request as the test's server got it.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub(super) path: String,
    /// Names in lower case.
    pub(super) headers: BTreeMap<String, String>,
    pub(super) body: Vec<u8>,
}

impl Request {
    pub(super) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    /// (id, state) of each alert in a webhook's body.
    pub(super) fn told(&self) -> Vec<(String, String)> {
        let body = self.json();
        assert_eq!(body["version"], 1);
        let alerts: Vec<Alert> = serde_json::from_value(body["alerts"].clone()).unwrap();
        let state = |a: &Alert| if a.state == AlertState::Resolved { "resolved" } else { "firing" };
        alerts.iter().map(|a| (a.id.clone(), state(a).to_owned())).collect()
    }
}

/// What the server does with a request.
#[derive(Clone, Copy, Debug)]
pub(super) enum Act {
    Answer(u16),
    /// Status and Retry-After in seconds.
    RetryAfter(u16, u32),
    /// No answer, for as long as the client stays.
    Hang,
    /// Half of an answer's head.
    HalfClose,
    /// The connection ends without a word.
    Close,
    Redirect,
}

/// An HTTP server of the test's own on loopback.
pub(super) struct Server {
    pub(super) url: String,
    requests: Arc<Mutex<Vec<Request>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    pub(super) async fn start(act: impl Fn(usize, &Request) -> Act + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self::on(listener, act)
    }

    pub(super) fn on(
        listener: TcpListener,
        act: impl Fn(usize, &Request) -> Act + Send + Sync + 'static,
    ) -> Self {
        let url = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (seen, act) = (Arc::clone(&requests), Arc::new(act));
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&seen), Arc::clone(&act)));
            }
        });
        Self { url, requests, task }
    }

    pub(super) fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    /// (id, state) of all alerts in all webhook bodies so far.
    pub(super) fn told(&self) -> Vec<(String, String)> {
        self.requests().iter().flat_map(Request::told).collect()
    }
}

async fn serve(
    mut stream: TcpStream,
    seen: Arc<Mutex<Vec<Request>>>,
    act: Arc<impl Fn(usize, &Request) -> Act + Send + Sync>,
) {
    let mut buf = Vec::new();
    while let Some(request) = read_request(&mut stream, &mut buf).await {
        let n = {
            let mut all = seen.lock().unwrap();
            all.push(request.clone());
            all.len() - 1
        };
        let answer = match act(n, &request) {
            Act::Answer(status) => format!("HTTP/1.1 {status} X\r\ncontent-length: 7\r\n\r\nanswer\n"),
            Act::RetryAfter(status, s) => {
                format!("HTTP/1.1 {status} X\r\nretry-after: {s}\r\ncontent-length: 0\r\n\r\n")
            }
            Act::Redirect => {
                "HTTP/1.1 302 X\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n".to_owned()
            }
            Act::HalfClose => {
                let _ = stream.write_all(b"HTTP/1.1 20").await;
                return;
            }
            Act::Close => return,
            Act::Hang => {
                let _ = stream.read(&mut [0; 1]).await;
                return;
            }
        };
        if stream.write_all(answer.as_bytes()).await.is_err() {
            return;
        }
    }
}

async fn read_request(stream: &mut TcpStream, buf: &mut Vec<u8>) -> Option<Request> {
    let mut chunk = vec![0; 65_536];
    loop {
        if let Some(end) = buf.windows(4).position(|w| w == b"\r\n\r\n") {
            let head = String::from_utf8(buf[..end].to_vec()).unwrap();
            let mut lines = head.lines();
            let path = lines.next().unwrap().split(' ').nth(1).unwrap().to_owned();
            let headers: BTreeMap<String, String> = lines
                .filter_map(|l| l.split_once(": "))
                .map(|(k, v)| (k.to_ascii_lowercase(), v.to_owned()))
                .collect();
            let length: usize = headers.get("content-length").map_or(0, |v| v.parse().unwrap());
            if buf.len() >= end + 4 + length {
                let body = buf[end + 4..end + 4 + length].to_vec();
                buf.drain(..end + 4 + length);
                return Some(Request { path, headers, body });
            }
        }
        match stream.read(&mut chunk).await {
            Ok(n @ 1..) => buf.extend_from_slice(&chunk[..n]),
            _ => return None,
        }
    }
}

/// A config with these receivers, as the file would have them.
pub(super) fn config(receivers: &str) -> Config {
    let none = BTreeMap::new();
    crate::config::parse("t.toml".as_ref(), receivers, &none, &Overrides::default())
        .unwrap_or_else(|e| panic!("{e}"))
}

/// One webhook receiver called `hook`.
pub(super) fn webhook(url: &str, more: &str) -> Config {
    config(&format!("[[receiver]]\nname = \"hook\"\ntype = \"webhook\"\nurl = \"{url}\"\n{more}\n"))
}

/// Waits until it holds; panics after 20 s.
pub(super) async fn until(what: &str, holds: impl AsyncFn() -> bool) {
    let started = std::time::Instant::now();
    while !holds().await {
        assert!(started.elapsed().as_secs() < 20, "waited for {what}");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}
