//! Kills, by policy and on request: orders are made here, carried out by `enforce` in a task of their own, and their end
//! is told to the engine.

use std::time::Duration;

use super::core::{Core, Internal};
use crate::api::{ApiError, Class, ExecEnd, ExecEnded, ExecSignal, KillRequest, Matched, Peer, Reply};
use crate::config::DEFAULT_GRACE;
use crate::enforce::{Guards, Order, Outcome, audit};
use crate::engine::{Answer, Input, KillOrder, Output, Target, TreeQuery};
use crate::model::key::Key;
use crate::model::kill::{AskedBy, Reason, What};
use crate::model::schema::{JobId, KillReport, Spared, State};
use crate::sources::host;
use crate::state::Kill;

const SIGTERM: u8 = libc::SIGTERM as u8;

/// An order and where its end is told.
struct Job {
    order: Order,
    /// The job that the engine is told about; None for processes outside of jobs.
    id: Option<JobId>,
    whole: bool,
    client: Option<u32>,
    /// Spared as the client of an order from before a restart, and its ancestors.
    kept: Vec<Key>,
}

/// A kill that policy decided.
pub(super) fn policy(core: &mut Core, k: KillOrder) {
    let whole = k.what == What::Whole;
    let order = Order {
        job: k.number,
        id: Some(k.job),
        name: k.job_name,
        root: k.root,
        target: k.job.to_string(),
        what: k.what,
        delay: Duration::ZERO,
        signal: k.signal,
        grace: Duration::from_nanos(k.grace_ns),
        settle: Order::SETTLE,
        reason: k.reason,
        asked_by: AskedBy { rule: k.rule, ..AskedBy::default() },
        dry_run: false,
        cgroup: None,
    };
    start(core, Job { order, id: Some(k.job), whole, client: None, kept: Vec::new() }, None);
}

/// As many free job numbers in a row as there are roots; the first.
fn numbers(core: &mut Core, n: usize) -> u64 {
    let input = Input::ReserveNumbers { count: n as u32 };
    match core.engine.handle(input, host::boot_now(), &mut Output::default()) {
        Answer::Number(first) => first,
        _ => 0,
    }
}

/// Whom no kill may touch. Without knowing whom to spare nobody is signalled.
fn guards(core: &Core, client: Option<u32>) -> Result<Guards, String> {
    let e = &core.config.enforcement;
    let mut guards = Guards::new(e.protect.clone(), e.protect_defaults);
    let mut keep = |pid, who| guards.keep(pid, who, &core.proc_reader.proc, &*core.kernel);
    keep(std::process::id(), "the agent")
        .and_then(|()| client.filter(|&p| p != 0).map_or(Ok(()), |p| keep(p, "the caller")))
        .map_err(|e| format!("who must be spared could not be found out: {e}"))?;
    Ok(guards)
}

fn start(core: &mut Core, job: Job, reply: Option<Reply<KillReport>>) {
    let Job { order, id, whole, client, kept } = job;
    let guards = match guards(core, client) {
        Ok(mut r) => {
            for k in kept {
                r.keep_key(k, "the caller or an ancestor of it");
            }
            r
        }
        Err(wrong) => {
            if let Some(reply) = reply {
                let _ = reply.send(Err(ApiError::failed(wrong.clone())));
            }
            let _ = core.internal.send(Internal::Killed {
                job: id,
                root: order.root,
                reason: order.reason,
                whole,
                order: None,
                result: Err(wrong),
            });
            return;
        }
    };
    if let Some(id) = id
        && !order.dry_run
    {
        core.engine.handle(
            Input::KillStarted { job: id, reason: order.reason },
            host::boot_now(),
            &mut Output::default(),
        );
    }
    let place = (order.reason == Reason::Operator && !order.dry_run).then(|| {
        let place = core.kills.last_key_value().map_or(0, |(n, _)| n + 1);
        core.kills.insert(place, written(&order, &guards));
        core.state_dirty = true;
        core.save();
        place
    });
    let saved = place.map(|_| core.when_saved());
    let (enforcer, tx) = (core.enforcer.clone(), core.internal.clone());
    core.beside.spawn(async move {
        if let Some(saved) = saved {
            // Before the first signal: the order is not lost should this agent be.
            saved.await;
        }
        let result = enforcer.run(&order, &guards).await;
        if let Some(reply) = reply {
            let answer = match &result {
                Ok(o) => Ok(o.report.clone()),
                Err(e) => Err(ApiError::failed(e.to_string())),
            };
            // The client may have gone away; the kill goes on all the same.
            let _ = reply.send(answer);
        }
        if !order.dry_run {
            let result: Result<Box<Outcome>, String> = result.map(Box::new).map_err(|e| e.to_string());
            let _ = tx.send(Internal::Killed {
                job: id,
                root: order.root,
                reason: order.reason,
                whole,
                order: place,
                result,
            });
        }
    });
}

fn written(order: &Order, guards: &Guards) -> Kill {
    let grace = u64::try_from(order.grace.as_nanos()).unwrap_or(u64::MAX);
    Kill {
        job: order.id,
        root: order.root,
        target: order.target.clone(),
        roots: match &order.what {
            What::Whole => Vec::new(),
            What::Descendants { roots, .. } => roots.clone(),
        },
        signal: order.signal,
        until: host::boot_now().saturating_add(grace),
        asked_by: order.asked_by.clone(),
        kept: guards.kept_keys(),
    }
}

/// An order over which the agent before this one was killed: it goes on with what is left of its grace. The stop signal is
/// sent again, since who had it is not written down.
pub(super) fn resume(core: &mut Core, k: Kill) {
    let record = k.job.and_then(|id| core.engine.job_record(id));
    let whole = k.roots.is_empty();
    let over = whole && record.is_none();
    let said = if over { "the job is over" } else { "resumed" };
    tracing::warn!(target = %k.target, "a kill that was begun before the restart: {said}");
    let detail = format!("kill {}, begun before a restart", k.target);
    core.audit.write(&audit::Entry::request(k.asked_by.clone(), detail, said));
    if over {
        core.state_dirty = true;
        return;
    }
    let what = if whole {
        What::Whole
    } else {
        What::Descendants { number: numbers(core, k.roots.len()), roots: k.roots }
    };
    let order = Order {
        job: record.as_ref().map_or(0, |r| r.number),
        id: record.as_ref().map(|r| r.id),
        name: record.as_ref().map(|r| r.name.clone()).unwrap_or_default(),
        root: k.root,
        target: k.target,
        what,
        delay: Duration::ZERO,
        signal: k.signal,
        grace: Duration::from_nanos(k.until.saturating_sub(host::boot_now())),
        settle: Order::SETTLE,
        reason: Reason::Operator,
        asked_by: k.asked_by,
        dry_run: false,
        cgroup: None,
    };
    start(core, Job { order, id: record.map(|r| r.id), whole, client: None, kept: k.kept }, None);
}

/// `kill TARGET`.
pub(super) fn requested(core: &mut Core, k: &KillRequest, peer: &Peer, reply: Reply<KillReport>) {
    match orders(core, k, peer) {
        Ok(mut jobs) => {
            if jobs.len() == 1
                && let Some(job) = jobs.pop()
            {
                return start(core, job, Some(reply));
            }
            several(core, jobs, k.target.to_string(), reply);
        }
        Err(e) => {
            let _ = reply.send(Err(e));
        }
    }
}

/// `--all`: each on its own, one report of them together.
fn several(core: &mut Core, jobs: Vec<Job>, target: String, reply: Reply<KillReport>) {
    let mut waiting = Vec::new();
    for job in jobs {
        let (tx, rx) = tokio::sync::oneshot::channel();
        start(core, job, Some(tx));
        waiting.push(rx);
    }
    core.beside.spawn(async move {
        let mut sum = KillReport { target, ..KillReport::default() };
        for rx in waiting {
            match rx.await.unwrap_or_else(|_| Err(ApiError::stopping())) {
                Ok(mut r) => {
                    sum.signalled.append(&mut r.signalled);
                    sum.survivors.append(&mut r.survivors);
                    sum.spared.append(&mut r.spared);
                    sum.zombies.append(&mut r.zombies);
                    sum.stuck.append(&mut r.stuck);
                    sum.took_s = sum.took_s.max(r.took_s);
                }
                Err(e) => {
                    let _ = reply.send(Err(e));
                    return;
                }
            }
        }
        let _ = reply.send(Ok(sum));
    });
}

fn orders(core: &mut Core, k: &KillRequest, peer: &Peer) -> Result<Vec<Job>, ApiError> {
    let target = k.target.to_string();
    let found = super::answer::resolve(core, &k.target)?;
    if found.len() > 1 && !k.all {
        return Err(ApiError::several(&target, found.into_iter().map(|t| matched(core, t)).collect()));
    }
    let mut jobs = Vec::new();
    for t in found {
        jobs.push(order(core, k, peer, t, &target)?);
    }
    Ok(jobs)
}

pub(super) fn matched(core: &Core, t: Target) -> Matched {
    match t {
        Target::Process(key) => Matched {
            target: key.to_string(),
            what: core.engine.reference(key).map_or_else(String::new, |mut r| {
                core.redact.reference(&mut r);
                if r.argv.is_empty() {
                    r.comm.to_string()
                } else {
                    crate::model::outside::command_line(&r.argv)
                }
            }),
        },
        Target::Job(id) => Matched {
            target: id.to_string(),
            what: core.engine.job_record(id).map_or_else(String::new, |r| r.name),
        },
    }
}

fn order(core: &mut Core, k: &KillRequest, peer: &Peer, t: Target, target: &str) -> Result<Job, ApiError> {
    let record = match t {
        Target::Job(id) => core.engine.job_record(id),
        Target::Process(_) => None,
    };
    let root = match t {
        Target::Job(id) => id.root,
        Target::Process(key) => key,
    };
    if root.pid == 1 {
        return Err(of_pid_1(target));
    }
    let roots = if k.orphans {
        let orphans = orphans(core, t)?;
        if orphans.is_empty() {
            return Err(ApiError::new(Class::NotFound, "no-orphans", format!("{target} has no orphans")));
        }
        Some(orphans)
    } else if record.is_none() {
        Some(vec![root])
    } else {
        None
    };
    let whole = roots.is_none();
    let what = match roots {
        None => What::Whole,
        Some(roots) => What::Descendants { number: numbers(core, roots.len()), roots },
    };
    let policy = record.as_ref().map(|r| &r.policy);
    let grace = k.grace_s.map_or(DEFAULT_GRACE, |s| Duration::from_secs_f64(s.clamp(0.0, 1e9)));
    Ok(Job {
        order: Order {
            job: record.as_ref().map_or(0, |r| r.number),
            id: record.as_ref().map(|r| r.id),
            name: record.as_ref().map(|r| r.name.clone()).unwrap_or_default(),
            root,
            target: target.to_owned(),
            what,
            delay: Duration::ZERO,
            signal: k.signal.or(policy.map(|p| p.stop_signal)).unwrap_or(SIGTERM),
            grace,
            settle: Order::SETTLE,
            reason: Reason::Operator,
            asked_by: peer.into(),
            dry_run: k.dry_run,
            cgroup: None,
        },
        id: record.map(|r| r.id),
        whole,
        client: Some(peer.pid),
        kept: Vec::new(),
    })
}

/// All that descends from PID 1 is the host. The same for a dry run, which says what would be done: nothing.
fn of_pid_1(target: &str) -> ApiError {
    let message = format!(
        "{target} is PID 1 of the host: it is never signalled, and all that descends from it is the whole host; nothing was done"
    );
    ApiError::new(Class::Failed, "pid-1", message)
        .hint("name a job, or a process below it; `jobwarden tree` shows them")
}

/// The orphans among a target's processes, the target itself included.
fn orphans(core: &Core, t: Target) -> Result<Vec<Key>, ApiError> {
    let now = host::boot_now();
    let keys = match t {
        Target::Job(id) => core.engine.members(id),
        Target::Process(key) => {
            let q = TreeQuery { of: Some(key.to_string()), ..TreeQuery::default() };
            let tree = core.engine.tree(&q, now).map_err(super::answer::refused)?;
            let children: std::collections::HashMap<Key, &[Key]> =
                tree.processes.iter().map(|p| (p.id, p.children.as_slice())).collect();
            let mut below = vec![key];
            let mut i = 0;
            while i < below.len() {
                below.extend(children.get(&below[i]).copied().unwrap_or_default());
                i += 1;
            }
            below
        }
    };
    Ok(keys.into_iter().filter(|&k| core.engine.process(k, now).is_some_and(|p| p.orphan)).collect())
}

/// `exec` is over: its job ends, or is let go.
pub(super) fn exec_end(core: &mut Core, e: &ExecEnd, peer: &Peer, reply: Reply<ExecEnded>) {
    let Some(record) = core.engine.job_record(e.job) else {
        let _ = reply.send(Err(ApiError::not_found("job", e.job)));
        return;
    };
    let now = host::boot_now();
    // Set only where the job outlived its deadline: then this agent has acted on it.
    let timed_out = e.timed_out || record.expired;
    if e.keep {
        let mut out = Output::default();
        let done = super::answer::job_of(core.engine.handle(Input::ReleaseJob { job: e.job }, now, &mut out))
            .map(drop);
        core.apply(out);
        let report = kept(core, e.job, now);
        super::answer::reply_when_saved(
            core,
            reply,
            done.map(|()| ExecEnded { report: Some(report), left_s: None, timed_out }),
        );
        return;
    }
    if e.timed_out && record.deadline.is_none_or(|d| d > now) {
        let left_s = record.deadline.map(|d| (d - now) as f64 / 1e9);
        let _ = reply.send(Ok(ExecEnded { report: None, left_s, timed_out: false }));
        return;
    }
    let order = Order {
        job: record.number,
        id: Some(record.id),
        name: record.name,
        root: record.id.root,
        target: record.id.to_string(),
        what: What::Whole,
        delay: Duration::from_secs_f64(e.after_s.clamp(0.0, 1e9)),
        signal: e.signal,
        grace: Duration::from_secs_f64(e.grace_s.clamp(0.0, 1e9)),
        settle: Order::SETTLE,
        reason: Reason::Exec,
        asked_by: peer.into(),
        dry_run: false,
        cgroup: core.cgroups.remove(&e.job),
    };
    let (tx, rx) = tokio::sync::oneshot::channel();
    let job = Job { order, id: Some(e.job), whole: true, client: Some(peer.pid), kept: Vec::new() };
    start(core, job, Some(tx));
    core.beside.spawn(async move {
        let report = rx.await.unwrap_or_else(|_| Err(ApiError::stopping()));
        let _ = reply.send(report.map(|r| ExecEnded { report: Some(r), left_s: None, timed_out }));
    });
}

/// `--keep-orphans`: who is left, named as spared.
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

/// A signal that `exec` got, to all members of its job.
pub(super) fn exec_signal(core: &mut Core, s: &ExecSignal, peer: &Peer) -> Result<usize, ApiError> {
    let record = core.engine.job_record(s.job).ok_or_else(|| ApiError::not_found("job", s.job))?;
    let guards = guards(core, Some(peer.pid)).map_err(ApiError::failed)?;
    let order = Order {
        job: record.number,
        id: Some(record.id),
        name: record.name,
        root: record.id.root,
        target: record.id.to_string(),
        what: What::Whole,
        delay: Duration::ZERO,
        signal: s.signal,
        grace: Duration::ZERO,
        settle: Order::SETTLE,
        reason: Reason::Exec,
        asked_by: peer.into(),
        dry_run: false,
        cgroup: None,
    };
    let sent = core.enforcer.pass(&order, &guards, s.signal).map_err(|e| ApiError::failed(e.to_string()))?;
    *core.counts.signals_passed.entry(s.signal).or_default() += sent as u64;
    Ok(sent)
}
