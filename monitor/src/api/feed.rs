//! The live lines of `events`, from the agent's core to every reader. A reader that is too slow loses lines and is told
//! how many (`lost`); the core never waits for one. The last lines are remembered for `--since`, within bounds.

use std::collections::{BTreeMap, VecDeque};

use tokio::sync::mpsc::{self, error::TrySendError};

use super::{ApiError, Class, EventFilter, Target};
use crate::contract::{EventLine, JobId};

/// Lines that one reader may be behind.
const BEHIND: usize = 4096;
/// Lines remembered for `--since`.
const REMEMBERED: usize = 4096;
/// Readers at a time.
pub(super) const READERS: usize = 32;

/// The reader's end. Dropped, it is unsubscribed at the next line.
pub type Subscription = mpsc::Receiver<EventLine>;

/// A job that an event's process belongs to.
pub type JobRef<'a> = (JobId, &'a str);

#[derive(Debug)]
struct Reader {
    tx: mpsc::Sender<EventLine>,
    filter: EventFilter,
    /// Lines that found no room since the last one that did.
    missed: u64,
}

#[derive(Debug)]
struct Past {
    at: u64,
    jobs: Vec<(JobId, String)>,
    line: EventLine,
}

/// Owned by the agent's core.
#[derive(Debug, Default)]
pub struct Feed {
    readers: Vec<Reader>,
    past: VecDeque<Past>,
}

impl Feed {
    /// `now` is boot-time nanoseconds, as in [`Feed::publish`].
    pub fn subscribe(&mut self, filter: EventFilter, now: u64) -> Result<Subscription, ApiError> {
        self.readers.retain(|r| !r.tx.is_closed());
        if self.readers.len() >= READERS {
            return Err(ApiError::new(
                Class::Unavailable,
                "too-many-readers",
                format!("{READERS} readers follow the events already"),
            ));
        }
        let (tx, rx) = mpsc::channel(BEHIND);
        let mut reader = Reader { tx, filter, missed: 0 };
        if let Some(s) = reader.filter.since_s {
            let from = now.saturating_sub((s.clamp(0.0, 1e9) * 1e9) as u64);
            for p in self.past.iter().filter(|p| p.at >= from) {
                let jobs: Vec<JobRef<'_>> = p.jobs.iter().map(|(id, n)| (*id, n.as_str())).collect();
                reader.offer(&jobs, &p.line);
            }
        }
        self.readers.push(reader);
        Ok(rx)
    }

    /// One line, of a process that belongs to `jobs` (all of them, the outer ones included). `at` is boot-time nanoseconds.
    pub fn publish(&mut self, at: u64, jobs: &[JobRef<'_>], line: EventLine) {
        self.readers.retain_mut(|r| r.offer(jobs, &line));
        if self.past.len() == REMEMBERED {
            self.past.pop_front();
        }
        let jobs = jobs.iter().map(|&(id, name)| (id, name.to_owned())).collect();
        self.past.push_back(Past { at, jobs, line });
    }
}

impl Reader {
    fn wants(&self, jobs: &[JobRef<'_>], line: &EventLine) -> bool {
        if line.kind == "lost" {
            return true;
        }
        let job = match &self.filter.job {
            None => true,
            Some(Target::Job(id)) => jobs.iter().any(|(j, _)| j == id),
            Some(Target::Name(name)) => jobs.iter().any(|(_, n)| n == name),
            Some(_) => false,
        };
        job && self.filter.pid.is_none_or(|p| line.process.as_ref().is_some_and(|r| r.pid == p))
    }

    /// False when the reader is gone.
    fn offer(&mut self, jobs: &[JobRef<'_>], line: &EventLine) -> bool {
        if self.tx.is_closed() {
            return false;
        }
        if !self.wants(jobs, line) {
            return true;
        }
        if self.missed > 0 {
            // One slot for the line that says so, one for the line itself.
            if self.tx.capacity() < 2 || self.tx.try_send(missed(&line.at, self.missed)).is_err() {
                self.missed += 1;
                return true;
            }
            self.missed = 0;
        }
        match self.tx.try_send(line.clone()) {
            Ok(()) => true,
            Err(TrySendError::Full(_)) => {
                self.missed += 1;
                true
            }
            Err(TrySendError::Closed(_)) => false,
        }
    }
}

fn missed(at: &str, count: u64) -> EventLine {
    let more = BTreeMap::from([("count".into(), count.into()), ("where".into(), "reader".into())]);
    EventLine { at: at.into(), kind: "lost".into(), process: None, more }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::Ref;
    use crate::key::Key;

    fn line(pid: u32) -> EventLine {
        let process = Ref { id: Key::new(pid, 1), pid, comm: "c".into(), argv: vec![] };
        EventLine { at: "t".into(), kind: "fork".into(), process: Some(process), more: BTreeMap::new() }
    }

    fn pids(rx: &mut Subscription) -> Vec<u32> {
        std::iter::from_fn(|| rx.try_recv().ok()).map(|l| l.process.map_or(0, |p| p.pid)).collect()
    }

    #[test]
    fn filters_and_the_remembered() {
        let mut feed = Feed::default();
        let job = JobId { root: Key::new(1, 1), ordinal: 1 };
        feed.publish(1_000_000_000, &[], line(1));
        feed.publish(5_000_000_000, &[(job, "etl")], line(2));
        let now = 6_000_000_000;
        let since = |s| EventFilter { since_s: Some(s), ..EventFilter::default() };
        assert_eq!(pids(&mut feed.subscribe(since(2.0), now).unwrap()), [2]);
        assert_eq!(pids(&mut feed.subscribe(since(60.0), now).unwrap()), [1, 2]);
        let by_job = |t| EventFilter { since_s: Some(60.0), job: Some(t), pid: None };
        for t in [Target::Job(job), Target::Name("etl".into())] {
            assert_eq!(pids(&mut feed.subscribe(by_job(t), now).unwrap()), [2]);
        }
        let mut one = feed.subscribe(EventFilter { pid: Some(7), ..EventFilter::default() }, now).unwrap();
        feed.publish(now, &[], line(8));
        feed.publish(now, &[], line(7));
        assert_eq!(pids(&mut one), [7]);
    }

    #[test]
    fn a_slow_reader_is_told_what_it_missed_and_a_gone_one_is_forgotten() {
        let mut feed = Feed::default();
        let mut slow = feed.subscribe(EventFilter::default(), 0).unwrap();
        for _ in 0..BEHIND + 5 {
            feed.publish(0, &[], line(1));
        }
        assert_eq!(pids(&mut slow).len(), BEHIND);
        feed.publish(0, &[], line(2));
        let lost = slow.try_recv().unwrap();
        assert_eq!((lost.kind.as_str(), lost.more["count"].as_u64()), ("lost", Some(5)));
        assert_eq!(pids(&mut slow), [2]);
        drop(slow);
        feed.publish(0, &[], line(3));
        assert!(feed.readers.is_empty());
        assert_eq!(feed.past.len(), REMEMBERED);
        let held: Vec<_> = (0..READERS).map(|_| feed.subscribe(EventFilter::default(), 0).unwrap()).collect();
        assert_eq!(feed.subscribe(EventFilter::default(), 0).unwrap_err().class, Class::Unavailable);
        drop(held);
    }
}
