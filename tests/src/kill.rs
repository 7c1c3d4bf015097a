//! What scenarios of a job's end share: the job, a control family beside it, and whether anything is left.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use jobwarden::model::schema::{Job, KillReport};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::agent::Agent;
use crate::fixture::{Fixture, Shape};
use crate::limit::Limit;
use crate::truth::letter;
use crate::wait::{eventually, ms, promised};

/// Rules for jobs by the first argument: `NAME TAG`.
#[must_use]
pub fn rule(fixture: &Fixture, name: &str, argv: &str, more: &str) -> String {
    format!("[[job]]\nname = \"{name}\"\nmatch = {{ argv = \"{argv}.*{}\" }}\n{more}\n", fixture.tag)
}

pub fn job(agent: &Agent<'_>, root: u32) -> Result<Job> {
    eventually("the job", ms(3000), || {
        agent
            .jobs()?
            .into_iter()
            .find(|j| j.root.pid == root)
            .with_context(|| format!("{root} is no job's root"))
    })
}

/// A family outside the job, alike but for its name.
pub fn control(fixture: &Fixture) -> Result<(Shape, [u32; 2])> {
    let mut s = Shape::start(fixture, "setsid", &["control"])?;
    let family = [s.fact("child")?, s.fact("grandchild")?];
    Ok((s, family))
}

pub fn whole(mut control: (Shape, [u32; 2])) -> Result<()> {
    ensure!(control.0.ended()?.is_none(), "the control family's parent is gone");
    for pid in control.1 {
        ensure!(letter(pid).is_ok_and(|l| l != 'Z'), "{pid} of the control family is gone");
    }
    control.0.finish()?;
    Ok(())
}

/// Live processes of the test whose argv contains `name`.
#[must_use]
pub fn alive(fixture: &Fixture, name: &str) -> Vec<i32> {
    let argv = |p: i32| std::fs::read(format!("/proc/{p}/cmdline")).unwrap_or_default();
    let named = |p: &i32| argv(*p).windows(name.len()).any(|w| w == name.as_bytes());
    fixture.alive().into_iter().filter(named).collect()
}

/// One reading of /proc is no snapshot: a chain whose members fork and exit faster than it is read may be in none. So many
/// empty ones, one after the other, miss no chain.
const EMPTY_READINGS: u32 = 20;

pub fn all_gone(fixture: &Fixture, name: &str) -> Result<()> {
    eventually("nothing is left", ms(300), || {
        for reading in 1..=EMPTY_READINGS {
            let left = alive(fixture, name);
            ensure!(left.is_empty(), "reading {reading}: {left:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    })
}

/// Within 2 s. A bomb takes the CPUs from the client and from the agent's unoptimized core too, so the way to the kill and
/// back has more.
pub fn in_time(report: &KillReport, told: Duration) -> Result<()> {
    let promised = promised("a bomb is ended within 2 s", 2000);
    ensure!(report.took_s < promised.as_secs_f64(), "{} s", report.took_s);
    ensure!(told < ms(15_000), "{told:?}");
    Ok(())
}

/// A bomb that is within the limit from its first instruction.
pub fn bomb(fixture: &Fixture, limit: &Limit, args: &[&str]) -> Result<Shape> {
    let mut c = fixture.command(crate::fixture::program("shape-bomb")?);
    c.args(args).arg(&fixture.tag);
    limit.holds(&mut c);
    Shape::spawn("bomb", c)
}

/// Whom a recursive kill by a list of children signals (psutil's `children(recursive=True)`): who descends from `root` in one
/// reading of /proc, those nearest to it first.
#[must_use]
pub fn listed(root: u32, pids: impl IntoIterator<Item = u32>) -> Vec<u32> {
    let proc = jobwarden::sources::proc::Proc::default();
    let parents: Vec<(u32, u32)> =
        pids.into_iter().filter_map(|p| Some((p, proc.stat(p).ok()?.ppid))).collect();
    let mut family = vec![root];
    let mut i = 0;
    while i < family.len() {
        let children: Vec<u32> = parents.iter().filter(|(_, up)| *up == family[i]).map(|(p, _)| *p).collect();
        family.extend(children);
        i += 1;
    }
    family.split_off(1)
}

/// SIGKILL to the listed, children first. Only what is in the test's own cgroup is signalled.
fn kill_by_list(fixture: &Fixture, root: u32) -> Result<()> {
    for pid in listed(root, jobwarden::sources::proc::Proc::default().pids()?).into_iter().rev() {
        let Some(raw) = Pid::from_raw(pid.cast_signed()) else { continue };
        // Most are gone by now, which is just the point.
        let Ok(fd) = pidfd_open(raw, PidfdFlags::empty()) else { continue };
        if std::fs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|c| c.contains(&fixture.tag)) {
            let _ = pidfd_send_signal(fd, Signal::KILL);
        }
    }
    Ok(())
}

/// Recursive kills one after the other, all but the root, which adopts what they orphan; how long they took to end the
/// family, or None if some of it lives after `within`.
pub fn ended_by_lists(fixture: &Fixture, root: u32, within: Duration) -> Result<Option<Duration>> {
    let begun = Instant::now();
    while begun.elapsed() < within {
        kill_by_list(fixture, root)?;
        let children = std::fs::read_to_string(format!("/proc/{root}/task/{root}/children"))?;
        if children.trim().is_empty() {
            return Ok(Some(begun.elapsed()));
        }
    }
    Ok(None)
}
