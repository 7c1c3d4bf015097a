//! Causes, sought beside the core: `why` reads /proc and may take a while. Alerts and who asks share what was found, and
//! no parent is ever looked at twice at the same time.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

use super::core::{Core, Internal};
use super::proc_reader::ProcReader;
use crate::api::Reply;
use crate::api::wire::Causes;
use crate::enforce::Lineage;
use crate::model::audience::Audience;
use crate::model::key::Key;
use crate::model::question::Question;
use crate::model::schema::{Alert, AlertKind, Cause, State, Verdict};
use crate::sources::host;
use crate::sources::kernel::Kernel;
use crate::why::{self, FdRow, Holders, Limits};

/// What was found this short a time ago is not sought again, even for who asks.
const FRESH: Duration = Duration::from_secs(1);
/// The cause of a firing alert is sought again this often, as receivers are told of it again ..
const RENEWED: Duration = Duration::from_mins(1);
/// .. and after this already, if it is about another process by now.
const CHANGED: Duration = Duration::from_secs(10);
/// What was found for somebody else this short a time ago will do for a renewal.
const RECENT: Duration = Duration::from_secs(30);
/// Most causes that are sought again in a second: a thousand alerts must not keep the machine busy.
const RENEWALS: usize = 4;
/// Looks under way for alerts, and as many for who asks: neither waits for the other.
const AT_ONCE: usize = 2;
/// Most causes that are sought for one who asks, and how long that may take; the rest is counted.
const ASKED_MAX: usize = 32;
const ASKED_TIME: Duration = Duration::from_secs(20);
/// So few alerts are each looked at anew.
const FEW: usize = 8;
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

/// Of so many of a family it is read in which container and namespace they are, if that is not known yet.
const PLACED: usize = 64;

/// The causes of one parent's zombies, or of an orphan; locked while it is looked at.
type Slot = Arc<tokio::sync::Mutex<Vec<Found>>>;

/// What was found, when, and with whose rights.
struct Found {
    at: Instant,
    audience: Audience,
    cause: Cause,
}

struct Finder {
    proc_reader: ProcReader,
    holders: Arc<dyn Holders>,
    parents: Mutex<HashMap<Key, Slot>>,
    for_alerts: Semaphore,
    for_askers: Semaphore,
}

/// Causes that were found, and when those of firing alerts were last sought.
pub(super) struct CauseCache {
    finder: Arc<Finder>,
    /// By alert; and about which process.
    sought: HashMap<String, (Key, Instant)>,
}

impl CauseCache {
    pub(super) fn new(proc_reader: ProcReader, holders: Arc<dyn Holders>) -> Self {
        let finder = Arc::new(Finder {
            proc_reader,
            holders,
            parents: Mutex::default(),
            for_alerts: Semaphore::new(AT_ONCE),
            for_askers: Semaphore::new(AT_ONCE),
        });
        Self { finder, sought: HashMap::new() }
    }
}

/// Who should reap, or the process itself.
fn parent(q: &Question) -> Key {
    let dead = matches!(q.subject.state, State::Zombie | State::Exiting);
    let is_it = |pid| q.family.iter().find(|p| p.pid == pid && p.state != State::Gone);
    q.subject.ppid.filter(|_| dead).and_then(is_it).map_or(q.subject.id, |p| p.id)
}

impl Finder {
    fn slot(&self, parent: Key) -> Slot {
        let mut all = self.parents.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= PARENTS {
            // Only here are they cloned: what nobody else has is not in use.
            let old = |s: &Slot| s.try_lock().is_ok_and(|f| f.iter().all(|f| f.at.elapsed() > RECENT));
            all.retain(|_, s| Arc::strong_count(s) > 1 || !old(s));
            if all.len() >= PARENTS {
                all.retain(|_, s| Arc::strong_count(s) > 1);
            }
        }
        Arc::clone(all.entry(parent).or_default())
    }

    /// The cause, unless it was found less than `fresh` ago. Not to be dropped half-way: the look would go on, and another one
    /// might begin.
    async fn find(
        &self,
        mut q: Question,
        audience: Audience,
        fresh: Duration,
        turn: &Semaphore,
    ) -> Option<Cause> {
        // Before the slot: who has that looks at once, and nobody waits behind the queue of others' looks.
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

/// For an alert that has just fired. If it takes longer than `wait`, the alert goes out without a cause, which follows.
pub(super) fn of_alert(core: &mut Core, alert: String, wait: Duration) {
    let found = core.engine.alert_subject(&alert).and_then(|k| seek(core, &alert, k, FRESH));
    let tx = core.internal.clone();
    let Some(mut job) = found else {
        let _ = tx.send(Internal::Cause { alert, cause: None });
        return;
    };
    core.beside.spawn(async move {
        let soon = timeout(wait, &mut job).await;
        let late = soon.is_err();
        let cause = soon.ok().and_then(Result::ok).flatten().map(Box::new);
        let _ = tx.send(Internal::Cause { alert: alert.clone(), cause });
        if late && let Ok(Some(cause)) = job.await {
            let _ = tx.send(Internal::Cause { alert, cause: Some(Box::new(cause)) });
        }
    });
}

/// Each second: the causes of firing alerts that are old, or about another process by now. Those from before a restart are
/// among them.
pub(super) fn renew(core: &mut Core) {
    let mut due: Vec<(Option<Instant>, String, Key)> = Vec::new();
    let mut firing = 0;
    for (id, key) in core.engine.to_explain() {
        firing += 1;
        let sought = core.causes.sought.get(id);
        let is_due = sought.is_none_or(|(k, at)| at.elapsed() > if *k == key { RENEWED } else { CHANGED });
        if is_due {
            due.push((sought.map(|s| s.1), id.to_owned(), key));
        }
    }
    if core.causes.sought.len() > firing {
        let engine = &core.engine;
        core.causes.sought.retain(|id, _| engine.alert_subject(id).is_some());
    }
    due.sort_unstable();
    for (_, alert, key) in due.into_iter().take(RENEWALS) {
        let Some(job) = seek(core, &alert, key, RECENT) else { continue };
        let tx = core.internal.clone();
        core.beside.spawn(async move {
            // On its way to be resolved: what was told of it is not to be unsaid.
            let over = [Verdict::BeingReaped, Verdict::NotAZombie];
            if let Ok(Some(cause)) = job.await
                && !over.contains(&cause.verdict)
            {
                let _ = tx.send(Internal::Cause { alert, cause: Some(Box::new(cause)) });
            }
        });
    }
}

fn seek(
    core: &mut Core,
    alert: &str,
    key: Key,
    fresh: Duration,
) -> Option<tokio::task::JoinHandle<Option<Cause>>> {
    core.causes.sought.insert(alert.to_owned(), (key, Instant::now()));
    let mut question = core.engine.question(key, host::boot_now())?;
    question.alert = Some(alert.to_owned());
    let (finder, redact) = (Arc::clone(&core.causes.finder), Arc::clone(&core.redact));
    Some(core.beside.spawn(async move {
        // Receivers are named by the config. A line of source is shown to them, too, only where the process itself may read it.
        let mut cause = finder.find(question, Audience::Full, fresh, &finder.for_alerts).await?;
        redact.cause(&mut cause);
        Some(cause)
    }))
}

/// What an alert itself says, where there is no process to be looked at: those about the host, which are jobwarden's own,
/// and those whose subject is gone.
pub(super) fn itself(core: &Core, a: Alert, audience: Audience) -> Option<Cause> {
    let own = || core.engine.current(std::process::id());
    let process = a.subject.or_else(|| core.engine.process(own()?, host::boot_now()))?;
    let remedy = match a.kind {
        AlertKind::EventsLost => {
            "nothing, if it was once; else make `ring_bytes` larger, and see that the agent is not starved of CPU"
        }
        AlertKind::EnforcementStopped => {
            "find out why so many jobs are over their time, then `jobwarden enforcement on`"
        }
        AlertKind::StorageFailed => {
            "make room in the state directory, or mend its disk: it is tried again each second"
        }
        AlertKind::Capacity => "look at `jobwarden_store_entries` on /metrics for what there is too much of",
        AlertKind::JobTimeout => "look at `jobwarden jobs`; `jobwarden jobs extend` or `jobwarden kill` it",
        AlertKind::KillFailed => "look at what holds the survivors: `jobwarden why` of each",
        AlertKind::Zombie | AlertKind::Orphan => "nothing: the processes are gone",
    };
    let mut cause = Cause {
        process,
        verdict: Verdict::Unknown,
        summary: a.summary,
        evidence: Vec::new(),
        remedy: remedy.to_owned(),
        alert: Some(a.id),
    };
    core.redact.cause(&mut cause);
    audience.cause(&mut cause);
    Some(cause)
}

/// The process to look at for an alert; None where there is none, or none any more.
fn subject(core: &Core, a: &Alert) -> Option<Key> {
    core.engine.alert_subject(&a.id).filter(|&k| core.engine.process(k, host::boot_now()).is_some())
}

/// For `why` of these processes.
pub(super) fn of(core: &Core, keys: Vec<Key>, audience: Audience, reply: Reply<Causes>) {
    ask(core, audience, Vec::new(), keys.into_iter().map(|k| (k, None)).collect(), reply);
}

/// For `why` of one alert.
pub(super) fn of_one(core: &Core, a: Alert, audience: Audience, reply: Reply<Causes>) {
    match subject(core, &a) {
        Some(key) => ask(core, audience, Vec::new(), vec![(key, Some(a.id))], reply),
        None => ask(core, audience, itself(core, a, audience).into_iter().collect(), Vec::new(), reply),
    }
}

/// For `why` of every firing alert. Of many, what was found for each alert, and a new look only where there is nothing.
pub(super) fn of_all(core: &Core, audience: Audience, reply: Reply<Causes>) {
    let (mut known, mut keys) = (Vec::new(), Vec::new());
    let alerts = core.engine.alerts(false);
    // What was found for an alert was read with all rights.
    let anew = alerts.len() <= FEW || audience != Audience::Full;
    for a in alerts {
        let Some(key) = subject(core, &a) else {
            known.extend(itself(core, a, audience));
            continue;
        };
        match a.cause.filter(|c| !anew && c.process.id == key) {
            Some(mut cause) => {
                core.redact.cause(&mut cause);
                known.push(Cause { alert: Some(a.id), ..cause });
            }
            None => keys.push((key, Some(a.id))),
        }
    }
    ask(core, audience, known, keys, reply);
}

fn ask(
    core: &Core,
    audience: Audience,
    known: Vec<Cause>,
    keys: Vec<(Key, Option<String>)>,
    reply: Reply<Causes>,
) {
    let now = host::boot_now();
    let more = keys.len().saturating_sub(ASKED_MAX);
    let question = |(key, alert)| core.engine.question(key, now).map(|q| Question { alert, ..q });
    let questions: Vec<Question> = keys.into_iter().take(ASKED_MAX).filter_map(question).collect();
    let (finder, redact) = (Arc::clone(&core.causes.finder), Arc::clone(&core.redact));
    let end = Instant::now() + ASKED_TIME;
    core.beside.spawn(async move {
        let mut all = Causes { causes: known, more };
        for q in questions {
            let finder = Arc::clone(&finder);
            let job = tokio::spawn(async move { finder.find(q, audience, FRESH, &finder.for_askers).await });
            match tokio::time::timeout_at(end, job).await {
                Ok(Ok(Some(mut cause))) => {
                    redact.cause(&mut cause);
                    all.causes.push(cause);
                }
                Ok(_) => {}
                Err(_) => all.more += 1,
            }
        }
        let _ = reply.send(Ok(all));
    });
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::model::schema::Process;
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
        let seeker = CauseCache::new(proc_reader, Arc::clone(&slow) as Arc<dyn Holders>);
        (dir, slow, seeker.finder)
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
                let turn = if n % 2 == 0 { &finder.for_alerts } else { &finder.for_askers };
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
        let find = |audience, fresh| finder.find(question(20, None), audience, fresh, &finder.for_askers);
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
