//! A row of the table, and how much is measured for each.

use anyhow::Result;

use crate::figure::{Figure, Goal};

/// One row of the table.
pub(crate) struct Row {
    pub(crate) what: String,
    pub(crate) unit: &'static str,
    /// `Err`: why there is no figure.
    pub(crate) ours: Result<Figure>,
    pub(crate) goals: Vec<Goal>,
    pub(crate) peers: Vec<(String, Result<Figure>)>,
    /// What the same measure gives where nothing is started, if it was asked.
    pub(crate) noise: Option<Figure>,
}

/// How much is done.
#[derive(Clone, Copy)]
pub(crate) struct Scale {
    pub(crate) lives: u64,
    pub(crate) rounds: usize,
    pub(crate) seconds: u64,
    pub(crate) processes: u64,
    pub(crate) short: bool,
}

pub(crate) const FULL: Scale =
    Scale { lives: 200_000, rounds: 20, seconds: 60, processes: 10_000, short: false };
pub(crate) const SHORT: Scale = Scale { lives: 2_000, rounds: 1, seconds: 2, processes: 500, short: true };
