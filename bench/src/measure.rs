//! What every group of rows needs to measure.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};

use crate::figure::{Figure, Goal};
use crate::row::Row;

pub(crate) fn row(what: impl Into<String>, unit: &'static str, goals: &[Goal], ours: Result<Figure>) -> Row {
    Row { what: what.into(), unit, ours, goals: goals.to_vec(), peers: Vec::new(), noise: None }
}

/// Measurements of one thing; the first error ends them.
pub(crate) struct Series(Result<Vec<f64>>);

impl Series {
    pub(crate) fn new() -> Self {
        Self(Ok(Vec::new()))
    }

    pub(crate) fn going(&self) -> bool {
        self.0.is_ok()
    }

    pub(crate) fn add(&mut self, one: Result<f64>) {
        match (&mut self.0, one) {
            (Ok(values), Ok(value)) => values.push(value),
            (to @ Ok(_), Err(error)) => *to = Err(error),
            (Err(_), _) => {}
        }
    }

    pub(crate) fn figure(self) -> Result<Figure> {
        self.0.and_then(Figure::of)
    }
}

/// The same error for several rows.
pub(crate) fn again(error: &anyhow::Error) -> anyhow::Error {
    anyhow!("{error:#}")
}

pub(crate) fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

pub(crate) fn clocked(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let begun = Instant::now();
    work()?;
    Ok(millis(begun.elapsed()))
}

pub(crate) fn quiet(command: &mut Command) -> Result<()> {
    let out = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).output()?;
    ensure!(
        out.status.success(),
        "{}: {}",
        command.get_program().display(),
        String::from_utf8_lossy(&out.stderr).trim()
    );
    Ok(())
}
