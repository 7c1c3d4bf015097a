//! What alerts say, in plain words. One sentence says what is the case, the next what is or would be done.

use std::fmt::Write as _;

use super::forest::{Idx, Node};
use super::view::View;
use crate::model::key::Key;
use crate::model::outside::OutsideText;
use crate::model::schema::KillReport;

/// `1.5 s`, `45 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`.
pub(super) fn span(ns: u64) -> String {
    let s = ns / 1_000_000_000;
    let two = |a: u64, ua: &str, b: u64, ub: &str| {
        if b == 0 { format!("{a} {ua}") } else { format!("{a} {ua} {b} {ub}") }
    };
    match s {
        0..10 => format!("{:.1} s", ns as f64 / 1e9),
        10..120 => format!("{s} s"),
        120..7_200 => two(s / 60, "min", s % 60, "s"),
        7_200..172_800 => two(s / 3_600, "h", s / 60 % 60, "min"),
        _ => two(s / 86_400, "d", s / 3_600 % 24, "h"),
    }
}

fn who(n: &Node) -> String {
    format!("{} ({})", OutsideText::from_bytes(n.comm.bytes()), n.key)
}

/// As [`who`]; of a namespace's PID 1 also of what it is the init.
fn who_or_init(v: View<'_>, i: Idx) -> String {
    let n = v.forest.node(i);
    let inside = v.forest.extra(i).filter(|x| x.ns_pid == Some(1));
    let of = match (inside, v.container_of(i)) {
        (None, _) => return who(n),
        (Some(_), Some(c)) => crate::model::container::init_of(Some(&c), None),
        (Some(x), None) => crate::model::container::init_of(None, x.pid_ns),
    };
    format!("{}, {of},", who(n))
}

fn plural(n: usize, one: &str) -> String {
    if n == 1 { format!("one {one}") } else { format!("{n} {one}s") }
}

fn job(v: View<'_>, g: Idx) -> String {
    v.jobs.get(g).map_or_else(
        || "The job".to_owned(),
        |j| {
            if j.record.name.is_empty() {
                format!("Job {}", j.record.id)
            } else {
                format!("Job {} ({})", j.record.name, j.record.id)
            }
        },
    )
}

pub(super) fn zombies(v: View<'_>, parent: Idx, oldest: Idx, count: usize, now: u64) -> String {
    let z = v.forest.node(oldest);
    let age = span(now.saturating_sub(z.since));
    if count == 1 {
        format!(
            "{} does not reap its zombie {}, which has been dead for {age}.",
            who_or_init(v, parent),
            who(z)
        )
    } else {
        format!(
            "{} does not reap its {count} zombies; the oldest, {}, has been dead for {age}.",
            who_or_init(v, parent),
            who(z)
        )
    }
}

pub(super) fn zombies_over(
    v: View<'_>,
    parent: Key,
    oldest: Option<&(Key, OutsideText, u64)>,
    now: u64,
) -> String {
    let node = v.forest.find(parent).map(|i| v.forest.node(i));
    let name = node.map_or_else(|| format!("The parent ({parent})"), who);
    let Some((key, comm, since)) = oldest else {
        return format!("{name} has no zombies any more.");
    };
    let stayed = span(now.saturating_sub(*since));
    if node.is_some_and(Node::alive) {
        format!(
            "The zombie {comm} ({key}) was reaped; it had stayed for {stayed}. {name} has no zombies any more."
        )
    } else {
        format!(
            "{name} has ended, so its zombie {comm} ({key}) was left to an adopter; it had stayed for {stayed}."
        )
    }
}

pub(super) fn orphans(
    v: View<'_>,
    g: Idx,
    oldest: Idx,
    count: usize,
    kill: Option<&str>,
    now: u64,
) -> String {
    let n = v.forest.node(oldest);
    let age = span(now.saturating_sub(n.orphan_since));
    let adopter = match v.forest.get(n.parent) {
        Some(p) if p.alive() => {
            format!(", adopted by {}", who_or_init(v, n.parent).trim_end_matches(','))
        }
        _ => String::new(),
    };
    let mut s = format!(
        "{} has {}: {} outlived its parent {age} ago{adopter}.",
        job(v, g),
        plural(count, "orphan"),
        who(n)
    );
    if count > 1 {
        s = s.replace(": ", "; the oldest, ").replace(" outlived", ", outlived");
    }
    if let Some(k) = kill {
        let _ = write!(s, " {k}");
    }
    s
}

pub(super) fn orphans_over(v: View<'_>, g: Idx) -> String {
    format!("{} has no orphans any more.", job(v, g))
}

pub(super) fn timeout(v: View<'_>, g: Idx, deadline: u64, kill: Option<&str>, now: u64) -> String {
    let live = v.forest.groups.get(g).map_or(0, |x| x.all.live as usize);
    let processes = if live == 1 { "one process".to_owned() } else { format!("{live} processes") };
    let mut s = format!(
        "{} passed its deadline {} ago and still has {processes}.",
        job(v, g),
        span(now.saturating_sub(deadline))
    );
    if let Some(k) = kill {
        let _ = write!(s, " {k}");
    }
    s
}

pub(super) fn job_over(v: View<'_>, g: Idx, why: &str) -> String {
    format!("{}: {why}.", job(v, g))
}

pub(super) fn kill_failed(v: View<'_>, g: Idx, why: &str) -> String {
    format!("{} could not be ended: {why}.", job(v, g))
}

fn named(v: View<'_>, key: Key) -> String {
    v.forest.find(key).map_or_else(|| format!("Process {key}"), |i| who(v.forest.node(i)))
}

pub(super) fn process_kill_failed(v: View<'_>, root: Key, why: &str) -> String {
    format!("{} and what descends from it could not be ended: {why}.", named(v, root))
}

pub(super) fn process_over(v: View<'_>, root: Key) -> String {
    format!("{}: who survived has ended.", named(v, root))
}

pub(super) fn survivors(r: &KillReport) -> String {
    let mut s = String::new();
    for (i, p) in r.survivors.iter().enumerate().take(8) {
        let sep = if i == 0 { "" } else { ", " };
        let _ = match r.stuck.iter().find(|k| k.process.id == p.id) {
            Some(stuck) => write!(s, "{sep}{stuck}"),
            None => write!(s, "{sep}{} ({})", p.comm, p.id),
        };
    }
    if r.survivors.len() > 8 {
        let _ = write!(s, " and {} more", r.survivors.len() - 8);
    }
    s + " survived"
}

pub(super) fn fuse(max: u32) -> String {
    format!(
        "More than {max} jobs would have been ended by policy within a minute, so the fuse has opened: policy ends no \
         more until `jobwarden enforcement on`."
    )
}

pub(super) fn lost(n: usize, now: u64, since: u64) -> String {
    format!(
        "{n} records of the kernel were lost in {}. The forest is read anew from the kernel.",
        span(now.saturating_sub(since))
    )
}

#[cfg(test)]
mod tests {
    use super::span;

    #[test]
    fn spans() {
        let s = |x: f64| span((x * 1e9) as u64);
        assert_eq!([s(0.04), s(1.5), s(45.4)], ["0.0 s", "1.5 s", "45 s"]);
        assert_eq!([s(200.0), s(180.0), s(7_500.0)], ["3 min 20 s", "3 min", "2 h 5 min"]);
        assert_eq!(s(273_600.0), "3 d 4 h");
    }
}
