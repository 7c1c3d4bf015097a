//! `status`, and the answers about enforcement and the audit.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::agent::core::Core;
use crate::agent::options::default_config;
use crate::agent::replies::{audited, reply_when_saved};
use crate::api::{ApiError, AuditLines, EnforcementStatus, Peer, Reply, Status, Target as Named};
use crate::enforce::audit::{self, Audit};
use crate::engine::Input;
use crate::model::schema::AlertState;
use crate::model::time::rfc3339;
use crate::sources::{host, kernel};

/// Most audit entries in one answer, the newest.
const AUDIT_MAX: usize = 10_000;

/// `enforcement on` and `enforcement off`.
pub(super) fn set_enforcement(
    core: &mut Core,
    on: bool,
    lasts: Option<Duration>,
    peer: &Peer,
    reply: Reply<EnforcementStatus>,
) {
    core.handle(Input::Enforcement { on, lasts });
    audited(core, peer, if on { "enforcement on" } else { "enforcement off" }, &Ok(()));
    reply_when_saved(core, reply, Ok(enforcement(core)));
}

fn enforcement(core: &Core) -> EnforcementStatus {
    let now = host::boot_now();
    let s = core.engine.enforcement_state();
    EnforcementStatus {
        enabled: core.engine.enforcing(now),
        until: s.until.map(|u| rfc3339(u.saturating_add(host::boot_to_wall()))),
        fuse_open: s.fuse_open,
        kills_last_minute: core.engine.kills_last_minute(now),
        max_kills_per_minute: core.config.enforcement.max_job_kills_per_minute,
    }
}

pub(super) fn status(core: &Core) -> Status {
    let now = host::boot_now();
    let g = core.engine.gauges(now);
    let by_kind = |of: &dyn Fn(usize) -> u64| -> BTreeMap<String, u64> {
        monitor_abi::KIND_NAMES.iter().enumerate().map(|(i, k)| ((*k).to_owned(), of(i))).collect()
    };
    // A counter that cannot be read is left out and named in `not_ready`: it is not 0.
    let counters = core.kernel.totals();
    let (mut not_ready, mut probes_off) = (core.ready.borrow().reasons.clone(), BTreeMap::new());
    if let Err(e) = &counters {
        not_ready.push(format!("the probes' counters cannot be read: {e}"));
    }
    match core.kernel.probes() {
        Ok(all) => probes_off.extend(all.into_iter().filter_map(|p| Some((p.name.to_owned(), p.off?)))),
        Err(e) => drop(probes_off.insert("all".to_owned(), format!("they cannot be asked: {e}"))),
    }
    let sum = |name: &str| g.processes.get(name).copied().unwrap_or(0);
    let alerts = core.engine.alerts(true);
    let firing = alerts.iter().filter(|a| a.state == AlertState::Firing).count();
    Status {
        version: crate::VERSION.to_owned(),
        revision: crate::REVISION.to_owned(),
        object: kernel::object_hash().to_owned(),
        host: host::hostname(),
        kernel: host::kernel_release(),
        pid: std::process::id(),
        started: rfc3339(core.started.saturating_add(host::boot_to_wall())),
        synced: core.counts.synced,
        not_ready,
        lost: counters.map(|c| by_kind(&|i| c[i].lost)).unwrap_or_default(),
        events: by_kind(&|i| core.counts.events[i]),
        processes: usize::try_from(g.processes.values().sum::<u64>()).unwrap_or(usize::MAX),
        zombies: usize::try_from(sum("zombie")).unwrap_or(usize::MAX),
        orphans: usize::try_from(g.jobs.values().map(|j| j.orphans).sum::<u64>()).unwrap_or(usize::MAX),
        jobs: core.engine.job_records().len(),
        enforcement: enforcement(core),
        alerts_firing: firing,
        alerts_pending: alerts.len() - firing,
        undelivered: core.alert_service.pending(),
        storage: core.storage.troubles(),
        probes_off,
        config: core.options.config_path.clone().or_else(default_config),
        config_ok: core.counts.reload_ok,
        listen: core.options.listening.map(|a| a.to_string()),
        pinned: core.config.agent.pin,
    }
}

pub(super) fn audit_lines(
    core: &Core,
    since: Option<Duration>,
    job: Option<&Named>,
    reply: Reply<AuditLines>,
) {
    let dir = core.config.agent.state_dir.clone();
    let since = since.and_then(|s| SystemTime::now().checked_sub(s));
    let job = job.map(|j| match j {
        Named::Name(n) => n.clone(),
        other => other.to_string(),
    });
    let written = Arc::clone(&core.audit);
    core.background.spawn_blocking(move || {
        // Entries that the disk does not take are missing; the alert `storage-failed` says so.
        written.flush(Audit::LAST);
        let read = audit::read(&dir, since, job.as_deref(), AUDIT_MAX);
        let _ = reply.send(
            read.map(|entries| AuditLines { entries })
                .map_err(|e| ApiError::failed(format!("the audit log in {}: {e}", dir.display()))),
        );
    });
}
