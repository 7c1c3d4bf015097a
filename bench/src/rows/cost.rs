//! What it costs to have somebody watch: in the kernel, for who spawns, under a flood, on a quiet host.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::figure::{Figure, Goal};
use crate::load::PACE;
use crate::measure::{Series, again, row};
use crate::row::{Row, Scale};
use crate::stand::{everywhere, spent, told};
use crate::watch::{Agent, EVENTS, PEERS, Peer, Watch, fetch, resident_kib, sleeps};

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

/// What all probes together take of one life (fork, exec, exit, reap), in the kernel, on every processor at once; for each
/// event that is told of it; and as a part of that life.
pub(super) fn probes(binary: &Path, scale: Scale) -> Vec<Row> {
    let processors = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    // Nanoseconds, and per cent of the life.
    let measure = |lives: u64, ns: &dyn Fn() -> Result<f64>| -> Result<[Figure; 2]> {
        let (before, begun) = (ns()?, Instant::now());
        let lives = everywhere("execs", lives / processors)?;
        let all = begun.elapsed().as_nanos() as f64 * processors as f64;
        let took = ns()? - before;
        ensure!(took > 0.0, "the kernel counted no run of a probe");
        Ok([took / lives as f64, took / all * 100.0].map(Figure::one))
    };
    let ours = || {
        let _stats = BpfStats::on()?;
        let agent = Agent::start(binary)?;
        measure(scale.lives, &|| agent.probe_ns())
    };
    let peer = |peer: &Peer| {
        let _stats = BpfStats::on()?;
        let watch = Watch::peer(peer)?;
        measure(scale.lives / 5, &|| Ok(watch.probe_ns() as f64))
    };
    let ours = ours();
    let peers: Vec<(&Peer, Result<[Figure; 2]>)> =
        PEERS.iter().filter(|p| p.probes()).map(|p| (p, peer(p))).collect();
    let pick = |f: &Result<[Figure; 2]>, n: usize, by| f.as_ref().map(|f| f[n].per(by)).map_err(again);
    let rows: [(_, _, _, &[Goal], _); 3] = [
        ("kernel time of the probes for one life", "ns", 0, &[Goal::AtMost(1200.0)], false),
        ("kernel time of the probes for each event told of it", "ns", 0, &[Goal::RatioToPeer(2.0)], true),
        ("the probes' part of that life (fork + exec + wait on every processor)", "%", 1, &[], false),
    ];
    let compared = |(what, unit, n, goals, each)| {
        let by = |events| if each { events } else { 1.0 };
        let peers = peers.iter().map(|(p, f)| (p.name.to_owned(), pick(f, n, by(p.events)))).collect();
        Row { peers, ..row(what, unit, goals, pick(&ours, n, by(EVENTS))) }
    };
    rows.into_iter().map(compared).collect()
}

const SLOWER: [&str; 4] = [
    "slow-down of vfork + exit + wait",
    "the same where parent and child are kept to one processor",
    "slow-down of fork + exec of a static program + wait",
    "the same, kept to one processor",
];

/// How much longer spawning takes with a watcher than without, in per cent: nobody, jobwarden, nobody, a peer, nobody, and
/// so on. The unwatched runs stand on both sides of the watched one, so that a drift of the machine cancels out. Last, nobody
/// is held against nobody: what that gives is the noise of this run.
pub(super) fn spawning(binary: &Path, scale: Scale) -> Vec<Row> {
    let run = || -> Result<[Duration; 4]> {
        // A watcher was waited for, and whoever has slept runs faster for a while on a busy machine: so all have slept.
        std::thread::sleep(Duration::from_millis(200));
        Ok([
            spent("vforks", 4_000, false)?,
            spent("vforks", 12_000, true)?,
            spent("execs", 2_000, false)?,
            spent("execs", 2_000, true)?,
        ])
    };
    // Of each watcher, for each row. The first is jobwarden, the last nobody.
    let mut all: Vec<[Series; 4]> =
        (0..PEERS.len() + 2).map(|_| std::array::from_fn(|_| Series::new())).collect();
    for _ in 0..scale.rounds {
        let mut before = run();
        for (n, series) in all.iter_mut().enumerate() {
            if !series[0].going() {
                continue;
            }
            let with = match n.checked_sub(1).map(|n| PEERS.get(n)) {
                None => Agent::start(binary).and_then(|_agent| run()),
                Some(Some(peer)) => Watch::peer(peer).and_then(|_watch| run()),
                Some(None) => run(),
            };
            let after = run();
            for (row, to) in series.iter_mut().enumerate() {
                to.add(match (&before, &with, &after) {
                    (Ok(a), Ok(w), Ok(b)) => {
                        let without = (a[row] + b[row]).as_secs_f64() / 2.0;
                        Ok((w[row].as_secs_f64() / without - 1.0) * 100.0)
                    }
                    (Err(e), ..) | (_, Err(e), _) | (.., Err(e)) => Err(again(e)),
                });
            }
            before = after;
        }
    }
    let mut by_row: [Vec<Result<Figure>>; 4] = std::array::from_fn(|_| Vec::new());
    for series in all {
        for (to, s) in by_row.iter_mut().zip(series) {
            to.push(s.figure());
        }
    }
    let rows = SLOWER.iter().zip(by_row).map(|(what, figures)| {
        let mut figures = figures.into_iter();
        let ours = figures.next().unwrap_or_else(|| Figure::of(Vec::new()));
        let peers = PEERS.iter().map(|p| p.name.to_owned()).zip(figures.by_ref()).collect();
        let noise = figures.next().and_then(Result::ok);
        Row { peers, noise, ..row(*what, "%", &[Goal::AtMost(3.0), Goal::RatioToPeer(1.0)], ours) }
    });
    rows.collect()
}

/// Every processor spawns as fast as it can: what is lost, and what a life costs who watches.
pub(super) fn flood(binary: &Path, scale: Scale) -> Vec<Row> {
    let ours = || -> Result<(f64, f64)> {
        let agent = Agent::start(binary)?;
        let before = agent.cpu()?;
        let lives = everywhere("flood", scale.seconds)?;
        std::thread::sleep(Duration::from_millis(500));
        let cpu = agent.cpu()?.saturating_sub(before);
        // So that "nothing lost" is not said of an agent that saw nothing.
        let seen = agent.metric("jobwarden_events_total", "kind=\"reap\"")?;
        ensure!(seen >= lives as f64 * 0.5, "{lives} lives, and {seen} reaps were seen");
        Ok((agent.metric("jobwarden_events_lost_total", "")?, cpu.as_secs_f64() * 1e6 / lives as f64))
    };
    let peer = |peer: &Peer| -> Result<Figure> {
        let watch = Watch::peer(peer)?;
        let before = watch.cpu()?;
        let lives = everywhere("flood", (scale.seconds / 12).max(1))?;
        std::thread::sleep(Duration::from_millis(500));
        let cpu = watch.cpu()?.saturating_sub(before);
        Ok(Figure::one(cpu.as_secs_f64() * 1e6 / lives as f64))
    };
    let measured = ours();
    let of = |pick: fn(&(f64, f64)) -> f64| measured.as_ref().map(|m| Figure::one(pick(m))).map_err(again);
    vec![
        row("records lost while every processor spawns", "", &[Goal::AtMost(0.0)], of(|m| m.0)),
        Row {
            peers: PEERS.iter().map(|p| (p.name.to_owned(), peer(p))).collect(),
            ..row("CPU of the agent for one life under that flood", "us", &[Goal::AtMost(5.0)], of(|m| m.1))
        },
    ]
}

/// From the probe to the forest while 5,000 processes live and die a second, by the agent's own histogram.
pub(super) fn notice(binary: &Path, scale: Scale) -> Vec<Row> {
    let measure = || -> Result<(f64, f64)> {
        let agent = Agent::start(binary)?;
        let seconds = (scale.seconds / 6).max(2);
        let before = buckets(&agent)?;
        let lives: u64 = told("paced", seconds)?;
        std::thread::sleep(Duration::from_millis(300));
        let after = buckets(&agent)?;
        let want = PACE * seconds;
        // Less would be another load. On a busy machine the short form may not get there, and says so.
        ensure!(scale.short || lives * 10 >= want * 9, "the load made only {lives} lives of {want}");
        let grown: Vec<(f64, f64)> = after.iter().zip(&before).map(|(a, b)| (a.0, a.1 - b.1)).collect();
        Ok((quantile(&grown, 0.5)?, quantile(&grown, 0.99)?))
    };
    let measured = measure();
    let of =
        |pick: fn(&(f64, f64)) -> f64| measured.as_ref().map(|m| Figure::one(pick(m) * 1e3)).map_err(again);
    let what = |q| format!("from the probe to the forest at {PACE} lives/s, {q} (within its bucket)");
    vec![row(what("p50"), "ms", &[], of(|m| m.0)), row(what("p99"), "ms", &[Goal::AtMost(20.0)], of(|m| m.1))]
}

/// Upper bounds, and how many were at most that.
fn buckets(agent: &Agent) -> Result<Vec<(f64, f64)>> {
    let text = fetch(agent.listen, "/metrics")?;
    let buckets: Vec<(f64, f64)> = text
        .lines()
        .filter_map(|l| l.strip_prefix("jobwarden_event_lag_seconds_bucket{le=\""))
        .filter_map(|l| {
            let (bound, count) = l.split_once("\"} ")?;
            Some((if bound == "+Inf" { f64::INFINITY } else { bound.parse().ok()? }, count.parse().ok()?))
        })
        .collect();
    ensure!(!buckets.is_empty(), "the page has no jobwarden_event_lag_seconds");
    Ok(buckets)
}

/// As Prometheus' `histogram_quantile` has it: a straight line within the bucket.
fn quantile(buckets: &[(f64, f64)], q: f64) -> Result<f64> {
    let all = buckets.last().context("no buckets")?.1;
    ensure!(all > 0.0, "no lag was measured");
    let rank = all * q;
    let n = buckets.iter().position(|b| b.1 >= rank).context("no bucket")?;
    let (from, below) = n.checked_sub(1).map_or((0.0, 0.0), |n| buckets[n]);
    let (to, up_to) = buckets[n];
    Ok(if to.is_finite() { from + (to - from) * (rank - below) / (up_to - below) } else { from })
}

/// A quiet host.
pub(super) fn idle(binary: &Path, scale: Scale) -> Vec<Row> {
    let measure = || -> Result<[f64; 3]> {
        let agent = Agent::start(binary)?;
        std::thread::sleep(Duration::from_secs(1));
        let (cpu, slept) = (agent.cpu()?, sleeps(agent.pid())?);
        std::thread::sleep(Duration::from_secs(scale.seconds));
        let seconds = scale.seconds as f64;
        let cpu = agent.cpu()?.saturating_sub(cpu).as_secs_f64() / seconds * 100.0;
        let wakes = sleeps(agent.pid())?.saturating_sub(slept) as f64 / seconds;
        Ok([resident_kib(agent.pid()) as f64 / 1024.0, cpu, wakes])
    };
    let measured = measure();
    let of = |n: usize| measured.as_ref().map(|m| Figure::one(m[n])).map_err(again);
    vec![
        row("idle: resident memory", "MiB", &[Goal::AtMost(20.0)], of(0)),
        row("idle: CPU", "% of a core", &[Goal::AtMost(0.1)], of(1)),
        row("idle: wake-ups", "/s", &[Goal::AtMost(10.0)], of(2)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_lies_within_its_bucket() {
        let buckets = [(1.0, 50.0), (2.0, 90.0), (f64::INFINITY, 100.0)];
        let q = |q| quantile(&buckets, q).expect("a quantile");
        assert!((q(0.5) - 1.0).abs() < 1e-9);
        assert!((q(0.7) - 1.5).abs() < 1e-9);
        assert!((q(0.99) - 2.0).abs() < 1e-9, "the last bound that is known");
        assert!(quantile(&[(1.0, 0.0)], 0.5).is_err());
    }
}
