//! One scenario for each shape of a process's life: what the agent says is compared with what the kernel says
//! (`waitpid` in the helper program, /proc here).

use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use jobwarden::model::schema::{Exit, LineageKnown, Process, State};
use jobwarden_tests::truth::{exit_matches, forest_is_proc, letter, stat};
use jobwarden_tests::{Agent, Events, Fixture, Shape, eventually, fixture, ms, pause};

/// The exit that an `exit` event tells.
fn exit_of(events: &Events, pid: u32) -> Result<Exit> {
    let e = events.wait("exit", pid)?;
    let exit = e.more.get("exit").with_context(|| format!("no exit in {e:?}"))?;
    Ok(serde_json::from_value(exit.clone())?)
}

/// Fork, exit and reap were each seen once for this pid.
fn whole_life(events: &Events, pid: u32) -> Result<()> {
    eventually(&format!("reap of {pid}"), ms(15_000), || {
        let of = events.of(pid);
        for kind in ["fork", "exit", "reap"] {
            let n = of.iter().filter(|e| e.kind == kind).count();
            ensure!(n == 1, "{n} {kind} events: {of:?}");
        }
        Ok(())
    })
}

fn known(p: &Process, lineage_parent: u32) -> bool {
    p.lineage == LineageKnown::Known && p.lineage_parent.is_some_and(|k| k.pid == lineage_parent)
}

fn agent_and_events(fixture: &Fixture) -> Result<(Agent<'_>, Events)> {
    let agent = Agent::start(fixture, "")?;
    let events = Events::start(fixture, &agent)?;
    Ok((agent, events))
}

#[test]
fn fork() -> Result<()> {
    let fixture = fixture!("fork");
    let (agent, events) = agent_and_events(&fixture)?;
    let mut s = Shape::start(&fixture, "fork", &[])?;
    let (child, grandchild): (u32, u32) = (s.fact("child")?, s.fact("grandchild")?);
    let root = agent.process_when(s.pid(), "running", |p| p.state == State::Running)?;
    let middle = agent.process_when(child, "child of its parent", |p| known(p, root.pid))?;
    let last = agent.process_when(grandchild, "child of the child", |p| known(p, child))?;
    assert_eq!(middle.ppid, Some(root.pid));
    assert_eq!(last.ppid, Some(stat(grandchild)?.ppid));
    assert_eq!(last.lineage_parent, Some(middle.id));
    assert!(!last.orphan && !middle.orphan, "nobody's parent is dead");
    assert_eq!(last.argv, root.argv, "a fork has its parent's argv");
    assert!(root.argv.iter().any(|a| *a == fixture.tag), "{:?}", root.argv);
    let started = stat(grandchild)?.start_ticks;
    assert_eq!(last.id.start / 10_000_000, started, "the key's start is the kernel's");
    s.step()?;
    let (a, b): (i32, i32) = (s.fact("grandchild_status")?, s.fact("status")?);
    assert!(exit_matches(Some(&exit_of(&events, grandchild)?), a));
    assert!(exit_matches(Some(&exit_of(&events, child)?), b));
    whole_life(&events, child)?;
    whole_life(&events, grandchild)?;
    agent.gone(child)?;
    s.finish()?;
    Ok(())
}

/// Also where the kernel runs no probe while PID 1 is on the CPU, so that the records of most of these never come.
#[test]
fn what_pid_1_reaps_has_one_reap_event_each() -> Result<()> {
    let fixture = fixture!("what_pid_1_reaps_has_one_reap_event_each");
    let (_agent, events) = agent_and_events(&fixture)?;
    let out = fixture
        .command("/bin/sh")
        .args(["-c", "for i in 1 2 3 4 5 6 7 8 9 10; do sleep 0.3 & echo $!; done"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?
        .wait_with_output()?;
    let pids: Vec<u32> = String::from_utf8(out.stdout)?.lines().map(str::parse).collect::<Result<_, _>>()?;
    ensure!(pids.len() == 10, "{pids:?}");
    for pid in &pids {
        whole_life(&events, *pid)?;
    }
    // Time for a record that comes after the line.
    pause(3_000);
    let by_proc = pids.iter().filter(|p| {
        events.of(**p).iter().any(|e| e.kind == "reap" && e.more.get("source").is_some_and(|s| s == "proc"))
    });
    println!("{} of {} reaps were told from /proc", by_proc.count(), pids.len());
    for pid in pids {
        whole_life(&events, pid)?;
    }
    Ok(())
}

#[test]
fn vfork() -> Result<()> {
    let fixture = fixture!("vfork");
    let (agent, events) = agent_and_events(&fixture)?;
    let mut s = Shape::start(&fixture, "vfork", &[])?;
    let child: u32 = s.fact("child")?;
    let root = s.pid();
    agent.process_when(child, "child of its parent", |p| known(p, root) && p.ppid == Some(root))?;
    s.step()?;
    let status: i32 = s.fact("status")?;
    assert!(exit_matches(Some(&exit_of(&events, child)?), status));
    whole_life(&events, child)?;
    s.finish()?;
    Ok(())
}

#[test]
fn clone_parent() -> Result<()> {
    let fixture = fixture!("clone_parent");
    let (agent, events) = agent_and_events(&fixture)?;
    let mut s = Shape::start(&fixture, "clone-parent", &[])?;
    let (forker, sibling): (u32, u32) = (s.fact("forker")?, s.fact("sibling")?);
    let root = s.pid();
    let p = agent.process_when(sibling, "lineage by its forker", |p| known(p, forker))?;
    assert_eq!(p.ppid, Some(root), "its parent is the forker's parent");
    assert_eq!(stat(sibling)?.ppid, root);
    s.step()?;
    s.step()?;
    s.fact::<i32>("second_status")?;
    whole_life(&events, sibling)?;
    whole_life(&events, forker)?;
    s.finish()?;
    Ok(())
}

#[test]
fn a_clone_parent_child_is_no_orphan_while_its_given_parent_lives() -> Result<()> {
    let fixture = fixture!("a_clone_parent_child_is_no_orphan_while_its_given_parent_lives");
    let agent = Agent::start(&fixture, "")?;
    let mut s = Shape::start(&fixture, "clone-parent", &[])?;
    let (forker, sibling): (u32, u32) = (s.fact("forker")?, s.fact("sibling")?);
    agent.process_when(sibling, "there", |_| true)?;
    fixture.signal(forker.cast_signed(), rustix::process::Signal::KILL)?;
    s.fact::<i32>("first_status")?;
    agent.gone(forker)?;
    let p = agent.process(sibling)?;
    assert!(!p.orphan, "{p:?}");
    s.finish()?;
    Ok(())
}

#[test]
fn threads_are_no_processes() -> Result<()> {
    let fixture = fixture!("threads_are_no_processes");
    let (agent, events) = agent_and_events(&fixture)?;
    let mut s = Shape::start(&fixture, "threads", &["50"])?;
    let tids: String = s.fact("tids")?;
    assert_eq!(tids.split(',').count(), 50);
    let pid = s.pid();
    agent.process_when(pid, "running", |p| p.state == State::Running)?;
    s.finish()?;
    events.wait("exit", pid)?;
    let exits = events.of(pid).iter().filter(|e| e.kind.ends_with("exit")).count();
    assert_eq!(exits, 1, "one exit, of the group: {:?}", events.of(pid));
    for tid in tids.split(',').filter_map(|t| t.parse::<u32>().ok()) {
        let of = events.of(tid);
        let tag = fixture.tag.as_str().into();
        assert!(
            !of.iter().filter_map(|e| e.process.as_ref()).any(|p| p.argv.contains(&tag)),
            "{tid}: {of:?}"
        );
    }
    Ok(())
}

fn exec_of_a_thread(fixture: &Fixture, args: &[&str]) -> Result<()> {
    let (agent, events) = agent_and_events(fixture)?;
    let mut s = Shape::start(fixture, "exec-thread", args)?;
    let thread: u32 = s.fact("thread")?;
    let pid = s.pid();
    let want = if args.is_empty() { State::Running } else { State::LeaderExited };
    let before = agent.process_when(pid, "before its exec", |p| p.state == want)?;
    s.step()?;
    assert_eq!(s.fact::<u32>("after")?, pid);
    let after = agent.process_when(pid, "after its exec", |p| p.argv.iter().any(|a| a == "after"))?;
    assert_eq!(after.id, before.id, "the process is the same");
    assert_eq!(after.state, State::Running);
    assert!(agent.process(thread).is_err(), "the thread is no process");
    s.step()?;
    let status = s.wait(ms(5000))?;
    let exit = exit_of(&events, pid)?;
    assert!(exit_matches(Some(&exit), std::os::unix::process::ExitStatusExt::into_raw(status)), "{exit:?}");
    let of = events.of(pid);
    assert_eq!(of.iter().filter(|e| e.kind == "exit").count(), 1, "{of:?}");
    Ok(())
}

#[test]
fn exec_by_a_thread_that_is_not_the_leader() -> Result<()> {
    exec_of_a_thread(&fixture!("exec_by_a_thread_that_is_not_the_leader"), &[])
}

#[test]
fn exec_by_a_thread_whose_leader_has_exited() -> Result<()> {
    exec_of_a_thread(&fixture!("exec_by_a_thread_whose_leader_has_exited"), &["leader-gone"])
}

#[test]
fn leader_exit() -> Result<()> {
    let fixture = fixture!("leader_exit");
    let (agent, events) = agent_and_events(&fixture)?;
    let mut s = Shape::start(&fixture, "leader-exit", &[])?;
    let pid = s.pid();
    events.wait("leader-exit", pid)?;
    let p = agent.process_when(pid, "leader-exited", |p| p.state == State::LeaderExited)?;
    assert_eq!(p.kernel_state.as_deref(), Some("Z"), "as ps shows it");
    assert_eq!(letter(pid)?, 'Z');
    assert!(agent.metrics()?.one("jobwarden_processes", &["state=\"leader_exited\""])? >= 1.0);
    s.step()?;
    let status = s.wait(ms(5000))?;
    let raw = std::os::unix::process::ExitStatusExt::into_raw(status);
    whole_life(&events, pid)?;
    // The exit record may say the leader's status on older kernels; the reap record is final.
    let reap = events.wait("reap", pid)?;
    let exit: Exit = serde_json::from_value(reap.more.get("exit").context("no exit in reap")?.clone())?;
    assert!(exit_matches(Some(&exit), raw), "{exit:?}, waitpid said {raw:#x}");
    Ok(())
}

#[test]
fn zombie_and_its_late_reap() -> Result<()> {
    let fixture = fixture!("zombie_and_its_late_reap");
    let (agent, events) = agent_and_events(&fixture)?;
    let mut s = Shape::start(&fixture, "zombie", &["3"])?;
    let children: Vec<u32> = s.facts("child", 3)?;
    for &child in &children {
        let p = agent.process_when(child, "zombie", |p| p.state == State::Zombie)?;
        assert_eq!(p.ppid, Some(s.pid()));
        assert_eq!(p.exit, Some(Exit::Code { code: 3 }));
        assert_eq!(letter(child)?, 'Z');
    }
    assert!(agent.process(s.pid())?.children.len() >= 3);
    s.step()?;
    s.fact::<u32>("reaped")?;
    for &child in &children {
        agent.gone(child)?;
        whole_life(&events, child)?;
    }
    s.finish()?;
    Ok(())
}

#[test]
fn sigchld_ignored_leaves_no_zombie() -> Result<()> {
    let fixture = fixture!("sigchld_ignored_leaves_no_zombie");
    let (agent, events) = agent_and_events(&fixture)?;
    let mut s = Shape::start(&fixture, "autoreap", &[])?;
    let child: u32 = s.fact("child")?;
    agent.process_when(child, "running", |p| p.state == State::Running)?;
    s.step()?;
    assert_eq!(s.fact::<i32>("status")?, -1, "nobody can wait for it");
    assert_eq!(exit_of(&events, child)?, Exit::Code { code: 6 });
    if let Ok(p) = agent.process(child) {
        assert_eq!(p.state, State::Exiting, "the kernel reaps it by itself");
    }
    whole_life(&events, child)?;
    s.finish()?;
    Ok(())
}

#[test]
fn double_fork_daemon() -> Result<()> {
    let fixture = fixture!("double_fork_daemon");
    let (agent, events) = agent_and_events(&fixture)?;
    let mut s = Shape::start(&fixture, "daemon", &[])?;
    let (middle, daemon, adopter): (u32, u32, u32) =
        (s.fact("middle")?, s.fact("daemon")?, s.fact("adopter")?);
    let p = agent.process_when(daemon, "adopted", |p| p.orphan && p.adopter.is_some())?;
    assert_eq!(p.adopter.as_ref().map(|a| a.pid), Some(adopter));
    assert_eq!(p.ppid, Some(stat(daemon)?.ppid));
    assert!(known(&p, middle), "{p:?}");
    whole_life(&events, middle)?;
    let dead = agent.tree()?.processes.into_iter().find(|q| Some(q.id) == p.lineage_parent);
    let dead = dead.context("a dead ancestor stays while somebody descends from it")?;
    assert_eq!(dead.state, State::Gone);
    assert_eq!(dead.exit, Some(Exit::Code { code: 0 }));
    assert_eq!(dead.ppid, None);
    assert_eq!(dead.lineage_parent.map(|k| k.pid), Some(s.pid()));
    s.finish()?;
    agent.gone(daemon)?;
    Ok(())
}

#[test]
fn setsid_stays_in_the_job() -> Result<()> {
    let fixture = fixture!("setsid_stays_in_the_job");
    let config = format!("[[job]]\nname = \"session\"\nmatch = {{ argv = \"{}\" }}\n", fixture.tag);
    let agent = Agent::start(&fixture, &config)?;
    let mut s = Shape::start(&fixture, "setsid", &[])?;
    let (child, grandchild): (u32, u32) = (s.fact("child")?, s.fact("grandchild")?);
    let root = agent.process_when(s.pid(), "in a job", |p| p.job.is_some())?;
    for pid in [child, grandchild] {
        assert_ne!(stat(pid)?.session, stat(s.pid())?.session);
        let p = agent.process_when(pid, "in the job", |p| p.job == root.job)?;
        assert_eq!(p.jobs, root.jobs);
    }
    let jobs = agent.jobs()?;
    let job = jobs.iter().find(|j| j.root == root.id).context("no job")?;
    assert_eq!((job.name.as_str(), job.processes), ("session", 3));
    s.finish()?;
    Ok(())
}

#[test]
fn subreaper_adopts() -> Result<()> {
    let fixture = fixture!("subreaper_adopts");
    let (agent, _events) = agent_and_events(&fixture)?;
    let mut s = Shape::start(&fixture, "subreaper", &[])?;
    let (parent, grandchild): (u32, u32) = (s.fact("parent")?, s.fact("grandchild")?);
    agent.process_when(grandchild, "its parent's", |p| known(p, parent) && !p.orphan)?;
    s.step()?;
    assert_eq!(s.fact::<u32>("adopter")?, s.pid());
    let p = agent.process_when(grandchild, "adopted", |p| p.orphan && p.adopter.is_some())?;
    assert_eq!(p.adopter.as_ref().map(|a| a.pid), Some(s.pid()));
    assert_eq!(p.ppid, Some(stat(grandchild)?.ppid));
    assert!(known(&p, parent), "the lineage parent never changes");
    s.close();
    assert_eq!(s.fact::<i32>("grandchild_status")?, 0);
    s.wait(ms(5000))?;
    agent.gone(grandchild)?;
    Ok(())
}

#[test]
fn death_by_signal_names_its_sender() -> Result<()> {
    let fixture = fixture!("death_by_signal_names_its_sender");
    let (agent, events) = agent_and_events(&fixture)?;
    for number in ["15", "9"] {
        let mut s = Shape::start(&fixture, "signal", &[number])?;
        let child: u32 = s.fact("child")?;
        agent.process_when(child, "there", |_| true)?;
        s.step()?;
        let status: i32 = s.fact("status")?;
        let exit = exit_of(&events, child)?;
        assert!(exit_matches(Some(&exit), status), "{exit:?}");
        let Exit::Signal { sender, .. } = exit else { anyhow::bail!("{exit:?}") };
        let sender = sender.context("no sender")?;
        assert_eq!(sender.pid, s.pid());
        assert!(sender.argv.iter().any(|a| *a == fixture.tag), "{sender:?}");
        let seen = events.wait("signal", child)?;
        assert!(seen.more.contains_key("signal"), "{seen:?}");
        s.finish()?;
    }
    Ok(())
}

#[test]
fn core_flag() -> Result<()> {
    let fixture = fixture!("core_flag");
    let (_agent, events) = agent_and_events(&fixture)?;
    let mut s = Shape::start(&fixture, "core", &[])?;
    let child: u32 = s.fact("child")?;
    let status: i32 = s.fact("status")?;
    let exit = exit_of(&events, child)?;
    assert!(exit_matches(Some(&exit), status), "{exit:?}, waitpid said {status:#x}");
    s.finish()?;
    if !libc::WCOREDUMP(status) {
        jobwarden_tests::skip!(
            "core_flag: this host dumps no core (kernel.core_pattern); flag off compared only"
        );
    }
    Ok(())
}

#[test]
fn a_process_that_lives_under_a_millisecond() -> Result<()> {
    let fixture = fixture!("a_process_that_lives_under_a_millisecond");
    let (_agent, events) = agent_and_events(&fixture)?;
    let given = ["true", "one two", "", "--three=4", "ünï"];
    let mut args = vec!["--"];
    args.extend(given);
    let mut s = Shape::start(&fixture, "brief", &args)?;
    s.step()?;
    let child: u32 = s.fact("child")?;
    let exec = events.wait("exec", child)?;
    let process = exec.process.context("no process")?;
    assert_eq!(process.argv, [&given[..], &[&fixture.tag]].concat(), "argv whole");
    assert_eq!(process.comm, "true");
    assert_eq!(exit_of(&events, child)?, Exit::Code { code: 0 });
    whole_life(&events, child)?;
    s.finish()?;
    Ok(())
}

#[test]
fn rename_by_prctl() -> Result<()> {
    let fixture = fixture!("rename_by_prctl");
    let agent = Agent::start(&fixture, "")?;
    let mut s = Shape::start(&fixture, "rename", &["new-name"])?;
    s.fact::<u32>("ready")?;
    agent.process_when(s.pid(), "old name", |p| p.comm == "shape-rename")?;
    s.step()?;
    s.fact::<String>("renamed")?;
    let p = agent.process_when(s.pid(), "new name", |p| p.comm == "new-name")?;
    assert_eq!(stat(s.pid())?.comm.bytes(), p.comm.raw().as_bytes());
    s.finish()?;
    Ok(())
}

#[test]
fn already_running_before_the_agent() -> Result<()> {
    let fixture = fixture!("already_running_before_the_agent");
    let mut s = Shape::start(&fixture, "setsid", &[])?;
    let (child, grandchild): (u32, u32) = (s.fact("child")?, s.fact("grandchild")?);
    let mut d = Shape::start(&fixture, "daemon", &[])?;
    let daemon: u32 = d.fact("daemon")?;
    let mut z = Shape::start(&fixture, "zombie", &[])?;
    let zombie: u32 = z.fact("child")?;
    z.fact::<u32>("dead")?;
    let config = format!("[[job]]\nname = \"earlier\"\nmatch = {{ argv = \"setsid {}\" }}\n", fixture.tag);
    let agent = Agent::start(&fixture, &config)?;
    let root =
        agent.process_when(s.pid(), "in a job: a rule matches those who already run", |p| p.job.is_some())?;
    assert!(root.argv.iter().any(|a| *a == fixture.tag), "{root:?}");
    for pid in [child, grandchild] {
        assert_eq!(
            agent.process(pid)?.job,
            root.job,
            "the family is labelled, and only the topmost is a root"
        );
    }
    assert_eq!(agent.jobs()?.len(), 1);
    assert_eq!(agent.process(child)?.ppid, Some(s.pid()));
    let p = agent.process(daemon)?;
    assert_eq!(p.lineage, LineageKnown::Unknown, "orphaned before the agent started: never guessed");
    assert_eq!(agent.process(zombie)?.state, State::Zombie);
    forest_is_proc(&agent)?;
    for x in [s, d, z] {
        x.finish()?;
    }
    Ok(())
}

#[test]
fn a_chain_of_forkers_keeps_its_root() -> Result<()> {
    let fixture = fixture!("a_chain_of_forkers_keeps_its_root");
    let config = format!("[[job]]\nname = \"chain\"\nmatch = {{ argv = \"{}\" }}\n", fixture.tag);
    let agent = Agent::start(&fixture, &config)?;
    let mut s = Shape::start(&fixture, "chain", &["200"])?;
    let (last, root): (u32, u32) = (s.fact("last")?, s.pid());
    // The root is this test's own child: nobody else reaps it.
    s.wait(ms(5000))?;
    let p = agent.process_when(last, "in the job of a root 200 generations away", |p| p.job.is_some())?;
    assert_eq!(p.job.map(|j| j.root.pid), Some(root));
    // At most 64 dead ancestors a chain: the root and the nearest.
    eventually("few of the dead are kept", ms(30_000), || {
        let tree = agent.tree()?;
        let kept = tree.processes.iter().filter(|q| q.jobs == p.jobs && q.state == State::Gone).count();
        // Until its adopter reaps it, a dead one is a zombie.
        ensure!(tree.processes.iter().all(|q| q.jobs != p.jobs || q.state != State::Zombie), "zombies");
        ensure!((1..=65).contains(&kept), "{kept} dead ancestors");
        ensure!(tree.processes.iter().any(|q| q.pid == root), "the root is kept");
        Ok(())
    })?;
    s.finish()?;
    agent.gone(last)?;
    Ok(())
}

#[test]
fn a_pid_used_twice_is_two_processes() -> Result<()> {
    let fixture = fixture!("a_pid_used_twice_is_two_processes");
    let (agent, events) = agent_and_events(&fixture)?;
    let mut s = Shape::start(&fixture, "reuse", &["5"])?;
    for round in 1..=5 {
        let pid = *s.facts::<u32>("pid", round)?.last().context("no pid")?;
        let p = agent.process_when(pid, "the second is running", |p| p.state == State::Running)?;
        let of = events.of(pid);
        let first = of.iter().find(|e| e.kind == "exit" && e.process.as_ref().is_some_and(|q| q.id != p.id));
        assert!(first.is_some(), "the first one's exit is not the second's: {of:?}");
        s.step()?;
        assert_eq!(*s.facts::<i32>("second_status", round)?.last().context("no status")?, 12 << 8);
        agent.gone(pid)?;
    }
    s.finish()?;
    Ok(())
}

#[test]
fn argv_is_never_raw_on_the_terminal() -> Result<()> {
    use std::os::unix::ffi::OsStrExt as _;
    let fixture = fixture!("argv_is_never_raw_on_the_terminal");
    let agent = Agent::start(&fixture, "")?;
    let nasty = std::ffi::OsStr::from_bytes(b"\x1b[31mred\nline\xff\x07");
    let mut c = fixture.command(jobwarden_tests::fixture::program("shape-setsid")?);
    c.arg(nasty).arg(&fixture.tag);
    let mut s = Shape::spawn("setsid", c)?;
    s.fact::<u32>("grandchild")?;
    let pid = s.pid().to_string();
    let p = agent.process(s.pid())?;
    assert!(p.argv.iter().any(|a| a.raw().contains("\\xff")), "bytes as \\xNN: {:?}", p.argv);
    for args in [vec!["tree", &pid], vec!["tree"], vec!["why", &pid], vec!["kill", "--dry-run", &pid]] {
        let out = agent.cli(&args)?;
        for text in [&out.stdout, &out.stderr] {
            let raw = text.iter().find(|&&b| b < 0x20 && b != b'\n' && b != b'\t' || b == 0x7f);
            assert_eq!(raw, None, "{args:?} printed control characters: {}", out.out());
        }
        assert!(!out.out().lines().any(|l| l.starts_with("line")), "{args:?}: a raw newline of argv");
    }
    s.finish()?;
    Ok(())
}
