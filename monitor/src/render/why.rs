//! `why`: three lines that say it, the evidence as an indented chain, the remedy as a command to copy.

use std::fmt::Write as _;

use super::escape::{age, escape, exit, process};
use super::style::{Paint, Style, cut};
use crate::model::outside::command_line as argv;
use crate::model::schema::{Cause, Evidence, Process, Ref, SignalBy, SignalOutcome, State, Verdict};

#[must_use]
pub fn why(c: &Cause, style: Style) -> String {
    let p = &c.process;
    let mut out = String::new();
    let command = if p.argv.is_empty() { format!("[{}]", p.comm) } else { argv(&p.argv) };
    let command = style.width.map_or_else(|| command.clone(), |w| cut(&command, w.max(60) - 24));
    let _ = writeln!(out, "{} {command}", style.paint(Paint::Strong, &p.id.to_string()));
    let _ = writeln!(out, "  {}", style.paint(state_paint(p), &state(p)));
    let verdict = style.paint(verdict_paint(c.verdict), &format!("{}:", word(c.verdict)));
    let mut lines = c.summary.lines();
    let _ = writeln!(out, "  {verdict} {}", escape(lines.next().unwrap_or_default()));
    for line in lines {
        let _ = writeln!(out, "  {}", escape(line));
    }
    if !c.evidence.is_empty() {
        out.push('\n');
    }
    let (mut base, mut last) = (0, None);
    for e in &c.evidence {
        let (rank, text) = evidence(e);
        // A step further in at most: what it would hang on may be missing.
        let deeper = rank.min(last.map_or(0, |l: usize| l + 1));
        last = Some(deeper);
        let indent = "  ".repeat(1 + base + deeper);
        let _ = writeln!(out, "{}{text}", style.paint(Paint::Dim, &format!("{indent}- ")));
        // What follows is about the one that is waited for.
        if matches!(e, Evidence::WaitsFor { .. }) {
            base += 1;
            last = None;
        }
    }
    if !c.remedy.is_empty() {
        let _ = writeln!(out, "\n  remedy:\n    {}", style.paint(Paint::Good, &escape(&c.remedy)));
    }
    out
}

fn state(p: &Process) -> String {
    let mut s = match p.state {
        State::Running => "runs".to_owned(),
        State::LeaderExited => format!("its main thread has exited {} ago, others live", age(p.state_s)),
        State::Exiting => format!("exiting for {}", age(p.state_s)),
        State::Zombie => format!("zombie for {}", age(p.state_s)),
        State::Gone => format!("ended {} ago", age(p.state_s)),
    };
    if let Some(k) = p.kernel_state.as_deref().filter(|_| p.state == State::Running) {
        s = format!("alive (state {})", escape(k));
    }
    if let Some(e) = &p.exit {
        let _ = write!(s, ", {}", exit(e));
    }
    if p.orphan {
        s.push_str(", orphan");
        if let Some(a) = &p.adopter {
            let _ = write!(s, " adopted by {}", process(a));
        }
    }
    if let Some(ppid) = p.ppid.filter(|_| p.state == State::Zombie) {
        let _ = write!(s, ", its parent is {ppid}");
    }
    if let Some(inside) = p.ns_pid.filter(|n| *n != p.pid) {
        let _ = write!(s, ", pid {inside} in its own namespace");
    }
    if let Some(c) = &p.container {
        let runtime = escape(c.runtime.as_deref().unwrap_or("container"));
        let _ = write!(s, ", in {runtime} {:.12}", c.id);
    }
    if let Some(j) = p.job {
        let _ = write!(s, ", job {j}");
    }
    s
}

/// How much further it is indented than the chain's beginning, and what it says.
fn evidence(e: &Evidence) -> (usize, String) {
    match e {
        Evidence::Blocked { process: p, thread, syscall, fd, inode } => {
            let who =
                p.as_ref().map_or_else(|| format!("thread {thread}"), |p| thread_of(p, u64::from(*thread)));
            let fd = fd.map_or_else(String::new, |f| format!(" of fd {f}"));
            let inode = inode.as_ref().map_or_else(String::new, |i| format!(", {i}"));
            (0, format!("{who} is blocked in {}{fd}{inode}", escape(syscall)))
        }
        Evidence::Python { thread, file, line, function, source } => {
            let source = source.as_ref().map_or_else(String::new, |s| format!(": {s}"));
            (1, format!("{file}:{line} in {function} (thread {thread}){source}"))
        }
        Evidence::Wchan { process: p, thread, wchan } => {
            (1, format!("{} waits in the kernel in {}", thread_of(p, u64::from(*thread)), escape(wchan)))
        }
        Evidence::Holder { process: p, fd, mode, inode, relation } => (
            1,
            format!(
                "{} holds {inode} open for {} as fd {fd}; {}",
                with_argv(p),
                match mode.as_str() {
                    "r" => "reading".to_owned(),
                    "w" => "writing".to_owned(),
                    "rw" => "reading and writing".to_owned(),
                    m => escape(m),
                },
                escape(relation)
            ),
        ),
        Evidence::Signal { signal, sender, by, target, outcome } => {
            let from = match (by, sender) {
                (SignalBy::Process, Some(s)) => format!("from {}", process(s)),
                (SignalBy::ParentDeath, Some(s)) => format!("at the death of its parent {}", process(s)),
                (SignalBy::ParentDeath, None) => "at the death of its parent".into(),
                (SignalBy::Jobwarden, _) => "from jobwarden".into(),
                (SignalBy::Timer, _) => "from a timer".into(),
                (SignalBy::Kernel | SignalBy::Process, _) => "from the kernel".into(),
            };
            let outcome = match outcome {
                SignalOutcome::Delivered => "delivered",
                SignalOutcome::Ignored => "ignored",
                SignalOutcome::AlreadyPending => "one was pending already",
                SignalOutcome::Blocked => "blocked",
            };
            (2, format!("{} {from} to {}: {outcome}", escape(signal), process(target)))
        }
        Evidence::ParentExit { process: p, exit: e } => {
            let how = e.as_ref().map_or_else(|| "ended".into(), exit);
            (1, format!("its parent {}: {how}", with_argv(p)))
        }
        Evidence::Tracer { process: p } => (0, format!("{} traces it", with_argv(p))),
        Evidence::WaitsFor { process: p } => (0, format!("waits for {}", with_argv(p))),
        Evidence::Note { text } => (0, escape(text)),
    }
}

fn thread_of(p: &Ref, thread: u64) -> String {
    if thread == u64::from(p.pid) { process(p) } else { format!("{}, thread {thread},", process(p)) }
}

fn with_argv(r: &Ref) -> String {
    let what = if r.argv.is_empty() { format!("({})", r.comm) } else { cut(&argv(&r.argv), 60) };
    format!("{} {what}", r.pid)
}

const fn state_paint(p: &Process) -> Paint {
    match p.state {
        State::Zombie => Paint::Bad,
        _ if p.orphan => Paint::Odd,
        _ => Paint::Plain,
    }
}

const fn verdict_paint(v: Verdict) -> Paint {
    match v {
        Verdict::NotAZombie | Verdict::BeingReaped | Verdict::LeaderExited => Paint::Good,
        Verdict::Unknown | Verdict::StillExiting | Verdict::Daemonized => Paint::Odd,
        _ => Paint::Bad,
    }
}

/// As in JSON.
pub(super) fn word(v: Verdict) -> String {
    match serde_json::to_value(v) {
        Ok(serde_json::Value::String(s)) => s,
        _ => format!("{v:?}"),
    }
}
