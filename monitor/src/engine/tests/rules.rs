use super::*;
use crate::engine::forest::groups::DEPTH;
use crate::engine::turn::SECOND;

fn names(w: &World) -> Vec<String> {
    w.e.jobs().into_iter().map(|j| j.name).collect()
}

/// A record carries 1 KiB of argv, or none of it: /proc is asked for the rest before a rule says no, or yes.
#[test]
fn what_the_record_cut_is_read() {
    let mut w = World::new("[[job]]\nname = \"w\"\nmatch = { argv = \"--id 77$\" }");
    for (sent, whole) in
        [("long --id 7", "long --id 77"), ("", "long --id 77"), ("long --id 77", "long --id 777")]
    {
        let p = w.sim.spawn(1, whole);
        for e in &mut w.sim.ring {
            if let crate::model::event::Body::Exec { argv, argv_cut, .. } = &mut e.body {
                *argv = Box::leak(sent.replace(' ', "\0").into_bytes().into_boxed_slice());
                *argv_cut = true;
            }
        }
        w.drain();
        let shown = w.process(w.sim.key(p)).unwrap();
        assert_eq!(crate::model::outside::command_line(&shown.argv), whole);
        assert_eq!((shown.job.is_some(), shown.argv_cut), (whole.ends_with(" 77"), false), "{sent}");
    }
    // Gone before /proc could be asked: what is known decides, and it is marked.
    let p = w.sim.spawn(1, "long --id 77");
    if let Some(crate::model::event::Body::Exec { argv_cut, .. }) = w.sim.ring.last_mut().map(|e| &mut e.body)
    {
        *argv_cut = true;
    }
    let key = w.sim.key(p);
    w.sim.exit(p, 0);
    let gone = w.sim.procs.remove(&p).unwrap();
    let exit = w.sim.ring.pop().unwrap();
    w.drain();
    assert!(w.process(key).is_some_and(|p| p.argv_cut && p.job.is_some()));
    w.sim.procs.insert(p, gone);
    w.sim.ring.push(exit);
    w.drain();
}

#[test]
fn first_match_wins_and_the_same_rule_starts_no_second() {
    let mut w = World::new(
        "[[job]]\nname = \"one\"\nmatch = { argv = \"^make\" }\n[[job]]\nname = \"two\"\nmatch = { comm = \"^(make|cc)$\" }",
    );
    let make = w.sim.spawn(1, "make all");
    let sub = w.sim.spawn(make, "make sub");
    let cc = w.sim.spawn(sub, "cc -c x.c");
    w.drain();
    assert_eq!(names(&w), ["one", "two"]);
    let jobs = w.e.jobs_of(w.sim.key(cc));
    assert_eq!(jobs.iter().map(|j| j.ordinal).collect::<Vec<_>>(), [2, 1], "another rule nests");
    assert_eq!(w.e.jobs_of(w.sim.key(sub)).len(), 1);
}

#[test]
fn of_those_who_run_only_the_topmost_is_a_root() {
    let mut w = World::unsynced("[[job]]\nname = \"w\"\nmatch = { argv = \"worker\" }");
    let top = w.sim.spawn(1, "worker");
    let mid = w.sim.fork(top);
    let low = w.sim.spawn(mid, "other");
    let again = w.sim.spawn(low, "worker x");
    w.sim.ring.clear();
    w.sync();
    assert_eq!(names(&w), ["w"]);
    assert_eq!(w.e.jobs()[0].root, w.sim.key(top));
    assert_eq!(w.e.jobs_of(w.sim.key(again)).len(), 1);
    let label = w.labelled();
    assert_eq!(label, 1);
    assert!(w.e.job_records()[0].existing);
}

/// /proc of the top one answers after its child's, and after the scan has waited: the child is no root of its own.
#[test]
fn a_scan_waits_for_those_above() {
    let text = "[[job]]\nname = \"w\"\nmatch = { argv = \"worker\" }";
    for answers in [true, false] {
        let mut w = World::unsynced(text);
        let top = w.sim.spawn(1, "worker");
        let child = w.sim.fork(top);
        let other = w.sim.spawn(1, "worker");
        w.sim.ring.clear();
        w.slow.push(top);
        w.merge_unread();
        let mut fx = Output::default();
        w.e.handle(Input::Ready, w.sim.now, &mut fx);
        w.answer(fx);
        w.pass(5 * S);
        let key = w.sim.key(top);
        assert_eq!(w.e.jobs().len(), 1, "who has nobody to wait for is not held up");
        assert_eq!(w.e.jobs()[0].root, w.sim.key(other));
        if answers {
            w.at_last(key);
            assert_eq!(w.e.jobs_of(w.sim.key(child)), w.e.jobs_of(key));
        } else {
            w.pass(60 * S);
            assert!(w.e.jobs_of(key).is_empty());
        }
        assert_eq!(w.e.jobs_of(w.sim.key(child)).len(), 1, "and not for ever");
        assert_eq!(w.e.jobs().len(), 2);
    }
}

/// Its exec was lost and its fork was not: what it had from its forker is not taken for its own, and its child (heard of
/// by the snapshot alone) gets no job of its own before it.
#[test]
fn a_lost_exec_is_made_up_for_before_rules_are_tried() {
    let mut w = World::new("[[job]]\nname = \"w\"\nmatch = { argv = \"worker\" }");
    let top = w.sim.fork(1);
    w.drain();
    w.sim.exec(top, "worker");
    let child = w.sim.fork(top);
    w.sim.ring.clear();
    w.slow.push(top);
    w.merge_unread();
    assert!(w.e.jobs().is_empty());
    let key = w.sim.key(top);
    w.at_last(key);
    assert_eq!(w.e.jobs().len(), 1);
    assert_eq!(w.e.jobs()[0].root, key);
    assert_eq!(w.e.jobs_of(w.sim.key(child)), w.e.jobs_of(key));
    assert_eq!(w.process(key).unwrap().argv, ["worker"]);
}

#[test]
fn facts_are_asked_for_only_when_a_rule_has_come_that_far() {
    let mut w = World::new(
        "[[job]]\nname = \"c\"\nmatch = { comm = \"^job$\", cgroup = \"/docker/\", user = \"1000\" }",
    );
    let cgroup = Some(format!("/docker/{}", "a".repeat(64)));
    let no = w.sim.fork(1);
    let yes = w.sim.fork(1);
    w.facts
        .insert(yes, Facts { cgroup: cgroup.clone(), pid_ns: Some(5), ns_pid: Some(2), ..Facts::default() });
    w.sim.exec(no, "/bin/other");
    w.drain();
    assert_eq!(w.e.process(w.sim.key(no), 0).unwrap().cgroup, None, "never asked");
    w.sim.exec(yes, "/bin/job");
    let sibling = w.sim.spawn(1, "/bin/job");
    w.drain();
    assert_eq!(w.e.jobs().len(), 1);
    let p = w.process(w.sim.key(yes)).unwrap();
    assert_eq!(
        (p.container.unwrap().id.raw().len(), p.cgroup, p.pid_ns, p.ns_pid),
        (64, cgroup.map(Into::into), Some(5), Some(2))
    );
    assert!(w.e.jobs_of(w.sim.key(sibling)).is_empty());
}

#[test]
fn parent_is_who_forked_it_even_when_dead() {
    let mut w =
        World::new("[[job]]\nname = \"p\"\nmatch = { comm = \"^kid$\", parent = { exe = \"/bin/top$\" } }");
    let top = w.sim.spawn(1, "/bin/top");
    w.facts.insert(top, Facts { exe: Some(b"/usr/bin/top".to_vec()), ..Facts::default() });
    let kid = w.sim.fork(top);
    w.sim.exec(kid, "kid");
    let stranger = w.sim.spawn(1, "kid");
    w.drain();
    assert_eq!(w.e.jobs().len(), 1);
    assert_eq!(w.e.jobs()[0].root, w.sim.key(kid));
    assert!(w.e.jobs_of(w.sim.key(stranger)).is_empty());
}

#[test]
fn a_new_config_keeps_jobs_and_takes_new_rules() {
    let mut w = World::new("[[job]]\nname = \"a\"\nmatch = { argv = \"^a\" }\ntimeout = \"10s\"");
    w.sim.spawn(1, "a");
    w.sim.spawn(1, "b");
    w.pass(11 * S);
    assert_eq!(w.firing(), [AlertKind::JobTimeout]);
    let mut fx = Output::default();
    let new = "[[job]]\nname = \"b\"\nmatch = { argv = \"^b\" }\n\
               [[job]]\nname = \"a\"\nmatch = { argv = \"^a\" }\ntimeout = \"1h\"";
    w.e.handle(Input::Reload(Cow::Borrowed(&config(new))), w.sim.now, &mut fx);
    w.answer(fx);
    assert_eq!(names(&w), ["a", "b"]);
    assert_eq!(w.firing(), [], "the deadline has moved");
    let records = w.e.job_records();
    assert_eq!((records[0].id.ordinal, records[0].expired), (1, false), "its ID stays");
    assert_eq!(records[0].deadline, Some(records[0].started + 3600 * S));
    assert!(records[1].existing);
}

/// The kernel's walk over nested jobs has a bound; what is beyond it is said, not passed over.
#[test]
fn jobs_that_would_nest_too_deep() {
    let rules: String = (0..=DEPTH)
        .map(|i| format!("[[job]]\nname = \"r{i}\"\nmatch = {{ argv = \"^level {i}$\" }}\n"))
        .collect();
    let mut w = World::new(&rules);
    let mut at = 1;
    for i in 0..DEPTH {
        at = w.sim.spawn(at, &format!("level {i}"));
    }
    w.drain();
    assert_eq!((names(&w).len(), w.firing()), (DEPTH, vec![]));
    let last = w.sim.spawn(at, &format!("level {DEPTH}"));
    w.drain();
    assert_eq!(w.e.jobs_of(w.sim.key(last)).len(), DEPTH, "those around hold it");
    let told = w.told();
    let (_, alert) = told.iter().find(|(_, a)| a.kind == AlertKind::Capacity).unwrap();
    let key = w.sim.key(last).to_string();
    for part in [format!("Rule r{DEPTH} "), key, format!("{DEPTH} nested jobs")] {
        assert!(alert.summary.contains(&part), "{}", alert.summary);
    }
    let refused =
        |w: &World| w.e.gauges(w.sim.now).stores.into_iter().find(|s| s.store == "jobs").map(|s| s.evictions);
    assert_eq!(refused(&w), Some(1));
    // `exec` is told so, and starts nothing.
    let j = ExecJob {
        root: w.sim.key(last),
        name: "x".into(),
        supervisor: None,
        number: None,
        policy: w.e.rules.job(0, false).unwrap().policy,
    };
    let done = record(w.e.handle(Input::RegisterJob(Cow::Owned(j)), w.sim.now, &mut Output::default()));
    assert_eq!(done, Err(Refused::TooDeep(w.sim.key(last), DEPTH)));
    w.pass(11 * SECOND);
    assert_eq!(w.firing(), vec![], "it ends by itself");
}
