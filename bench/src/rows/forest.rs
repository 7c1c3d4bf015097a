//! Forest and policy alone, on one core: `monitor/benches/forest.rs`, whose figures are read here.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::figure::{Figure, Goal};
use crate::measure::{again, row};
use crate::row::{Row, Scale};
use crate::watch::bound;

pub(super) fn forest(program: &Path, scale: Scale) -> Vec<Row> {
    let figures = run(program, scale);
    let get = |name: &str| -> Result<f64> {
        let all = figures.as_ref().map_err(again)?;
        all.get(name).copied().with_context(|| format!("the forest bench says no {name}"))
    };
    let one = |name: &str| get(name).map(Figure::one);
    let ratio = |a: &str, b: &str| Ok(Figure::one(get(a)? / get(b)?));
    let (few, many) = ("10,000", if scale.short { "50,000 (in full 1,000,000)" } else { "1,000,000" });
    vec![
        row(
            format!("forest + policy with {few} live processes"),
            "events/s",
            &[Goal::AtLeast(5e6)],
            one("forest_events_per_s_few"),
        ),
        row(
            format!("forest + policy with {many}"),
            "events/s",
            // Half of what is asked for with few; what is kept of the rate that is reached there is the next row.
            &[Goal::AtLeast(2.5e6)],
            one("forest_events_per_s_many"),
        ),
        row(
            "the share of that rate that is kept there",
            "times",
            &[Goal::AtLeast(0.5)],
            ratio("forest_events_per_s_many", "forest_events_per_s_few"),
        ),
        row(format!("a tick, one thing due, with {few}"), "ns", &[], one("forest_tick_ns_few")),
        row(
            format!("a tick with {many} against {few}"),
            "times",
            &[Goal::AtMost(2.0)],
            ratio("forest_tick_ns_many", "forest_tick_ns_few"),
        ),
        row("memory of one process", "bytes", &[Goal::AtMost(500.0)], one("forest_bytes_per_process")),
    ]
}

fn run(program: &Path, scale: Scale) -> Result<BTreeMap<String, f64>> {
    let mut bench = Command::new(program);
    bound(&mut bench);
    if scale.short {
        bench.arg("--short");
    }
    let out = bench.output()?;
    ensure!(out.status.success(), "the forest bench ended with {}", out.status);
    let line = |l: &str| {
        let (name, value) = l.split_once(' ')?;
        Some((name.to_owned(), value.parse().ok()?))
    };
    Ok(String::from_utf8_lossy(&out.stdout).lines().filter_map(line).collect())
}
