//! The two listeners: clients are admitted within bounds, and the control socket is put back where it was removed.
//!
//! A [`Server`] is ready when `start` returns. It runs in tasks of its own and shares no lock with the agent's core.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::admission::{Bounds, Owner, Pool};
use super::bind::{self, Checked, ControlPath, PathWatch, ServeError};
use super::connection::{self, stop_of};
use super::{Peer, Request, control, peer, public, tcp_peer};
use crate::metrics::encode::Format;
use crate::model::stats::StoreNumbers;

/// Root's reserve is large: each of its `exec` and `kill` under way has a connection.
const UNIX: Bounds =
    Bounds { connections: 384, reserve: 256, per_owner: 16, rate: (100.0, 50.0), root_rate: (500.0, 200.0) };
const TCP: Bounds =
    Bounds { connections: 128, reserve: 32, per_owner: 16, rate: (100.0, 50.0), root_rate: (100.0, 50.0) };
/// How long connections may take to finish when the server stops.
const DRAIN: Duration = Duration::from_secs(2);
/// How often the control socket's path is looked at.
const PATH_CHECK: Duration = Duration::from_secs(2);

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
    path: ControlPath,
    tasks: JoinSet<()>,
    stop: watch::Sender<bool>,
    tcp: Option<SocketAddr>,
    pools: Vec<(&'static str, Arc<Pool>)>,
}

/// How many connections there are, may be, and were closed or refused for want of a place.
pub type ConnectionNumbers = Arc<dyn Fn() -> Vec<StoreNumbers> + Send + Sync>;

/// Both sockets, bound and not yet served: clients wait.
#[derive(Debug)]
pub struct Listeners {
    path: ControlPath,
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
        let (unix, path) = ControlPath::bind(&options.socket, group)?;
        Ok(Self { path, unix, tcp })
    }
}

impl Server {
    /// Binds and serves. Must be called within a tokio runtime.
    pub fn start(options: &Options, backend: &Backend) -> Result<Self, ServeError> {
        Self::serve(Listeners::bind(options)?, options, backend)
    }

    /// Serves what is bound. Must be called within a tokio runtime.
    pub fn serve(listeners: Listeners, options: &Options, backend: &Backend) -> Result<Self, ServeError> {
        let Listeners { path, unix, tcp } = listeners;
        let at = |source| ServeError::Socket { path: options.socket.clone(), doing: "serving it", source };
        let unix = UnixListener::from_std(unix).map_err(at)?;
        let (stop, stopped) = watch::channel(false);
        let mut tasks = JoinSet::new();
        let (mut bound_tcp, mut pools) = (None, Vec::new());
        let (lost, path_lost) = watch::channel(None);
        if let Some((address, listener)) = tcp {
            let at = |source| ServeError::Listen { address, source };
            let listener = TcpListener::from_std(listener).map_err(at)?;
            bound_tcp = Some(listener.local_addr().map_err(at)?);
            let clients = Clients::new(TCP, public::router(backend, options, path_lost), &stopped);
            pools.push(("tcp_connections", Arc::clone(&clients.pool)));
            tasks.spawn(serve_tcp(listener, clients));
        }
        let clients = Clients::new(UNIX, control::router(backend), &stopped);
        pools.push(("control_connections", Arc::clone(&clients.pool)));
        let (restored_tx, restored) = mpsc::channel(1);
        tasks.spawn(serve_unix(unix, clients, restored));
        tasks.spawn(watch_path(path.watch(), restored_tx, lost));
        Ok(Self { path, tasks, stop, tcp: bound_tcp, pools })
    }

    /// The address of the TCP listener, with the port that the kernel chose if it was 0.
    #[must_use]
    pub const fn tcp_address(&self) -> Option<SocketAddr> {
        self.tcp
    }

    #[must_use]
    pub fn connections(&self) -> ConnectionNumbers {
        let pools = self.pools.clone();
        Arc::new(move || pools.iter().map(|(name, pool)| pool.numbers(name)).collect())
    }

    /// Takes no more, lets what is under way finish within two seconds, and removes the socket's file.
    pub async fn stop(self) {
        let Self { path, mut tasks, stop, .. } = self;
        drop(path);
        let _ = stop.send(true);
        let all = async { while tasks.join_next().await.is_some() {} };
        // What is not done by then is aborted as the set is dropped.
        let _ = tokio::time::timeout(DRAIN + Duration::from_secs(1), all).await;
    }
}

/// The clients of one listener.
struct Clients {
    pool: Arc<Pool>,
    router: Router,
    stopped: watch::Receiver<bool>,
    connections: JoinSet<()>,
    /// Connections that found no place, until they are told so.
    refused: JoinSet<()>,
}

/// Refused connections that are told so at a time. Others are closed at once: they must not delay an accept.
const REFUSED: usize = 32;

impl Clients {
    fn new(bounds: Bounds, router: Router, stopped: &watch::Receiver<bool>) -> Self {
        let descriptors = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let bounds = bounds.within(descriptors.map_or(usize::MAX, |n| n as usize));
        Self {
            pool: Pool::new(bounds),
            router,
            stopped: stopped.clone(),
            connections: JoinSet::new(),
            refused: JoinSet::new(),
        }
    }

    /// Those that are evicted have a task as well until it runs and closes them; their number is bounded here.
    fn full(&self) -> bool {
        self.connections.len() >= 2 * self.pool.bounds().connections
    }

    fn serve<S>(&mut self, stream: S, owner: Owner, peer: Option<Peer>)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        if let Some(admitted) = self.pool.admit(owner) {
            let (router, stopped) = (self.router.clone(), self.stopped.clone());
            self.connections.spawn(connection::serve(stream, router, peer, admitted, stopped));
        } else {
            tracing::debug!(?owner, "connection rejected: too many");
            while self.refused.try_join_next().is_some() {}
            if self.refused.len() < REFUSED {
                self.refused.spawn(connection::refuse(stream));
            }
        }
    }

    /// accept(2) fails when descriptors run out: one is freed, and to try again at once would only burn a CPU.
    async fn not_accepted(&self, e: &io::Error) {
        let closed = self.pool.evict_one();
        tracing::warn!(error = %e, closed_an_idle_one = closed, "a connection cannot be accepted");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }

    async fn drain(mut self) {
        let all = async { while self.connections.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(DRAIN, all).await;
    }
}

async fn serve_tcp(listener: TcpListener, mut clients: Clients) {
    loop {
        tokio::select! {
            () = stop_of(&mut clients.stopped) => break,
            Some(_) = clients.connections.join_next() => {}
            accepted = listener.accept(), if !clients.full() => match accepted {
                Ok((stream, peer)) => {
                    let uid = stream.local_addr().ok().and_then(|local| tcp_peer::uid(local, peer));
                    let owner = match uid {
                        Some(0) => Owner::Root,
                        Some(uid) => Owner::Uid(uid),
                        None => Owner::Address(peer.ip()),
                    };
                    clients.serve(stream, owner, None);
                    // A client that has sent its request has it read before the next ones can evict it.
                    tokio::task::yield_now().await;
                }
                Err(e) => clients.not_accepted(&e).await,
            },
        }
    }
    clients.drain().await;
}

async fn serve_unix(
    mut listener: UnixListener,
    mut clients: Clients,
    mut restored: mpsc::Receiver<UnixListener>,
) {
    loop {
        tokio::select! {
            () = stop_of(&mut clients.stopped) => break,
            Some(_) = clients.connections.join_next() => {}
            Some(new) = restored.recv() => listener = new,
            accepted = listener.accept(), if !clients.full() => match accepted {
                Ok((stream, _)) => {
                    control_client(&mut clients, stream);
                    tokio::task::yield_now().await;
                }
                Err(e) => clients.not_accepted(&e).await,
            },
        }
    }
    clients.drain().await;
}

/// Each two seconds: whether clients still reach this agent. `lost` says why not.
async fn watch_path(
    path: PathWatch,
    restored: mpsc::Sender<UnixListener>,
    lost: watch::Sender<Option<String>>,
) {
    loop {
        tokio::time::sleep(PATH_CHECK).await;
        let look = path.clone();
        let Ok(checked) = tokio::task::spawn_blocking(move || look.check()).await else { return };
        let problem = match checked {
            Checked::Stopped => return,
            Checked::Ours => None,
            Checked::Restored(listener, group_error) => {
                let Ok(listener) = UnixListener::from_std(listener) else { return };
                if restored.send(listener).await.is_err() {
                    return;
                }
                match group_error {
                    None => tracing::warn!("control socket restored: its file had been removed"),
                    Some(e) => tracing::error!(
                        error = %e,
                        "control socket restored for root only: restart the agent to open it for agent.socket_group"
                    ),
                }
                None
            }
            Checked::Lost(e) => Some(format!("clients do not reach this agent: {e}")),
        };
        lost.send_if_modified(|now| {
            let changed = *now != problem;
            if changed && let Some(p) = &problem {
                tracing::error!("{p}");
            }
            *now = problem;
            changed
        });
    }
}

fn control_client(clients: &mut Clients, stream: UnixStream) {
    match peer::peer(&stream) {
        Ok(p) => {
            let owner = if p.privileged { Owner::Root } else { Owner::Uid(p.uid) };
            clients.serve(stream, owner, Some(p));
        }
        Err(e) => tracing::warn!(error = %e, "connection rejected: its credentials cannot be read"),
    }
}
