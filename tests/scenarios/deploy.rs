//! What an operator installs fits the agent: the dashboard and the rules name metrics that exist, every metric is on the
//! dashboard, every alert has its page, and Prometheus' own programs accept the files.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use jobwarden::model::schema::AlertKind;
use jobwarden_tests::{Agent, agent, fixture, skip};

/// Not exported at every moment, so the agent here may not show them.
const SOMETIMES: [(&str, &str); 5] = [
    ("jobwarden_probe_runtime_seconds_total", "only where kernel.bpf_stats_enabled is on"),
    ("jobwarden_probe_runs_total", "only where kernel.bpf_stats_enabled is on"),
    ("jobwarden_jobs", "a family without a job has no series"),
    ("jobwarden_notifications_failed_total", "a receiver has a series for each reason it had"),
    ("jobwarden_notification_duration_seconds", "a family without a receiver has no series"),
];

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(PathBuf::new, Path::to_path_buf)
}

fn read(path: &str) -> Result<String> {
    std::fs::read_to_string(top().join(path)).with_context(|| path.to_owned())
}

/// The metrics that a text names; recording rules have a colon and are none.
fn named(text: &str) -> BTreeSet<String> {
    text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'))
        .filter(|w| w.starts_with("jobwarden_") || w.starts_with("process_"))
        .map(|w| w.strip_suffix("_bucket").unwrap_or(w).to_owned())
        .collect()
}

/// The families of an exposition.
fn exported(metrics: &str) -> BTreeSet<String> {
    let heads = metrics.lines().filter_map(|l| l.strip_prefix("# TYPE "));
    heads.filter_map(|l| l.split(' ').next()).map(str::to_owned).collect()
}

#[test]
fn the_dashboard_has_every_metric_and_no_other() -> Result<()> {
    let fixture = fixture!("the_dashboard_has_every_metric_and_no_other");
    let agent = Agent::start(&fixture, "")?;
    let (status, metrics) = agent::http(agent.port, "GET", "/metrics", "")?;
    ensure!(status == 200, "{status}");
    let exported = exported(&metrics);
    let dashboard = read("deploy/grafana/jobwarden.json")?;
    let json: serde_json::Value = serde_json::from_str(&dashboard)?;
    let exprs = json["panels"].as_array().context("no panels")?.iter();
    let exprs = exprs.flat_map(|p| p["targets"].as_array().into_iter().flatten());
    let shown: BTreeSet<String> = exprs.flat_map(|t| named(t["expr"].as_str().unwrap_or_default())).collect();
    let sometimes: BTreeSet<String> = SOMETIMES.iter().map(|(name, _)| (*name).to_owned()).collect();

    let unknown: Vec<_> =
        shown.iter().filter(|m| !exported.contains(*m) && !sometimes.contains(*m)).collect();
    ensure!(unknown.is_empty(), "the dashboard shows what the agent does not export: {unknown:?}");
    let missing: Vec<_> = exported.iter().filter(|m| !shown.contains(*m)).collect();
    ensure!(missing.is_empty(), "no panel shows {missing:?}");

    let rules = named(&read("deploy/prometheus/jobwarden.rules.yml")?);
    let unknown: Vec<_> =
        rules.iter().filter(|m| !exported.contains(*m) && !sometimes.contains(*m)).collect();
    ensure!(unknown.is_empty(), "the rules use what the agent does not export: {unknown:?}");
    agent.stop()
}

/// A rule that fires on every healthy host is turned off soon, and then tells nobody of a sick one.
#[test]
fn no_rule_about_probes_or_stores_fires_on_a_healthy_host() -> Result<()> {
    let fixture = fixture!("no_rule_about_probes_or_stores_fires_on_a_healthy_host");
    let agent = Agent::start(&fixture, "")?;
    let (_, metrics) = agent.get("/metrics")?;
    let rules = read("deploy/prometheus/jobwarden.rules.yml")?;
    let excluded = |series: &str, label: &str| -> Result<regex::Regex> {
        let begins = format!("{series}{{{label}!~\"");
        let names = rules.split_once(&begins).and_then(|(_, rest)| rest.split_once('"'));
        let (names, _) = names.with_context(|| format!("no rule has {begins}"))?;
        Ok(regex::Regex::new(&format!("^(?:{names})$"))?)
    };
    let value = |series: &str, label: &str| -> Vec<(String, f64)> {
        let begins = format!("{series}{{{label}=\"");
        let of = |l: &str| {
            let (name, value) = l.strip_prefix(&begins)?.split_once("\"} ")?;
            Some((name.to_owned(), value.parse().ok()?))
        };
        metrics.lines().filter_map(of).collect()
    };
    let probes = value("jobwarden_probe_attached", "probe");
    let free = excluded("jobwarden_probe_attached", "probe")?;
    for must in ["fork", "exec", "exit", "free"] {
        ensure!(probes.contains(&(must.to_owned(), 1.0)) && !free.is_match(must), "{must}: {probes:?}");
    }
    let detached: Vec<_> = probes.iter().filter(|(p, v)| *v < 1.0 && !free.is_match(p)).collect();
    ensure!(detached.is_empty(), "JobwardenProbeDetached would fire for {detached:?}");
    // Those that give up the old for the new are full as a matter of course; all others must have a bound and room.
    let (entries, max) =
        (value("jobwarden_store_entries", "store"), value("jobwarden_store_max_entries", "store"));
    let free = excluded("jobwarden_store_entries", "store")?;
    ensure!(entries.len() == max.len() && !entries.is_empty(), "{entries:?} {max:?}");
    for ((name, n), (of, max)) in entries.iter().zip(&max) {
        ensure!(name == of && *max > 0.0, "{name} {of} {max}");
        ensure!(
            free.is_match(name) || n / max <= 0.9,
            "JobwardenStoreFull would fire for {name}: {n} of {max}"
        );
    }
    agent.stop()
}

#[test]
fn every_alert_has_its_page_with_its_name_and_its_severity() -> Result<()> {
    for kind in AlertKind::ALL {
        let kind = kind.as_str();
        let page = read(&format!("docs/alerts/{kind}.md"))?;
        ensure!(page.starts_with(&format!("# {kind}: ")), "{kind}: its page has another title");
        let name: String = kind.split('-').map(|w| w[..1].to_uppercase() + &w[1..]).collect();
        ensure!(
            page.contains(&format!("**Jobwarden{name}**")),
            "{kind}: its page does not say its alertname"
        );
        ensure!(page.contains("## What to do"), "{kind}: its page does not say what to do");
    }
    Ok(())
}

/// Runs a checker in deploy/; `None` where it is not installed.
fn checked(program: &str, args: &[&str], folder: &str) -> Result<Option<()>> {
    let out = match Command::new(program).args(args).current_dir(top().join(folder)).output() {
        Ok(out) => out,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).context(program.to_owned()),
    };
    let said = [out.stdout, out.stderr].concat();
    ensure!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&said));
    Ok(Some(()))
}

#[test]
fn prometheus_takes_the_rules_and_they_fire_when_they_should() -> Result<()> {
    for args in [
        ["check", "rules", "jobwarden.rules.yml"],
        ["check", "config", "prometheus.yml"],
        ["test", "rules", "jobwarden.rules.test.yml"],
    ] {
        if checked("promtool", &args, "deploy/prometheus")?.is_none() {
            skip!("prometheus_takes_the_rules: no promtool (Debian's package prometheus)");
        }
    }
    Ok(())
}

#[test]
fn alertmanager_takes_the_route() -> Result<()> {
    if checked("amtool", &["check-config", "alertmanager.yml"], "deploy/alertmanager")?.is_none() {
        skip!("alertmanager_takes_the_route: no amtool (Debian's package prometheus-alertmanager)");
    }
    Ok(())
}
