//! `jobwarden doctor`: what the host offers, then the probes themselves, loaded for a moment where that is allowed.

use std::process::ExitCode;

use jobwarden::privileges;
use jobwarden::render::{Paint, Style, Table, escape};
use jobwarden::sources::kernel::{Finding, Grade, HostFeatures, Kernel, Options};
use serde::Serialize;

use super::Outcome;
use super::output::Context;

/// What this kernel and this host offer, and what is off and why
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit status 1 if the agent cannot run here.

Example:
  jobwarden doctor")]
pub(crate) struct Args {}

/// Of the probe object in this program.
pub(super) fn object_hash() -> &'static str {
    jobwarden::sources::kernel::object_hash()
}

#[derive(Serialize)]
struct Report {
    /// Whether the agent can run here.
    ok: bool,
    findings: Vec<Finding>,
    offer: HostFeatures,
}

impl Args {
    pub(super) fn run(self, context: &Context) -> Outcome {
        let Self {} = self;
        let offer = HostFeatures::read();
        let mut findings = offer.findings();
        if findings.iter().all(|f| f.grade != Grade::Fatal) {
            findings.extend(probes());
        }
        let ok = findings.iter().all(|f| f.grade != Grade::Fatal);
        let report = Report { ok, findings, offer };
        context.show(&report, |style| text(&report, style))?;
        Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// Loads and attaches the probes, beside an agent that may be running, and lets go of them at once.
fn probes() -> Vec<Finding> {
    let fatal = |found: String| {
        vec![Finding { what: "probes", grade: Grade::Fatal, found, then: "the agent cannot run here".into() }]
    };
    let stats = match Kernel::start(&Options::default()) {
        Err(e) => return fatal(e.to_string()),
        Ok(kernel) => match kernel.probes() {
            Err(e) => return fatal(e.to_string()),
            Ok(stats) => (stats, privileges(&kernel)),
        },
    };
    let (stats, kept) = stats;
    let finding = |p: jobwarden::sources::kernel::ProbeStat| match p.off {
        None => Finding {
            what: "probe",
            grade: Grade::Ok,
            found: format!("{}: {}", p.name, if p.attached { "loads and attaches" } else { "loads" }),
            then: String::new(),
        },
        Some(why) => Finding {
            what: "probe",
            grade: Grade::Off,
            found: format!("{}: {why}", p.name),
            then: "what it tells is missing".into(),
        },
    };
    stats.into_iter().map(finding).chain([kept]).collect()
}

/// What an agent would keep here once it runs.
fn privileges(kernel: &Kernel) -> Finding {
    let what = "privileges";
    match privileges::asked_for(&|| kernel.self_test()) {
        Ok(asked) => {
            let kept = privileges::KEPT.iter().fold(asked, |s, k| s | k.0);
            let found =
                format!("the agent keeps {} and gives up the rest", privileges::names(kept).join(", "));
            Finding { what, grade: Grade::Ok, found, then: String::new() }
        }
        Err(e) => Finding {
            what,
            grade: Grade::Fatal,
            found: e.to_string(),
            then: "the agent cannot run here".into(),
        },
    }
}

fn text(report: &Report, style: Style) -> String {
    let mut table = Table::new(&["", "WHAT", "FOUND"], &[]);
    for f in &report.findings {
        let (paint, mark) = match f.grade {
            Grade::Ok => (Paint::Good, "ok"),
            Grade::Off => (Paint::Odd, "off"),
            Grade::Fatal => (Paint::Bad, "FAIL"),
        };
        let then = if f.then.is_empty() { String::new() } else { format!("; {}", f.then) };
        table.row(vec![
            (paint, mark.into()),
            (Paint::Plain, f.what.into()),
            (Paint::Plain, escape(&format!("{}{then}", f.found))),
        ]);
    }
    // What mends it is the end of a line: nothing is cut.
    let mut out = table.render(Style { width: None, ..style });
    let (paint, last) = if report.ok {
        (Paint::Good, "The agent can run here.")
    } else {
        (Paint::Bad, "The agent cannot run here.")
    };
    out.push_str(&style.paint(paint, last));
    out.push('\n');
    out
}
