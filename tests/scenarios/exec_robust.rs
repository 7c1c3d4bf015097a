//! `exec` when something around it fails: its stderr, its own process, the agent, or what it needs from the system. The
//! deadline holds all the same, and nothing of the job stays.

use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use jobwarden_tests::agent::{Output, run};
use jobwarden_tests::exec::{Exec, both, left, nothing_left};
use jobwarden_tests::fixture::program;
use jobwarden_tests::limit::Limit;
use jobwarden_tests::{Agent, Fixture, eventually, fixture, ms, skip};
use rustix::process::{Resource, Rlimit, Signal, setrlimit};
use rustix::thread::{CapabilitySet, remove_capability_from_bounding_set};

/// Waits for its end.
fn ended(child: &mut Child, within: Duration) -> Result<ExitStatus> {
    let status = eventually("the end of exec", within, || child.try_wait()?.context("it runs"));
    if status.is_err() {
        child.kill()?;
        child.wait()?;
    }
    status
}

fn quiet(c: &mut Command) -> &mut Command {
    c.stdin(Stdio::null()).stdout(Stdio::null())
}

/// Waits until nothing of the job is left, `exec` itself and its watcher aside.
fn job_ends(fixture: &Fixture, within: Duration) -> Result<()> {
    eventually("the job's end", within, || {
        let left: Vec<String> = left(fixture).into_iter().filter(|p| !p.contains(" exec ")).collect();
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
}

/// A pipe that takes no more bytes, and its end for reading.
fn full_pipe() -> Result<(OwnedFd, OwnedFd)> {
    use rustix::fs::{OFlags, fcntl_setfl};
    let (reader, writer) = rustix::pipe::pipe()?;
    fcntl_setfl(&writer, OFlags::NONBLOCK)?;
    while rustix::io::write(&writer, &[b'x'; 4096]).is_ok() {}
    while rustix::io::write(&writer, b"x").is_ok() {}
    fcntl_setfl(&writer, OFlags::empty())?;
    Ok((reader, writer))
}

#[test]
fn whatever_stderr_does() -> Result<()> {
    let fixture = fixture!("whatever_stderr_does");
    let stubborn = program("shape-stubborn")?.to_string_lossy().into_owned();
    both(&fixture, |exec| {
        let (stopped_reader, full) = full_pipe()?;
        let (gone, broken) = rustix::pipe::pipe()?;
        drop(gone);
        let sinks = [
            ("a full disk", Stdio::from(std::fs::File::options().write(true).open("/dev/full")?)),
            ("a reader that is gone", Stdio::from(broken)),
            ("a reader that has stopped", Stdio::from(full)),
        ];
        for (name, sink) in sinks {
            let args = ["-v", "--timeout", "1s", "--grace", "300ms", "--", &stubborn, "1", &fixture.tag];
            let begun = Instant::now();
            let mut child = quiet(&mut exec.command(&args)?).stderr(sink).spawn()?;
            let status = ended(&mut child, ms(10_000)).context(name)?;
            ensure!(status.code() == Some(124), "{name}: {status:?}");
            nothing_left(&fixture).context(name)?;
            ensure!(begun.elapsed() < ms(6000), "{name}: {:?}", begun.elapsed());
        }
        drop(stopped_reader);
        Ok(())
    })
}

#[test]
fn however_the_supervisor_ends_the_job_ends() -> Result<()> {
    let fixture = fixture!("however_the_supervisor_ends_the_job_ends");
    let stubborn = program("shape-stubborn")?.to_string_lossy().into_owned();
    both(&fixture, |exec| {
        // Not SEGV: the Rust runtime takes the first one that comes from outside for a false alarm.
        for signal in [Signal::ABORT, Signal::SYS, Signal::KILL] {
            let mut c = exec.command(&["--", &stubborn, "2", &fixture.tag])?;
            let mut child = c.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
            let mut out = std::io::BufReader::new(child.stdout.take().context("no stdout")?);
            let mut line = String::new();
            while !line.contains("family=") {
                line.clear();
                ensure!(std::io::BufRead::read_line(&mut out, &mut line)? > 0, "it ended");
            }
            fixture.signal(child.id().cast_signed(), signal)?;
            child.wait()?;
            eventually("the job ends too", ms(5000), || {
                let left = left(&fixture);
                ensure!(left.is_empty(), "{signal:?}: {left:?}");
                Ok(())
            })?;
        }
        Ok(())
    })
}

/// `exec` may fail anywhere on its way for want of a descriptor; it ends the job, or never starts it.
#[test]
fn with_few_open_files() -> Result<()> {
    let fixture = fixture!("with_few_open_files");
    both(&fixture, |exec| {
        for files in [6, 10, 14, 18, 22, 26, 32, 40, 64] {
            for may_raise in [true, false] {
                let mut c = exec.command(&[
                    "--timeout",
                    "1s",
                    "--grace",
                    "100ms",
                    "--",
                    "/bin/sh",
                    "-c",
                    "sleep 60 & sleep 60",
                ])?;
                // SAFETY: system calls only.
                unsafe {
                    c.pre_exec(move || {
                        if !may_raise {
                            remove_capability_from_bounding_set(CapabilitySet::SYS_RESOURCE)?;
                        }
                        let limit = Rlimit { current: Some(files), maximum: Some(files) };
                        Ok(setrlimit(Resource::Nofile, limit)?)
                    });
                }
                let out = run(c, ms(20_000))?;
                ensure!(matches!(out.code(), Some(124 | 125)), "{files} files, {may_raise}: {out:?}");
                nothing_left(&fixture).with_context(|| format!("{files} files, {may_raise}: {out:?}"))?;
            }
        }
        Ok(())
    })
}

/// 125 with the reason; never a panic, and no process stays.
fn started_or_said_why(what: &str, out: &Output) -> Result<()> {
    ensure!(!out.err().contains("panic"), "{what}: {out:?}");
    let ok = out.code() == Some(0) || out.code() == Some(125) && out.err().contains("was not started");
    ensure!(ok, "{what}: {out:?}");
    Ok(())
}

#[test]
fn no_thread_or_process_can_be_made() -> Result<()> {
    let fixture = fixture!("no_thread_or_process_can_be_made");
    both(&fixture, |exec| {
        let mut statuses = Vec::new();
        for max in 1..=8 {
            let Some(limit) = Limit::new(&fixture, max) else {
                skip!("no_thread_or_process_can_be_made: no pids controller");
            };
            let mut c = exec.command(&["--", "/bin/true"])?;
            limit.holds(&mut c);
            let out = run(c, ms(20_000))?;
            started_or_said_why(&format!("{max} processes"), &out)?;
            limit.empty()?;
            statuses.push(out.code());
        }
        ensure!(statuses[0] == Some(125) && statuses[7] == Some(0), "{statuses:?}");
        Ok(())
    })
}

#[test]
fn commands_and_the_agent_without_threads() -> Result<()> {
    let fixture = fixture!("commands_and_the_agent_without_threads");
    let agent = Agent::start(&fixture, "")?;
    let Some(limit) = Limit::new(&fixture, 1) else {
        skip!("commands_and_the_agent_without_threads: no pids controller");
    };
    for args in [&["status"][..], &["tree"], &["why"], &["jobs"], &["doctor"], &["check"]] {
        let mut c = agent.command(args)?;
        limit.holds(&mut c);
        let out = run(c, ms(30_000))?;
        ensure!(matches!(out.code(), Some(0 | 1)) && !out.err().contains("panic"), "{args:?}: {out:?}");
    }
    limit.empty()?;
    drop(limit);
    for max in 1..=6 {
        let limit = Limit::new(&fixture, max).context("no pids controller")?;
        let state = fixture.path("state-without-threads");
        let mut c = fixture.command(program("jobwarden")?);
        c.arg("--socket").arg(fixture.path("socket-without-threads"));
        c.args(["agent", "--no-pin", "--listen", "127.0.0.1:0", "--state-dir"]).arg(&state);
        limit.holds(&mut c);
        let out = run(c, ms(30_000))?;
        ensure!(out.code() == Some(1) && !out.err().contains("panic"), "{max}: {out:?}");
        ensure!(out.err().contains("thread"), "{max}: the reason is named: {out:?}");
        limit.empty()?;
    }
    Ok(())
}

#[test]
fn a_member_that_stops_exec() -> Result<()> {
    let fixture = fixture!("a_member_that_stops_exec");
    let cases = [
        ("before the deadline", "kill -STOP $PPID; exec sleep 60"),
        ("within the grace", "trap 'kill -STOP $PPID' TERM; while :; do sleep 0.1; done"),
        ("for good", "while kill -STOP $PPID; do sleep 0.05; done"),
    ];
    both(&fixture, |exec| {
        for (when, script) in cases {
            let args = ["--timeout", "1s", "--grace", "300ms", "--", "/bin/sh", "-c", script];
            let mut child = quiet(&mut exec.command(&args)?).spawn()?;
            let proc = jobwarden::sources::proc::Proc::default();
            eventually("exec is stopped", ms(5000), || {
                ensure!(proc.stat(child.id())?.state == b'T');
                Ok(())
            })
            .context(when)?;
            // A second for the probes, the deadline, a second, the grace, two seconds.
            job_ends(&fixture, ms(7500)).context(when)?;
            // With an agent it stays stopped.
            let _ = fixture.signal(child.id().cast_signed(), Signal::CONT);
            let status = ended(&mut child, ms(5000)).context(when)?;
            ensure!(status.code() == Some(124), "{when}: the deadline has passed: {status:?}");
            nothing_left(&fixture)?;
        }
        Ok(())
    })
}

/// An agent that is stopped; it goes on when this is dropped, so that it can be ended.
struct Hung<'a>(&'a Agent<'a>);

impl<'a> Hung<'a> {
    fn new(agent: &'a Agent<'a>) -> Result<Self> {
        agent.signal(Signal::STOP)?;
        Ok(Self(agent))
    }
}

impl Drop for Hung<'_> {
    fn drop(&mut self) {
        let _ = self.0.signal(Signal::CONT);
    }
}

#[test]
fn a_hung_agent_delays_a_command_by_a_second() -> Result<()> {
    let fixture = fixture!("a_hung_agent_delays_a_command_by_a_second");
    let agent = Agent::start(&fixture, "")?;
    let exec = Exec::with(&fixture, &agent);
    let stubborn = program("shape-stubborn")?.to_string_lossy().into_owned();
    let hung = Hung::new(&agent)?;
    let ran = fixture.path("ran");
    let begun = Instant::now();
    let out = exec.run(&["--timeout", "5s", "--", "/usr/bin/touch", &ran.to_string_lossy()])?;
    ensure!(out.code() == Some(0) && ran.exists() && begun.elapsed() < ms(5000), "{out:?}");
    ensure!(out.err().contains("does not answer") && out.err().contains("without it"), "{out:?}");
    let out = exec.run(&["--timeout", "1s", "--grace", "200ms", "--", &stubborn, "2", &fixture.tag])?;
    ensure!(out.code() == Some(124), "{out:?}");
    nothing_left(&fixture)?;
    // At each moment of its life: while it waits for the agent, while it loads probes, while the command runs.
    for after in [100, 500, 1100, 3000] {
        let mut child =
            quiet(&mut exec.command(&["--", "/bin/sleep", "60"])?).stderr(Stdio::null()).spawn()?;
        std::thread::sleep(ms(after));
        fixture.signal(child.id().cast_signed(), Signal::TERM)?;
        let status = ended(&mut child, ms(5000)).with_context(|| format!("TERM after {after} ms"))?;
        ensure!(status.signal() == Some(libc::SIGTERM), "after {after} ms: {status:?}");
        nothing_left(&fixture)?;
    }
    // What it was asked meanwhile is stale when it goes on: it takes no job of them, and ends nothing that was kept.
    let out = exec.sh(&["--keep-orphans"], "sleep 61 >/dev/null 2>&1 & exit 0")?;
    ensure!(out.code() == Some(0), "{out:?}");
    drop(hung);
    agent.json::<serde_json::Value>(&["status"])?;
    std::thread::sleep(ms(1500));
    let jobs = agent.jobs()?;
    ensure!(jobs.is_empty(), "{jobs:?}");
    let kept = left(&fixture);
    ensure!(kept.len() == 1 && kept[0].contains("sleep 61"), "{kept:?}");
    for pid in fixture.alive() {
        if u32::try_from(pid)? != agent.pid() {
            fixture.signal(pid, Signal::KILL)?;
        }
    }
    Ok(())
}

#[test]
fn an_agent_that_hangs_later_does_not_move_the_deadline() -> Result<()> {
    let fixture = fixture!("an_agent_that_hangs_later_does_not_move_the_deadline");
    let agent = Agent::start(&fixture, "")?;
    let exec = Exec::with(&fixture, &agent);
    let stubborn = program("shape-stubborn")?.to_string_lossy().into_owned();
    let args = ["--name", "later", "--timeout", "3s", "--grace", "200ms", "--", &stubborn, "1", &fixture.tag];
    let mut child = quiet(&mut exec.command(&args)?).spawn()?;
    eventually("the job", ms(2500), || {
        agent.jobs()?.into_iter().find(|j| j.name == "later").context("not yet")
    })?;
    let hung = Hung::new(&agent)?;
    let begun = Instant::now();
    // A signal that the agent should pass on is not lost either, and does not delay the deadline: it is ignored here.
    fixture.signal(child.id().cast_signed(), Signal::TERM)?;
    let status = ended(&mut child, ms(12_000))?;
    ensure!(status.code() == Some(124), "{status:?}");
    ensure!(begun.elapsed() < ms(9000), "{:?}", begun.elapsed());
    nothing_left(&fixture)?;
    drop(hung);
    Ok(())
}

#[test]
fn commands_say_that_the_agent_hangs() -> Result<()> {
    let fixture = fixture!("commands_say_that_the_agent_hangs");
    let agent = Agent::start(&fixture, "")?;
    let hung = Hung::new(&agent)?;
    let commands: [&[&str]; 6] =
        [&["status"], &["tree"], &["events"], &["why"], &["kill", "--grace", "1h", "name:none"], &["reload"]];
    // Beside each other: each waits for some seconds.
    std::thread::scope(|s| -> Result<()> {
        let asked: Vec<_> = commands
            .iter()
            .map(|args| {
                let mut all = vec!["--json"];
                all.extend(*args);
                let c = agent.command(&all);
                s.spawn(move || run(c?, ms(30_000)))
            })
            .collect();
        for (asked, args) in asked.into_iter().zip(commands) {
            let out = asked.join().map_err(|_| anyhow::anyhow!("{args:?}"))??;
            ensure!(out.code() == Some(3), "{args:?}: {out:?}");
            ensure!(out.error()?.code == "agent-not-answering", "{args:?}: {out:?}");
        }
        Ok(())
    })?;
    drop(hung);
    Ok(())
}
