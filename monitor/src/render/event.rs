//! One line of `events`.

use std::fmt::Write as _;

use serde_json::Value;

use super::escape::{clock, escape};
use super::style::{Paint, Style};
use crate::model::outside::command_line as argv;
use crate::model::schema::{EventLine, Exit, Ref};

/// `12:00:00.123  exec  4123 (sh) sh -c true`.
#[must_use]
pub fn event(e: &EventLine, style: Style) -> String {
    let mut out = style.paint(Paint::Dim, &clock(&e.at));
    let _ = write!(out, "  {}", style.paint(paint(&e.kind), &format!("{:11}", escape(&e.kind))));
    if let Some(p) = &e.process {
        let _ = write!(out, " {} ({})", p.pid, p.comm);
        if e.kind == "exec" {
            let _ = write!(out, " {}", argv(&p.argv));
        }
    }
    let parent = e.more.get("parent").and_then(|p| p.get("id"));
    for (k, v) in &e.more {
        // JSON has it all; here what says nothing, or says it again, is left out.
        let again = match k.as_str() {
            "argv" | "filename" | "uid" => e.kind == "exec",
            "job" => true,
            "lineage_parent" => Some(v) == parent,
            _ => false,
        };
        if !again && !v.is_null() && v != &Value::Bool(false) {
            let _ = write!(out, " {}={}", style.paint(Paint::Dim, &escape(k)), value(v));
        }
    }
    out.push('\n');
    out
}

fn value(v: &Value) -> String {
    if let Ok(r) = serde_json::from_value::<Ref>(v.clone()) {
        return format!("{}({})", r.pid, r.comm);
    }
    if v.is_object()
        && let Ok(e) = serde_json::from_value::<Exit>(v.clone())
    {
        return match e {
            Exit::Code { code } => code.to_string(),
            Exit::Signal { signal, core, sender } => {
                let core = if core { "+core" } else { "" };
                let from = sender.map_or_else(String::new, |s| format!(" from {}({})", s.pid, s.comm));
                format!("{}{core}{from}", escape(&signal))
            }
        };
    }
    match v {
        Value::String(s) => escape(s),
        v => escape(&v.to_string()),
    }
}

fn paint(kind: &str) -> Paint {
    match kind {
        "lost" => Paint::Bad,
        "exit" | "leader-exit" => Paint::Odd,
        "fork" | "reap" => Paint::Dim,
        _ => Paint::Plain,
    }
}
