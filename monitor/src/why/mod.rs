//! The cause of a zombie or an orphan: a reader of /proc (root injected) and a pure classifier over what it read.
//! It signals nobody and changes nothing.

use std::time::Duration;

use crate::model::outside::OutsideText;
use crate::model::question::Question;
use crate::model::schema::{Cause, Evidence, State, Verdict};
use crate::sources::proc::{Proc, blocking};

mod ends;
mod evidence;
mod family;
pub mod holders;
mod look;
mod orphan;
mod python;
#[cfg(feature = "python")]
mod source;
mod syscalls;
mod unix;
mod verdict;
mod zombie;

use family::Family;
pub use holders::{FdRow, Holders, ProcHolders};
pub use python::helper_main;

/// What one `explain` may cost.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// For everything but the Python frames.
    pub time: Duration,
    /// For the Python frames; zero: none are sought.
    pub python: Duration,
    /// How many processes a chain of causes is followed over.
    pub depth: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { time: Duration::from_secs(2), python: Duration::from_secs(2), depth: 8 }
    }
}

/// The cause, with its evidence. Blocking (`spawn_blocking`), bounded by `limits`; what could not be read is said in
/// the evidence and the verdict is then `unknown` rather than a guess.
#[must_use]
pub fn explain(q: &Question, proc: &Proc, holders: &dyn Holders, limits: &Limits) -> Cause {
    let family = Family::new(q, proc, holders, limits);
    let mut told = family.explain();
    told.evidence.extend(left_out(q));
    told.lines.truncate(LINES);
    match (told.python.take(), told.lines.len() < LINES, told.lines.first_mut()) {
        (Some(line), true, _) => told.lines.push(format!("Python: {line}")),
        (Some(line), false, Some(first)) => first.extend([", at ", &line]),
        _ => {}
    }
    Cause {
        process: q.subject.clone(),
        verdict: told.verdict,
        summary: told.lines.join("\n"),
        evidence: told.evidence,
        remedy: told.remedy,
        alert: q.alert.clone(),
    }
}

/// What could not be read of the process and its family, because it holds up its readers.
fn left_out(q: &Question) -> impl Iterator<Item = Evidence> {
    let ours =
        |pid| std::iter::once(&q.subject).chain(&q.family).any(|p| p.pid == pid && p.state != State::Gone);
    blocking::blocked().into_iter().filter(move |b| ours(b.pid)).map(|b| {
        let seconds = b.since.elapsed().as_secs_f64();
        evidence::note(format!("not read: {} of {}, blocked for {seconds:.0} s", b.what, b.pid))
    })
}

/// Lines of a summary.
const LINES: usize = 3;

/// A cause in the making.
#[derive(Debug)]
struct CauseDraft {
    verdict: Verdict,
    lines: Vec<String>,
    /// A line that is said if there is room for it.
    python: Option<String>,
    evidence: Vec<Evidence>,
    remedy: String,
}

impl CauseDraft {
    fn new(verdict: Verdict) -> Self {
        Self { verdict, lines: Vec::new(), python: None, evidence: Vec::new(), remedy: String::new() }
    }

    fn plain(verdict: Verdict, line: String, remedy: String) -> Self {
        Self { lines: vec![line], remedy, ..Self::new(verdict) }
    }
}

/// The kernel's PF_EXITING (include/linux/sched.h).
const PF_EXITING: u32 = 4;

impl Family<'_> {
    fn explain(&self) -> CauseDraft {
        let me = &self.q.subject;
        let who = family::short(&me.to_ref());
        let stat = self.proc.stat(me.pid);
        let stat = match stat {
            Ok(s) if self.same(me.id, &s) => s,
            Err(e) if !matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {
                let line = format!("{who} could not be looked at: {e}");
                return CauseDraft::plain(
                    Verdict::Unknown,
                    line,
                    "Look as root, with /proc of all processes visible.".into(),
                );
            }
            _ => return self.gone(&who),
        };
        let dead = matches!(stat.state, b'Z' | b'X' | b'x');
        let live = if dead { self.live_threads(stat.pid) } else { Vec::new() };
        let exiting = |s: &crate::sources::proc::Stat| s.flags & PF_EXITING != 0;
        if let Some(thread) = live.first().filter(|_| live.iter().all(exiting)) {
            return self.still_exiting(stat.pid, thread, &who);
        }
        if !live.is_empty() {
            return self.leader_exited(&who, &live);
        }
        if stat.state == b'Z' {
            return self.zombie(&stat);
        }
        if stat.state == b'X' || stat.state == b'x' {
            return self.gone(&who);
        }
        if exiting(&stat) || me.state == State::Exiting {
            return self.still_exiting(stat.pid, &stat, &who);
        }
        if me.orphan {
            return self.orphan(&stat);
        }
        let children = self.proc.children(stat.pid).unwrap_or_default();
        let zombies = children.into_iter().filter_map(|c| self.proc.stat(c).ok());
        let zombies = zombies.filter(|s| s.state == b'Z' && !self.proc.has_live_thread(s.pid));
        if let Some(oldest) = zombies.min_by(|a, b| self.age(b).total_cmp(&self.age(a))) {
            return self.zombie(&oldest);
        }
        let text = format!("{who} is alive, has its parent, and has no zombie");
        CauseDraft::plain(Verdict::NotAZombie, text, "Nothing is to be done.".into())
    }

    /// Seconds as a zombie; what the forest has not seen die counts as oldest.
    fn age(&self, s: &crate::sources::proc::Stat) -> f64 {
        let known = self.q.process(self.key(s)).filter(|p| p.state == State::Zombie);
        known.map_or(f64::INFINITY, |p| p.state_s)
    }

    fn gone(&self, who: &str) -> CauseDraft {
        let remedy = "Nothing is to be done.".to_owned();
        if self.q.subject.state == State::Zombie {
            return CauseDraft::plain(
                Verdict::BeingReaped,
                format!("{who} has been reaped meanwhile"),
                remedy,
            );
        }
        CauseDraft::plain(Verdict::NotAZombie, format!("{who} is gone"), remedy)
    }

    fn live_threads(&self, pid: u32) -> Vec<crate::sources::proc::Stat> {
        let tids = self.proc.threads(pid).unwrap_or_default();
        let stats = tids.into_iter().filter_map(|t| self.proc.thread_stat(pid, t).ok());
        stats.filter(|s| !matches!(s.state, b'Z' | b'X' | b'x')).collect()
    }

    fn leader_exited(&self, who: &str, live: &[crate::sources::proc::Stat]) -> CauseDraft {
        let name = |s: &crate::sources::proc::Stat| {
            format!("{} ({})", OutsideText::from_bytes(s.comm.bytes()), s.pid)
        };
        let names: Vec<String> = live.iter().take(THREADS_NAMED).map(name).collect();
        let more = live.len().saturating_sub(names.len());
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let text =
            format!("{who} is no zombie: its main thread has exited, {} live on{more}", names.join(", "));
        let remedy = "Nobody fails to reap it: it ends with its last thread.".to_owned();
        let mut told = CauseDraft::plain(Verdict::LeaderExited, text, remedy);
        if let Ok(look) = self.look(self.q.subject.pid, self.q.subject.id) {
            for t in look.threads.iter().take(THREADS_NAMED) {
                told.evidence.extend(evidence::blocked(&look, t));
            }
        }
        told
    }

    /// `stat` is that of its thread which is at it.
    fn still_exiting(&self, pid: u32, stat: &crate::sources::proc::Stat, who: &str) -> CauseDraft {
        let wchan = self.proc.wchan(pid, stat.pid);
        let at = wchan.as_ref().map_or_else(String::new, |w| format!(", in {w}"));
        let line =
            format!("{who} is still exiting (state {}{at}); its parent is not to blame", stat.state as char);
        let remedy =
            "It waits for what it has open (a file server, a disk, memory to be freed): see the evidence.";
        let mut told = CauseDraft::plain(Verdict::StillExiting, line, remedy.into());
        let process = self.name(pid).unwrap_or_else(|| self.q.subject.to_ref());
        told.evidence.extend(wchan.map(|wchan| Evidence::Wchan { process, thread: stat.pid, wchan }));
        if let Ok(stack) = self.proc.stack(pid, stat.pid)
            && !stack.is_empty()
        {
            told.evidence.push(evidence::note(format!("kernel stack: {}", stack.join(" < "))));
        }
        told
    }
}

/// Threads that are named.
const THREADS_NAMED: usize = 8;

#[cfg(test)]
mod tests;
