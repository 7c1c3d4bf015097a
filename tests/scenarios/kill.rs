//! Ending a whole job: against those who multiply, hide, ignore or change while they are ended; and never anybody else.
//! Beside each target stands a control family that must come through whole.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use jobwarden::contract::{AlertKind, AlertState, Job, KillReport};
use jobwarden_tests::truth::letter;
use jobwarden_tests::{Agent, Ground, Limit, Shape, eventually, ground, loudly, ms, pause, rounds, skip};
use rustix::process::Signal;

/// Rules for jobs by the first argument: `NAME TAG`.
fn rule(ground: &Ground, name: &str, argv: &str, more: &str) -> String {
    format!("[[job]]\nname = \"{name}\"\nmatch = {{ argv = \"{argv}.*{}\" }}\n{more}\n", ground.tag)
}

fn job(agent: &Agent<'_>, root: u32) -> Result<Job> {
    eventually("the job", ms(3000), || {
        agent
            .jobs()?
            .into_iter()
            .find(|j| j.root.pid == root)
            .with_context(|| format!("{root} is no job's root"))
    })
}

/// A family outside the job, alike but for its name.
fn control(ground: &Ground) -> Result<(Shape, [u32; 2])> {
    let mut s = Shape::start(ground, "setsid", &["control"])?;
    let family = [s.fact("child")?, s.fact("grandchild")?];
    Ok((s, family))
}

fn whole(mut control: (Shape, [u32; 2])) -> Result<()> {
    ensure!(control.0.ended()?.is_none(), "the control family's parent is gone");
    for pid in control.1 {
        ensure!(letter(pid).is_ok_and(|l| l != 'Z'), "{pid} of the control family is gone");
    }
    control.0.finish()?;
    Ok(())
}

/// Live processes of the test whose argv contains `name`.
fn alive(ground: &Ground, name: &str) -> Vec<i32> {
    let argv = |p: i32| std::fs::read(format!("/proc/{p}/cmdline")).unwrap_or_default();
    let named = |p: &i32| argv(*p).windows(name.len()).any(|w| w == name.as_bytes());
    ground.alive().into_iter().filter(named).collect()
}

/// One reading of /proc is no snapshot: a chain whose members fork and exit faster than it is read may be in none. So many
/// empty ones, one after the other, miss no chain.
const EMPTY_READINGS: u32 = 20;

fn all_gone(ground: &Ground, name: &str) -> Result<()> {
    eventually("nothing is left", ms(300), || {
        for reading in 1..=EMPTY_READINGS {
            let left = alive(ground, name);
            ensure!(left.is_empty(), "reading {reading}: {left:?}");
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        Ok(())
    })
}

#[test]
fn a_thousand_that_ignore_sigterm() -> Result<()> {
    let ground = ground!("a_thousand_that_ignore_sigterm");
    let agent = Agent::start(&ground, &rule(&ground, "crowd", "500", ""))?;
    let beside = control(&ground)?;
    let mut s = Shape::start(&ground, "stubborn", &["500"])?;
    s.facts::<u32>("ready", 500)?;
    let target = job(&agent, s.pid())?;
    let report: KillReport = agent.json(&["kill", "--grace", "500ms", &target.id.to_string()])?;
    all_gone(&ground, "stubborn")?;
    ensure!(report.survivors.is_empty(), "{:?}", report.survivors);
    loudly(&format!(
        "{} processes ended in {:.3} s, 0.5 s of it grace",
        report.signalled.len(),
        report.took_s
    ));
    // 0.2 s on a quiet machine.
    ensure!(report.took_s < ms(2000).as_secs_f64(), "{}", report.took_s);
    whole(beside)
}

#[test]
fn twenty_chains_that_fork_and_exit() -> Result<()> {
    let ground = ground!("twenty_chains_that_fork_and_exit");
    let Some(limit) = Limit::new(&ground, 500) else {
        skip!(
            "twenty_chains_that_fork_and_exit: no pids controller here, and the dead would use up the host's pids"
        );
    };
    let agent = Agent::start(&ground, &rule(&ground, "chains", "bomb chains", ""))?;
    let beside = control(&ground)?;
    let mut s = bomb(&ground, &limit, &["chains", "20", "20"])?;
    s.fact::<u32>("started")?;
    let target = job(&agent, s.pid())?;
    pause(300);
    let begun = Instant::now();
    let report: KillReport = agent.json(&["kill", "--grace", "200ms", &target.id.to_string()])?;
    all_gone(&ground, "chains")?;
    loudly(&format!("20 chains ended in {:.3} s", begun.elapsed().as_secs_f64()));
    ensure!(report.survivors.is_empty(), "{:?}", report.survivors);
    ensure!(begun.elapsed() < ms(2500), "{:?}", begun.elapsed());
    let probe = agent.metrics()?.one("jobwarden_probe_attached", &["sys_enter"])?;
    ensure!(probe < 0.5, "sys_enter is attached only while a job is doomed");
    whole(beside)
}

/// A bomb that is within the limit from its first instruction.
fn bomb(ground: &Ground, limit: &Limit, args: &[&str]) -> Result<Shape> {
    use std::os::unix::process::CommandExt as _;
    let mut c = ground.command(jobwarden_tests::ground::program("shape-bomb")?);
    c.args(args).arg(&ground.tag);
    let procs = limit.procs();
    // SAFETY: the child has one thread; open, write and close are all that happens.
    unsafe { c.pre_exec(move || std::fs::write(&procs, "0")) };
    Shape::spawn("bomb", c)
}

#[test]
fn a_fork_bomb() -> Result<()> {
    let ground = ground!("a_fork_bomb");
    let Some(limit) = Limit::new(&ground, 300) else {
        skip!("a_fork_bomb: no pids controller here, and without a limit no bomb is thrown");
    };
    let agent = Agent::start(&ground, &rule(&ground, "bomb", "bomb tree", ""))?;
    let beside = control(&ground)?;
    let mut s = bomb(&ground, &limit, &["tree", "300", "20"])?;
    s.fact::<u32>("started")?;
    let target = job(&agent, s.pid())?;
    pause(300);
    let begun = Instant::now();
    let report: KillReport = agent.json(&["kill", "--grace", "200ms", &target.id.to_string()])?;
    all_gone(&ground, "bomb")?;
    loudly(&format!(
        "a fork bomb of {} ended in {:.3} s",
        report.signalled.len(),
        begun.elapsed().as_secs_f64()
    ));
    ensure!(begun.elapsed() < ms(2500), "{:?}", begun.elapsed());
    drop(s);
    whole(beside)
}

fn mutants(ground: &Ground, n: u64) -> Result<()> {
    let agent = Agent::start(ground, &rule(ground, "mutants", "mutants", ""))?;
    let beside = control(ground)?;
    for round in 0..n {
        let mut s = Shape::start(ground, "mutants", &["4", "20"])?;
        s.fact::<u32>("started")?;
        let target = job(&agent, s.pid())?;
        std::thread::sleep(std::time::Duration::from_millis(round * 37 % 250));
        let report: KillReport = agent.json(&["kill", "--grace", "100ms", &target.id.to_string()])?;
        all_gone(ground, "mutants").with_context(|| format!("round {round} of {n}: {report:?}"))?;
        ensure!(report.survivors.is_empty(), "round {round}: {:?}", report.survivors);
    }
    loudly(&format!("{n} random families ended whole"));
    whole(beside)
}

#[test]
fn a_family_that_changes_while_it_is_ended() -> Result<()> {
    let ground = ground!("a_family_that_changes_while_it_is_ended");
    mutants(&ground, 5)
}

#[test]
#[ignore = "long: JWTEST_MUTANT_ROUNDS (100)"]
fn a_family_that_changes_every_time() -> Result<()> {
    let ground = ground!("a_family_that_changes_every_time");
    mutants(&ground, rounds("JWTEST_MUTANT_ROUNDS", 100))
}

#[test]
fn stopped_members_end_too() -> Result<()> {
    let ground = ground!("stopped_members_end_too");
    let agent = Agent::start(&ground, "")?;
    let mut s = Shape::start(&ground, "setsid", &["target"])?;
    let child: u32 = s.fact("child")?;
    s.fact::<u32>("grandchild")?;
    agent.process_when(child, "there", |_| true)?;
    ground.signal(child.cast_signed(), Signal::STOP)?;
    eventually("stopped", ms(1000), || {
        ensure!(letter(child)? == 'T', "it runs");
        Ok(())
    })?;
    let report: KillReport = agent.json(&["kill", "--grace", "2s", &s.pid().to_string()])?;
    // Not "target": the folder of the build may be called so, and the agent's own path with it.
    all_gone(&ground, "shape-setsid")?;
    ensure!(report.took_s < 1.5, "SIGCONT lets it take the stop signal: {}", report.took_s);
    Ok(())
}

#[test]
fn members_in_namespaces_of_their_own() -> Result<()> {
    let ground = ground!("members_in_namespaces_of_their_own");
    let agent = Agent::start(&ground, "")?;
    let beside = control(&ground)?;
    let mut s = Shape::start(&ground, "namespaces", &[])?;
    let init: u32 = match s.fact("init") {
        Ok(init) => init,
        Err(e) => skip!("members_in_namespaces_of_their_own: {e:#}"),
    };
    agent.process_when(init, "looked at", |p| p.ns_pid == Some(1))?;
    let report: KillReport = agent.json(&["kill", "--grace", "200ms", &s.pid().to_string()])?;
    all_gone(&ground, "namespaces")?;
    ensure!(report.survivors.is_empty() && report.spared.is_empty(), "{report:?}");
    whole(beside)
}

#[test]
fn what_cannot_die_is_named_with_its_tracer() -> Result<()> {
    let ground = ground!("what_cannot_die_is_named_with_its_tracer");
    let agent = Agent::start(&ground, "")?;
    let mut s = Shape::start(&ground, "traced", &[])?;
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
    let ground = ground!("the_protected_and_what_descends_from_them");
    let protect = format!("[enforcement]\nprotect = [{{ comm = \"^kept$\", argv = \"{}\" }}]\n", ground.tag);
    let agent = Agent::start(&ground, &protect)?;
    // A shell as the root; of its two children one is protected.
    let script = format!(
        "{0} kept {1} & echo kept=$!; {2} {1} & echo ended=$!; wait",
        jobwarden_tests::ground::program("shape-rename")?.display(),
        ground.tag,
        jobwarden_tests::ground::program("shape-setsid")?.display()
    );
    let mut c = ground.command("/bin/sh");
    // Background jobs of a shell have no stdin; they keep this one.
    c.args(["-c", &script.replace(" & ", " <&3 & ").replacen("", "exec 3<&0; ", 1), "sh", &ground.tag]);
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
            && x.outcome == jobwarden::contract::SignalledOutcome::Ended),
        "{report:?}"
    );
    ensure!(letter(kept).is_ok_and(|l| l != 'Z'), "the protected lives");
    ensure!(letter(ended).map_or(true, |l| l == 'Z'), "the other does not");
    drop(s);
    Ok(())
}

#[test]
fn nested_jobs() -> Result<()> {
    let ground = ground!("nested_jobs");
    let config = rule(&ground, "outer", "outer", "") + &rule(&ground, "inner", "shape-signal", "");
    let agent = Agent::start(&ground, &config)?;
    let script = format!(
        "exec 3<&0; {} 15 {} <&3 & echo inner=$!; wait",
        jobwarden_tests::ground::program("shape-signal")?.display(),
        ground.tag
    );
    let start = || -> Result<(Shape, u32)> {
        let mut c = ground.command("/bin/sh");
        c.args(["-c", &script, "outer", &ground.tag]);
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
        let left = alive(&ground, "shape-signal");
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
}

#[test]
fn the_client_inside_the_job_that_it_kills() -> Result<()> {
    let ground = ground!("the_client_inside_the_job_that_it_kills");
    let agent = Agent::start(&ground, &rule(&ground, "own", "own-job", ""))?;
    let script = format!(
        "exec 3<&0; {0} {1} <&3 >/dev/null & sleep 0.3; {2} --socket {3} --json kill --grace 500ms name:own >{4}; echo client=$?; wait",
        jobwarden_tests::ground::program("shape-setsid")?.display(),
        ground.tag,
        jobwarden_tests::ground::program("jobwarden")?.display(),
        agent.socket.display(),
        ground.path("report").display()
    );
    let mut c = ground.command("/bin/sh");
    c.args(["-c", &script, "own-job", &ground.tag]);
    let mut s = Shape::spawn("sh", c)?;
    ensure!(s.fact::<i32>("client")? == 0, "the client and its ancestors are spared");
    ensure!(s.wait(ms(5000))?.success(), "the shell above the client lives on");
    let report: KillReport = serde_json::from_slice(&std::fs::read(ground.path("report"))?)?;
    ensure!(report.spared.iter().any(|x| x.process.pid == s.pid()), "{report:?}");
    ensure!(alive(&ground, "shape-setsid").is_empty(), "the others are gone");
    Ok(())
}

#[test]
fn the_agent_inside_a_job_that_is_killed() -> Result<()> {
    let ground = ground!("the_agent_inside_a_job_that_is_killed");
    // The agent's ancestor is this test: a dry run of its own family must spare both.
    let agent = Agent::start(&ground, "")?;
    let report: KillReport = agent.json(&["kill", "--dry-run", &std::process::id().to_string()])?;
    for pid in [agent.pid(), std::process::id()] {
        ensure!(report.spared.iter().any(|x| x.process.pid == pid), "{pid} is not spared: {report:?}");
    }
    Ok(())
}

#[test]
fn the_fuse() -> Result<()> {
    let ground = ground!("the_fuse");
    let config = format!(
        "[enforcement]\nenabled = true\nmax_job_kills_per_minute = 2\n{}",
        rule(&ground, "late", "late", "timeout = \"300ms\"\non_timeout = \"kill\"\ngrace = \"100ms\"")
    );
    let agent = Agent::start(&ground, &config)?;
    let mut jobs = (0..3).map(|_| Shape::start(&ground, "setsid", &["late"])).collect::<Result<Vec<_>>>()?;
    let alert = eventually("enforcement-stopped", ms(5000), || {
        let all = agent.alerts(&[])?;
        let firing = |a: &jobwarden::contract::Alert| {
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
    let ground = ground!("orphans_are_ended_where_the_rule_says_so");
    let more = "orphan_after = \"300ms\"\non_orphan = \"kill\"\ngrace = \"200ms\"";
    let config = format!("[enforcement]\nenabled = true\n{}", rule(&ground, "incident", "incident", more));
    let agent = Agent::start(&ground, &config)?;
    let mut s = Shape::start(&ground, "incident", &[])?;
    let holder: u32 = s.fact("holder")?;
    // The orphan holds the worker's pipe: when it is ended, the worker reads the end and reaps.
    ensure!(s.fact::<i32>("status")? == 0, "the worker is free again");
    ensure!(s.ended()?.is_none(), "never the root");
    ensure!(letter(holder).map_or(true, |l| l == 'Z'), "the orphan is gone");
    let kills = agent.metrics()?.sum("jobwarden_job_kills_total", &["reason=\"orphan\""]);
    ensure!(kills >= 1.0, "{kills}");
    s.finish()?;
    Ok(())
}
