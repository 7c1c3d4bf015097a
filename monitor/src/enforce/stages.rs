//! The stages of a job's end: stop signal, grace, doom, SIGKILL until nobody is left. All reading of members, judging and
//! signalling of one order happens here, by one task; nothing is kept from one order to the next.

mod report;
mod send;

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::audit::{self, Audit, Entry};
use super::guards::{Guards, Judge, Spare, Verdicts};
use super::outcome::{EnforceError, Outcome};
use super::pidfd::PidfdSet;
use super::{Lineage, Member, OrderId, cgroup};
use crate::model::key::Key;
use crate::model::kill::{KillSpec, Reason, What};
use crate::model::schema::{KillReport, SignalledOutcome};
use crate::model::signal::{self, SIGKILL};
use crate::redact::Redactor;
use crate::sources::host::boot_now;
use crate::sources::proc::Proc;

/// Doom runs out in the kernel after this long unless it is renewed.
pub const DOOM: Duration = Duration::from_mins(1);
const RENEW: Duration = Duration::from_secs(20);
/// How often the grace looks for new members, whose birth no pidfd tells.
const GRACE_LOOK: Duration = Duration::from_millis(50);
/// The same while the job is doomed; doubled up to the longest while nothing changes.
const KILL_LOOK: Duration = Duration::from_millis(2);
const KILL_LOOK_MAX: Duration = Duration::from_millis(100);
/// The kill rounds end after this many times [`KillSpec::settle`], even while new members still come.
const ROUNDS_MAX: u32 = 6;
/// One reading is no snapshot: a process forked behind the iterator's cursor by one that is dead when the cursor gets there is
/// missing from it. Only so many empty readings one after the other mean that nobody is left.
const EMPTY_READINGS: u32 = 3;
/// The same for "nobody who is spared is without the flag", where somebody's heirs are spared: three missed one chain of 25.
const CLEAN_READINGS: u32 = 20;
/// Who is spared has the flag after a few readings, chains after some more; then the job is not doomed, since a doom would
/// reach those.
const FLAG_READINGS: u32 = 2000;
/// Signals between two chances for other tasks of the runtime.
const CHUNK: usize = 256;
/// The highest preference that the ordinary scheduler gives.
const NICE: i32 = -20;
/// Handles held for noticing ends, at most, and no more than half of what this process may open. With more members than
/// that, the others get theirs for the moment of a signal only, and their end is seen at the next look.
const HANDLES: usize = 8192;

/// What orders are carried out with. Cheap to clone.
#[derive(Clone)]
pub struct Enforcer {
    pub lineage: Arc<dyn Lineage>,
    pub proc: Proc,
    pub audit: Arc<Audit>,
    pub redact: Arc<Redactor>,
}

impl Enforcer {
    /// Carries out one order, in a thread of its own: it goes on to its end, whatever becomes of who asked. Orders on jobs of
    /// which one holds the other may run at the same time.
    ///
    /// What the thread reads of /proc keeps nobody else of the agent waiting.
    pub async fn run(&self, order: &KillSpec, guards: &Guards) -> Result<Outcome, EnforceError> {
        let (e, o, r) = (self.clone(), order.clone(), guards.clone());
        let (tx, rx) = tokio::sync::oneshot::channel();
        let thread = std::thread::Builder::new().name("jobwarden-kill".into()).spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let result = match runtime {
                Ok(rt) => rt.block_on(e.run_here(&o, &r)),
                Err(source) => Err(EnforceError { doing: "the runtime for the end", job: o.number, source }),
            };
            // Who asked may be gone.
            let _ = tx.send(result);
        });
        if thread.is_err() {
            // A bomb has taken the last thread of our own cgroup too.
            return self.run_here(order, guards).await;
        }
        rx.await.unwrap_or_else(|_| {
            let source = io::Error::other("it panicked");
            Err(EnforceError { doing: "the thread for the end", job: order.number, source })
        })
    }

    /// The same in this task. Needs a tokio runtime with time and I/O. Dropping the future at any point lifts the doom.
    pub async fn run_here(&self, order: &KillSpec, guards: &Guards) -> Result<Outcome, EnforceError> {
        let failed = |doing| move |source| EnforceError { doing, job: order.number, source };
        let mut run = Run::new(self, order, guards).map_err(failed("the preparation of the end"))?;
        if order.dry_run {
            return run.dry().map_err(failed("the dry run"));
        }
        if order.what == What::Whole
            && let Err(error) = self.lineage.relabel(order.number, order.root)
        {
            tracing::warn!(job = %order.target, %error, "the job could not be labelled anew; who is in it is ended");
        }
        if run.wait().await.map_err(failed("the wait for an end by itself"))? {
            return run.report().map_err(failed("the report"));
        }
        run.say(audit::What::Kill, "");
        if order.grace > Duration::ZERO && order.signal != SIGKILL {
            run.stop().await.map_err(failed("the grace"))?;
        }
        run.kill().await.map_err(failed("the end by SIGKILL"))?;
        run.report().map_err(failed("the report"))
    }

    /// Signals nobody: the report names who is left, as spared for the reason `why`.
    pub fn let_go(&self, order: &KillSpec, guards: &Guards, why: &str) -> Result<KillReport, EnforceError> {
        let failed = |source| EnforceError { doing: "the letting go", job: order.number, source };
        let mut run = Run::new(self, order, guards).map_err(failed)?;
        let (alive, _) = run.look().map_err(failed)?;
        run.spared.extend(alive.iter().map(|m| (m.key, why.to_owned())));
        let zombies = run.zombies().map_err(failed)?;
        Ok(run.outcome(Vec::new(), zombies, &|_, _| SignalledOutcome::Spared).report)
    }

    /// One signal to all members, root first, with nothing to follow it: what `exec` passes on. How many got it.
    pub fn pass(&self, order: &KillSpec, guards: &Guards, number: u8) -> Result<usize, EnforceError> {
        let failed = |source| EnforceError { doing: "the passing on of a signal", job: order.number, source };
        let mut run = Run::new(self, order, guards).map_err(failed)?;
        let (alive, _) = run.look().map_err(failed)?;
        run.send(&alive, number).map_err(failed)?;
        Ok(run.sent.len())
    }
}

/// Jobs stay doomed, members flagged and jobs labelled no longer than this lives.
struct Marks {
    lineage: Arc<dyn Lineage>,
    id: OrderId,
    labelled: Vec<u64>,
}

impl Drop for Marks {
    fn drop(&mut self) {
        let l = &self.lineage;
        let undone = std::iter::once(l.release(self.id));
        for e in undone.chain(self.labelled.iter().map(|&j| l.forget(j))).filter_map(Result::err) {
            tracing::warn!(error = %e, "a mark of a job's end could not be taken away; doom runs out by itself");
        }
    }
}

struct Sent {
    member: Member,
    signal: u8,
    gone: bool,
}

struct Run<'a> {
    e: &'a Enforcer,
    order: &'a KillSpec,
    judge: Judge<'a>,
    /// The jobs that are ended.
    jobs: Vec<u64>,
    marks: Marks,
    ends: PidfdSet,
    sent: Vec<Sent>,
    /// Who had which signal.
    had: HashSet<(Key, u8)>,
    /// Ended by their pidfds' word; a key never lives again.
    over: HashSet<Key>,
    spared: BTreeMap<Key, String>,
    handles: usize,
    /// For the audit, not written yet.
    lines: Vec<Entry>,
    started: Instant,
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        self.note();
    }
}

impl<'a> Run<'a> {
    fn new(e: &'a Enforcer, order: &'a KillSpec, guards: &'a Guards) -> io::Result<Self> {
        let mut marks = Marks { lineage: e.lineage.clone(), id: OrderId::fresh(), labelled: Vec::new() };
        let jobs = match &order.what {
            What::Whole => vec![order.number],
            What::Descendants { number, roots } => label(&mut marks, *number, roots)?,
        };
        let tops = match (&order.what, order.reason) {
            // Those that a rule ends are judged as members of the whole job; the target of `kill` is a root of its own.
            (What::Whole, _) | (_, Reason::Orphan) => vec![order.root],
            (What::Descendants { roots, .. }, _) => roots.clone(),
        };
        Ok(Self {
            judge: Judge::new(guards, &e.proc, &*e.lineage, &e.redact, tops),
            jobs,
            marks,
            ends: PidfdSet::new()?,
            sent: Vec::new(),
            had: HashSet::new(),
            over: HashSet::new(),
            spared: BTreeMap::new(),
            handles: handles(),
            lines: Vec::new(),
            started: Instant::now(),
            e,
            order,
        })
    }

    fn members(&self) -> io::Result<Vec<Member>> {
        members(&*self.e.lineage, &self.jobs)
    }

    /// Whether a member has ended, by this reading or by its pidfd.
    fn is_over(&self, m: &Member) -> bool {
        m.over || self.over.contains(&m.key)
    }

    /// One reading: all members that are not over, and the rails' verdicts on them.
    fn judged(&mut self) -> io::Result<(Vec<Member>, Verdicts)> {
        let mut all = self.members()?;
        all.retain(|m| !self.is_over(m));
        // An orphan below a protected member of its job is spared with it; the target of `kill` is a root of its own.
        let scope = match (&self.order.what, self.order.reason) {
            (What::Descendants { .. }, Reason::Orphan) => self.e.lineage.members(self.order.number)?,
            _ => Vec::new(),
        };
        let verdicts = self.judge.verdicts(&all, &scope)?;
        for (k, Spare { why, .. }) in &verdicts.spared {
            if self.spared.insert(*k, why.clone()).is_none()
                && let Some(r) = self.judge.named(*k)
            {
                self.e.audit.write(&Entry {
                    process: Some(r.clone()),
                    detail: why.clone(),
                    ..self.entry(audit::What::Spared)
                });
            }
        }
        Ok((all, verdicts))
    }

    /// One reading: the members to be ended (root first, then the oldest), and the rails' verdicts.
    fn look(&mut self) -> io::Result<(Vec<Member>, Verdicts)> {
        let (mut all, verdicts) = self.judged()?;
        all.retain(|m| !verdicts.spared.contains_key(&m.key));
        let root = self.order.root;
        all.sort_by_key(|m| (m.key != root, m.key.start, m.key.pid));
        Ok((all, verdicts))
    }

    /// Whether nobody is left: several readings, each begun after the one before was over.
    fn empty(&mut self) -> io::Result<bool> {
        for _ in 0..EMPTY_READINGS {
            if !self.look()?.0.is_empty() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Waits for [`KillSpec::delay`]; true: by then nobody is left, and nobody was signalled.
    async fn wait(&mut self) -> io::Result<bool> {
        let deadline = Instant::now() + self.order.delay;
        loop {
            let (alive, _) = self.look()?;
            if alive.is_empty() && self.empty()? {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            for chunk in alive.chunks(CHUNK) {
                self.hold(chunk)?;
            }
            self.rest(deadline, GRACE_LOOK).await?;
        }
    }

    /// Waits until all that are held have ended, or for `look`, or until `deadline`; whether one ended.
    async fn rest(&mut self, deadline: Instant, look: Duration) -> io::Result<bool> {
        if self.ends.is_empty() {
            // Members without a handle (too many, or exiting on their own): the next look tells.
            tokio::time::sleep(KILL_LOOK).await;
        }
        let ended = self.ends.all(deadline.min(Instant::now() + look)).await?;
        let any = !ended.is_empty();
        self.over.extend(ended);
        Ok(any)
    }

    /// The stop signal to each, once, and SIGCONT after it; until nobody is left or the grace is over.
    async fn stop(&mut self) -> io::Result<()> {
        let deadline = Instant::now() + self.order.grace;
        loop {
            let (alive, _) = self.look()?;
            if alive.is_empty() && self.empty()? {
                return Ok(());
            }
            for chunk in alive.chunks(CHUNK) {
                self.send(chunk, self.order.signal)?;
                tokio::task::yield_now().await;
            }
            self.note();
            if Instant::now() >= deadline {
                return Ok(());
            }
            self.rest(deadline, GRACE_LOOK).await?;
        }
    }

    /// Spared members flagged, then doom, then SIGKILL until nobody is left.
    async fn kill(&mut self) -> io::Result<()> {
        let all = self.members()?;
        self.judge.again(&all);
        let (alive, _) = self.look()?;
        if alive.is_empty() && self.empty()? {
            return Ok(());
        }
        self.flag()?;
        self.kill_cgroup()?;
        let begin = Instant::now();
        let settle = self.order.settle;
        let (mut progress, mut renewed, mut pause) = (begin, None, KILL_LOOK);
        loop {
            let now = Instant::now();
            if renewed.is_none_or(|r| now - r > RENEW) {
                self.doom()?;
                renewed = Some(now);
            }
            let (alive, _) = self.look()?;
            if alive.is_empty() && self.empty()? {
                return Ok(());
            }
            // By an order that is over, say: the probes pass over it until it has lost that. A chain may outrun this, and is
            // seen again in the next round.
            if alive.iter().any(|m| m.spared)
                && let Err(error) = self.e.lineage.disinherit()
            {
                tracing::debug!(job = %self.order.target, %error, "who is not spared any more has the flag still");
            }
            let before = self.sent.len();
            for chunk in alive.chunks(CHUNK) {
                self.send(chunk, SIGKILL)?;
                tokio::task::yield_now().await;
            }
            self.note();
            if self.rest(begin + settle * ROUNDS_MAX, pause).await? || self.sent.len() > before {
                (progress, pause) = (Instant::now(), KILL_LOOK);
            } else {
                pause = (pause * 2).min(KILL_LOOK_MAX);
            }
            let now = Instant::now();
            if now - progress > settle || now - begin > settle * ROUNDS_MAX {
                return Ok(());
            }
        }
    }

    /// The spare flag on all that are spared, before any doom. A child forked before its parent got the flag is caught by
    /// reading again until there is none without it: the head of a chain that forks and exits may be missing from a reading,
    /// and has forked again when it is marked, so several readings must be clean. Who has the flag from another order gets it
    /// from this one too, which may last longer; heirs born later descend from who is marked.
    fn flag(&mut self) -> io::Result<()> {
        let mut clean = 0;
        for reading in 0..FLAG_READINGS {
            let (all, verdicts) = self.judged()?;
            let bare: Vec<(Key, bool)> = all
                .iter()
                .filter(|m| !m.dead && (reading == 0 || !m.spared))
                .filter_map(|m| Some((m.key, verdicts.spared.get(&m.key)?.heirs)))
                .collect();
            clean = if bare.is_empty() { clean + 1 } else { 0 };
            let heirs = verdicts.spared.values().any(|s| s.heirs);
            if clean >= if heirs { CLEAN_READINGS } else { EMPTY_READINGS } {
                return Ok(());
            }
            for (key, heirs) in bare {
                self.e.lineage.spare(key, heirs, self.marks.id)?;
            }
        }
        Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "what is spared forks faster than it can be marked; nobody was doomed",
        ))
    }

    fn doom(&mut self) -> io::Result<()> {
        let until = boot_now() + DOOM.as_nanos() as u64;
        for &job in &self.jobs {
            self.e.lineage.doom(job, until, self.marks.id)?;
        }
        Ok(())
    }

    /// `cgroup.kill` where the job owns its cgroup: all in it are members and none is spared.
    fn kill_cgroup(&mut self) -> io::Result<()> {
        let Some(dir) = &self.order.cgroup else { return Ok(()) };
        let (alive, verdicts) = self.look()?;
        let members: HashSet<u32> = self.members()?.iter().map(|m| m.key.pid).collect();
        let strangers = cgroup::processes(dir).map(|p| p.iter().any(|pid| !members.contains(pid)));
        if !verdicts.spared.is_empty() || !matches!(strangers, Ok(false)) {
            return Ok(());
        }
        if let Err(e) = cgroup::kill(dir) {
            // Linux before 5.14 has no such file: the rounds by lineage do all of it.
            tracing::debug!(cgroup = %dir.display(), error = %e, "cgroup.kill");
            return Ok(());
        }
        self.e.audit.write(&Entry {
            signal: Some(signal::name(SIGKILL)),
            detail: format!("cgroup.kill on {}, {} members", dir.display(), alive.len()),
            ..self.entry(audit::What::Signal)
        });
        Ok(())
    }

    fn entry(&self, what: audit::What) -> Entry {
        Entry {
            job: self.order.job,
            job_name: self.order.name.clone(),
            reason: Some(self.order.reason),
            ..Entry::now(what, self.order.asked_by.clone())
        }
    }

    fn say(&self, what: audit::What, detail: &str) {
        self.e.audit.write(&Entry { detail: format!("{}{detail}", self.order.target), ..self.entry(what) });
    }
}

/// Nice -20 for this thread and those that it makes: an end costs some 30 ms of CPU time, for which one among 300 of a fork
/// bomb waits seconds. Wants CAP_SYS_NICE, unless it is so already.
pub fn preferred() -> io::Result<()> {
    // None is the calling thread (setpriority(2), "C library/kernel differences").
    if rustix::process::getpriority_process(None)? == NICE {
        return Ok(());
    }
    Ok(rustix::process::setpriority_process(None, NICE)?)
}

fn handles() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    HANDLES.min(limit.map_or(HANDLES, |l| (l / 2) as usize))
}

fn members(lineage: &dyn Lineage, jobs: &[u64]) -> io::Result<Vec<Member>> {
    let mut all: Vec<Member> = Vec::new();
    let mut seen = HashSet::new();
    for &job in jobs {
        all.extend(lineage.members(job)?.into_iter().filter(|m| seen.insert(m.key)));
    }
    Ok(all)
}

/// Makes each root a job of its own, inside the innermost job that it is in now. One that a job made here holds already
/// needs none.
fn label(marks: &mut Marks, number: u64, roots: &[Key]) -> io::Result<Vec<u64>> {
    let lineage = marks.lineage.clone();
    let mut jobs = Vec::new();
    for (i, &root) in roots.iter().enumerate() {
        if members(&*lineage, &jobs)?.iter().any(|m| m.key == root) {
            continue;
        }
        let number = number + i as u64;
        marks.labelled.push(number);
        lineage.label_inside(number, root)?;
        jobs.push(number);
    }
    Ok(jobs)
}
