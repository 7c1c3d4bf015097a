//! Requests of clients, one file for each kind. A handler reads the [`Core`], changes the engine through [`Core::handle`], and
//! replies; what takes time runs in the background. The event loop empties the queue afterwards.

mod alerts;
mod exec;
mod jobs;
mod kill;
mod reload;
mod status;
mod tree;
mod why;

pub(super) use self::exec::release as release_job;
pub(super) use self::reload::{finish as finish_reload, request as request_reload};
use super::core::Core;
use super::replies::{audited, matched, resolve};
use crate::api::Request;
use crate::model::schema::Jobs;
use crate::sources::host;

pub(super) fn handle(core: &mut Core, r: Request) {
    match r {
        Request::Ping(reply) => drop(reply.send(Ok(()))),
        Request::Tree(q, reply) => tree::tree(core, &q, reply),
        Request::Jobs(reply) => drop(reply.send(Ok(Jobs { jobs: core.engine.jobs() }))),
        Request::Extend { job, by, peer, reply } => jobs::extend(core, &job, by, &peer, reply),
        Request::Alerts(q, reply) => alerts::alerts(core, &q, reply),
        Request::Events(filter, reply) => {
            let Core { feed, engine, redact, .. } = core;
            let lines = feed.subscribe(filter, host::boot_now(), &engine.event_formatter(redact));
            drop(reply.send(lines));
        }
        Request::Why(q, reply) => why::why(core, &q, reply),
        Request::Resolve(t, reply) => {
            let found = resolve(core, &t).map(|all| all.into_iter().map(|t| matched(core, t)).collect());
            let _ = reply.send(found);
        }
        Request::Kill { kill, peer, reply } => {
            audited(core, &peer, &format!("kill {}", kill.target), &Ok(()));
            kill::kill(core, &kill, &peer, reply);
        }
        Request::Status(reply) => drop(reply.send(Ok(status::status(core)))),
        Request::Enforcement { on, lasting, peer, reply } => {
            status::set_enforcement(core, on, lasting, &peer, reply);
        }
        Request::Audit { since, job, reply } => status::audit_lines(core, since, job.as_ref(), reply),
        Request::Reload { peer, reply } => reload::request(core, Some(peer), Some(reply)),
        Request::Notify { receiver, peer, reply } => {
            audited(core, &peer, &format!("notify {receiver}"), &Ok(()));
            alerts::notify(core, receiver, reply);
        }
        Request::ExecRegister { exec, peer, reply } => {
            let done = exec::register(core, exec, &peer);
            audited(core, &peer, "exec", &done);
            exec::reply_to_registration(core, reply, done);
        }
        Request::ExecEnd { end, peer, reply } => exec::end(core, &end, &peer, reply),
        Request::ExecSignal { signal, peer, reply } => drop(reply.send(exec::signal(core, &signal, &peer))),
    }
}
