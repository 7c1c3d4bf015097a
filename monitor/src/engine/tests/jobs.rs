use super::*;
use crate::model::kill::{Reason, What};
use crate::model::schema::JobState;
use crate::model::stats;
use crate::model::stats::Outcome;

fn policy() -> JobPolicy {
    JobPolicy {
        timeout_ns: None,
        zombie_after_ns: None,
        orphan_after_ns: Some(30 * S),
        kill_on_timeout: false,
        kill_on_orphan: false,
        kill_daemons: false,
        enforce_existing: false,
        stop_signal: 15,
        grace_ns: 10 * S,
        severity: None,
    }
}

fn exec_job(w: &mut World, root: u32, supervisor: Option<u32>, number: Option<u64>) -> JobRecord {
    let (root, supervisor) = (w.sim.key(root), supervisor.map(|s| w.sim.key(s)));
    let j = ExecJob { root, name: "x".into(), supervisor, number, policy: policy() };
    let mut fx = Output::default();
    let r = record(w.e.handle(Input::RegisterJob(Cow::Owned(j)), w.sim.now, &mut fx)).unwrap();
    w.answer(fx);
    r
}

#[test]
fn registered_before_its_fork_record_is_handled() {
    let mut w = World::new("");
    let sup = w.sim.spawn(1, "jobwarden exec");
    let root = w.sim.fork(sup);
    let key = w.sim.key(root);
    let r = exec_job(&mut w, root, Some(sup), Some(77));
    assert_eq!((r.number, r.id.ordinal, r.id.root), (77, 0, key));
    assert!(w.labelled() == 0, "the kernel has it already");
    assert_eq!(exec_job(&mut w, root, None, None), r, "a second time it is the same");
    let child = w.sim.fork(root);
    w.drain();
    assert_eq!(w.e.jobs_of(w.sim.key(child)), [r.id]);
    assert_eq!(w.process(key).unwrap().lineage_parent, Some(w.sim.key(sup)));
    assert_eq!(w.e.members(r.id).len(), 2);
    w.sim.end(root, 0);
    w.sim.end(child, 0);
    w.pass(2 * S);
    let g = w.e.gauges(w.sim.now);
    assert_eq!(g.jobs["x"].finished[&Outcome::Completed], 1);
    assert_eq!(g.jobs["x"].duration.count(), 1);
}

/// Names that come with `exec` are anybody's: gauges and counters show the same ones, so many at most, and not for ever.
#[test]
fn names_of_exec_jobs_are_bounded_and_go_when_they_are_idle() {
    const RULES: &str = "[[job]]\nname = \"stays\"\nmatch = { argv = \"^a\" }\n\
                         [[job]]\nname = \"goes\"\nmatch = { argv = \"^b\" }";
    let mut w = World::new(RULES);
    let sup = w.sim.spawn(1, "jobwarden exec");
    let total = stats::MAX_JOB_NAMES + 20;
    let mut roots = Vec::new();
    for i in 0..total {
        let root = w.sim.fork(sup);
        let j = ExecJob {
            root: w.sim.key(root),
            name: format!("x{i}"),
            supervisor: Some(w.sim.key(sup)),
            number: None,
            policy: policy(),
        };
        let mut fx = Output::default();
        record(w.e.handle(Input::RegisterJob(Cow::Owned(j)), w.sim.now, &mut fx)).unwrap();
        w.answer(fx);
        roots.push(root);
    }
    w.drain();
    let other = |w: &World| w.e.gauges(w.sim.now).jobs.get(stats::OTHER).cloned();
    let names = |w: &World| w.e.gauges(w.sim.now).jobs.into_keys().collect::<Vec<_>>();
    // Beside them: those outside of jobs, and those without a place.
    assert_eq!(names(&w).len(), stats::MAX_JOB_NAMES + 2);
    assert_eq!(
        other(&w).unwrap().states["running"],
        22,
        "the two rules have a place, so 198 of 220 have one"
    );
    let last = roots.pop().unwrap();
    for root in roots {
        w.sim.end(root, 0);
    }
    w.pass(3 * S);
    let o = other(&w).unwrap();
    assert_eq!((o.finished[&Outcome::Completed], o.states["running"], o.states["done"]), (21, 1, 21));
    assert_eq!(o.duration.count(), 21);
    let fewer = RULES.split_once("\n[[job]]\nname = \"goes").unwrap().0;
    let mut fx = Output::default();
    w.e.handle(Input::Reload(Cow::Borrowed(&config(fewer))), w.sim.now, &mut fx);
    assert!(names(&w).contains(&"goes".to_owned()), "the last of it is still to be scraped");
    // Remembered for a minute, idle for ten.
    w.pass(700 * S);
    assert_eq!(names(&w), ["", "_other", "stays"], "one that runs keeps the name that it is counted under");
    w.sim.end(last, 0);
    w.pass(700 * S);
    assert_eq!(names(&w), ["", "stays"]);
    assert_eq!(w.e.next_wake(), None, "nothing is left to be looked at");
}

#[test]
fn the_death_of_the_supervisor_ends_the_job() {
    let mut w = World::new("");
    let sup = w.sim.spawn(1, "jobwarden exec");
    let root = w.sim.fork(sup);
    w.drain();
    let r = exec_job(&mut w, root, Some(sup), None);
    w.sim.end(sup, 9);
    w.drain();
    let kills = w.kills();
    let [k] = kills.as_slice() else { panic!("{kills:?}") };
    assert_eq!(
        (k.job, k.reason, &k.what),
        (Some(r.id), Reason::Exec, &What::Whole),
        "though enforcement is off"
    );
}

/// An `exec` job with a deadline in 5 s and a grace of 2 s.
fn timed_exec_job(w: &mut World) -> (u32, JobRecord) {
    let sup = w.sim.spawn(1, "jobwarden exec");
    let root = w.sim.fork(sup);
    w.drain();
    let policy = JobPolicy { timeout_ns: Some(5 * S), grace_ns: 2 * S, ..policy() };
    let (root_key, supervisor) = (w.sim.key(root), Some(w.sim.key(sup)));
    let j = ExecJob { root: root_key, name: "x".into(), supervisor, number: None, policy };
    let mut fx = Output::default();
    let r = record(w.e.handle(Input::RegisterJob(Cow::Owned(j)), w.sim.now, &mut fx)).unwrap();
    w.answer(fx);
    (root, r)
}

#[test]
fn a_supervisor_that_does_not_act_on_the_deadline_is_not_waited_for() {
    let mut w = World::new("");
    let (_, r) = timed_exec_job(&mut w);
    w.pass(5 * S + S / 2);
    assert!(w.kills().is_empty(), "the supervisor has a second");
    w.pass(S);
    let kills = w.kills();
    let [k] = kills.as_slice() else { panic!("{kills:?}") };
    assert_eq!(
        (k.job, k.reason, &k.what),
        (Some(r.id), Reason::Exec, &What::Whole),
        "though enforcement is off"
    );
    assert_eq!((k.signal, k.grace), (15, Duration::from_secs(2)), "as the supervisor would have done it");
    let alert = &w.e.alerts(false)[0];
    assert_eq!(alert.kind, AlertKind::JobTimeout);
    w.pass(20 * S);
    assert!(w.kills().is_empty(), "once");
}

#[test]
fn a_deadline_that_the_supervisor_acts_on_or_that_moved_is_left_to_it() {
    let mut w = World::new("");
    let (root, r) = timed_exec_job(&mut w);
    w.pass(4 * S);
    let by = std::time::Duration::from_secs(10);
    record(w.e.handle(Input::ExtendJob { job: r.id, by }, w.sim.now, &mut Output::default())).unwrap();
    w.pass(8 * S);
    assert!(w.kills().is_empty(), "extended");
    w.pass(3 * S);
    // What `exec` asks for.
    w.e.handle(Input::KillStarted { job: r.id, reason: Reason::Exec }, w.sim.now, &mut Output::default());
    w.pass(3 * S);
    assert!(w.kills().is_empty() && w.e.alerts(false).is_empty(), "within the grace");
    w.sim.end(root, 15);
    w.pass(3 * S);
    assert!(w.kills().is_empty() && w.e.alerts(false).is_empty());
}

#[test]
fn a_job_around_those_who_already_run_and_nesting() {
    let mut w = World::new("[[job]]\nname = \"in\"\nmatch = { argv = \"^inner\" }");
    let a = w.sim.spawn(1, "a");
    let b = w.sim.spawn(a, "inner");
    let c = w.sim.fork(b);
    let d = w.sim.spawn(a, "d");
    w.drain();
    let inner = w.e.jobs()[0].id;
    let outer = exec_job(&mut w, a, None, None).id;
    assert_eq!(w.e.jobs_of(w.sim.key(c)), [inner, outer]);
    assert_eq!(w.e.jobs_of(w.sim.key(d)), [outer]);
    let record = w.e.job_record(inner).unwrap();
    assert_eq!(record.outer, w.e.job_record(outer).unwrap().number);
    let jobs = w.e.jobs();
    let of = |id| jobs.iter().find(|j| j.id == id).unwrap().processes;
    assert_eq!((of(inner), of(outer)), (2, 4));
    // The inner one ends: its members' end is told, the outer one goes on.
    w.sim.end(c, 0);
    w.sim.end(b, 0);
    w.pass(2 * S);
    let jobs = w.e.jobs();
    let state = |id| jobs.iter().find(|j| j.id == id).unwrap().state;
    assert_eq!((state(inner), state(outer)), (JobState::Done, JobState::Running));
    w.pass(70 * S);
    assert_eq!(w.e.jobs().len(), 1);
}

#[test]
fn zombies_do_not_keep_a_job() {
    let mut w = World::new("");
    let sh = w.sim.spawn(1, "sh");
    let root = w.sim.spawn(sh, "cmd");
    w.drain();
    let id = exec_job(&mut w, root, None, None).id;
    w.sim.die(root, 1 << 8);
    w.pass(2 * S);
    let job = &w.e.jobs()[0];
    assert_eq!((job.id, job.state, job.processes, job.zombies), (id, JobState::Done, 0, 1));
    w.pass(100 * S);
    assert_eq!(w.e.jobs().len(), 1, "the zombie still names it");
    let alert = &w.e.alerts(false)[0];
    assert_eq!((alert.kind, alert.job_name.as_str()), (AlertKind::Zombie, "x"));
    w.sim.reap(root);
    w.pass(70 * S);
    assert!(w.e.jobs().is_empty());
}

#[test]
fn targets() {
    let mut w = World::new("");
    let a = w.sim.spawn(1, "a");
    let b = w.sim.spawn(1, "b");
    w.drain();
    let ka = w.sim.key(a);
    let ja = exec_job(&mut w, a, None, None).id;
    let jb = exec_job(&mut w, b, None, None).id;
    assert_eq!(w.e.resolve(&a.to_string()), Ok(vec![Target::Process(ka)]));
    assert_eq!(w.e.resolve(&ka.to_string()), Ok(vec![Target::Process(ka)]));
    assert_eq!(w.e.resolve(&ja.to_string()), Ok(vec![Target::Job(ja)]));
    assert_eq!(w.e.resolve("name:x"), Ok(vec![Target::Job(ja), Target::Job(jb)]));
    assert_eq!(w.e.resolve("name:y"), Err(Refused::NoJob("name:y".into())));
    assert_eq!(w.e.resolve("4000"), Err(Refused::NoProcess("4000".into())));
    assert_eq!(w.e.resolve(&format!("{a}:5")), Err(Refused::NoProcess(format!("{a}:5"))));
    for bad in ["x", "", "j-1", "1:", "-1"] {
        assert_eq!(w.e.resolve(bad), Err(Refused::Target(bad.into())), "{bad}");
    }
}

#[test]
fn trees() {
    let mut w = World::new("");
    let a = w.sim.spawn(1, "a");
    let b = w.sim.spawn(a, "b");
    let c = w.sim.spawn(b, "c");
    let d = w.sim.spawn(a, "d");
    w.drain();
    let tree = |w: &World, q: TreeQuery| -> Vec<u32> {
        w.e.tree(&q, w.sim.now).unwrap().processes.iter().map(|p| p.pid).collect()
    };
    let of = |s: String| TreeQuery { of: Some(s), ..TreeQuery::default() };
    assert_eq!(tree(&w, of(b.to_string())), [1, a, b, c]);
    assert_eq!(tree(&w, TreeQuery::default()), [1, a, b, c, d]);
    let id = exec_job(&mut w, b, None, None).id;
    assert_eq!(tree(&w, of(id.to_string())), [1, a, b, c]);
    w.sim.die(d, 0);
    w.sim.end(b, 0);
    w.pass(S);
    assert_eq!(tree(&w, TreeQuery { zombies: true, ..TreeQuery::default() }), [1, a, d]);
    assert_eq!(tree(&w, TreeQuery { orphans: true, ..TreeQuery::default() }), [1, a, b, c]);
    assert_eq!(tree(&w, TreeQuery { uid: Some(7), ..TreeQuery::default() }), [0; 0]);
    assert!(w.e.tree(&of("77777".into()), 0).is_err());
}

#[test]
fn event_lines() {
    let mut w = World::new("");
    let a = w.sim.spawn(1, "/bin/a b");
    w.sim.signal(1, a, 9);
    w.sim.end(a, 9);
    let mut contexts = Vec::new();
    for e in std::mem::take(&mut w.sim.ring) {
        let context = w.e.event_context(&e);
        w.e.handle(Input::Record { event: &e, bytes: &[] }, 0, &mut Output::default());
        contexts.push((e, context));
    }
    // Told when the process is gone from the forest: what was known of it then is still there.
    assert!(w.e.reference(contexts[0].0.process).is_none());
    let lines: Vec<_> = contexts.iter().map(|(e, m)| w.e.event_line(e, m, None)).collect();
    let kinds: Vec<&str> = lines.iter().map(|l| l.kind.as_str()).collect();
    assert_eq!(kinds, ["fork", "exec", "signal", "exit", "reap"]);
    assert_eq!(lines[1].process.as_ref().unwrap().argv, ["/bin/a", "b"]);
    assert_eq!(lines[2].more["sender"]["pid"], 1);
    assert_eq!(lines[4].process.as_ref().unwrap().argv, ["/bin/a", "b"]);
    assert_eq!(lines[4].more["exit"]["signal"], "SIGKILL");
    assert_eq!(lines[4].more["exit"]["sender"]["pid"], 1);
}
