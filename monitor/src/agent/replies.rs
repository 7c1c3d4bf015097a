//! What the handlers of requests share: errors for clients, the audit of requests, targets, and replies that wait for the disk.

use super::core::Core;
use crate::api::{ApiError, Class, Matched, Peer, Reply, Target as Named};
use crate::enforce::audit;
use crate::engine::{Answer, JobRecord, Refused, Target};
use crate::model::outside::command_line;

/// Sends the reply when the state is saved, so that what it promises outlives a SIGKILL of the agent. An error promises nothing and
/// is sent at once.
pub(super) fn reply_when_saved<T: Send + 'static>(core: &Core, reply: Reply<T>, done: Result<T, ApiError>) {
    if done.is_err() {
        let _ = reply.send(done);
        return;
    }
    let saved = core.when_saved();
    core.background.spawn(async move {
        saved.await;
        let _ = reply.send(done);
    });
}

/// Writes a request that changes something to the audit: the client, and the outcome.
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

/// The record in the engine's answer to a command about a job.
pub(super) fn job_of(answer: Answer) -> Result<Box<JobRecord>, ApiError> {
    match answer {
        Answer::Job(done) => done.map_err(refused),
        _ => Err(ApiError::failed("the engine gave no record of the job")),
    }
}

/// The processes or jobs that a target names now; never empty.
pub(super) fn resolve(core: &Core, t: &Named) -> Result<Vec<Target>, ApiError> {
    if let Named::Alert(id) = t {
        let key = core.engine.alert_subject(id).ok_or_else(|| ApiError::not_found("alert", id))?;
        return Ok(vec![Target::Process(key)]);
    }
    core.engine.resolve(&t.to_string()).map_err(refused)
}

/// A match as it is shown where several match a target.
pub(super) fn matched(core: &Core, t: Target) -> Matched {
    match t {
        Target::Process(key) => Matched {
            target: key.to_string(),
            what: core.engine.reference(key).map_or_else(String::new, |mut r| {
                core.redact.reference(&mut r);
                if r.argv.is_empty() { r.comm.to_string() } else { command_line(&r.argv) }
            }),
        },
        Target::Job(id) => Matched {
            target: id.to_string(),
            what: core.engine.job_record(id).map_or_else(String::new, |r| r.name),
        },
    }
}
