//! The other end of the control socket: one request, one answer, or the lines of `events`. Blocking: commands are.
//!
//! No call waits for ever. Each has a limit of its own for the answer to begin; and while a call waits, for an answer or for
//! the next line of `events`, the agent is pinged, so that an agent that hangs is noticed long before a long answer is due.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::api::{Class, TreeQuery};
use crate::model::schema::{Alerts, ErrorBody, ErrorInfo, Jobs};

/// How long the agent may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// How long to wait before the next try where the agent's queue is full.
const AGAIN: Duration = Duration::from_millis(10);
/// How long an answer may take to begin, where the caller says nothing else: the agent gives up itself after 30 s.
const WITHIN: Duration = Duration::from_mins(1);
/// How long the agent may take to answer a ping, where the caller says nothing else.
const SILENCE: Duration = Duration::from_secs(12);
/// Time from the answer of one ping to the next, and to the first.
const PING: Duration = Duration::from_secs(1);
/// How long the agent may take for the next part of an answer that has begun.
const PART: Duration = Duration::from_secs(10);
/// Bytes of an answer: a tree of a few hundred thousand processes.
const ANSWER: usize = 512 << 20;
/// Bytes of one line of `events`.
const LINE: usize = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("no agent at {socket}: {source}")]
    Unreachable { socket: PathBuf, source: io::Error },
    #[error("{}", info.message)]
    Refused { class: Class, info: ErrorInfo },
    #[error("the agent at {socket} broke off: {why}")]
    Broken { socket: PathBuf, why: String },
    #[error("the agent at {socket} does not answer: waited for {waited:?}")]
    Silent { socket: PathBuf, waited: Duration },
}

impl ClientError {
    /// As the contract's error object, whatever happened.
    #[must_use]
    pub fn info(&self) -> ErrorInfo {
        let (code, hint) = match self {
            Self::Refused { info, .. } => return info.clone(),
            Self::Unreachable { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied => {
                    ("not-permitted", "run it as root, or as a member of the agent's socket_group".to_owned())
                }
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => (
                    "agent-not-reachable",
                    "start it (`systemctl start jobwarden`, or `jobwarden agent`), or give its socket with --socket or \
                     JOBWARDEN_SOCKET"
                        .to_owned(),
                ),
                _ => ("agent-not-reachable", "see the agent's log".to_owned()),
            },
            Self::Broken { .. } => {
                ("agent-broke-off", "see the agent's log (`journalctl -u jobwarden`)".to_owned())
            }
            Self::Silent { .. } => (
                "agent-not-answering",
                "it accepts connections and does nothing: see its log (`journalctl -u jobwarden`), or restart it".to_owned(),
            ),
        };
        ErrorInfo { code: code.into(), message: self.to_string(), hint: Some(hint), matches: Vec::new() }
    }

    #[must_use]
    pub const fn class(&self) -> Class {
        match self {
            Self::Refused { class, .. } => *class,
            Self::Unreachable { .. } | Self::Broken { .. } | Self::Silent { .. } => Class::Unavailable,
        }
    }
}

/// A client of the agent at one socket. Every call makes a connection of its own.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    runtime: tokio::runtime::Runtime,
    silence: Duration,
}

impl Client {
    /// Connects to nothing yet.
    pub fn new(socket: &Path) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Self { socket: socket.to_owned(), runtime, silence: SILENCE })
    }

    /// How long the agent may leave a ping unanswered before it is taken for hung.
    #[must_use]
    pub fn silence(self, silence: Duration) -> Self {
        Self { silence, ..self }
    }

    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// `query` is a struct of scalars: those that are null or false are left out.
    pub fn get<T: DeserializeOwned>(&self, path: &str, query: &impl Serialize) -> Result<T, ClientError> {
        self.runtime.block_on(self.ask(
            Method::GET,
            &format!("{path}{}", self.query(query)?),
            Vec::new(),
            WITHIN,
        ))
    }

    /// The JSON as it came.
    pub fn get_text(&self, path: &str, query: &impl Serialize) -> Result<String, ClientError> {
        let path = format!("{path}{}", self.query(query)?);
        self.runtime.block_on(async {
            let response = self.open(Method::GET, &path, Vec::new(), WITHIN).await?;
            String::from_utf8(self.whole(response).await?.into()).map_err(|e| self.broken(&e))
        })
    }

    /// The JSON of a tree, and the jobs and alerts that explain it, asked for at the same time: those are a help only, and a tree without
    /// them is better than none.
    pub fn tree(&self, query: &TreeQuery) -> Result<(Bytes, Option<Jobs>, Option<Alerts>), ClientError> {
        let path = format!("/v1/tree{}", self.query(query)?);
        let get = |path| self.open(Method::GET, path, Vec::new(), WITHIN);
        let bytes = async { self.whole(get(&path).await?).await };
        self.runtime.block_on(async {
            let (tree, jobs, alerts) = tokio::join!(
                bytes,
                self.ask::<Jobs>(Method::GET, "/v1/jobs", Vec::new(), WITHIN),
                self.ask::<Alerts>(Method::GET, "/v1/alerts", Vec::new(), WITHIN)
            );
            Ok((tree?, jobs.ok(), alerts.ok()))
        })
    }

    pub fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        self.post_within(path, body, WITHIN)
    }

    /// For a request that takes `time` on top of what every request may take, as a grace does.
    pub fn post_long<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        time: Duration,
    ) -> Result<T, ClientError> {
        self.post_within(path, body, time.saturating_add(WITHIN))
    }

    /// The answer must have begun within this time.
    pub fn post_within<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        within: Duration,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|e| self.broken(&e))?;
        self.runtime.block_on(self.ask(Method::POST, path, body, within))
    }

    /// Calls `line` with each line until the agent ends them or `line` says so (false).
    pub fn lines(
        &self,
        path: &str,
        query: &impl Serialize,
        mut line: impl FnMut(&[u8]) -> bool,
    ) -> Result<(), ClientError> {
        let path = format!("{path}{}", self.query(query)?);
        self.runtime.block_on(async {
            let mut body = self.open(Method::GET, &path, Vec::new(), WITHIN).await?.into_body();
            let mut rest = Vec::new();
            let mut silent = std::pin::pin!(self.silent());
            loop {
                let frame = tokio::select! {
                    frame = body.frame() => frame,
                    e = &mut silent => return Err(e),
                };
                let Some(frame) = frame else { break };
                let frame = frame.map_err(|e| self.broken(&e))?;
                rest.extend_from_slice(frame.data_ref().map_or(&[][..], |d| d));
                while let Some(end) = rest.iter().position(|&b| b == b'\n') {
                    let one: Vec<u8> = rest.drain(..=end).collect();
                    if !line(&one[..end]) {
                        return Ok(());
                    }
                }
                if rest.len() > LINE {
                    return Err(self.broken(&format_args!("a line of more than {LINE} bytes")));
                }
            }
            Ok(())
        })
    }

    fn broken(&self, why: &dyn std::fmt::Display) -> ClientError {
        ClientError::Broken { socket: self.socket.clone(), why: why.to_string() }
    }

    fn query(&self, query: &impl Serialize) -> Result<String, ClientError> {
        use serde_json::Value;
        let Value::Object(fields) = serde_json::to_value(query).map_err(|e| self.broken(&e))? else {
            return Ok(String::new());
        };
        let given = fields.iter().filter_map(|(k, v)| match v {
            Value::Null | Value::Bool(false) => None,
            Value::String(s) => Some(format!("{k}={}", percent(s))),
            v => Some(format!("{k}={}", percent(&v.to_string()))),
        });
        let joined = given.collect::<Vec<_>>().join("&");
        Ok(if joined.is_empty() { joined } else { format!("?{joined}") })
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
        within: Duration,
    ) -> Result<T, ClientError> {
        let response = self.open(method, path, body, within).await?;
        let bytes = self.whole(response).await?;
        serde_json::from_slice(&bytes).map_err(|e| self.not_understood(&e))
    }

    /// The agent is of another version.
    #[must_use]
    pub fn not_understood(&self, e: &serde_json::Error) -> ClientError {
        self.broken(&format_args!("an answer that this client does not understand: {e}"))
    }

    async fn whole(&self, response: Response<Incoming>) -> Result<Bytes, ClientError> {
        let mut body = Limited::new(response.into_body(), ANSWER);
        let mut all = Vec::new();
        while let Some(frame) =
            tokio::time::timeout(PART, body.frame()).await.map_err(|_| self.silent_for(PART))?
        {
            let frame = frame.map_err(|e| self.broken(&e))?;
            all.extend_from_slice(frame.data_ref().map_or(&[][..], |d| d));
        }
        Ok(all.into())
    }

    fn silent_for(&self, waited: Duration) -> ClientError {
        ClientError::Silent { socket: self.socket.clone(), waited }
    }

    /// Ends when the agent does not answer pings. They go through its core, as the request does. An error is an answer too: an
    /// agent that has ended, or has too many clients, shows that in the request itself.
    async fn silent(&self) -> ClientError {
        loop {
            let ping = self.open_unwatched(Method::GET, "/v1/ping", Vec::new());
            if tokio::time::timeout(self.silence, ping).await.is_err() {
                return self.silent_for(self.silence);
            }
            tokio::time::sleep(PING).await;
        }
    }

    async fn open(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
        within: Duration,
    ) -> Result<Response<Incoming>, ClientError> {
        let answer = tokio::time::timeout(within, self.open_unwatched(method, path, body));
        let silent = async {
            // Most answers come before that, and need no ping.
            tokio::time::sleep(PING).await;
            self.silent().await
        };
        tokio::select! {
            answer = answer => answer.unwrap_or_else(|_| Err(self.silent_for(within))),
            e = silent => Err(e),
        }
    }

    /// Sends the request; an answer other than 200 is an error.
    async fn open_unwatched(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<Response<Incoming>, ClientError> {
        let unreachable = |source| ClientError::Unreachable { socket: self.socket.clone(), source };
        let stream = tokio::time::timeout(CONNECT, connect(&self.socket))
            .await
            .map_err(|_| unreachable(io::ErrorKind::TimedOut.into()))?
            .map_err(unreachable)?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|e| self.broken(&e))?;
        // Its errors come out of the request as well.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(hyper::header::HOST, "jobwarden")
            .header(hyper::header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|e| self.broken(&e))?;
        let response = sender.send_request(request).await.map_err(|e| self.broken(&e))?;
        let status = response.status();
        if status == StatusCode::OK {
            return Ok(response);
        }
        let bytes = self.whole(response).await?;
        let info = match serde_json::from_slice::<ErrorBody>(&bytes) {
            Ok(b) => b.error,
            Err(_) => return Err(self.broken(&format_args!("HTTP status {status}"))),
        };
        Err(ClientError::Refused { class: Class::of_http(status.as_u16()), info })
    }
}

/// Waits for a place in the agent's queue: a socket that does not block is refused at once where that is full (connect(2)).
async fn connect(socket: &Path) -> io::Result<UnixStream> {
    loop {
        match UnixStream::connect(socket).await {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => tokio::time::sleep(AGAIN).await,
            r => return r,
        }
    }
}

/// RFC 3986: all but the unreserved as %XX.
fn percent(s: &str) -> String {
    use std::fmt::Write as _;
    let mut out = String::with_capacity(s.len());
    for b in s.bytes() {
        if b.is_ascii_alphanumeric() || b"-._~".contains(&b) {
            out.push(char::from(b));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(out, "%{b:02X}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Target;

    #[test]
    fn queries_are_escaped_and_read_back() {
        let client = Client::new(Path::new("/nowhere/s")).unwrap();
        let named = |name: &str| TreeQuery {
            target: Some(Target::Name(name.into())),
            zombies: true,
            ..TreeQuery::default()
        };
        let read = |text: &str| {
            let uri: hyper::Uri = format!("/v1/tree{text}").parse().unwrap();
            axum::extract::Query::<TreeQuery>::try_from_uri(&uri).map(|q| q.0)
        };
        let text = client.query(&named("a.b-c")).unwrap();
        assert_eq!(text, "?target=name%3Aa.b-c&zombies=true");
        assert_eq!(read(&text).unwrap(), named("a.b-c"));
        let text = client.query(&named("a b&c=é")).unwrap();
        assert_eq!(text, "?target=name%3Aa%20b%26c%3D%C3%A9&zombies=true");
        assert!(read(&text).is_err(), "no job has such a name");
        let e = client.get::<()>("/x", &TreeQuery::default()).unwrap_err();
        assert!(matches!(e, ClientError::Unreachable { .. }), "{e}");
        assert_eq!((e.class().exit_status(), e.info().code.as_str()), (3, "agent-not-reachable"));
    }
}
