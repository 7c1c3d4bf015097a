//! Many processes alive: start, scrape, tree, and the incident found among them.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};

use crate::figure::{Figure, Goal};
use crate::measure::{Series, again, clocked, millis, quiet, row};
use crate::row::{Row, Scale};
use crate::stand::Standing;
use crate::watch::{Agent, Exporter, fetch, located};

const JOBS: u64 = 20;
/// Rounds of peers that take seconds for one.
const SLOW: usize = 5;

/// A rule for each of the families that [`families`] starts.
pub(super) fn config() -> String {
    let rule =
        |n| format!("[[job]]\nname = \"job-{n}\"\nmatch = {{ argv = \"load family [0-9]+ job-{n}$\" }}\n");
    (0..JOBS).map(rule).collect()
}

/// `processes` in 20 jobs, and `zombies` that nobody reaps.
pub(super) fn families(processes: u64, zombies: u64) -> Result<Vec<Standing>> {
    let family = |n| Standing::marked("family", processes / JOBS, Some(&format!("job-{n}")));
    let mut all: Vec<Standing> = (0..JOBS).map(family).collect::<Result<_>>()?;
    all.push(Standing::new("zombies", zombies)?);
    Ok(all)
}

/// One scrape: CPU of who serves it, and how long it took.
pub(super) fn scrape(agent: &Agent) -> Result<(f64, f64)> {
    let before = agent.cpu()?;
    let took = clocked(|| {
        let page = fetch(agent.listen, "/metrics")?;
        ensure!(page.contains("jobwarden_jobs{job_name=\"job-0\""), "its page has no jobs");
        Ok(())
    })?;
    Ok((millis(agent.cpu()?.saturating_sub(before)), took))
}

pub(super) fn many(binary: &Path, scale: Scale) -> Vec<Row> {
    let (mut start, mut took, mut cpu) = (Series::new(), Series::new(), Series::new());
    let (mut tree, mut ps, mut theirs) = (Series::new(), Series::new(), Series::new());
    let mut measure = || -> Result<()> {
        let _families = families(scale.processes, scale.processes / 10)?;
        for _ in 0..scale.rounds {
            start.add(Agent::with(binary, &config()).map(|a| millis(a.ready_in)));
        }
        let agent = Agent::with(binary, &config())?;
        for _ in 0..scale.rounds {
            match scrape(&agent) {
                Ok((c, t)) => {
                    cpu.add(Ok(c));
                    took.add(Ok(t));
                }
                Err(e) => {
                    cpu.add(Err(again(&e)));
                    took.add(Err(e));
                }
            }
            tree.add(clocked(|| quiet(&mut agent.command(&["tree", "--all"]))));
            ps.add(clocked(|| quiet(Command::new("ps").arg("axf"))));
        }
        // One after the other: beside it, the exporter would be measured too. Its CPU does not hang on who else runs.
        let exporter = Exporter::start();
        for _ in 0..scale.rounds.min(SLOW) {
            theirs.add(exporter.as_ref().map_err(again).and_then(|e| {
                let before = e.cpu()?;
                e.scrape()?;
                Ok(millis(e.cpu()?.saturating_sub(before)))
            }));
        }
        Ok(())
    };
    let done = measure();
    let value = |series: Series| match &done {
        Ok(()) => series.figure(),
        Err(error) => Err(again(error)),
    };
    let among = format!("{} processes", scale.processes);
    vec![
        row(format!("start among {among}, from exec to ready"), "ms", &[Goal::AtMost(200.0)], value(start)),
        row(
            format!("a scrape of /metrics with {among}, {JOBS} jobs, {} zombies", scale.processes / 10),
            "ms",
            &[Goal::AtMost(3.0)],
            value(took),
        ),
        Row {
            peers: vec![("prometheus-process-exporter".to_owned(), value(theirs))],
            ..row("CPU of that scrape", "ms", &[Goal::RatioToPeer(50.0)], value(cpu))
        },
        Row {
            peers: vec![("ps axf".to_owned(), value(ps))],
            ..row(format!("tree of {among}"), "ms", &[Goal::AtMost(50.0)], value(tree))
        },
    ]
}

/// The incident among 2,000 processes of 25 files; the parent is no Python program, so that part is not in it. Nothing but
/// a list of all open files shows who holds the pipe: that is the peer.
pub(super) fn why(binary: &Path, scale: Scale) -> Vec<Row> {
    let (mut ours, mut theirs) = (Series::new(), Series::new());
    let mut measure = || -> Result<()> {
        let agent = Agent::start(binary)?;
        let _files = Standing::new("files", scale.processes / 5)?;
        let incident = Standing::new("incident", 1)?;
        let pid = incident.named.to_string();
        // Until the zombie is seen to be one, the answer is another.
        std::thread::sleep(std::time::Duration::from_millis(1_500));
        let out = agent.command(&["--json", "why", &pid]).output()?;
        let said = String::from_utf8_lossy(&out.stdout);
        ensure!(said.contains("parent-blocked-on-pipe") && said.contains("holder"), "why {pid}: {said}");
        let lsof = located("lsof");
        for round in 0..scale.rounds {
            ours.add(clocked(|| quiet(&mut agent.command(&["why", &pid]))));
            if round < scale.rounds.min(SLOW) {
                theirs.add(lsof.as_ref().map_err(again).and_then(|p| {
                    clocked(|| {
                        // It ends with 1 wherever one file could not be looked at.
                        Command::new(p).args(["-n", "-P", "-w"]).output()?;
                        Ok(())
                    })
                }));
            }
        }
        Ok(())
    };
    let done = measure();
    let value = |series: Series| -> Result<Figure> {
        match &done {
            Ok(()) => series.figure(),
            Err(error) => Err(again(error)),
        }
    };
    let what = format!("why: the incident among {} processes of 25 files", scale.processes / 5);
    vec![Row {
        peers: vec![("lsof".to_owned(), value(theirs))],
        ..row(what, "ms", &[Goal::AtMost(50.0), Goal::RatioToPeer(1.0)], value(ours))
    }]
}
