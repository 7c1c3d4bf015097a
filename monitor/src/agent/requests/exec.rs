//! The jobs of `exec`: registration, signals that it passes on, the end.

use std::borrow::Cow;
use std::time::Duration;

use crate::agent::core::Core;
use crate::agent::kills::{self, Client};
use crate::agent::message::Message;
use crate::agent::replies::{job_of, reply_when_saved};
use crate::api::{ApiError, Class, ExecEnd, ExecEnded, ExecRegistered, ExecRequest, ExecSignal, Peer, Reply};
use crate::enforce::Lineage;
use crate::engine::{ExecJob, Input, JobPolicy};
use crate::model::key::Key;
use crate::model::kill::{KillSpec, Reason, What};
use crate::model::schema::{JobId, KillReport, Spared, State};
use crate::sources::host;

/// How old a registration may be: half of the client's time limit for the answer, so that the answer comes in time.
const REGISTRATION_AGE: Duration = Duration::from_millis(crate::exec::REGISTRATION.as_millis() as u64 / 2);

/// A job of `exec`: in the kernel's maps before the reply, so before its root's first instruction.
pub(super) fn register(core: &mut Core, e: ExecRequest, peer: &Peer) -> Result<ExecRegistered, ApiError> {
    let now = host::boot_now();
    if e.asked_at.is_some_and(|at| now.saturating_sub(at) > REGISTRATION_AGE.as_nanos() as u64) {
        let message = "the request is too old: the agent could not answer in time";
        return Err(ApiError::new(Class::Unavailable, "too-late", message));
    }
    // Held by the client and not reaped, so this pid means no other.
    let start = Lineage::start_of(&*core.kernel, e.pid)
        .map_err(|err| ApiError::failed(format!("the start of process {}: {err}", e.pid)))?
        .ok_or_else(|| ApiError::not_found("process", e.pid))?;
    // Of the kernel, not of the engine: the client's own fork may still be in the ring. It is connected, so it lives.
    let supervisor = Lineage::start_of(&*core.kernel, peer.pid)
        .map_err(|err| ApiError::failed(format!("the start of process {}: {err}", peer.pid)))?
        .map(|start| Key::new(peer.pid, start));
    let ns = |s: f64| Duration::try_from_secs_f64(s.max(0.0)).map_or(u64::MAX, |d| d.as_nanos() as u64);
    let job = ExecJob {
        root: Key::new(e.pid, start),
        name: e.name,
        supervisor,
        number: e.number,
        policy: JobPolicy {
            timeout_ns: e.timeout_s.map(ns),
            zombie_after_ns: None,
            orphan_after_ns: if e.keep_orphans { None } else { Some(ns(e.orphan_after_s.unwrap_or(0.0))) },
            // The supervisor ends its job itself; the agent does it when the supervisor dies, or does not act on the deadline.
            kill_on_timeout: false,
            kill_on_orphan: false,
            kill_daemons: true,
            enforce_existing: true,
            stop_signal: e.signal,
            grace_ns: ns(e.grace_s),
            severity: None,
        },
    };
    let record = job_of(core.handle_at(Input::RegisterJob(Cow::Owned(job)), now))?;
    // Now, not with the rest of the queue: the reply promises that the job is in the kernel's maps.
    core.label_queued_jobs()
        .map_err(|e| ApiError::failed(format!("entering the job into the kernel's maps failed: {e}")))?;
    if let Some(dir) = e.cgroup {
        core.cgroups.insert(record.id, dir);
    }
    Ok(ExecRegistered { job: record.id, number: record.number })
}

/// As [`reply_when_saved`]. If the client is gone by then it never learns of its job, so the job is released.
pub(super) fn reply_to_registration(
    core: &Core,
    reply: Reply<ExecRegistered>,
    done: Result<ExecRegistered, ApiError>,
) {
    let (saved, internal) = (core.when_saved(), core.messages.clone());
    core.background.spawn(async move {
        if done.is_ok() {
            saved.await;
        }
        if let Err(Ok(lost)) = reply.send(done) {
            let _ = internal.send(Message::RegistrationUndelivered(lost.job));
        }
    });
}

/// The client is gone and does not know of this job: the job is released.
pub(in crate::agent) fn release(core: &mut Core, job: JobId) {
    // The engine knows the job: it has just been registered.
    core.handle(Input::ReleaseJob { job });
}

/// `exec` has ended: its job is ended or released.
pub(super) fn end(core: &mut Core, e: &ExecEnd, peer: &Peer, reply: Reply<ExecEnded>) {
    let Some(record) = core.engine.job_record(e.job) else {
        let _ = reply.send(Err(ApiError::not_found("job", e.job)));
        return;
    };
    let now = host::boot_now();
    // Set only where the job outlived its deadline: then this agent has acted on it.
    let timed_out = e.timed_out || record.expired;
    if e.keep {
        let done = job_of(core.handle_at(Input::ReleaseJob { job: e.job }, now));
        let report = kept(core, e.job, now);
        let ended = done.map(|_| ExecEnded { report: Some(report), left_s: None, timed_out });
        reply_when_saved(core, reply, ended);
        return;
    }
    if e.timed_out && record.deadline.is_none_or(|d| d > now) {
        let left_s = record.deadline.map(|d| (d - now) as f64 / 1e9);
        let _ = reply.send(Ok(ExecEnded { report: None, left_s, timed_out: false }));
        return;
    }
    let spec = KillSpec {
        delay: Duration::from_secs_f64(e.after_s.clamp(0.0, 1e9)),
        signal: e.signal,
        grace: Duration::from_secs_f64(e.grace_s.clamp(0.0, 1e9)),
        asked_by: peer.into(),
        cgroup: core.cgroups.remove(&e.job),
        ..record.kill(What::Whole, Reason::Exec)
    };
    let (tx, rx) = tokio::sync::oneshot::channel();
    kills::start(core, spec, Client::Pid(peer.pid), Some(tx));
    core.background.spawn(async move {
        let report = rx.await.unwrap_or_else(|_| Err(ApiError::stopping()));
        let _ = reply.send(report.map(|r| ExecEnded { report: Some(r), left_s: None, timed_out }));
    });
}

/// `--keep-orphans`: the processes that are left, reported as spared.
fn kept(core: &Core, job: JobId, now: u64) -> KillReport {
    let alive = |k: &Key| {
        core.engine.process(*k, now).is_some_and(|p| matches!(p.state, State::Running | State::LeaderExited))
    };
    let spared = core
        .engine
        .members(job)
        .into_iter()
        .filter(alive)
        .filter_map(|k| core.engine.reference(k))
        .map(|mut process| {
            core.redact.reference(&mut process);
            Spared { process, why: "kept, as asked".into() }
        })
        .collect();
    KillReport { target: job.to_string(), spared, ..KillReport::default() }
}

/// Sends a signal that `exec` received to all members of its job.
pub(super) fn signal(core: &mut Core, s: &ExecSignal, peer: &Peer) -> Result<usize, ApiError> {
    let record = core.engine.job_record(s.job).ok_or_else(|| ApiError::not_found("job", s.job))?;
    let guards = kills::guards(core, Client::Pid(peer.pid)).map_err(ApiError::failed)?;
    let spec = KillSpec { asked_by: peer.into(), ..record.kill(What::Whole, Reason::Exec) };
    let sent = core.enforcer.pass(&spec, &guards, s.signal).map_err(|e| ApiError::failed(e.to_string()))?;
    *core.counts.signals_passed.entry(s.signal).or_default() += sent as u64;
    Ok(sent)
}
