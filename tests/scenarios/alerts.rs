//! Alerts on the running kernel: what fires, about whom, how soon, and that it ends when cured.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use jobwarden::model::schema::{Alert, AlertKind, AlertState, Cause, Evidence, State, Verdict};
use jobwarden_tests::{Agent, Fixture, Shape, eventually, fixture, ms, pause, promised};

/// The firing alert of this kind whose subject is this process.
fn firing(agent: &Agent<'_>, kind: AlertKind, subject: u32) -> Result<Alert> {
    let all = agent.alerts(&[])?;
    let found = all.iter().find(|a| {
        a.kind == kind
            && a.state == AlertState::Firing
            && a.subject.as_ref().is_some_and(|p| p.pid == subject)
    });
    found.cloned().with_context(|| format!("no {kind} alert about {subject} among {all:?}"))
}

/// Waits for the alert and checks when it came: not before `after` milliseconds (the config's, so the same on a slow machine),
/// and at most a second later.
fn fires(agent: &Agent<'_>, kind: AlertKind, subject: u32, since: Instant, after: u64) -> Result<Alert> {
    let after = Duration::from_millis(after);
    let alert = eventually("alert", after + ms(5000), || firing(agent, kind, subject))?;
    let took = since.elapsed();
    // `since` is when the test knew; the kernel knew a little before.
    ensure!(took + Duration::from_millis(200) >= after, "it fired after {took:?}, before its {after:?}");
    let late = promised("an alert fires at most 1 s after its timeout", 1000);
    ensure!(took <= after + late, "it fired after {took:?}, its timeout is {after:?}");
    Ok(alert)
}

/// Waits until no alert with this id fires; at most a second.
fn resolves(agent: &Agent<'_>, id: &str, cured: Instant) -> Result<()> {
    eventually("resolved", ms(5000), || {
        let left = agent.alerts(&[])?;
        ensure!(!left.iter().any(|a| a.id == id && a.state == AlertState::Firing), "{left:?}");
        Ok(())
    })?;
    let took = cured.elapsed();
    let late = promised("an alert resolves at most 1 s after the cure", 1000);
    ensure!(took <= late, "resolved {took:?} after the cure");
    let past = agent.alerts(&["--history"])?;
    let gone = past.iter().find(|a| a.id == id).context("no history of it")?;
    ensure!(gone.state == AlertState::Resolved && gone.resolved_at.is_some(), "{gone:?}");
    Ok(())
}

fn rule(fixture: &Fixture, name: &str, more: &str) -> String {
    format!("[[job]]\nname = \"{name}\"\nmatch = {{ argv = \"{}\" }}\n{more}\n", fixture.tag)
}

#[test]
fn zombie_alert_names_the_parent() -> Result<()> {
    let fixture = fixture!("zombie_alert_names_the_parent");
    let agent = Agent::start(&fixture, "[zombies]\nafter = \"700ms\"\n")?;
    let mut s = Shape::start(&fixture, "zombie", &["3"])?;
    s.fact::<u32>("dead")?;
    let since = Instant::now();
    let alert = fires(&agent, AlertKind::Zombie, s.pid(), since, 700)?;
    assert_eq!(alert.count, 3, "one alert for the parent, however many zombies");
    let kind = alert.labels.get("alertname").map(String::as_str);
    assert_eq!(kind, Some("JobwardenZombie"));
    assert_eq!(alert.labels.get("alert_id"), Some(&alert.id));
    assert_eq!(alert.id.len(), 16);
    assert!(alert.summary.contains(&s.pid().to_string()), "{}", alert.summary);
    assert!(agent.metrics()?.one("jobwarden_alerts", &["kind=\"zombie\"", "state=\"firing\""])? >= 1.0);
    assert!(agent.metrics()?.one("jobwarden_unreaping_parents", &[])? >= 1.0);
    let why: Cause = agent.json(&["why", &alert.id])?;
    assert_eq!(why.alert.as_deref(), Some(alert.id.as_str()));
    s.step()?;
    s.fact::<u32>("reaped")?;
    resolves(&agent, &alert.id, Instant::now())?;
    s.finish()?;
    Ok(())
}

#[test]
fn the_zombies_innermost_job_decides_the_timeout() -> Result<()> {
    let fixture = fixture!("the_zombies_innermost_job_decides_the_timeout");
    let config =
        format!("[zombies]\nafter = \"1h\"\n{}", rule(&fixture, "quick", "zombie_after = \"400ms\""));
    let agent = Agent::start(&fixture, &config)?;
    let mut s = Shape::start(&fixture, "zombie", &[])?;
    s.fact::<u32>("dead")?;
    let alert = fires(&agent, AlertKind::Zombie, s.pid(), Instant::now(), 400)?;
    assert_eq!(alert.job_name, "quick");
    // The parent dies: init reaps what it left.
    s.kill()?;
    eventually("resolved", ms(8000), || {
        ensure!(
            firing(&agent, AlertKind::Zombie, alert.subject.as_ref().map_or(0, |p| p.pid)).is_err(),
            "fires"
        );
        Ok(())
    })
}

#[test]
fn orphan_alert_names_job_and_adopter() -> Result<()> {
    let fixture = fixture!("orphan_alert_names_job_and_adopter");
    let agent = Agent::start(&fixture, &rule(&fixture, "left", "orphan_after = \"600ms\""))?;
    let mut s = Shape::start(&fixture, "orphan", &[])?;
    let child: u32 = s.fact("child")?;
    agent.process_when(child, "in the job", |p| p.job.is_some())?;
    let since = Instant::now();
    s.step()?;
    s.wait(ms(5000))?;
    let alert = fires(&agent, AlertKind::Orphan, child, since, 600)?;
    assert_eq!(alert.job_name, "left");
    let p = alert.subject.as_ref().context("no subject")?;
    let adopter = p.adopter.as_ref().context("no adopter")?;
    assert_eq!(adopter.pid, jobwarden_tests::truth::stat(child)?.ppid);
    assert_eq!(alert.job, p.job);
    let jobs = agent.jobs()?;
    let job = jobs.iter().find(|j| Some(j.id) == alert.job).context("no job")?;
    assert_eq!(job.state, jobwarden::model::schema::JobState::Lingering);
    assert_eq!((job.processes, job.orphans), (1, 1));
    s.close();
    resolves(&agent, &alert.id, Instant::now())
}

#[test]
fn no_alert_for_a_leader_that_exited() -> Result<()> {
    let fixture = fixture!("no_alert_for_a_leader_that_exited");
    let agent = Agent::start(&fixture, "[zombies]\nafter = \"200ms\"\n")?;
    let s = Shape::start(&fixture, "leader-exit", &[])?;
    let pid = s.pid();
    agent.process_when(pid, "leader-exited", |p| p.state == State::LeaderExited)?;
    pause(1200);
    assert_eq!(jobwarden_tests::truth::letter(pid)?, 'Z', "it looks like a zombie all the time");
    assert_eq!(agent.process(pid)?.state, State::LeaderExited);
    let mine = std::process::id();
    let about_us = agent.alerts(&[])?.into_iter().find(|a| a.subject.as_ref().is_some_and(|p| p.pid == mine));
    assert_eq!(about_us, None, "its parent is not to blame");
    let why: Cause = agent.json(&["why", &pid.to_string()])?;
    assert_eq!(why.verdict, Verdict::LeaderExited);
    s.finish()?;
    Ok(())
}

#[test]
fn no_alert_for_a_process_stuck_in_its_exit() -> Result<()> {
    let fixture = fixture!("no_alert_for_a_process_stuck_in_its_exit");
    let agent = Agent::start(&fixture, "[zombies]\nafter = \"200ms\"\n")?;
    let mut s = Shape::start(&fixture, "stuck-exit", &[])?;
    let (maker, init): (u32, u32) = (s.fact("maker")?, s.fact("init")?);
    s.fact::<u32>("stuck")?;
    agent.process_when(init, "exiting", |p| p.state == State::Exiting)?;
    pause(1200);
    assert_ne!(jobwarden_tests::truth::letter(init)?, 'Z', "the helper keeps it in its exit");
    assert!(firing(&agent, AlertKind::Zombie, maker).is_err(), "its parent is not to blame");
    assert_eq!(agent.process(init)?.state, State::Exiting);
    let why: Cause = agent.json(&["why", &init.to_string()])?;
    assert_eq!(why.verdict, Verdict::StillExiting);
    // The one that really does not reap is found beside it.
    let intruder: u32 = s.fact("intruder")?;
    firing(&agent, AlertKind::Zombie, intruder)?;
    s.step()?;
    s.fact::<u32>("over")?;
    agent.gone(init)?;
    s.finish()?;
    Ok(())
}

#[test]
fn no_zombie_where_sigchld_is_ignored() -> Result<()> {
    let fixture = fixture!("no_zombie_where_sigchld_is_ignored");
    let agent = Agent::start(&fixture, "[zombies]\nafter = \"1ms\"\n")?;
    let mut s = Shape::start(&fixture, "autoreap", &[])?;
    let child: u32 = s.fact("child")?;
    agent.process_when(child, "there", |_| true)?;
    s.step()?;
    s.fact::<i32>("status")?;
    agent.gone(child)?;
    let about = agent
        .alerts(&["--history"])?
        .into_iter()
        .find(|a| a.subject.as_ref().is_some_and(|p| p.pid == s.pid()));
    assert_eq!(about, None);
    s.finish()?;
    Ok(())
}

#[test]
fn the_incident_is_told_and_cured() -> Result<()> {
    let fixture = fixture!("the_incident_is_told_and_cured");
    let more = "zombie_after = \"300ms\"\norphan_after = \"300ms\"";
    let agent = Agent::start(&fixture, &rule(&fixture, "queue", more))?;
    let mut s = Shape::start(&fixture, "incident", &[])?;
    let (command, holder): (u32, u32) = (s.fact("command")?, s.fact("holder")?);
    let alert = eventually("zombie alert", ms(5000), || firing(&agent, AlertKind::Zombie, s.pid()))?;
    eventually("orphan alert", ms(5000), || firing(&agent, AlertKind::Orphan, holder))?;
    let why: Cause = agent.json(&["why", &command.to_string()])?;
    assert_eq!(why.verdict, Verdict::ParentBlockedOnPipe, "{why:?}");
    let pipe = why.evidence.iter().find_map(|e| match e {
        Evidence::Blocked { thread, inode, .. } if *thread == s.pid() => inode.clone(),
        _ => None,
    });
    let pipe = pipe.with_context(|| format!("no blocked thread in {:?}", why.evidence))?;
    assert!(pipe.raw().starts_with("pipe:["), "{pipe}");
    let held = why.evidence.iter().any(
        |e| matches!(e, Evidence::Holder { process, inode, .. } if process.pid == holder && *inode == pipe),
    );
    assert!(held, "the holder of {pipe} is {holder}: {:?}", why.evidence);
    assert!(why.remedy.contains(&format!("{holder}:")), "remedies print IDs: {}", why.remedy);
    // The cure: end the orphan, never the worker.
    let report: jobwarden::model::schema::KillReport =
        agent.json(&["kill", "--grace", "1s", &holder.to_string()])?;
    assert!(report.survivors.is_empty(), "{report:?}");
    let cured = Instant::now();
    assert_eq!(s.fact::<i32>("status")?, 0, "the worker reaped its child");
    resolves(&agent, &alert.id, cured)?;
    assert!(s.ended()?.is_none(), "the worker lives");
    s.finish()?;
    Ok(())
}

#[test]
fn job_timeout_alerts_and_kills_only_where_told() -> Result<()> {
    let fixture = fixture!("job_timeout_alerts_and_kills_only_where_told");
    let config = format!(
        "[enforcement]\nenabled = true\n[[job]]\nname = \"spare\"\nmatch = {{ argv = \"setsid spare {0}\" }}\ntimeout = \"500ms\"\n\
         [[job]]\nname = \"end\"\nmatch = {{ argv = \"setsid end {0}\" }}\ntimeout = \"500ms\"\non_timeout = \"kill\"\ngrace = \"500ms\"\n",
        fixture.tag
    );
    let agent = Agent::start(&fixture, &config)?;
    let mut spare = Shape::start(&fixture, "setsid", &["spare"])?;
    let mut end = Shape::start(&fixture, "setsid", &["end"])?;
    let (a, b): (u32, u32) = (spare.fact("grandchild")?, end.fact("grandchild")?);
    eventually("job-timeout alert", ms(3000), || firing(&agent, AlertKind::JobTimeout, spare.pid()))?;
    end.wait(ms(5000))?;
    agent.gone(b)?;
    assert!(jobwarden_tests::truth::letter(a).is_ok(), "an alert ends nobody");
    assert!(spare.ended()?.is_none());
    eventually("audit", ms(3000), || {
        let out = agent.cli(&["audit", "--json"])?;
        ensure!(out.code() == Some(0), "{out:?}");
        ensure!(out.out().contains(&format!("{b}:")), "{}", out.out());
        ensure!(!out.out().contains(&format!("{a}:")), "{}", out.out());
        Ok(())
    })?;
    let killed = agent.metrics()?.sum("jobwarden_job_kills_total", &["reason=\"timeout\""]);
    assert!((killed - 1.0).abs() < f64::EPSILON, "{killed}");
    spare.finish()?;
    Ok(())
}
