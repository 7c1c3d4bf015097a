//! Why an orphan was left: how its parent ended and by whom, which of the family got the signal, what it did with it
//! itself, and whom it blocks.

use super::CauseDraft;
use super::ends::{End, Want};
use super::evidence::{bit, meant_to_end, note};
use super::family::{Family, ago, short};
use super::look::{Doing, Look};
use super::verdict;
use crate::model::daemon::daemonized;
use crate::model::schema::{Evidence, Exit, Process, SignalOutcome, State, Verdict};
use crate::model::signal;
use crate::sources::proc::{Stat, Status};

/// Pipes of the orphan whose other ends are looked at, and processes that are asked whether they wait there.
const PIPES: usize = 16;
const WAITERS: usize = 16;
/// Others of the family that are named as having got, or not got, the signal.
const OTHERS: usize = 8;

/// What is known of an orphan and its dead parent.
#[derive(Debug)]
pub(super) struct OrphanFacts {
    /// A terminating signal was sent to it, and it ignores or blocks it.
    pub ignored: bool,
    pub detached: bool,
    /// None: nobody saw it end.
    pub exit: Option<Exit>,
}

pub(super) fn verdict_of(f: &OrphanFacts) -> Verdict {
    match &f.exit {
        _ if f.ignored => Verdict::IgnoredSignal,
        _ if f.detached => Verdict::Daemonized,
        Some(Exit::Signal { .. }) => Verdict::ParentKilled,
        Some(Exit::Code { .. }) => Verdict::ParentExited,
        None => Verdict::Unknown,
    }
}

impl Family<'_> {
    pub(super) fn orphan(&self, stat: &Stat) -> CauseDraft {
        let me = &self.q.subject;
        let status = self.proc.status(stat.pid).unwrap_or_default();
        let keys = self.ancestors(me.id);
        let ancestors: Vec<&Process> = keys.iter().map_while(|k| self.q.process(*k)).collect();
        let parent = ancestors.first().copied();
        let survived = self.signals_to(me.id, meant_to_end);
        let defied = survived.iter().copied().find(|s| match self.signal(s) {
            Evidence::Signal { outcome, .. } => {
                matches!(outcome, SignalOutcome::Ignored | SignalOutcome::Blocked)
            }
            _ => false,
        });
        let facts = OrphanFacts {
            ignored: defied.is_some(),
            detached: daemonized(me, stat.session as u32, &ancestors),
            exit: parent.filter(|p| p.state != State::Running).and_then(|p| p.exit.clone()),
        };
        let v = verdict_of(&facts);
        let mut told = CauseDraft::new(v);
        let who = short(&self.name_of(stat));
        let adopter = me.adopter.clone().or_else(|| self.name(stat.ppid));
        let by = adopter.map_or_else(String::new, |a| format!(", adopted by {}", short(&a)));
        let since =
            parent.and_then(|p| self.dead_for(p.id)).map_or_else(String::new, |s| format!(" for {}", ago(s)));
        told.lines.push(format!("{who} has been an orphan{since}{by}: {}", self.how(&facts, parent)));
        if let Some(p) = parent {
            told.evidence.extend(self.death(p.id));
        }
        for s in &survived {
            told.evidence.push(self.signal(s));
        }
        match v {
            Verdict::IgnoredSignal => {
                if let Some(s) = defied {
                    let name = signal::name(s.signal);
                    let from = s.sender.as_ref().map_or_else(String::new, |s| format!(" from {}", short(s)));
                    told.lines.push(format!(
                        "{name}{from} was sent to it, and it {} it.",
                        defies(&status, s.signal)
                    ));
                }
            }
            Verdict::Daemonized => told.lines.push(
                "It detached on purpose: a session of its own, and a parent that exited with 0.".into(),
            ),
            Verdict::ParentKilled => self.who_else(parent, stat, &mut told),
            _ => {}
        }
        self.waiters(stat, &mut told);
        told.remedy = match (v, me.job) {
            (Verdict::Daemonized, _) => {
                format!("It may be meant to live on. If not: jobwarden kill {}", me.id)
            }
            (Verdict::IgnoredSignal, _) => format!("jobwarden kill {} --grace 0s", me.id),
            _ => format!("jobwarden kill {}", me.id),
        };
        told
    }

    fn how(&self, f: &OrphanFacts, parent: Option<&Process>) -> String {
        let Some(p) = parent else {
            return "it was one before jobwarden started; its parent is unknown".into();
        };
        let name = short(&p.to_ref());
        match &f.exit {
            Some(Exit::Code { code }) => format!("its parent {name} exited with {code}"),
            Some(Exit::Signal { signal, .. }) => {
                let by = self.killed_by(p.id).map_or_else(String::new, |(_, by)| by);
                format!("its parent {name} was ended by {signal}{by}")
            }
            None => format!("how its parent {name} ended was not seen"),
        }
    }

    /// Who of the family got the signal that ended the parent, and who did not.
    fn who_else(&self, parent: Option<&Process>, stat: &Stat, told: &mut CauseDraft) {
        let Some((name, by)) = parent.and_then(|p| self.killed_by(p.id)) else { return };
        let me = &self.q.subject;
        let got = |p: &Process| !self.signals_to(p.id, |s| signal::name(s.signal) == name).is_empty();
        let who = short(&self.name_of(stat));
        match parent.and_then(|p| self.sent_too(p.id, me.id, &name)) {
            Some(true) => {
                let how = signal::parse(&name).map_or_else(|_| String::new(), |n| self.lives_on(me.id, n));
                told.lines.push(format!("{who} got {name} too and lives on{how}."));
            }
            Some(false) => {
                told.lines.push(format!("{name}{by} was not sent to {who}."));
                told.evidence.push(note(format!("{name} was not seen to be sent to {who}")));
            }
            None => {
                told.lines.push(format!("Whether {name} was sent to {who} too is not known."));
                told.evidence.push(note(format!("the {name} that ended its parent was not seen")));
                return;
            }
        }
        // Those above it sent the signal, or were not meant by it.
        let above = self.ancestors(me.id);
        let siblings = self.q.family.iter().filter(|p| p.id != me.id && !above.contains(&p.id));
        let siblings = siblings.filter(|p| !me.jobs.is_empty() && p.jobs.iter().any(|j| me.jobs.contains(j)));
        let (with, without): (Vec<_>, Vec<_>) = siblings.partition(|p| got(p));
        for p in with.into_iter().take(OTHERS) {
            told.evidence.extend(
                self.signals_to(p.id, |s| signal::name(s.signal) == name).into_iter().map(|s| self.signal(s)),
            );
        }
        let missed: Vec<String> =
            without.iter().filter(|p| self.alive(p.id)).take(OTHERS).map(|p| short(&p.to_ref())).collect();
        if !missed.is_empty() {
            told.evidence.push(note(format!("of the same job and without {name}: {}", missed.join(", "))));
        }
    }

    /// Who waits for the orphan to close a pipe or socket.
    fn waiters(&self, stat: &Stat, told: &mut CauseDraft) {
        let Ok(fds) = self.proc.fds(stat.pid) else { return };
        let mut ends: Vec<End> = Vec::new();
        for fd in fds {
            let info = self.proc.fdinfo(stat.pid, fd).unwrap_or_default();
            let want = if info.writable() { Want::Write } else { Want::Read };
            ends.extend(self.end(stat.pid, fd, want).filter(|e| e.kind.may_be_pipe()));
            if ends.len() == PIPES {
                break;
            }
        }
        let mut refs: Vec<&mut End> = ends.iter_mut().collect();
        let mut unread = Vec::new();
        super::ends::attach(self, stat, self.q.subject.id, &mut refs, &mut unread);
        let mut asked: Vec<u32> = Vec::new();
        let mut waiters: Vec<Waiter> = Vec::new();
        for end in &ends {
            for h in &end.holders {
                if asked.contains(&h.who.pid) || asked.len() == WAITERS || self.late() {
                    continue;
                }
                asked.push(h.who.pid);
                if let Ok(look) = self.look(h.who.pid, self.q.subject.id) {
                    waiters.extend(self.waiter(stat, &ends, &look));
                }
            }
        }
        // Who reads this one file is stuck; who watches a set may be a log collector at its work.
        waiters.sort_by_key(|w| !w.direct);
        for w in waiters {
            told.lines.push(w.line);
            told.evidence.extend(w.evidence);
        }
        told.evidence.extend(unread.into_iter().map(|u| note(format!("could not be read: {u}"))));
    }

    fn waiter(&self, orphan: &Stat, ends: &[End], look: &Look) -> Option<Waiter> {
        look.threads.iter().find_map(|t| {
            let Doing::Files { ends: waits, direct } = &t.doing else { return None };
            let on_it = |w: &&End| w.holders.iter().any(|h| h.who.pid == orphan.pid);
            let w = verdict::pipes(waits).find(on_it)?;
            let held = w.holders.iter().find(|h| h.who.pid == orphan.pid)?;
            let call = t.syscall.clone().unwrap_or_default();
            let line = format!("{} waits for it in {call} on fd {} ({}).", short(&look.who), w.fd, w.link);
            let mine = ends.iter().find(|e| e.fd == held.fd).map_or(&w.link, |e| &e.link);
            let evidence = [
                Evidence::Blocked {
                    process: Some(look.who.clone()),
                    thread: t.tid,
                    syscall: call,
                    fd: Some(w.fd),
                    inode: Some(w.link.text()),
                },
                Evidence::Holder {
                    process: self.name_of(orphan),
                    fd: held.fd,
                    mode: held.mode.to_owned(),
                    inode: mine.text(),
                    relation: "this orphan".into(),
                },
            ];
            Some(Waiter { direct: *direct, line, evidence })
        })
    }
}

/// Somebody who waits for the orphan to close its end.
struct Waiter {
    /// For this file only.
    direct: bool,
    line: String,
    evidence: [Evidence; 2],
}

fn defies(s: &Status, signal: u8) -> &'static str {
    if s.blocked & bit(signal) != 0 { "blocks" } else { "ignores" }
}
