//! The real agent and its alerts when things go wrong around it: a full disk, a config that changes under it, a parent with
//! ten thousand zombies, secrets that must not be told.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use jobwarden::model::schema::{Alert, AlertKind, AlertState, Cause};
use jobwarden_tests::agent::run;
use jobwarden_tests::alerts::Hook;
use jobwarden_tests::disk::Disk;
use jobwarden_tests::{Agent, Fixture, Shape, eventually, fixture, loudly, ms, rounds};
use rustix::process::Signal;

fn rule(fixture: &Fixture) -> String {
    format!("[[job]]\nname = \"w\"\nmatch = {{ argv = \"{}\" }}\n", fixture.tag)
}

fn receiver(name: &str, url: &str) -> String {
    format!("[[receiver]]\nname = \"{name}\"\ntype = \"webhook\"\nurl = \"{url}\"\ntimeout = \"1s\"\n")
}

fn firing(agent: &Agent<'_>, kind: AlertKind) -> Result<Alert> {
    let all = agent.alerts(&[])?;
    let found = all.iter().find(|a| a.kind == kind && a.state == AlertState::Firing);
    found.cloned().with_context(|| format!("no {kind} among {all:?}"))
}

/// The firing zombie alert about this parent: others may run on the same machine.
fn unreaped(agent: &Agent<'_>, parent: &Shape) -> Result<Alert> {
    let all = agent.alerts(&[])?;
    let found = all.iter().find(|a| a.kind == AlertKind::Zombie && is_about(a, parent.pid()));
    found.cloned().with_context(|| format!("no zombie of {} among {all:?}", parent.pid()))
}

fn is_about(a: &Alert, pid: u32) -> bool {
    a.subject.as_ref().is_some_and(|s| s.pid == pid)
}

fn storage(hook: &Hook) -> Vec<AlertState> {
    hook.taken().into_iter().filter(|a| a.kind == AlertKind::StorageFailed).map(|a| a.state).collect()
}

/// A parent that does not reap.
fn sick(fixture: &Fixture) -> Result<Shape> {
    let mut s = Shape::start(fixture, "zombie", &["1"])?;
    s.fact::<u32>("dead")?;
    Ok(s)
}

#[test]
fn a_full_disk_is_an_alert_and_costs_neither_jobs_nor_alerts() -> Result<()> {
    let fixture = fixture!("a_full_disk_is_an_alert_and_costs_neither_jobs_nor_alerts");
    let disk = Disk::mount(&fixture.path("agent/state"), 1 << 20)?;
    let hook = Hook::start()?;
    let config = format!("[zombies]\nafter = \"300ms\"\n{}{}", receiver("hook", &hook.url), rule(&fixture));
    let agent = Agent::start(&fixture, &config)?;
    let before = Shape::start(&fixture, "setsid", &["before"])?;
    eventually("the first job", ms(5000), || {
        agent.jobs()?.iter().any(|j| j.root.pid == before.pid()).then_some(()).context("no job")
    })?;
    disk.fill()?;
    let parent = sick(&fixture)?;
    let alert = eventually("storage-failed", ms(5000), || firing(&agent, AlertKind::StorageFailed))?;
    ensure!(alert.summary.contains("No space left"), "{}", alert.summary);
    // The second store may fail between the two answers.
    let why = eventually("the alert's own words", ms(5000), || {
        let alert = firing(&agent, AlertKind::StorageFailed)?;
        let why: Cause = agent.json(&["why", &alert.id])?;
        ensure!(why.alert.as_deref() == Some(&alert.id) && why.summary == alert.summary, "{why:?}");
        Ok(why)
    })?;
    ensure!(!why.remedy.is_empty() && why.process.pid == agent.pid(), "{why:?}");
    let zombie = eventually("zombie", ms(5000), || unreaped(&agent, &parent))?;
    eventually("both told all the same", ms(10_000), || {
        ensure!(storage(&hook) == [AlertState::Firing], "{:?}", hook.told());
        ensure!(hook.taken().iter().filter(|a| is_about(a, parent.pid())).count() == 1, "{:?}", hook.told());
        Ok(())
    })?;
    // It goes on for as long as the disk is full, whatever else succeeds.
    std::thread::sleep(ms(2500));
    firing(&agent, AlertKind::StorageFailed)?;
    let (status, _) = agent.get("/readyz")?;
    ensure!(status == 200, "{status}");
    disk.free()?;
    let freed = Instant::now();
    eventually("the end of storage-failed", ms(10_000), || {
        ensure!(firing(&agent, AlertKind::StorageFailed).is_err(), "it fires");
        ensure!(storage(&hook).last() == Some(&AlertState::Resolved));
        Ok(())
    })?;
    loudly(&format!("a full disk: told, and over {:?} after there was room", freed.elapsed()));
    // All that happened meanwhile is on the disk now.
    let jobs = |a: &Agent<'_>| -> Result<Vec<String>> {
        Ok(a.jobs()?.into_iter().filter(|j| j.processes > 0).map(|j| j.id.to_string()).collect())
    };
    let known = jobs(&agent)?;
    ensure!(known.len() == 2, "{known:?}");
    agent.crash()?;
    let agent = Agent::start(&fixture, &config)?;
    ensure!(jobs(&agent)? == known, "{:?}", jobs(&agent)?);
    ensure!(unreaped(&agent, &parent)?.id == zombie.id);
    parent.finish()?;
    before.finish()?;
    agent.stop()
}

#[test]
fn sighup_takes_a_new_config_and_keeps_jobs_alerts_and_queue() -> Result<()> {
    let fixture = fixture!("sighup_takes_a_new_config_and_keeps_jobs_alerts_and_queue");
    let hook = Hook::start()?;
    let base = format!("[zombies]\nafter = \"300ms\"\n{}", rule(&fixture));
    let agent = Agent::start(&fixture, &(base.clone() + &receiver("hook", "http://127.0.0.1:1/")))?;
    let parent = sick(&fixture)?;
    let alert = eventually("zombie", ms(5000), || unreaped(&agent, &parent))?;
    eventually("what waits", ms(5000), || {
        ensure!(agent.metrics()?.one("jobwarden_notifications_pending", &["receiver=\"hook\""])? >= 1.0);
        Ok(())
    })?;
    let jobs =
        |a: &Agent<'_>| -> Result<Vec<String>> { Ok(a.jobs()?.iter().map(|j| j.id.to_string()).collect()) };
    let known = jobs(&agent)?;
    ensure!(known.len() == 1, "{known:?}");
    let reloaded = |good: bool| -> Result<f64> {
        let m = agent.metrics()?;
        let ok = m.one("jobwarden_config_last_reload_successful", &[])? > 0.5;
        ensure!(ok == good, "the last reload: {ok}");
        m.one("jobwarden_config_last_reload_success_timestamp_seconds", &[])
    };
    let first = reloaded(true)?;
    std::fs::write(&agent.config, "[zombies]\nafter = 3\n")?;
    agent.signal(Signal::HUP)?;
    let same = eventually("the refusal", ms(5000), || reloaded(false))?;
    ensure!((same - first).abs() < f64::EPSILON, "nothing was taken");
    std::fs::write(&agent.config, base + &receiver("hook", &hook.url))?;
    agent.signal(Signal::HUP)?;
    eventually("the new config", ms(5000), || {
        ensure!(reloaded(true)? > first);
        Ok(())
    })?;
    eventually("what waited", ms(10_000), || {
        let told = hook.taken();
        ensure!(told.iter().any(|a| a.id == alert.id && a.state == AlertState::Firing), "{told:?}");
        Ok(())
    })?;
    ensure!(jobs(&agent)? == known, "{:?}", jobs(&agent)?);
    let now = unreaped(&agent, &parent)?;
    ensure!(now.id == alert.id && now.since == alert.since, "{now:?}");
    parent.finish()?;
    agent.stop()
}

/// However close they follow each other, the config that was written last is the one in force.
#[test]
fn reloads_in_quick_succession_end_with_the_last_config() -> Result<()> {
    let fixture = fixture!("reloads_in_quick_succession_end_with_the_last_config");
    let agent = Agent::start(&fixture, "")?;
    let mut children = Vec::new();
    for n in 0..12 {
        // The more receivers, the longer it takes: the first would be overtaken by the later ones.
        let config: String = (n..12).map(|k| receiver(&format!("r{n}-{k}"), "http://127.0.0.1:1/")).collect();
        let new = agent.config.with_extension("new");
        std::fs::write(&new, config)?;
        std::fs::rename(&new, &agent.config)?;
        let command = agent.command(&["reload"])?;
        children.push(std::thread::spawn(move || run(command, ms(30_000))));
        std::thread::sleep(Duration::from_millis(15));
    }
    for c in children {
        let out = c.join().ok().context("a reload panicked")??;
        ensure!(out.code() == Some(0), "{out:?}");
    }
    let m = agent.metrics()?;
    let names: Vec<&str> = m.series("jobwarden_notifications_pending").map(|(l, _)| l).collect();
    ensure!(names == ["{receiver=\"r11-11\"}"], "{names:?}");
    agent.stop()
}

#[test]
fn ten_thousand_zombies_of_one_parent_are_one_alert() -> Result<()> {
    let fixture = fixture!("ten_thousand_zombies_of_one_parent_are_one_alert");
    let n = rounds("JWTEST_ZOMBIES", 10_000);
    let hook = Hook::start()?;
    let config = format!("[zombies]\nafter = \"500ms\"\n{}", receiver("hook", &hook.url));
    let agent = Agent::start(&fixture, &config)?;
    let mut parent = Shape::start(&fixture, "zombie", &[&n.to_string()])?;
    parent.fact::<u64>("dead")?;
    let pid = parent.pid();
    let mine = |a: &Alert| is_about(a, pid);
    let all = |a: &Agent<'_>| -> Result<Vec<Alert>> { Ok(a.alerts(&[])?.into_iter().filter(mine).collect()) };
    eventually("all in one alert", ms(30_000), || {
        let firing = all(&agent)?;
        let counts: Vec<u64> = firing.iter().map(|a| a.count as u64).collect();
        let m = agent.metrics()?;
        let states =
            ["exiting", "zombie"].map(|s| m.sum("jobwarden_processes", &[&format!("state=\"{s}\"")]));
        let lost = m.sum("jobwarden_events_lost_total", &[]);
        ensure!(counts == [n], "alerts over {counts:?}; exiting and zombie {states:?}; {lost} lost");
        Ok(())
    })?;
    ensure!(agent.metrics()?.one("jobwarden_unreaping_parents", &[])? >= 1.0);
    let resident = agent.metrics()?.one("process_resident_memory_bytes", &[])? / f64::from(1 << 20);
    ensure!(resident < 200.0, "{n} zombies: {resident} MiB resident");
    parent.step()?;
    parent.fact::<u64>("reaped")?;
    let cured = Instant::now();
    eventually("its end", ms(20_000), || {
        ensure!(all(&agent)?.is_empty(), "it fires");
        Ok(())
    })?;
    let took = cured.elapsed();
    ensure!(took < ms(5000), "it ended {took:?} after the last was reaped");
    eventually("its end at the receiver", ms(10_000), || {
        let told: Vec<Alert> = hook.taken().into_iter().filter(mine).collect();
        let ids: std::collections::BTreeSet<&str> = told.iter().map(|a| a.id.as_str()).collect();
        ensure!(told.last().is_some_and(|a| a.state == AlertState::Resolved), "{told:?}");
        ensure!(ids.len() == 1 && told.len() < 8, "{} messages about {} alerts", told.len(), ids.len());
        Ok(())
    })?;
    loudly(&format!("{n} zombies: one alert, {resident:.0} MiB resident, over {took:?} after the cure"));
    parent.finish()?;
    agent.stop()
}

#[test]
fn no_secret_is_told() -> Result<()> {
    let fixture = fixture!("no_secret_is_told");
    let file = |name: &str| -> Result<String> {
        let path = fixture.path(name);
        std::fs::write(&path, format!("S3CRET-{name}\n"))?;
        Ok(path.display().to_string())
    };
    // Down, answering badly, and behind a name that does not resolve: each error has a text of its own.
    let hook = Hook::start()?;
    hook.flap.store(true, Ordering::SeqCst);
    let port = hook.url.trim_start_matches("http://").trim_end_matches('/');
    let config = format!(
        "[agent]\nlog = \"trace\"\n[zombies]\nafter = \"300ms\"\n\
         [[receiver]]\nname = \"down\"\ntype = \"webhook\"\nurl = \"http://127.0.0.1:1/S3CRET-path\"\nsecret_file = {:?}\nbearer_token_file = {:?}\n\
         [[receiver]]\nname = \"flaps\"\ntype = \"webhook\"\nurl = \"http://{port}/S3CRET-path?token=S3CRET-query\"\nbearer_token_file = {:?}\n\
         [[receiver]]\nname = \"pager\"\ntype = \"pagerduty\"\nurl = \"http://127.0.0.1:1/S3CRET-path\"\nrouting_key_file = {:?}\n\
         [[receiver]]\nname = \"am\"\ntype = \"alertmanager\"\nurls = [\"http://no-such-host.invalid/S3CRET-path\"]\nbearer_token_file = {:?}\n",
        file("sign")?,
        file("bearer")?,
        file("other")?,
        file("routing")?,
        file("am")?
    );
    let agent = Agent::start(&fixture, &config)?;
    let parent = sick(&fixture)?;
    eventually("failures of all four", ms(20_000), || {
        let m = agent.metrics()?;
        for r in ["down", "pager", "am"] {
            let label = format!("receiver=\"{r}\"");
            ensure!(m.sum("jobwarden_notifications_failed_total", &[&label]) >= 1.0, "{r}");
        }
        ensure!(!hook.taken().is_empty(), "nothing was taken");
        Ok(())
    })?;
    let mut said = vec![("/metrics".to_owned(), agent.get("/metrics")?.1)];
    for args in [
        &["alerts", "--undelivered"][..],
        &["--json", "alerts", "--undelivered"],
        &["notify", "down"],
        &["notify", "flaps"],
        &["notify", "pager"],
        &["notify", "am"],
        &["status"],
        &["audit"],
        &["reload"],
    ] {
        let out = agent.cli(args)?;
        said.push((args.join(" "), out.out() + &out.err()));
    }
    said.push(("the log".to_owned(), String::from_utf8_lossy(&std::fs::read(&agent.log)?).into_owned()));
    parent.finish()?;
    for (what, text) in said {
        let at = text.find("S3CRET");
        let around = at.map(|i| text[i.saturating_sub(200)..].chars().take(300).collect::<String>());
        ensure!(at.is_none(), "{what} tells a secret: {around:?}");
    }
    agent.stop()
}
