//! `status` and `enforcement`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::SystemTime;

use super::escape::{age, between, count, escape};
use super::style::{Paint, Style};
use crate::api::{EnforcementStatus, Status};

#[must_use]
pub fn status(s: &Status, now: SystemTime, style: Style) -> String {
    let up = between(&s.started, now).map_or_else(|| "?".into(), age);
    let lost: u64 = s.lost.values().sum();
    let by_kind: Vec<String> =
        s.lost.iter().filter(|(_, n)| **n > 0).map(|(k, n)| format!("{} {n}", escape(k))).collect();
    let synced = if s.synced {
        (Paint::Good, "yes".to_owned())
    } else {
        let why = s.not_ready.iter().map(|r| escape(r)).collect::<Vec<_>>().join("; ");
        (Paint::Bad, if why.is_empty() { "no".into() } else { format!("no: {why}") })
    };
    let firing = if s.alerts_firing > 0 { Paint::Bad } else { Paint::Plain };
    let waiting = if s.undelivered > 0 { Paint::Odd } else { Paint::Plain };
    let seen: u64 = s.events.values().sum();
    let mut rows = vec![
        (
            "agent",
            Paint::Plain,
            format!(
                "{} (commit {}, probes {}), pid {}, up {up}, on {}, Linux {}",
                escape(&s.version),
                escape(&s.revision),
                escape(&s.object),
                s.pid,
                escape(&s.host),
                escape(&s.kernel)
            ),
        ),
        ("synced", synced.0, synced.1),
        ("lost", if lost > 0 { Paint::Bad } else { Paint::Plain }, lost_text(lost, seen, &by_kind, &s.lost)),
        (
            "processes",
            Paint::Plain,
            format!(
                "{}, {}, {}, {}",
                s.processes,
                count(s.zombies, "zombie", "zombies"),
                count(s.orphans, "orphan", "orphans"),
                count(s.jobs, "job", "jobs")
            ),
        ),
        ("enforcement", enforcement_paint(&s.enforcement), enforcement_text(&s.enforcement)),
        ("alerts", firing, format!("{} firing, {} pending", s.alerts_firing, s.alerts_pending)),
        ("undelivered", waiting, s.undelivered.to_string()),
    ];
    rows.extend(s.storage.iter().map(|wrong| ("storage", Paint::Bad, escape(wrong))));
    let config =
        s.config.as_ref().map_or_else(|| "none, the defaults".into(), |p| escape(&p.to_string_lossy()));
    let (paint, config) = if s.config_ok {
        (Paint::Plain, config)
    } else {
        (Paint::Bad, format!("{config}: the last reload was refused, the one before is in force"))
    };
    rows.push(("config", paint, config));
    let listen =
        s.listen.as_ref().map_or_else(|| "no TCP listener".into(), |l| format!("http://{}", escape(l)));
    let pinned = if s.pinned { "pinned: lineage outlives the agent" } else { "not pinned" };
    rows.push(("metrics", Paint::Plain, listen));
    rows.push(("probes", Paint::Plain, pinned.into()));
    for (probe, why) in &s.probes_off {
        rows.push(("", Paint::Odd, format!("{} is off: {}", escape(probe), escape(why))));
    }
    let mut out = String::new();
    for (head, paint, text) in rows {
        let head = style.paint(Paint::Dim, &format!("{head:12}"));
        let _ = writeln!(out, "{head} {}", style.paint(paint, &text));
    }
    out
}

fn lost_text(lost: u64, seen: u64, by_kind: &[String], all: &BTreeMap<String, u64>) -> String {
    // An agent that can read its probes' counters names every kind.
    if all.is_empty() {
        return "unknown".to_owned();
    }
    if lost == 0 {
        return format!("none of {seen} events");
    }
    format!("{lost} of {} events ({})", seen + lost, by_kind.join(", "))
}

#[must_use]
pub fn enforcement(e: &EnforcementStatus, style: Style) -> String {
    format!("enforcement {}\n", style.paint(enforcement_paint(e), &enforcement_text(e)))
}

const fn enforcement_paint(e: &EnforcementStatus) -> Paint {
    match (e.fuse_open, e.enabled) {
        (true, _) => Paint::Bad,
        (_, true) => Paint::Good,
        _ => Paint::Plain,
    }
}

fn enforcement_text(e: &EnforcementStatus) -> String {
    let until = e.until.as_ref().map_or_else(String::new, |u| format!(" until {}", escape(u)));
    let fuse = if e.fuse_open {
        "the fuse is OPEN: nothing is ended by policy until `jobwarden enforcement on`".to_owned()
    } else {
        format!("{} of {} kills in the last minute", e.kills_last_minute, e.max_kills_per_minute)
    };
    format!("{}{until}, {fuse}", if e.enabled { "on" } else { "off" })
}
