//! What `jobwarden exec` and `status` ask of the engine beside the rest.

use super::alerts::About;
use super::enforcement::MINUTE;
use super::{Change, Engine, JobRecord, Output, Refused, summary};
use crate::model::schema::{AlertKind, JobId};

impl Engine {
    /// `exec --keep-orphans` is over: nobody ends the job any more, neither its supervisor's death nor policy. It is
    /// followed until its last member has ended.
    pub(super) fn release(&mut self, id: JobId, now: u64, out: &mut Output) -> Result<JobRecord, Refused> {
        let g = self.jobs.by_id(id).ok_or_else(|| Refused::NoJob(id.to_string()))?;
        let j = self.jobs.get_mut(g).ok_or_else(|| Refused::NoJob(id.to_string()))?;
        let supervisor = j.record.supervisor.take();
        j.record.deadline = None;
        j.record.policy.orphan_after_ns = None;
        let record = j.record.clone();
        out.changes.push(Change::Job(Box::new(record.clone())));
        let number = j.record.number;
        self.supervisor_left(supervisor);
        for kind in [AlertKind::Orphan, AlertKind::JobTimeout] {
            let text = summary::job_over(self, g, "its `exec` is over and left it alone");
            self.clear((kind, About::Job(number)), text, now, out);
        }
        Ok(record)
    }

    /// How many jobs policy has ended within the last minute: what the fuse counts.
    #[must_use]
    pub fn kills_last_minute(&self, now: u64) -> u32 {
        self.enforcement.state.ended.iter().filter(|(at, _)| at.saturating_add(MINUTE) > now).count() as u32
    }
}
