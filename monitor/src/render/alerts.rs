//! `alerts`.

use std::fmt::Write as _;
use std::time::SystemTime;

use super::escape::{age, between, escape};
use super::style::{Paint, Style};
use super::table::Table;
use crate::model::schema::{Alert, AlertState, Alerts, Severity};
use crate::model::stats::alert_state_label;

/// A line for each alert; `none` is what is said where there is none.
#[must_use]
pub fn alerts(alerts: &Alerts, none: &str, now: SystemTime, style: Style) -> String {
    if alerts.alerts.is_empty() {
        return format!("{none}\n");
    }
    let heads = &["ALERT", "STATE", "SEVERITY", "KIND", "AGE", "COUNT", "JOB", "SUMMARY"];
    let mut t = Table::new(heads, &[4, 5]);
    for a in &alerts.alerts {
        t.row(vec![
            (Paint::Strong, escape(&a.id)),
            (state_paint(a.state), alert_state_label(a.state).into()),
            (severity_paint(a), a.severity.as_str().into()),
            (Paint::Plain, a.kind.as_str().into()),
            (Paint::Plain, between(&a.since, now).map_or_else(|| "?".into(), age)),
            (Paint::Plain, a.count.to_string()),
            (Paint::Job, if a.job_name.is_empty() { "-".into() } else { escape(&a.job_name) }),
            (Paint::Plain, summary(a)),
        ]);
    }
    let mut out = t.render(style);
    for (id, who) in &alerts.undelivered {
        for u in who {
            let state = if u.parked { "refused it for good" } else { "has not got it yet" };
            let error = u.error.as_ref().map(|e| format!(": {}", escape(e))).unwrap_or_default();
            // Writing to a String cannot fail.
            let _ = writeln!(
                out,
                "{}: {} {state} ({} attempts){error}",
                escape(id),
                escape(&u.receiver),
                u.attempts
            );
        }
    }
    out
}

fn summary(a: &Alert) -> String {
    let text = escape(&a.summary);
    // The first line of the cause says it; `why` has the others.
    let cause = a.cause.as_ref().and_then(|c| c.summary.lines().next());
    match cause.filter(|c| a.state != AlertState::Resolved && *c != a.summary) {
        Some(cause) => format!("{}: {}", text.trim_end_matches('.'), escape(cause)),
        None => text,
    }
}

const fn state_paint(s: AlertState) -> Paint {
    match s {
        AlertState::Pending => Paint::Plain,
        AlertState::Firing => Paint::Bad,
        AlertState::Resolved => Paint::Dim,
    }
}

const fn severity_paint(a: &Alert) -> Paint {
    match (a.state, a.severity) {
        (AlertState::Resolved, _) => Paint::Dim,
        (_, Severity::Critical | Severity::Error) => Paint::Bad,
        (_, Severity::Warning) => Paint::Odd,
        (_, Severity::Info) => Paint::Plain,
    }
}
