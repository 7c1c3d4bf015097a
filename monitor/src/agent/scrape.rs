//! The page of `/metrics`. The core is asked for its numbers and has half a second to give them; under such a load the
//! last ones are shown. The probes' own counters are read here, beside the core.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::core::Internal;
use crate::api::{ConnectionNumbers, Metrics, MetricsPage};
use crate::engine::Gauges;
use crate::logging::Log;
use crate::metrics::{self, Counts, Sources, encode::Format};
use crate::model::stats::StoreNumbers;
use crate::notify::AlertService;
use crate::sources::host;
use crate::sources::kernel::{self, Kernel};
use crate::sources::proc::Proc;

const WAIT: Duration = Duration::from_millis(500);

struct Inner {
    core: mpsc::UnboundedSender<Internal>,
    log: Log,
    kernel: OnceLock<Arc<Kernel>>,
    center: OnceLock<AlertService>,
    connections: OnceLock<ConnectionNumbers>,
    last: Mutex<Option<(Gauges, Counts)>>,
    stores: Mutex<Vec<StoreNumbers>>,
}

/// The page, which knows more and more as the agent starts.
pub(super) struct Page(Arc<Inner>);

impl Page {
    pub(super) fn new(core: mpsc::UnboundedSender<Internal>, log: Log) -> Self {
        let (kernel, center, connections) = (OnceLock::new(), OnceLock::new(), OnceLock::new());
        Self(Arc::new(Inner {
            core,
            log,
            kernel,
            center,
            connections,
            last: Mutex::default(),
            stores: Mutex::default(),
        }))
    }

    pub(super) fn set_kernel(&self, k: Arc<Kernel>) {
        let _ = self.0.kernel.set(k);
    }

    pub(super) fn set_center(&self, c: AlertService) {
        let _ = self.0.center.set(c);
    }

    pub(super) fn set_connections(&self, of: ConnectionNumbers) {
        let _ = self.0.connections.set(of);
    }

    /// How full the stores outside of the engine are.
    pub(super) fn set_stores(&self, stores: Vec<StoreNumbers>) {
        *self.0.stores.lock().unwrap_or_else(PoisonError::into_inner) = stores;
    }

    pub(super) fn provider(&self) -> Metrics {
        let inner = Arc::clone(&self.0);
        Arc::new(move |format| {
            let inner = Arc::clone(&inner);
            Box::pin(async move { inner.page(format).await }) as MetricsPage
        })
    }
}

impl Inner {
    async fn page(&self, format: Format) -> Option<String> {
        let (tx, rx) = oneshot::channel();
        self.core.send(Internal::Scrape(tx)).ok()?;
        let fresh = tokio::time::timeout(WAIT, rx).await.ok().and_then(Result::ok);
        let (gauges, counts) = {
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(f) = fresh {
                *last = Some(f);
            }
            last.clone()?
        };
        let mut kernel = numbers(self.kernel.get()?);
        kernel.stores.clone_from(&self.stores.lock().unwrap_or_else(PoisonError::into_inner));
        kernel.stores.extend(self.connections.get().into_iter().flat_map(|of| of()));
        let notifications = self.center.get().map(AlertService::notifications).unwrap_or_default();
        Some(metrics::encode(
            &Sources {
                version: crate::VERSION,
                revision: crate::REVISION,
                object: kernel::object_hash(),
                gauges: &gauges,
                counts: &counts,
                kernel: &kernel,
                notifications: &notifications,
                log_dropped: self.log.dropped(),
                proc: &Proc::default(),
                boot_to_wall_ns: host::boot_to_wall(),
            },
            format,
        ))
    }
}

/// The probes' accounts. What cannot be read is left out: the scrape goes on.
fn numbers(k: &Kernel) -> metrics::Kernel {
    fn read<T>(what: &str, r: std::io::Result<T>) -> Option<T> {
        r.map_err(|e| tracing::error!(error = %e, what, "the probes' accounts cannot be read")).ok()
    }
    let probe = |p: kernel::ProbeStat| metrics::Probe {
        name: p.name.to_owned(),
        attached: p.attached,
        run: (p.runs > 0).then_some((p.run_time_ns as f64 / 1e9, p.runs)),
    };
    metrics::Kernel {
        counters: read("counters", k.totals()),
        ring_used: k.ring_used(),
        ring_size: k.ring_size(),
        kills: read("kills", k.kills()),
        // One that is run by hand hangs on nothing: it would show as detached for ever.
        probes: read("programs", k.probes())
            .unwrap_or_default()
            .into_iter()
            .filter(|p| !p.by_hand)
            .map(probe)
            .collect(),
        stores: Vec::new(),
    }
}
