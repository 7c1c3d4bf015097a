//! `why`: the causes of processes, of one alert, or of every firing alert.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::tree;
use crate::agent::cause_cache::FRESH;
use crate::agent::core::Core;
use crate::agent::replies::{matched, resolve};
use crate::api::wire::Causes;
use crate::api::{ApiError, Reply, Target as Named, TreeQuery, WhyQuery};
use crate::engine::Target;
use crate::model::audience::Audience;
use crate::model::key::Key;
use crate::model::question::Question;
use crate::model::schema::{Alert, AlertKind, Cause, Process, State, Verdict};
use crate::sources::host;

/// Most causes that are searched for in one request, and how long that may take; the rest is counted.
const ASKED_MAX: usize = 32;
const ASKED_TIME: Duration = Duration::from_secs(20);
/// Up to this many alerts are each searched anew.
const FEW: usize = 8;

pub(super) fn why(core: &Core, q: &WhyQuery, reply: Reply<Causes>) {
    let keys = match (&q.target, &q.container) {
        (None, _) => return of_all(core, q.audience, reply),
        (Some(Named::Alert(id)), _) => match core.engine.alerts(true).into_iter().find(|a| a.id == *id) {
            Some(alert) => return of_one(core, alert, q.audience, reply),
            None => Err(ApiError::not_found("alert", id)),
        },
        (Some(Named::Pid(pid)), Some(container)) => inside(core, *pid, container).map(|k| vec![k]),
        (Some(t), _) => resolve(core, t).map(|found| {
            found
                .into_iter()
                .map(|t| match t {
                    Target::Process(k) => k,
                    Target::Job(id) => id.root,
                })
                .collect()
        }),
    };
    match keys {
        Ok(keys) => of(core, keys, q.audience, reply),
        Err(e) => drop(reply.send(Err(e))),
    }
}

/// The process that has this pid in this container (its id, or the beginning of it).
fn inside(core: &Core, pid: u32, container: &str) -> Result<Key, ApiError> {
    let mut all = tree::known(core, &TreeQuery::default())?.processes;
    let host_ns = core.proc_reader.own_pid_ns();
    for p in &mut all {
        core.proc_reader.place(p, host_ns);
    }
    let theirs = |p: &&Process| {
        p.state != State::Gone && p.container.as_ref().is_some_and(|c| c.id.raw().starts_with(container))
    };
    let found: Vec<Key> = all.iter().filter(theirs).filter(|p| p.ns_pid == Some(pid)).map(|p| p.id).collect();
    match found.as_slice() {
        [one] => Ok(*one),
        [] => Err(ApiError::not_found("process", format!("{pid} in container {container}"))),
        several => {
            let matches = several.iter().map(|&k| matched(core, Target::Process(k))).collect();
            Err(ApiError::several(format!("{pid} in container {container}"), matches))
        }
    }
}

/// The cause as the alert itself gives it, where no process can be examined: for alerts about the host (which are jobwarden's own)
/// and those whose subject is gone.
fn itself(core: &Core, a: Alert, audience: Audience) -> Option<Cause> {
    let own = || core.engine.current(std::process::id());
    let process = a.subject.or_else(|| core.engine.process(own()?, host::boot_now()))?;
    let remedy = match a.kind {
        AlertKind::EventsLost => {
            "nothing, if it was once; else make `ring_bytes` larger, and see that the agent is not starved of CPU"
        }
        AlertKind::EnforcementStopped => {
            "find out why so many jobs are over their time, then `jobwarden enforcement on`"
        }
        AlertKind::StorageFailed => {
            "make room in the state directory, or mend its disk: it is tried again each second"
        }
        AlertKind::Capacity => "look at `jobwarden_store_entries` on /metrics for what there is too much of",
        AlertKind::JobTimeout => "look at `jobwarden jobs`; `jobwarden jobs extend` or `jobwarden kill` it",
        AlertKind::KillFailed => "look at what holds the survivors: `jobwarden why` of each",
        AlertKind::Zombie | AlertKind::Orphan => "nothing: the processes are gone",
    };
    let mut cause = Cause {
        process,
        verdict: Verdict::Unknown,
        summary: a.summary,
        evidence: Vec::new(),
        remedy: remedy.to_owned(),
        alert: Some(a.id),
    };
    core.redact.cause(&mut cause);
    audience.cause(&mut cause);
    Some(cause)
}

/// The process to examine for an alert; None if there never was one, or it is gone.
fn subject(core: &Core, a: &Alert) -> Option<Key> {
    core.engine.alert_subject(&a.id).filter(|&k| core.engine.process(k, host::boot_now()).is_some())
}

/// For `why` of these processes.
fn of(core: &Core, keys: Vec<Key>, audience: Audience, reply: Reply<Causes>) {
    ask(core, audience, Vec::new(), keys.into_iter().map(|k| (k, None)).collect(), reply);
}

/// For `why` of one alert.
fn of_one(core: &Core, a: Alert, audience: Audience, reply: Reply<Causes>) {
    match subject(core, &a) {
        Some(key) => ask(core, audience, Vec::new(), vec![(key, Some(a.id))], reply),
        None => ask(core, audience, itself(core, a, audience).into_iter().collect(), Vec::new(), reply),
    }
}

/// For `why` of every firing alert. Where there are many, each alert's own cause is shown, and only alerts without one are searched.
fn of_all(core: &Core, audience: Audience, reply: Reply<Causes>) {
    let (mut known, mut keys) = (Vec::new(), Vec::new());
    let alerts = core.engine.alerts(false);
    // An alert's own cause was read with all rights, so it is only for readers that have them.
    let anew = alerts.len() <= FEW || audience != Audience::Full;
    for a in alerts {
        let Some(key) = subject(core, &a) else {
            known.extend(itself(core, a, audience));
            continue;
        };
        match a.cause.filter(|c| !anew && c.process.id == key) {
            Some(mut cause) => {
                core.redact.cause(&mut cause);
                known.push(Cause { alert: Some(a.id), ..cause });
            }
            None => keys.push((key, Some(a.id))),
        }
    }
    ask(core, audience, known, keys, reply);
}

fn ask(
    core: &Core,
    audience: Audience,
    known: Vec<Cause>,
    keys: Vec<(Key, Option<String>)>,
    reply: Reply<Causes>,
) {
    let now = host::boot_now();
    let more = keys.len().saturating_sub(ASKED_MAX);
    let question = |(key, alert)| core.engine.question(key, now).map(|q| Question { alert, ..q });
    let questions: Vec<Question> = keys.into_iter().take(ASKED_MAX).filter_map(question).collect();
    let (finder, redact) = (Arc::clone(&core.causes.finder), Arc::clone(&core.redact));
    let end = Instant::now() + ASKED_TIME;
    core.background.spawn(async move {
        let mut all = Causes { causes: known, more };
        for q in questions {
            let finder = Arc::clone(&finder);
            let job = tokio::spawn(async move { finder.find(q, audience, FRESH, &finder.for_clients).await });
            match tokio::time::timeout_at(end, job).await {
                Ok(Ok(Some(mut cause))) => {
                    redact.cause(&mut cause);
                    all.causes.push(cause);
                }
                Ok(_) => {}
                Err(_) => all.more += 1,
            }
        }
        let _ = reply.send(Ok(all));
    });
}
