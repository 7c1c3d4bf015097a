//! An alert in words, for people who read it in a pager: the annotations of the contract.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::model::outside::{OutsideText, command_line, escape_lines};
use crate::model::schema::{Alert, AlertKind, Cause, Evidence, Exit, Process, Ref, SignalBy, State};

/// Bytes of one annotation.
const MAX_NOTE: usize = 8 * 1024;
const MAX_LINES: usize = 30;
const MAX_ARGV: usize = 120;

/// The page of a kind, with what it means and what to do.
pub(in crate::notify) fn runbook(kind: AlertKind) -> String {
    format!("{}/blob/main/docs/alerts/{kind}.md", env!("CARGO_PKG_REPOSITORY"))
}

/// summary, cause, tree, remedy, runbook; those that there are.
pub(super) fn annotations(a: &Alert) -> BTreeMap<&'static str, String> {
    let mut all = BTreeMap::from([("summary", a.summary.clone()), ("runbook", runbook(a.kind))]);
    if let Some(c) = &a.cause {
        all.insert("cause", cause(c));
        all.insert("remedy", c.remedy.clone());
    }
    if a.subject.is_some() || a.cause.is_some() {
        all.insert("tree", tree(a));
    }
    all.retain(|_, v| !v.is_empty());
    for v in all.values_mut() {
        *v = clip_bytes(&escape_lines(v), MAX_NOTE);
    }
    all
}

/// At most `max` characters; what is longer ends in `…`.
pub(super) fn clip(s: &str, max: usize) -> String {
    if s.chars().count() <= max {
        return s.to_owned();
    }
    s.chars().take(max.saturating_sub(1)).chain(['…']).collect()
}

fn clip_bytes(s: &str, max: usize) -> String {
    if s.len() <= max {
        return s.to_owned();
    }
    let mut end = max;
    while !s.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}…", &s[..end])
}

fn cause(c: &Cause) -> String {
    let mut out = c.summary.clone();
    for e in c.evidence.iter().take(MAX_LINES) {
        // Writing to a String cannot fail.
        let _ = write!(out, "\n- {}", evidence(e));
    }
    if c.evidence.len() > MAX_LINES {
        let _ = write!(out, "\n- {} more", c.evidence.len() - MAX_LINES);
    }
    out
}

fn evidence(e: &Evidence) -> String {
    match e {
        Evidence::Blocked { process, thread, syscall, fd, inode } => {
            let who = process.as_ref().map(|p| format!("{} ", short(p))).unwrap_or_default();
            let on = fd.map(|fd| format!(" on fd {fd}")).unwrap_or_default();
            let inode = inode.as_ref().map(|i| format!(" ({i})")).unwrap_or_default();
            format!("{who}thread {thread} is blocked in {syscall}{on}{inode}")
        }
        Evidence::Holder { process, fd, mode, inode, relation } => {
            format!("{} holds {inode} as fd {fd} ({mode}); {relation}", short(process))
        }
        Evidence::Signal { signal, sender, by, target, outcome } => {
            let by = match (sender, by) {
                (Some(p), _) => short(p),
                (None, SignalBy::Process) => "a process".into(),
                (None, SignalBy::Kernel) => "the kernel".into(),
                (None, SignalBy::ParentDeath) => "its parent's death".into(),
                (None, SignalBy::Timer) => "a timer".into(),
                (None, SignalBy::Jobwarden) => "jobwarden".into(),
            };
            let outcome = match serde_json::to_value(outcome) {
                Ok(serde_json::Value::String(s)) => s,
                _ => String::new(),
            };
            format!("{signal} from {by} to {}: {outcome}", short(target))
        }
        Evidence::ParentExit { process, exit } => {
            format!("{} {}", short(process), exit.as_ref().map_or_else(|| "has exited".into(), ended))
        }
        Evidence::Python { thread, file, line, function, source } => {
            let source = source.as_ref().map(|s| format!(": {s}")).unwrap_or_default();
            format!("thread {thread} at {file}:{line} in {function}{source}")
        }
        Evidence::Wchan { process, thread, wchan } => {
            format!("{} thread {thread} waits in the kernel in {wchan}", short(process))
        }
        Evidence::Tracer { process } => format!("traced by {}", short(process)),
        Evidence::WaitsFor { process } => format!("waits for {}", short(process)),
        Evidence::Note { text } => text.clone(),
    }
}

fn ended(e: &Exit) -> String {
    match e {
        Exit::Code { code } => format!("exited with {code}"),
        Exit::Signal { signal, core, sender } => {
            let by = sender.as_ref().map(|p| format!(" from {}", short(p))).unwrap_or_default();
            format!("was killed by {signal}{by}{}", if *core { " (core dumped)" } else { "" })
        }
    }
}

fn short(p: &Ref) -> String {
    let argv = command(&p.comm, &p.argv);
    format!("{} ({argv})", p.id)
}

fn command(comm: &OutsideText, argv: &[OutsideText]) -> String {
    let text = if argv.is_empty() { format!("[{comm}]") } else { command_line(argv) };
    clip(&text, MAX_ARGV)
}

/// What the alert itself knows of the family: the subject, below it the process that the cause is about, and who else is
/// named in the evidence.
fn tree(a: &Alert) -> String {
    let mut out = String::new();
    let mut seen = Vec::new();
    let about = a.cause.as_ref().map(|c| &c.process);
    for (depth, p) in a.subject.iter().chain(about).enumerate() {
        if seen.contains(&p.id) {
            continue;
        }
        seen.push(p.id);
        let lead = if depth == 0 { "" } else { "└─ " };
        let _ = writeln!(out, "{lead}{}", line(p));
    }
    let named = a.cause.iter().flat_map(|c| &c.evidence).filter_map(|e| match e {
        Evidence::Holder { process, relation, .. } => Some((process, relation.as_str())),
        Evidence::Tracer { process } => Some((process, "tracer")),
        Evidence::WaitsFor { process } => Some((process, "waited for")),
        _ => None,
    });
    for (p, what) in named.take(MAX_LINES) {
        if !seen.contains(&p.id) {
            seen.push(p.id);
            let _ = writeln!(out, "·  {} {}  {what}", p.id, command(&p.comm, &p.argv));
        }
    }
    out.truncate(out.trim_end().len());
    out
}

fn line(p: &Process) -> String {
    let state = match p.state {
        State::Running => "running",
        State::LeaderExited => "leader exited",
        State::Exiting => "exiting",
        State::Zombie => "zombie",
        State::Gone => "gone",
    };
    let mut out = format!("{} {}  {state}", p.id, command(&p.comm, &p.argv));
    if p.orphan {
        out.push_str(", orphan");
    }
    if let Some(adopter) = &p.adopter {
        let _ = write!(out, ", adopted by {}", short(adopter));
    }
    if let Some(e) = &p.exit {
        let _ = write!(out, ", {}", ended(e));
    }
    out
}
