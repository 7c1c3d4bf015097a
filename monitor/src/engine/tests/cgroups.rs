use super::*;

/// Answers the reads of cgroups among what came out, and says whose they were. `by_id`: as on a host with v2 alone.
fn read(w: &mut World, path: &str, by_id: bool) -> Vec<u32> {
    let mut pids = Vec::new();
    let mut fx = Output::default();
    for f in std::mem::take(&mut w.out) {
        if let Effect::ReadCgroup { key, id } = f {
            pids.push(key.pid);
            let o = Observation::Cgroup { key, id, cgroup: Some(path.into()), by_id };
            w.e.handle(Input::Observation(Cow::Owned(o)), w.sim.now, &mut fx);
        }
    }
    w.answer(fx);
    pids
}

fn cgroup(w: &World, pid: u32) -> Option<String> {
    w.process(w.sim.key(pid))?.cgroup.map(crate::model::outside::OutsideText::into_raw)
}

#[test]
fn a_cgroup_is_read_once_and_known_from_the_exec_on() {
    let mut w = World::new("");
    let path = format!("/system.slice/docker-{}.scope", "a".repeat(64));
    let shim = w.sim.spawn(1, "shim");
    w.sim.cgroup = 77;
    let a = w.sim.spawn(shim, "a");
    let b = w.sim.spawn(a, "b");
    w.drain();
    assert_eq!(cgroup(&w, a), None, "not guessed while it is asked for");
    assert_eq!(read(&mut w, &path, true), [a], "one read for both");
    let c = w.sim.spawn(shim, "c");
    w.drain();
    assert_eq!(read(&mut w, "/wrong", true), [0; 0]);
    for pid in [a, b, c] {
        assert_eq!(cgroup(&w, pid).as_deref(), Some(path.as_str()));
        let container = w.process(w.sim.key(pid)).unwrap().container.unwrap();
        assert_eq!(container.runtime.as_deref(), Some("docker"));
    }
    // A child is where its forker is, until it execs elsewhere.
    let d = w.sim.fork(c);
    w.drain();
    assert_eq!(cgroup(&w, d).as_deref(), Some(path.as_str()));
    w.sim.cgroup = 78;
    w.sim.exec(d, "d");
    w.drain();
    assert_eq!(cgroup(&w, d), None);
    assert_eq!(read(&mut w, "/elsewhere", true), [d]);
    assert_eq!(cgroup(&w, d).as_deref(), Some("/elsewhere"));
}

/// The answer is slower than the forks: they are where their forker was, dead or alive; who has execed is asked for itself.
#[test]
fn who_was_forked_before_the_answer_has_it_too() {
    let mut w = World::new("");
    w.sim.cgroup = 1;
    let a = w.sim.spawn(1, "a");
    let child = w.sim.fork(a);
    let grandchild = w.sim.fork(child);
    w.sim.exit(child, 0);
    let other = w.sim.spawn(a, "other");
    w.drain();
    assert_eq!(read(&mut w, "/a", false), [a]);
    for pid in [a, child, grandchild] {
        assert_eq!(cgroup(&w, pid).as_deref(), Some("/a"));
    }
    assert_eq!(cgroup(&w, other), None);
}

#[test]
fn where_the_id_does_not_tell_each_is_read() {
    let mut w = World::new("");
    w.sim.cgroup = 1;
    let a = w.sim.spawn(1, "a");
    let b = w.sim.spawn(1, "b");
    w.drain();
    assert_eq!(read(&mut w, "/a", false), [a]);
    assert_eq!(cgroup(&w, b), None, "another's path is not taken over");
    assert_eq!(read(&mut w, "/b", false), [b]);
    assert_eq!((cgroup(&w, a).as_deref(), cgroup(&w, b).as_deref()), (Some("/a"), Some("/b")));
    let c = w.sim.spawn(1, "c");
    w.drain();
    assert_eq!(read(&mut w, "/c", false), [c]);
    // Not without bound: 10,000 execs in one moment are not all read.
    for _ in 0..10_000 {
        w.sim.spawn(1, "x");
    }
    w.drain();
    let mut reads = 0;
    while let n @ 1.. = read(&mut w, "/x", false).len() {
        reads += n;
    }
    assert!(reads < 1_000, "{reads}");
}

#[test]
fn a_rule_on_a_container_matches_by_the_record_alone() {
    let mut w = World::new("[[job]]\nname = \"c\"\nmatch = { container = \"aaaa\" }");
    let path = format!("/docker/{}", "a".repeat(64));
    w.sim.cgroup = 77;
    let first = w.sim.spawn(1, "first");
    w.facts.insert(first, Facts { cgroup: Some(path.clone()), ..Facts::default() });
    w.drain();
    read(&mut w, &path, true);
    assert_eq!(w.e.jobs().len(), 1, "by facts, since the id was unknown");
    // No facts of this one: /proc would know nothing of it any more.
    let second = w.sim.spawn(1, "second");
    w.drain();
    assert_eq!(w.e.jobs_of(w.sim.key(second)).len(), 1);
}

#[test]
fn a_child_has_its_own_pid_inside() {
    let mut w = World::new("[[job]]\nname = \"c\"\nmatch = { exe = \"init\" }");
    let init = w.sim.fork(1);
    let inside =
        |n| Facts { exe: Some(b"/init".to_vec()), pid_ns: Some(5), ns_pid: Some(n), ..Facts::default() };
    w.facts.insert(init, inside(1));
    w.sim.exec(init, "/init");
    let child = w.sim.fork(init);
    w.drain();
    let p = w.process(w.sim.key(init)).unwrap();
    assert_eq!((p.pid_ns, p.ns_pid), (Some(5), Some(1)));
    let p = w.process(w.sim.key(child)).unwrap();
    assert_eq!((p.pid_ns, p.ns_pid), (None, None), "unknown until it is read");
}

#[test]
fn an_alert_has_the_container_among_its_labels() {
    let mut w = World::new("[zombies]\nafter = \"500ms\"");
    let parent = w.sim.spawn(1, "parent");
    let id = "a".repeat(64);
    let child = w.sim.spawn(parent, "child");
    for pid in [parent, child] {
        let cgroup = Some(format!("/docker/{id}"));
        w.facts.insert(pid, Facts { cgroup, pid_ns: Some(5), ns_pid: Some(1), ..Facts::default() });
    }
    w.drain();
    w.sim.die(child, 0);
    w.pass(2 * S);
    let fired: Vec<Alert> =
        w.told().into_iter().filter(|(c, _)| *c == AlertChange::Fired).map(|(_, a)| a).collect();
    assert_eq!(fired.len(), 1);
    assert_eq!(fired[0].labels.get("container"), Some(&id));
    assert_eq!(fired[0].subject.as_ref().unwrap().ns_pid, Some(1));
    let init = format!("init of container {}, does not reap", &id[..12]);
    assert!(fired[0].summary.contains(&init), "{}", fired[0].summary);
}
