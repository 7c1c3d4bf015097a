//! Ending jobs of odd shapes: bombs as people write them, daemons made while the job ends, members that are traced, frozen or
//! have become another user; and what the end of an incident is said to be.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use jobwarden::model::schema::{AlertKind, AlertState, KillReport};
use jobwarden_tests::fixture::program;
use jobwarden_tests::kill::{alive, all_gone, bomb, control, in_time, job, listed, rule, whole};
use jobwarden_tests::truth::letter;
use jobwarden_tests::{Agent, Fixture, Limit, Shape, eventually, fixture, loudly, ms, pause, skip};
use rustix::process::Signal;

fn say(what: &str, r: &KillReport) {
    let signals = r.signalled.len();
    loudly(&format!("{what}: nothing left {:.3} s after the kill began, by {signals} signals", r.took_s));
}

#[test]
fn the_bomb_of_bash() -> Result<()> {
    let fixture = fixture!("the_bomb_of_bash");
    let Some(limit) = Limit::new(&fixture, 200) else {
        skip!("the_bomb_of_bash: no pids controller here, and without a limit no bomb is thrown");
    };
    let agent = Agent::start(&fixture, &rule(&fixture, "bash", "bashbomb", ""))?;
    let beside = control(&fixture)?;
    // The bomb itself, but for its end after 20 s should nobody end it.
    let script = "echo started=1; :(){ [ $SECONDS -gt 20 ] && exit; :|:& };: 2>/dev/null; read end";
    let mut c = fixture.command("/bin/bash");
    c.args(["-c", script, "bashbomb", &fixture.tag]).stderr(std::process::Stdio::null());
    limit.holds(&mut c);
    let mut s = Shape::spawn("bash", c)?;
    s.fact::<u32>("started")?;
    let target = job(&agent, s.pid())?;
    pause(300);
    let begun = std::time::Instant::now();
    let report: KillReport = agent.json(&["kill", "--grace", "200ms", &target.id.to_string()])?;
    let told = begun.elapsed();
    all_gone(&fixture, "bashbomb")?;
    drop(s);
    limit.empty()?;
    say("bash's fork bomb", &report);
    ensure!(report.survivors.is_empty(), "{:?}", report.survivors);
    in_time(&report, told)?;
    whole(beside)
}

#[test]
fn a_bomb_of_vfork_and_clone() -> Result<()> {
    let fixture = fixture!("a_bomb_of_vfork_and_clone");
    let Some(limit) = Limit::new(&fixture, 200) else {
        skip!("a_bomb_of_vfork_and_clone: no pids controller here, and without a limit no bomb is thrown");
    };
    let agent = Agent::start(&fixture, &rule(&fixture, "native", "bomb native", ""))?;
    let beside = control(&fixture)?;
    let mut s = bomb(&fixture, &limit, &["native", "200", "20"])?;
    s.fact::<u32>("started")?;
    let target = job(&agent, s.pid())?;
    pause(300);
    let begun = std::time::Instant::now();
    let report: KillReport = agent.json(&["kill", "--grace", "200ms", &target.id.to_string()])?;
    let told = begun.elapsed();
    all_gone(&fixture, "bomb")?;
    drop(s);
    limit.empty()?;
    say("a bomb of vfork and clone", &report);
    ensure!(report.survivors.is_empty(), "{:?}", report.survivors);
    in_time(&report, told)?;
    whole(beside)
}

/// One recursive kill by a list, children first, as such scripts do: how many it reached. Most are gone by then, which is
/// just the point.
fn kill_by_list(fixture: &Fixture, root: u32) -> usize {
    let mut family = vec![root];
    family.extend(listed(root, fixture.alive().into_iter().map(i32::cast_unsigned)));
    family.iter().rev().filter(|p| fixture.signal(p.cast_signed(), Signal::KILL).is_ok()).count()
}

#[test]
fn chains_that_a_kill_by_list_does_not_end() -> Result<()> {
    let fixture = fixture!("chains_that_a_kill_by_list_does_not_end");
    let Some(limit) = Limit::new(&fixture, 300) else {
        skip!("chains_that_a_kill_by_list_does_not_end: no pids controller here");
    };
    let agent = Agent::start(&fixture, &rule(&fixture, "chains", "bomb chains", ""))?;
    // Where the list happens to have them all at that moment, it ends them, and nothing is shown.
    for _ in 0..5 {
        let mut s = bomb(&fixture, &limit, &["chains", "10", "25"])?;
        s.fact::<u32>("started")?;
        let target = job(&agent, s.pid())?;
        let by_list = kill_by_list(&fixture, s.pid());
        s.wait(ms(3000))?;
        pause(300);
        // One reading may miss a chain, so several are taken.
        if (0..20).all(|_| alive(&fixture, "chains").is_empty()) {
            drop(s);
            limit.empty()?;
            continue;
        }
        let report: KillReport = agent.json(&["kill", "--grace", "0s", &target.id.to_string()])?;
        all_gone(&fixture, "chains").with_context(|| format!("{report:?}\n{}", agent.log_tail()))?;
        loudly(&format!(
            "10 chains outlived a recursive kill of {by_list} by list; jobwarden's took {:.3} s",
            report.took_s
        ));
        ensure!(report.survivors.is_empty(), "{report:?}");
        drop(s);
        return limit.empty();
    }
    bail!("five times a kill by list ended them: this shows nothing")
}

#[test]
fn daemons_made_while_the_job_ends() -> Result<()> {
    let fixture = fixture!("daemons_made_while_the_job_ends");
    let agent = Agent::start(&fixture, &rule(&fixture, "daemons", "daemons", ""))?;
    let beside = control(&fixture)?;
    // Each stop signal makes five by double fork, in sessions of their own, that ignore it; and it goes on.
    let daemon = "(setsid sh -c 'trap \"\" TERM; echo daemon=$$; sleep 61.5' &)";
    let script = format!(
        "trap 'for i in 1 2 3 4 5; do {}; done' TERM; echo started=1; while :; do sleep 0.02; done",
        daemon.replace('\'', "'\\''")
    );
    let mut c = fixture.command("/bin/sh");
    c.args(["-c", &script, "daemons", &fixture.tag]);
    let mut s = Shape::spawn("sh", c)?;
    s.fact::<u32>("started")?;
    let target = job(&agent, s.pid())?;
    let report: KillReport = agent.json(&["kill", "--grace", "700ms", &target.id.to_string()])?;
    let made = s.facts::<u32>("daemon", 5)?;
    for what in ["daemons", "61.5"] {
        all_gone(&fixture, what)?;
    }
    ensure!(report.survivors.is_empty(), "{report:?}");
    for pid in made {
        ensure!(report.signalled.iter().any(|x| x.process.pid == pid), "{pid} was never there: {report:?}");
    }
    whole(beside)
}

#[test]
fn a_member_that_becomes_another_user() -> Result<()> {
    let fixture = fixture!("a_member_that_becomes_another_user");
    // A setuid program in a folder that its caller may enter.
    let suid = fixture.path("suid");
    std::fs::copy(program("shape-stubborn")?, &suid)?;
    std::fs::set_permissions(&suid, std::fs::Permissions::from_mode(0o4755))?;
    let folder = suid.parent().context("no folder")?;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755))?;
    let agent = Agent::start(&fixture, &rule(&fixture, "users", "users", ""))?;
    let script = format!(
        "setpriv --reuid 65534 --clear-groups {} 1 {} & echo nobody=$!; wait",
        suid.display(),
        fixture.tag
    );
    let mut c = fixture.command("/bin/sh");
    c.args(["-c", &script, "users", &fixture.tag]);
    let mut s = Shape::spawn("sh", c)?;
    let member: u32 = s.fact("nobody")?;
    s.fact::<u32>("ready")?;
    let status = std::fs::read_to_string(format!("/proc/{member}/status"))?;
    let uids = status.lines().find(|l| l.starts_with("Uid:")).context("no uids")?;
    if !uids.starts_with("Uid:\t65534\t0\t") {
        skip!("a_member_that_becomes_another_user: setuid does nothing in {}: {uids}", folder.display());
    }
    let target = job(&agent, s.pid())?;
    let report: KillReport = agent.json(&["kill", "--grace", "200ms", &target.id.to_string()])?;
    all_gone(&fixture, "suid")?;
    ensure!(report.survivors.is_empty(), "{report:?}");
    ensure!(report.signalled.iter().any(|x| x.process.pid == member), "{report:?}");
    Ok(())
}

#[test]
fn a_traced_member_ends_and_its_zombie_is_the_tracers() -> Result<()> {
    let fixture = fixture!("a_traced_member_ends_and_its_zombie_is_the_tracers");
    let agent = Agent::start(&fixture, "")?;
    let mut s = Shape::start(&fixture, "traced", &["plain"])?;
    let (held, tracer): (u32, u32) = (s.fact("held")?, s.fact("tracer")?);
    agent.process_when(held, "there", |_| true)?;
    let report: KillReport = agent.json(&["kill", "--grace", "0s", &held.to_string()])?;
    ensure!(report.survivors.is_empty(), "{report:?}");
    ensure!(report.zombies.iter().any(|r| r.pid == held), "listed apart: {report:?}");
    ensure!(letter(held)? == 'Z', "it waits for its tracer");
    ensure!(letter(tracer).is_ok_and(|l| l != 'Z'), "never who would have to reap it");
    ensure!(!agent.alerts(&[])?.iter().any(|a| a.kind == AlertKind::KillFailed), "a zombie is no survivor");
    s.finish()?;
    Ok(())
}

/// A cgroup of the test in this hierarchy. What is in it is thawed when this is dropped.
struct Freezer(PathBuf);

impl Freezer {
    fn new(fixture: &Fixture, root: &str, file: &str) -> Option<Self> {
        let dir = Path::new(root).join(&fixture.tag);
        std::fs::create_dir(&dir).ok()?;
        let me = Self(dir);
        me.0.join(file).exists().then_some(me)
    }

    fn write(&self, file: &str, what: &str) -> Result<()> {
        std::fs::write(self.0.join(file), what).with_context(|| format!("{file} = {what}"))
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        let _ = self.write("freezer.state", "THAWED").or_else(|_| self.write("cgroup.freeze", "0"));
        if let Err(e) = eventually("rmdir", ms(5000), || Ok(std::fs::remove_dir(&self.0)?)) {
            loudly(&format!("{}: {e:#}", self.0.display()));
        }
    }
}

#[test]
fn a_frozen_member_survives_where_the_freezer_holds_sigkill_back() -> Result<()> {
    let fixture = fixture!("a_frozen_member_survives_where_the_freezer_holds_sigkill_back");
    let Some(freezer) = Freezer::new(&fixture, "/sys/fs/cgroup/freezer", "freezer.state") else {
        skip!("a_frozen_member_survives_where_the_freezer_holds_sigkill_back: no v1 freezer here");
    };
    let agent = Agent::start(&fixture, "")?;
    let mut s = Shape::start(&fixture, "setsid", &[])?;
    let (child, grandchild): (u32, u32) = (s.fact("child")?, s.fact("grandchild")?);
    agent.process_when(grandchild, "there", |_| true)?;
    freezer.write("cgroup.procs", &child.to_string())?;
    freezer.write("freezer.state", "FROZEN")?;
    let out = agent.cli(&["--json", "kill", "--grace", "0s", &s.pid().to_string()])?;
    ensure!(out.code() == Some(1), "a survivor is a failure: {out:?}");
    let report: KillReport = out.any_json()?;
    ensure!(report.survivors.len() == 1 && report.survivors[0].pid == child, "{report:?}");
    let stuck = report.stuck.iter().find(|k| k.process.pid == child).context("not stuck")?;
    // The v1 freezer is what makes an uninterruptible sleep here at will.
    ensure!(stuck.frozen && stuck.state == "D", "{stuck:?}");
    let wchan = stuck.wchan.as_deref().context("where it waits is not named")?;
    let failed =
        || -> Result<_> { Ok(agent.alerts(&[])?.into_iter().find(|a| a.kind == AlertKind::KillFailed)) };
    let alert = eventually("kill-failed", ms(3000), || failed()?.context("no alert"))?;
    ensure!(alert.summary.contains("in a frozen cgroup"), "{}", alert.summary);
    ensure!(alert.summary.contains(&format!("in state D waiting in {wchan}")), "{}", alert.summary);
    ensure!(alert.summary.contains(&child.to_string()), "{}", alert.summary);
    // What was outside any job is no kill of a job.
    let kills = agent.metrics()?.sum("jobwarden_job_kills_total", &[]);
    ensure!(kills < 0.5, "{kills}");
    freezer.write("freezer.state", "THAWED")?;
    all_gone(&fixture, "shape-setsid")?;
    eventually("the alert is over", ms(5000), || {
        let alert = failed()?;
        ensure!(alert.is_none(), "{alert:?}");
        Ok(())
    })
}

#[test]
fn a_frozen_member_ends_where_the_freezer_lets_it() -> Result<()> {
    let fixture = fixture!("a_frozen_member_ends_where_the_freezer_lets_it");
    let roots = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"];
    let Some(freezer) = roots.iter().find_map(|r| Freezer::new(&fixture, r, "cgroup.freeze")) else {
        skip!("a_frozen_member_ends_where_the_freezer_lets_it: no v2 freezer here");
    };
    let agent = Agent::start(&fixture, "")?;
    let mut s = Shape::start(&fixture, "setsid", &[])?;
    let (child, grandchild): (u32, u32) = (s.fact("child")?, s.fact("grandchild")?);
    agent.process_when(grandchild, "there", |_| true)?;
    freezer.write("cgroup.procs", &child.to_string())?;
    freezer.write("cgroup.freeze", "1")?;
    let report: KillReport = agent.json(&["kill", "--grace", "300ms", &s.pid().to_string()])?;
    ensure!(report.survivors.is_empty(), "{report:?}");
    all_gone(&fixture, "shape-setsid")
}

#[test]
fn the_end_of_an_incident_says_that_the_zombie_was_reaped() -> Result<()> {
    let fixture = fixture!("the_end_of_an_incident_says_that_the_zombie_was_reaped");
    let more = "zombie_after = \"300ms\"\norphan_after = \"1500ms\"\non_orphan = \"kill\"\ngrace = \"200ms\"";
    let config = format!("[enforcement]\nenabled = true\n{}", rule(&fixture, "incident", "incident", more));
    let agent = Agent::start(&fixture, &config)?;
    let mut s = Shape::start(&fixture, "incident", &[])?;
    let command: u32 = s.fact("command")?;
    let firing = eventually("the zombie's alert", ms(5000), || {
        agent.alerts(&[])?.into_iter().find(|a| a.kind == AlertKind::Zombie).context("no alert")
    })?;
    ensure!(firing.subject.as_ref().is_some_and(|p| p.pid == s.pid()), "{firing:?}");
    ensure!(s.fact::<i32>("status")? == 0, "the worker is free again");
    let ended = eventually("its end", ms(5000), || {
        let all = agent.alerts(&["--history"])?;
        let over = |a: &jobwarden::model::schema::Alert| a.id == firing.id && a.state == AlertState::Resolved;
        all.into_iter().find(over).context("not resolved")
    })?;
    let text = &ended.summary;
    ensure!(text.contains("was reaped") && text.contains(&command.to_string()), "{text}");
    let stayed = text.split("stayed for ").nth(1).and_then(|t| t.split(' ').next()?.parse::<f64>().ok());
    ensure!(stayed.is_some_and(|s| s >= 1.5), "how long it had stayed: {text}");
    ensure!(s.ended()?.is_none(), "never the parent of a zombie");
    s.finish()?;
    Ok(())
}

/// `kill PID` within a rule's job: what is spared of it is a member of that job still, and so is what it forks then.
#[test]
fn what_kill_pid_spares_stays_in_its_job() -> Result<()> {
    let fixture = fixture!("what_kill_pid_spares_stays_in_its_job");
    let protect = format!("[enforcement]\nprotect = [{{ argv = \"^sh -c echo kept.*{}\" }}]\n", fixture.tag);
    let agent = Agent::start(&fixture, &(protect + &rule(&fixture, "around", "around", "")))?;
    let tag = &fixture.tag;
    let script = format!(
        "exec 3<&0; sh -c 'sh -c \"echo kept=\\$\\$; read go <&3; sleep 62.5 & echo later=\\$!; wait\" kept {tag} & \
         echo inner=$$; wait' inner {tag} & wait; read end <&3"
    );
    let mut c = fixture.command("/bin/sh");
    c.args(["-c", &script, "around", tag]);
    let mut s = Shape::spawn("sh", c)?;
    let (inner, kept): (u32, u32) = (s.fact("inner")?, s.fact("kept")?);
    let target = job(&agent, s.pid())?;
    agent.process_when(kept, "the protected one", |p| p.argv.iter().any(|a| a == "kept"))?;
    let report: KillReport = agent.json(&["kill", "--grace", "0s", &inner.to_string()])?;
    ensure!(report.spared.iter().any(|x| x.process.pid == kept), "{report:?}");
    ensure!(letter(inner).map_or(true, |l| l == 'Z') && letter(kept)? != 'Z', "{report:?}");
    s.step()?;
    let later: u32 = s.fact("later")?;
    let p = agent.process_when(later, "in the job", |p| p.job.is_some())?;
    ensure!(p.job == Some(target.id), "{p:?}");
    let report: KillReport = agent.json(&["kill", "--dry-run", &target.id.to_string()])?;
    ensure!(report.spared.iter().any(|x| x.process.pid == later), "{report:?}");
    for pid in [kept, later] {
        fixture.signal(pid.cast_signed(), Signal::KILL)?;
    }
    Ok(())
}
