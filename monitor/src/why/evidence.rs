//! Facts to the contract's evidence, and the chain of waits followed to its root.

use std::fmt::Write as _;

use super::ends::{End, Kind};
use super::family::{Family, ago, short};
use super::look::{Doing, Look, Thread};
use super::verdict;
use crate::model::event::SignalResult;
use crate::model::key::Key;
use crate::model::question::SignalSeen;
use crate::model::schema::{Evidence, Exit, Ref, SignalBy, SignalOutcome, State};
use crate::model::signal;
use crate::sources::proc::Status;

/// Files of one wait that are shown, and holders of one file.
const ENDS: usize = 8;
const HOLDERS: usize = 8;
/// Signals of one kill are sent within this (ns).
const ABOUT: u64 = 2_000_000_000;
/// Signals that are shown of one process.
const SIGNALS: usize = 4;
/// Default action: terminate (`signal(7)`).
const TERMINATING: [u8; 12] = [1, 2, 3, 6, 9, 10, 12, 13, 14, 15, 26, 27];
/// SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU.
const STOPPING: [u8; 4] = [19, 20, 21, 22];

/// Whether it was meant to end its target. Not what a process brings on itself: a SIGPIPE of its own write, which many ignore
/// (CPython does), an abort, a timer of its own.
pub(super) fn meant_to_end(s: &SignalSeen) -> bool {
    let own = s.by == SignalBy::Timer || s.sender.as_ref().is_some_and(|by| by.id == s.target.id);
    TERMINATING.contains(&s.signal) && s.signal != signal::SIGPIPE && !own
}

/// In the masks of /proc/PID/status.
pub(super) fn bit(signal: u8) -> u64 {
    1_u64.checked_shl(u32::from(signal).wrapping_sub(1)).unwrap_or(0)
}

pub(super) fn note(text: impl Into<String>) -> Evidence {
    Evidence::Note { text: text.into() }
}

/// What the thread is blocked in: an item for each file that others hold, or one for the call.
pub(super) fn blocked(look: &Look, t: &Thread) -> Vec<Evidence> {
    let syscall = t.syscall.clone().unwrap_or_else(|| match t.doing {
        Doing::Running => "none: on a CPU".into(),
        _ => "unknown".into(),
    });
    let item = |end: Option<&End>| Evidence::Blocked {
        process: Some(look.who.clone()),
        thread: t.tid,
        syscall: syscall.clone(),
        fd: end.map(|e| e.fd),
        inode: end.map(|e| e.link.text()).or_else(|| t.path.clone()),
    };
    if let Doing::Files { ends, direct, .. } = &t.doing {
        let mut held: Vec<&End> = verdict::pipes(ends).collect();
        if held.is_empty() {
            held = ends.iter().collect();
        }
        if *direct || !held.is_empty() {
            return if held.is_empty() {
                vec![item(None)]
            } else {
                held.into_iter().take(ENDS).map(|e| item(Some(e))).collect()
            };
        }
    }
    vec![item(None)]
}

pub(super) fn wchan(look: &Look, t: &Thread) -> Option<Evidence> {
    let wchan = t.wchan.clone()?;
    Some(Evidence::Wchan { process: look.who.clone(), thread: t.tid, wchan })
}

impl Family<'_> {
    /// The holders of an end, each with its relation in words.
    pub(super) fn held(&self, look: &Look, end: &End) -> Vec<Evidence> {
        let mut v: Vec<Evidence> = Vec::new();
        for h in end.holders.iter().take(HOLDERS) {
            let r = &h.relation;
            let relation = self.relation_words(r, &look.who);
            let (process, mode, inode) = (h.who.clone(), h.mode.to_owned(), h.inode.clone());
            v.push(Evidence::Holder { process, fd: h.fd, mode, inode, relation });
        }
        if end.holders.len() > HOLDERS {
            v.push(note(format!("{} more hold {}", end.holders.len() - HOLDERS, end.link)));
        }
        if let Some(fd) = end.own {
            let (process, mode, inode) = (look.who.clone(), "w".to_owned(), end.link.text());
            let mode = if matches!(end.kind, Kind::Pipe | Kind::Fifo(..)) { mode } else { "rw".into() };
            v.push(Evidence::Holder {
                process,
                fd,
                mode,
                inode,
                relation: "the blocked process itself".into(),
            });
        }
        v
    }

    pub(super) fn relation_words(&self, r: &super::family::Relation, blocked: &Ref) -> String {
        use super::family::Closeness as C;
        let mut s = match (r.orphan, r.closeness) {
            (true, _) if r.job.is_some() => "orphan of this job".to_owned(),
            (true, C::OfZombie | C::OfBlocked) => "orphan of this family".to_owned(),
            (true, _) => "orphan".to_owned(),
            (false, C::OfZombie) => "descends from the zombie".to_owned(),
            (false, C::OfBlocked) => format!("descends from {}", short(blocked)),
            (false, C::SameJob | C::OrphanOfJob) => "member of this job".to_owned(),
            (false, C::SameSession) => "same session; lineage unknown".to_owned(),
            (false, C::None) if r.parent.is_none() => "lineage unknown".to_owned(),
            (false, C::None) => "not of this family".to_owned(),
        };
        if let Some(parent) = r.parent.filter(|_| r.orphan) {
            let name = self.name_key(parent).map_or_else(|| parent.to_string(), |p| short(&p));
            let _ = write!(s, ", forked by {name}");
            if r.closeness == C::OfZombie && r.ancestors.len() > 1 && r.ancestors[0] != self.q.subject.id {
                s.push_str(", descends from the zombie");
            }
        }
        if let Some(adopter) = &r.adopter {
            let _ = write!(s, ", adopted by {}", short(adopter));
            if let Some(t) = r.parent.and_then(|p| self.dead_for(p)) {
                let _ = write!(s, " {} ago", ago(t));
            }
        }
        s
    }

    pub(super) fn signal(&self, s: &SignalSeen) -> Evidence {
        let bit = bit(s.signal);
        let status = self.status_of(s.target.id).unwrap_or_default();
        let outcome = match s.result {
            SignalResult::Ignored => SignalOutcome::Ignored,
            SignalResult::AlreadyPending => SignalOutcome::AlreadyPending,
            _ if status.blocked & bit != 0 && self.blocked_by_all(s.target.pid, &status, bit) => {
                SignalOutcome::Blocked
            }
            _ if status.ignored & bit != 0 => SignalOutcome::Ignored,
            _ => SignalOutcome::Delivered,
        };
        Evidence::Signal {
            signal: signal::name(s.signal),
            sender: s.sender.clone(),
            by: s.by,
            target: s.target.clone(),
            outcome,
        }
    }

    /// Of a process that is there.
    fn status_of(&self, key: Key) -> Option<Status> {
        let stat = self.proc.stat(key.pid).ok().filter(|s| self.same(key, s))?;
        self.proc.status(stat.pid).ok()
    }

    /// The main thread blocks it: where another one does not, that one gets what is sent to the process.
    fn blocked_by_all(&self, pid: u32, main: &Status, bit: u64) -> bool {
        if (main.pending | main.shared_pending) & bit != 0 {
            return true;
        }
        let tids = self.proc.threads(pid).unwrap_or_default();
        tids.into_iter().all(|t| self.proc.thread_status(pid, t).is_ok_and(|s| s.blocked & bit != 0))
    }

    /// How it can be that a process got a terminating signal and lives on; empty if /proc does not tell.
    pub(super) fn lives_on(&self, key: Key, signal: u8) -> String {
        let Some(status) = self.status_of(key) else { return String::new() };
        let bit = bit(signal);
        let state = self.proc.stat(key.pid).map_or(b'?', |s| s.state);
        match state {
            _ if (status.pending | status.shared_pending) & bit == 0 => {}
            b'T' => return ": it is stopped, and the signal pending".into(),
            b't' => return ": its tracer has stopped it, and the signal is pending".into(),
            b'D' => return ": it is in uninterruptible sleep, and the signal pending".into(),
            _ => {}
        }
        if status.caught & bit != 0 { ": it has a handler for it".into() } else { String::new() }
    }

    /// Whether the signal that ended `parent` was sent to `child` too. No signal seen means that none was sent only if the
    /// parent's own stands among those that were seen (the probe was on then, and nothing of it is forgotten), and no record
    /// was lost about then or since.
    pub(super) fn sent_too(&self, parent: Key, child: Key, signal: &str) -> Option<bool> {
        let named = |s: &SignalSeen| signal::name(s.signal) == signal;
        if !self.signals_to(child, named).is_empty() {
            return Some(true);
        }
        let killing = self.signals_to(parent, named).last().map(|s| s.at)?;
        self.q.lost.is_none_or(|at| at + ABOUT < killing).then_some(false)
    }

    /// The last signals of some kind that a process got, oldest first.
    pub(super) fn signals_to(&self, key: Key, kind: impl Fn(&SignalSeen) -> bool) -> Vec<&SignalSeen> {
        let mut v: Vec<_> = self.q.signals.iter().filter(|s| s.target.id == key && kind(s)).collect();
        v.drain(..v.len().saturating_sub(SIGNALS));
        v
    }

    /// Which signal stopped a process that is stopped. The probes do not record SIGCONT, so it is not the last one that was
    /// sent but the last one that it took: what is sent to a stopped process stays pending until it goes on.
    pub(super) fn stopped_by(&self, key: Key) -> Option<&SignalSeen> {
        let status = self.status_of(key)?;
        let pending = status.pending | status.shared_pending;
        let mut skipped = 0_u64;
        self.q.signals.iter().rev().filter(|s| s.target.id == key && STOPPING.contains(&s.signal)).find(|s| {
            let bit = bit(s.signal);
            // One at a time is pending: the last of its number.
            let waits = pending & bit != 0 && skipped & bit == 0;
            let took = !matches!(s.result, SignalResult::Ignored | SignalResult::AlreadyPending)
                && status.caught & bit == 0;
            skipped |= if took { bit } else { 0 };
            took && !waits
        })
    }

    /// How a dead process died: its exit, and the signals that did it. None while it lives, or if nobody saw it.
    pub(super) fn death(&self, key: Key) -> Vec<Evidence> {
        let Some(p) = self.q.process(key) else { return Vec::new() };
        if matches!(p.state, State::Running | State::LeaderExited) {
            return Vec::new();
        }
        let mut v = vec![Evidence::ParentExit { process: p.to_ref(), exit: p.exit.clone() }];
        // What killed it counts in any case.
        let killed = |s: &SignalSeen| matches!(&p.exit, Some(Exit::Signal { signal, .. }) if *signal == signal::name(s.signal));
        let fits = |s: &SignalSeen| meant_to_end(s) || killed(s);
        v.extend(self.signals_to(key, fits).into_iter().map(|s| self.signal(s)));
        v
    }

    /// The signal that killed it, and from whom, in words: `SIGTERM from worker (12)`.
    pub(super) fn killed_by(&self, key: Key) -> Option<(String, String)> {
        let p = self.q.process(key)?;
        let Some(Exit::Signal { signal: name, sender, .. }) = &p.exit else { return None };
        let seen = self.signals_to(key, |s| signal::name(s.signal) == *name);
        let sender = sender.clone().or_else(|| seen.last().and_then(|s| s.sender.clone()));
        let by = sender.map_or_else(String::new, |s| format!(" from {}", short(&s)));
        Some((name.clone(), by))
    }

    /// What `who` does, and what that waits for, to the root of it. Gives the first of it in words.
    pub(super) fn follow(
        &self,
        who: &Ref,
        zombie: Key,
        seen: &mut Vec<u32>,
        out: &mut Vec<Evidence>,
    ) -> String {
        if let Some(at) = seen.iter().position(|&p| p == who.pid) {
            let names: Vec<String> = seen[at..]
                .iter()
                .chain(&seen[at..=at])
                .map(|&p| self.name(p).map_or_else(|| p.to_string(), |r| short(&r)))
                .collect();
            if seen.len() - at == 1 {
                out.push(note(format!("{} waits for something that only it can do", short(who))));
                return "which waits for itself".into();
            }
            out.push(note(format!("they wait for each other in a circle: {}", names.join(" -> "))));
            return format!("which waits for {} in turn: a circle", names[1]);
        }
        seen.push(who.pid);
        if seen.len() > self.limits.depth || self.late() {
            out.push(note(format!("not followed further than {}", short(who))));
            return String::new();
        }
        let Ok(look) = self.look(who.pid, zombie) else {
            out.push(note(format!("{} is gone by now", short(who))));
            return "which is gone by now".into();
        };
        let Some(t) = look.main() else {
            out.push(note(format!("{} has no live thread: it is a zombie itself", short(who))));
            return "which is a zombie itself".into();
        };
        match t.state {
            b'T' => {
                out.push(note(format!("{} is stopped", short(who))));
                out.extend(self.stopped_by(look.who.id).map(|s| self.signal(s)));
                return "which is stopped".into();
            }
            b't' => {
                out.push(note(format!("{} is stopped by its tracer", short(who))));
                out.extend(look.tracer.clone().map(|process| Evidence::Tracer { process }));
                return "which its tracer has stopped".into();
            }
            _ => {}
        }
        self.follow_look(&look, zombie, seen, out)
    }

    fn follow_look(&self, look: &Look, zombie: Key, seen: &mut Vec<u32>, out: &mut Vec<Evidence>) -> String {
        let i = verdict::on_pipe(look).unwrap_or(0);
        let Some(t) = look.threads.get(i) else { return String::new() };
        let call = t.syscall.clone().unwrap_or_else(|| "no system call".into());
        out.extend(blocked(look, t));
        match &t.doing {
            Doing::Running => "which is running".into(),
            Doing::Files { ends, .. } => {
                let Some(end) = verdict::pipes(ends).next() else { return format!("which is in {call}") };
                out.extend(self.held(look, end));
                let Some(next) = end.holders.first() else {
                    return format!("which is in {call} on {}", end.link);
                };
                self.follow(&next.who, zombie, seen, out);
                format!("which itself waits in {call} on {} for {}", end.link, short(&next.who))
            }
            Doing::OtherChild(children) | Doing::Vfork(children) => {
                self.follow_children(children, zombie, seen, out);
                children.first().map_or_else(String::new, |c| format!("which waits for {}", short(c)))
            }
            Doing::AnyChild => {
                let children = self.live_children(look.stat.pid, |_| true);
                self.follow_children(&children, zombie, seen, out);
                children.first().map_or_else(
                    || format!("which is in {call}"),
                    |c| format!("which waits for its children, {} among them", short(c)),
                )
            }
            Doing::Futex | Doing::Sleep | Doing::Other | Doing::Unknown => {
                let path = t.path.as_ref().map_or_else(String::new, |p| format!(" of {p}"));
                format!("which is in {call}{path}")
            }
        }
    }

    pub(super) fn follow_children(
        &self,
        children: &[Ref],
        zombie: Key,
        seen: &mut Vec<u32>,
        out: &mut Vec<Evidence>,
    ) -> String {
        let Some(first) = children.first() else { return String::new() };
        out.extend(children.iter().map(|c| Evidence::WaitsFor { process: c.clone() }));
        self.follow(first, zombie, seen, out)
    }
}
