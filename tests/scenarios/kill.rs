//! Ending a whole job: against those who multiply, hide, ignore or change while they are ended; and never anybody else.
//! Beside each target stands a control family that must come through whole.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use jobwarden::model::schema::{AlertKind, AlertState, KillReport};
use jobwarden_tests::kill::{alive, all_gone, bomb, control, ended_by_lists, in_time, job, rule, whole};
use jobwarden_tests::truth::letter;
use jobwarden_tests::{Agent, Fixture, Limit, Shape, eventually, fixture, loudly, ms, pause, rounds, skip};
use rustix::process::Signal;

#[test]
fn a_thousand_that_ignore_sigterm() -> Result<()> {
    let fixture = fixture!("a_thousand_that_ignore_sigterm");
    // As many that the agent knows by its events as there are; the rest of the host is none of this.
    let agent = Agent::start(&fixture, &rule(&fixture, "crowd", "500", ""))?;
    let beside = control(&fixture)?;
    let mut s = Shape::start(&fixture, "stubborn", &["500"])?;
    let mut family = s.facts::<u32>("ready", 500)?;
    family.extend(s.facts::<u32>("child", 500)?);
    let target = job(&agent, s.pid())?;
    let report: KillReport = agent.json(&["kill", "--grace", "500ms", &target.id.to_string()])?;
    // Each of them, by its own number: no thread of it lives.
    let lives: Vec<u32> = family.iter().copied().filter(|&p| letter(p).is_ok_and(|l| l != 'Z')).collect();
    ensure!(lives.is_empty(), "{lives:?}");
    all_gone(&fixture, "stubborn")?;
    ensure!(report.survivors.is_empty(), "{:?}", report.survivors);
    let killed = report.signalled.iter().filter(|s| s.signal == "SIGKILL").count();
    loudly(&format!(
        "{} processes that ignore SIGTERM: none lives {:.3} s after the kill began, 0.5 s of it grace; {killed} by pidfd",
        family.len() + 1,
        report.took_s
    ));
    ensure!(family.len() == 1000);
    // 0.2 s after the grace on a quiet machine.
    ensure!(report.took_s < ms(2500).as_secs_f64(), "{}", report.took_s);
    whole(beside)
}

#[test]
fn twenty_chains_that_fork_and_exit() -> Result<()> {
    let fixture = fixture!("twenty_chains_that_fork_and_exit");
    let Some(limit) = Limit::new(&fixture, 500) else {
        skip!(
            "twenty_chains_that_fork_and_exit: no pids controller here, and the dead would use up the host's pids"
        );
    };
    let agent = Agent::start(&fixture, &rule(&fixture, "chains", "bomb chains", ""))?;
    let beside = control(&fixture)?;
    let mut s = bomb(&fixture, &limit, &["chains", "20", "20"])?;
    s.fact::<u32>("started")?;
    let target = job(&agent, s.pid())?;
    pause(300);
    let begun = Instant::now();
    let report: KillReport = agent.json(&["kill", "--grace", "200ms", &target.id.to_string()])?;
    let told = begun.elapsed();
    all_gone(&fixture, "chains")?;
    loudly(&format!(
        "20 chains ended {:.3} s after the kill began, {:.3} s after it was asked for",
        report.took_s,
        told.as_secs_f64()
    ));
    ensure!(report.survivors.is_empty(), "{:?}", report.survivors);
    in_time(&report, told)?;
    // Its zombie is this test's.
    drop(s);
    limit.empty()?;
    eventually("sys_enter is attached only while a job is doomed", ms(5000), || {
        ensure!(agent.metrics()?.one("jobwarden_probe_attached", &["sys_enter"])? < 0.5);
        Ok(())
    })?;
    whole(beside)
}

#[test]
fn a_fork_bomb() -> Result<()> {
    let fixture = fixture!("a_fork_bomb");
    let Some(limit) = Limit::new(&fixture, 300) else {
        skip!("a_fork_bomb: no pids controller here, and without a limit no bomb is thrown");
    };
    let agent = Agent::start(&fixture, &rule(&fixture, "bomb", "bomb tree", ""))?;
    let beside = control(&fixture)?;
    let throw = || -> Result<_> {
        let mut s = bomb(&fixture, &limit, &["tree", "300", "20"])?;
        s.fact::<u32>("started")?;
        let target = job(&agent, s.pid())?.id.to_string();
        pause(300);
        Ok((s, target))
    };
    let (s, target) = throw()?;
    let begun = Instant::now();
    let report: KillReport = agent.json(&["kill", "--grace", "200ms", &target])?;
    let told = begun.elapsed();
    all_gone(&fixture, "bomb")?;
    let signals = report.signalled.len();
    loudly(&format!(
        "a fork bomb ended by {signals} signals {:.3} s after the kill began, {:.3} s after it was asked for",
        report.took_s,
        told.as_secs_f64()
    ));
    in_time(&report, told)?;
    drop(s);
    limit.empty()?;
    // The same bomb against recursive kills one after the other, each by a list of the family.
    let (s, target) = throw()?;
    let by_list = ended_by_lists(&fixture, s.pid(), ms(3000))?;
    loudly(&by_list.map_or_else(
        || "the same bomb outlived 3 s of recursive kills by list".to_owned(),
        |t| format!("recursive kills by list took {:.3} s for the same bomb", t.as_secs_f64()),
    ));
    if by_list.is_none() {
        let _: KillReport = agent.json(&["kill", "--grace", "0s", &target])?;
        all_gone(&fixture, "bomb")?;
    }
    ensure!(by_list.is_none_or(|t| t.as_secs_f64() > report.took_s), "{by_list:?}: this shows nothing");
    drop(s);
    limit.empty()?;
    whole(beside)
}

/// Before the ground says what is left: it has the last word.
fn told(e: &anyhow::Error) {
    loudly(&format!("{e:#}"));
}

fn mutants(fixture: &Fixture, n: u64) -> Result<()> {
    let agent = Agent::start(fixture, &rule(fixture, "mutants", "mutants", ""))?;
    let beside = control(fixture)?;
    for round in 0..n {
        let mut s = Shape::start(fixture, "mutants", &["4", "20"])?;
        s.fact::<u32>("started")?;
        let target = job(&agent, s.pid())?;
        std::thread::sleep(std::time::Duration::from_millis(round * 37 % 250));
        let report: KillReport = agent.json(&["kill", "--grace", "100ms", &target.id.to_string()])?;
        all_gone(fixture, "mutants").with_context(|| format!("round {round} of {n}: {report:?}"))?;
        ensure!(report.survivors.is_empty(), "round {round}: {:?}", report.survivors);
    }
    loudly(&format!("{n} random families ended whole"));
    whole(beside)
}

#[test]
fn a_family_that_changes_while_it_is_ended() -> Result<()> {
    let fixture = fixture!("a_family_that_changes_while_it_is_ended");
    mutants(&fixture, 5).inspect_err(told)
}

#[test]
#[ignore = "long: JWTEST_MUTANT_ROUNDS (100)"]
fn a_family_that_changes_every_time() -> Result<()> {
    let fixture = fixture!("a_family_that_changes_every_time");
    mutants(&fixture, rounds("JWTEST_MUTANT_ROUNDS", 100)).inspect_err(told)
}

#[test]
fn stopped_members_end_too() -> Result<()> {
    let fixture = fixture!("stopped_members_end_too");
    let agent = Agent::start(&fixture, "")?;
    let mut s = Shape::start(&fixture, "setsid", &["target"])?;
    let child: u32 = s.fact("child")?;
    s.fact::<u32>("grandchild")?;
    agent.process_when(child, "there", |_| true)?;
    fixture.signal(child.cast_signed(), Signal::STOP)?;
    eventually("stopped", ms(1000), || {
        ensure!(letter(child)? == 'T', "it runs");
        Ok(())
    })?;
    let report: KillReport = agent.json(&["kill", "--grace", "2s", &s.pid().to_string()])?;
    // Not "target": the folder of the build may be called so, and the agent's own path with it.
    all_gone(&fixture, "shape-setsid")?;
    ensure!(report.took_s < 1.5, "SIGCONT lets it take the stop signal: {}", report.took_s);
    Ok(())
}

#[test]
fn members_in_namespaces_of_their_own() -> Result<()> {
    let fixture = fixture!("members_in_namespaces_of_their_own");
    let agent = Agent::start(&fixture, "")?;
    let beside = control(&fixture)?;
    let mut s = Shape::start(&fixture, "namespaces", &[])?;
    let init: u32 = match s.fact("init") {
        Ok(init) => init,
        Err(e) => skip!("members_in_namespaces_of_their_own: {e:#}"),
    };
    agent.process_when(init, "looked at", |p| p.ns_pid == Some(1))?;
    let report: KillReport = agent.json(&["kill", "--grace", "200ms", &s.pid().to_string()])?;
    all_gone(&fixture, "namespaces")?;
    ensure!(report.survivors.is_empty() && report.spared.is_empty(), "{report:?}");
    whole(beside)
}

#[test]
fn what_cannot_die_is_named_with_its_tracer() -> Result<()> {
    let fixture = fixture!("what_cannot_die_is_named_with_its_tracer");
    let agent = Agent::start(&fixture, "")?;
    let mut s = Shape::start(&fixture, "traced", &[])?;
    let (held, tracer): (u32, u32) = (s.fact("held")?, s.fact("tracer")?);
    agent.process_when(held, "there", |_| true)?;
    let out = agent.cli(&["--json", "kill", "--grace", "0s", &held.to_string()])?;
    ensure!(out.code() == Some(1), "a survivor is a failure: {out:?}");
    let report: KillReport = out.any_json()?;
    ensure!(report.survivors.iter().any(|r| r.pid == held), "{report:?}");
    let alert = eventually("kill-failed", ms(3000), || {
        let all = agent.alerts(&[])?;
        all.into_iter().find(|a| a.kind == AlertKind::KillFailed).context("no alert")
    })?;
    let text = serde_json::to_string(&alert)?;
    ensure!(text.contains(&tracer.to_string()), "the tracer is named: {text}");
    s.finish()?;
    Ok(())
}

#[test]
fn the_protected_and_what_descends_from_them() -> Result<()> {
    let fixture = fixture!("the_protected_and_what_descends_from_them");
    let protect = format!("[enforcement]\nprotect = [{{ comm = \"^kept$\", argv = \"{}\" }}]\n", fixture.tag);
    let agent = Agent::start(&fixture, &protect)?;
    // A shell as the root; of its two children one is protected.
    let script = format!(
        "{0} kept {1} & echo kept=$!; {2} {1} & echo ended=$!; wait",
        jobwarden_tests::fixture::program("shape-rename")?.display(),
        fixture.tag,
        jobwarden_tests::fixture::program("shape-setsid")?.display()
    );
    let mut c = fixture.command("/bin/sh");
    // Background jobs of a shell have no stdin; they keep this one.
    c.args(["-c", &script.replace(" & ", " <&3 & ").replacen("", "exec 3<&0; ", 1), "sh", &fixture.tag]);
    let mut s = Shape::spawn("sh", c)?;
    let (kept, ended): (u32, u32) = (s.fact("kept")?, s.fact("ended")?);
    s.step()?;
    agent.process_when(kept, "renamed", |p| p.comm == "kept")?;
    agent.process_when(ended, "there", |p| p.comm == "shape-setsid")?;
    let report: KillReport = agent.json(&["kill", "--grace", "500ms", &s.pid().to_string()])?;
    ensure!(report.spared.iter().any(|x| x.process.pid == kept), "{report:?}");
    ensure!(
        !report.signalled.iter().any(|x| x.process.pid == kept
            && x.signal == "SIGKILL"
            && x.outcome == jobwarden::model::schema::SignalledOutcome::Ended),
        "{report:?}"
    );
    ensure!(letter(kept).is_ok_and(|l| l != 'Z'), "the protected lives");
    ensure!(letter(ended).map_or(true, |l| l == 'Z'), "the other does not");
    drop(s);
    Ok(())
}

#[test]
fn nested_jobs() -> Result<()> {
    let fixture = fixture!("nested_jobs");
    let config = rule(&fixture, "outer", "outer", "") + &rule(&fixture, "inner", "shape-signal", "");
    let agent = Agent::start(&fixture, &config)?;
    let script = format!(
        "exec 3<&0; {} 15 {} <&3 & echo inner=$!; wait",
        jobwarden_tests::fixture::program("shape-signal")?.display(),
        fixture.tag
    );
    let start = || -> Result<(Shape, u32)> {
        let mut c = fixture.command("/bin/sh");
        c.args(["-c", &script, "outer", &fixture.tag]);
        let mut s = Shape::spawn("sh", c)?;
        let inner = s.fact("inner")?;
        s.fact::<u32>("child")?;
        Ok((s, inner))
    };
    let (mut s, inner) = start()?;
    let p = agent.process_when(inner, "in both jobs", |p| p.jobs.len() == 2)?;
    ensure!(p.jobs.last().is_some_and(|j| j.root.pid == s.pid()), "innermost first: {:?}", p.jobs);
    let inner_job = p.job.context("no job")?;
    let report: KillReport = agent.json(&["kill", "--grace", "1s", &inner_job.to_string()])?;
    ensure!(report.signalled.iter().all(|x| x.process.pid != s.pid()), "{report:?}");
    // The shell goes on, and ends because its child has.
    ensure!(s.wait(ms(3000))?.success(), "the outer job was left alone");
    let (mut s, inner) = start()?;
    let p = agent.process_when(inner, "in both jobs", |p| p.jobs.len() == 2)?;
    let outer_job = p.jobs.last().context("no job")?.to_string();
    let _: KillReport = agent.json(&["kill", "--grace", "1s", &outer_job])?;
    s.wait(ms(3000))?;
    eventually("the inner one went with it", ms(1000), || {
        let left = alive(&fixture, "shape-signal");
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
}

#[test]
fn the_client_inside_the_job_that_it_kills() -> Result<()> {
    let fixture = fixture!("the_client_inside_the_job_that_it_kills");
    let agent = Agent::start(&fixture, &rule(&fixture, "own", "own-job", ""))?;
    let script = format!(
        "exec 3<&0; {0} {1} <&3 >/dev/null & sleep 0.3; {2} --socket {3} --json kill --grace 500ms name:own >{4}; echo client=$?; wait",
        jobwarden_tests::fixture::program("shape-setsid")?.display(),
        fixture.tag,
        jobwarden_tests::fixture::program("jobwarden")?.display(),
        agent.socket.display(),
        fixture.path("report").display()
    );
    let mut c = fixture.command("/bin/sh");
    c.args(["-c", &script, "own-job", &fixture.tag]);
    let mut s = Shape::spawn("sh", c)?;
    ensure!(s.fact::<i32>("client")? == 0, "the client and its ancestors are spared");
    ensure!(s.wait(ms(5000))?.success(), "the shell above the client lives on");
    let report: KillReport = serde_json::from_slice(&std::fs::read(fixture.path("report"))?)?;
    ensure!(report.spared.iter().any(|x| x.process.pid == s.pid()), "{report:?}");
    ensure!(alive(&fixture, "shape-setsid").is_empty(), "the others are gone");
    Ok(())
}

#[test]
fn the_agent_inside_a_job_that_is_killed() -> Result<()> {
    let fixture = fixture!("the_agent_inside_a_job_that_is_killed");
    // The agent's ancestor is this test: a dry run of its own family must spare both.
    let agent = Agent::start(&fixture, "")?;
    let report: KillReport = agent.json(&["kill", "--dry-run", &std::process::id().to_string()])?;
    for pid in [agent.pid(), std::process::id()] {
        ensure!(report.spared.iter().any(|x| x.process.pid == pid), "{pid} is not spared: {report:?}");
    }
    Ok(())
}

#[test]
fn the_agent_inside_a_family_that_is_killed_in_earnest() -> Result<()> {
    let fixture = fixture!("the_agent_inside_a_family_that_is_killed_in_earnest");
    let (socket, state) = (fixture.path("sock"), fixture.path("state"));
    std::fs::write(fixture.path("config"), "")?;
    let jobwarden = jobwarden_tests::fixture::program("jobwarden")?;
    // A shell, which has two children: the agent, and a family that is to end.
    let script = format!(
        "exec 3<&0; {0} sibling {1} <&3 & echo sibling=$!; \
         {2} --socket {3} agent --no-pin --config {4} --state-dir {5} --listen 127.0.0.1:{6} & echo agent=$!; wait; read end <&3",
        jobwarden_tests::fixture::program("shape-setsid")?.display(),
        fixture.tag,
        jobwarden.display(),
        socket.display(),
        fixture.path("config").display(),
        state.display(),
        jobwarden_tests::agent::free_port()?,
    );
    let mut c = fixture.command("/bin/sh");
    c.args(["-c", &script, "sh", &fixture.tag]);
    let mut s = Shape::spawn("sh", c)?;
    let (sibling, agent): (u32, u32) = (s.fact("sibling")?, s.fact("agent")?);
    let run = |args: &[&str]| {
        let mut c = fixture.command(&jobwarden);
        c.arg("--socket").arg(&socket).arg("--json").args(args);
        jobwarden_tests::agent::run(c, ms(15_000))
    };
    eventually("the agent knows its sibling", ms(10_000), || {
        let out = run(&["tree", &sibling.to_string()])?;
        ensure!(out.code() == Some(0), "{out:?}");
        Ok(())
    })?;
    let report: KillReport = run(&["kill", "--grace", "200ms", &s.pid().to_string()])?.json()?;
    for (pid, why) in [(agent, "the agent"), (s.pid(), "an ancestor of the agent")] {
        let spared = report.spared.iter().find(|x| x.process.pid == pid);
        ensure!(spared.is_some_and(|x| x.why == why), "{pid}: {report:?}");
        ensure!(letter(pid)? != 'Z', "{pid} is gone: {report:?}");
        ensure!(!report.signalled.iter().any(|x| x.process.pid == pid), "{report:?}");
    }
    ensure!(report.survivors.is_empty(), "{report:?}");
    // The sibling with its child and grandchild.
    ensure!(report.signalled.iter().any(|x| x.process.pid == sibling), "{report:?}");
    ensure!(report.signalled.len() == 3, "{report:?}");
    for x in &report.signalled {
        ensure!(letter(x.process.pid).map_or(true, |l| l == 'Z'), "{x:?} lives");
    }
    // It is at work still, and ends as told.
    ensure!(run(&["status"])?.code() == Some(0), "it does not answer");
    fixture.signal(agent.cast_signed(), Signal::TERM)?;
    eventually("the agent's end", ms(5000), || {
        ensure!(letter(agent).map_or(true, |l| l == 'Z'), "it runs");
        Ok(())
    })?;
    s.finish()?;
    Ok(())
}

/// Only dry runs here, should it not be refused.
#[test]
fn pid_1_is_refused() -> Result<()> {
    let fixture = fixture!("pid_1_is_refused");
    let agent = Agent::start(&fixture, "")?;
    for more in [&["1"][..], &["--orphans", "1"], &["--grace", "0s", "1"]] {
        let mut args = vec!["--json", "kill", "--dry-run"];
        args.extend(more);
        let out = agent.cli(&args)?;
        ensure!(out.code() == Some(1), "{out:?}");
        let error = out.error()?;
        ensure!(error.code == "pid-1" && error.message.contains("nothing was done"), "{error:?}");
    }
    Ok(())
}

#[test]
fn the_fuse() -> Result<()> {
    let fixture = fixture!("the_fuse");
    let config = format!(
        "[enforcement]\nenabled = true\nmax_job_kills_per_minute = 2\n{}",
        rule(&fixture, "late", "late", "timeout = \"300ms\"\non_timeout = \"kill\"\ngrace = \"100ms\"")
    );
    let agent = Agent::start(&fixture, &config)?;
    let mut jobs = (0..3).map(|_| Shape::start(&fixture, "setsid", &["late"])).collect::<Result<Vec<_>>>()?;
    let alert = eventually("enforcement-stopped", ms(5000), || {
        let all = agent.alerts(&[])?;
        let firing = |a: &jobwarden::model::schema::Alert| {
            a.kind == AlertKind::EnforcementStopped && a.state == AlertState::Firing
        };
        all.into_iter().find(firing).context("no alert")
    })?;
    pause(500);
    let mut ended = 0;
    for s in &mut jobs {
        ended += usize::from(s.ended()?.is_some());
    }
    ensure!(ended == 2, "{ended} of 3 jobs were ended, the fuse allows 2");
    ensure!(agent.metrics()?.one("jobwarden_enforcement_fuse_open", &[])? > 0.5, "open");
    ensure!(agent.cli(&["enforcement", "on"])?.code() == Some(0), "enforcement on");
    eventually("closed again", ms(2000), || {
        ensure!(agent.metrics()?.one("jobwarden_enforcement_fuse_open", &[])? < 0.5, "open");
        ensure!(!agent.alerts(&[])?.iter().any(|a| a.id == alert.id), "the alert fires");
        Ok(())
    })
}

#[test]
fn orphans_are_ended_where_the_rule_says_so() -> Result<()> {
    let fixture = fixture!("orphans_are_ended_where_the_rule_says_so");
    let more = "orphan_after = \"300ms\"\non_orphan = \"kill\"\ngrace = \"200ms\"";
    let config = format!("[enforcement]\nenabled = true\n{}", rule(&fixture, "incident", "incident", more));
    let agent = Agent::start(&fixture, &config)?;
    let mut s = Shape::start(&fixture, "incident", &[])?;
    let holder: u32 = s.fact("holder")?;
    // The orphan holds the worker's pipe: when it is ended, the worker reads the end and reaps.
    ensure!(s.fact::<i32>("status")? == 0, "the worker is free again");
    ensure!(s.ended()?.is_none(), "never the root");
    // Its files are closed, which frees the worker, before it has become a zombie.
    eventually("the orphan is gone", ms(2000), || {
        ensure!(letter(holder).map_or(true, |l| l == 'Z'), "{:?}", letter(holder));
        Ok(())
    })?;
    // The worker may be free before the kill has been told of.
    eventually("the kill is counted", ms(5000), || {
        let kills = agent.metrics()?.sum("jobwarden_job_kills_total", &["reason=\"orphan\""]);
        ensure!(kills >= 1.0, "{kills}");
        Ok(())
    })?;
    s.finish()?;
    Ok(())
}
