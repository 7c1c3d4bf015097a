//! `audit`.

use std::fmt::Write as _;

use super::escape::escape;
use super::style::{Paint, Style};
use crate::enforce::audit::{Entry, What};

/// One line an entry: when, what, whom, why, by whom.
#[must_use]
pub fn audit(entries: &[Entry], style: Style) -> String {
    let mut out = String::new();
    for e in entries {
        out.push_str(&style.paint(Paint::Dim, &escape(&e.at)));
        let (paint, what) = match e.what {
            What::Request => (Paint::Plain, "request"),
            What::Kill => (Paint::Strong, "kill"),
            What::Signal => (Paint::Plain, "signal"),
            What::Spared => (Paint::Odd, "spared"),
            What::Done => (Paint::Strong, "done"),
        };
        let _ = write!(out, "  {}", style.paint(paint, &format!("{what:7}")));
        if let Some(s) = &e.signal {
            let _ = write!(out, " {}", escape(s));
        }
        if let Some(p) = &e.process {
            let _ = write!(out, " to {} ({})", p.id, p.comm);
        }
        if let Some(o) = &e.outcome {
            let bad = matches!(o.as_str(), "survived" | "failed" | "refused");
            let _ = write!(out, " {}", style.paint(if bad { Paint::Bad } else { Paint::Plain }, &escape(o)));
        }
        if !e.detail.is_empty() {
            let _ = write!(out, " {}", escape(&e.detail));
        }
        if let Some(j) = &e.job {
            let name =
                if e.job_name.is_empty() { String::new() } else { format!("{} ", escape(&e.job_name)) };
            let _ = write!(out, " {}", style.paint(Paint::Job, &format!("[{name}{j}]")));
        }
        if let Some(r) = e.reason {
            let _ = write!(out, " reason={}", r.as_str());
        }
        let by = &e.asked_by;
        if let Some(rule) = &by.rule {
            let _ = write!(out, " rule={}", escape(rule));
        }
        if let Some(uid) = by.uid {
            let _ = write!(out, " uid={uid}");
        }
        if let Some(pid) = by.pid {
            let _ = write!(out, " pid={pid}");
        }
        if let Some(exe) = &by.exe {
            let _ = write!(out, " exe={exe}");
        }
        out.push('\n');
    }
    if entries.is_empty() {
        out.push_str("nothing in the audit log\n");
    }
    out
}
