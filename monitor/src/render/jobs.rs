//! `jobs`.

use std::time::SystemTime;

use super::escape::{age, between, escape};
use super::style::{Paint, Style};
use super::table::Table;
use crate::model::schema::{Job, JobState, Jobs};
use crate::model::stats::job_state_label;

/// A line for each job; `now` is for ages and for the time left.
#[must_use]
pub fn jobs(jobs: &Jobs, now: SystemTime, style: Style) -> String {
    if jobs.jobs.is_empty() {
        return "no jobs\n".into();
    }
    let mut t =
        Table::new(&["STATE", "AGE", "LEFT", "PROCS", "ZOMBIES", "ORPHANS", "NAME", "JOB"], &[1, 2, 3, 4, 5]);
    for j in &jobs.jobs {
        let number = |n: usize, paint| (if n > 0 { paint } else { Paint::Plain }, n.to_string());
        t.row(vec![
            (paint(j.state), job_state_label(j.state).into()),
            (Paint::Plain, between(&j.started, now).map_or_else(|| "?".into(), age)),
            left(j, now),
            number(j.processes, Paint::Plain),
            number(j.zombies, Paint::Bad),
            number(j.orphans, Paint::Odd),
            (Paint::Job, escape(&j.name)),
            // Last and never cut: it is what other commands are given.
            (Paint::Plain, j.id.to_string()),
        ]);
    }
    t.render(Style { width: None, ..style })
}

fn left(j: &Job, now: SystemTime) -> (Paint, String) {
    // One that is over has no time left to speak of.
    let deadline = j.deadline.as_deref().filter(|_| j.state != JobState::Done);
    let Some(over) = deadline.and_then(|d| between(d, now)) else {
        return (Paint::Dim, "-".into());
    };
    if over > 0.0 { (Paint::Bad, format!("-{}", age(over))) } else { (Paint::Plain, age(-over)) }
}

const fn paint(s: JobState) -> Paint {
    match s {
        JobState::Running => Paint::Good,
        JobState::Lingering => Paint::Odd,
        JobState::Expired | JobState::Killing => Paint::Bad,
        JobState::Done => Paint::Dim,
    }
}
