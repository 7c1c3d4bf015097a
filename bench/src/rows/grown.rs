//! The same loads with 1x, 10x and 100x the processes, as ratios to the smallest.

use std::path::Path;

use anyhow::Result;

use super::many::{config, families, scrape};
use crate::figure::{Figure, Goal};
use crate::measure::{again, row};
use crate::row::{Row, Scale};
use crate::stand::told;
use crate::watch::Agent;

/// O(log n) an event from 100 to 10,000 would be twice as much. Jobs are the same number all the time.
const WORSE: f64 = 2.0;

pub(super) fn growth(binary: &Path, scale: Scale) -> Vec<Row> {
    let seconds = (scale.seconds / 12).max(2);
    let measure = |processes: u64| -> Result<(f64, f64)> {
        let _families = families(processes, processes / 10)?;
        let agent = Agent::with(binary, &config())?;
        // What a start brings with it is over.
        std::thread::sleep(std::time::Duration::from_secs(1));
        let before = agent.cpu()?;
        let lives: u64 = told("paced", seconds)?;
        let life = agent.cpu()?.saturating_sub(before).as_secs_f64() * 1e6 / lives as f64;
        let scrapes = (0..scale.rounds).map(|_| Ok(scrape(&agent)?.0)).collect::<Result<_>>()?;
        Ok((life, Figure::of(scrapes)?.median))
    };
    let sizes = [scale.processes / 100, scale.processes / 10, scale.processes].map(|n| n.max(20));
    let all: Vec<Result<(f64, f64)>> = sizes.iter().map(|&n| measure(n)).collect();
    let mut rows = Vec::new();
    for n in [1, 2] {
        let times = sizes[n] / sizes[0];
        for (what, unit, pick) in [
            ("CPU for one life", "us", (|m: &(f64, f64)| m.0) as fn(&(f64, f64)) -> f64),
            ("CPU for a scrape", "ms", |m| m.1),
        ] {
            let ratio = match (&all[0], &all[n]) {
                (Ok(one), Ok(more)) => Ok(Figure::one(pick(more) / pick(one))),
                (Err(e), _) | (_, Err(e)) => Err(again(e)),
            };
            let said =
                all[0].as_ref().map_or_else(|_| String::new(), |m| format!(" (there {:.3} {unit})", pick(m)));
            let what =
                format!("growth {times}x: {what} with {} processes against {}{said}", sizes[n], sizes[0]);
            rows.push(row(what, "times", &[Goal::AtMost(WORSE)], ratio));
        }
    }
    rows
}
