//! Kills: started here for policy and for clients, carried out by `enforce` in the background. Their end comes back as a message.

use std::time::Duration;

use super::core::Core;
use super::message::Message;
use crate::api::{ApiError, Reply};
use crate::enforce::{Guards, Order, Outcome, audit};
use crate::engine::{Answer, Input, KillOrder};
use crate::model::key::Key;
use crate::model::kill::{AskedBy, Reason, What};
use crate::model::schema::{JobId, KillReport};
use crate::sources::host;
use crate::state::Kill;

/// A kill to be started.
pub(super) struct Job {
    pub order: Order,
    /// None for processes outside of jobs.
    pub id: Option<JobId>,
    pub whole: bool,
    /// Pid of the client; it and its ancestors are spared.
    pub client: Option<u32>,
    /// The client and its ancestors, spared by a kill that was ordered before a restart.
    pub kept: Vec<Key>,
}

/// Starts a kill that policy decided.
pub(super) fn by_policy(core: &mut Core, k: KillOrder) {
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

/// Reserves this many consecutive job numbers, one for each root; returns the first.
pub(super) fn reserve_numbers(core: &mut Core, n: usize) -> u64 {
    match core.handle(Input::ReserveNumbers { count: n as u32 }) {
        Answer::Number(first) => first,
        _ => 0,
    }
}

/// The processes that no kill may touch. If they cannot be determined, nothing is signalled.
pub(super) fn guards(core: &Core, client: Option<u32>) -> Result<Guards, String> {
    let e = &core.config.enforcement;
    let mut guards = Guards::new(e.protect.clone(), e.protect_defaults);
    let mut keep = |pid, who| guards.keep(pid, who, &core.proc_reader.proc, &*core.kernel);
    keep(std::process::id(), "the agent")
        .and_then(|()| client.filter(|&p| p != 0).map_or(Ok(()), |p| keep(p, "the caller")))
        .map_err(|e| format!("the processes to be spared cannot be determined: {e}"))?;
    Ok(guards)
}

pub(super) fn start(core: &mut Core, job: Job, reply: Option<Reply<KillReport>>) {
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
            let _ = core.messages.send(Message::Killed {
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
        core.handle(Input::KillStarted { job: id, reason: order.reason });
    }
    let place = (order.reason == Reason::Operator && !order.dry_run).then(|| {
        let place = core.kills.last_key_value().map_or(0, |(n, _)| n + 1);
        core.kills.insert(place, saved_form(&order, &guards));
        core.state_dirty = true;
        core.save();
        place
    });
    let saved = place.map(|_| core.when_saved());
    let (enforcer, tx) = (core.enforcer.clone(), core.messages.clone());
    core.background.spawn(async move {
        if let Some(saved) = saved {
            // Before the first signal, so that the order outlives this agent.
            saved.await;
        }
        let result = enforcer.run(&order, &guards).await;
        if let Some(reply) = reply {
            let answer = match &result {
                Ok(o) => Ok(o.report.clone()),
                Err(e) => Err(ApiError::failed(e.to_string())),
            };
            // The client may be gone; the kill goes on.
            let _ = reply.send(answer);
        }
        if !order.dry_run {
            let result: Result<Box<Outcome>, String> = result.map(Box::new).map_err(|e| e.to_string());
            let _ = tx.send(Message::Killed {
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

fn saved_form(order: &Order, guards: &Guards) -> Kill {
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

/// Resumes the kills of a previous agent. Each stays in the state file until it is started again or over.
pub(super) fn resume_all(core: &mut Core) {
    for key in core.kills.keys().copied().collect::<Vec<_>>() {
        if let Some(k) = core.kills.remove(&key) {
            resume(core, k);
        }
    }
}

/// Resumes a kill that a previous agent did not finish because it was killed, with what is left of the grace. The stop signal is
/// sent again: the state file does not say which processes got it.
fn resume(core: &mut Core, k: Kill) {
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
        What::Descendants { number: reserve_numbers(core, k.roots.len()), roots: k.roots }
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
