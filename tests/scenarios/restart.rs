//! Whatever happens to the agent, afterwards its forest equals the kernel's truth: stopped while the probes write on,
//! killed under load, started again.
//!
//! The long forms are ignored tests with their number of rounds in the environment (JWTEST_LOSS_ROUNDS,
//! JWTEST_KILL_ROUNDS); a few rounds of each run always.

use anyhow::{Context as _, Result, ensure};
use jobwarden::model::schema::{AlertKind, JobId, JobState, LineageKnown, Process, State, Tree};
use jobwarden_tests::agent::{Options, run};
use jobwarden_tests::truth::forest_is_proc;
use jobwarden_tests::{Agent, Fixture, Shape, eventually, fixture, loudly, ms, rounds};
use rustix::process::Signal;

/// A ring of one page, so that a short flood overflows it.
const SMALL: [(&str, &str); 1] = [("JOBWARDEN_AGENT_RING_BYTES", "4096")];

fn rule(fixture: &Fixture) -> String {
    format!(
        "[[job]]\nname = \"family\"\nmatch = {{ argv = \"(setsid family|orphan family-of|brood) {}\" }}\n",
        fixture.tag
    )
}

fn random(max: u64) -> Result<u64> {
    let mut b = [0u8; 8];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut b)?;
    Ok(u64::from_ne_bytes(b) % max)
}

/// One round: families come and go and a flood runs while the agent stands still; then it goes on.
fn loss_round(fixture: &Fixture, agent: &Agent<'_>) -> Result<()> {
    let mut gone = Shape::start(fixture, "setsid", &["family"])?;
    gone.fact::<u32>("grandchild")?;
    agent.signal(Signal::STOP)?;
    let mut born = Shape::start(fixture, "setsid", &["family"])?;
    let members: [u32; 2] = [born.fact("child")?, born.fact("grandchild")?];
    let mut flood = Shape::start(fixture, "spawner", &[&(20 + random(120)?).to_string()])?;
    flood.step()?;
    flood.fact::<u32>("reaped")?;
    let mut daemon = Shape::start(fixture, "daemon", &[])?;
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

fn loss(fixture: &Fixture, n: u64) -> Result<()> {
    let agent = Agent::with(fixture, &Options { config: &rule(fixture), env: &SMALL, ..Options::default() })?;
    for round in 0..n {
        loss_round(fixture, &agent).with_context(|| format!("round {round} of {n}"))?;
    }
    let metrics = agent.metrics()?;
    let lost = metrics.sum("jobwarden_events_lost_total", &[]);
    let resyncs = metrics.one("jobwarden_resyncs_total", &["reason=\"loss\""])?;
    ensure!(lost > 0.0 && resyncs > 0.0, "the fault was never there: {lost} lost, {resyncs} resyncs");
    let alerts = agent.alerts(&[])?;
    ensure!(alerts.iter().any(|a| a.kind == AlertKind::EventsLost), "{alerts:?}");
    loudly(&format!("{n} rounds of loss: {lost} events lost, {resyncs} resyncs, no difference"));
    Ok(())
}

#[test]
fn loss_is_mended() -> Result<()> {
    let fixture = fixture!("loss_is_mended");
    loss(&fixture, 3)
}

#[test]
#[ignore = "long: JWTEST_LOSS_ROUNDS (1000)"]
fn loss_is_mended_every_time() -> Result<()> {
    let fixture = fixture!("loss_is_mended_every_time");
    loss(&fixture, rounds("JWTEST_LOSS_ROUNDS", 1000))
}

/// A bpffs of the test's own, so that its pins are nobody else's.
struct Bpffs(std::path::PathBuf);

impl Bpffs {
    fn mount(fixture: &Fixture) -> Result<Self> {
        let dir = fixture.path("bpf");
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
fn pinned<'g>(fixture: &'g Fixture, bpffs: &str, config: &str) -> Result<Agent<'g>> {
    Agent::with(fixture, &Options { config, args: &["--bpffs", bpffs], pin: true, ..Options::default() })
}

/// The process is in this one job, and it is an orphan of this lineage parent.
fn orphan_of(agent: &Agent<'_>, pid: u32, job: Option<JobId>, parent: u32) -> Result<()> {
    let p = agent.process_when(pid, "an orphan in its job", |p| p.orphan && p.job.is_some())?;
    ensure!(p.lineage_parent.is_some_and(|k| k.pid == parent), "not the child of {parent}: {p:?}");
    ensure!(p.jobs.len() == 1 && (job.is_none() || p.job == job), "not in {job:?} alone: {p:?}");
    ensure!(p.job.is_some_and(|j| job.is_some() || j.root.pid == parent), "not in its parent's job: {p:?}");
    Ok(())
}

/// One round: SIGKILL at a random moment under load; orphans are made while the agent is down; it starts again.
fn kill_round(fixture: &Fixture, bpffs: &str, config: &str, born: &mut Shape) -> Result<()> {
    let agent = pinned(fixture, bpffs, config)?;
    let job = agent.process_when(born.pid(), "in its job", |p| p.job.is_some())?.job;
    let mut brood = Shape::start(fixture, "brood", &[])?;
    brood.fact::<u32>("middle")?;
    let brood_job = agent.process_when(brood.pid(), "in its job", |p| p.job.is_some())?.job;
    let mut flood = Shape::start(fixture, "spawner", &["300"])?;
    flood.step()?;
    let mut middle = Shape::start(fixture, "orphan", &["family-of"])?;
    let child: u32 = middle.fact("child")?;
    std::thread::sleep(std::time::Duration::from_millis(random(80)?));
    agent.crash()?;
    middle.step()?;
    middle.wait(ms(5000))?;
    brood.step()?;
    let mut late = Shape::start(fixture, "orphan", &["family-of"])?;
    let late_child: u32 = late.fact("child")?;
    late.step()?;
    late.wait(ms(5000))?;
    let (orphans, middles) = (brood.facts::<u32>("orphan", 2)?, brood.facts::<u32>("middle", 2)?);
    flood.fact::<u32>("reaped")?;
    flood.finish()?;
    let again = pinned(fixture, bpffs, config)?;
    ensure!(again.process(born.pid())?.job == job, "the job is the same one after the restart");
    // Orphaned while the agent was down, in two cases born too: lineage and membership went on in the kernel.
    orphan_of(&again, child, None, middle.pid())?;
    orphan_of(&again, late_child, None, late.pid())?;
    for (&orphan, &parent) in orphans.iter().zip(&middles) {
        orphan_of(&again, orphan, brood_job, parent)?;
    }
    let jobs = again.jobs()?;
    let mut members: Vec<(u32, usize)> = jobs
        .iter()
        .filter(|j| !matches!(j.state, JobState::Done))
        .map(|j| (j.root.pid, j.processes))
        .collect();
    members.sort_unstable();
    let mut expected = vec![(born.pid(), 3), (brood.pid(), 3), (middle.pid(), 1), (late.pid(), 1)];
    expected.sort_unstable();
    ensure!(members == expected, "jobs with {members:?} processes, not {expected:?}");
    forest_is_proc(&again)?;
    eventually("the accounts go on over the restart", ms(10_000), || again.metrics()?.balanced())?;
    again.crash()?;
    middle.close();
    late.close();
    brood.finish()?;
    Ok(())
}

fn kills(fixture: &Fixture, n: u64) -> Result<()> {
    let bpffs = Bpffs::mount(fixture)?;
    let config = rule(fixture);
    let mut born = Shape::start(fixture, "setsid", &["family"])?;
    born.fact::<u32>("grandchild")?;
    for round in 0..n {
        kill_round(fixture, &bpffs.path(), &config, &mut born)
            .with_context(|| format!("round {round} of {n}"))?;
    }
    loudly(&format!("{n} rounds of SIGKILL under load: no difference"));
    born.finish()?;
    Ok(())
}

#[test]
fn sigkill_loses_nothing() -> Result<()> {
    let fixture = fixture!("sigkill_loses_nothing");
    kills(&fixture, 2)
}

#[test]
#[ignore = "long: JWTEST_KILL_ROUNDS (50)"]
fn sigkill_loses_nothing_every_time() -> Result<()> {
    let fixture = fixture!("sigkill_loses_nothing_every_time");
    kills(&fixture, rounds("JWTEST_KILL_ROUNDS", 50))
}

#[test]
fn one_agent_at_a_time_and_unpin() -> Result<()> {
    let fixture = fixture!("one_agent_at_a_time_and_unpin");
    let bpffs = Bpffs::mount(&fixture)?;
    let agent = pinned(&fixture, &bpffs.path(), "")?;
    let second = Agent::with(
        &fixture,
        &Options { args: &["--bpffs", &bpffs.path()], name: "second", pin: true, ..Options::default() },
    );
    ensure!(second.is_err(), "two agents share the pins");
    agent.stop()?;
    let pins = || std::fs::read_dir(bpffs.0.join("jobwarden")).map_or(0, Iterator::count);
    ensure!(pins() > 0, "a clean stop keeps the pins");
    let mut c = fixture.command(jobwarden_tests::fixture::program("jobwarden")?);
    // Where its pins are is said as to the agent.
    c.env("JOBWARDEN_AGENT_BPFFS", bpffs.path()).arg("unpin");
    let out = run(c, ms(10_000))?;
    ensure!(out.code() == Some(0), "{out:?}");
    ensure!(pins() == 0, "unpin removes everything");
    Ok(())
}

#[test]
fn alerts_survive_a_restart() -> Result<()> {
    let fixture = fixture!("alerts_survive_a_restart");
    let config = "[zombies]\nafter = \"200ms\"\n";
    let agent = Agent::start(&fixture, config)?;
    let mut s = Shape::start(&fixture, "zombie", &[])?;
    s.fact::<u32>("dead")?;
    let about = |agent: &Agent<'_>| {
        let all = agent.alerts(&[])?;
        all.into_iter().find(|a| a.subject.as_ref().is_some_and(|p| p.pid == s.pid())).context("no alert")
    };
    let before = eventually("alert", ms(3000), || about(&agent))?;
    agent.crash()?;
    let again = Agent::start(&fixture, config)?;
    let after = eventually("the same alert", ms(3000), || about(&again))?;
    assert_eq!(after.id, before.id);
    assert_eq!(after.since, before.since, "it did not fire anew");
    again.stop()?;
    s.finish()?;
    Ok(())
}

#[test]
fn a_broken_state_file_is_no_crash() -> Result<()> {
    let fixture = fixture!("a_broken_state_file_is_no_crash");
    let agent = Agent::start(&fixture, "")?;
    let state = agent.state.clone();
    agent.stop()?;
    let mut broken = 0;
    for entry in std::fs::read_dir(&state)?.filter_map(Result::ok).filter(|e| e.path().is_file()) {
        std::fs::write(entry.path(), b"\x00\xffthis is no state\n")?;
        broken += 1;
    }
    ensure!(broken > 0, "the agent keeps no state in {}", state.display());
    let agent = Agent::start(&fixture, "")?;
    assert_eq!(agent.cli(&["status"])?.code(), Some(0));
    let log = agent.log_tail();
    ensure!(!log.contains("panicked") && log.contains("ERROR"), "{log}");
    agent.stop()
}

/// What is lost while no agent runs is told by the next one, and not again by the one after it.
#[test]
fn a_loss_while_the_agent_was_down_is_told_once() -> Result<()> {
    let fixture = fixture!("a_loss_while_the_agent_was_down_is_told_once");
    let bpffs = Bpffs::mount(&fixture)?;
    let start = || {
        let args = ["--bpffs", &bpffs.path()];
        Agent::with(&fixture, &Options { args: &args, env: &SMALL, pin: true, ..Options::default() })
    };
    let told = |agent: &Agent<'_>| -> Result<Option<(String, usize)>> {
        let all = agent.alerts(&[])?;
        Ok(all.into_iter().find(|a| a.kind == AlertKind::EventsLost).map(|a| (a.id, a.count)))
    };
    let agent = start()?;
    let before = agent.metrics()?.sum("jobwarden_events_lost_total", &[]);
    let known = told(&agent)?.map_or(0, |(_, n)| n);
    agent.crash()?;
    let mut flood = Shape::start(&fixture, "spawner", &["200"])?;
    flood.step()?;
    flood.fact::<u32>("reaped")?;
    flood.finish()?;
    let agent = start()?;
    let (id, n) = eventually("the loss is told", ms(5000), || told(&agent)?.context("no alert"))?;
    let lost = agent.metrics()?.sum("jobwarden_events_lost_total", &[]) - before;
    ensure!(lost > 0.0 && n > known, "{lost} lost, {n} told, {known} before");
    forest_is_proc(&agent)?;
    agent.crash()?;
    let agent = start()?;
    let again = eventually("the same alert", ms(5000), || told(&agent)?.context("no alert"))?;
    let since = agent.metrics()?.sum("jobwarden_events_lost_total", &[]) - before - lost;
    ensure!(again.0 == id, "{again:?} is not {id}");
    // The start itself may overflow a ring of one page; all of the flood's loss told anew would be as much again.
    let more = again.1 as f64 - n as f64;
    ensure!(more < since + lost / 2.0, "{} told after {n}, of {lost} lost, {since} lost since", again.1);
    agent.stop()
}

/// Without pins the kernel forgets: who is alive in the last state keeps its membership, nothing else is guessed.
#[test]
fn without_pins_the_last_state_is_what_is_known() -> Result<()> {
    let fixture = fixture!("without_pins_the_last_state_is_what_is_known");
    let agent = Agent::start(&fixture, &rule(&fixture))?;
    let mut brood = Shape::start(&fixture, "brood", &[])?;
    let early: u32 = brood.fact("orphan")?;
    let job = agent.process_when(early, "an orphan in its job", |p| p.orphan && p.job.is_some())?.job;
    agent.stop()?;
    brood.step()?;
    let late = *brood.facts::<u32>("orphan", 2)?.last().context("no orphan")?;
    brood.facts::<u32>("middle", 2)?;
    // Without the rule, which would take the one born meanwhile for a root of its own.
    let again = Agent::start(&fixture, "")?;
    for pid in [brood.pid(), early] {
        ensure!(again.process(pid)?.job == job, "{pid} kept its job");
    }
    let p = again.process(late)?;
    ensure!(p.job.is_none() && p.lineage == LineageKnown::Unknown && p.lineage_parent.is_none(), "{p:?}");
    let jobs = again.jobs()?;
    ensure!(jobs.len() == 1 && Some(jobs[0].id) == job && jobs[0].processes == 2, "{jobs:?}");
    forest_is_proc(&again)?;
    again.stop()?;
    brood.finish()?;
    Ok(())
}

/// What was saved on another boot: no jobs of then, but the operator's word.
#[test]
fn the_state_of_another_boot() -> Result<()> {
    let fixture = fixture!("the_state_of_another_boot");
    let agent = Agent::start(&fixture, &rule(&fixture))?;
    let brood = Shape::start(&fixture, "brood", &[])?;
    let job = agent.process_when(brood.pid(), "in its job", |p| p.job.is_some())?.job.context("no job")?;
    ensure!(agent.cli(&["enforcement", "off"])?.code() == Some(0));
    let file = agent.state.join("jobs.json");
    agent.stop()?;
    // The same boot, no rules any more: the job goes on.
    let agent =
        Agent::with(&fixture, &Options { config: "[enforcement]\nenabled = true\n", ..Options::default() })?;
    ensure!(agent.jobs()?.iter().any(|j| j.id == job), "{:?}", agent.jobs()?);
    agent.stop()?;
    let mut state: serde_json::Value = serde_json::from_slice(&std::fs::read(&file)?)?;
    ensure!(state["boot_id"].is_string(), "{state}");
    state["boot_id"] = "00000000-0000-4000-8000-000000000000".into();
    std::fs::write(&file, serde_json::to_vec(&state)?)?;
    let agent =
        Agent::with(&fixture, &Options { config: "[enforcement]\nenabled = true\n", ..Options::default() })?;
    ensure!(agent.jobs()?.is_empty(), "{:?}", agent.jobs()?);
    let enabled = agent.metrics()?.one("jobwarden_enforcement_enabled", &[])?;
    ensure!(enabled < 0.5, "the operator's `off` holds over a boot");
    agent.stop()?;
    brood.finish()?;
    Ok(())
}

#[test]
fn one_agent_for_a_state_directory() -> Result<()> {
    let fixture = fixture!("one_agent_for_a_state_directory");
    let agent = Agent::start(&fixture, "")?;
    std::fs::create_dir_all(fixture.path("second"))?;
    std::os::unix::fs::symlink(&agent.state, fixture.path("second").join("state"))?;
    let second = Agent::with(&fixture, &Options { name: "second", ..Options::default() });
    let said = second.err().map(|e| format!("{e:#}")).unwrap_or_default();
    ensure!(said.contains("another agent") && said.contains("--state-dir"), "{said}");
    agent.stop()?;
    Agent::with(&fixture, &Options { name: "second", ..Options::default() })?.stop()
}

/// More processes than the kernel's lineage map has room for: counted, told, and the forest is whole all the same.
#[test]
fn a_full_lineage_map_is_told_and_mended() -> Result<()> {
    let fixture = fixture!("a_full_lineage_map_is_told_and_mended");
    let env = [("JOBWARDEN_AGENT_LINEAGE_ENTRIES", "16")];
    let config = rule(&fixture);
    let agent = Agent::with(&fixture, &Options { config: &config, env: &env, ..Options::default() })?;
    let mut s = Shape::start(&fixture, "setsid", &["family"])?;
    let grandchild: u32 = s.fact("grandchild")?;
    let job = agent.process_when(grandchild, "in its job", |p| p.job.is_some())?.job;
    ensure!(job.is_some_and(|j| j.root.pid == s.pid()), "{job:?}");
    let failed = agent.metrics()?.sum("jobwarden_lineage_inserts_failed_total", &[]);
    ensure!(failed > 0.5, "the map was never full: the host has few processes");
    let alerts = agent.alerts(&[])?;
    let told = alerts.iter().find(|a| a.kind == AlertKind::Capacity);
    ensure!(told.is_some_and(|a| a.summary.contains("lineage")), "{alerts:?}");
    forest_is_proc(&agent)?;
    agent.stop()?;
    s.finish()?;
    Ok(())
}

/// What a process of the tree is beside the moment at which it was asked for.
fn lasting(p: &Process) -> serde_json::Value {
    serde_json::json!({
        "id": p.id, "ppid": p.ppid, "lineage_parent": p.lineage_parent, "lineage": p.lineage,
        "adopter": p.adopter.as_ref().map(|a| a.id), "state": p.state, "orphan": p.orphan,
        "started": p.started, "uid": p.uid, "job": p.job, "jobs": p.jobs, "exit": p.exit,
        "kernel_thread": p.kernel_thread,
    })
}

/// The live forest and the replayed one, but for whom something happened to since `since`, and for those on their way out:
/// what /proc says of them a moment later is no event.
fn same_forest(live: &Tree, lines: &[serde_json::Value], since: &str) -> Result<usize> {
    let end = lines.last().context("nothing was replayed")?;
    ensure!(end["kind"] == "end" && end["truncated"] == false, "{}", end["kind"]);
    let replayed: Tree = serde_json::from_value(end["tree"].clone())?;
    let later: std::collections::BTreeSet<&str> = lines
        .iter()
        .filter(|l| l["at"].as_str().is_some_and(|at| at >= since))
        .filter_map(|l| l["process"]["id"].as_str())
        .collect();
    let out = |s: State| matches!(s, State::Exiting | State::Zombie);
    let leaving: std::collections::BTreeSet<String> = [live, &replayed]
        .into_iter()
        .flat_map(|t| {
            let dead: Vec<u32> = t
                .processes
                .iter()
                .filter(|p| out(p.state) || p.state == State::Gone)
                .map(|p| p.pid)
                .collect();
            let of = |p: &&Process| out(p.state) || p.ppid.is_some_and(|pp| dead.contains(&pp));
            t.processes.iter().filter(of).map(|p| p.id.to_string()).collect::<Vec<_>>()
        })
        .collect();
    let all = |t: &Tree| -> std::collections::BTreeMap<String, serde_json::Value> {
        let old = t.processes.iter().map(|p| (p.id.to_string(), lasting(p)));
        old.filter(|(id, _)| !later.contains(id.as_str()) && !leaving.contains(id)).collect()
    };
    let (live, replayed) = (all(live), all(&replayed));
    let keys: std::collections::BTreeSet<_> = live.keys().chain(replayed.keys()).collect();
    let differ: Vec<_> = keys
        .into_iter()
        .filter(|k| live.get(*k) != replayed.get(*k))
        .map(|k| (live.get(k), replayed.get(k)))
        .collect();
    ensure!(differ.is_empty(), "{} of {} differ: {differ:#?}", differ.len(), live.len());
    Ok(live.len())
}

#[test]
fn a_recording_is_replayed() -> Result<()> {
    let fixture = fixture!("a_recording_is_replayed");
    let file = fixture.path("recording").to_string_lossy().into_owned();
    let config = rule(&fixture);
    let agent = Agent::with(
        &fixture,
        &Options { config: &config, args: &["--record", &file], ..Options::default() },
    )?;
    let mut brood = Shape::start(&fixture, "brood", &[])?;
    let orphan: u32 = brood.fact("orphan")?;
    let mut s = Shape::start(&fixture, "fork", &[])?;
    let (child, grandchild): (u32, u32) = (s.fact("child")?, s.fact("grandchild")?);
    s.step()?;
    s.fact::<i32>("status")?;
    s.finish()?;
    agent.gone(child)?;
    agent.process_when(orphan, "an orphan in its job", |p| p.orphan && p.job.is_some())?;
    let since = agent.tree()?.at;
    let live = agent.tree()?;
    agent.stop()?;
    let replay = |file: &str| {
        let mut c = fixture.command(jobwarden_tests::fixture::program("jobwarden")?);
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
    let n = same_forest(&live, &lines, &since)?;
    ensure!(
        live.processes.iter().any(|p| p.pid == orphan && p.orphan),
        "the orphan is among the {n} compared"
    );
    brood.finish()?;
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

/// The agent ends in the middle of a kill that a member which cannot die keeps going. Whether the doom's pin stays.
fn cut_short(fixture: &Fixture, bpffs: &Bpffs, crash: bool) -> Result<bool> {
    let config = format!("[[job]]\nname = \"short\"\nmatch = {{ argv = \"traced.*{}\" }}\n", fixture.tag);
    let agent = pinned(fixture, &bpffs.path(), &config)?;
    let mut s = Shape::start(fixture, "traced", &[])?;
    let (held, tracer): (u32, u32) = (s.fact("held")?, s.fact("tracer")?);
    let job = agent.process_when(held, "in the job", |p| p.job.is_some())?.job;
    // A part of the job: while it is ended it is a job of its own, of which the saved state knows nothing.
    let mut kill = agent.command(&["kill", "--grace", "0s", &held.to_string()])?;
    kill.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    let mut kill = kill.spawn()?;
    let doomed = |agent: &Agent<'_>| -> Result<bool> {
        Ok(agent.metrics()?.one("jobwarden_probe_attached", &["sys_enter"])? > 0.5)
    };
    eventually("the doom", ms(5000), || {
        ensure!(doomed(&agent)?, "not yet");
        Ok(())
    })?;
    if crash {
        agent.crash()?;
    } else {
        agent.stop()?;
    }
    kill.wait()?;
    let sets = std::fs::read_dir(bpffs.0.join("jobwarden"))?.filter_map(Result::ok);
    let mut pins = sets.filter_map(|d| std::fs::read_dir(d.path()).ok()).flatten().filter_map(Result::ok);
    let stays = pins.any(|f| f.file_name().to_string_lossy() == "link_sys_enter");
    let again = pinned(fixture, &bpffs.path(), &config)?;
    if crash {
        // What an operator has ordered goes on.
        eventually("the doom again", ms(5000), || {
            ensure!(doomed(&again)?, "not yet");
            Ok(())
        })?;
    } else {
        ensure!(!doomed(&again)?, "nobody carries the kill out any more");
    }
    for pid in [held, tracer] {
        ensure!(again.process(pid)?.job == job, "{pid} is in its job still");
    }
    again.stop()?;
    s.finish()?;
    Ok(stays)
}

#[test]
fn a_kill_that_the_agents_end_cuts_short() -> Result<()> {
    let fixture = fixture!("a_kill_that_the_agents_end_cuts_short");
    let bpffs = Bpffs::mount(&fixture)?;
    ensure!(cut_short(&fixture, &bpffs, true)?, "by SIGKILL it leaves its doom behind");
    ensure!(!cut_short(&fixture, &bpffs, false)?, "a clean stop ends every doom");
    Ok(())
}

/// Those of the test that `shape-stubborn` runs in.
fn stubborn(fixture: &Fixture) -> usize {
    jobwarden_tests::kill::alive(fixture, "shape-stubborn").len()
}

#[test]
fn a_kill_over_which_the_agent_is_killed_goes_on() -> Result<()> {
    let fixture = fixture!("a_kill_over_which_the_agent_is_killed_goes_on");
    let bpffs = Bpffs::mount(&fixture)?;
    let config = jobwarden_tests::kill::rule(&fixture, "crowd", "stubborn 3 in-a-job", "");
    // By the clock, also where what is waited for may take longer.
    let grace = std::time::Duration::from_secs(3);
    // All of a job; and what descends from a process that is in none.
    for in_a_job in [true, false] {
        let agent = pinned(&fixture, &bpffs.path(), &config)?;
        let more: &[&str] = if in_a_job { &["3", "in-a-job"] } else { &["3"] };
        let mut s = Shape::start(&fixture, "stubborn", more)?;
        s.facts::<u32>("ready", 3)?;
        let beside = jobwarden_tests::kill::control(&fixture)?;
        let before = stubborn(&fixture);
        let p = agent.process_when(s.pid(), "known", |p| p.job.is_some() == in_a_job)?;
        let target = p.job.map_or_else(|| p.id.to_string(), |j| j.to_string());
        let stops = || -> Result<usize> {
            let audit = std::fs::read_to_string(agent.state.join("audit.log"))?;
            Ok(audit.lines().filter(|l| l.contains("SIGTERM") && l.contains("sent")).count())
        };
        let earlier = stops()?;
        let mut client = agent.command(&["kill", "--grace", "3s", &target])?;
        client.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        let begun = std::time::Instant::now();
        let mut client = client.spawn()?;
        eventually("the grace", ms(3000), || {
            let sent = stops()? - earlier;
            ensure!(sent == before, "{sent} of {before}");
            Ok(())
        })?;
        agent.crash()?;
        ensure!(!client.wait()?.success(), "the client was told that all is done");
        let agent = pinned(&fixture, &bpffs.path(), &config)?;
        ensure!(begun.elapsed() > grace || stubborn(&fixture) == before, "the rest of the grace is theirs");
        eventually("the job's end", ms(10_000), || {
            let left = stubborn(&fixture);
            ensure!(left == 0, "{left} are left");
            Ok(())
        })?;
        let took = begun.elapsed();
        ensure!(took >= grace, "before the grace was over: {took:?}");
        let audit = std::fs::read_to_string(agent.state.join("audit.log"))?;
        let resumed = |l: &&str| l.contains("begun before a restart") && l.contains("resumed");
        ensure!(audit.lines().filter(resumed).any(|l| l.contains(&target)), "{audit}");
        loudly(&format!(
            "a kill with 3 s of grace, its agent killed meanwhile: over after {:.1} s",
            took.as_secs_f64()
        ));
        drop(s);
        jobwarden_tests::kill::whole(beside)?;
        // What is done is not done again.
        eventually("nothing is left to do", ms(5000), || {
            let state = std::fs::read_to_string(agent.state.join("jobs.json"))?;
            ensure!(state.contains("\"kills\":[]"), "{state}");
            Ok(())
        })?;
        agent.stop()?;
    }
    Ok(())
}
