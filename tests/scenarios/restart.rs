//! Whatever happens to the agent, afterwards its forest equals the kernel's truth: stopped while the probes write on,
//! killed under load, started again.
//!
//! The long forms are ignored tests with their number of rounds in the environment (JWTEST_LOSS_ROUNDS,
//! JWTEST_KILL_ROUNDS); a few rounds of each run always.

use anyhow::{Context as _, Result, ensure};
use jobwarden::contract::JobState;
use jobwarden_tests::agent::{Options, run};
use jobwarden_tests::truth::forest_is_proc;
use jobwarden_tests::{Agent, Ground, Shape, eventually, ground, loudly, ms, rounds};
use rustix::process::Signal;

/// A ring of one page, so that a short flood overflows it.
const SMALL: [(&str, &str); 1] = [("JOBWARDEN_AGENT_RING_BYTES", "4096")];

fn rule(ground: &Ground) -> String {
    format!("[[job]]\nname = \"family\"\nmatch = {{ argv = \"setsid family {}\" }}\n", ground.tag)
}

fn random(max: u64) -> Result<u64> {
    let mut b = [0u8; 8];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut b)?;
    Ok(u64::from_ne_bytes(b) % max)
}

/// One round: families come and go and a flood runs while the agent stands still; then it goes on.
fn loss_round(ground: &Ground, agent: &Agent<'_>) -> Result<()> {
    let mut gone = Shape::start(ground, "setsid", &["family"])?;
    gone.fact::<u32>("grandchild")?;
    agent.signal(Signal::STOP)?;
    let mut born = Shape::start(ground, "setsid", &["family"])?;
    let members: [u32; 2] = [born.fact("child")?, born.fact("grandchild")?];
    let mut flood = Shape::start(ground, "spawner", &[&(20 + random(120)?).to_string()])?;
    flood.step()?;
    flood.fact::<u32>("reaped")?;
    let mut daemon = Shape::start(ground, "daemon", &[])?;
    daemon.fact::<u32>("daemon")?;
    gone.finish()?;
    flood.finish()?;
    agent.signal(Signal::CONT)?;
    forest_is_proc(agent)?;
    eventually("the family is a job of exactly its members", ms(10_000), || {
        let jobs = agent.jobs()?;
        let live: Vec<_> = jobs.iter().filter(|j| j.state == JobState::Running && j.processes > 0).collect();
        ensure!(live.len() == 1 && live[0].root.pid == born.pid(), "{jobs:?}");
        ensure!(live[0].processes == 3, "{live:?}");
        for pid in members {
            ensure!(agent.process(pid)?.job == Some(live[0].id), "{pid}");
        }
        Ok(())
    })?;
    born.finish()?;
    daemon.finish()?;
    Ok(())
}

fn loss(ground: &Ground, n: u64) -> Result<()> {
    let agent = Agent::with(ground, &Options { config: &rule(ground), env: &SMALL, ..Options::default() })?;
    for round in 0..n {
        loss_round(ground, &agent).with_context(|| format!("round {round} of {n}"))?;
    }
    let metrics = agent.metrics()?;
    let lost = metrics.sum("jobwarden_events_lost_total", &[]);
    let resyncs = metrics.one("jobwarden_resyncs_total", &["reason=\"loss\""])?;
    ensure!(lost > 0.0 && resyncs > 0.0, "the fault was never there: {lost} lost, {resyncs} resyncs");
    let alerts = agent.alerts(&[])?;
    ensure!(alerts.iter().any(|a| a.kind == jobwarden::contract::AlertKind::EventsLost), "{alerts:?}");
    loudly(&format!("{n} rounds of loss: {lost} events lost, {resyncs} resyncs, no difference"));
    Ok(())
}

#[test]
fn loss_is_mended() -> Result<()> {
    let ground = ground!("loss_is_mended");
    loss(&ground, 3)
}

#[test]
#[ignore = "long: JWTEST_LOSS_ROUNDS (1000)"]
fn loss_is_mended_every_time() -> Result<()> {
    let ground = ground!("loss_is_mended_every_time");
    loss(&ground, rounds("JWTEST_LOSS_ROUNDS", 1000))
}

/// A bpffs of the test's own, so that its pins are nobody else's.
struct Bpffs(std::path::PathBuf);

impl Bpffs {
    fn mount(ground: &Ground) -> Result<Self> {
        let dir = ground.path("bpf");
        std::fs::create_dir_all(&dir)?;
        let mut c = std::process::Command::new("mount");
        c.args(["-t", "bpf", "bpf"]).arg(&dir);
        let out = run(c, ms(5000))?;
        ensure!(out.code() == Some(0), "mount: {out:?}");
        Ok(Self(dir))
    }
    fn path(&self) -> String {
        self.0.to_string_lossy().into_owned()
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        // With the mount its pins go: nothing stays in the kernel.
        let done = std::process::Command::new("umount").arg(&self.0).status();
        if !done.is_ok_and(|s| s.success()) {
            loudly(&format!("umount {} failed", self.0.display()));
        }
    }
}

/// Whether the agent starts pinned in this bpffs: what a kernel refuses is skipped loudly by the caller.
fn pinned<'g>(ground: &'g Ground, bpffs: &str, config: &str) -> Result<Agent<'g>> {
    Agent::with(ground, &Options { config, args: &["--bpffs", bpffs], pin: true, ..Options::default() })
}

/// One round: SIGKILL at a random moment under load; an orphan is made while the agent is down; it starts again.
fn kill_round(ground: &Ground, bpffs: &str, config: &str, born: &mut Shape) -> Result<()> {
    let agent = pinned(ground, bpffs, config)?;
    let job = agent.process_when(born.pid(), "in its job", |p| p.job.is_some())?.job;
    let mut flood = Shape::start(ground, "spawner", &["300"])?;
    flood.step()?;
    let mut middle = Shape::start(ground, "orphan", &["family-of"])?;
    let child: u32 = middle.fact("child")?;
    std::thread::sleep(std::time::Duration::from_millis(random(80)?));
    agent.crash()?;
    middle.step()?;
    middle.wait(ms(5000))?;
    let mut late = Shape::start(ground, "orphan", &["family-of"])?;
    let late_child: u32 = late.fact("child")?;
    late.step()?;
    late.wait(ms(5000))?;
    flood.fact::<u32>("reaped")?;
    flood.finish()?;
    let again = pinned(ground, bpffs, config)?;
    ensure!(again.process(born.pid())?.job == job, "the job is the same one after the restart");
    // Orphaned while the agent was down, in one case born too: lineage went on in the kernel.
    for (pid, parent) in [(child, middle.pid()), (late_child, late.pid())] {
        let p = again.process_when(pid, "an orphan of a known parent", |p| p.orphan)?;
        ensure!(p.lineage_parent.is_some_and(|k| k.pid == parent), "{p:?}");
    }
    forest_is_proc(&again)?;
    again.crash()?;
    middle.close();
    late.close();
    Ok(())
}

fn kills(ground: &Ground, n: u64) -> Result<()> {
    let bpffs = Bpffs::mount(ground)?;
    let config = rule(ground);
    let mut born = Shape::start(ground, "setsid", &["family"])?;
    born.fact::<u32>("grandchild")?;
    for round in 0..n {
        kill_round(ground, &bpffs.path(), &config, &mut born)
            .with_context(|| format!("round {round} of {n}"))?;
    }
    loudly(&format!("{n} rounds of SIGKILL under load: no difference"));
    born.finish()?;
    Ok(())
}

#[test]
fn sigkill_loses_nothing() -> Result<()> {
    let ground = ground!("sigkill_loses_nothing");
    kills(&ground, 2)
}

#[test]
#[ignore = "long: JWTEST_KILL_ROUNDS (50)"]
fn sigkill_loses_nothing_every_time() -> Result<()> {
    let ground = ground!("sigkill_loses_nothing_every_time");
    kills(&ground, rounds("JWTEST_KILL_ROUNDS", 50))
}

#[test]
fn one_agent_at_a_time_and_unpin() -> Result<()> {
    let ground = ground!("one_agent_at_a_time_and_unpin");
    let bpffs = Bpffs::mount(&ground)?;
    let agent = pinned(&ground, &bpffs.path(), "")?;
    let second = Agent::with(
        &ground,
        &Options { args: &["--bpffs", &bpffs.path()], name: "second", pin: true, ..Options::default() },
    );
    ensure!(second.is_err(), "two agents share the pins");
    agent.stop()?;
    let pins = || std::fs::read_dir(bpffs.0.join("jobwarden")).map_or(0, Iterator::count);
    ensure!(pins() > 0, "a clean stop keeps the pins");
    let mut c = ground.command(jobwarden_tests::ground::program("jobwarden")?);
    // Where its pins are is said as to the agent.
    c.env("JOBWARDEN_AGENT_BPFFS", bpffs.path()).arg("unpin");
    let out = run(c, ms(10_000))?;
    ensure!(out.code() == Some(0), "{out:?}");
    ensure!(pins() == 0, "unpin removes everything");
    Ok(())
}

#[test]
fn alerts_survive_a_restart() -> Result<()> {
    let ground = ground!("alerts_survive_a_restart");
    let config = "[zombies]\nafter = \"200ms\"\n";
    let agent = Agent::start(&ground, config)?;
    let mut s = Shape::start(&ground, "zombie", &[])?;
    s.fact::<u32>("dead")?;
    let about = |agent: &Agent<'_>| {
        let all = agent.alerts(&[])?;
        all.into_iter().find(|a| a.subject.as_ref().is_some_and(|p| p.pid == s.pid())).context("no alert")
    };
    let before = eventually("alert", ms(3000), || about(&agent))?;
    agent.crash()?;
    let again = Agent::start(&ground, config)?;
    let after = eventually("the same alert", ms(3000), || about(&again))?;
    assert_eq!(after.id, before.id);
    assert_eq!(after.since, before.since, "it did not fire anew");
    again.stop()?;
    s.finish()?;
    Ok(())
}

#[test]
fn a_broken_state_file_is_no_crash() -> Result<()> {
    let ground = ground!("a_broken_state_file_is_no_crash");
    let agent = Agent::start(&ground, "")?;
    let state = agent.state.clone();
    agent.stop()?;
    let mut broken = 0;
    for entry in std::fs::read_dir(&state)?.filter_map(Result::ok).filter(|e| e.path().is_file()) {
        std::fs::write(entry.path(), b"\x00\xffthis is no state\n")?;
        broken += 1;
    }
    ensure!(broken > 0, "the agent keeps no state in {}", state.display());
    // It may start and say so, or refuse and say so; it does not panic.
    match Agent::start(&ground, "") {
        Ok(agent) => {
            assert_eq!(agent.cli(&["status"])?.code(), Some(0));
            let log = agent.log_tail();
            ensure!(!log.contains("panicked"), "{log}");
            ensure!(log.contains("WARN") || log.contains("ERROR"), "it says so: {log}");
        }
        Err(e) => {
            let said = format!("{e:#}");
            ensure!(!said.contains("panicked"), "{said}");
            ensure!(said.contains(&*state.to_string_lossy()), "it says which file: {said}");
        }
    }
    Ok(())
}

#[test]
fn a_recording_is_replayed() -> Result<()> {
    let ground = ground!("a_recording_is_replayed");
    let file = ground.path("recording").to_string_lossy().into_owned();
    let agent = Agent::with(&ground, &Options { args: &["--record", &file], ..Options::default() })?;
    let mut s = Shape::start(&ground, "fork", &[])?;
    let (child, grandchild): (u32, u32) = (s.fact("child")?, s.fact("grandchild")?);
    s.step()?;
    s.fact::<i32>("status")?;
    s.finish()?;
    agent.gone(child)?;
    agent.stop()?;
    let replay = |file: &str| {
        let mut c = ground.command(jobwarden_tests::ground::program("jobwarden")?);
        c.args(["replay", file]);
        run(c, ms(20_000))
    };
    let whole = replay(&file)?;
    ensure!(whole.code() == Some(0), "{:?} {}", whole.status, whole.err());
    let lines: Vec<serde_json::Value> =
        whole.out().lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    for pid in [child, grandchild] {
        for kind in ["fork", "exit"] {
            let found = lines.iter().any(|v| v["kind"] == kind && v["process"]["pid"] == pid);
            ensure!(found, "no {kind} of {pid} among {} lines", lines.len());
        }
    }
    // Cut off: read up to the break, which is said.
    let bytes = std::fs::read(&file)?;
    std::fs::write(&file, &bytes[..bytes.len() * 2 / 3])?;
    let cut = replay(&file)?;
    ensure!(!cut.err().contains("panicked") && !cut.err().is_empty(), "{:?} {}", cut.status, cut.err());
    ensure!(cut.out().lines().count() <= lines.len(), "no more than there was");
    std::fs::write(&file, b"something else")?;
    let foreign = replay(&file)?;
    ensure!(foreign.code() == Some(1) && foreign.err().contains(&file), "{foreign:?}");
    Ok(())
}
