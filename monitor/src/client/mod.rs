//! The other end of the control socket: one request, one answer, or the lines of `events`. Blocking: commands are.

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
        };
        ErrorInfo { code: code.into(), message: self.to_string(), hint: Some(hint), matches: Vec::new() }
    }

    #[must_use]
    pub const fn class(&self) -> Class {
        match self {
            Self::Refused { class, .. } => *class,
            Self::Unreachable { .. } | Self::Broken { .. } => Class::Unavailable,
        }
    }
}

/// A client of the agent at one socket. Every call makes a connection of its own.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    runtime: tokio::runtime::Runtime,
}

impl Client {
    /// Connects to nothing yet.
    pub fn new(socket: &Path) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Self { socket: socket.to_owned(), runtime })
    }

    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// `query` is a struct of scalars: those that are null or false are left out.
    pub fn get<T: DeserializeOwned>(&self, path: &str, query: &impl Serialize) -> Result<T, ClientError> {
        self.runtime.block_on(self.ask(Method::GET, &format!("{path}{}", self.query(query)?), Vec::new()))
    }

    /// The JSON as it came.
    pub fn get_text(&self, path: &str, query: &impl Serialize) -> Result<String, ClientError> {
        let path = format!("{path}{}", self.query(query)?);
        self.runtime.block_on(async {
            let response = self.open(Method::GET, &path, Vec::new()).await?;
            String::from_utf8(self.whole(response).await?.into()).map_err(|e| self.broken(&e))
        })
    }

    /// The JSON of a tree, and the jobs and alerts that explain it, asked for at the same time: those are a help only, and a tree without
    /// them is better than none.
    pub fn tree(&self, query: &TreeQuery) -> Result<(Bytes, Option<Jobs>, Option<Alerts>), ClientError> {
        let path = format!("/v1/tree{}", self.query(query)?);
        let get = |path| self.open(Method::GET, path, Vec::new());
        let bytes = async { self.whole(get(&path).await?).await };
        self.runtime.block_on(async {
            let (tree, jobs, alerts) = tokio::join!(
                bytes,
                self.ask::<Jobs>(Method::GET, "/v1/jobs", Vec::new()),
                self.ask::<Alerts>(Method::GET, "/v1/alerts", Vec::new())
            );
            Ok((tree?, jobs.ok(), alerts.ok()))
        })
    }

    pub fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|e| self.broken(&e))?;
        self.runtime.block_on(self.ask(Method::POST, path, body))
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
            let mut body = self.open(Method::GET, &path, Vec::new()).await?.into_body();
            let mut rest = Vec::new();
            while let Some(frame) = body.frame().await {
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
    ) -> Result<T, ClientError> {
        let response = self.open(method, path, body).await?;
        let bytes = self.whole(response).await?;
        serde_json::from_slice(&bytes).map_err(|e| self.not_understood(&e))
    }

    /// The agent is of another version.
    #[must_use]
    pub fn not_understood(&self, e: &serde_json::Error) -> ClientError {
        self.broken(&format_args!("an answer that this client does not understand: {e}"))
    }

    async fn whole(&self, response: Response<Incoming>) -> Result<Bytes, ClientError> {
        let read = Limited::new(response.into_body(), ANSWER).collect().await;
        Ok(read.map_err(|e| self.broken(&e))?.to_bytes())
    }

    /// Sends the request; an answer other than 200 is an error.
    async fn open(
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
        let q =
            TreeQuery {
                target: Some(Target::Name("a b&c=é".into())), zombies: true, ..TreeQuery::default()
            };
        let text = client.query(&q).unwrap();
        assert_eq!(text, "?target=name%3Aa%20b%26c%3D%C3%A9&zombies=true");
        let uri: hyper::Uri = format!("/v1/tree{text}").parse().unwrap();
        assert_eq!(axum::extract::Query::<TreeQuery>::try_from_uri(&uri).unwrap().0, q);
        let e = client.get::<()>("/x", &TreeQuery::default()).unwrap_err();
        assert!(matches!(e, ClientError::Unreachable { .. }), "{e}");
        assert_eq!((e.class().exit_status(), e.info().code.as_str()), (3, "agent-not-reachable"));
    }
}
