//! Empties the queue: carries out what the engine wants done, and passes its changes on.

use std::time::Duration;

use super::alert_causes;
use super::core::{Core, label};
use super::kills::{self, Client};
use crate::enforce::Lineage;
use crate::engine::{AlertChange, Change, Effect, JobEnded};
use crate::model::schema::{Alert, AlertKind};
use crate::notify::Submission;

/// How long a new alert waits for its cause before it is sent without one.
const CAUSE_WAIT: Duration = Duration::from_millis(700);
/// Meanwhile the alert is on the disk with a slightly longer delay: the core ends it.
const HOLD: Duration = Duration::from_millis(1_500);

/// Empties the queue, including what is added to it meanwhile. Reading /proc is only noted: see [`super::proc_poll`].
pub(super) fn apply(core: &mut Core) {
    while !core.queue.changes.is_empty() || !core.queue.effects.is_empty() {
        let queue = std::mem::take(&mut core.queue);
        for change in queue.changes {
            apply_change(core, change);
        }
        for effect in queue.effects {
            apply_effect(core, effect);
        }
    }
    core.save();
}

fn apply_effect(core: &mut Core, effect: Effect) {
    match effect {
        Effect::Look(key) => core.proc_reads.looks.push(key),
        Effect::ReadFacts(key) => core.proc_reads.facts.push(key),
        Effect::ReadCgroup { key, id } => core.proc_reads.cgroups.push((key, id)),
        // An error is logged; the next snapshot or restart labels the job again.
        Effect::LabelJob(job) => drop(label(&core.kernel, &job)),
        Effect::EnterProcess { process, parent, job, missed } => core.enter(process, parent, job, missed),
        Effect::CountMembers(number) => core.sync.emptied.push(number),
        Effect::Kill(spec) => kills::start(core, *spec, Client::None, None),
    }
}

fn apply_change(core: &mut Core, change: Change) {
    match change {
        // Saved: `Core::handle_at` has marked the state as changed.
        Change::Job(_) | Change::Enforcement(_) => {}
        Change::JobEnded(job) => job_ended(core, &job),
        Change::Alert { change, alert } => alert_changed(core, change, *alert),
    }
}

fn job_ended(core: &mut Core, job: &JobEnded) {
    core.cgroups.remove(&job.id);
    if let Err(e) = Lineage::forget(&*core.kernel, job.number) {
        tracing::warn!(job = %job.id, error = %e, "removing the job from the kernel's maps failed");
    }
    let took = job.ended.saturating_sub(job.started) as f64 / 1e9;
    tracing::info!(job = %job.id, name = %job.name, outcome = job.outcome.as_str(), took_s = took, "job ended");
}

fn alert_changed(core: &mut Core, change: AlertChange, mut alert: Alert) {
    alert.subject.iter_mut().for_each(|p| core.proc_reader.show(p));
    core.redact.alert(&mut alert);
    match change {
        AlertChange::Pending | AlertChange::Dropped => {}
        AlertChange::Fired if matches!(alert.kind, AlertKind::Zombie | AlertKind::Orphan) => {
            tracing::warn!(alert = %alert.id, kind = %alert.kind, job = %alert.job_name, "{}", alert.summary);
            let id = alert.id.clone();
            // Stored at once: an alert that was only in memory would be lost by a SIGKILL if its cause ends while no agent runs.
            let _ = core.submissions.send(Submission { alert: alert.clone(), hold: Some(HOLD) });
            core.awaiting_cause.insert(id.clone(), alert);
            alert_causes::search(core, id, CAUSE_WAIT);
        }
        AlertChange::Fired => {
            tracing::warn!(alert = %alert.id, kind = %alert.kind, job = %alert.job_name, "{}", alert.summary);
            submit(core, alert);
        }
        AlertChange::Updated => match core.awaiting_cause.get_mut(&alert.id) {
            Some(waiting) => *waiting = alert,
            None => submit(core, alert),
        },
        AlertChange::Resolved => {
            tracing::info!(alert = %alert.id, kind = %alert.kind, job = %alert.job_name, "resolved: {}", alert.summary);
            core.awaiting_cause.remove(&alert.id);
            submit(core, alert);
        }
    }
}

/// Hands an alert to the task that submits them, which ends after the core.
pub(super) fn submit(core: &Core, alert: Alert) {
    let _ = core.submissions.send(alert.into());
}
