use std::time::Duration;

use super::*;
use crate::model::kill::{Reason, What};
use crate::model::schema::{JobState, KillReport, Ref, Stuck};
use crate::model::stats::Outcome;

/// What an order came to, with these survivors.
pub(super) fn report(survivors: &[Ref]) -> KillReport {
    KillReport {
        target: String::new(),
        signalled: Vec::new(),
        survivors: survivors.to_vec(),
        stuck: survivors
            .iter()
            .map(|r| Stuck {
                process: r.clone(),
                state: "D".into(),
                wchan: Some("nfs_wait".into()),
                tracer: None,
                frozen: false,
            })
            .collect(),
        spared: Vec::new(),
        zombies: Vec::new(),
        took_s: 0.1,
    }
}

fn rules(enabled: bool, more: &str) -> String {
    format!(
        "[enforcement]\nenabled = {enabled}\nmax_job_kills_per_minute = 2\n[[job]]\nname = \"w\"\n\
         match = {{ argv = \"^worker\" }}\ntimeout = \"10s\"\non_timeout = \"kill\"\ngrace = \"3s\"\n{more}"
    )
}

#[test]
fn a_deadline_counts_from_the_start_and_ends_the_job() {
    let mut w = World::new(&rules(true, ""));
    let worker = w.sim.fork(1);
    w.pass(4 * S);
    w.sim.exec(worker, "worker");
    let child = w.sim.fork(worker);
    w.pass(5_900_000_000);
    assert_eq!((w.changes(), w.kills().len()), (vec![], 0));
    w.pass(S);
    let kills = w.kills();
    assert!(
        matches!(kills.as_slice(), [k] if k.what == What::Whole && k.signal == 15 && k.grace == Duration::from_secs(3)),
        "{kills:?}"
    );
    let job = &w.e.jobs()[0];
    assert_eq!(job.state, JobState::Killing);
    let a = &w.e.alerts(false)[0];
    assert!(a.kind == AlertKind::JobTimeout && a.summary.contains("being ended"), "{}", a.summary);
    assert!(w.changed.iter().any(|c| matches!(c, Change::Job(job) if job.expired)), "saved");
    w.sim.end(child, 9);
    w.sim.end(worker, 9);
    w.drain();
    assert_eq!(w.e.jobs()[0].state, JobState::Done);
    assert_eq!(w.told().last().unwrap().0, AlertChange::Resolved);
    w.pass(5 * S);
    let over = |w: &World| {
        w.changed.iter().find_map(|c| if let Change::JobEnded(e) = c { Some(e.outcome) } else { None })
    };
    assert_eq!(over(&w), None, "its end waits for the kill's");
    let mut fx = Output::default();
    let id = w.e.jobs()[0].id;
    w.e.handle(
        Input::KillFinished {
            job: id,
            reason: Reason::Timeout,
            whole: true,
            report: Ok(Cow::Borrowed(&KillReport::default())),
        },
        w.sim.now,
        &mut fx,
    );
    w.answer(fx);
    w.pass(2 * S);
    assert_eq!(over(&w), Some(Outcome::Killed));
    let g = w.e.gauges(w.sim.now);
    assert_eq!(g.jobs["w"].finished[&Outcome::Killed], 1);
    w.pass(61 * S);
    assert!(w.e.jobs().is_empty(), "forgotten");
}

#[test]
fn off_means_told_what_would_be_done_and_on_does_it() {
    let mut w = World::new(&rules(false, ""));
    w.sim.spawn(1, "worker");
    w.pass(11 * S);
    assert!(w.kills().is_empty());
    let a = &w.e.alerts(false)[0];
    assert!(a.summary.contains("would have been ended: enforcement is off"), "{}", a.summary);
    assert_eq!(w.e.jobs()[0].state, JobState::Expired);
    let mut fx = Output::default();
    w.e.handle(Input::Enforcement { on: true, lasts: Some(Duration::from_mins(1)) }, w.sim.now, &mut fx);
    assert!(matches!(fx.changes.as_slice(), [Change::Enforcement(s)] if s.by_operator == Some(true)));
    assert!(w.e.enforcing(w.sim.now));
    w.pass(1);
    assert_eq!(w.kills().len(), 1);
    w.pass(60 * S);
    assert!(!w.e.enforcing(w.sim.now), "the word has run out");
    let s = w.e.enforcement_state();
    assert_eq!((s.by_operator, s.until, s.fuse_open), (None, None, false));
}

#[test]
fn the_fuse_counts_jobs_and_stays_open() {
    let mut w = World::new(&rules(true, ""));
    for _ in 0..4 {
        w.sim.spawn(1, "worker");
    }
    w.pass(11 * S);
    assert_eq!(w.kills().len(), 2, "two a minute");
    assert!(w.firing().contains(&AlertKind::EnforcementStopped));
    assert!(w.e.enforcement_state().fuse_open && !w.e.enforcing(w.sim.now));
    w.pass(3600 * S);
    assert_eq!(w.kills().len(), 0, "time does not close it");
    let mut fx = Output::default();
    w.e.handle(Input::Enforcement { on: true, lasts: None }, w.sim.now, &mut fx);
    w.answer(fx);
    w.pass(S);
    assert!(!w.firing().contains(&AlertKind::EnforcementStopped));
    assert_eq!(w.kills().len(), 2, "the other two");
}

#[test]
fn what_already_ran_is_only_told_unless_the_rule_says_so() {
    for (more, killed) in [("", 0), ("enforce_existing = true", 1)] {
        let mut w = World::unsynced(&rules(true, more));
        w.sim.spawn(1, "worker");
        w.sim.ring.clear();
        w.sim.pass(100 * S);
        w.sync();
        w.pass(S);
        assert_eq!(w.firing(), [AlertKind::JobTimeout]);
        assert_eq!(w.kills().len(), killed, "{more}");
    }
}

#[test]
fn pid_1_and_the_agents_ancestors_are_never_enforced_upon() {
    let mut w = World::unsynced(
        "[enforcement]\nenabled = true\n[[job]]\nname = \"all\"\nmatch = { argv = \".\" }\ntimeout = \"1s\"\n\
         on_timeout = \"kill\"\nenforce_existing = true",
    );
    w.sim.pass(10 * S);
    w.sync();
    w.pass(S);
    let jobs = w.e.jobs();
    assert_eq!((jobs.len(), jobs[0].root), (1, Key::new(1, 1)), "the topmost match");
    assert!(w.kills().is_empty());
    assert!(w.e.alerts(false)[0].summary.contains("PID 1"), "{}", w.e.alerts(false)[0].summary);

    let text = rules(true, "enforce_existing = true");
    let mut w = World::unsynced(&text);
    let shell = w.sim.spawn(1, "worker");
    let agent = w.sim.spawn(shell, "jobwarden");
    w.sim.ring.clear();
    w.sim.pass(20 * S);
    w.e = Engine::new(Settings { agent: w.sim.key(agent), ..settings() }, &config(&text));
    w.sync();
    w.pass(S);
    assert_eq!((w.firing(), w.kills().len()), (vec![AlertKind::JobTimeout], 0));
}

#[test]
fn survivors_make_kill_failed_until_the_job_is_empty() {
    let mut w = World::new(&rules(true, ""));
    let worker = w.sim.spawn(1, "worker");
    w.pass(11 * S);
    let k = w.kills().remove(0);
    let job = k.job.unwrap();
    let who = w.e.reference(w.sim.key(worker)).unwrap();
    let mut fx = Output::default();
    w.e.handle(Input::KillStarted { job, reason: k.reason }, 0, &mut Output::default());
    w.e.handle(
        Input::KillFinished {
            job,
            reason: k.reason,
            whole: true,
            report: Ok(Cow::Borrowed(&report(&[who]))),
        },
        w.sim.now,
        &mut fx,
    );
    w.answer(fx);
    let alerts = w.e.alerts(false);
    let a = alerts.iter().find(|a| a.kind == AlertKind::KillFailed).unwrap();
    assert!(a.summary.contains("state D waiting in nfs_wait"), "{}", a.summary);
    assert_eq!(a.subject.as_ref().unwrap().pid, worker);
    w.pass(60 * S);
    assert!(w.kills().is_empty(), "it is not tried again by itself");
    w.sim.end(worker, 9);
    w.pass(S);
    assert_eq!(w.firing(), []);
}

#[test]
fn extend_moves_the_deadline() {
    let mut w = World::new(&rules(true, ""));
    w.sim.spawn(1, "worker");
    w.pass(5 * S);
    let id = w.e.jobs()[0].id;
    let mut fx = Output::default();
    let r = record(w.e.handle(Input::ExtendJob { job: id, by: Duration::from_secs(20) }, w.sim.now, &mut fx))
        .unwrap();
    assert_eq!(r.deadline, Some(id.root.start + 30 * S));
    assert!(fx.effects.is_empty() && matches!(fx.changes.as_slice(), [Change::Job(_)]));
    w.pass(20 * S);
    assert_eq!((w.changes(), w.kills().len()), (vec![], 0));
    w.pass(6 * S);
    assert_eq!(w.kills().len(), 1);
    let none = JobId { ordinal: 9, ..id };
    let e = record(w.e.handle(
        Input::ExtendJob { job: none, by: Duration::from_secs(1) },
        w.sim.now,
        &mut Output::default(),
    ));
    assert_eq!(e, Err(Refused::NoJob(none.to_string())));
}

pub(super) fn over(w: &mut World, root: Key, left: Result<&[Ref], &str>) {
    let mut fx = Output::default();
    let r = left.map(report);
    w.e.handle(
        Input::ProcessKillFinished {
            root,
            report: r.as_ref().map(Cow::Borrowed).map_err(|e| Cow::Borrowed(*e)),
        },
        w.sim.now,
        &mut fx,
    );
    w.answer(fx);
}

#[test]
fn survivors_outside_of_jobs_make_kill_failed_until_they_end() {
    let failing = |w: &World| {
        let all = w.e.alerts(false);
        all.into_iter().find(|a| a.kind == AlertKind::KillFailed)
    };
    let mut w = World::new("");
    let target = w.sim.spawn(1, "target");
    let child = w.sim.fork(target);
    w.drain();
    let root = w.sim.key(target);
    let who = [w.e.reference(root).unwrap(), w.e.reference(w.sim.key(child)).unwrap()];
    over(&mut w, root, Ok(&who));
    let a = failing(&w).unwrap();
    assert!(a.summary.contains("state D waiting in nfs_wait"), "{}", a.summary);
    assert_eq!((a.job, a.count, a.subject.as_ref().map(|p| p.id)), (None, 2, Some(root)));
    w.sim.end(target, 9);
    w.pass(S);
    assert!(failing(&w).is_some(), "the child survives");
    w.sim.end(child, 9);
    w.pass(S);
    assert_eq!((failing(&w), w.told().last().unwrap().0), (None, AlertChange::Resolved));
    // Who ended before the report came raises nothing.
    over(&mut w, root, Ok(&who));
    assert_eq!((failing(&w), w.changes().len()), (None, 0));

    // One that could not be carried out; the next one could.
    let target = w.sim.spawn(1, "target");
    w.drain();
    let root = w.sim.key(target);
    over(&mut w, root, Err("the map is full"));
    assert!(failing(&w).unwrap().summary.contains("the map is full"));
    over(&mut w, root, Ok(&[]));
    assert_eq!(failing(&w), None);
}
