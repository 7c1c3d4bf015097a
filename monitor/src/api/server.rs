//! The two listeners and their connections: bounded in number, rate, size and patience.
//!
//! A [`Server`] is ready when `start` returns. It runs in tasks of its own and shares no lock with the agent's core.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinSet;

use super::bind::{self, Bound, ServeError};
use super::limit::{Rate, TimeoutStream};
use super::{Request, control, peer, public};
use crate::metrics::encode::Format;

/// How long a client may take to send a request's head, and to take what is written to it.
const PATIENCE: Duration = Duration::from_secs(5);
/// Request line and headers together.
const HEAD_BYTES: usize = 16 << 10;
/// Connections at a time: of the privileged, of readers (beside those that follow events), of TCP.
const CONNECTIONS: usize = 64;
/// How long connections may take to finish when the server stops.
const DRAIN: Duration = Duration::from_secs(2);

/// Where to listen.
#[derive(Clone, Debug)]
pub struct Options {
    pub socket: PathBuf,
    /// Members may read; empty: nobody but root.
    pub socket_group: String,
    /// None: no TCP listener.
    pub listen: Option<SocketAddr>,
    pub version: String,
}

impl Options {
    #[must_use]
    pub fn new(agent: &crate::config::Agent, version: impl Into<String>) -> Self {
        Self {
            socket: agent.socket.clone(),
            socket_group: agent.socket_group.clone(),
            listen: Some(agent.listen),
            version: version.into(),
        }
    }
}

/// Whether the agent is ready, and if not, why.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Readiness {
    pub ready: bool,
    /// Also while it is ready: what is not as it should be (a resync).
    pub reasons: Vec<String>,
}

/// The page for `/metrics`; None when the core cannot give it any more.
pub type MetricsPage = Pin<Box<dyn Future<Output = Option<String>> + Send>>;
pub type Metrics = Arc<dyn Fn(Format) -> MetricsPage + Send + Sync>;

/// Who answers.
#[derive(Clone)]
pub struct Backend {
    pub requests: mpsc::Sender<Request>,
    pub metrics: Metrics,
    pub ready: watch::Receiver<Readiness>,
}

/// Both listeners, bound and served. Dropped or stopped, they are closed and the socket's file is gone.
#[derive(Debug)]
pub struct Server {
    // Fields are dropped in this order: the file goes before its listener.
    bound: Bound,
    tasks: JoinSet<()>,
    stop: watch::Sender<bool>,
    tcp: Option<SocketAddr>,
}

/// Both sockets, bound and not yet served: clients wait.
#[derive(Debug)]
pub struct Listeners {
    bound: Bound,
    unix: std::os::unix::net::UnixListener,
    tcp: Option<(SocketAddr, std::net::TcpListener)>,
}

impl Listeners {
    /// Needs no runtime.
    pub fn bind(options: &Options) -> Result<Self, ServeError> {
        let group = match options.socket_group.as_str() {
            "" => None,
            name => Some(
                crate::config::group_id(name).ok_or_else(|| ServeError::Group { group: name.to_owned() })?,
            ),
        };
        let tcp = options.listen.map(|a| bind::tcp(a).map(|l| (a, l))).transpose()?;
        let (unix, bound) = bind::control(&options.socket, group)?;
        Ok(Self { bound, unix, tcp })
    }
}

impl Server {
    /// Binds and serves. Must be called within a tokio runtime.
    pub fn start(options: &Options, backend: &Backend) -> Result<Self, ServeError> {
        Self::serve(Listeners::bind(options)?, options, backend)
    }

    /// Serves what is bound. Must be called within a tokio runtime.
    pub fn serve(listeners: Listeners, options: &Options, backend: &Backend) -> Result<Self, ServeError> {
        let Listeners { bound, unix, tcp } = listeners;
        let at = |source| ServeError::Socket { path: options.socket.clone(), doing: "serving it", source };
        let unix = UnixListener::from_std(unix).map_err(at)?;
        let (stop, stopped) = watch::channel(false);
        let mut tasks = JoinSet::new();
        let mut bound_tcp = None;
        if let Some((address, listener)) = tcp {
            let at = |source| ServeError::Listen { address, source };
            let listener = TcpListener::from_std(listener).map_err(at)?;
            bound_tcp = Some(listener.local_addr().map_err(at)?);
            let router = public::router(backend, options);
            tasks.spawn(serve_tcp(listener, router, stopped.clone()));
        }
        tasks.spawn(serve_unix(unix, control::router(backend), stopped));
        Ok(Self { tasks, stop, tcp: bound_tcp, bound })
    }

    /// The address of the TCP listener, with the port that the kernel chose if it was 0.
    #[must_use]
    pub const fn tcp_address(&self) -> Option<SocketAddr> {
        self.tcp
    }

    /// Takes no more, lets what is under way finish within two seconds, and removes the socket's file.
    pub async fn stop(self) {
        let Self { bound, mut tasks, stop, .. } = self;
        drop(bound);
        let _ = stop.send(true);
        let all = async { while tasks.join_next().await.is_some() {} };
        // What is not done by then is aborted as the set is dropped.
        let _ = tokio::time::timeout(DRAIN + Duration::from_secs(1), all).await;
    }
}

/// The bounds of one kind of client.
struct Bounds {
    connections: Arc<Semaphore>,
    rate: Arc<Rate>,
}

impl Bounds {
    fn new(burst: f64, per_second: f64) -> Self {
        Self {
            connections: Arc::new(Semaphore::new(CONNECTIONS)),
            rate: Arc::new(Rate::new(burst, per_second)),
        }
    }
}

async fn serve_tcp(listener: TcpListener, router: Router, mut stopped: watch::Receiver<bool>) {
    let bounds = Bounds::new(100.0, 50.0);
    let mut connections = JoinSet::new();
    loop {
        let stream = tokio::select! {
            () = told_to(&mut stopped) => break,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(e) => { pause(&e).await; continue }
            },
        };
        // Too many: the newest is closed, so those that are there are served.
        let Ok(permit) = bounds.connections.clone().try_acquire_owned() else { continue };
        connections.spawn(connection(
            stream,
            router.clone(),
            None,
            bounds.rate.clone(),
            stopped.clone(),
            permit,
        ));
    }
    drain(connections).await;
}

async fn serve_unix(listener: UnixListener, router: Router, mut stopped: watch::Receiver<bool>) {
    // Readers of the group cannot keep root out.
    let (root, readers) = (Bounds::new(500.0, 200.0), Bounds::new(100.0, 50.0));
    let mut connections = JoinSet::new();
    loop {
        let stream = tokio::select! {
            () = told_to(&mut stopped) => break,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(e) => { pause(&e).await; continue }
            },
        };
        let peer = match peer::peer(&stream) {
            Ok(p) => p,
            Err(e) => {
                tracing::warn!(error = %e, "a client's credentials cannot be read: it is turned away");
                continue;
            }
        };
        let bounds = if peer.privileged { &root } else { &readers };
        let Ok(permit) = bounds.connections.clone().try_acquire_owned() else {
            tracing::warn!(uid = peer.uid, pid = peer.pid, "too many connections: a client is turned away");
            continue;
        };
        let rate = bounds.rate.clone();
        connections.spawn(connection(stream, router.clone(), Some(peer), rate, stopped.clone(), permit));
    }
    drain(connections).await;
}

/// Ends when the server is told to stop.
async fn told_to(stopped: &mut watch::Receiver<bool>) {
    // An error means that the server is gone: that is a stop too.
    let _ = stopped.wait_for(|s| *s).await;
}

/// accept(2) fails when descriptors run out: trying again at once would only burn a CPU.
async fn pause(e: &io::Error) {
    tracing::warn!(error = %e, "a connection cannot be accepted");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

async fn drain(mut connections: JoinSet<()>) {
    let all = async { while connections.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(DRAIN, all).await;
}

async fn connection<S>(
    stream: S,
    router: Router,
    peer: Option<super::Peer>,
    rate: Arc<Rate>,
    mut stopped: watch::Receiver<bool>,
    permit: OwnedSemaphorePermit,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
        let (router, peer) = (router.clone(), peer.clone());
        // What costs the core nothing (probes ask often while they wait) is not counted.
        let counted = peer.is_some() || request.uri().path() == "/metrics";
        let allowed = !counted || rate.take();
        async move {
            if !allowed {
                return Ok::<_, Infallible>(super::error::too_many());
            }
            let mut request = request.map(Body::new);
            if let Some(p) = peer {
                request.extensions_mut().insert(p);
            }
            hyper::service::Service::call(&TowerToHyperService::new(router), request).await
        }
    });
    let io = TokioIo::new(TimeoutStream::new(stream, PATIENCE));
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(io, service);
    let mut served = std::pin::pin!(served);
    let ended = tokio::select! {
        r = served.as_mut() => r,
        () = told_to(&mut stopped) => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(e) = ended {
        tracing::debug!(error = %e, "a client's connection broke");
    }
    drop(permit);
}
