//! The live lines of `events`, from the agent's core to every reader. A reader that is too slow loses lines and is told
//! how many (`lost`); the core never waits for one. The last events are remembered for `--since`, within bounds: as
//! records, since most are never asked for. A line is made when somebody reads it.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use tokio::sync::mpsc::{self, error::TrySendError};

use super::{ApiError, Class, EventFilter, Target};
use crate::engine::EventContext;
use crate::model::event::{self, Event};
use crate::model::schema::{EventLine, JobId};

/// Lines that one reader may be behind.
const BEHIND: usize = 4096;
/// Events remembered for `--since`.
const REMEMBERED: usize = 4096;
/// Readers at a time.
pub(super) const READERS: usize = 32;
/// Chains of jobs that are kept to be shared. Beyond it all are dropped and made again by the jobs that still have events.
const CHAINS: usize = 1024;

/// The reader's end. Dropped, it is unsubscribed at the next line.
pub type Subscription = mpsc::Receiver<EventLine>;

/// The jobs that an event's process belongs to, innermost first, with their names; shared by all its events.
pub type Chain = Option<Arc<[(JobId, String)]>>;

/// Makes the line of an event.
pub type Teller<'a> = &'a dyn Fn(&Event<'_>, &EventContext, Option<JobId>) -> EventLine;

#[derive(Debug)]
struct Reader {
    tx: mpsc::Sender<EventLine>,
    filter: EventFilter,
    /// Lines that found no room since the last one that did.
    missed: u64,
}

#[derive(Debug)]
enum Past {
    /// Its `len` bytes stand in [`Feed::bytes`].
    Record {
        at: u64,
        pid: u32,
        len: usize,
        context: EventContext,
        jobs: Chain,
    },
    Line {
        at: u64,
        jobs: Chain,
        line: Box<EventLine>,
    },
}

/// Owned by the agent's core.
#[derive(Debug, Default)]
pub struct Feed {
    readers: Vec<Reader>,
    past: VecDeque<Past>,
    /// The records of `past`, one behind the other.
    bytes: VecDeque<u8>,
    /// By the innermost job.
    chains: HashMap<JobId, Arc<[(JobId, String)]>>,
}

impl Feed {
    /// `now` is boot-time nanoseconds, as are the events' times.
    pub fn subscribe(
        &mut self,
        filter: EventFilter,
        now: u64,
        tell: Teller<'_>,
    ) -> Result<Subscription, ApiError> {
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
            self.recall(&mut reader, from, tell);
        }
        self.readers.push(reader);
        Ok(rx)
    }

    fn recall(&mut self, reader: &mut Reader, from: u64, tell: Teller<'_>) {
        let mut bytes: &[u8] = self.bytes.make_contiguous();
        for p in &self.past {
            match p {
                Past::Record { at, pid, len, context, jobs } => {
                    let (record, rest) = bytes.split_at_checked(*len).unwrap_or_default();
                    bytes = rest;
                    if *at >= from
                        && reader.wants(jobs, *pid)
                        && let Ok(e) = event::decode(record)
                    {
                        reader.offer(&tell(&e, context, innermost(jobs)));
                    }
                }
                Past::Line { at, jobs, line } => {
                    if *at >= from && reader.wants_line(jobs, line) {
                        reader.offer(line);
                    }
                }
            }
        }
    }

    /// To be handed to [`Feed::publish`]. Allocates only for jobs that it has not met.
    pub fn chain<'a>(&mut self, jobs: impl Iterator<Item = (JobId, &'a str)> + Clone) -> Chain {
        let (innermost, _) = jobs.clone().next()?;
        // A job that comes to lie in another one has a new chain, so all of it is compared.
        let same = |c: &[(JobId, String)]| {
            let mut now = jobs.clone();
            c.iter().all(|j| now.next().is_some_and(|n| n.0 == j.0 && n.1 == j.1)) && now.next().is_none()
        };
        if let Some(c) = self.chains.get(&innermost)
            && same(c)
        {
            return Some(Arc::clone(c));
        }
        if self.chains.len() >= CHAINS {
            self.chains.clear();
        }
        let chain: Arc<[_]> = jobs.map(|(id, name)| (id, name.to_owned())).collect();
        self.chains.insert(innermost, Arc::clone(&chain));
        Some(chain)
    }

    /// One event, whose record is `bytes`, of a process that belongs to `jobs`.
    pub fn publish(
        &mut self,
        e: &Event<'_>,
        bytes: &[u8],
        context: EventContext,
        jobs: Chain,
        tell: Teller<'_>,
    ) {
        let pid = e.process.pid;
        let mut line = None;
        self.readers.retain_mut(|r| {
            if !r.wants(&jobs, pid) {
                return !r.tx.is_closed();
            }
            r.offer(line.get_or_insert_with(|| tell(e, &context, innermost(&jobs))))
        });
        self.bytes.extend(bytes);
        self.remember(Past::Record { at: e.at, pid, len: bytes.len(), context, jobs });
    }

    /// A line that no record tells. One that is no process's is for every reader.
    pub fn announce(&mut self, at: u64, line: EventLine, jobs: Chain) {
        self.readers.retain_mut(|r| {
            if !r.wants_line(&jobs, &line) {
                return !r.tx.is_closed();
            }
            r.offer(&line)
        });
        self.remember(Past::Line { at, jobs, line: Box::new(line) });
    }

    fn remember(&mut self, p: Past) {
        if self.past.len() == REMEMBERED
            && let Some(Past::Record { len, .. }) = self.past.pop_front()
        {
            self.bytes.drain(..len);
        }
        self.past.push_back(p);
    }
}

pub(crate) fn innermost(jobs: &Chain) -> Option<JobId> {
    jobs.as_ref().and_then(|c| c.first()).map(|j| j.0)
}

impl Reader {
    fn wants(&self, jobs: &Chain, pid: u32) -> bool {
        let mut jobs = jobs.iter().flat_map(|c| c.iter());
        let job = match &self.filter.job {
            None => true,
            Some(Target::Job(id)) => jobs.any(|(j, _)| j == id),
            Some(Target::Name(name)) => jobs.any(|(_, n)| n == name),
            Some(_) => false,
        };
        job && self.filter.pid.is_none_or(|p| p == pid)
    }

    fn wants_line(&self, jobs: &Chain, line: &EventLine) -> bool {
        line.process.as_ref().is_none_or(|p| self.wants(jobs, p.pid))
    }

    /// False when the reader is gone.
    fn offer(&mut self, line: &EventLine) -> bool {
        if self.tx.is_closed() {
            return false;
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
    use crate::config::{self, Overrides};
    use crate::engine::{Engine, Settings};
    use crate::model::key::Key;
    use crate::model::schema::Ref;

    /// The record of a reap.
    fn record(pid: u32, at: u64) -> Vec<u8> {
        let mut b = vec![0; size_of::<monitor_abi::Reap>()];
        b[..2].copy_from_slice(&monitor_abi::KIND_REAP.to_ne_bytes());
        b[8..16].copy_from_slice(&at.to_ne_bytes());
        b[16..24].copy_from_slice(&1_u64.to_ne_bytes());
        b[24..28].copy_from_slice(&pid.to_ne_bytes());
        b
    }

    struct World {
        feed: Feed,
        engine: Engine,
    }

    impl World {
        fn new() -> Self {
            let none = Overrides::default();
            let config = config::parse("t".as_ref(), "", &BTreeMap::new(), &none).unwrap();
            Self { feed: Feed::default(), engine: Engine::new(Settings::default(), &config) }
        }

        fn publish(&mut self, at: u64, jobs: &[(JobId, &str)], pid: u32) {
            let bytes = record(pid, at);
            let e = event::decode(&bytes).unwrap();
            let jobs = self.feed.chain(jobs.iter().copied());
            self.feed.publish(&e, &bytes, self.engine.event_context(&e), jobs, &tell);
        }

        fn subscribe(&mut self, filter: EventFilter, now: u64) -> Result<Subscription, ApiError> {
            self.feed.subscribe(filter, now, &tell)
        }
    }

    fn tell(e: &Event<'_>, _: &EventContext, job: Option<JobId>) -> EventLine {
        let process = Ref { id: e.process, pid: e.process.pid, comm: "c".into(), argv: vec![] };
        let more = BTreeMap::from([("job".into(), serde_json::json!(job))]);
        EventLine { at: "t".into(), kind: "reap".into(), process: Some(process), more }
    }

    fn pids(rx: &mut Subscription) -> Vec<u32> {
        std::iter::from_fn(|| rx.try_recv().ok()).map(|l| l.process.map_or(0, |p| p.pid)).collect()
    }

    fn since(s: f64) -> EventFilter {
        EventFilter { since_s: Some(s), ..EventFilter::default() }
    }

    #[test]
    fn filters_and_the_remembered() {
        let mut w = World::new();
        let job = JobId { root: Key::new(1, 1), ordinal: 1 };
        w.publish(1_000_000_000, &[], 1);
        w.publish(5_000_000_000, &[(job, "etl")], 2);
        let now = 6_000_000_000;
        assert_eq!(pids(&mut w.subscribe(since(2.0), now).unwrap()), [2]);
        assert_eq!(pids(&mut w.subscribe(since(60.0), now).unwrap()), [1, 2]);
        for t in [Target::Job(job), Target::Name("etl".into())] {
            let by_job = EventFilter { since_s: Some(60.0), job: Some(t), pid: None };
            let line = w.subscribe(by_job, now).unwrap().try_recv().unwrap();
            assert_eq!(line.process.unwrap().pid, 2);
            assert_eq!(line.more["job"], serde_json::json!(job));
        }
        let mut one = w.subscribe(EventFilter { pid: Some(7), ..EventFilter::default() }, now).unwrap();
        w.publish(now, &[], 8);
        w.publish(now, &[], 7);
        let bytes = record(8, now);
        let e = event::decode(&bytes).unwrap();
        let of = |job| tell(&e, &w.engine.event_context(&e), job);
        w.feed.announce(now, of(None), None);
        assert_eq!(pids(&mut one), [7]);
        let jobs = w.feed.chain([(job, "etl")].into_iter());
        w.feed.announce(now, of(Some(job)), jobs);
        let by_job = EventFilter { since_s: Some(60.0), job: Some(Target::Job(job)), pid: None };
        assert_eq!(
            pids(&mut w.subscribe(by_job, now).unwrap()),
            [2, 8],
            "lines without a record belong to jobs too"
        );
    }

    #[test]
    fn what_is_remembered_is_bounded_and_each_record_stays_with_its_event() {
        let mut w = World::new();
        let lost = EventLine { at: "t".into(), kind: "lost".into(), process: None, more: BTreeMap::new() };
        for n in 0..REMEMBERED as u32 * 3 {
            if n % 5 == 0 {
                w.feed.announce(1, lost.clone(), None);
            }
            w.publish(1, &[], n);
        }
        assert_eq!(w.feed.past.len(), REMEMBERED);
        let records = w.feed.past.iter().filter(|p| matches!(p, Past::Record { .. })).count();
        assert_eq!(w.feed.bytes.len(), records * size_of::<monitor_abi::Reap>());
        let of: Vec<u32> =
            pids(&mut w.subscribe(since(9.0), 1).unwrap()).into_iter().filter(|&p| p > 0).collect();
        let end = REMEMBERED as u32 * 3;
        assert_eq!(of, (end - of.len() as u32..end).collect::<Vec<_>>());
        assert_eq!(of.len(), records);
    }

    #[test]
    fn chains_are_shared_and_bounded() {
        let mut feed = Feed::default();
        let job = |n| JobId { root: Key::new(n, 1), ordinal: 1 };
        let of = |feed: &mut Feed, n, outer: &'static str| {
            feed.chain([(job(n), "in"), (job(99), outer)].into_iter()).unwrap()
        };
        let first = of(&mut feed, 1, "out");
        assert!(Arc::ptr_eq(&first, &of(&mut feed, 1, "out")));
        assert_eq!(of(&mut feed, 1, "other")[1].1, "other");
        for n in 0..2 * CHAINS as u32 {
            of(&mut feed, n, "out");
        }
        assert!(feed.chains.len() <= CHAINS);
        assert!(feed.chain(std::iter::empty()).is_none());
    }

    #[test]
    fn a_slow_reader_is_told_what_it_missed_and_a_gone_one_is_forgotten() {
        let mut w = World::new();
        let mut slow = w.subscribe(EventFilter::default(), 0).unwrap();
        for _ in 0..BEHIND + 5 {
            w.publish(0, &[], 1);
        }
        assert_eq!(pids(&mut slow).len(), BEHIND);
        w.publish(0, &[], 2);
        let lost = slow.try_recv().unwrap();
        assert_eq!((lost.kind.as_str(), lost.more["count"].as_u64()), ("lost", Some(5)));
        assert_eq!(pids(&mut slow), [2]);
        drop(slow);
        w.publish(0, &[], 3);
        assert!(w.feed.readers.is_empty());
        assert_eq!(w.feed.past.len(), REMEMBERED);
        let held: Vec<_> = (0..READERS).map(|_| w.subscribe(EventFilter::default(), 0).unwrap()).collect();
        assert_eq!(w.subscribe(EventFilter::default(), 0).unwrap_err().class, Class::Unavailable);
        drop(held);
    }
}
