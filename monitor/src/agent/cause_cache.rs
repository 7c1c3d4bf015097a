//! The cache of causes. `why` reads /proc, which may take a while, so searches run beside the event loop. Alerts and clients
//! share what was found, and no two searches of one parent run at the same time.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::proc_reader::ProcReader;
use crate::enforce::Lineage;
use crate::model::audience::Audience;
use crate::model::key::Key;
use crate::model::question::Question;
use crate::model::schema::{Cause, State};
use crate::sources::kernel::Kernel;
use crate::why::{self, FdRow, Holders, Limits};

/// A cause of at most this age is not searched for again, even for a client.
pub(super) const FRESH: Duration = Duration::from_secs(1);
/// A cause of at most this age, found for another reader, is good enough to renew the cause of an alert.
pub(super) const RECENT: Duration = Duration::from_secs(30);
/// Searches at a time for alerts, and as many for clients: neither waits for the other.
const AT_ONCE: usize = 2;
/// Most parents whose causes are remembered, and causes of one parent.
const PARENTS: usize = 1_024;
const OF_A_PARENT: usize = 8;

/// `f_mode` bits of `include/linux/fs.h`.
const FMODE_READ: u32 = 1;
const FMODE_WRITE: u32 = 2;

impl Holders for Kernel {
    fn holders(&self, inodes: &[u64]) -> io::Result<Vec<FdRow>> {
        let row = |r: monitor_abi::FdRow| FdRow {
            process: r.key.into(),
            fd: r.fd,
            inode: r.inode,
            read: r.mode & FMODE_READ != 0,
            write: r.mode & FMODE_WRITE != 0,
        };
        Ok(Self::holders(self, inodes)?.into_iter().map(row).collect())
    }

    fn keys(&self) -> io::Result<Vec<Key>> {
        Self::keys(self)
    }

    fn lineage_parent(&self, process: Key) -> io::Result<Option<Key>> {
        Lineage::lineage_parent(self, process)
    }
}

/// Container and namespace are read for at most this many of a family, where they are not known yet.
const PLACED: usize = 64;

/// The causes of one parent's zombies, or of an orphan; locked during a search.
type Slot = Arc<tokio::sync::Mutex<Vec<Found>>>;

/// What was found, when, and with whose rights.
struct Found {
    at: Instant,
    audience: Audience,
    cause: Cause,
}

pub(super) struct Finder {
    proc_reader: ProcReader,
    holders: Arc<dyn Holders>,
    parents: Mutex<HashMap<Key, Slot>>,
    pub for_alerts: Semaphore,
    pub for_clients: Semaphore,
}

/// Causes that were found, and when the causes of firing alerts were last searched for.
pub(super) struct CauseCache {
    pub finder: Arc<Finder>,
    /// By alert: the process, and when.
    pub searched: HashMap<String, (Key, Instant)>,
}

impl CauseCache {
    pub(super) fn new(proc_reader: ProcReader, holders: Arc<dyn Holders>) -> Self {
        let finder = Arc::new(Finder {
            proc_reader,
            holders,
            parents: Mutex::default(),
            for_alerts: Semaphore::new(AT_ONCE),
            for_clients: Semaphore::new(AT_ONCE),
        });
        Self { finder, searched: HashMap::new() }
    }
}

/// The parent of a dead process (which should reap it), else the process itself.
fn parent(q: &Question) -> Key {
    let dead = matches!(q.subject.state, State::Zombie | State::Exiting);
    let is_it = |pid| q.family.iter().find(|p| p.pid == pid && p.state != State::Gone);
    q.subject.ppid.filter(|_| dead).and_then(is_it).map_or(q.subject.id, |p| p.id)
}

impl Finder {
    fn slot(&self, parent: Key) -> Slot {
        let mut all = self.parents.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= PARENTS {
            // Slots are cloned only under this lock, so one with a single reference is not in use.
            let old = |s: &Slot| s.try_lock().is_ok_and(|f| f.iter().all(|f| f.at.elapsed() > RECENT));
            all.retain(|_, s| Arc::strong_count(s) > 1 || !old(s));
            if all.len() >= PARENTS {
                all.retain(|_, s| Arc::strong_count(s) > 1);
            }
        }
        Arc::clone(all.entry(parent).or_default())
    }

    /// Searches for the cause, unless it was found less than `fresh` ago. The future must not be dropped before its end: the
    /// search would go on, and a second one of the same parent might begin.
    pub(super) async fn find(
        &self,
        mut q: Question,
        audience: Audience,
        fresh: Duration,
        turn: &Semaphore,
    ) -> Option<Cause> {
        // Before the slot is locked: the holder of a slot then searches at once, and nobody waits for a slot behind this queue.
        let _turn = turn.acquire().await.ok()?;
        let slot = self.slot(parent(&q));
        let mut found = slot.lock().await;
        let of_it = |f: &Found| f.cause.process.id == q.subject.id && f.audience == audience;
        if let Some(f) = found.iter().find(|f| of_it(f) && f.at.elapsed() < fresh) {
            return Some(Cause { alert: q.alert, ..f.cause.clone() });
        }
        let (proc_reader, holders) = (self.proc_reader.clone(), Arc::clone(&self.holders));
        let look = move || {
            let host_ns = proc_reader.own_pid_ns();
            for p in std::iter::once(&mut q.subject).chain(q.family.iter_mut().take(PLACED)) {
                proc_reader.place(p, host_ns);
            }
            let proc = proc_reader.proc.for_audience(audience);
            let mut cause = why::explain(&q, &proc, &*holders, &Limits::default());
            proc_reader.show(&mut cause.process);
            audience.cause(&mut cause);
            cause
        };
        let cause = tokio::task::spawn_blocking(look).await.ok()?;
        found.retain(|f| f.cause.process.id != cause.process.id || f.audience != audience);
        if found.len() >= OF_A_PARENT {
            found.remove(0);
        }
        found.push(Found { at: Instant::now(), audience, cause: cause.clone() });
        Some(cause)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::model::schema::Process;
    use crate::sources::host;
    use crate::sources::proc::Proc;

    /// Answers slowly, and counts: how often it was asked, by how many at once, and by how many at most.
    #[derive(Default)]
    struct Slow {
        asked: AtomicUsize,
        now: AtomicUsize,
        most: AtomicUsize,
    }

    impl Holders for Slow {
        fn holders(&self, _: &[u64]) -> io::Result<Vec<FdRow>> {
            Ok(Vec::new())
        }

        fn keys(&self) -> io::Result<Vec<Key>> {
            self.asked.fetch_add(1, Ordering::SeqCst);
            self.most.fetch_max(self.now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(60));
            self.now.fetch_sub(1, Ordering::SeqCst);
            Ok(Vec::new())
        }
    }

    /// Zombies 20, 21, .. of a parent that the question does not know, so that it is asked for.
    fn finder(zombies: u32) -> (tempfile::TempDir, Arc<Slow>, Arc<Finder>) {
        let dir = tempfile::tempdir().unwrap();
        let put = |pid: u32, state: char, ppid: u32| {
            let stat = format!("{pid} (x) {state} {ppid} 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 500 0 0");
            for at in [format!("{pid}"), format!("{pid}/task/{pid}")] {
                std::fs::create_dir_all(dir.path().join(&at)).unwrap();
                std::fs::write(dir.path().join(at).join("stat"), &stat).unwrap();
            }
        };
        put(10, 'S', 1);
        (20..20 + zombies).for_each(|z| put(z, 'Z', 10));
        let slow = Arc::new(Slow::default());
        let proc_reader = ProcReader::new(Proc::at(dir.path()));
        let cache = CauseCache::new(proc_reader, Arc::clone(&slow) as Arc<dyn Holders>);
        (dir, slow, cache.finder)
    }

    fn question(zombie: u32, alert: Option<&str>) -> Question {
        let start = u64::try_from(5_000_000_000 - host::time_offset()).unwrap();
        let subject: Process = serde_json::from_value(serde_json::json!({
            "id": Key::new(zombie, start), "pid": zombie, "ppid": 10, "lineage_parent": null, "lineage": "unknown",
            "adopter": null, "state": "zombie", "kernel_state": null, "orphan": false, "state_s": 9.0, "started": "",
            "comm": "x", "exe": null, "argv": [], "uid": 0, "job": null, "jobs": [], "container": null,
            "cgroup": null, "pid_ns": null, "ns_pid": null, "kernel_thread": false, "exit": null, "children": [],
        }))
        .unwrap();
        // The parent stands for all of its zombies.
        let parent = Process { id: Key::new(10, 1), pid: 10, state: State::Running, ..subject.clone() };
        let alert = alert.map(str::to_owned);
        Question { subject, family: vec![parent], signals: Vec::new(), lost: None, alert }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn one_look_at_a_parent_at_a_time_and_none_twice() {
        let (_dir, slow, finder) = finder(3);
        let mut jobs = tokio::task::JoinSet::new();
        for n in 0..9_u32 {
            let finder = Arc::clone(&finder);
            jobs.spawn(async move {
                let turn = if n % 2 == 0 { &finder.for_alerts } else { &finder.for_clients };
                let alert = n.to_string();
                let c = finder
                    .find(question(20 + n % 3, Some(&alert)), Audience::Full, FRESH, turn)
                    .await
                    .unwrap();
                assert_eq!((c.process.pid, c.alert), (20 + n % 3, Some(alert)), "each gets its own");
            });
        }
        jobs.join_all().await;
        let numbers = |s: &Slow| (s.asked.load(Ordering::SeqCst), s.most.load(Ordering::SeqCst));
        let (asked, most) = numbers(&slow);
        assert_eq!(most, 1, "two looked at one parent at the same time");
        // Once for each zombie (by each of the two looks that such a verdict needs), the others got what was found.
        assert!((3..=6).contains(&asked), "{asked} looks");
        let find = |audience, fresh| finder.find(question(20, None), audience, fresh, &finder.for_clients);
        find(Audience::Full, Duration::ZERO).await.unwrap();
        let again = numbers(&slow).0;
        assert!(again > asked, "what is too old is sought again");
        find(Audience::Nobody, FRESH).await.unwrap();
        assert!(numbers(&slow).0 > again, "what was found with all rights is shown to others");
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let (_dir, _, finder) = finder(0);
        let held = finder.slot(Key::new(1, 1));
        for n in 0..3 * PARENTS as u64 {
            finder.slot(Key::new(2, n));
        }
        let all = finder.parents.lock().unwrap();
        assert!(all.len() <= PARENTS, "{}", all.len());
        assert!(Arc::ptr_eq(&all[&Key::new(1, 1)], &held), "one that is in use was forgotten");
    }
}
