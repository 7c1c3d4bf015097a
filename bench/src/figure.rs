//! A figure with its spread, what is to be reached, and whether it is.

use anyhow::{Result, ensure};

/// The median of some measurements, and the quartiles beside it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Figure {
    pub(crate) median: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
    pub(crate) n: usize,
}

impl Figure {
    pub(crate) fn of(mut values: Vec<f64>) -> Result<Self> {
        ensure!(!values.is_empty(), "no measurement");
        values.sort_by(f64::total_cmp);
        let n = values.len();
        Ok(Self { median: values[n / 2], low: values[n / 4], high: values[n - 1 - n / 4], n })
    }

    /// Of a single long measurement.
    pub(crate) fn one(value: f64) -> Self {
        Self { median: value, low: value, high: value, n: 1 }
    }

    /// Divided by a constant.
    pub(crate) fn per(self, by: f64) -> Self {
        Self { median: self.median / by, low: self.low / by, high: self.high / by, n: self.n }
    }

    /// `12.3 [11.9-13.0]`.
    pub(crate) fn text(&self) -> String {
        if self.n < 2 {
            return number(self.median);
        }
        format!("{} [{}..{}]", number(self.median), number(self.low), number(self.high))
    }
}

/// As many digits as say something; what never came to its end is infinite.
pub(crate) fn number(value: f64) -> String {
    match value.abs() {
        v if v.is_infinite() => "never".to_owned(),
        v if v >= 1e6 => format!("{:.2} million", value / 1e6),
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 1.0 => format!("{value:.1}"),
        v if v > 0.0 => format!("{value:.3}"),
        _ => "0".to_owned(),
    }
}

/// What a row is to reach.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Goal {
    AtMost(f64),
    AtLeast(f64),
    /// Each peer that gave a figure has at least this many times ours (less is better).
    RatioToPeer(f64),
}

impl Goal {
    /// `None` where there is nothing to compare with.
    pub(crate) fn reached(self, ours: f64, peers: &[f64]) -> Option<bool> {
        match self {
            Self::AtMost(limit) => Some(ours <= limit),
            Self::AtLeast(limit) => Some(ours >= limit),
            Self::RatioToPeer(_) if peers.is_empty() => None,
            Self::RatioToPeer(times) => Some(peers.iter().all(|&p| p >= ours * times)),
        }
    }

    pub(crate) fn text(self) -> String {
        match self {
            Self::AtMost(v) => format!("<= {}", number(v)),
            Self::AtLeast(v) => format!(">= {}", number(v)),
            Self::RatioToPeer(1.0) => "below every peer".to_owned(),
            Self::RatioToPeer(v) => format!("{} times below every peer", number(v)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_with_quartiles() {
        let f = Figure::of(vec![5.0, 1.0, 3.0, 2.0, 4.0]).expect("five");
        assert_eq!((f.median, f.low, f.high, f.n), (3.0, 2.0, 4.0, 5));
        assert_eq!(f.text(), "3.0 [2.0..4.0]");
        assert!(Figure::of(vec![]).is_err());
    }

    #[test]
    fn goals_are_judged_and_not_judged_without_a_peer() {
        assert_eq!(Goal::AtMost(3.0).reached(3.0, &[]), Some(true));
        assert_eq!(Goal::AtMost(3.0).reached(3.1, &[]), Some(false));
        assert_eq!(Goal::AtLeast(5.0).reached(4.9, &[]), Some(false));
        assert_eq!(Goal::RatioToPeer(2.0).reached(1.0, &[]), None);
        assert_eq!(Goal::RatioToPeer(2.0).reached(1.0, &[2.0, f64::INFINITY]), Some(true));
        assert_eq!(Goal::RatioToPeer(2.0).reached(1.0, &[2.0, 1.9]), Some(false));
        // A slow-down may come out below nothing.
        assert_eq!(Goal::RatioToPeer(1.0).reached(-0.2, &[0.1]), Some(true));
        assert_eq!(Goal::RatioToPeer(1.0).reached(-0.2, &[0.1, -0.3]), Some(false));
        assert_eq!(Goal::RatioToPeer(1.0).reached(f64::NAN, &[-0.3]), Some(false));
        assert_eq!(Goal::AtMost(1.0).reached(f64::NAN, &[]), Some(false));
    }
}
