//! The results as a table, as JSON and as docs/BENCHMARKS.md. Ratios first; what is not reached stands there so.

use std::fmt::Write as _;
use std::fs;
use std::process::Command;

use anyhow::Result;
use serde_json::{Value, json};

use crate::figure::{Figure, number};
use crate::row::{Row, Scale};

impl Row {
    /// The peers' figures that there are.
    fn theirs(&self) -> Vec<f64> {
        self.peers.iter().filter_map(|(_, v)| v.as_ref().ok()).map(|f| f.median).collect()
    }

    fn verdict(&self) -> String {
        let Ok(ours) = &self.ours else { return String::new() };
        let each = self.goals.iter().map(|g| {
            let reached = match g.reached(ours.median, &self.theirs()) {
                Some(true) => "reached",
                Some(false) => "**NOT REACHED**",
                None => "not judged: no peer gave a figure",
            };
            format!("{}: {reached}", g.text())
        });
        each.collect::<Vec<_>>().join("; ")
    }

    fn ratios(&self) -> String {
        let Ok(ours) = &self.ours else { return String::new() };
        let each = self.peers.iter().filter_map(|(name, theirs)| {
            let theirs = theirs.as_ref().ok()?;
            // Below nothing, a ratio says nothing.
            let ratio = if theirs.median.is_infinite() {
                "ours ends, theirs never".to_owned()
            } else if ours.median > 0.0 && theirs.median > 0.0 {
                format!("{}x", number(theirs.median / ours.median))
            } else {
                return None;
            };
            Some(format!("{ratio} {name}"))
        });
        each.collect::<Vec<_>>().join("; ")
    }

    pub(crate) fn said(&self) -> String {
        let noise = self.noise.map(|n| format!(" (nobody {})", n.text())).unwrap_or_default();
        match &self.ours {
            Ok(f) => format!("{} {}", f.text(), self.unit).trim_end().to_owned() + &noise,
            Err(e) => format!("no figure: {e:#}"),
        }
    }

    fn peers_said(&self) -> String {
        let each = self.peers.iter().map(|(name, v)| match v {
            Ok(f) => format!("{name} {} {}", f.text(), self.unit),
            Err(e) => format!("{name}: {e:#}"),
        });
        each.collect::<Vec<_>>().join("; ")
    }

    /// Why the harness is broken, where it is: a peer that does not run is none of its faults, if it says why.
    pub(crate) fn fault(&self) -> Option<String> {
        match &self.ours {
            Err(e) => return Some(format!("{}: no figure: {e:#}", self.what)),
            Ok(f) if !f.median.is_finite() => return Some(format!("{}: {}", self.what, f.median)),
            Ok(_) => {}
        }
        let odd = |(_, v): &&(String, Result<Figure>)| match v {
            Ok(f) => f.median.is_nan(),
            Err(e) => e.to_string().is_empty(),
        };
        self.peers
            .iter()
            .find(odd)
            .map(|(name, _)| format!("{}: {name} has neither figure nor reason", self.what))
    }
}

pub(crate) fn table(rows: &[Row]) -> String {
    let mut text = String::from(
        "| what | peer / jobwarden | jobwarden | goal | peers |\n| --- | --- | --- | --- | --- |\n",
    );
    for row in rows {
        // A line break or a bar would end the cell. Writing to a String cannot fail.
        let cells = [row.what.clone(), row.ratios(), row.said(), row.verdict(), row.peers_said()];
        let cells = cells.map(|c| c.replace('\n', " ").replace('|', "\\|"));
        let _ = writeln!(text, "| {} |", cells.join(" | "));
    }
    text
}

pub(crate) fn as_json(rows: &[Row], scale: Scale, command: &str) -> String {
    // JSON has no infinity.
    let value = |v: f64| if v.is_finite() { json!(v) } else { json!("never") };
    let figure = |f: &Result<Figure>| match f {
        Ok(f) => json!({ "median": value(f.median), "low": value(f.low), "high": value(f.high), "n": f.n }),
        Err(e) => json!({ "error": format!("{e:#}") }),
    };
    let row = |r: &Row| {
        let theirs = r.theirs();
        let goals = r.goals.iter().map(|g| {
            let reached = r.ours.as_ref().ok().and_then(|f| g.reached(f.median, &theirs));
            json!({ "goal": g.text(), "reached": reached })
        });
        let peers: serde_json::Map<_, _> = r.peers.iter().map(|(n, v)| (n.clone(), figure(v))).collect();
        json!({ "what": r.what, "unit": r.unit, "jobwarden": figure(&r.ours),
                "goals": goals.collect::<Vec<_>>(), "peers": peers, "noise": r.noise.map(Ok).as_ref().map(figure) })
    };
    let rows: Vec<Value> = rows.iter().map(row).collect();
    json!({ "date": date(), "machine": machine(), "command": command, "full": !scale.short, "rows": rows })
        .to_string()
}

fn date() -> String {
    let date = Command::new("date").args(["-u", "+%FT%TZ"]).output();
    date.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).unwrap_or_default()
}

fn machine() -> Value {
    let read = |file: &str| fs::read_to_string(file).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name)).unwrap_or_default();
        line.trim_start_matches([':', '\t', ' ']).trim().to_owned()
    };
    let kib = field(&read("/proc/meminfo"), "MemTotal").trim_end_matches(" kB").parse().unwrap_or(0_u64);
    json!({
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "cpu": field(&read("/proc/cpuinfo"), "model name"),
        "processors": std::thread::available_parallelism().map_or(1, usize::from),
        "memory_mib": kib / 1024,
    })
}

/// Of programs that need kprobes or fentry, as others published them.
const PUBLISHED: &str = "\
## Not run here: published figures\n\n\
Tetragon, Falco, quark and kunai were not run: they need more of the kernel than these probes do (kprobes, fentry or \
tracepoints of every system call), and are compared by what others published. Other hosts, other loads: no ratio is drawn.\n\n\
- Falco 0.36.2, modern eBPF, told to watch only clone, fork, vfork and exec: 17.5 % CPU and 698 MB resident at 5,225 events/s \
on a host of 128 processors: a user's snapshot of its own metrics, <https://gist.github.com/stevenbrz/69391aa71b22d205b6add88ae10fb905>.\n\
- Tetragon, quark, kunai: no published figure for the life of a process was found.\n";

pub(crate) fn page(rows: &[Row], scale: Scale, command: &str) -> String {
    let m = machine();
    let text = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned);
    let missed = rows.iter().filter(|r| r.verdict().contains("NOT REACHED")).count();
    format!(
        "# Benchmarks\n\n\
         Written by `{command}` on {}, Linux {}, {} processors ({}), {} MiB. Peers ran in the same run, in turn with jobwarden. \
         A figure is a median with its quartiles, of {} rounds where there are rounds (of the exporter and lsof 5, of the bomb 3: they take seconds for one); {} lives for the probes' time, {} s for \
         floods and for idling, {} processes where many stand by. The agent ran on its defaults, with a bpffs of its own. \
         `peer / jobwarden` says how many times jobwarden's figure the peer's is. \
         A slow-down below zero is no gain of the program's: a child that the kernel puts on another processor waits for that one \
         to wake, which takes longer in a virtual machine than a vfork, and who watches keeps it awake (forkstat, which has no probe, shows it too). \
         Kept to one processor, parent and child do not wait so: that row says what watching costs. \
         `nobody` is what the same measure gives where nothing is started: the noise of this run. \
         {} of {} rows do not reach their goal and say so.\n\n{}\n{PUBLISHED}\n\
         What each row does stands in `bench/src/rows/`; `cargo xtask bench --json` prints the same as JSON.\n",
        date(),
        text(&m["kernel"]),
        text(&m["processors"]),
        text(&m["cpu"]),
        text(&m["memory_mib"]),
        scale.rounds,
        scale.lives,
        scale.seconds,
        scale.processes,
        missed,
        rows.len(),
        table(rows),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figure::Goal;

    fn row(ours: Result<f64>) -> Row {
        let peers = vec![
            ("lsof".to_owned(), Ok(Figure::one(30.0))),
            ("x".to_owned(), Err(anyhow::anyhow!("does not run"))),
        ];
        let goals = vec![Goal::AtMost(10.0), Goal::RatioToPeer(3.0)];
        Row { what: "a why".into(), unit: "ms", ours: ours.map(Figure::one), goals, peers, noise: None }
    }

    #[test]
    fn a_goal_that_is_missed_noise_and_a_peer_that_does_not_run_are_said() {
        let noisy = Row { noise: Some(Figure::one(1.5)), ..row(Ok(5.0)) };
        let text = table(&[row(Ok(15.0)), noisy, row(Err(anyhow::anyhow!("no|agent")))]);
        for part in [
            "| 2.0x lsof | 15.0 ms | <= 10.0: **NOT REACHED**; 3.0 times below every peer: **NOT REACHED** |",
            "| 6.0x lsof | 5.0 ms (nobody 1.5) | <= 10.0: reached; 3.0 times below every peer: reached |",
            "lsof 30.0 ms; x: does not run |",
            "no figure: no\\|agent",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn json_has_the_same_with_the_machine() {
        let scale = crate::row::SHORT;
        let value: Value = serde_json::from_str(&as_json(&[row(Ok(15.0))], scale, "c")).expect("JSON");
        assert_eq!(value["rows"][0]["peers"]["lsof"]["median"], 30.0);
        assert_eq!(value["rows"][0]["peers"]["x"]["error"], "does not run");
        assert_eq!(value["rows"][0]["goals"][0]["reached"], false);
        assert_eq!(value["full"], false);
        assert!(value["machine"]["processors"].as_u64().is_some_and(|n| n > 0));
    }

    #[test]
    fn a_row_without_a_figure_is_a_fault_and_a_peer_with_a_reason_is_none() {
        assert!(row(Ok(1e9)).fault().is_none());
        assert!(row(Ok(f64::NAN)).fault().is_some());
        assert!(row(Err(anyhow::anyhow!("e"))).fault().is_some());
        let mut r = row(Ok(1.0));
        r.peers.push(("y".into(), Ok(Figure::one(f64::NAN))));
        assert!(r.fault().is_some());
        r.peers = vec![("y".into(), Ok(Figure::one(f64::INFINITY)))];
        assert!(r.fault().is_none(), "what never ends is a result");
    }
}
