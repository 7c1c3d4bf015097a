//! The rows: what is measured, how, and what is to be reached.

mod cost;
mod ending;
mod forest;
mod grown;
mod many;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};

pub(super) use self::ending::PYTHON;
use super::figure::{Figure, Goal};
use super::{Row, Scale, going_on};

/// A group of rows.
type Group = fn(&Path, Scale) -> Vec<Row>;

const GROUPS: [(&str, Group); 12] = [
    ("probes", cost::probes),
    ("spawn", cost::spawning),
    ("flood", cost::flood),
    ("notice", cost::notice),
    ("idle", cost::idle),
    ("many", many::many),
    ("why", many::why),
    ("kill", ending::kill),
    ("bomb", ending::bomb),
    ("doom", ending::doom),
    ("growth", grown::growth),
    ("forest", forest::forest),
];

/// All groups, or those whose name is in `only`.
pub(super) fn all(binary: &Path, scale: Scale, only: &[String]) -> Vec<Row> {
    let mut rows = Vec::new();
    for (name, group) in GROUPS {
        if going_on().is_err() {
            break;
        }
        if !only.is_empty() && !only.iter().any(|o| o == name) {
            continue;
        }
        println!("{name} ...");
        let begun = Instant::now();
        let more = group(binary, scale);
        for row in &more {
            println!("  {}: {}", row.what, row.said());
        }
        println!("  ({:.0} s)", begun.elapsed().as_secs_f64());
        rows.extend(more);
    }
    rows
}

fn row(what: impl Into<String>, unit: &'static str, goals: &[Goal], ours: Result<Figure>) -> Row {
    Row { what: what.into(), unit, ours, goals: goals.to_vec(), peers: Vec::new(), noise: None }
}

/// Measurements of one thing; the first error ends them.
struct Series(Result<Vec<f64>>);

impl Series {
    fn new() -> Self {
        Self(Ok(Vec::new()))
    }

    fn going(&self) -> bool {
        self.0.is_ok()
    }

    fn add(&mut self, one: Result<f64>) {
        match (&mut self.0, one) {
            (Ok(values), Ok(value)) => values.push(value),
            (to @ Ok(_), Err(error)) => *to = Err(error),
            (Err(_), _) => {}
        }
    }

    fn figure(self) -> Result<Figure> {
        self.0.and_then(Figure::of)
    }
}

/// The same error for several rows.
fn again(error: &anyhow::Error) -> anyhow::Error {
    anyhow!("{error:#}")
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn clocked(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let begun = Instant::now();
    work()?;
    Ok(millis(begun.elapsed()))
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
