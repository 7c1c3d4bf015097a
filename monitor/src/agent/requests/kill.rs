//! `kill TARGET`.

use std::collections::HashMap;
use std::time::Duration;

use crate::agent::core::Core;
use crate::agent::kills::{self, Client};
use crate::agent::replies::{matched, refused, resolve};
use crate::api::{ApiError, Class, KillRequest, Peer, Reply};
use crate::config::DEFAULT_GRACE;
use crate::engine::{Target, TreeQuery};
use crate::model::key::Key;
use crate::model::kill::{KillSpec, Reason, What};
use crate::model::schema::KillReport;
use crate::sources::host;

pub(super) fn kill(core: &mut Core, k: &KillRequest, peer: &Peer, reply: Reply<KillReport>) {
    match specs(core, k, peer) {
        Ok(mut specs) => {
            if specs.len() == 1
                && let Some(spec) = specs.pop()
            {
                return kills::start(core, spec, Client::Pid(peer.pid), Some(reply));
            }
            several(core, specs, peer, k.target.to_string(), reply);
        }
        Err(e) => drop(reply.send(Err(e))),
    }
}

/// `--all`: each kill by itself, and one report of all.
fn several(core: &mut Core, specs: Vec<KillSpec>, peer: &Peer, target: String, reply: Reply<KillReport>) {
    let mut waiting = Vec::new();
    for spec in specs {
        let (tx, rx) = tokio::sync::oneshot::channel();
        kills::start(core, spec, Client::Pid(peer.pid), Some(tx));
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

fn specs(core: &mut Core, k: &KillRequest, peer: &Peer) -> Result<Vec<KillSpec>, ApiError> {
    let target = k.target.to_string();
    let found = resolve(core, &k.target)?;
    if found.len() > 1 && !k.all {
        return Err(ApiError::several(&target, found.into_iter().map(|t| matched(core, t)).collect()));
    }
    found.into_iter().map(|t| spec(core, k, peer, t, &target)).collect()
}

fn spec(
    core: &mut Core,
    k: &KillRequest,
    peer: &Peer,
    t: Target,
    target: &str,
) -> Result<KillSpec, ApiError> {
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
    let what = roots.map_or(What::Whole, |roots| kills::descendants(core, roots));
    let default = match record {
        Some(record) => record.kill(what, Reason::Operator),
        None => KillSpec::new(root, what, Reason::Operator),
    };
    Ok(KillSpec {
        target: target.to_owned(),
        signal: k.signal.unwrap_or(default.signal),
        grace: k.grace_s.map_or(DEFAULT_GRACE, |s| Duration::from_secs_f64(s.clamp(0.0, 1e9))),
        asked_by: peer.into(),
        dry_run: k.dry_run,
        ..default
    })
}

/// The descendants of PID 1 are the whole host. A dry run gives the same error, since the kill would do nothing.
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
