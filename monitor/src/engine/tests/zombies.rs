use super::*;
use crate::model::schema::{Cause, Severity, Verdict};

const AFTER_5: &str = "[zombies]\nafter = \"5s\"";

#[test]
fn pending_firing_resolved() {
    let mut w = World::new(AFTER_5);
    let worker = w.sim.spawn(1, "/bin/worker");
    let cmd = w.sim.spawn(worker, "/bin/cmd");
    let key = w.sim.key(cmd);
    w.drain();
    w.sim.die(cmd, 0);
    w.pass(900_000_000);
    assert_eq!(w.changes(), []);
    w.pass(S);
    assert_eq!(w.changes(), [(AlertChange::Pending, AlertKind::Zombie)]);
    assert_eq!(w.e.alerts(true)[0].state, AlertState::Pending);
    w.pass(2_900_000_000);
    assert_eq!(w.changes(), [], "not before its time");
    assert_eq!(w.e.gauges(w.sim.now).unreaping_parents, 1, "whether it is an alert yet or not");
    w.pass(500_000_000);
    let told = w.told();
    let [(AlertChange::Fired, a)] = told.as_slice() else { panic!("{told:?}") };
    let subject = a.subject.as_ref().unwrap();
    assert_eq!((subject.pid, a.count, a.severity, a.job), (worker, 1, Severity::Warning, None));
    assert!(a.summary.contains("worker") && a.summary.contains(&key.to_string()), "{}", a.summary);
    assert_eq!(a.labels["alertname"], "JobwardenZombie");
    assert_eq!(
        (&a.labels["alert_id"], a.labels["job_name"].as_str(), a.labels["instance"].as_str()),
        (&a.id, "", "h")
    );
    assert_eq!((a.labels["user"].as_str(), a.id.len()), ("1000", 16));
    assert_eq!(w.e.alert_subject(&a.id), Some(key));
    assert_eq!(w.e.question(key, w.sim.now).unwrap().alert, Some(a.id.clone()));
    assert_eq!(w.e.gauges(w.sim.now).unreaping_parents, 1);
    w.pass(20 * S);
    assert_eq!(w.changes(), [], "it goes on, and nobody is told again");
    // The reap record is late; /proc is what is noticed.
    w.sim.reap(cmd);
    let record = w.sim.ring.pop().unwrap();
    w.pass(900_000_000);
    let told = w.told();
    let [(AlertChange::Resolved, a)] = told.as_slice() else { panic!("{told:?}") };
    assert!(a.summary.contains("was reaped") && a.summary.contains("25 s"), "{}", a.summary);
    assert!(a.resolved_at.is_some());
    w.sim.ring.push(record);
    w.pass(S);
    assert_eq!(w.changes(), []);
    assert_eq!(w.e.gauges(w.sim.now).unreaping_parents, 0);
    assert_eq!(w.e.gauges(w.sim.now).reap_delay.count(), 1);
}

#[test]
fn reaped_before_its_time_is_dropped() {
    let mut w = World::new(AFTER_5);
    let worker = w.sim.spawn(1, "/bin/worker");
    let cmd = w.sim.fork(worker);
    w.sim.die(cmd, 0);
    w.pass(2 * S);
    w.sim.reap(cmd);
    w.pass(10 * S);
    assert_eq!(
        w.changes(),
        [(AlertChange::Pending, AlertKind::Zombie), (AlertChange::Dropped, AlertKind::Zombie)]
    );
    assert!(w.e.alerts(true).is_empty());
}

/// A kernel may free a process where no probe runs: its record never comes.
#[test]
fn whose_reap_is_never_told_is_found_gone_long_before_its_time() {
    let mut w = World::new("[zombies]\nafter = \"30s\"");
    let worker = w.sim.spawn(1, "/bin/worker");
    let all: Vec<u32> = (0..40).map(|_| w.sim.fork(worker)).collect();
    let keys: Vec<Key> = all.iter().map(|&p| w.sim.key(p)).collect();
    w.drain();
    for &p in &all {
        w.sim.die(p, 0);
    }
    w.pass(S / 2);
    assert!(keys.iter().all(|&k| w.state(k) == Some(State::Zombie)));
    for &p in &all {
        w.sim.reap(p);
        w.sim.ring.pop();
    }
    w.pass(2 * S);
    assert!(keys.iter().all(|&k| w.state(k).is_none_or(|s| s == State::Gone)));
    assert_eq!(w.e.gauges(w.sim.now).unreaping_parents, 0);
}

#[test]
fn stuck_in_its_exit_is_no_zombie() {
    let mut w = World::new(AFTER_5);
    let worker = w.sim.spawn(1, "/bin/worker");
    let cmd = w.sim.fork(worker);
    w.sim.exit(cmd, 0);
    w.pass(3600 * S);
    assert_eq!(w.changes(), []);
    assert_eq!(w.state(w.sim.key(cmd)), Some(State::Exiting));
}

#[test]
fn ten_thousand_zombies_of_one_parent_are_one_alert() {
    let mut w = World::new(AFTER_5);
    let worker = w.sim.spawn(1, "/bin/worker");
    let mut all = Vec::new();
    for _ in 0..10_000 {
        let z = w.sim.fork(worker);
        w.sim.die(z, 0);
        all.push(z);
    }
    w.pass(20 * S);
    let told = w.told();
    let kinds: Vec<_> = told.iter().map(|(c, _)| *c).collect();
    assert!(kinds.starts_with(&[AlertChange::Pending, AlertChange::Fired]), "{kinds:?}");
    assert!(kinds.len() <= 4, "updates have a floor: {kinds:?}");
    assert_eq!(w.e.alerts(false)[0].count, 10_000);
    let before = w.looks;
    w.pass(10 * S);
    assert!(w.looks - before <= 16 * 41, "few looks while nothing moves: {}", w.looks - before);
    // All reaped at once, and the records do not come.
    for z in all {
        w.sim.reap(z);
    }
    w.sim.ring.clear();
    w.pass(S);
    assert_eq!(w.changes().last(), Some(&(AlertChange::Resolved, AlertKind::Zombie)));
}

#[test]
fn a_new_parent_has_its_own_time() {
    let mut w = World::new(AFTER_5);
    let worker = w.sim.spawn(1, "/bin/worker");
    let cmd = w.sim.fork(worker);
    w.sim.die(cmd, 0);
    w.pass(6 * S);
    assert_eq!(w.firing(), [AlertKind::Zombie]);
    w.told();
    w.sim.end(worker, 0);
    w.pass(900_000_000);
    let told = w.told();
    let [(AlertChange::Resolved, a)] = told.as_slice() else { panic!("{told:?}") };
    assert!(a.summary.contains("has ended"), "{}", a.summary);
    w.pass(3 * S);
    assert!(w.firing().is_empty(), "PID 1 has had it for 4 s only");
    w.pass(2 * S);
    assert_eq!(w.e.alerts(false)[0].subject.as_ref().unwrap().pid, 1);
}

#[test]
fn the_innermost_job_that_says_so_decides() {
    let mut w = World::new(
        "[[job]]\nname = \"outer\"\nmatch = { argv = \"^outer\" }\nzombie_after = \"2s\"\nseverity = \"critical\"\n\
         [[job]]\nname = \"inner\"\nmatch = { argv = \"^inner\" }",
    );
    let outer = w.sim.spawn(1, "outer");
    let inner = w.sim.spawn(outer, "inner");
    let z = w.sim.fork(inner);
    w.sim.die(z, 0);
    w.pass(3 * S);
    let a = &w.e.alerts(false)[0];
    assert_eq!((a.job_name.as_str(), a.labels["job_name"].as_str()), ("inner", "inner"));
    assert_eq!(a.severity, Severity::Warning, "the inner job says nothing about severity");
    assert_eq!(w.e.jobs().len(), 2);
    let g = w.e.gauges(w.sim.now);
    assert_eq!((g.jobs["inner"].zombies, g.jobs["outer"].zombies, g.jobs[""].zombies), (1, 0, 0));
}

#[test]
fn flapping_is_damped_and_causes_are_told() {
    let mut w = World::new(AFTER_5);
    let worker = w.sim.spawn(1, "/bin/worker");
    for round in 0..5 {
        let z = w.sim.fork(worker);
        w.sim.die(z, 0);
        w.pass(6 * S);
        if round == 0 {
            let a = w.e.alerts(false)[0].clone();
            let cause = Cause {
                process: a.subject.clone().unwrap(),
                verdict: Verdict::ParentBusy,
                summary: "busy".into(),
                evidence: Vec::new(),
                remedy: String::new(),
                alert: Some(a.id.clone()),
            };
            let mut fx = Output::default();
            w.e.handle(
                Input::Cause { alert: a.id.as_str().into(), cause: Cow::Owned(cause.clone()) },
                w.sim.now,
                &mut fx,
            );
            w.e.handle(
                Input::Cause { alert: a.id.as_str().into(), cause: Cow::Owned(cause.clone()) },
                w.sim.now,
                &mut fx,
            );
            assert!(
                matches!(fx.changes.as_slice(), [Change::Alert { change: AlertChange::Updated, .. }]),
                "{fx:?}"
            );
            assert_eq!(w.e.to_explain().map(|(id, k)| (id, k.pid)).collect::<Vec<_>>(), [(a.id.as_str(), z)]);
            // Another thing to be done, by the same verdict, is told too.
            fx = Output::default();
            let other = Cause { remedy: "jobwarden kill 7:7".into(), ..cause };
            w.e.handle(
                Input::Cause { alert: a.id.as_str().into(), cause: Cow::Owned(other) },
                w.sim.now + 11 * S,
                &mut fx,
            );
            assert!(
                matches!(fx.changes.as_slice(), [Change::Alert { change: AlertChange::Updated, .. }]),
                "{fx:?}"
            );
        }
        w.sim.reap(z);
        w.pass(S);
    }
    let fired = w.changes().into_iter().filter(|(c, _)| *c == AlertChange::Fired).count();
    assert_eq!(fired, 3, "from the third on it stays until it is calm");
    assert_eq!(w.firing(), [AlertKind::Zombie]);
    w.pass(61 * S);
    assert_eq!(w.changes().last(), Some(&(AlertChange::Resolved, AlertKind::Zombie)));
    assert_eq!(w.e.gauges(w.sim.now).alerts_fired[&AlertKind::Zombie], 3);
}
