//! How others talk to the agent: the control socket (HTTP/JSON over a unix socket) and the TCP listener for Prometheus.
//!
//! It answers nothing by itself: each request is sent to the agent as a [`Request`] with a oneshot for the reply. It does
//! not touch the forest, the kernel or the store, so a busy client cannot hold them up.

mod admission;
mod bind;
mod connection;
mod control;
mod error;
mod feed;
mod limit;
mod peer;
mod public;
mod request;
mod server;
mod shared;
mod target;
mod tcp_peer;
#[cfg(test)]
mod tests;
pub mod wire;

pub use bind::ServeError;
pub use error::{ApiError, Class, Matched};
pub(crate) use feed::innermost;
pub use feed::{Chain, Feed, Subscription, Teller};
pub use request::{
    AlertQuery, AuditLines, EnforcementStatus, EventFilter, ExecEnd, ExecEnded, ExecRegistered, ExecRequest,
    ExecSignal, ExtendReply, KillRequest, Notified, Peer, Reloaded, Reply, Request, Status, TreeQuery,
    WhyQuery,
};
pub use server::{Backend, ConnectionNumbers, Listeners, Metrics, MetricsPage, Options, Readiness, Server};
pub use target::{Target, TargetError};
