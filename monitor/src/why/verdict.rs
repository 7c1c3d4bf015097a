//! From facts to a verdict, in the contract's order. Pure: no clock, no file.

use super::ends::{self, End};
use super::family::Closeness;
use super::look::{Doing, Init, Look, Thread};
use crate::model::schema::Verdict;

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
        // A wait that would take this child would have woken: it was started with __WCLONE, __WNOTHREAD, ..
        let deaf = p.threads.get(i).is_some_and(|t| t.slept);
        return (if deaf { Verdict::ParentBlocked } else { Verdict::BeingReaped }, Some(i));
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

#[cfg(test)]
mod tests {
    use super::super::ends::{Holder, Kind, Want};
    use super::super::family::Relation;
    use super::*;
    use crate::model::event::Comm;
    use crate::model::key::Key;
    use crate::model::schema::Ref;
    use crate::sources::proc::{FdLink, Stat, Status};

    fn name(pid: u32) -> Ref {
        Ref { id: Key::new(pid, 1), pid, comm: "x".into(), argv: Vec::new() }
    }

    fn thread(tid: u32, state: u8, doing: Doing) -> Thread {
        let syscall = Some("call".to_owned());
        Thread {
            tid,
            state,
            wchan: None,
            switches: 0,
            cpu_ns: 0,
            syscall,
            path: None,
            doing,
            cpu: None,
            slept: true,
        }
    }

    fn files(direct: bool, kind: Kind, closeness: &[Closeness]) -> Doing {
        let relation = |closeness| Relation {
            closeness,
            orphan: true,
            parent: None,
            adopter: None,
            job: None,
            ancestors: vec![],
        };
        let holder = |c| Holder { who: name(9), fd: 2, mode: "w", inode: "".into(), relation: relation(c) };
        let holders = closeness.iter().map(|c| holder(*c)).collect();
        let link = FdLink::Pipe(1);
        Doing::Files {
            ends: vec![End { fd: 4, want: Want::Read, link, kind, holders, own: None, mount: None }],
            direct,
        }
    }

    fn facts(threads: Vec<Thread>, init: Option<Init>) -> ZombieFacts {
        let stat = Stat {
            pid: 7,
            comm: Comm::default(),
            state: b'S',
            ppid: 1,
            pgrp: 7,
            session: 7,
            tty: 0,
            flags: 0,
            cpu_ticks: 0,
            threads: 1,
            start_ticks: 1,
        };
        let parent = Look {
            who: name(7),
            stat,
            tracer: None,
            init,
            status: Status::default(),
            threads,
            unread: vec![],
        };
        ZombieFacts {
            foreign_tracer: false,
            adopted: Some(false),
            age: 60.0,
            there: true,
            parent: Some(parent),
        }
    }

    /// Facts to verdict, in the contract's order.
    #[test]
    fn the_table() {
        use Closeness as C;
        use Verdict as V;
        let pipe = |c: &[C]| files(true, Kind::Pipe, c);
        let set = |c: &[C]| files(false, Kind::Pipe, c);
        let child = || Doing::OtherChild(vec![name(8)]);
        let one = |state, doing| facts(vec![thread(7, state, doing)], None);
        let two = |main, other| facts(vec![thread(7, b'S', main), thread(8, b'S', other)], None);
        let table = [
            ("stopped in a read", one(b'T', pipe(&[C::OfZombie])), V::ParentStopped),
            ("traced in a read", one(b't', pipe(&[C::OfZombie])), V::ParentTraced),
            ("D in a file", one(b'D', files(true, Kind::Other, &[])), V::ParentUninterruptible),
            ("read, a stranger writes", one(b'S', pipe(&[C::None])), V::ParentBlockedOnPipe),
            ("read, nobody writes", one(b'S', pipe(&[])), V::ParentBlocked),
            ("read of a plain file", one(b'S', files(true, Kind::Other, &[])), V::ParentBlocked),
            (
                "read of a server's socket",
                one(b'S', files(true, Kind::Socket(Some(1)), &[C::None])),
                V::ParentBlocked,
            ),
            ("event loop with a stranger's pipe", one(b'S', set(&[C::None])), V::ParentBlocked),
            ("event loop with the orphan's pipe", one(b'S', set(&[C::OrphanOfJob])), V::ParentBlockedOnPipe),
            ("another thread, stranger's pipe", two(Doing::Futex, pipe(&[C::None])), V::ParentBlocked),
            (
                "another thread, the orphan's pipe",
                two(Doing::Futex, pipe(&[C::OfZombie])),
                V::ParentBlockedOnPipe,
            ),
            ("waits for another child", one(b'S', child()), V::ParentWaitingForOtherChild),
            (
                "another thread does, the main one joins",
                two(Doing::Futex, child()),
                V::ParentWaitingForOtherChild,
            ),
            ("another thread does, the main one sleeps", two(Doing::Sleep, child()), V::ParentBlocked),
            ("waits for one that it does not have", one(b'S', Doing::OtherChild(vec![])), V::ParentBlocked),
            ("running", one(b'R', Doing::Running), V::ParentBusy),
            ("sleeps", one(b'S', Doing::Sleep), V::ParentBlocked),
        ];
        for (what, facts, want) in table {
            assert_eq!(zombie(&facts).0, want, "{what}");
        }
    }

    #[test]
    fn what_comes_before_the_parents_own_state() {
        let blocked = || facts(vec![thread(7, b'S', files(true, Kind::Pipe, &[Closeness::OfZombie]))], None);
        let mut held = blocked();
        (held.foreign_tracer, held.there) = (true, false);
        assert_eq!(zombie(&held).0, Verdict::HeldByTracer);
        let mut gone = blocked();
        gone.there = false;
        assert_eq!(zombie(&gone).0, Verdict::BeingReaped);
        gone.there = true;
        gone.parent = None;
        assert_eq!(zombie(&gone).0, Verdict::Unknown);
        assert_eq!(zombie(&facts(vec![], None)).0, Verdict::Unknown);
    }

    #[test]
    fn an_init_and_whose_zombie_it_is() {
        let of = |adopted, age, doing, init| {
            let mut f = facts(vec![thread(1, b'S', doing)], Some(init));
            (f.adopted, f.age) = (adopted, age);
            zombie(&f).0
        };
        let pipe = || files(true, Kind::Pipe, &[Closeness::OfZombie]);
        assert_eq!(of(Some(true), 60.0, pipe(), Init::Namespace), Verdict::InitNotReaping);
        assert_eq!(of(Some(false), 60.0, pipe(), Init::Namespace), Verdict::ParentBlockedOnPipe);
        assert_eq!(of(None, 60.0, pipe(), Init::Namespace), Verdict::ParentBlockedOnPipe);
        assert_eq!(of(None, 60.0, Doing::Sleep, Init::Namespace), Verdict::InitNotReaping);
        assert_eq!(of(Some(true), 1.0, Doing::Sleep, Init::Host), Verdict::BeingReaped);
        assert_eq!(of(Some(true), 60.0, Doing::Sleep, Init::Host), Verdict::InitNotReaping);
        assert_eq!(of(Some(true), 0.1, Doing::Sleep, Init::Namespace), Verdict::InitNotReaping);
    }

    #[test]
    fn between_two_looks() {
        let of = |t: Thread| zombie(&facts(vec![t], None)).0;
        let t = |state, doing, cpu, slept| Thread { cpu: Some(cpu), slept, ..thread(7, state, doing) };
        // In state D at both, but it woke in between: it is at work.
        assert_eq!(of(t(b'D', Doing::Other, 0.9, false)), Verdict::ParentBusy);
        // Seen in a sleep of a moment, at work for the rest of the time.
        assert_eq!(of(t(b'S', Doing::Sleep, 0.8, false)), Verdict::ParentBusy);
        // About to take the child; or it never woke for it.
        assert_eq!(of(t(b'S', Doing::AnyChild, 0.0, false)), Verdict::BeingReaped);
        assert_eq!(of(t(b'S', Doing::AnyChild, 0.0, true)), Verdict::ParentBlocked);
    }
}
