//! /metrics as numbers.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};

/// The samples of one scrape of text format 0.0.4, by name and labels as written.
#[derive(Debug, Default)]
pub struct Metrics(BTreeMap<String, f64>);

impl Metrics {
    pub fn parse(text: &str) -> Result<Self> {
        let lines = text.lines().filter(|l| !l.is_empty() && !l.starts_with('#'));
        lines
            .map(|l| {
                let (name, value) = l.rsplit_once(' ').with_context(|| format!("no sample: {l}"))?;
                Ok((name.to_owned(), value.parse().with_context(|| format!("no number: {l}"))?))
            })
            .collect::<Result<_>>()
            .map(Self)
    }

    /// The sum of all samples of `name` whose labels contain all of `labels` (each as `key="value"`).
    #[must_use]
    pub fn sum(&self, name: &str, labels: &[&str]) -> f64 {
        self.series(name).filter(|(l, _)| labels.iter().all(|want| l.contains(want))).map(|(_, v)| v).sum()
    }

    /// One sample: an error if there is none.
    pub fn one(&self, name: &str, labels: &[&str]) -> Result<f64> {
        self.series(name)
            .find(|(l, _)| labels.iter().all(|want| l.contains(want)))
            .map(|(_, v)| v)
            .with_context(|| format!("no {name} {labels:?}"))
    }

    /// The probes' accounts, to the last record: hits = sent + lost + filtered for each kind, and sent = received + still in
    /// the ring.
    pub fn balanced(&self) -> Result<()> {
        for kind in ["fork", "exec", "exit", "leader_exit", "reap", "signal"] {
            let label = format!("kind=\"{kind}\"");
            let of = |name| self.sum(name, &[&label]);
            let (hits, sent) = (of("jobwarden_probe_hits_total"), of("jobwarden_events_sent_total"));
            let (lost, filtered) = (of("jobwarden_events_lost_total"), of("jobwarden_events_filtered_total"));
            ensure!(
                (hits - sent - lost - filtered).abs() < 0.5,
                "{kind}: {hits} hits, {sent} + {lost} + {filtered}"
            );
            let received = of("jobwarden_events_total");
            ensure!((sent - received).abs() < 0.5, "{kind}: {sent} sent, {received} received");
        }
        ensure!(self.one("jobwarden_ring_used_bytes", &[])? < 0.5, "the ring is not empty");
        Ok(())
    }

    /// Labels and value of each sample of `name`.
    pub fn series<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (&'a str, f64)> {
        self.0.range(name.to_owned()..).take_while(move |(k, _)| k.starts_with(name)).filter_map(
            move |(k, &v)| {
                let rest = &k[name.len()..];
                (rest.is_empty() || rest.starts_with('{')).then_some((rest, v))
            },
        )
    }
}
