//! Why a zombie is not reaped: looks, verdict, evidence, what to say and what to do.

use std::time::{Duration, Instant};

use super::ends::{End, Holder, Kind};
use super::evidence::{blocked, note, wchan};
use super::family::{Closeness, Family, ago, full, short};
use super::look::{Doing, Look, Thread};
use super::verdict::{self, ZombieFacts};
use super::{CauseDraft, python};
use crate::model::key::Key;
use crate::model::schema::{Evidence, Ref, SignalOutcome, State, Verdict};
use crate::model::signal;
use crate::sources::proc::Stat;

/// Between two looks.
const LOOK: Duration = Duration::from_millis(25);
const SIGCHLD: u64 = 1 << 16;

/// One zombie, and who is in its way.
struct Case {
    name: Ref,
    key: Key,
    /// Who holds it by ptrace, and of which thread.
    tracer: Option<(Ref, u32)>,
    facts: ZombieFacts,
}

impl Family<'_> {
    pub(super) fn zombie(&self, stat: &Stat) -> CauseDraft {
        let mut case = self.case(stat);
        let (mut v, mut thread) = verdict::zombie(&case.facts);
        let uninterruptible =
            |c: &Case| c.facts.parent.as_ref().and_then(Look::main).is_some_and(|t| t.state == b'D');
        if verdict::needs_second_look(v) || uninterruptible(&case) {
            let began = Instant::now();
            std::thread::sleep(LOOK);
            let now = self
                .proc
                .stat(stat.pid)
                .ok()
                .filter(|s| s.start_ticks == stat.start_ticks && s.state == b'Z');
            if let Some(now) = now {
                let mut again = self.case(&now);
                if let (Some(p), Some(e)) = (&mut again.facts.parent, &case.facts.parent) {
                    p.since(e, began.elapsed().as_nanos() as u64);
                }
                case = again;
            } else {
                case.facts.there = false;
            }
            (v, thread) = verdict::zombie(&case.facts);
        }
        self.tell(&case, v, thread)
    }

    fn case(&self, stat: &Stat) -> Case {
        let name = self.name_of(stat);
        let key = name.id;
        let known = self.q.process(key);
        let parent = self.look(stat.ppid, key).ok();
        let tracer = self.tracer_of_dead(stat);
        let facts = ZombieFacts {
            foreign_tracer: tracer.as_ref().is_some_and(|t| t.0.pid != stat.ppid),
            adopted: self.lineage_parent(key).map(|l| parent.as_ref().is_none_or(|p| !self.same(l, &p.stat))),
            age: known.filter(|p| p.state == State::Zombie).map_or(f64::INFINITY, |p| p.state_s),
            there: true,
            parent,
        };
        Case { name, key, tracer, facts }
    }

    /// The tracer of a dead process or of one of its dead threads: its parent cannot reap it until the tracer has.
    fn tracer_of_dead(&self, stat: &Stat) -> Option<(Ref, u32)> {
        let mut tids = self.proc.threads(stat.pid).unwrap_or_default();
        tids.sort_unstable_by_key(|&t| (t != stat.pid, t));
        tids.into_iter().find_map(|tid| {
            let tracer = self.proc.thread_status(stat.pid, tid).ok()?.tracer;
            Some((self.tracer(tracer)?, tid))
        })
    }

    fn tell(&self, case: &Case, v: Verdict, thread: Option<usize>) -> CauseDraft {
        let z = short(&case.name);
        let age =
            if case.facts.age.is_finite() { format!(" for {}", ago(case.facts.age)) } else { String::new() };
        let Some(p) = &case.facts.parent else { return no_parent(case, v) };
        let mut told = CauseDraft::new(v);
        let who = short(&p.who);
        let mut first = |s: String| told.lines.push(format!("{z} has been a zombie{age}: {s}"));
        let t = thread.and_then(|i| p.threads.get(i));
        match v {
            Verdict::HeldByTracer => return self.held_by_tracer(case, told, &z, &age),
            Verdict::BeingReaped if !case.facts.there => {
                told.lines.push(format!("{z} was reaped by {who} while it was looked at"));
                told.remedy = "Nothing is to be done.".into();
            }
            Verdict::BeingReaped => {
                first(format!("its parent {who} is about to reap it"));
                told.remedy = format!("Wait a moment; if it stays: jobwarden why {}", case.key);
            }
            Verdict::ParentStopped => {
                first(format!("its parent {who} is stopped"));
                self.stopped(p, &mut told);
            }
            Verdict::ParentTraced => {
                first(format!("its parent {who} is stopped under a tracer"));
                traced(p, &mut told);
            }
            Verdict::ParentUninterruptible => {
                first(format!("its parent {who} is in uninterruptible sleep"));
                self.uninterruptible(case, p, t, &mut told);
            }
            Verdict::InitNotReaping => {
                first(format!("{who}, the init that should reap it, does not"));
                self.init_not_reaping(case, p, t, &mut told);
            }
            Verdict::ParentBlockedOnPipe => self.on_pipe(case, p, t, &mut told, &age),
            Verdict::ParentWaitingForOtherChild => {
                first(format!("its parent {who} waits for another child"));
                self.other_child(case, p, t, &mut told);
            }
            Verdict::ParentBlocked => self.blocked_otherwise(case, p, t, &mut told, &age),
            Verdict::ParentBusy => {
                let share = t.and_then(|t| t.cpu).map_or_else(String::new, |c| {
                    format!(" ({:.0} % of a CPU over {} ms)", (c * 100.0).min(100.0), LOOK.as_millis())
                });
                first(format!("its parent {who} runs without coming to wait for it{share}"));
                told.evidence.extend(
                    t.map(|t| note(format!("thread {} is in state {}{share}", t.tid, t.state as char))),
                );
                told.remedy = format!(
                    "Find out what {} computes (a profiler, or its log). Its zombie goes when it calls wait(), or with it.",
                    full(&p.who)
                );
            }
            _ => {
                first(format!("what its parent {who} does could not be told"));
                told.remedy = format!("Look again: jobwarden why {}", case.key);
            }
        }
        self.further(case, p, t, &mut told);
        told
    }

    fn held_by_tracer(&self, case: &Case, mut told: CauseDraft, z: &str, age: &str) -> CauseDraft {
        let Some((tracer, tid)) = &case.tracer else { return told };
        let what = if *tid == case.name.pid { "it".into() } else { format!("its dead thread {tid}") };
        told.lines.push(format!(
            "{z} has been a zombie{age}: {} traces {what} and has not waited for it",
            short(tracer)
        ));
        told.lines.push("Its parent cannot reap it before the tracer lets go.".into());
        told.evidence.push(Evidence::Tracer { process: tracer.clone() });
        self.follow(tracer, case.key, &mut vec![case.name.pid], &mut told.evidence);
        told.remedy = format!("jobwarden kill {}", tracer.id);
        told
    }

    fn stopped(&self, p: &Look, told: &mut CauseDraft) {
        if let Some(s) = self.stopped_by(p.who.id) {
            let by = s.sender.as_ref().map_or_else(|| "the kernel".into(), short);
            told.lines.push(format!("{} from {by} stopped it.", signal::name(s.signal)));
            told.evidence.push(self.signal(s));
        } else {
            told.lines.push("Who stopped it was not seen.".into());
            told.evidence.push(note(
                "the stop signal was not seen: it came before jobwarden started, or is forgotten",
            ));
        }
        told.evidence.push(note(format!("{} is in state T (stopped)", short(&p.who))));
        told.remedy = format!("Let {} go on, if the stop is not meant: kill -CONT {}", p.who.id, p.who.pid);
    }

    fn uninterruptible(&self, case: &Case, p: &Look, t: Option<&Thread>, told: &mut CauseDraft) {
        let Some(t) = t else { return };
        told.evidence.extend(blocked(p, t));
        told.evidence.extend(wchan(p, t));
        if let Ok(stack) = self.proc.stack(p.stat.pid, t.tid)
            && !stack.is_empty()
        {
            told.evidence.push(note(format!("kernel stack: {}", stack.join(" < "))));
        }
        told.remedy = "No signal but SIGKILL, and often not even that, reaches it there: what it waits for has to answer \
                       (disk, network file system, driver)."
            .into();
        match &t.doing {
            Doing::Vfork(children) => {
                let mut seen = vec![p.stat.pid];
                let doing = self.follow_children(children, case.key, &mut seen, &mut told.evidence);
                if let Some(c) = children.first() {
                    told.lines.push(format!(
                        "It called vfork and waits until {} execs or exits, {doing}.",
                        short(c)
                    ));
                    told.remedy = format!("jobwarden why {}", c.id);
                }
            }
            Doing::Files { ends, .. } => {
                if let Some(m) = ends.iter().find_map(|e| e.mount.as_ref()) {
                    told.evidence.push(note(format!("the file is on {m}")));
                    told.lines.push(format!("It waits for {m}."));
                }
            }
            _ => {
                if let Some(m) = t.path.as_ref().and_then(|path| self.proc.mount_of(p.stat.pid, path.raw())) {
                    told.evidence
                        .push(note(format!("the path is on {} ({} of {})", m.point, m.fs, m.source)));
                }
            }
        }
        if told.lines.len() < 2 {
            let at = t.wchan.as_deref().unwrap_or("an unknown place");
            let call = t.syscall.as_deref().unwrap_or("no system call");
            let path = t.path.as_ref().map_or_else(String::new, |p| format!(" of {p}"));
            told.lines.push(format!("It sleeps in {call}{path}, at {at}."));
        }
    }

    fn init_not_reaping(&self, case: &Case, p: &Look, t: Option<&Thread>, told: &mut CauseDraft) {
        if let Some(l) = self.lineage_parent(case.key).filter(|_| case.facts.adopted == Some(true)) {
            let by = self.name_key(l).map_or_else(|| l.to_string(), |r| short(&r));
            told.lines.push(format!("It was forked by {by}, which is dead, and adopted."));
            told.evidence.extend(self.death(l));
        }
        if let Some(t) = t {
            told.evidence.extend(blocked(p, t));
            if let Doing::Files { ends, .. } = &t.doing {
                for e in verdict::pipes(ends).take(2) {
                    told.evidence.extend(self.held(p, e));
                }
            }
        }
        told.remedy =
            "Start the container with an init that reaps (docker run --init, podman run --init, tini, \
                       shareProcessNamespace); the zombies that are there go when the container ends."
                .into();
    }

    fn on_pipe(&self, case: &Case, p: &Look, t: Option<&Thread>, told: &mut CauseDraft, age: &str) {
        let Some((t, ends)) = t.and_then(|t| match &t.doing {
            Doing::Files { ends, .. } => Some((t, ends)),
            _ => None,
        }) else {
            return;
        };
        let mut pipes: Vec<&End> = verdict::pipes(ends).collect();
        // The end that the nearest holds is the likeliest cause; it comes first.
        pipes.sort_by_key(|e| std::cmp::Reverse(e.holders.first().map(|h| h.relation.closeness)));
        let Some(end) = pipes.first() else { return };
        let call = t.syscall.as_deref().unwrap_or("a system call");
        told.lines.push(format!(
            "{} has been a zombie{age}: its parent {} is blocked in {call} on fd {} ({}{})",
            short(&case.name),
            short(&p.who),
            end.fd,
            kind_word(end.kind),
            end.link
        ));
        told.evidence.extend(blocked(p, t));
        for e in &pipes {
            told.evidence.extend(self.held(p, e));
        }
        let Some(holder) = end.holders.first() else {
            told.lines.push("It holds the other end itself, so that no end-of-file can come.".into());
            told.remedy = format!(
                "No process but {} holds the other end: it has to close its own copy (fd {}) before it reads.",
                full(&p.who),
                end.own.unwrap_or_default()
            );
            return;
        };
        let more = end.holders.len() - 1;
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let relation = self.relation_words(&holder.relation, &p.who);
        told.lines.push(format!("The other end is held by {} ({relation}){more}.", short(&holder.who)));
        let parent = holder.relation.parent.filter(|_| holder.relation.orphan);
        if let Some(parent) = parent {
            told.evidence.extend(self.death(parent));
            told.lines.extend(self.spared_by_signal(parent, &holder.who, &mut told.evidence));
        }
        let mut seen = vec![p.stat.pid];
        self.follow(&holder.who, case.key, &mut seen, &mut told.evidence);
        told.remedy = remedy_for(&pipes);
    }

    /// Whether the signal that killed the parent reached the child too.
    fn spared_by_signal(&self, parent: Key, child: &Ref, out: &mut Vec<Evidence>) -> Option<String> {
        let (name, by) = self.killed_by(parent)?;
        let dead = self.name_key(parent)?;
        let (dead, who) = (short(&dead), short(child));
        match self.sent_too(parent, child.id, &name) {
            Some(false) => {
                out.push(note(format!("{name} was not seen to be sent to {who}")));
                return Some(format!("{name}{by} ended {dead} and was not sent to {who}."));
            }
            None => {
                out.push(note(format!("the {name} that ended {dead} was not seen")));
                return Some(format!(
                    "{name}{by} ended {dead}; whether it was sent to {who} too is not known."
                ));
            }
            Some(true) => {}
        }
        let got = self.signals_to(child.id, |s| signal::name(s.signal) == name);
        let how = got.last().map_or_else(String::new, |s| match self.signal(s) {
            Evidence::Signal { outcome: SignalOutcome::Ignored, .. } => ": it ignores it".into(),
            Evidence::Signal { outcome: SignalOutcome::Blocked, .. } => ": it blocks it".into(),
            _ => self.lives_on(child.id, s.signal),
        });
        out.extend(got.into_iter().map(|s| self.signal(s)));
        Some(format!("{name}{by} ended {dead}; {who} got it too and lives on{how}."))
    }

    fn other_child(&self, case: &Case, p: &Look, t: Option<&Thread>, told: &mut CauseDraft) {
        let Some((t, children)) = t.and_then(|t| match &t.doing {
            Doing::OtherChild(c) => Some((t, c)),
            _ => None,
        }) else {
            return;
        };
        told.evidence.extend(blocked(p, t));
        let mut seen = vec![p.stat.pid];
        let doing = self.follow_children(children, case.key, &mut seen, &mut told.evidence);
        if let Some(c) = children.first() {
            let call = t.syscall.as_deref().unwrap_or("a system call");
            let more =
                if children.len() > 1 { format!(" or {} more", children.len() - 1) } else { String::new() };
            told.lines.push(format!("It is in {call} for {}{more}, {doing}.", short(c)));
            told.remedy = format!("jobwarden why {}", c.id);
        }
    }

    fn blocked_otherwise(&self, case: &Case, p: &Look, t: Option<&Thread>, told: &mut CauseDraft, age: &str) {
        let (z, who) = (short(&case.name), short(&p.who));
        let Some(t) = t else { return };
        let call = t.syscall.as_deref().unwrap_or("a system call");
        let on = match &t.doing {
            Doing::Futex => format!("waits for a lock or another thread ({call})"),
            Doing::Sleep => format!("sleeps ({call})"),
            Doing::AnyChild => format!("is in {call} but does not take this child"),
            Doing::OtherChild(_) => format!("is in {call} for a child that it does not have"),
            Doing::Files { ends, direct: true, .. } => match ends.first() {
                Some(e) => format!("is blocked in {call} on fd {} ({})", e.fd, e.link),
                None => format!("is blocked in {call}"),
            },
            Doing::Files { .. } => format!("waits for events ({call})"),
            _ => match &t.path {
                Some(path) => format!("is blocked in {call} of {path}"),
                None => format!("is blocked in {call}"),
            },
        };
        told.lines.push(format!("{z} has been a zombie{age}: its parent {who} {on}"));
        told.evidence.extend(blocked(p, t));
        told.evidence.extend(wchan(p, t));
        if let Doing::Files { ends, .. } = &t.doing {
            for e in ends.iter().filter(|e| !e.holders.is_empty()).take(4) {
                told.evidence.extend(self.held(p, e));
            }
        }
        told.remedy = format!(
            "{} has to call wait(): what keeps it from that is in the evidence. Ending it ends its work.",
            full(&p.who)
        );
    }

    /// What may matter whatever the verdict: SIGCHLD, a tracer that does not stop it, what could not be read, frames.
    fn further(&self, case: &Case, p: &Look, t: Option<&Thread>, told: &mut CauseDraft) {
        if told.verdict == Verdict::BeingReaped && !case.facts.there {
            return;
        }
        for (mask, how) in [(p.status.blocked, "blocks"), (p.status.ignored, "ignores")] {
            if mask & SIGCHLD != 0 {
                told.evidence.push(note(format!("{} {how} SIGCHLD", short(&p.who))));
            }
        }
        if let Some(tracer) = p.tracer.as_ref().filter(|_| told.verdict != Verdict::ParentTraced) {
            told.evidence.push(note(format!("{} is traced by {}", short(&p.who), short(tracer))));
        }
        told.evidence.extend(p.unread.iter().take(4).map(|u| note(format!("could not be read: {u}"))));
        let tid = t.or_else(|| p.main()).map(|t| t.tid);
        if let Some(tid) = tid {
            let frames = python::frames(self.proc, p.stat.pid, tid, self.limits.python);
            if let Some(line) = python::where_it_is(&frames) {
                told.python = Some(line);
            }
            // Beside the call that this thread is in, not behind what others do.
            let of_it = |e: &Evidence| matches!(e, Evidence::Blocked { thread, .. } if *thread == tid);
            let at = told.evidence.iter().position(of_it).map_or(told.evidence.len(), |i| i + 1);
            told.evidence.splice(at..at, frames);
        }
    }
}

fn traced(p: &Look, told: &mut CauseDraft) {
    let Some(tracer) = &p.tracer else {
        told.evidence.push(note("its tracer could not be named"));
        told.remedy = "Let the tracer detach or go on.".into();
        return;
    };
    told.lines.push(format!("The tracer is {}.", short(tracer)));
    told.evidence.push(Evidence::Tracer { process: tracer.clone() });
    told.remedy = format!("Let {} go on or detach; or end it: jobwarden kill {}", full(tracer), tracer.id);
}

fn kind_word(k: Kind) -> &'static str {
    match k {
        Kind::Fifo(..) => "FIFO ",
        Kind::SocketPair(_) => "one of a pair, ",
        Kind::Master(_) => "master of a terminal, ",
        Kind::Slave(_) => "terminal ",
        Kind::Pipe | Kind::Socket(_) | Kind::Pidfd(_) | Kind::Other => "",
    }
}

/// Most IDs in one command.
const IDS: usize = 4;

/// The orphans are to be ended: all of the first end's, then those of the other ends of the same wait. What still has its
/// parent is not orphaned and may be doing its work: that is for a person to say.
fn remedy_for(pipes: &[&End]) -> String {
    let Some(first) = pipes.first().and_then(|e| e.holders.first()) else { return String::new() };
    let near = |h: &Holder| {
        h.relation.closeness >= Closeness::OrphanOfJob || h.relation.closeness == first.relation.closeness
    };
    let mut orphans: Vec<&Holder> = Vec::new();
    for h in pipes.iter().flat_map(|e| &e.holders).filter(|h| h.relation.orphan && near(h)) {
        if !orphans.iter().any(|o| o.who.id == h.who.id) {
            orphans.push(h);
        }
    }
    // Ending a process ends what descends from it.
    let ids: Vec<Key> = orphans.iter().map(|h| h.who.id).collect();
    orphans.retain(|h| !h.relation.ancestors.iter().any(|a| ids.contains(a)));
    if orphans.is_empty() {
        let (who, id) = (full(&first.who), first.who.id);
        let state = if first.relation.parent.is_none() {
            "started before jobwarden: whether it is an orphan is not known"
        } else {
            "still has its parent and may be at work"
        };
        return format!("{who} {state}. What it does: jobwarden why {id}. To end it: jobwarden kill {id}");
    }
    if orphans.len() > IDS
        && let Some(job) = orphans.iter().find_map(|h| h.relation.job)
        && orphans.iter().all(|h| h.relation.job == Some(job))
    {
        return format!("jobwarden kill --orphans {job}");
    }
    let commands: Vec<String> =
        orphans.iter().take(IDS).map(|h| format!("jobwarden kill {}", h.who.id)).collect();
    commands.join(" && ")
}

fn no_parent(case: &Case, v: Verdict) -> CauseDraft {
    let z = short(&case.name);
    if v == Verdict::BeingReaped {
        return CauseDraft::plain(
            v,
            format!("{z} was reaped while it was looked at"),
            "Nothing is to be done.".into(),
        );
    }
    let line = format!("{z} is a zombie; its parent could not be looked at");
    CauseDraft::plain(v, line, format!("Look again: jobwarden why {}", case.key))
}
