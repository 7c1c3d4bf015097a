//! The state folder, damaged in every way: the agent starts and runs, reports it, and recovers when it is given what it needs.

use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use jobwarden::api::Status;
use jobwarden::model::schema::AlertKind;
use jobwarden_tests::agent::{Options, Output, run};
use jobwarden_tests::disk::Disk;
use jobwarden_tests::fixture::program;
use jobwarden_tests::{Agent, Fixture, Shape, eventually, fixture, loudly, ms};

const NOBODY: u32 = 65_534;

fn jobwarden(fixture: &Fixture, args: &[&str], env: &[(&str, &str)]) -> Result<Output> {
    let mut c = fixture.command(program("jobwarden")?);
    c.args(args).envs(env.iter().copied());
    run(c, ms(10_000))
}

fn status(agent: &Agent<'_>) -> Result<Status> {
    agent.json(&["status"])
}

/// The alert's text while it fires.
fn firing(agent: &Agent<'_>) -> Result<Option<String>> {
    Ok(agent.alerts(&[])?.into_iter().find(|a| a.kind == AlertKind::StorageFailed).map(|a| a.summary))
}

/// Alert and status say it.
fn reported(agent: &Agent<'_>, word: &str) -> Result<()> {
    eventually(&format!("storage-failed with {word}"), ms(5000), || {
        let said = firing(agent)?.context("no alert")?;
        ensure!(said.contains(word), "{said}");
        let storage = status(agent)?.storage;
        ensure!(storage.iter().any(|s| s.contains(word)), "{storage:?}");
        Ok(())
    })
}

fn resolved(agent: &Agent<'_>) -> Result<()> {
    eventually("the end of storage-failed", ms(5000), || {
        ensure!(
            firing(agent)?.is_none() && status(agent)?.storage.is_empty(),
            "{:?}",
            status(agent)?.storage
        );
        Ok(())
    })
}

fn mkfifo(path: &Path) -> Result<()> {
    let mode = rustix::fs::Mode::RWXU;
    Ok(rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0)?)
}

/// One way to damage a file, and whether the file must be unusable then.
type Harm = (&'static str, bool, fn(&Path) -> Result<()>);

fn replaced(path: &Path, with: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    std::fs::remove_file(path)?;
    with(path)
}

const HARMS: [Harm; 9] = [
    ("a bit", false, |p| {
        let mut bytes = std::fs::read(p)?;
        let at = bytes.len() / 3;
        *bytes.get_mut(at).context("empty")? ^= 0x10;
        Ok(std::fs::write(p, bytes)?)
    }),
    ("cut", false, |p| {
        let half = std::fs::metadata(p)?.len() / 2;
        Ok(std::fs::File::options().write(true).open(p)?.set_len(half)?)
    }),
    ("empty", false, |p| Ok(std::fs::write(p, "")?)),
    ("nonsense", false, |p| Ok(std::fs::write(p, b"\x00\xffno state\n".repeat(1000))?)),
    ("a folder", true, |p| replaced(p, |p| Ok(std::fs::create_dir_all(p.join("with/content"))?))),
    ("a FIFO", true, |p| replaced(p, mkfifo)),
    ("a link", true, |p| replaced(p, |p| Ok(symlink("/dev/null", p)?))),
    ("another owner", true, |p| Ok(chown(p, Some(NOBODY), None)?)),
    ("read-only", false, |p| Ok(std::fs::set_permissions(p, PermissionsExt::from_mode(0o400))?)),
];
const FILES: [&str; 4] = ["jobs.json", "jobs.synced.json", "alerts.db", "audit.log"];

#[test]
fn each_file_damaged_in_each_way() -> Result<()> {
    let fixture = fixture!("each_file_damaged_in_each_way");
    let agent = Agent::start(&fixture, "")?;
    let state = agent.state.clone();
    ensure!(agent.cli(&["enforcement", "on"])?.code() == Some(0));
    agent.stop()?;
    let mut aside = 0;
    for name in FILES {
        for (what, unusable, harm) in HARMS {
            let case = || format!("{name}: {what}");
            harm(&state.join(name)).with_context(case)?;
            let agent = Agent::start(&fixture, "").with_context(case)?;
            let bad = state.join(format!("{name}.bad"));
            let moved = std::fs::symlink_metadata(&bad).is_ok();
            ensure!(moved || !unusable, "{}: it was not moved aside", case());
            if moved {
                aside += 1;
                reported(&agent, &bad.to_string_lossy()).with_context(case)?;
                if bad.is_dir() { std::fs::remove_dir_all(&bad)? } else { std::fs::remove_file(&bad)? }
            }
            resolved(&agent).with_context(case)?;
            // All three stores take something.
            ensure!(agent.cli(&["enforcement", "off"])?.code() == Some(0));
            let audit = agent.cli(&["audit", "--since", "5s"])?;
            ensure!(audit.out().contains("enforcement off"), "{}: {audit:?}", case());
            agent.stop().with_context(case)?;
            for name in FILES {
                let m = std::fs::symlink_metadata(state.join(name)).with_context(case)?;
                ensure!(m.is_file() && m.permissions().mode() & 0o7777 == 0o600, "{}: {name} {m:?}", case());
            }
        }
    }
    loudly(&format!("{} starts with a damaged file, {aside} moved aside", FILES.len() * HARMS.len()));
    Ok(())
}

/// However often it happens: a bounded number is kept, and the state of before the damage is not what is lost.
#[test]
fn damage_again_and_again_keeps_a_bounded_number_of_files() -> Result<()> {
    let fixture = fixture!("damage_again_and_again_keeps_a_bounded_number_of_files");
    let agent = Agent::start(&fixture, "[enforcement]\nenabled = true\n")?;
    let state = agent.state.clone();
    ensure!(agent.cli(&["enforcement", "off"])?.code() == Some(0));
    agent.crash()?;
    for _ in 0..6 {
        std::fs::write(state.join("jobs.json"), "{")?;
        let agent = Agent::start(&fixture, "[enforcement]\nenabled = true\n")?;
        ensure!(!status(&agent)?.enforcement.enabled, "the operator's word is in the synced file");
        reported(&agent, "jobs.json.bad")?;
        agent.crash()?;
    }
    let names = std::fs::read_dir(&state)?.map(|e| Ok(e?.file_name().to_string_lossy().into_owned()));
    let bad: Vec<String> =
        names.collect::<Result<Vec<_>>>()?.into_iter().filter(|n| n.contains(".bad")).collect();
    ensure!(bad.len() == 3, "{bad:?}");
    Ok(())
}

/// At the start there is no room for anything, not even for the folder: the agent works, holds alerts in memory, and writes all
/// when there is room.
#[test]
fn a_full_disk_at_the_start() -> Result<()> {
    let fixture = fixture!("a_full_disk_at_the_start");
    for folder_is_there in [true, false] {
        let name = if folder_is_there { "full" } else { "no-folder" };
        let at = fixture.path(name);
        let disk = Disk::mount(&at, 4 << 20)?;
        let state = at.join("state");
        if folder_is_there {
            std::fs::create_dir(&state)?;
        }
        disk.fill()?;
        if !folder_is_there {
            disk.set_writable(false)?;
        }
        let config = "[zombies]\nafter = \"200ms\"\n";
        let (args, name) = (["--state-dir", &*state.to_string_lossy()], format!("{name}-agent"));
        let agent =
            Agent::with(&fixture, &Options { config, args: &args, name: &name, ..Options::default() })?;
        reported(&agent, &state.to_string_lossy())?;
        let mut zombie = Shape::start(&fixture, "zombie", &["1"])?;
        zombie.fact::<u32>("dead")?;
        eventually("an alert from memory", ms(5000), || {
            let all = agent.alerts(&[])?;
            ensure!(all.iter().any(|a| a.subject.as_ref().is_some_and(|s| s.pid == zombie.pid())), "{all:?}");
            Ok(())
        })?;
        ensure!(agent.cli(&["enforcement", "off"])?.code() == Some(0), "no command is refused");
        if !folder_is_there {
            disk.set_writable(true)?;
        }
        disk.free()?;
        resolved(&agent)?;
        let stored = agent.alerts(&["--history"])?;
        ensure!(
            stored.iter().any(|a| a.kind == AlertKind::StorageFailed),
            "its end is in the store: {stored:?}"
        );
        ensure!(agent.cli(&["audit"])?.out().contains("enforcement off"), "lines waited for room");
        zombie.finish()?;
        agent.stop()?;
        for name in FILES {
            ensure!(state.join(name).is_file(), "{name}");
        }
    }
    Ok(())
}

/// What is read by a path from outside is regular and bounded; nothing waits for a writer that never comes.
#[test]
fn a_fifo_holds_up_nobody() -> Result<()> {
    let fixture = fixture!("a_fifo_holds_up_nobody");
    let fifo = fixture.path("fifo");
    mkfifo(&fifo)?;
    let path = fifo.to_string_lossy();
    for args in [&["check", "--config", &path][..], &["agent", "--config", &path], &["replay", &path]] {
        let out = jobwarden(&fixture, args, &[])?;
        ensure!(out.code() == Some(1) && out.err().contains("FIFO"), "{args:?}: {out:?}");
        ensure!(out.err().contains(&*path), "{args:?}: {out:?}");
    }
    let config = fixture.path("secret.toml");
    let receiver = "[[receiver]]\nname = \"r\"\ntype = \"pagerduty\"\nrouting_key_file = ";
    std::fs::write(&config, format!("{receiver}\"{path}\"\n"))?;
    let out = jobwarden(&fixture, &["check", "--config", &config.to_string_lossy()], &[])?;
    ensure!(out.code() == Some(0) && out.out().contains("FIFO"), "{out:?}");
    // A recording overwrites nothing, and is not written through a link.
    let link = fixture.path("link");
    symlink(fixture.path("made"), &link)?;
    for record in [&fifo, &link] {
        let socket = fixture.path("s").to_string_lossy().into_owned();
        let state = fixture.path("state").to_string_lossy().into_owned();
        let record = record.to_string_lossy();
        let args = ["--socket", &socket, "agent", "--no-pin", "--state-dir", &state, "--record", &record];
        let out = jobwarden(&fixture, &args, &[])?;
        ensure!(out.code() == Some(1) && out.err().contains("exists"), "{out:?}");
    }
    ensure!(!fixture.path("made").exists());
    // In the place of a running agent's config.
    let agent = Agent::start(&fixture, "")?;
    std::fs::remove_file(&agent.config)?;
    mkfifo(&agent.config)?;
    let out = agent.cli(&["reload"])?;
    ensure!(out.code() == Some(1) && out.err().contains("FIFO"), "{out:?}");
    ensure!(agent.cli(&["status"])?.code() == Some(0));
    agent.stop()
}

#[test]
fn an_unknown_variable_is_a_warning() -> Result<()> {
    let fixture = fixture!("an_unknown_variable_is_a_warning");
    let config = fixture.path("c.toml");
    std::fs::write(&config, "")?;
    let args = ["check", "--config", &config.to_string_lossy()];
    let env = [("JOBWARDEN_NOPE", "1"), ("JOBWARDEN_SOKET", "/x")];
    let out = jobwarden(&fixture, &args, &env)?;
    ensure!(out.code() == Some(0), "{out:?}");
    for word in ["JOBWARDEN_NOPE", "JOBWARDEN_SOKET", "JOBWARDEN_SOCKET"] {
        ensure!(out.out().contains(word), "{out:?}");
    }
    let agent = Agent::with(&fixture, &Options { env: &env, ..Options::default() })?;
    ensure!(agent.log_tail().contains("JOBWARDEN_NOPE"), "{}", agent.log_tail());
    agent.stop()
}
