//! Nothing is lost, to the last event: what the probes hit, sent, lost and filtered, what the agent received, and what
//! the one who spawned counted.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use jobwarden::model::key::Key;
use jobwarden::model::schema::EventLine;
use jobwarden_tests::agent::Options;
use jobwarden_tests::truth::forest_is_proc;
use jobwarden_tests::{Agent, Events, Shape, eventually, fixture, loudly, ms, rounds};

/// How long threads of PID 1 have been on a CPU: a kernel that hides PID 1 from tracing runs no probe for what is freed meanwhile.
fn pid_1_ran() -> Result<Duration> {
    let mut ns = 0;
    for thread in std::fs::read_dir("/proc/1/task")? {
        // One that ended meanwhile has none.
        let text = std::fs::read_to_string(thread?.path().join("schedstat")).unwrap_or_default();
        ns += text.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0);
    }
    Ok(Duration::from_nanos(ns))
}

#[test]
fn five_thousand_as_fast_as_possible() -> Result<()> {
    let fixture = fixture!("five_thousand_as_fast_as_possible");
    let n = rounds("JWTEST_SPAWN", 5000);
    let agent = Agent::start(&fixture, "")?;
    let events = Events::start(&fixture, &agent)?;
    let before = agent.metrics()?;
    let mut s = Shape::start(&fixture, "spawner", &[&n.to_string()])?;
    let (begun, ran) = (Instant::now(), pid_1_ran()?);
    s.step()?;
    let (started, waited): (usize, usize) = (s.fact("spawned")?, s.fact("reaped")?);
    let took = begun.elapsed().as_secs_f64();
    let hidden = pid_1_ran()?.saturating_sub(ran).as_secs_f64() / took;
    loudly(&format!(
        "{started} processes in {took:.2} s, PID 1 was on a CPU for {:.1} % of it",
        hidden * 100.0
    ));
    assert_eq!((started, waited), (n as usize, n as usize), "the spawner's own count");
    let spawner = s.pid();
    let mut by_proc = 0;
    eventually("each fork, exec, exit and reap", ms(30_000), || {
        let mut lives: BTreeMap<Key, BTreeMap<String, usize>> = BTreeMap::new();
        // Once: more come while they are counted.
        let all = events.all();
        for e in &all {
            if let Some(p) = &e.process {
                *lives.entry(p.id).or_default().entry(e.kind.clone()).or_default() += 1;
            }
        }
        let mine: BTreeMap<Key, usize> = all
            .iter()
            .filter(|e| e.kind == "exec")
            .filter_map(|e| e.process.as_ref())
            .filter(|p| p.argv.len() == 3 && p.argv[1] == fixture.tag)
            .filter_map(|p| Some((p.id, p.argv[2].raw().parse().ok()?)))
            .collect();
        let mut indexes: Vec<usize> = mine.values().copied().collect();
        indexes.sort_unstable();
        ensure!(indexes == (0..started).collect::<Vec<_>>(), "{} of {started} execs", indexes.len());
        for kind in ["fork", "exec", "exit", "reap"] {
            let count = |key: &&Key| lives[*key].get(kind).copied().unwrap_or(0);
            let odd: Vec<_> =
                mine.keys().filter(|k| count(k) != 1).map(|k| (k.to_string(), count(&k))).collect();
            ensure!(odd.is_empty(), "{kind}: not once for {}: {:?}", odd.len(), odd.first());
        }
        let told = |e: &&EventLine| {
            e.more.get("source").is_some_and(|s| s == "proc")
                && e.process.as_ref().is_some_and(|p| mine.contains_key(&p.id))
        };
        by_proc = all.iter().filter(told).count();
        ensure!(by_proc as f64 <= (0.01 + hidden) * started as f64, "{by_proc} reaps have no record");
        Ok(())
    })?;
    assert!(!events.all().iter().any(|e| e.kind == "lost"), "nothing was lost");
    let after = agent.metrics()?;
    for kind in ["fork", "exec", "exit", "reap"] {
        let label = format!("kind=\"{kind}\"");
        let grown =
            after.sum("jobwarden_events_total", &[&label]) - before.sum("jobwarden_events_total", &[&label]);
        assert!(grown >= (n as usize - by_proc) as f64, "{kind}: {grown}");
    }
    assert!(after.sum("jobwarden_events_lost_total", &[]) < 0.5);
    eventually("the accounts balance", ms(10_000), || agent.metrics()?.balanced())?;
    s.finish()?;
    agent.gone(spawner)?;
    forest_is_proc(&agent)?;
    Ok(())
}

/// What found no room is in the accounts as well: to the last event.
#[test]
fn the_accounts_balance_after_an_overflow() -> Result<()> {
    let fixture = fixture!("the_accounts_balance_after_an_overflow");
    let env = [("JOBWARDEN_AGENT_RING_BYTES", "4096")];
    let agent = Agent::with(&fixture, &Options { env: &env, ..Options::default() })?;
    agent.signal(rustix::process::Signal::STOP)?;
    let mut flood = Shape::start(&fixture, "spawner", &["100"])?;
    flood.step()?;
    flood.fact::<u32>("reaped")?;
    flood.finish()?;
    agent.signal(rustix::process::Signal::CONT)?;
    eventually("the loss is counted", ms(5000), || {
        let m = agent.metrics()?;
        let lost = m.sum("jobwarden_events_lost_total", &[]);
        ensure!(lost > 300.0 && m.one("jobwarden_resyncs_total", &["reason=\"loss\""])? > 0.5, "{lost} lost");
        m.balanced()
    })?;
    let told =
        agent.alerts(&[])?.into_iter().find(|a| a.kind == jobwarden::model::schema::AlertKind::EventsLost);
    let lost = agent.metrics()?.sum("jobwarden_events_lost_total", &[]);
    ensure!(told.as_ref().is_some_and(|a| a.count as f64 <= lost), "{lost} lost, and {told:?}");
    Ok(())
}

#[test]
fn the_forest_equals_proc() -> Result<()> {
    let fixture = fixture!("the_forest_equals_proc");
    let agent = Agent::start(&fixture, "")?;
    let n = forest_is_proc(&agent)?;
    let mut s = Shape::start(&fixture, "stubborn", &["100"])?;
    s.facts::<u32>("ready", 100)?;
    let more = forest_is_proc(&agent);
    s.kill()?;
    for pid in fixture.alive() {
        if pid.unsigned_abs() != agent.pid() {
            let _ = fixture.signal(pid, rustix::process::Signal::KILL);
        }
    }
    loudly(&format!("{n} then {} processes compared", more?));
    forest_is_proc(&agent)?;
    Ok(())
}

#[test]
#[ignore = "long: JWTEST_LIVES (100000)"]
fn memory_stays_flat() -> Result<()> {
    let fixture = fixture!("memory_stays_flat");
    let lives = rounds("JWTEST_LIVES", 100_000);
    let agent = Agent::start(&fixture, "")?;
    let rss = || agent.metrics()?.one("process_resident_memory_bytes", &[]);
    let mut seen = Vec::new();
    // In tenths, each by a spawner of its own: no helper lives long.
    for _ in 0..10 {
        let mut s = Shape::start(&fixture, "spawner", &[&(lives / 10).to_string(), "bare"])?;
        s.step()?;
        let begun = std::time::Instant::now();
        while s.fact::<u64>("reaped").is_err() {
            ensure!(begun.elapsed() < ms(120_000), "the spawner is too slow");
        }
        s.finish()?;
        eventually("the accounts balance", ms(20_000), || agent.metrics()?.balanced())?;
        seen.push(rss()?);
    }
    loudly(&format!("resident bytes after each tenth of {lives} lives: {seen:?}"));
    // The first tenth fills what is bounded; from then on nothing grows.
    let (first, last) = (seen[1], seen[9]);
    ensure!((last - first).abs() <= first * 0.1, "from {first} to {last} bytes: {seen:?}");
    forest_is_proc(&agent)?;
    Ok(())
}
