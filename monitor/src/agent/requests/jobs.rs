//! `jobs extend`.

use std::time::Duration;

use crate::agent::core::Core;
use crate::agent::replies::{audited, job_of, matched, reply_when_saved, resolve};
use crate::api::{ApiError, ExtendReply, Peer, Reply, Target as Named};
use crate::engine::{Input, Target};
use crate::model::schema::JobId;
use crate::model::time::rfc3339;
use crate::sources::host;

pub(super) fn extend(core: &mut Core, job: &Named, by: Duration, peer: &Peer, reply: Reply<ExtendReply>) {
    let done = one_job(core, job).and_then(|id| {
        let record = job_of(core.handle(Input::ExtendJob { job: id, by }))?;
        let wall = host::boot_to_wall();
        Ok(ExtendReply { job: id, deadline: record.deadline.map(|d| rfc3339(d.saturating_add(wall))) })
    });
    audited(core, peer, &format!("jobs extend {job}"), &done);
    reply_when_saved(core, reply, done);
}

fn one_job(core: &Core, t: &Named) -> Result<JobId, ApiError> {
    let found = resolve(core, t)?;
    match found.as_slice() {
        [Target::Job(id)] => Ok(*id),
        [Target::Process(key)] => Err(ApiError::not_found("job", key)),
        _ => Err(ApiError::several(t, found.iter().map(|&f| matched(core, f)).collect())),
    }
}
