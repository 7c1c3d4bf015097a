//! `kill TARGET`.

use std::collections::HashMap;
use std::time::Duration;

use crate::agent::core::Core;
use crate::agent::kills::{self, Job};
use crate::agent::replies::{matched, refused, resolve};
use crate::api::{ApiError, Class, KillRequest, Peer, Reply};
use crate::config::DEFAULT_GRACE;
use crate::enforce::Order;
use crate::engine::{Target, TreeQuery};
use crate::model::key::Key;
use crate::model::kill::{Reason, What};
use crate::model::schema::KillReport;
use crate::sources::host;

const SIGTERM: u8 = libc::SIGTERM as u8;

/// `kill TARGET`.
pub(super) fn kill(core: &mut Core, k: &KillRequest, peer: &Peer, reply: Reply<KillReport>) {
    match orders(core, k, peer) {
        Ok(mut jobs) => {
            if jobs.len() == 1
                && let Some(job) = jobs.pop()
            {
                return kills::start(core, job, Some(reply));
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
        kills::start(core, job, Some(tx));
        waiting.push(rx);
    }
    core.background.spawn(async move {
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
    let found = resolve(core, &k.target)?;
    if found.len() > 1 && !k.all {
        return Err(ApiError::several(&target, found.into_iter().map(|t| matched(core, t)).collect()));
    }
    let mut jobs = Vec::new();
    for t in found {
        jobs.push(order(core, k, peer, t, &target)?);
    }
    Ok(jobs)
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
        Some(roots) => What::Descendants { number: kills::reserve_numbers(core, roots.len()), roots },
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
            let tree = core.engine.tree(&q, now).map_err(refused)?;
            let children: HashMap<Key, &[Key]> =
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
