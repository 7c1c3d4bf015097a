//! The agent's state: the engine, what the handlers share, and the queue of what the engine wants done. A handler changes the
//! engine through [`Core::handle`]; [`super::effects::apply`] empties the queue. Nothing here imports a handler or the event loop.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;

use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc, watch};

use super::cause_cache::CauseCache;
use super::message::Message;
use super::missed_reaps::MissedReaps;
use super::options::Options;
use super::proc_reader::ProcReader;
use super::recorded_engine::RecordedEngine;
use super::service_manager::ServiceManager;
use super::storage::Storage;
use super::sync::Sync;
use crate::api::{Feed, Peer, Readiness, Reloaded, Reply};
use crate::config::Config;
use crate::enforce::{Audit, Enforcer, Lineage};
use crate::engine::{Answer, Change, Effect, Input, JobRecord, Output};
use crate::metrics::Counts;
use crate::model::key::Key;
use crate::model::schema::{Alert, JobId};
use crate::notify::{AlertService, Submission};
use crate::redact::Redactor;
use crate::sources::host;
use crate::sources::kernel::Kernel;
use crate::state::{Kill, StateWriter};

pub(super) struct Core {
    pub engine: RecordedEngine,
    /// What the engine wants done. A handler only adds to it.
    pub queue: Output,
    pub kernel: Arc<Kernel>,
    pub proc_reader: ProcReader,
    pub enforcer: Enforcer,
    pub audit: Arc<Audit>,
    pub alert_service: AlertService,
    /// To the task that submits alerts to the service, in order.
    pub submissions: mpsc::UnboundedSender<Submission>,
    pub redact: Arc<Redactor>,
    pub feed: Feed,
    pub counts: Counts,
    pub config: Config,
    pub options: Options,
    /// Boot-time ns.
    pub started: u64,
    pub boot_id: String,
    pub ready: watch::Sender<Readiness>,
    pub messages: mpsc::UnboundedSender<Message>,
    /// The runtime of everything that takes time.
    pub background: Handle,
    pub causes: CauseCache,
    /// New alerts whose cause is being looked for. They are sent when it is found, or after a time limit.
    pub awaiting_cause: HashMap<String, Alert>,
    /// The cgroups that jobs of `exec --cgroup` own.
    pub cgroups: HashMap<JobId, PathBuf>,
    /// Kills ordered by operators that have not ended, in the order of the requests.
    pub kills: BTreeMap<u64, Kill>,
    pub service_manager: ServiceManager,
    pub writer: StateWriter,
    pub storage: Storage,
    pub reloads: Reloads,
    /// The state has changed since it was last handed to the writer.
    pub state_dirty: bool,
    /// The change must survive a power cut.
    pub sync_needed: bool,
    pub proc_reads: ProcReads,
    /// Time of the last record that was read.
    pub read_to: u64,
    pub sync: Sync,
    pub reaps: MissedReaps,
}

/// What the engine wants read from /proc; collected during a turn of the event loop.
#[derive(Debug)]
pub(super) struct ProcReads {
    pub looks: Vec<Key>,
    pub facts: Vec<Key>,
    pub cgroups: Vec<(Key, u64)>,
    /// As many readers of facts at a time as there are processors.
    pub fact_readers: Arc<Semaphore>,
}

impl Default for ProcReads {
    fn default() -> Self {
        let readers = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            looks: Vec::new(),
            facts: Vec::new(),
            cgroups: Vec::new(),
            fact_readers: Arc::new(Semaphore::new(readers)),
        }
    }
}

/// One reload runs at a time and the others wait for its end, so that the config that was read last is the one in force.
#[derive(Debug, Default)]
pub(super) struct Reloads {
    pub running: bool,
    pub waiting: VecDeque<(Option<Peer>, Option<Reply<Reloaded>>)>,
}

impl Core {
    /// Hands an input to the engine; what it leads to is added to the queue. A change that must be saved counts as unsaved from
    /// here on, so that a reply which waits for it ([`Core::when_saved`]) may be prepared before the queue is emptied.
    pub(super) fn handle_at(&mut self, input: Input<'_>, at: u64) -> Answer {
        let first = self.queue.changes.len();
        let answer = self.engine.handle(input, at, &mut self.queue);
        for change in &self.queue.changes[first..] {
            match change {
                Change::Job(_) | Change::JobEnded(_) => self.state_dirty = true,
                Change::Enforcement(_) => (self.state_dirty, self.sync_needed) = (true, true),
                Change::Alert { .. } => {}
            }
        }
        answer
    }

    pub(super) fn handle(&mut self, input: Input<'_>) -> Answer {
        self.handle_at(input, host::boot_now())
    }

    /// Enters the jobs in the queue into the kernel's maps now. The first error is returned; each is logged.
    pub(super) fn label_queued_jobs(&mut self) -> std::io::Result<()> {
        let mut result = Ok(());
        for effect in self.queue.effects.extract_if(.., |e| matches!(e, Effect::LabelJob(_))) {
            if let Effect::LabelJob(job) = effect {
                result = result.and(label(&self.kernel, &job));
            }
        }
        result
    }
}

/// Enters a job into the kernel's maps.
pub(super) fn label(kernel: &Kernel, job: &JobRecord) -> std::io::Result<()> {
    let done = Lineage::label(kernel, job.number, job.outer, job.id.root);
    if let Err(e) = &done {
        tracing::error!(job = %job.id, error = %e, "entering the job into the kernel's maps failed");
    }
    tracing::info!(job = %job.id, name = %job.name, "job registered");
    done
}

pub(super) fn wall_seconds() -> f64 {
    (host::boot_now() + host::boot_to_wall()) as f64 / 1e9
}
