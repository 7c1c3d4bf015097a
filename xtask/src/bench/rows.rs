//! The rows: what is measured, how, and what is to be reached.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::load::{Standing, flood, timed};
use super::watch::{Agent, PEERS, Peer, Watch, located, usage};
use super::{Row, Scale};
use crate::run::get;

pub(super) fn all(binary: &Path, scale: Scale) -> Vec<Row> {
    let mut rows = Vec::new();
    let mut done = |mut more: Vec<Row>| {
        for row in &more {
            let said =
                row.ours.as_ref().map_or_else(|e| format!("{e:#}"), |v| format!("{v:.3} {}", row.unit));
            println!("  {}: {said}", row.what);
        }
        rows.append(&mut more);
    };
    println!("probes ...");
    done(vec![probe_time(binary, scale)]);
    println!("spawning, in turn ...");
    done(vec![
        slow_down(binary, scale, "forks", "slow-down of fork + exit + wait", 2_000),
        slow_down(binary, scale, "execs", "slow-down of fork + exec + wait", 1_000),
    ]);
    println!("flood ...");
    done(under_flood(binary, scale));
    println!("idle ...");
    done(idle(binary, scale));
    println!("many processes ...");
    done(many(binary, scale));
    println!("kill ...");
    done(vec![kill(binary, scale)]);
    rows
}

fn median(mut values: Vec<f64>) -> Result<f64> {
    ensure!(!values.is_empty(), "no measurement");
    values.sort_by(f64::total_cmp);
    Ok(values[values.len() / 2])
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// The kernel's count of each program's run time, put back to what it was when dropped.
struct BpfStats(String);

const BPF_STATS: &str = "/proc/sys/kernel/bpf_stats_enabled";

impl BpfStats {
    fn on() -> Result<Self> {
        let before = fs::read_to_string(BPF_STATS).context(BPF_STATS)?;
        fs::write(BPF_STATS, "1").context(BPF_STATS)?;
        Ok(Self(before))
    }
}

impl Drop for BpfStats {
    fn drop(&mut self) {
        // Nothing else can be done here if the kernel refuses what it took before.
        let _ = fs::write(BPF_STATS, &self.0);
    }
}

/// What all probes together take of one life (fork, exec, exit, reap), in the kernel.
fn probe_time(binary: &Path, scale: Scale) -> Row {
    let per_life = |before: u64, after: u64| (after - before) as f64 / scale.lives as f64;
    let ours = || -> Result<f64> {
        let _stats = BpfStats::on()?;
        let agent = Agent::start(binary)?;
        let before = agent.probe_ns();
        timed("execs", scale.lives)?;
        let after = agent.probe_ns();
        ensure!(after > before, "the kernel counted no run of a probe");
        Ok(per_life(before, after))
    };
    let peer = |peer: &Peer| -> Result<f64> {
        let _stats = BpfStats::on()?;
        let watch = Watch::peer(peer)?;
        let before = watch.probe_ns();
        timed("execs", scale.lives)?;
        let after = watch.probe_ns();
        ensure!(after > before, "the kernel counted no run of a probe");
        Ok(per_life(before, after))
    };
    // forkstat has no probes: it reads the process connector.
    let peers = PEERS.iter().filter(|p| p.name != "forkstat").map(|p| (p.name.to_owned(), peer(p))).collect();
    Row {
        what: "kernel time of the probes for one life",
        unit: "ns",
        ours: ours(),
        goal: Some(1200.0),
        peers,
    }
}

/// How much longer spawning takes with a watcher than without, in per cent: nobody, jobwarden, each peer, in turn.
fn slow_down(binary: &Path, scale: Scale, kind: &str, what: &'static str, n: u64) -> Row {
    let mut ours: Result<Vec<f64>> = Ok(Vec::new());
    let mut peers: Vec<(String, Result<Vec<f64>>)> =
        PEERS.iter().map(|p| (p.name.to_owned(), Ok(Vec::new()))).collect();
    let add = |to: &mut Result<Vec<f64>>, one: Result<f64>| {
        if let Ok(values) = to {
            match one {
                Ok(value) => values.push(value),
                Err(error) => *to = Err(error),
            }
        }
    };
    // The unwatched runs stand on both sides of the watched one, so that a drift of the machine cancels out.
    let against = |watched: &dyn Fn() -> Result<Duration>| -> Result<f64> {
        let before = timed(kind, n)?;
        let with = watched()?;
        let after = timed(kind, n)?;
        let without = (before + after).as_secs_f64() / 2.0;
        Ok((with.as_secs_f64() / without - 1.0) * 100.0)
    };
    for _ in 0..scale.rounds {
        let with_agent = || {
            let _agent = Agent::start(binary)?;
            timed(kind, n)
        };
        add(&mut ours, against(&with_agent));
        for (peer, (_, to)) in PEERS.iter().zip(&mut peers) {
            if to.is_ok() {
                let with_peer = || {
                    let _watch = Watch::peer(peer)?;
                    timed(kind, n)
                };
                add(to, against(&with_peer));
            }
        }
    }
    let peers = peers.into_iter().map(|(name, values)| (name, values.and_then(median))).collect();
    Row { what, unit: "%", ours: ours.and_then(median), goal: Some(3.0), peers }
}

/// Every processor spawns as fast as it can: what is lost, what a life costs the agent, how late it is told.
fn under_flood(binary: &Path, scale: Scale) -> Vec<Row> {
    let measure = || -> Result<(f64, f64, f64)> {
        let agent = Agent::start(binary)?;
        let cpu = usage(agent.pid())?.cpu;
        let lives = flood(scale.seconds)?;
        let cpu = usage(agent.pid())?.cpu.saturating_sub(cpu);
        std::thread::sleep(Duration::from_millis(500));
        let lost = agent.metric("jobwarden_events_lost_total", "");
        Ok((lost, cpu.as_secs_f64() * 1e6 / lives as f64, lag(&agent, 0.99)?))
    };
    let row = |what, unit, goal, ours| Row { what, unit, ours, goal: Some(goal), peers: Vec::new() };
    match measure() {
        Ok((lost, cpu, lag)) => vec![
            row("events lost while every processor spawns", "", 0.0, Ok(lost)),
            row("CPU of the agent for one life", "us", 5.0, Ok(cpu)),
            row("from the probe to the forest under that load, p99 (at most)", "ms", 20.0, Ok(lag)),
        ],
        Err(error) => vec![row("flood", "", 0.0, Err(error))],
    }
}

/// The upper bound of the bucket in which the quantile of the event lag lies, in milliseconds.
fn lag(agent: &Agent, quantile: f64) -> Result<f64> {
    let text = get(agent.listen, "/metrics").context("no metrics")?;
    let buckets: Vec<(f64, f64)> = text
        .lines()
        .filter_map(|l| l.strip_prefix("jobwarden_event_lag_seconds_bucket{le=\""))
        .filter_map(|l| {
            let (bound, count) = l.split_once("\"} ")?;
            Some((if bound == "+Inf" { f64::INFINITY } else { bound.parse().ok()? }, count.parse().ok()?))
        })
        .collect();
    let all = buckets.last().context("no lag was measured")?.1;
    let bucket = buckets.iter().find(|b| b.1 >= all * quantile).context("no bucket")?;
    Ok(bucket.0 * 1e3)
}

/// A quiet host.
fn idle(binary: &Path, scale: Scale) -> Vec<Row> {
    let measure = || -> Result<(f64, f64, f64)> {
        let agent = Agent::start(binary)?;
        std::thread::sleep(Duration::from_secs(1));
        let before = usage(agent.pid())?;
        std::thread::sleep(Duration::from_secs(scale.seconds));
        let after = usage(agent.pid())?;
        let seconds = scale.seconds as f64;
        let cpu = after.cpu.saturating_sub(before.cpu).as_secs_f64() / seconds * 100.0;
        Ok((after.resident_kib as f64 / 1024.0, cpu, (after.sleeps - before.sleeps) as f64 / seconds))
    };
    let row = |what, unit, goal, ours| Row { what, unit, ours, goal: Some(goal), peers: Vec::new() };
    match measure() {
        Ok((resident, cpu, wakes)) => vec![
            row("idle: resident memory", "MiB", 20.0, Ok(resident)),
            row("idle: CPU", "% of a core", 0.1, Ok(cpu)),
            row("idle: wake-ups", "/s", 10.0, Ok(wakes)),
        ],
        Err(error) => vec![row("idle", "", 0.0, Err(error))],
    }
}

/// Many processes alive: start, scrape, tree.
fn many(binary: &Path, scale: Scale) -> Vec<Row> {
    let rounds = scale.rounds.min(10);
    let mut start = Vec::new();
    let mut scrape = Vec::new();
    let mut tree = Vec::new();
    let mut ps = Vec::new();
    let mut measure = || -> Result<()> {
        let _family = Standing::new("family", scale.processes)?;
        let _zombies = Standing::new("zombies", scale.processes / 10)?;
        for _ in 0..rounds {
            start.push(millis(Agent::start(binary)?.ready_in));
        }
        let agent = Agent::start(binary)?;
        for _ in 0..rounds {
            scrape.push(millis(clocked(|| get(agent.listen, "/metrics").context("no metrics").map(|_| ()))?));
            tree.push(millis(clocked(|| quiet(&mut agent.command(&["tree", "--all"])))?));
            ps.push(millis(clocked(|| quiet(Command::new("ps").arg("axf")))?));
        }
        Ok(())
    };
    let done = measure();
    let value = |values: Vec<f64>| match &done {
        Ok(()) => median(values),
        Err(error) => Err(anyhow::anyhow!("{error:#}")),
    };
    let row = |what, goal, ours, peers| Row { what, unit: "ms", ours, goal: Some(goal), peers };
    vec![
        row("start, from exec to ready, with many processes alive", 200.0, value(start), Vec::new()),
        row("a scrape of /metrics with many processes", 3.0, value(scrape), Vec::new()),
        row("tree of many processes", 50.0, value(tree), vec![("ps axf".to_owned(), value(ps))]),
    ]
}

/// From the decision to the death of the last of 1,000 processes that ignore SIGTERM, in milliseconds.
fn kill(binary: &Path, scale: Scale) -> Row {
    let members = scale.processes.min(1_000);
    let ours = || -> Result<f64> {
        let agent = Agent::start(binary)?;
        let mut times = Vec::new();
        for _ in 0..scale.rounds.min(5) {
            let mut family = Standing::new("family", members)?;
            let pid = family.pid().to_string();
            let out = agent.command(&["--json", "kill", &pid, "--grace", "0s"]).output()?;
            ensure!(out.status.success(), "kill: {}", String::from_utf8_lossy(&out.stderr).trim());
            let report: serde_json::Value = serde_json::from_slice(&out.stdout)?;
            times.push(report["took_s"].as_f64().context("no took_s")? * 1e3);
            family.gone()?;
        }
        median(times)
    };
    let by = |script: &[&str]| -> Result<f64> {
        let program = located(script[0]).with_context(|| format!("{} is not installed", script[0]))?;
        let mut times = Vec::new();
        for _ in 0..scale.rounds.min(5) {
            let mut family = Standing::new("family", members)?;
            let pid = family.pid().to_string();
            let took = clocked(|| quiet(Command::new(&program).args(&script[1..]).arg(&pid)))?;
            times.push(millis(took));
            // pkill -P leaves the head, which ends when its stdin is closed.
            if script[0] != "pkill" {
                family.gone()?;
            }
        }
        median(times)
    };
    let psutil = "import sys, psutil\np = psutil.Process(int(sys.argv[1]))\nall_ = p.children(recursive=True) + [p]\n\
                  [c.kill() for c in all_]\n\
                  dead = lambda c: not c.is_running() or c.status() == psutil.STATUS_ZOMBIE\n\
                  while not all(map(dead, all_)): pass";
    let peers = vec![
        ("psutil, recursive".to_owned(), by(&["/usr/bin/python3", "-c", psutil])),
        ("pkill -9 -P (the sending only)".to_owned(), by(&["pkill", "-9", "-P"])),
    ];
    Row {
        what: "end a family that ignores SIGTERM, to its last member's death",
        unit: "ms",
        ours: ours(),
        goal: Some(200.0),
        peers,
    }
}

fn clocked(work: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let begun = Instant::now();
    work()?;
    Ok(begun.elapsed())
}

fn quiet(command: &mut Command) -> Result<()> {
    let out = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).output()?;
    ensure!(
        out.status.success(),
        "{}: {}",
        command.get_program().display(),
        String::from_utf8_lossy(&out.stderr).trim()
    );
    Ok(())
}
