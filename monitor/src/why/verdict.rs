//! From facts to a verdict, in the contract's order. Pure: no clock, no file.

use super::ends::{self, End};
use super::family::Closeness;
use super::look::{Doing, Init, Look, Thread};
use crate::contract::Verdict;

/// A thread that had the CPU for at least this share of the time between two looks is busy, whatever it was doing at
/// the moment of the looks.
const BUSY: f64 = 0.5;

/// What is known of a zombie and of who should reap it.
#[derive(Debug)]
pub(super) struct ZombieFacts {
    /// It, or one of its dead threads, is traced by a process other than its parent.
    pub foreign_tracer: bool,
    /// Its parent did not fork it; None: the lineage is unknown.
    pub adopted: Option<bool>,
    /// Seconds.
    pub age: f64,
    /// Still there after the last look.
    pub there: bool,
    /// None: it could not be looked at.
    pub parent: Option<Look>,
}

/// The host's init reaps what it adopts in its own time: seconds where it is a simple one.
const INIT_TAKES: f64 = 5.0;

/// The verdict, and the index of the parent's thread that it rests on.
pub(super) fn zombie(f: &ZombieFacts) -> (Verdict, Option<usize>) {
    if f.foreign_tracer {
        return (Verdict::HeldByTracer, None);
    }
    if !f.there {
        return (Verdict::BeingReaped, None);
    }
    let Some(p) = &f.parent else { return (Verdict::Unknown, None) };
    let Some(main) = p.main() else { return (Verdict::Unknown, None) };
    match main.state {
        b'T' => return (Verdict::ParentStopped, Some(0)),
        b't' => return (Verdict::ParentTraced, Some(0)),
        _ => {}
    }
    if let Some(i) = uninterruptible(p) {
        return (Verdict::ParentUninterruptible, Some(i));
    }
    let pipe = on_pipe(p);
    let other = for_other_child(p);
    if let Some(v) = init(f, p, pipe.or(other)) {
        return (v, Some(0));
    }
    if pipe.is_some() {
        return (Verdict::ParentBlockedOnPipe, pipe);
    }
    if other.is_some() {
        return (Verdict::ParentWaitingForOtherChild, other);
    }
    rest(p, main)
}

fn rest(p: &Look, main: &Thread) -> (Verdict, Option<usize>) {
    if let Some(i) = p.threads.iter().position(|t| matches!(t.doing, Doing::AnyChild)) {
        return (Verdict::BeingReaped, Some(i));
    }
    let busy = |t: &Thread| t.cpu.is_some_and(|c| c >= BUSY);
    if busy(main) || matches!(main.doing, Doing::Running) || main.state == b'R' {
        return (Verdict::ParentBusy, Some(0));
    }
    if matches!(main.state, b'S' | b'I') && main.syscall.is_some() {
        return (Verdict::ParentBlocked, Some(0));
    }
    p.threads.iter().position(busy).map_or((Verdict::Unknown, None), |i| (Verdict::ParentBusy, Some(i)))
}

/// `D` at both looks without having woken. Another thread's counts where the main one waits for it.
fn uninterruptible(p: &Look) -> Option<usize> {
    let stuck = |t: &Thread| t.state == b'D' && t.slept;
    let main_waits = p.main().is_some_and(|t| matches!(t.doing, Doing::Futex));
    p.threads.iter().position(stuck).filter(|&i| i == 0 || main_waits)
}

/// An init that does not reap what it adopted. What it forked itself may have a nearer cause, `nearer`.
fn init(f: &ZombieFacts, p: &Look, nearer: Option<usize>) -> Option<Verdict> {
    let init = p.init?;
    let main = p.main()?;
    if matches!(main.doing, Doing::AnyChild) {
        return None;
    }
    if f.adopted != Some(true) && nearer.is_some() {
        return None;
    }
    if init == Init::Host && f.age < INIT_TAKES {
        return Some(Verdict::BeingReaped);
    }
    Some(Verdict::InitNotReaping)
}

/// The thread that a pipe, FIFO, socket pair or terminal blocks. The main thread counts whoever holds the other end, if it
/// waits for this one file; a set, or another thread, counts only if a relative of the zombie holds one: event loops
/// and thread pools watch pipes all their life.
pub(super) fn on_pipe(p: &Look) -> Option<usize> {
    let score = |(i, t): (usize, &Thread)| {
        let Doing::Files { ends, direct, .. } = &t.doing else { return None };
        let nearest = ends::nearest(ends);
        let held = nearest.is_some() || ends.iter().any(|e| e.kind.is_pipe() && e.own.is_some());
        let near = nearest.unwrap_or(Closeness::None);
        let needed = match (i, direct) {
            (0, true) => Closeness::None,
            (0, false) => Closeness::SameSession,
            _ => Closeness::OfBlocked,
        };
        (held && near >= needed).then_some((near, *direct, std::cmp::Reverse(i)))
    };
    let best = p.threads.iter().enumerate().filter_map(score).max();
    best.map(|(.., i)| i.0)
}

/// The ends of a thread's wait that only others can end.
pub(super) fn pipes(ends: &[End]) -> impl Iterator<Item = &End> {
    ends.iter().filter(|e| e.kind.is_pipe() && (!e.holders.is_empty() || e.own.is_some()))
}

fn for_other_child(p: &Look) -> Option<usize> {
    let waits = |t: &Thread| matches!(&t.doing, Doing::OtherChild(c) if !c.is_empty());
    let main_joins = p.main().is_some_and(|t| matches!(t.doing, Doing::Futex));
    p.threads.iter().position(waits).filter(|&i| i == 0 || main_joins)
}

/// Whether a second look is needed: what sleeps for an instant and what is stuck look alike at one.
pub(super) const fn needs_second_look(v: Verdict) -> bool {
    matches!(
        v,
        Verdict::ParentBlocked
            | Verdict::ParentBusy
            | Verdict::BeingReaped
            | Verdict::InitNotReaping
            | Verdict::Unknown
    )
}
