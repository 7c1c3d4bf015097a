//! Handles what comes back from background work.

use std::borrow::Cow;

use super::core::Core;
use super::message::Message;
use super::storage::Source;
use super::{effects, requests};
use crate::enforce::Outcome;
use crate::engine::{Input, Observation};
use crate::model::kill::KillSpec;
use crate::model::schema::Cause;
use crate::sources::host;

pub(super) fn handle(core: &mut Core, message: Message) {
    match message {
        Message::Facts(all) => {
            for (key, facts) in all {
                core.handle(Input::Observation(Cow::Owned(Observation::Facts { key, facts })));
            }
        }
        Message::Cgroups(all) => {
            for observation in all {
                core.handle(Input::Observation(Cow::Owned(observation)));
            }
        }
        Message::Cause { alert, cause } => cause_found(core, &alert, cause.as_deref()),
        Message::Killed { spec, saved, result } => {
            if saved.is_some_and(|key| core.kills.remove(&key).is_some()) {
                core.state_dirty = true;
            }
            killed(core, &spec, result.as_deref().map_err(String::as_str));
        }
        Message::Saved(report) => core.saved(report),
        Message::RegistrationUndelivered(job) => requests::release_job(core, job),
        Message::AlertStorage(problem) => {
            if problem.is_none() {
                core.resubmit_alerts();
            }
            core.storage.set(Source::Alerts, problem);
            core.update_storage_alert();
        }
        Message::StoresFull(problem) => {
            core.sync.stores_full = problem;
            core.update_capacity_alert();
        }
        Message::Reloaded { result, peer, reply } => requests::finish_reload(core, result, peer, reply),
        Message::Scrape(reply) => {
            let _ = reply.send((core.engine.gauges(host::boot_now()), core.counts.clone()));
        }
    }
}

fn cause_found(core: &mut Core, alert: &str, cause: Option<&Cause>) {
    if let Some(cause) = cause {
        core.handle(Input::Cause { alert: Cow::Borrowed(alert), cause: Cow::Borrowed(cause) });
    }
    // First, so that an alert which waits for its cause is sent with it.
    effects::apply(core);
    if let Some(a) = core.awaiting_cause.remove(alert) {
        effects::submit(core, a);
    }
}

fn killed(core: &mut Core, spec: &KillSpec, result: Result<&Outcome, &str>) {
    for (signal, n) in result.iter().flat_map(|o| &o.signals) {
        *core.counts.signals_sent.entry(*signal).or_default() += n;
    }
    let report = result.map(|o| Cow::Borrowed(&o.report)).map_err(Cow::Borrowed);
    let Some(job) = spec.job else {
        core.handle(Input::ProcessKillFinished { root: spec.root, report });
        return;
    };
    let outcome = if result.is_ok_and(Outcome::ended) { "ended" } else { "survived" };
    *core.counts.job_kills.entry((spec.reason, outcome)).or_default() += 1;
    core.handle(Input::KillFinished { job, reason: spec.reason, whole: spec.is_whole(), report });
}
