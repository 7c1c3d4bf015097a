use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::model::event::Event;

/// One step of a random host; the number picks among whoever can do it.
#[derive(Clone, Debug)]
enum Step {
    Fork(usize),
    CloneParent(usize),
    Exec(usize),
    Subreaper(usize),
    LeaderExit(usize),
    Exit(usize),
    Notify(usize),
    Reap(usize),
    /// A pid that was free is taken again.
    Reuse(usize, usize),
    Drain,
    Pass(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let n = 0..1_000_usize;
    prop_oneof![
        8 => n.clone().prop_map(Step::Fork),
        1 => n.clone().prop_map(Step::CloneParent),
        2 => n.clone().prop_map(Step::Exec),
        1 => n.clone().prop_map(Step::Subreaper),
        1 => n.clone().prop_map(Step::LeaderExit),
        4 => n.clone().prop_map(Step::Exit),
        4 => n.clone().prop_map(Step::Notify),
        4 => n.clone().prop_map(Step::Reap),
        1 => (n.clone(), n).prop_map(|(a, b)| Step::Reuse(a, b)),
        2 => Just(Step::Drain),
        1 => (1..2_000_000_000_u64).prop_map(Step::Pass),
    ]
}

fn pick(w: &World, n: usize, f: impl Fn(State) -> bool) -> Option<u32> {
    let all: Vec<u32> =
        w.sim.procs.values().filter(|p| p.key.pid != 1 && f(p.state)).map(|p| p.key.pid).collect();
    if all.is_empty() { None } else { Some(all[n % all.len()]) }
}

fn run(w: &mut World, s: &Step, freed: &mut Vec<u32>) {
    let lives = |s| matches!(s, State::Running | State::LeaderExited);
    match *s {
        Step::Fork(n) => {
            let by = pick(w, n, lives).filter(|_| n % 3 != 0).unwrap_or(1);
            w.sim.fork(by);
        }
        Step::CloneParent(n) => {
            // Whose parent is dying does not clone for it here: the kernel gives such a child to the adopter.
            let by = pick(w, n, lives).filter(|b| {
                let parent = w.sim.procs[b].parent;
                w.sim.procs.get(&parent).is_some_and(|p| lives(p.state))
            });
            if let Some(by) = by {
                let pid = 50_000 + w.sim.procs.len() as u32 * 7 + n as u32 * 1_000;
                if !w.sim.procs.contains_key(&pid) {
                    w.sim.fork_as(by, pid, true);
                }
            }
        }
        Step::Exec(n) => {
            if let Some(p) = pick(w, n, lives) {
                w.sim.exec(p, "/bin/some thing");
            }
        }
        Step::Subreaper(n) => {
            if let Some(p) = pick(w, n, lives) {
                w.sim.procs.get_mut(&p).unwrap().subreaper = true;
            }
        }
        Step::LeaderExit(n) => {
            if let Some(p) = pick(w, n, |s| s == State::Running) {
                w.sim.leader_exit(p);
            }
        }
        Step::Exit(n) => {
            if let Some(p) = pick(w, n, lives) {
                w.sim.exit(p, (n as i32 % 3) << 8);
            }
        }
        Step::Notify(n) => {
            if let Some(p) = pick(w, n, |s| s == State::Exiting) {
                w.sim.notify(p);
            }
        }
        Step::Reap(n) => {
            if let Some(p) = pick(w, n, |s| s == State::Zombie) {
                w.sim.reap(p);
                freed.push(p);
            }
        }
        Step::Reuse(n, m) => {
            if let Some(pid) = freed.get(n % freed.len().max(1)).copied()
                && !w.sim.procs.contains_key(&pid)
            {
                let by = pick(w, m, lives).unwrap_or(1);
                w.sim.fork_as(by, pid, false);
            }
        }
        Step::Drain => w.drain(),
        Step::Pass(ns) => w.pass(ns),
    }
}

/// Everybody alive, as (state, parent, lineage parent if known, orphan).
type Truth = BTreeMap<Key, (State, Option<u32>, Option<Key>, bool)>;

fn forest(w: &World) -> Truth {
    let t = w.e.tree(&TreeQuery { all: true, ..TreeQuery::default() }, w.sim.now).unwrap();
    let alive = t.processes.into_iter().filter(|p| p.state != State::Gone);
    alive.map(|p| (p.id, (p.state, p.ppid, p.lineage_parent, p.orphan))).collect()
}

fn oracle(w: &World) -> Truth {
    let one = |p: &sim::P| {
        let lives = matches!(p.state, State::Running | State::LeaderExited);
        let birth = w.sim.procs.get(&p.birth.pid).filter(|b| b.key == p.birth);
        let orphan = lives
            && p.key.pid != 1
            && birth.is_none_or(|b| !matches!(b.state, State::Running | State::LeaderExited));
        (p.key, (p.state, Some(p.parent), p.lineage, orphan))
    };
    w.sim.procs.values().map(one).collect()
}

/// What differs, so that a failure can be read.
fn differences(f: &Truth, o: &Truth) -> Vec<String> {
    let keys: std::collections::BTreeSet<&Key> = f.keys().chain(o.keys()).collect();
    let differ = keys.into_iter().filter(|k| f.get(k) != o.get(k));
    differ.map(|k| format!("{k}: forest {:?}, kernel {:?}", f.get(k), o.get(k))).collect()
}

/// Chains of dead are bounded, nobody is kept for nothing, numbers add up.
fn sound(w: &World) {
    let t = w.e.tree(&TreeQuery { all: true, ..TreeQuery::default() }, w.sim.now).unwrap();
    let by: BTreeMap<Key, &Process> = t.processes.iter().map(|p| (p.id, p)).collect();
    for p in &t.processes {
        assert!(p.state != State::Gone || !p.children.is_empty(), "{p:?} is kept for nothing");
        let mut dead = 0;
        let mut at = p.lineage_parent;
        while let Some(a) = at.and_then(|k| by.get(&k)).filter(|a| a.state == State::Gone) {
            dead += 1;
            at = a.lineage_parent;
        }
        assert!(dead <= 64, "{dead} dead in a row");
    }
    let g = w.e.gauges(w.sim.now);
    for (label, s) in [("running", State::Running), ("zombie", State::Zombie), ("exiting", State::Exiting)] {
        assert_eq!(g.processes[label], t.processes.iter().filter(|p| p.state == s).count() as u64);
    }
    let orphans = t.processes.iter().filter(|p| p.orphan).count() as u64;
    assert_eq!(g.jobs.values().map(|j| j.orphans).sum::<u64>(), orphans);
}

/// So many, or as many as `PROPTEST_CASES` says.
fn cases(n: u32) -> ProptestConfig {
    let told = ProptestConfig::default();
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { told.cases } else { n };
    ProptestConfig { cases, failure_persistence: None, max_shrink_iters: 20_000, ..told }
}

proptest! {
    #![proptest_config(cases(150))]

    /// With every record handed over and /proc answering, the forest is the kernel's truth.
    #[test]
    fn equals_the_kernel(steps in proptest::collection::vec(step(), 1..150)) {
        let mut w = World::new("");
        let mut freed = Vec::new();
        for s in &steps {
            run(&mut w, s, &mut freed);
        }
        w.pass(3 * S);
        prop_assert_eq!(differences(&forest(&w), &oracle(&w)), Vec::<String>::new());
        sound(&w);
    }

    /// Any part of a stream lost, then a snapshot: the truth again, lineage from the kernel's map.
    #[test]
    fn loss_is_mended_by_a_snapshot(
        steps in proptest::collection::vec(step(), 1..150),
        from in 0..150_usize,
        len in 0..150_usize,
        after in proptest::collection::vec(step(), 0..40),
    ) {
        let mut w = World::new("");
        let mut freed = Vec::new();
        for (i, s) in steps.iter().enumerate() {
            if (from..from + len).contains(&i) {
                if !matches!(s, Step::Drain | Step::Pass(_)) {
                    w.drain();
                    run(&mut w, s, &mut freed);
                    w.sim.ring.clear();
                }
            } else {
                run(&mut w, s, &mut freed);
            }
        }
        w.e.handle(Input::SnapshotStarted { t0: w.sim.now }, w.sim.now, &mut Output::default());
        let rows = w.sim.snapshot(true);
        // What happens while it is taken is handed over before the merge.
        for s in &after {
            run(&mut w, s, &mut freed);
        }
        w.drain();
        w.merge(rows);
        w.pass(3 * S);
        let (f, mut o) = (forest(&w), oracle(&w));
        // A CLONE_PARENT child's birth parent stands in no map: if its fork record was lost, whether that one died is open.
        let open = |k: &Key| w.sim.procs.get(&k.pid).is_some_and(|p| p.lineage != Some(p.birth));
        for (k, v) in o.iter_mut().filter(|(k, _)| open(k)) {
            if let Some(x) = f.get(k) {
                v.3 = x.3;
            }
        }
        prop_assert_eq!(differences(&f, &o), Vec::<String>::new());
        sound(&w);
    }

    /// Records are handled at least once: twice is the same, in whole and event by event.
    #[test]
    fn twice_is_once(steps in proptest::collection::vec(step(), 1..120)) {
        let mut w = World::new("");
        let mut freed = Vec::new();
        let mut all: Vec<Event<'static>> = Vec::new();
        for s in steps.iter().filter(|s| !matches!(s, Step::Drain | Step::Pass(_))) {
            run(&mut w, s, &mut freed);
            all.append(&mut w.sim.ring);
        }
        let twice: Vec<Event<'static>> = all.iter().flat_map(|e| [*e, *e]).collect();
        let mut seen = Vec::new();
        for streams in [vec![&all], vec![&all, &all], vec![&twice]] {
            let mut x = World::new("");
            std::mem::swap(&mut x.sim, &mut w.sim);
            for s in streams {
                x.sim.ring.clone_from(s);
                x.drain();
            }
            x.pass(3 * S);
            sound(&x);
            seen.push(forest(&x));
            std::mem::swap(&mut x.sim, &mut w.sim);
        }
        for s in &seen {
            prop_assert_eq!(differences(s, &oracle(&w)), Vec::<String>::new());
        }
    }
}
