use super::*;
use crate::engine::forest::{Seen, Snapshot};
use crate::model::event::{Body, Event, WaitStatus};
use crate::model::schema::{Exit, LineageKnown};

#[test]
fn a_short_life_leaves_nothing() {
    let mut w = World::new("");
    let a = w.sim.spawn(1, "/bin/true");
    let key = w.sim.key(a);
    w.drain();
    let p = w.process(key).unwrap();
    assert_eq!((p.state, p.comm.raw(), p.argv), (State::Running, "true", vec!["/bin/true".into()]));
    assert_eq!((p.lineage_parent, p.lineage, p.ppid), (Some(Key::new(1, 1)), LineageKnown::Known, Some(1)));
    w.sim.end(a, 0);
    let looks = w.looks;
    w.drain();
    assert_eq!(w.process(key), None);
    assert_eq!(w.e.current(a), None);
    w.pass(S);
    assert_eq!(w.looks, looks, "a reap that comes first spares the look");
    assert!(w.e.next_wake().is_none());
}

#[test]
fn a_start_reads_the_same_until_the_wall_clock_is_set() {
    let mut w = World::new("");
    let a = w.sim.spawn(1, "/bin/true");
    w.drain();
    let started = |w: &World| w.process(w.sim.key(a)).unwrap().started;
    w.e.handle(Input::Clock { boot_to_wall_ns: 1_000_000_000_000 }, 0, &mut Output::default());
    let first = started(&w);
    w.e.handle(Input::Clock { boot_to_wall_ns: 1_000_009_999_999 }, 0, &mut Output::default());
    assert_eq!(started(&w), first);
    w.e.handle(Input::Clock { boot_to_wall_ns: 1_000_010_000_000 }, 0, &mut Output::default());
    assert_ne!(started(&w), first);
}

#[test]
fn exit_then_zombie_then_reaped() {
    let mut w = World::new("");
    let a = w.sim.spawn(1, "/bin/sh");
    let b = w.sim.spawn(a, "/bin/x");
    let key = w.sim.key(b);
    w.sim.exit(b, 3 << 8);
    w.pass(0);
    assert_eq!(w.state(key), Some(State::Exiting));
    w.pass(500_000_000);
    assert_eq!(w.state(key), Some(State::Exiting), "the kernel is not done with it");
    w.sim.notify(b);
    w.pass(S);
    let p = w.process(key).unwrap();
    assert_eq!(
        (p.state, p.exit, p.kernel_state.as_deref()),
        (State::Zombie, Some(Exit::Code { code: 3 }), Some("Z"))
    );
    assert!(p.state_s > 1.4, "a zombie since its exit: {}", p.state_s);
    w.sim.reap(b);
    w.drain();
    assert_eq!(w.process(key), None);
}

#[test]
fn leader_exit_is_no_zombie_and_another_threads_exec_leads_back() {
    let mut w = World::new("[zombies]\nafter = \"1s\"");
    let a = w.sim.spawn(1, "/bin/threads");
    let key = w.sim.key(a);
    w.sim.leader_exit(a);
    w.pass(5 * S);
    assert_eq!(w.state(key), Some(State::LeaderExited));
    assert_eq!(w.changes(), []);
    w.sim.exec(a, "/bin/next");
    w.drain();
    assert_eq!(w.state(key), Some(State::Running));
}

#[test]
fn orphan_with_its_adopter_and_dead_ancestors_kept() {
    let mut w = World::new("");
    let reaper = w.sim.spawn(1, "/bin/shim");
    w.sim.procs.get_mut(&reaper).unwrap().subreaper = true;
    let a = w.sim.spawn(reaper, "/bin/sh");
    let b = w.sim.spawn(a, "/bin/sleep");
    let (ka, kb) = (w.sim.key(a), w.sim.key(b));
    w.sim.signal(reaper, a, 15);
    w.sim.end(a, 15);
    w.pass(S);
    let p = w.process(kb).unwrap();
    assert!(p.orphan);
    assert_eq!(p.adopter.unwrap().pid, reaper);
    assert_eq!((p.ppid, p.lineage_parent), (Some(reaper), Some(ka)));
    let dead = w.process(ka).unwrap();
    assert_eq!((dead.state, dead.ppid, dead.children), (State::Gone, None, vec![kb]));
    let Some(Exit::Signal { signal, sender: Some(s), core: false }) = dead.exit else {
        panic!("{:?}", dead.exit)
    };
    assert_eq!((signal.as_str(), s.pid), ("SIGTERM", reaper));
    // The adopter dies too: a new adopter.
    w.sim.end(reaper, 0);
    w.pass(S);
    assert_eq!(w.process(kb).unwrap().adopter.unwrap().pid, 1);
    w.sim.end(b, 0);
    w.drain();
    assert_eq!(w.e.tree(&TreeQuery { all: true, ..TreeQuery::default() }, 0).unwrap().processes.len(), 1);
}

#[test]
fn clone_parent_orphan_only_when_the_given_parent_dies() {
    let mut w = World::new("");
    let a = w.sim.spawn(1, "/bin/a");
    let b = w.sim.spawn(a, "/bin/b");
    w.sim.fork_as(b, 77, true);
    let key = w.sim.key(77);
    w.drain();
    let p = w.process(key).unwrap();
    assert_eq!((p.lineage_parent, p.ppid, p.orphan), (Some(w.sim.key(b)), Some(a), false));
    w.sim.end(b, 0);
    w.pass(S);
    assert!(!w.process(key).unwrap().orphan, "its forker has no say");
    w.sim.end(a, 0);
    w.pass(S);
    let p = w.process(key).unwrap();
    assert!(p.orphan && p.adopter.is_some_and(|a| a.pid == 1));
}

#[test]
fn a_reused_pid_is_somebody_else() {
    let mut w = World::new("");
    let a = w.sim.spawn(1, "/bin/a");
    let child = w.sim.spawn(a, "/bin/child");
    let old = w.sim.key(a);
    w.drain();
    w.sim.die(a, 0);
    w.drain();
    // The number is free at the reap; the record comes later.
    w.sim.reap(a);
    let late = w.sim.ring.pop().unwrap();
    w.sim.fork_as(1, a, false);
    let new = w.sim.key(a);
    w.drain();
    assert_eq!(w.e.current(a), Some(new));
    assert_eq!(w.state(old), Some(State::Gone), "kept for its child");
    assert_eq!(w.process(w.sim.key(child)).unwrap().lineage_parent, Some(old));
    let mut fx = Output::default();
    w.e.handle(Input::Record { event: &late, bytes: &[] }, 0, &mut fx);
    // Whatever else is said of the dead one.
    for body in
        [Body::Exit { status: WaitStatus(9), comm: sim::comm("x") }, Body::Reap { status: WaitStatus(9) }]
    {
        w.e.handle(
            Input::Record { event: &Event { at: late.at, cpu: 0, process: old, body }, bytes: &[] },
            0,
            &mut fx,
        );
    }
    w.answer(fx);
    assert_eq!(w.state(new), Some(State::Running));
    w.pass(S);
    assert_eq!((w.e.current(a), w.state(new)), (Some(new), Some(State::Running)));
}

#[test]
fn what_ran_before_is_not_guessed() {
    let mut w = World::unsynced("");
    let shell = w.sim.spawn(1, "/bin/sh");
    let job = w.sim.spawn(shell, "/bin/job");
    let lost = w.sim.spawn(job, "/bin/lost");
    w.sim.end(job, 0);
    w.sim.ring.clear();
    w.sync();
    let p = w.process(w.sim.key(lost)).unwrap();
    assert_eq!(
        (p.lineage, p.lineage_parent, p.orphan, p.ppid),
        (LineageKnown::Unknown, None, false, Some(1))
    );
    let child = w.sim.fork(lost);
    w.drain();
    let p = w.process(w.sim.key(child)).unwrap();
    assert_eq!((p.lineage, p.lineage_parent), (LineageKnown::Known, Some(w.sim.key(lost))));
}

#[test]
fn tombstones_keep_the_reaped_away() {
    let mut w = World::new("");
    let a = w.sim.spawn(1, "/bin/a");
    let key = w.sim.key(a);
    w.drain();
    w.e.handle(Input::SnapshotStarted { t0: w.sim.now }, w.sim.now, &mut Output::default());
    let rows = w.sim.snapshot(true);
    let late = w.sim.fork(1);
    w.sim.end(a, 0);
    w.drain();
    let m = w.merge(Snapshot { t0: rows.t0, ..rows });
    assert_eq!((m.tombstoned, m.missing), (1, 0), "{m:?}");
    assert_eq!(w.process(key), None);
    assert!(w.process(w.sim.key(late)).is_some(), "forked behind the cursor");
}

#[test]
fn a_missing_one_goes_only_if_proc_confirms() {
    let mut w = World::new("");
    let a = w.sim.spawn(1, "/bin/a");
    let b = w.sim.spawn(1, "/bin/b");
    w.drain();
    let (ka, kb) = (w.sim.key(a), w.sim.key(b));
    w.sim.end(a, 0);
    w.sim.ring.clear();
    w.sim.pass(S);
    let mut s = w.sim.snapshot(true);
    s.rows.retain(|r| r.key != kb);
    let m = w.merge(s);
    assert_eq!(m.missing, 2);
    assert_eq!((w.state(ka), w.state(kb)), (None, Some(State::Running)));
}

#[test]
fn chains_of_dead_are_folded() {
    let mut w = World::new("");
    let mut at = w.sim.spawn(1, "/bin/bomb");
    for _ in 0..500 {
        let next = w.sim.fork(at);
        w.sim.end(at, 0);
        at = next;
        w.drain();
        w.pass(1_000_000);
    }
    let t = w.e.tree(&TreeQuery { of: Some(at.to_string()), ..TreeQuery::default() }, w.sim.now).unwrap();
    let dead = t.processes.iter().filter(|p| p.state == State::Gone).count();
    assert!((32..=64).contains(&dead), "{dead}");
    assert_eq!(t.processes.iter().map(|p| p.elided as usize).sum::<usize>() + dead, 500);
    // The topmost and the nearest stayed.
    let me = t.processes.iter().find(|p| p.pid == at).unwrap();
    assert_eq!(me.elided, 0);
    w.sim.end(at, 0);
    w.pass(S);
    let t = w.e.tree(&TreeQuery::default(), w.sim.now).unwrap();
    assert_eq!(t.processes.len(), 1);
}

#[test]
fn unknown_ones_are_entered_and_asked_for() {
    let mut w = World::new("");
    let a = w.sim.spawn(1, "/bin/sh");
    let b = w.sim.spawn(a, "/bin/b");
    w.sim.ring.clear();
    w.sim.exec(b, "/bin/c");
    w.drain();
    let p = w.process(w.sim.key(b)).unwrap();
    assert_eq!((p.comm.raw(), p.lineage), ("c", LineageKnown::Unknown));
    // A child of the shell that nobody had heard of: both become known.
    let c = w.sim.spawn(a, "/bin/d");
    w.pass(S);
    assert_eq!(w.process(w.sim.key(c)).unwrap().lineage_parent, Some(w.sim.key(a)));
    assert_eq!(w.process(w.sim.key(a)).unwrap().ppid, Some(1));
    // A reap of somebody unknown changes nothing.
    let mut fx = Output::default();
    let e = Event {
        at: w.sim.now,
        cpu: 0,
        process: Key::new(4000, 5),
        body: Body::Reap { status: WaitStatus(0) },
    };
    w.e.handle(Input::Record { event: &e, bytes: &[] }, 0, &mut fx);
    assert!(fx == Output::default() && w.process(e.process).is_none());
}

#[test]
fn an_old_look_changes_nothing() {
    let mut w = World::new("");
    let a = w.sim.spawn(1, "/bin/a");
    let key = w.sim.key(a);
    let alive = w.sim.seen(key);
    w.sim.die(a, 0);
    w.pass(S);
    assert_eq!(w.state(key), Some(State::Zombie));
    let mut fx = Output::default();
    w.e.handle(
        Input::Observation(Cow::Owned(Observation::Look { key, at: w.sim.now, seen: alive })),
        w.sim.now,
        &mut fx,
    );
    assert_eq!(w.state(key), Some(State::Zombie));
    let o = Observation::Look { key: Key::new(a, 7), at: w.sim.now, seen: Seen::Absent };
    w.e.handle(Input::Observation(Cow::Owned(o)), w.sim.now, &mut fx);
    assert_eq!(w.state(key), Some(State::Zombie));
}

#[test]
fn looks_are_bounded_under_a_flood_of_exits() {
    let mut w = World::new("");
    for _ in 0..5_000 {
        let a = w.sim.fork(1);
        w.sim.die(a, 0);
    }
    w.drain();
    w.pass(900_000_000);
    assert!(w.looks as u64 <= 512 + LOOKS_PER_S, "{}", w.looks);
    w.pass(20 * S);
    let zombies = w.e.gauges(w.sim.now).processes["zombie"];
    assert_eq!(zombies, 5_000, "all have had their turn");
}
