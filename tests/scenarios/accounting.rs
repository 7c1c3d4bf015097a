//! Nothing is lost, to the last event: what the probes hit, sent, lost and filtered, what the agent received, and what
//! the one who spawned counted.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use jobwarden::key::Key;
use jobwarden_tests::truth::forest_is_proc;
use jobwarden_tests::{Agent, Events, Metrics, Shape, eventually, ground, loudly, ms, rounds};

const KINDS: [&str; 6] = ["fork", "exec", "exit", "leader_exit", "reap", "signal"];

/// hits = sent + lost + filtered for each kind; sent = received + still in the ring.
fn identity(m: &Metrics) -> Result<()> {
    for kind in KINDS {
        let label = format!("kind=\"{kind}\"");
        let of = |name| m.sum(name, &[&label]);
        let (hits, sent) = (of("jobwarden_probe_hits_total"), of("jobwarden_events_sent_total"));
        let (lost, filtered) = (of("jobwarden_events_lost_total"), of("jobwarden_events_filtered_total"));
        ensure!(
            (hits - sent - lost - filtered).abs() < 0.5,
            "{kind}: {hits} hits, {sent} + {lost} + {filtered}"
        );
        let received = of("jobwarden_events_total");
        ensure!((sent - received).abs() < 0.5, "{kind}: {sent} sent, {received} received");
    }
    ensure!(m.one("jobwarden_ring_used_bytes", &[])? < 0.5, "the ring is not empty");
    Ok(())
}

#[test]
fn five_thousand_as_fast_as_possible() -> Result<()> {
    let ground = ground!("five_thousand_as_fast_as_possible");
    let n = rounds("JWTEST_SPAWN", 5000);
    let agent = Agent::start(&ground, "")?;
    let events = Events::start(&ground, &agent)?;
    let before = agent.metrics()?;
    let mut s = Shape::start(&ground, "spawner", &[&n.to_string()])?;
    s.step()?;
    let begun = std::time::Instant::now();
    let (started, waited): (usize, usize) = (s.fact("spawned")?, s.fact("reaped")?);
    loudly(&format!("{started} processes in {:.2} s", begun.elapsed().as_secs_f64()));
    assert_eq!((started, waited), (n as usize, n as usize), "the spawner's own count");
    let spawner = s.pid();
    let mut missed = 0;
    eventually("each fork, exec, exit and reap", ms(30_000), || {
        let mut lives: BTreeMap<Key, BTreeMap<String, usize>> = BTreeMap::new();
        for e in events.all() {
            if let Some(p) = &e.process {
                *lives.entry(p.id).or_default().entry(e.kind).or_default() += 1;
            }
        }
        let mine: BTreeMap<Key, usize> = events
            .all()
            .iter()
            .filter(|e| e.kind == "exec")
            .filter_map(|e| e.process.as_ref())
            .filter(|p| p.argv.len() == 3 && p.argv[1] == ground.tag)
            .filter_map(|p| Some((p.id, p.argv[2].parse().ok()?)))
            .collect();
        let mut indexes: Vec<usize> = mine.values().copied().collect();
        indexes.sort_unstable();
        ensure!(indexes == (0..started).collect::<Vec<_>>(), "{} of {started} execs", indexes.len());
        for kind in ["fork", "exec", "exit", "reap"] {
            let count = |key: &&Key| lives[*key].get(kind).copied().unwrap_or(0);
            let odd: Vec<_> =
                mine.keys().filter(|k| count(k) != 1).map(|k| (k.to_string(), count(&k))).collect();
            // Linux 6.18 under load now and then runs tracefs' handler of sched_process_free and not a BPF program beside
            // it (recursion_misses 0). The look at /proc makes up for it, so a process stays with nobody.
            let may_miss = if kind == "reap" { started / 100 } else { 0 };
            ensure!(odd.len() <= may_miss, "{kind}: not once for {}: {:?}", odd.len(), odd.first());
            missed = odd.len();
        }
        Ok(())
    })?;
    assert!(!events.all().iter().any(|e| e.kind == "lost"), "nothing was lost");
    let after = agent.metrics()?;
    for kind in ["fork", "exec", "exit", "reap"] {
        let label = format!("kind=\"{kind}\"");
        let grown =
            after.sum("jobwarden_events_total", &[&label]) - before.sum("jobwarden_events_total", &[&label]);
        assert!(grown >= (n as usize - missed) as f64, "{kind}: {grown}");
    }
    assert!(after.sum("jobwarden_events_lost_total", &[]) < 0.5);
    eventually("the accounts balance", ms(10_000), || identity(&agent.metrics()?))?;
    s.finish()?;
    agent.gone(spawner)?;
    forest_is_proc(&agent)?;
    Ok(())
}

#[test]
fn the_forest_equals_proc() -> Result<()> {
    let ground = ground!("the_forest_equals_proc");
    let agent = Agent::start(&ground, "")?;
    let n = forest_is_proc(&agent)?;
    let mut s = Shape::start(&ground, "stubborn", &["100"])?;
    s.facts::<u32>("ready", 100)?;
    let more = forest_is_proc(&agent);
    s.kill()?;
    for pid in ground.alive() {
        if pid.unsigned_abs() != agent.pid() {
            let _ = ground.signal(pid, rustix::process::Signal::KILL);
        }
    }
    loudly(&format!("{n} then {} processes compared", more?));
    forest_is_proc(&agent)?;
    Ok(())
}

#[test]
#[ignore = "long: JWTEST_LIVES (100000)"]
fn memory_stays_flat() -> Result<()> {
    let ground = ground!("memory_stays_flat");
    let lives = rounds("JWTEST_LIVES", 100_000);
    let agent = Agent::start(&ground, "")?;
    let rss = || agent.metrics()?.one("process_resident_memory_bytes", &[]);
    let mut seen = Vec::new();
    // In tenths, each by a spawner of its own: no helper lives long.
    for _ in 0..10 {
        let mut s = Shape::start(&ground, "spawner", &[&(lives / 10).to_string(), "bare"])?;
        s.step()?;
        let begun = std::time::Instant::now();
        while s.fact::<u64>("reaped").is_err() {
            ensure!(begun.elapsed() < ms(120_000), "the spawner is too slow");
        }
        s.finish()?;
        eventually("the accounts balance", ms(20_000), || identity(&agent.metrics()?))?;
        seen.push(rss()?);
    }
    loudly(&format!("resident bytes after each tenth of {lives} lives: {seen:?}"));
    // The first tenth fills what is bounded; from then on nothing grows.
    let (first, last) = (seen[1], seen[9]);
    ensure!((last - first).abs() <= first * 0.1, "from {first} to {last} bytes: {seen:?}");
    forest_is_proc(&agent)?;
    Ok(())
}
