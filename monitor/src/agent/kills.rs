//! Kills: started here for policy and for clients, carried out by `enforce` in the background. Their end comes back as a message.

use std::time::Duration;

use super::core::Core;
use super::message::Message;
use crate::api::{ApiError, Reply};
use crate::enforce::{Guards, audit};
use crate::engine::{Answer, Input};
use crate::model::key::Key;
use crate::model::kill::{KillSpec, Reason, What};
use crate::model::schema::KillReport;
use crate::sources::host;
use crate::state::Kill;

/// The client of a kill, which is spared with its ancestors.
#[derive(Debug)]
pub(super) enum Client {
    None,
    Pid(u32),
    /// The processes spared by a previous agent, whose client may be gone.
    Kept(Vec<Key>),
}

/// A kill of these processes and their descendants, with a job number reserved for each.
pub(super) fn descendants(core: &mut Core, roots: Vec<Key>) -> What {
    let number = match core.handle(Input::ReserveNumbers { count: roots.len() as u32 }) {
        Answer::Number(first) => first,
        _ => 0,
    };
    What::Descendants { number, roots }
}

/// The processes that no kill may touch. If they cannot be determined, nothing is signalled.
pub(super) fn guards(core: &Core, client: Client) -> Result<Guards, String> {
    let e = &core.config.enforcement;
    let mut guards = Guards::new(e.protect.clone(), e.protect_defaults);
    let mut keep = |pid, who| {
        guards
            .keep(pid, who, &core.proc_reader.proc, &*core.kernel)
            .map_err(|e| format!("the processes to be spared cannot be determined: {e}"))
    };
    keep(std::process::id(), "the agent")?;
    match client {
        // Pid 0: the client is in another pid namespace.
        Client::None | Client::Pid(0) => {}
        Client::Pid(pid) => keep(pid, "the caller")?,
        Client::Kept(keys) => {
            for key in keys {
                guards.keep_key(key, "the caller or an ancestor of it");
            }
        }
    }
    Ok(guards)
}

pub(super) fn start(core: &mut Core, spec: KillSpec, client: Client, reply: Option<Reply<KillReport>>) {
    let guards = match guards(core, client) {
        Ok(guards) => guards,
        Err(problem) => {
            if let Some(reply) = reply {
                let _ = reply.send(Err(ApiError::failed(problem.clone())));
            }
            let _ = core.messages.send(Message::Killed {
                spec: Box::new(spec),
                saved: None,
                result: Err(problem),
            });
            return;
        }
    };
    if let Some(job) = spec.job
        && !spec.dry_run
    {
        core.handle(Input::KillStarted { job, reason: spec.reason });
    }
    let key = (spec.reason == Reason::Operator && !spec.dry_run).then(|| {
        let key = core.kills.last_key_value().map_or(0, |(n, _)| n + 1);
        let grace = u64::try_from(spec.grace.as_nanos()).unwrap_or(u64::MAX);
        let until = host::boot_now().saturating_add(grace);
        core.kills.insert(key, Kill { spec: spec.clone(), until, kept: guards.kept_keys() });
        core.state_dirty = true;
        core.save();
        key
    });
    let saved = key.map(|_| core.when_saved());
    let (enforcer, messages) = (core.enforcer.clone(), core.messages.clone());
    core.background.spawn(async move {
        if let Some(saved) = saved {
            // Before the first signal, so that the kill outlives this agent.
            saved.await;
        }
        let result = enforcer.run(&spec, &guards).await;
        if let Some(reply) = reply {
            let answer = match &result {
                Ok(o) => Ok(o.report.clone()),
                Err(e) => Err(ApiError::failed(e.to_string())),
            };
            // The client may be gone; the kill goes on.
            let _ = reply.send(answer);
        }
        if !spec.dry_run {
            let result = result.map(Box::new).map_err(|e| e.to_string());
            let _ = messages.send(Message::Killed { spec: Box::new(spec), saved: key, result });
        }
    });
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
fn resume(core: &mut Core, Kill { spec, until, kept }: Kill) {
    let record = spec.job.and_then(|id| core.engine.job_record(id));
    let over = spec.is_whole() && record.is_none();
    let outcome = if over { "the job is over" } else { "resumed" };
    tracing::warn!(target = %spec.target, "a kill that was begun before the restart: {outcome}");
    let detail = format!("kill {}, begun before a restart", spec.target);
    core.audit.write(&audit::Entry::request(spec.asked_by.clone(), detail, outcome));
    if over {
        core.state_dirty = true;
        return;
    }
    let what = match spec.what {
        What::Whole => What::Whole,
        What::Descendants { roots, .. } => descendants(core, roots),
    };
    let spec = KillSpec {
        job: record.as_ref().map(|r| r.id),
        number: record.as_ref().map_or(0, |r| r.number),
        name: record.map(|r| r.name).unwrap_or_default(),
        what,
        grace: Duration::from_nanos(until.saturating_sub(host::boot_now())),
        ..spec
    };
    start(core, spec, Client::Kept(kept), None);
}
