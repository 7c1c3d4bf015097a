//! The report of `kill`.

use std::fmt::Write as _;

use super::escape::{age, count, escape};
use super::style::{Paint, Style};
use crate::model::outside::command_line as argv;
use crate::model::schema::{KillReport, Ref, SignalledOutcome};

/// What was done to whom, and what is left.
#[must_use]
pub fn kill(r: &KillReport, dry_run: bool, style: Style) -> String {
    let mut out = String::new();
    let target = escape(&r.target);
    for s in &r.signalled {
        let (paint, word) = match s.outcome {
            SignalledOutcome::DryRun => (Paint::Plain, "would get"),
            SignalledOutcome::Ended => (Paint::Good, "ended by"),
            SignalledOutcome::AlreadyGone => (Paint::Dim, "gone before"),
            // Of a stage before the last: whoever is left is told below.
            SignalledOutcome::Survived if r.survivors.iter().all(|p| p.id != s.process.id) => {
                (Paint::Odd, "outlived")
            }
            SignalledOutcome::Survived => (Paint::Bad, "survived"),
            SignalledOutcome::Spared => (Paint::Odd, "spared from"),
        };
        let word = style.paint(paint, &format!("{word:11} {:8}", escape(&s.signal)));
        let _ = writeln!(out, "  {word} {}", who(&s.process));
    }
    for s in &r.spared {
        let word = style.paint(Paint::Odd, "spared");
        let _ = writeln!(out, "  {word:20} {}: {}", who(&s.process), escape(&s.why));
    }
    for z in &r.zombies {
        let word = style.paint(Paint::Dim, "zombie");
        let _ = writeln!(out, "  {word:20} {}: has ended, its parent has not reaped it", who(z));
    }
    for p in &r.survivors {
        let word = style.paint(Paint::Bad, "SURVIVED");
        let _ = write!(out, "  {word:20} {}", who(p));
        if let Some(s) = r.stuck.iter().find(|s| s.process.id == p.id) {
            let _ = write!(out, ": state {}", escape(&s.state));
            if let Some(w) = &s.wchan {
                let _ = write!(out, ", waits in {}", escape(w));
            }
            if let Some(t) = &s.tracer {
                let _ = write!(out, ", held by tracer {} ({})", t.id, t.comm);
            }
            if s.frozen {
                out.push_str(", in a frozen cgroup");
            }
        }
        out.push('\n');
    }
    let last = if dry_run {
        format!(
            "{target}: {} would be signalled; nothing was done",
            count(r.signalled.len(), "process", "processes")
        )
    } else if r.survivors.is_empty() {
        let ended = r.signalled.iter().filter(|s| s.outcome == SignalledOutcome::Ended).count();
        format!("{target}: {} ended in {}, none left", count(ended, "process", "processes"), age(r.took_s))
    } else {
        format!("{target}: {} left after {}", count(r.survivors.len(), "process", "processes"), age(r.took_s))
    };
    let paint = if r.survivors.is_empty() { Paint::Strong } else { Paint::Bad };
    let _ = writeln!(out, "{}", style.paint(paint, &last));
    out
}

fn who(r: &Ref) -> String {
    let what = if r.argv.is_empty() { format!("[{}]", r.comm) } else { argv(&r.argv) };
    format!("{} {what}", r.id)
}
