use super::*;
use crate::model::event::Body;
use crate::model::kill::Reason;

const RULE: &str = "[enforcement]\nenabled = true\n[[job]]\nname = \"w\"\nmatch = { argv = \"^worker\" }\n\
                    timeout = \"10s\"\non_timeout = \"kill\"\ngrace = \"3s\"\norphan_after = \"2s\"";

/// Another agent takes over: what is saved is given back, the forest is read anew.
fn restart(w: &mut World, pinned: bool, down: u64) {
    w.drain();
    let jobs = w.e.job_records();
    let jobs: Vec<JobRecord> = serde_json::from_str(&serde_json::to_string(&jobs).unwrap()).unwrap();
    let alerts = w.e.alerts(false);
    let enforcement = w.e.enforcement_state();
    w.e = Engine::new(settings(), &config(RULE));
    w.sim.pass(down);
    w.sim.ring.clear();
    w.out.clear();
    w.changed.clear();
    let mut fx = Output::default();
    w.e.handle(Input::RestoreEnforcement(Cow::Owned(enforcement)), 0, &mut Output::default());
    w.e.handle(Input::RestoreJobs(jobs.into()), 0, &mut Output::default());
    w.e.handle(Input::RestoreAlerts { alerts: alerts.into(), this_boot: true }, w.sim.now, &mut fx);
    assert!(fx == Output::default());
    if !pinned {
        w.sim.procs.values_mut().for_each(|p| p.job = 0);
    }
    let s = w.sim.snapshot(pinned);
    w.merge(s);
    w.e.handle(Input::Ready, w.sim.now, &mut fx);
    w.answer(fx);
}

/// Gives the simulated kernel the job's number for all its members, as labelling does.
fn label(w: &mut World) {
    for r in w.e.job_records() {
        for k in w.e.members(r.id) {
            if let Some(p) = w.sim.procs.get_mut(&k.pid) {
                p.job = r.number;
            }
        }
    }
}

#[test]
fn jobs_and_orphans_made_while_it_was_down() {
    let mut w = World::new(RULE);
    let worker = w.sim.spawn(1, "worker");
    let cmd = w.sim.spawn(worker, "cmd");
    w.drain();
    label(&mut w);
    let id = w.e.jobs()[0].id;
    // While it is down: a grandchild is born, and its parent dies.
    let grand = w.sim.fork(cmd);
    w.sim.end(cmd, 0);
    w.sim.ring.clear();
    restart(&mut w, true, S);
    assert_eq!(w.e.jobs()[0].id, id);
    assert_eq!(w.e.jobs_of(w.sim.key(grand)), [id]);
    let p = w.process(w.sim.key(grand)).unwrap();
    assert!(p.orphan && p.adopter.is_some_and(|a| a.pid == 1));
    assert_eq!(p.lineage_parent.map(|k| k.pid), Some(cmd), "the kernel's map knew it");
    assert!(w.labelled() == 0, "the kernel has the job");
    w.pass(3 * S);
    assert_eq!(w.firing(), [AlertKind::Orphan]);
}

#[test]
fn without_pins_members_keep_their_membership() {
    let mut w = World::new(RULE);
    let worker = w.sim.spawn(1, "worker");
    let cmd = w.sim.spawn(worker, "cmd");
    w.drain();
    let id = w.e.jobs()[0].id;
    let born = w.sim.fork(1);
    w.sim.ring.clear();
    restart(&mut w, false, S);
    assert_eq!(w.e.jobs_of(w.sim.key(cmd)), [id]);
    assert_eq!(w.e.jobs_of(w.sim.key(worker)), [id]);
    assert!(w.e.jobs_of(w.sim.key(born)).is_empty());
    assert_eq!(w.e.jobs().len(), 1);
    assert!(w.labelled() == 1, "the kernel must be told");
}

#[test]
fn what_expired_meanwhile_has_one_more_grace() {
    let mut w = World::new(RULE);
    w.sim.spawn(1, "worker");
    w.drain();
    label(&mut w);
    restart(&mut w, true, 60 * S);
    assert_eq!(w.firing(), [AlertKind::JobTimeout]);
    w.pass(2_900_000_000);
    assert!(w.kills().is_empty());
    w.pass(S);
    let kills = w.kills();
    assert!(matches!(kills.as_slice(), [k] if k.reason == Reason::Timeout), "{kills:?}");
}

/// SIGKILL after the job was saved and before its record was let go: the record comes again.
#[test]
fn the_record_of_a_saved_job_comes_again() {
    let mut w = World::new(RULE);
    let worker = w.sim.spawn(1, "worker");
    let again = w.sim.ring.clone();
    w.drain();
    label(&mut w);
    let id = w.e.jobs()[0].id;
    let jobs = w.e.job_records();
    w.e = Engine::new(settings(), &config(RULE));
    w.e.handle(Input::RestoreJobs(jobs.into()), 0, &mut Output::default());
    w.sim.ring = again;
    w.drain();
    let child = w.sim.fork(worker);
    w.drain();
    let s = w.sim.snapshot(true);
    w.merge(s);
    let mut fx = Output::default();
    w.e.handle(Input::Ready, w.sim.now, &mut fx);
    w.answer(fx);
    for p in [worker, child] {
        assert_eq!(w.e.jobs_of(w.sim.key(p)), [id]);
    }
    assert_eq!(w.e.jobs().len(), 1);
}

#[test]
fn a_deadline_of_after_the_restart_has_no_grace() {
    let mut w = World::new(RULE);
    w.sim.spawn(1, "worker");
    w.drain();
    label(&mut w);
    restart(&mut w, true, 5 * S);
    w.pass(4_900_000_000);
    assert!(w.kills().is_empty());
    w.pass(200_000_000);
    assert_eq!(w.kills().len(), 1, "its deadline came while the agent was there");
}

#[test]
fn the_fuse_counts_over_a_restart() {
    let mut w = World::new(&RULE.replace("enabled = true", "enabled = true\nmax_job_kills_per_minute = 1"));
    w.sim.spawn(1, "worker a");
    w.pass(11 * S);
    assert_eq!(w.kills().len(), 1);
    let saved: EnforcementState =
        serde_json::from_str(&serde_json::to_string(&w.e.enforcement_state()).unwrap()).unwrap();
    assert_eq!(saved.ended.len(), 1);
    let mut again =
        World::unsynced(&RULE.replace("enabled = true", "enabled = true\nmax_job_kills_per_minute = 1"));
    again.sim.now = w.sim.now;
    again.e.handle(Input::RestoreEnforcement(Cow::Owned(saved)), 0, &mut Output::default());
    again.sync();
    again.sim.spawn(1, "worker b");
    again.pass(11 * S);
    assert_eq!(again.kills().len(), 0);
    assert!(again.e.enforcement_state().fuse_open, "the second within a minute");
}

#[test]
fn a_supervisor_that_died_meanwhile() {
    let mut w = World::new(RULE);
    let (exec, lives) = (w.sim.spawn(1, "jobwarden exec"), w.sim.spawn(1, "jobwarden exec"));
    let mut roots = Vec::new();
    for supervisor in [exec, lives] {
        let root = w.sim.spawn(supervisor, "cmd");
        w.drain();
        let job = ExecJob {
            root: w.sim.key(root),
            name: "x".into(),
            supervisor: Some(w.sim.key(supervisor)),
            number: None,
            policy: w.e.rules.job(0, false).unwrap().policy,
        };
        record(w.e.handle(Input::RegisterJob(Cow::Owned(job)), w.sim.now, &mut Output::default())).unwrap();
        roots.push(w.sim.key(root));
    }
    label(&mut w);
    w.sim.end(exec, 9);
    w.sim.ring.clear();
    restart(&mut w, true, S);
    let kills = w.kills();
    assert!(matches!(kills.as_slice(), [k] if k.root == roots[0] && k.reason == Reason::Exec), "{kills:?}");
}

#[test]
fn who_is_not_in_the_kernels_map_is_entered() {
    let mut w = World::new(RULE);
    let worker = w.sim.spawn(1, "worker");
    w.drain();
    label(&mut w);
    let number = w.e.job_records()[0].number;
    w.entered.clear();
    // In the map and in its job: nothing to do.
    w.sim.fork(worker);
    w.drain();
    assert_eq!(w.entered, []);
    // No room for it; its child found room, and inherited nothing.
    let (lost, outside) = (w.sim.fork(worker), w.sim.fork(1));
    for e in &mut w.sim.ring {
        if let Body::Fork { no_entry, job, .. } = &mut e.body {
            (*no_entry, *job) = (true, 0);
        }
    }
    w.sim.procs.get_mut(&lost).unwrap().job = 0;
    let child = w.sim.fork(lost);
    w.drain();
    let key = |p| w.sim.key(p);
    assert_eq!(w.entered, [(key(lost), number), (key(outside), 0), (key(child), number)]);
    // A kill of some puts them into a job of its own, which is nobody's business here.
    w.entered.clear();
    w.sim.procs.get_mut(&child).unwrap().job = 77;
    w.sim.fork(child);
    w.drain();
    assert_eq!(w.entered, []);
    // Both records are lost: the snapshot finds it by its lineage.
    w.sim.procs.get_mut(&child).unwrap().job = 0;
    let late = w.sim.fork(child);
    w.sim.ring.clear();
    w.entered.clear();
    let s = w.sim.snapshot(true);
    w.merge(s);
    let mut told = w.entered.clone();
    told.sort_unstable();
    assert_eq!(told, [(w.sim.key(child), number), (w.sim.key(late), number)]);
}

/// The fork record of the last member is lost, and the loss is known already or not: the kernel is asked before the job ends.
#[test]
fn a_job_is_not_over_while_the_kernel_has_members() {
    for loss_known in [false, true] {
        let mut w = World::new(RULE);
        let worker = w.sim.spawn(1, "worker");
        w.drain();
        label(&mut w);
        let child = w.sim.fork(worker);
        w.sim.ring.clear();
        w.sim.end(worker, 0);
        w.drain();
        if loss_known {
            let mut fx = Output::default();
            w.e.handle(Input::EventsLost { count: 1 }, w.sim.now, &mut fx);
            w.answer(fx);
        }
        w.pass(5 * S);
        let ended = |w: &World| w.changed.iter().any(|c| matches!(c, Change::JobEnded(_)));
        assert!(!ended(&w), "loss known: {loss_known}");
        let s = w.sim.snapshot(true);
        w.merge(s);
        w.pass(2 * S);
        assert_eq!((w.e.jobs()[0].processes, w.e.jobs_of(w.sim.key(child)).len()), (1, 1));
        assert!(!ended(&w), "loss known: {loss_known}");
        w.sim.end(child, 0);
        w.pass(5 * S);
        assert!(ended(&w), "loss known: {loss_known}");
    }
}

#[test]
fn alerts_go_on_or_end() {
    let mut w = World::new(&format!("{RULE}\nzombie_after = \"2s\""));
    let worker = w.sim.spawn(1, "worker");
    let z = w.sim.fork(worker);
    let other = w.sim.spawn(1, "other");
    let z2 = w.sim.fork(other);
    w.sim.die(z, 0);
    w.sim.die(z2, 0);
    w.pass(31 * S);
    label(&mut w);
    let before = w.e.alerts(false);
    assert_eq!(before.iter().filter(|a| a.kind == AlertKind::Zombie).count(), 2);
    w.sim.reap(z2);
    w.sim.ring.clear();
    restart(&mut w, true, S);
    let told = w.told();
    let [(AlertChange::Resolved, a)] = told.as_slice() else { panic!("{told:?}") };
    assert!(a.subject.as_ref().unwrap().pid == other && a.summary.contains("down"), "{}", a.summary);
    let after = w.e.alerts(false);
    for a in before.iter().filter(|a| a.subject.as_ref().unwrap().pid == worker) {
        let same = after.iter().find(|b| b.id == a.id).unwrap();
        assert_eq!((&same.since, &same.labels, same.state), (&a.since, &a.labels, AlertState::Firing));
    }
    w.sim.reap(z);
    w.pass(S);
    assert!(w.told().iter().any(|(c, a)| *c == AlertChange::Resolved && a.kind == AlertKind::Zombie));
}

#[test]
fn another_boot_ends_all_and_the_fuse_stays() {
    let mut w = World::new(RULE);
    let mut fx = Output::default();
    w.e.handle(Input::EventsLost { count: 3 }, w.sim.now, &mut fx);
    let alerts = w.e.alerts(false);
    let mut e = Engine::new(settings(), &config(RULE));
    let mut fx = Output::default();
    let fuse = EnforcementState { fuse_open: true, ..EnforcementState::default() };
    e.handle(Input::RestoreEnforcement(Cow::Owned(fuse)), 0, &mut fx);
    e.handle(Input::RestoreAlerts { alerts: alerts.into(), this_boot: false }, S, &mut fx);
    let [Change::Alert { change: AlertChange::Resolved, alert }] = fx.changes.as_slice() else {
        panic!("{fx:?}")
    };
    assert!(alert.summary.contains("booted"), "{}", alert.summary);
    fx = Output::default();
    e.handle(Input::Ready, 2 * S, &mut fx);
    assert!(!e.enforcing(2 * S));
    assert_eq!(e.alerts(false)[0].kind, AlertKind::EnforcementStopped);
}

#[test]
fn losses_are_told_and_end() {
    let mut w = World::new("");
    let mut fx = Output::default();
    w.e.handle(Input::EventsLost { count: 3 }, w.sim.now, &mut fx);
    w.answer(fx);
    w.pass(200 * S);
    w.e.handle(Input::EventsLost { count: 2 }, w.sim.now, &mut Output::default());
    assert_eq!(w.e.alerts(false)[0].count, 5);
    w.pass(299 * S);
    assert_eq!(w.firing(), [AlertKind::EventsLost]);
    w.pass(2 * S);
    assert_eq!(w.firing(), []);
}

#[test]
fn conditions_of_the_edge() {
    let mut w = World::new("");
    let mut fx = Output::default();
    w.e.handle(
        Input::Condition { kind: AlertKind::StorageFailed, problem: Some("disk full".into()) },
        w.sim.now,
        &mut fx,
    );
    assert_eq!(
        (w.firing(), w.e.alerts(false)[0].summary.as_str()),
        (vec![AlertKind::StorageFailed], "disk full")
    );
    w.e.handle(Input::Condition { kind: AlertKind::StorageFailed, problem: None }, w.sim.now, &mut fx);
    assert_eq!(w.firing(), []);
    assert_eq!(fx.changes.len(), 2);
}

/// The alerts that fired before, given to an engine that knows of nothing else.
fn restored(alerts: Vec<Alert>) -> World {
    let mut w = World::unsynced("");
    let mut fx = Output::default();
    w.e.handle(Input::RestoreAlerts { alerts: alerts.into(), this_boot: true }, w.sim.now, &mut fx);
    assert!(fx == Output::default());
    w.sync();
    w
}

#[test]
fn alerts_about_the_host_go_on_after_a_restart_and_end() {
    let mut w = World::new("");
    let mut fx = Output::default();
    w.e.handle(Input::EventsLost { count: 7 }, w.sim.now, &mut fx);
    w.e.handle(
        Input::Condition { kind: AlertKind::Capacity, problem: Some("kernel_lineage is full".into()) },
        w.sim.now,
        &mut fx,
    );
    w.e.handle(
        Input::Condition { kind: AlertKind::StorageFailed, problem: Some("disk full".into()) },
        w.sim.now,
        &mut fx,
    );
    let mut w = restored(w.e.alerts(false));
    assert_eq!(w.firing().len(), 3);
    assert_eq!(w.changes(), [], "nobody is told again");
    for a in w.e.alerts(false) {
        let said = match a.kind {
            AlertKind::EventsLost => "7 records of the kernel were lost",
            AlertKind::Capacity => "kernel_lineage is full",
            _ => "disk full",
        };
        assert!(a.summary.contains(said), "{a:?}");
    }
    w.pass(11 * S);
    let told = w.told();
    let [(AlertChange::Resolved, a)] = told.as_slice() else { panic!("{told:?}") };
    assert_eq!(a.kind, AlertKind::Capacity, "nothing is full here");
    w.pass(300 * S);
    let told = w.told();
    let [(AlertChange::Resolved, a)] = told.as_slice() else { panic!("{told:?}") };
    assert_eq!(a.kind, AlertKind::EventsLost);
    assert!(a.summary.contains("7 were before"), "{}", a.summary);
    let mut fx = Output::default();
    w.e.handle(Input::Condition { kind: AlertKind::StorageFailed, problem: None }, w.sim.now, &mut fx);
    assert_eq!(w.firing(), []);
}

#[test]
fn a_full_forest_says_so() {
    let mut w = World::unsynced("");
    let limits = Limits { processes: 10, ..Limits::default() };
    w.e = Engine::new(Settings { limits, ..settings() }, &config(""));
    w.sync();
    let all: Vec<u32> = (0..20).map(|_| w.sim.fork(1)).collect();
    w.drain();
    assert_eq!(w.firing(), [AlertKind::Capacity]);
    let stores = w.e.gauges(w.sim.now).stores;
    assert_eq!((stores[0].entries, stores[0].max, stores[0].evictions), (10, 10, 11));
    for p in all {
        w.sim.end(p, 0);
    }
    w.pass(11 * S);
    assert_eq!(w.firing(), []);
}

#[test]
fn a_failed_kill_outside_of_jobs_is_known_after_a_restart() {
    let mut w = World::new(RULE);
    let target = w.sim.spawn(1, "target");
    w.drain();
    let root = w.sim.key(target);
    super::kills::over(&mut w, root, Err("no"));
    let id = w.e.alerts(false)[0].id.clone();
    restart(&mut w, true, S);
    assert!(w.e.alerts(false).iter().any(|a| a.id == id), "{:?}", w.e.alerts(false));
    w.sim.end(target, 9);
    w.pass(S);
    assert_eq!(w.firing(), []);
    assert_eq!(w.told().last().map(|(c, a)| (*c, a.id.clone())), Some((AlertChange::Resolved, id)));
}
