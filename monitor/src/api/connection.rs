//! One client's connection: its requests one after the other, within the bounds of its account and of time.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::response::Response;
use hyper::body::{Frame, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::watch;

use super::admission::{Account, Busy, Connection};
use super::limit::TimeoutStream;
use super::{Peer, error};

/// From the first moment of a connection, or the end of the request before, to the end of a request's head. So it bounds
/// idle connections and clients that send a byte now and then as well.
const HEAD_TIME: Duration = Duration::from_secs(5);
/// Request line and headers together.
const HEAD_BYTES: usize = 16 << 10;
/// How long a client may read nothing of what was written to it.
const STALLED: Duration = Duration::from_secs(5);
/// How long it may take to read what was written at once.
const READ_TIME: Duration = Duration::from_secs(30);
/// A client that asks too often waits this long before it is told so: it cannot ask again meanwhile.
const TOO_OFTEN: Duration = Duration::from_millis(100);
/// Cost of a request on TCP that the core has no part in (probes ask often while they wait), in requests.
const CHEAP: f64 = 0.05;

/// Serves until the client leaves, is too slow, is evicted, or the server stops.
pub(super) async fn serve<S>(
    stream: S,
    router: Router,
    peer: Option<Peer>,
    connection: Connection,
    mut stopped: watch::Receiver<bool>,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let evicted = connection.evicted();
    let service = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
        let (router, peer) = (router.clone(), peer.clone());
        let (busy, account) = (connection.begin(), Arc::clone(&connection.account));
        async move {
            let cost = if peer.is_some() || request.uri().path() == "/metrics" { 1.0 } else { CHEAP };
            if !allowed(&account, cost).await {
                return Ok::<_, Infallible>(error::too_often());
            }
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(account);
            if let Some(p) = peer {
                request.extensions_mut().insert(p);
            }
            let answer = hyper::service::Service::call(&TowerToHyperService::new(router), request).await;
            answer.map(|r: Response| r.map(|body| Body::new(Tracked { body, _busy: busy })))
        }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(TokioIo::new(TimeoutStream::new(stream, STALLED, READ_TIME)), service);
    let mut served = std::pin::pin!(served);
    let ended = tokio::select! {
        r = served.as_mut() => r,
        () = evicted => return,
        () = stop_of(&mut stopped) => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(e) = ended {
        tracing::debug!(error = %e, "a client's connection broke");
    }
}

async fn allowed(account: &Account, cost: f64) -> bool {
    if account.rate.take(cost) {
        return true;
    }
    tokio::time::sleep(TOO_OFTEN).await;
    account.rate.take(cost)
}

/// Ends when the server is told to stop.
pub(super) async fn stop_of(stopped: &mut watch::Receiver<bool>) {
    // An error means that the server is gone: that is a stop too.
    let _ = stopped.wait_for(|s| *s).await;
}

/// Answers the first request of a connection that found no place, whatever it asks.
pub(super) async fn refuse<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S) {
    let body = serde_json::to_vec(&error::no_place().body()).unwrap_or_default();
    let head = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nconnection: close\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    let answer = async {
        // An answer before the request would confuse the client.
        let _some = stream.read(&mut [0; 1024]).await?;
        tokio::time::sleep(TOO_OFTEN).await;
        stream.write_all(&[head.as_bytes(), &body].concat()).await
    };
    let _ = tokio::time::timeout(Duration::from_secs(1), answer).await;
}

/// A body whose request is under way until it is read to its end or dropped.
struct Tracked {
    body: Body,
    _busy: Busy,
}

impl HttpBody for Tracked {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A large answer, written piece by piece: no more of it than one piece waits in the connection's own buffer, and `permit` is
/// held until the last one is there.
pub(super) struct Pieces<P> {
    left: Bytes,
    until: tokio::time::Instant,
    _permit: P,
}

const PIECE: usize = 64 << 10;

impl<P> Pieces<P> {
    pub(super) fn new(bytes: Bytes, permit: P) -> Self {
        Self { left: bytes, until: tokio::time::Instant::now() + READ_TIME, _permit: permit }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the client did not read its answer within {READ_TIME:?}")]
pub(super) struct NotRead;

impl<P: Unpin> HttpBody for Pieces<P> {
    type Data = Bytes;
    type Error = NotRead;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, NotRead>>> {
        if self.left.is_empty() {
            return Poll::Ready(None);
        }
        if tokio::time::Instant::now() >= self.until {
            return Poll::Ready(Some(Err(NotRead)));
        }
        let n = self.left.len().min(PIECE);
        Poll::Ready(Some(Ok(Frame::data(self.left.split_to(n)))))
    }

    fn is_end_stream(&self) -> bool {
        self.left.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left.len() as u64)
    }
}
