//! Ending what does not want to end: a stubborn family, a fork bomb, and what it costs everybody else meanwhile.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::figure::{Figure, Goal};
use crate::load::fact;
use crate::measure::{Series, again, millis, quiet, row};
use crate::row::{Row, Scale};
use crate::stand::{Standing, told};
use crate::watch::{Agent, PYTHON, located};

/// Kills a process and all below it, and prints the milliseconds from the decision until nobody of them lives.
const PSUTIL: &str = "\
import sys, time, psutil
begun = time.monotonic()
p = psutil.Process(int(sys.argv[1]))
family = p.children(recursive=True) + [p]
for c in family:
    try:
        c.kill()
    except psutil.NoSuchProcess:
        pass
def dead(c):
    try:
        return not c.is_running() or c.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
while not all(map(dead, family)):
    pass
print((time.monotonic() - begun) * 1e3)
";

fn psutil(pid: u32) -> Result<f64> {
    let mut python = std::process::Command::new(PYTHON);
    let out = python.args(["-c", PSUTIL, &pid.to_string()]).output()?;
    let said = String::from_utf8_lossy(&out.stderr);
    ensure!(out.status.success(), "{}", said.lines().last().unwrap_or("python3 failed"));
    fact(&out.stdout)
}

/// From the decision to the death of the last of 1,000 processes that ignore SIGTERM. Who kills how is in turn.
pub(super) fn kill(binary: &Path, scale: Scale) -> Vec<Row> {
    let members = scale.processes.min(1_000);
    let (mut ours, mut recursive, mut pkill) = (Series::new(), Series::new(), Series::new());
    let agent = Agent::start(binary);
    let by_us = || -> Result<f64> {
        let agent = agent.as_ref().map_err(again)?;
        let mut family = Standing::new("family", members)?;
        let out = agent.command(&["--json", "kill", &family.pid().to_string(), "--grace", "0s"]).output()?;
        ensure!(out.status.success(), "kill: {}", String::from_utf8_lossy(&out.stderr).trim());
        let report: serde_json::Value = serde_json::from_slice(&out.stdout)?;
        family.gone()?;
        Ok(report["took_s"].as_f64().context("no took_s")? * 1e3)
    };
    let by_psutil = || -> Result<f64> {
        let mut family = Standing::new("family", members)?;
        let took = psutil(family.pid())?;
        family.gone()?;
        Ok(took)
    };
    // It leaves the head, which ends with its stdin.
    let by_pkill = || -> Result<f64> {
        let family = Standing::new("family", members)?;
        let begun = Instant::now();
        quiet(std::process::Command::new(located("pkill")?).args(["-9", "-P", &family.pid().to_string()]))?;
        Ok(millis(begun.elapsed()))
    };
    for _ in 0..scale.rounds {
        for (series, by) in [
            (&mut ours, &by_us as &dyn Fn() -> Result<f64>),
            (&mut recursive, &by_psutil),
            (&mut pkill, &by_pkill),
        ] {
            if series.going() {
                series.add(by());
            }
        }
    }
    vec![Row {
        peers: vec![
            ("psutil, recursive".to_owned(), recursive.figure()),
            ("pkill -9 -P (the sending only)".to_owned(), pkill.figure()),
        ],
        ..row(
            format!(
                "end a family of {members} that ignore SIGTERM, from the decision to the last one's death"
            ),
            "ms",
            &[Goal::AtMost(200.0)],
            ours.figure(),
        )
    }]
}

/// How long a bomb may live on before it counts as not ended.
const SURVIVED: Duration = Duration::from_secs(5);
const PIDS: &str = "200";
const CGROUP: &str = "jobwarden-bench";

/// A cgroup that the bomb cannot outgrow. Dropped, it ends whoever is in it.
struct Limit(PathBuf);

impl Limit {
    fn new() -> Result<Self> {
        for root in ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"] {
            let dir = Path::new(root).join(CGROUP);
            // One that an earlier run could not remove.
            let _ = fs::remove_dir(&dir);
            if fs::create_dir(&dir).is_ok() {
                let limit = Self(dir);
                if fs::write(limit.0.join("pids.max"), PIDS).is_ok() {
                    return Ok(limit);
                }
            }
        }
        bail!("no pids controller here, and without a limit no bomb is thrown")
    }

    fn living(&self) -> Vec<u32> {
        let procs = fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
        let lives = |pid: &u32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
        };
        procs.lines().filter_map(|l| l.parse().ok()).filter(lives).collect()
    }

    /// Milliseconds from `begun` until nobody lives in it, looked at twice, since a chain can slip through one look.
    fn empty_since(&self, begun: Instant, try_again: &dyn Fn() -> Result<()>) -> Result<f64> {
        loop {
            let at = begun.elapsed();
            if self.living().is_empty() && self.living().is_empty() {
                return Ok(millis(at));
            }
            if at > SURVIVED {
                return Ok(f64::INFINITY);
            }
            try_again()?;
        }
    }

    /// Without a place to fork to, a bomb is some processes like others.
    fn end(&self) {
        // Where it fails, the bomb's own time ends it.
        let _ = fs::write(self.0.join("pids.max"), "0");
        let end = Instant::now() + Duration::from_secs(25);
        loop {
            let living = self.living();
            if living.is_empty() || Instant::now() > end {
                break;
            }
            for pid in living {
                Self::signal(pid);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn signal(pid: u32) {
        // SAFETY: plain calls; the descriptor is closed once.
        unsafe {
            let fd = libc::syscall(libc::SYS_pidfd_open, pid, 0);
            if fd < 0 {
                return;
            }
            // Asked after it was opened: the pid may have been somebody else's by then.
            let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
            if cgroups.lines().any(|l| l.ends_with(&format!("/{CGROUP}"))) {
                let none: *const libc::siginfo_t = std::ptr::null();
                libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGKILL, none, 0);
            }
            libc::close(fd as i32);
        }
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        self.end();
        let end = Instant::now() + Duration::from_secs(5);
        while fs::remove_dir(&self.0).is_err() {
            if Instant::now() > end {
                eprintln!("{} could not be removed", self.0.display());
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Each process forks two and exits, in one session, under a limit of 200 processes: `:(){ :|:& };:` without the shell.
pub(super) fn bomb(binary: &Path, scale: Scale) -> Vec<Row> {
    let agent = Agent::start(binary);
    let thrown = |by: &dyn Fn(&Limit, u32) -> Result<f64>| -> Result<f64> {
        let limit = Limit::new()?;
        let standing = Standing::marked("bomb", 2, limit.0.to_str())?;
        std::thread::sleep(Duration::from_millis(300));
        ensure!(limit.living().len() > 1, "the bomb did not go off");
        let took = by(&limit, standing.named);
        // Before its keeper, who reaps what falls.
        limit.end();
        took
    };
    let by_us = |limit: &Limit, pid: u32| -> Result<f64> {
        let begun = Instant::now();
        let agent = agent.as_ref().map_err(again)?;
        let out = agent.command(&["kill", &pid.to_string(), "--grace", "0s"]).output()?;
        ensure!(out.status.success(), "kill: {}", String::from_utf8_lossy(&out.stderr).trim());
        limit.empty_since(begun, &|| Ok(()))
    };
    // As long as anybody lives, again: one who does it by hand would.
    let by_pkill = |limit: &Limit, pid: u32| -> Result<f64> {
        let pkill = located("pkill")?;
        limit.empty_since(Instant::now(), &|| {
            // The session is the bomb's own. It ends with 1 where it found nobody.
            std::process::Command::new(&pkill).args(["-9", "-s", &pid.to_string()]).output()?;
            Ok(())
        })
    };
    let by_psutil = |limit: &Limit, pid: u32| -> Result<f64> {
        let begun = Instant::now();
        psutil(pid)?;
        limit.empty_since(begun, &|| Ok(()))
    };
    let (mut ours, mut pkill, mut recursive) = (Series::new(), Series::new(), Series::new());
    for _ in 0..scale.rounds.min(3) {
        ours.add(thrown(&by_us));
        pkill.add(thrown(&by_pkill));
        recursive.add(thrown(&by_psutil));
    }
    vec![Row {
        peers: vec![
            ("pkill -9 -s, again and again for 5 s".to_owned(), pkill.figure()),
            ("psutil, recursive, 5 s after it".to_owned(), recursive.figure()),
        ],
        ..row(
            format!("end a fork bomb that a limit of {PIDS} processes holds"),
            "ms",
            &[Goal::AtMost(2_000.0), Goal::RatioToPeer(1.0)],
            ours.figure(),
        )
    }]
}

const SYSCALLS: u64 = 300_000;
/// Measurements in one doom: it lasts for some seconds.
const IN_ONE: usize = 7;

/// A job is doomed for as long as one of it cannot die: here, since its tracer holds it.
pub(super) fn doom(binary: &Path, scale: Scale) -> Vec<Row> {
    let mut left = 0.0;
    let mut measure = || -> Result<Figure> {
        let agent = Agent::start(binary)?;
        let attached = || agent.metric("jobwarden_probe_attached", "probe=\"sys_enter\"");
        let until = |wanted: f64| -> Result<()> {
            let end = Instant::now() + Duration::from_mins(1);
            while (attached()? - wanted).abs() > 0.5 {
                ensure!(Instant::now() < end, "sys_enter: attached is not {wanted} within 60 s");
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(())
        };
        let mut more = Vec::new();
        for _ in 0..if scale.short { 1 } else { 3 } {
            let held = Standing::new("held", 1)?;
            let mut kill = agent.command(&["kill", &held.named.to_string(), "--grace", "0s"]);
            let null = std::process::Stdio::null;
            let mut kill = kill.stdout(null()).stderr(null()).spawn()?;
            until(1.0)?;
            let with: Vec<f64> = (0..IN_ONE).map(|_| told("syscalls", SYSCALLS)).collect::<Result<_>>()?;
            ensure!(attached()? > 0.5, "the doom was over before the measurement was");
            drop(held);
            kill.wait()?;
            until(0.0)?;
            let without: Vec<f64> = (0..IN_ONE).map(|_| told("syscalls", SYSCALLS)).collect::<Result<_>>()?;
            left = attached()?;
            more.extend(with.iter().zip(&without).map(|(w, o)| w - o));
        }
        Figure::of(more)
    };
    let more = measure();
    let none = more.as_ref().map(|_| Figure::one(left)).map_err(again);
    vec![
        row(
            "a system call of anybody while a job is doomed: more than without",
            "ns",
            &[Goal::AtMost(60.0)],
            more,
        ),
        row("sys_enter attached while no job is doomed", "", &[Goal::AtMost(0.0)], none),
    ]
}
