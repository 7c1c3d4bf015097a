use super::*;
use crate::model::kill::{Reason, What};
use crate::model::schema::JobState;

fn rule(more: &str) -> String {
    format!(
        "[enforcement]\nenabled = true\n[[job]]\nname = \"w\"\nmatch = {{ argv = \"^worker\" }}\n\
         orphan_after = \"5s\"\n{more}"
    )
}

/// A worker, its command, and a grandchild whose parent has died by SIGTERM. The pids of worker, command, grandchild.
fn incident(w: &mut World) -> (u32, u32, u32) {
    let worker = w.sim.spawn(1, "worker");
    let cmd = w.sim.spawn(worker, "cmd");
    let grand = w.sim.spawn(cmd, "grand");
    w.drain();
    w.sim.signal(worker, cmd, 15);
    w.sim.die(cmd, 15);
    w.pass(S / 2);
    (worker, cmd, grand)
}

#[test]
fn told_with_job_and_adopter() {
    let mut w = World::new(&rule(""));
    let (_, cmd, grand) = incident(&mut w);
    w.pass(S);
    assert_eq!(w.e.alerts(true).len(), 2, "an orphan and a zombie, pending");
    w.pass(4 * S);
    let told = w.told();
    let (_, a) = told.iter().find(|(c, a)| *c == AlertChange::Fired && a.kind == AlertKind::Orphan).unwrap();
    assert!(a.summary.contains("adopted by init (1:1)") && a.summary.contains("Job w"), "{}", a.summary);
    assert_eq!((a.count, a.job_name.as_str(), a.subject.as_ref().unwrap().pid), (1, "w", grand));
    assert_eq!(w.e.alert_subject(&a.id), Some(w.sim.key(grand)));
    let job = &w.e.jobs()[0];
    assert_eq!((job.state, job.processes, job.zombies, job.orphans), (JobState::Running, 2, 1, 1));
    assert!(w.kills().is_empty(), "on_orphan is alert");
    let q = w.e.question(w.sim.key(grand), w.sim.now).unwrap();
    assert_eq!(q.signals.len(), 1);
    assert!(q.family.iter().any(|p| p.pid == cmd));
    w.sim.end(grand, 0);
    w.pass(S);
    let told = w.told();
    assert_eq!(told.last().map(|(c, a)| (*c, a.kind)), Some((AlertChange::Resolved, AlertKind::Orphan)));
    assert!(told.last().unwrap().1.subject.is_none());
}

#[test]
fn ended_with_what_descends_and_nobody_else() {
    let mut w = World::new(&rule("on_orphan = \"kill\""));
    let (worker, cmd, grand) = incident(&mut w);
    let below = w.sim.spawn(grand, "below");
    w.pass(6 * S);
    let kills = w.kills();
    let [k] = kills.as_slice() else { panic!("{kills:?}") };
    let What::Descendants { roots, number } = &k.what else { panic!("{k:?}") };
    assert_eq!((roots.as_slice(), k.reason), ([w.sim.key(grand)].as_slice(), Reason::Orphan));
    let Answer::Number(next) = w.e.handle(Input::ReserveNumbers { count: 1 }, 0, &mut Output::default())
    else {
        panic!()
    };
    assert!(*number > k.number && next > *number);
    assert_eq!((k.root, k.asked_by.rule.as_deref()), (w.sim.key(worker), Some("w")));
    assert_eq!(w.e.jobs()[0].state, JobState::Killing);
    w.pass(10 * S);
    assert!(w.kills().is_empty(), "one order");
    w.sim.end(below, 9);
    w.sim.end(grand, 9);
    w.drain();
    let id = w.e.jobs()[0].id;
    let report = kills::report(&[]);
    let mut fx = Output::default();
    w.e.handle(
        Input::KillFinished {
            job: id,
            reason: Reason::Orphan,
            whole: false,
            report: Ok(Cow::Borrowed(&report)),
        },
        w.sim.now,
        &mut fx,
    );
    w.answer(fx);
    w.sim.reap(cmd);
    w.pass(S);
    assert_eq!(w.firing(), []);
    assert_eq!(w.e.jobs()[0].state, JobState::Running, "the worker goes on");
}

#[test]
fn when_the_root_has_gone_all_qualify() {
    let mut w = World::new(&rule("on_orphan = \"kill\""));
    let worker = w.sim.spawn(1, "worker");
    let a = w.sim.spawn(worker, "a");
    w.sim.spawn(a, "b");
    w.sim.end(worker, 1 << 8);
    w.pass(S);
    assert_eq!(w.e.jobs()[0].state, JobState::Lingering);
    w.pass(5 * S);
    let kills = w.kills();
    assert!(matches!(kills.as_slice(), [k] if k.what == What::Whole), "{kills:?}");
}

#[test]
fn daemons_are_left_unless_the_rule_says_so() {
    for (more, killed) in [("", 0), ("kill_daemons = true", 1)] {
        let mut w = World::new(&rule(&format!("on_orphan = \"kill\"\n{more}")));
        let worker = w.sim.spawn(1, "worker");
        let main = w.sim.spawn(worker, "daemon");
        let middle = w.sim.fork(main);
        w.sim.procs.get_mut(&middle).unwrap().session = middle as i32;
        let daemon = w.sim.fork(middle);
        assert_eq!(w.sim.procs[&daemon].session, middle as i32);
        w.sim.end(middle, 0);
        w.sim.end(main, 0);
        w.pass(10 * S);
        assert_eq!(w.kills().len(), killed, "{more}");
        assert!(w.firing().contains(&AlertKind::Orphan), "told in any case");
        let a = &w.e.alerts(false)[0];
        assert_eq!(a.summary.contains("daemonized"), killed == 0, "{}", a.summary);
    }
}

#[test]
fn the_root_is_no_orphan_of_its_own_job() {
    let mut w = World::new(&rule("on_orphan = \"kill\""));
    let shell = w.sim.spawn(1, "sh");
    let worker = w.sim.spawn(shell, "worker");
    w.sim.end(shell, 0);
    w.pass(60 * S);
    assert_eq!((w.changes(), w.kills().len()), (vec![], 0));
    assert!(w.process(w.sim.key(worker)).unwrap().orphan);
    assert_eq!((w.e.jobs()[0].orphans, w.e.gauges(w.sim.now).jobs["w"].orphans), (0, 0));
}

#[test]
fn outside_jobs_orphans_are_nobodys_business() {
    let mut w = World::new(&rule(""));
    let shell = w.sim.spawn(1, "sh");
    w.sim.spawn(shell, "x");
    w.sim.end(shell, 0);
    w.pass(60 * S);
    assert_eq!(w.changes(), []);
    assert_eq!(w.e.gauges(w.sim.now).jobs[""].orphans, 1);
}
