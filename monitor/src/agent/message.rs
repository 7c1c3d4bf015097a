//! What comes back to the event loop from work that runs beside it.

use tokio::sync::oneshot;

use crate::api::{Peer, Reloaded, Reply};
use crate::config::Config;
use crate::enforce;
use crate::engine::forest::Facts;
use crate::engine::{Gauges, Observation};
use crate::metrics::Counts;
use crate::model::key::Key;
use crate::model::kill::KillSpec;
use crate::model::schema::{Cause, JobId};
use crate::state::Report;

#[derive(Debug)]
pub(super) enum Message {
    Facts(Vec<(Key, Option<Facts>)>),
    Cgroups(Vec<Observation>),
    Cause {
        alert: String,
        cause: Option<Box<Cause>>,
    },
    /// A kill has ended.
    Killed {
        spec: Box<KillSpec>,
        /// Its key in [`Core::kills`](super::core::Core::kills).
        saved: Option<u64>,
        result: Result<Box<enforce::Outcome>, String>,
    },
    /// The state was written or could not be, or files of the state directory are damaged.
    Saved(Report),
    /// The client of this `exec` job did not get the reply to its registration.
    RegistrationUndelivered(JobId),
    /// Storing an alert failed, or works again (None).
    AlertStorage(Option<String>),
    /// Stores outside of the engine are full, or have room again (None).
    StoresFull(Option<String>),
    Reloaded {
        result: Result<Box<Config>, String>,
        peer: Option<Peer>,
        reply: Option<Reply<Reloaded>>,
    },
    Scrape(oneshot::Sender<(Gauges, Counts)>),
}
