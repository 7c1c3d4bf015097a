//! The answers to what clients ask of the agent's core.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::Duration;

use super::core::{Core, Internal};
use super::{cause, kill};
use crate::api::{
    AlertQuery, ApiError, AuditLines, Class, EnforcementStatus, ExecRegistered, ExecRequest, ExtendReply,
    Notified, Peer, Reply, Request, Status, Target as Asked, TreeQuery as AskedTree, WhyQuery,
};
use crate::config::Config;
use crate::enforce::audit;
use crate::engine::{Answer, ExecJob, Input, JobPolicy, JobRecord, Output, Refused, Target};
use crate::model::key::Key;
use crate::model::schema::{Alert, Alerts, EventLine, JobId, Jobs, State};
use crate::model::time::rfc3339;
use crate::sources::{host, kernel};

/// How old a registration by `exec` may be: half of what the client waits for the answer, so that the answer is in time.
const REGISTRATION_AGE: Duration = Duration::from_millis(crate::exec::REGISTRATION.as_millis() as u64 / 2);
/// Most audit entries in one answer, the newest.
const AUDIT_MAX: usize = 10_000;

pub(super) fn answer(core: &mut Core, r: Request) {
    match r {
        Request::Ping(reply) => drop(reply.send(Ok(()))),
        Request::Tree(q, reply) => super::tree::answer(core, &q, reply),
        Request::Jobs(reply) => drop(reply.send(Ok(Jobs { jobs: core.engine.jobs() }))),
        Request::Extend { job, by, peer, reply } => {
            let done = extend(core, &job, by);
            audited(core, &peer, &format!("jobs extend {job}"), &done);
            reply_when_saved(core, reply, done);
        }
        Request::Alerts(q, reply) => alerts(core, &q, reply),
        Request::Events(filter, reply) => {
            let Core { feed, engine, redact, .. } = core;
            let lines =
                feed.subscribe(filter, host::boot_now(), &super::core::event_formatter(engine, redact));
            drop(reply.send(lines));
        }
        Request::Why(q, reply) => why(core, &q, reply),
        Request::Resolve(t, reply) => {
            let found =
                resolve(core, &t).map(|all| all.into_iter().map(|t| kill::matched(core, t)).collect());
            let _ = reply.send(found);
        }
        Request::Kill { kill, peer, reply } => {
            audited(core, &peer, &format!("kill {}", kill.target), &Ok(()));
            kill::requested(core, &kill, &peer, reply);
        }
        Request::Status(reply) => drop(reply.send(Ok(status(core)))),
        Request::Enforcement { on, lasting, peer, reply } => {
            let mut out = Output::default();
            core.engine.handle(Input::Enforcement { on, lasts: lasting }, host::boot_now(), &mut out);
            core.apply(out);
            audited(core, &peer, if on { "enforcement on" } else { "enforcement off" }, &Ok(()));
            let done = Ok(enforcement(core));
            reply_when_saved(core, reply, done);
        }
        Request::Audit { since, job, reply } => log(core, since, job.as_ref(), reply),
        Request::Reload { peer, reply } => core.reload(Some(peer), Some(reply)),
        Request::Notify { receiver, peer, reply } => {
            audited(core, &peer, &format!("notify {receiver}"), &Ok(()));
            let center = core.center.clone();
            core.beside.spawn(async move {
                let done = center.notify(&receiver).await.map(|r| Notified {
                    receiver: r.receiver,
                    delivered: r.delivered,
                    answer: r.answers.join("; "),
                    took_s: r.took_s,
                });
                let _ = reply.send(done.ok_or_else(|| ApiError::not_found("receiver", &receiver)));
            });
        }
        Request::ExecRegister { exec, peer, reply } => {
            let done = register(core, exec, &peer);
            audited(core, &peer, "exec", &done);
            reply_to_registration(core, reply, done);
        }
        Request::ExecEnd { end, peer, reply } => kill::exec_end(core, &end, &peer, reply),
        Request::ExecSignal { signal, peer, reply } => {
            drop(reply.send(kill::exec_signal(core, &signal, &peer)));
        }
    }
}

/// What a client is told outlives a SIGKILL of the agent. An error promises nothing.
pub(super) fn reply_when_saved<T: Send + 'static>(core: &Core, reply: Reply<T>, done: Result<T, ApiError>) {
    if done.is_err() {
        let _ = reply.send(done);
        return;
    }
    let saved = core.when_saved();
    core.beside.spawn(async move {
        saved.await;
        let _ = reply.send(done);
    });
}

/// As [`reply_when_saved`]. A client that is gone by then never learns of its job: the job is released.
fn reply_to_registration(core: &Core, reply: Reply<ExecRegistered>, done: Result<ExecRegistered, ApiError>) {
    let (saved, internal) = (core.when_saved(), core.internal.clone());
    core.beside.spawn(async move {
        if done.is_ok() {
            saved.await;
        }
        if let Err(Ok(unheard)) = reply.send(done) {
            let _ = internal.send(Internal::Unheard(unheard.job));
        }
    });
}

/// Each mutating request is audited, by whom and what came of it.
pub(super) fn audited<T>(core: &Core, peer: &Peer, what: &str, done: &Result<T, ApiError>) {
    let outcome = done.as_ref().err().map_or_else(|| "accepted".to_owned(), |e| e.message.clone());
    core.audit.write(&audit::Entry::request(peer.into(), what, outcome));
}

pub(super) fn refused(r: Refused) -> ApiError {
    let (class, code) = match r {
        Refused::NoJob(_) => (Class::NotFound, "no-such-job"),
        Refused::NoProcess(_) => (Class::NotFound, "no-such-process"),
        Refused::NoDeadline(_) => (Class::Failed, "no-deadline"),
        Refused::Ended(_) => (Class::Failed, "job-ended"),
        Refused::Target(_) => (Class::Usage, "bad-target"),
        Refused::TooManyJobs(_) => (Class::Failed, "too-many-jobs"),
        Refused::TooDeep(..) => (Class::Failed, "too-deep"),
    };
    ApiError::new(class, code, r.to_string())
}

/// The record that a command about a job gives.
pub(super) fn job_of(answer: Answer) -> Result<Box<JobRecord>, ApiError> {
    match answer {
        Answer::Job(done) => done.map_err(refused),
        _ => Err(ApiError::failed("the engine gave no record of the job")),
    }
}

/// What a target means now; never empty.
pub(super) fn resolve(core: &Core, t: &Asked) -> Result<Vec<Target>, ApiError> {
    if let Asked::Alert(id) = t {
        let key = core.engine.alert_subject(id).ok_or_else(|| ApiError::not_found("alert", id))?;
        return Ok(vec![Target::Process(key)]);
    }
    core.engine.resolve(&t.to_string()).map_err(refused)
}

fn one_job(core: &Core, t: &Asked) -> Result<JobId, ApiError> {
    let found = resolve(core, t)?;
    match found.as_slice() {
        [Target::Job(id)] => Ok(*id),
        [Target::Process(key)] => Err(ApiError::not_found("job", key)),
        _ => {
            let matches = found.iter().map(|&f| kill::matched(core, f)).collect();
            Err(ApiError::several(t, matches))
        }
    }
}

fn extend(core: &mut Core, job: &Asked, by: Duration) -> Result<ExtendReply, ApiError> {
    let id = one_job(core, job)?;
    let mut out = Output::default();
    let record = job_of(core.engine.handle(Input::ExtendJob { job: id, by }, host::boot_now(), &mut out))?;
    core.apply(out);
    let wall = host::boot_to_wall();
    Ok(ExtendReply { job: id, deadline: record.deadline.map(|d| rfc3339(d.saturating_add(wall))) })
}

fn alerts(core: &Core, q: &AlertQuery, reply: Reply<Alerts>) {
    if q.history || q.undelivered {
        let (center, q) = (core.center.clone(), q.clone());
        core.beside.spawn(async move {
            let audience = q.audience;
            let mut undelivered: BTreeMap<_, Vec<_>> = BTreeMap::new();
            let mut alerts: Vec<Alert> = if q.undelivered {
                let owed = center.undelivered().await.into_iter();
                owed.map(|u| {
                    undelivered.entry(u.alert.id.clone()).or_default().extend(u.undelivered);
                    u.alert
                })
                .collect()
            } else {
                let now =
                    i64::try_from((host::boot_now() + host::boot_to_wall()) / 1_000_000).unwrap_or(i64::MAX);
                center.history(q.since_s.map(|s| now.saturating_sub((s * 1e3) as i64))).await
            };
            for a in &mut alerts {
                audience.alert(a);
            }
            let _ = reply.send(Ok(Alerts { alerts, undelivered }));
        });
        return;
    }
    let mut alerts = core.engine.alerts(q.all);
    for a in &mut alerts {
        a.subject.iter_mut().for_each(|p| core.proc_reader.show(p));
        core.redact.alert(a);
        q.audience.alert(a);
    }
    let _ = reply.send(Ok(Alerts { alerts, undelivered: BTreeMap::new() }));
}

/// The process that has this pid in this container (its id, or the beginning of it).
fn inside(core: &Core, pid: u32, container: &str) -> Result<Key, ApiError> {
    let mut all = super::tree::known(core, &AskedTree::default())?.processes;
    let host_ns = core.proc_reader.own_pid_ns();
    for p in &mut all {
        core.proc_reader.place(p, host_ns);
    }
    let theirs = |p: &&crate::model::schema::Process| {
        p.state != State::Gone && p.container.as_ref().is_some_and(|c| c.id.raw().starts_with(container))
    };
    let found: Vec<Key> = all.iter().filter(theirs).filter(|p| p.ns_pid == Some(pid)).map(|p| p.id).collect();
    match found.as_slice() {
        [one] => Ok(*one),
        [] => Err(ApiError::not_found("process", format!("{pid} in container {container}"))),
        several => {
            let matches = several.iter().map(|&k| kill::matched(core, Target::Process(k))).collect();
            Err(ApiError::several(format!("{pid} in container {container}"), matches))
        }
    }
}

fn why(core: &mut Core, q: &WhyQuery, reply: Reply<crate::api::wire::Causes>) {
    let keys = match (&q.target, &q.container) {
        (None, _) => return cause::of_all(core, q.audience, reply),
        (Some(Asked::Alert(id)), _) => match core.engine.alerts(true).into_iter().find(|a| a.id == *id) {
            Some(alert) => return cause::of_one(core, alert, q.audience, reply),
            None => Err(ApiError::not_found("alert", id)),
        },
        (Some(Asked::Pid(pid)), Some(container)) => inside(core, *pid, container).map(|k| vec![k]),
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
        Ok(keys) => cause::of(core, keys, q.audience, reply),
        Err(e) => drop(reply.send(Err(e))),
    }
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

fn status(core: &Core) -> Status {
    let now = host::boot_now();
    let g = core.engine.gauges(now);
    let by_kind = |of: &dyn Fn(usize) -> u64| -> BTreeMap<String, u64> {
        monitor_abi::KIND_NAMES.iter().enumerate().map(|(i, k)| ((*k).to_owned(), of(i))).collect()
    };
    // What cannot be read is left out and said: it is not 0.
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
    let firing = alerts.iter().filter(|a| a.state == crate::model::schema::AlertState::Firing).count();
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
        undelivered: core.center.pending(),
        storage: core.storage.troubles(),
        probes_off,
        config: core.options.config_path.clone().or_else(super::core::default_config),
        config_ok: core.counts.reload_ok,
        listen: core.options.listening.map(|a| a.to_string()),
        pinned: core.config.agent.pin,
    }
}

fn log(core: &Core, since: Option<Duration>, job: Option<&Asked>, reply: Reply<AuditLines>) {
    let dir = core.config.agent.state_dir.clone();
    let since = since.and_then(|s| std::time::SystemTime::now().checked_sub(s));
    let job = job.map(|j| match j {
        Asked::Name(n) => n.clone(),
        other => other.to_string(),
    });
    let written = std::sync::Arc::clone(&core.audit);
    core.beside.spawn_blocking(move || {
        // Without them where the disk does not take them: `storage-failed` says so.
        written.flush(audit::Audit::LAST);
        let read = audit::read(&dir, since, job.as_deref(), AUDIT_MAX);
        let _ = reply.send(
            read.map(|entries| AuditLines { entries })
                .map_err(|e| ApiError::failed(format!("the audit log in {}: {e}", dir.display()))),
        );
    });
}

/// The client has gone and does not know of its job: it holds it without the agent.
pub(super) fn unregister(core: &mut Core, job: JobId) {
    let mut out = Output::default();
    // It has just been registered, so it is known.
    core.engine.handle(Input::ReleaseJob { job }, host::boot_now(), &mut out);
    core.apply(out);
}

/// A job of `exec`: in the kernel's maps before the reply, so before its root's first instruction.
fn register(core: &mut Core, e: ExecRequest, peer: &Peer) -> Result<ExecRegistered, ApiError> {
    let now = host::boot_now();
    if e.asked_at.is_some_and(|at| now.saturating_sub(at) > REGISTRATION_AGE.as_nanos() as u64) {
        let message = "the request is too old: the agent could not answer in time";
        return Err(ApiError::new(Class::Unavailable, "too-late", message));
    }
    // Held by the client and not reaped, so this pid means no other.
    let start = crate::enforce::Lineage::start_of(&*core.kernel, e.pid)
        .map_err(|err| ApiError::failed(format!("the start of process {}: {err}", e.pid)))?
        .ok_or_else(|| ApiError::not_found("process", e.pid))?;
    // Of the kernel, not of the engine: the client's own fork may still be in the ring. It is connected, so it lives.
    let supervisor = crate::enforce::Lineage::start_of(&*core.kernel, peer.pid)
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
    let mut out = Output::default();
    let record = job_of(core.engine.handle(Input::RegisterJob(Cow::Owned(job)), now, &mut out))?;
    core.label_error = None;
    core.apply(out);
    match core.label_error.take() {
        None => {
            if let Some(dir) = e.cgroup {
                core.cgroups.insert(record.id, dir);
            }
            Ok(ExecRegistered { job: record.id, number: record.number })
        }
        Some(e) => Err(ApiError::failed(format!("the job could not be entered into the kernel: {e}"))),
    }
}

/// What is read only at start and differs now.
pub(super) fn needs_restart(old: &Config, new: &Config) -> Vec<String> {
    let (a, b) = (&old.agent, &new.agent);
    let mut all = Vec::new();
    let mut differs = |name: &str, d: bool| {
        if d {
            all.push(name.to_owned());
        }
    };
    differs("agent.socket", a.socket != b.socket);
    differs("agent.socket_group", a.socket_group != b.socket_group);
    differs("agent.state_dir", a.state_dir != b.state_dir);
    differs("agent.listen", a.listen != b.listen);
    differs("agent.pin", a.pin != b.pin);
    differs("agent.allow_plain", a.allow_plain != b.allow_plain);
    differs("agent.bpffs", a.bpffs != b.bpffs);
    differs("agent.ring_bytes", a.ring_bytes != b.ring_bytes);
    differs("agent.log", a.log != b.log || a.log_json != b.log_json);
    all
}

/// The `lost` line of `events`.
pub(super) fn lost_line(n: u64) -> EventLine {
    EventLine {
        at: rfc3339(host::boot_now() + host::boot_to_wall()),
        kind: "lost".into(),
        process: None,
        more: BTreeMap::from([("count".into(), n.into()), ("where".into(), "ring".into())]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_only_at_the_start_is_named_when_it_changes() {
        let config = |text: &str| {
            let none = BTreeMap::new();
            crate::config::parse("t.toml".as_ref(), text, &none, &crate::config::Overrides::default())
                .unwrap_or_else(|e| panic!("{e}"))
        };
        let old = config("");
        let named = |text: &str| needs_restart(&old, &config(text));
        assert_eq!(named("[zombies]\nafter = \"1m\"\n[agent]\nlabels = { dc = \"x\" }"), [""; 0]);
        assert_eq!(named("[agent]\nring_bytes = 16777216"), ["agent.ring_bytes"]);
        assert_eq!(
            named("[agent]\nlisten = \"0.0.0.0:1\"\nallow_plain = true"),
            ["agent.listen", "agent.allow_plain"]
        );
        assert_eq!(named("[agent]\npin = false\nlog = \"debug\""), ["agent.pin", "agent.log"]);
    }
}
