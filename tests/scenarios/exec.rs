//! `exec`: CMD as a job from its first instruction; at its deadline or its end nothing of it stays.

use std::os::unix::process::ExitStatusExt as _;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use jobwarden_tests::agent::{Output, run};
use jobwarden_tests::ground::program;
use jobwarden_tests::{Agent, Ground, eventually, ground, ms};
use serde_json::Value;

/// `exec` with an agent (its socket) or without one.
struct Exec<'a> {
    ground: &'a Ground,
    socket: String,
}

impl Exec<'_> {
    fn command(&self, args: &[&str]) -> Result<std::process::Command> {
        let mut c = self.ground.command(program("jobwarden")?);
        c.args(["--socket", &self.socket, "exec"]).args(args);
        Ok(c)
    }
    fn run(&self, args: &[&str]) -> Result<Output> {
        run(self.command(args)?, ms(20_000)).with_context(|| format!("exec {args:?}"))
    }
    fn sh(&self, options: &[&str], script: &str) -> Result<Output> {
        let mut args = options.to_vec();
        args.extend(["--", "/bin/sh", "-c", script]);
        self.run(&args)
    }
}

/// Runs the test twice: with an agent, and alone.
fn both(ground: &Ground, test: impl Fn(&Exec<'_>) -> Result<()>) -> Result<()> {
    let alone = Exec { ground, socket: ground.path("nobody").to_string_lossy().into_owned() };
    test(&alone).context("without an agent")?;
    let agent = Agent::start(ground, "")?;
    let with = Exec { ground, socket: agent.socket.to_string_lossy().into_owned() };
    test(&with).context("with an agent")
}

/// Live processes of the test, but for an agent and those of `exec` itself.
fn left(ground: &Ground) -> Vec<String> {
    let argv = |pid: i32| {
        let b = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&b).replace('\0', " ")
    };
    ground
        .alive()
        .into_iter()
        .map(|p| format!("{p} {}", argv(p)))
        .filter(|a| !a.contains(" agent "))
        .collect()
}

fn nothing_left(ground: &Ground) -> Result<()> {
    eventually("nothing is left", ms(500), || {
        let left = left(ground);
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
}

#[test]
fn the_deadline_ends_all_of_it() -> Result<()> {
    let ground = ground!("the_deadline_ends_all_of_it");
    let stubborn = program("shape-stubborn")?.to_string_lossy().into_owned();
    both(&ground, |exec| {
        let begun = Instant::now();
        // A command with a child and a setsid'ed grandchild, all of which ignore SIGTERM.
        let out = exec.run(&["--timeout", "2s", "--grace", "1s", "--", &stubborn, "1", &ground.tag])?;
        let took = begun.elapsed();
        ensure!(out.code() == Some(124), "{out:?}");
        ensure!(out.out().contains("ready="), "the grandchild was there: {out:?}");
        nothing_left(&ground)?;
        ensure!(took >= ms(2900) && took < ms(4500), "{took:?}");
        Ok(())
    })
}

#[test]
fn what_it_leaves_behind_is_ended() -> Result<()> {
    let ground = ground!("what_it_leaves_behind_is_ended");
    let stubborn = program("shape-stubborn")?.to_string_lossy().into_owned();
    both(&ground, |exec| {
        // It exits 0 at once and leaves two generations that ignore SIGTERM.
        let out = exec.run(&["--grace", "300ms", "--", &stubborn, "3", "quit", &ground.tag])?;
        ensure!(out.code() == Some(0), "leftovers do not change the status: {out:?}");
        nothing_left(&ground)
    })
}

#[test]
fn exit_statuses() -> Result<()> {
    let ground = ground!("exit_statuses");
    both(&ground, |exec| {
        for code in [0, 1, 42, 124, 255] {
            let out = exec.sh(&[], &format!("exit {code}"))?;
            ensure!(out.code() == Some(code), "{code}: {out:?}");
        }
        let killed = exec.sh(&[], "kill -USR1 $$")?;
        ensure!(killed.status.signal() == Some(libc::SIGUSR1), "{killed:?}");
        let aborted = exec.sh(&[], "kill -ABRT $$")?;
        ensure!(aborted.status.signal() == Some(libc::SIGABRT), "{aborted:?}");
        ensure!(!aborted.status.core_dumped(), "without a core: {aborted:?}");
        let late = exec.sh(&["--timeout", "300ms", "--grace", "200ms"], "sleep 60")?;
        ensure!(late.code() == Some(124), "{late:?}");
        let kept = exec.sh(
            &["--timeout", "300ms", "--grace", "1s", "--preserve-status"],
            "trap 'exit 9' TERM; sleep 60 & wait",
        )?;
        ensure!(kept.code() == Some(9), "CMD's own: {kept:?}");
        let hup = exec.sh(
            &["--timeout", "300ms", "-s", "HUP", "--preserve-status"],
            "trap 'exit 7' HUP; sleep 60 & wait",
        )?;
        ensure!(hup.code() == Some(7), "the signal asked for: {hup:?}");
        Ok(())
    })
}

#[test]
fn output_and_input_are_the_commands() -> Result<()> {
    let ground = ground!("output_and_input_are_the_commands");
    both(&ground, |exec| {
        let out = exec.sh(&[], "echo out; echo err >&2; cat")?;
        ensure!(out.out() == "out\n" && out.err() == "err\n", "{out:?}");
        Ok(())
    })
}

#[test]
fn signals_are_passed_on() -> Result<()> {
    let ground = ground!("signals_are_passed_on");
    both(&ground, |exec| {
        let begun = ground.path("begun");
        let _ = std::fs::remove_file(&begun);
        let script = format!("trap 'exit 33' TERM; touch {}; while :; do sleep 0.05; done", begun.display());
        let mut c = exec.command(&["--", "/bin/sh", "-c", &script])?;
        let mut child = c.spawn()?;
        eventually("the command runs", ms(5000), || Ok(std::fs::metadata(&begun).map(|_| ())?))?;
        ground.signal(child.id().cast_signed(), rustix::process::Signal::TERM)?;
        let status = eventually("the end", ms(5000), || child.try_wait()?.context("it runs"))?;
        ensure!(status.code() == Some(33), "{status:?}");
        nothing_left(&ground)
    })
}

#[test]
fn killed_itself_the_job_ends_too() -> Result<()> {
    let ground = ground!("killed_itself_the_job_ends_too");
    let stubborn = program("shape-stubborn")?.to_string_lossy().into_owned();
    both(&ground, |exec| {
        let mut c = exec.command(&["--", &stubborn, "2", &ground.tag])?;
        let mut child = c.stdout(std::process::Stdio::piped()).spawn()?;
        let mut out = std::io::BufReader::new(child.stdout.take().context("no stdout")?);
        let mut line = String::new();
        while !line.contains("family=") {
            line.clear();
            ensure!(std::io::BufRead::read_line(&mut out, &mut line)? > 0, "it ended");
        }
        ground.signal(child.id().cast_signed(), rustix::process::Signal::KILL)?;
        child.wait()?;
        eventually("the job ends too", ms(5000), || {
            let left = left(&ground);
            ensure!(left.is_empty(), "{left:?}");
            Ok(())
        })
    })
}

#[test]
fn a_job_of_the_agent_from_its_first_instruction() -> Result<()> {
    let ground = ground!("a_job_of_the_agent_from_its_first_instruction");
    let agent = Agent::start(&ground, "")?;
    let report = ground.path("report.json");
    let stubborn = program("shape-stubborn")?.to_string_lossy().into_owned();
    let mut c = agent.command(&[
        "exec",
        "--name",
        "nightly",
        "--timeout",
        "1500ms",
        "--grace",
        "200ms",
        "--report",
    ])?;
    c.arg(&report).args(["--", &stubborn, "2", &ground.tag]);
    let mut child = c.stdout(std::process::Stdio::null()).spawn()?;
    let job = eventually("the job", ms(1200), || {
        agent.jobs()?.into_iter().find(|j| j.name == "nightly" && j.processes == 5).context("not yet")
    })?;
    assert_eq!(job.id.ordinal, 0, "0 = exec");
    let status = eventually("the end", ms(5000), || child.try_wait()?.context("it runs"))?;
    assert_eq!(status.code(), Some(124));
    nothing_left(&ground)?;
    let _: Value = serde_json::from_slice(&std::fs::read(&report)?)?;
    eventually("no job stays", ms(2000), || {
        let jobs = agent.jobs()?;
        ensure!(!jobs.iter().any(|j| j.id == job.id && j.processes > 0), "{jobs:?}");
        Ok(())
    })
}

#[test]
fn leftovers_are_kept_where_asked() -> Result<()> {
    let ground = ground!("leftovers_are_kept_where_asked");
    let stubborn = program("shape-stubborn")?.to_string_lossy().into_owned();
    let agent = Agent::start(&ground, "")?;
    let mut c = agent.command(&["exec", "--keep-orphans", "--", &stubborn, "1", "quit", &ground.tag])?;
    // What stays behind holds the pipes, so the output goes to nobody.
    let status = c.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null()).status()?;
    assert_eq!(status.code(), Some(0));
    let kept = left(&ground);
    assert_eq!(kept.len(), 2, "child and grandchild: {kept:?}");
    for pid in ground.alive() {
        if u32::try_from(pid)? != agent.pid() {
            ground.signal(pid, rustix::process::Signal::KILL)?;
        }
    }
    Ok(())
}
