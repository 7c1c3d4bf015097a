//! `cargo xtask bench`: jobwarden and its peers in the same run, measured in turn, printed as a table of ratios and
//! written to docs/BENCHMARKS.md. Wants a quiet machine and root; changes one sysctl and puts it back.

pub(crate) mod load;
mod rows;
mod watch;

use std::fmt::Write as _;
use std::fs;
use std::process::Command;

use anyhow::{Result, bail};
use serde_json::json;

use self::watch::PEERS;
use crate::{cargo, needs, root};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// A tenth of everything and the dev profile: shows that each row yields a figure, not what it is
    #[arg(long)]
    short: bool,
    /// Print JSON too
    #[arg(long)]
    json: bool,
    /// Do not write docs/BENCHMARKS.md
    #[arg(long)]
    no_page: bool,
}

/// One row of the table.
pub(super) struct Row {
    what: &'static str,
    unit: &'static str,
    /// `Err`: why there is no figure.
    ours: Result<f64>,
    /// At most this, where there is a goal.
    goal: Option<f64>,
    peers: Vec<(String, Result<f64>)>,
}

/// How much is done.
#[derive(Clone, Copy)]
pub(super) struct Scale {
    pub(super) lives: u64,
    pub(super) rounds: usize,
    pub(super) seconds: u64,
    pub(super) processes: u64,
}

const FULL: Scale = Scale { lives: 200_000, rounds: 20, seconds: 60, processes: 10_000 };
const SHORT: Scale = Scale { lives: 2_000, rounds: 2, seconds: 3, processes: 500 };

pub(crate) fn run(args: &Args) -> Result<bool> {
    needs::check(&needs::for_agent())?;
    if !root::is_root() {
        bail!(
            "the benchmark measures other programs as root\n  to mend it: sudo -E env PATH=\"$PATH\" cargo xtask bench"
        );
    }
    install_peers();
    let _tracefs = watch::Tracefs::mounted();
    let scale = if args.short { SHORT } else { FULL };
    let binary = cargo::jobwarden(if args.short { "dev" } else { "release" })?;
    let rows = rows::all(&binary, scale);
    let table = table(&rows);
    println!("\n{table}");
    if args.json {
        println!("{}", as_json(&rows));
    }
    if !args.no_page && !args.short {
        fs::write(root::dir().join("docs/BENCHMARKS.md"), page(&table, scale))?;
        println!("written to docs/BENCHMARKS.md");
    }
    Ok(rows.iter().all(|r| r.ours.is_ok()))
}

/// Where that is possible. Who is missing is named in the table.
fn install_peers() {
    let here = PEERS.iter().all(|p| p.commands.iter().all(|c| watch::located(c[0]).is_some()));
    if !here {
        println!("installing forkstat, libbpf-tools, bpftrace ...");
        let done = Command::new("apt-get")
            .args([
                "-q",
                "install",
                "-y",
                "--no-install-recommends",
                "forkstat",
                "libbpf-tools",
                "bpftrace",
                "procps",
                "python3-psutil",
            ])
            .env("DEBIAN_FRONTEND", "noninteractive")
            .output();
        if !done.is_ok_and(|o| o.status.success()) {
            eprintln!("apt-get install failed: peers that are missing are named in the table");
        }
    }
}

fn table(rows: &[Row]) -> String {
    let mut text = String::from(
        "| what | jobwarden | goal | peers: figure (times jobwarden's) |\n| --- | --- | --- | --- |\n",
    );
    for row in rows {
        let (ours, reached) = match &row.ours {
            Ok(value) => {
                let reached = match row.goal {
                    Some(goal) if *value > goal => format!("<= {}: **not reached**", figure(goal)),
                    Some(goal) => format!("<= {}: reached", figure(goal)),
                    None => String::new(),
                };
                (format!("{} {}", figure(*value), row.unit), reached)
            }
            Err(error) => (format!("no figure: {error:#}"), String::new()),
        };
        let peers: Vec<String> = row.peers.iter().map(|(name, value)| peer(name, value, row)).collect();
        // Writing to a String cannot fail.
        let _ = writeln!(text, "| {} | {ours} | {reached} | {} |", row.what, peers.join("; "));
    }
    text
}

fn peer(name: &str, value: &Result<f64>, row: &Row) -> String {
    match (value, &row.ours) {
        (Ok(theirs), Ok(ours)) if *ours > 0.0 => {
            format!("{name} {} {} ({:.1}x)", figure(*theirs), row.unit, theirs / ours)
        }
        (Ok(theirs), _) => format!("{name} {} {}", figure(*theirs), row.unit),
        (Err(error), _) => format!("{name}: {error:#}"),
    }
}

fn figure(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 1.0 => format!("{value:.1}"),
        _ => format!("{value:.3}"),
    }
}

fn as_json(rows: &[Row]) -> String {
    let error = |e: &anyhow::Error| json!({ "error": format!("{e:#}") });
    let value = |v: &Result<f64>| v.as_ref().map_or_else(error, |v| json!(v));
    let rows: Vec<_> = rows
        .iter()
        .map(|r| {
            let peers: serde_json::Map<_, _> = r.peers.iter().map(|(n, v)| (n.clone(), value(v))).collect();
            json!({ "what": r.what, "unit": r.unit, "jobwarden": value(&r.ours), "goal": r.goal, "peers": peers })
        })
        .collect();
    json!({ "rows": rows }).to_string()
}

fn page(table: &str, scale: Scale) -> String {
    let read = |file: &str| fs::read_to_string(file).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu.lines().find_map(|l| l.strip_prefix("model name")).unwrap_or(": unknown");
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let date = Command::new("date").args(["-u", "+%F"]).output();
    let date = date.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).unwrap_or_default();
    format!(
        "# Benchmarks\n\n\
         `cargo xtask bench`, {date}, Linux {}, {processors} processors,{}. Peers ran in the same run, in turn with jobwarden; \
         medians of {} rounds where there are rounds, {} lives for the probes' time, {} s for floods and for idling, {} \
         processes where many stand by. A figure that is not reached stands here as not reached. Tetragon, Falco, quark and \
         kunai need kprobes or fentry, which this kernel does not have: they were not run.\n\n{table}\n\
         What the rows mean stands in `xtask/src/bench/rows.rs`.\n",
        read("/proc/sys/kernel/osrelease").trim(),
        model.trim_start_matches([':', '\t', ' ']).trim(),
        scale.rounds,
        scale.lives,
        scale.seconds,
        scale.processes,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(ours: Result<f64>) -> Row {
        let peers =
            vec![("lsof".to_owned(), Ok(30.0)), ("x".to_owned(), Err(anyhow::anyhow!("does not run")))];
        Row { what: "a why", unit: "ms", ours, goal: Some(10.0), peers }
    }

    #[test]
    fn a_goal_that_is_missed_and_a_peer_that_does_not_run_are_said() {
        let text = table(&[row(Ok(15.0)), row(Ok(5.0)), row(Err(anyhow::anyhow!("no agent")))]);
        assert!(
            text.contains("15.0 ms | <= 10.0: **not reached** | lsof 30.0 ms (2.0x); x: does not run"),
            "{text}"
        );
        assert!(text.contains("5.0 ms | <= 10.0: reached | lsof 30.0 ms (6.0x)"), "{text}");
        assert!(text.contains("no figure: no agent"), "{text}");
    }

    #[test]
    fn json_has_the_same() {
        let text = as_json(&[row(Ok(15.0))]);
        let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(value["rows"][0]["peers"]["lsof"], 30.0);
        assert_eq!(value["rows"][0]["peers"]["x"]["error"], "does not run");
    }
}
