//! `exec`: CMD as a job from its first instruction; at its deadline or its end nothing of it stays.

use std::os::unix::process::ExitStatusExt as _;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use jobwarden_tests::agent::{Output, run};
use jobwarden_tests::exec::{Exec, both, left, nothing_left};
use jobwarden_tests::fixture::program;
use jobwarden_tests::{Agent, eventually, fixture, ms, skip};
use serde_json::Value;

#[test]
fn the_deadline_ends_all_of_it() -> Result<()> {
    let fixture = fixture!("the_deadline_ends_all_of_it");
    let stubborn = program("shape-stubborn")?.to_string_lossy().into_owned();
    both(&fixture, |exec| {
        let begun = Instant::now();
        // A command with a child and a setsid'ed grandchild, all of which ignore SIGTERM.
        let out = exec.run(&["--timeout", "2s", "--grace", "1s", "--", &stubborn, "1", &fixture.tag])?;
        let took = begun.elapsed();
        ensure!(out.code() == Some(124), "{out:?}");
        ensure!(out.out().contains("ready="), "the grandchild was there: {out:?}");
        nothing_left(&fixture)?;
        ensure!(took >= std::time::Duration::from_millis(2900) && took < ms(8000), "{took:?}");
        Ok(())
    })
}

#[test]
fn what_it_leaves_behind_is_ended() -> Result<()> {
    let fixture = fixture!("what_it_leaves_behind_is_ended");
    let stubborn = program("shape-stubborn")?.to_string_lossy().into_owned();
    both(&fixture, |exec| {
        // It exits 0 at once and leaves two generations that ignore SIGTERM.
        let out = exec.run(&["--grace", "300ms", "--", &stubborn, "3", "quit", &fixture.tag])?;
        ensure!(out.code() == Some(0), "leftovers do not change the status: {out:?}");
        nothing_left(&fixture)
    })
}

#[test]
fn exit_statuses() -> Result<()> {
    let fixture = fixture!("exit_statuses");
    both(&fixture, |exec| {
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
    let fixture = fixture!("output_and_input_are_the_commands");
    both(&fixture, |exec| {
        let out = exec.sh(&[], "echo out; echo err >&2; cat")?;
        ensure!(out.out() == "out\n" && out.err() == "err\n", "{out:?}");
        Ok(())
    })
}

#[test]
fn signals_are_passed_on() -> Result<()> {
    let fixture = fixture!("signals_are_passed_on");
    both(&fixture, |exec| {
        let begun = fixture.path("begun");
        let _ = std::fs::remove_file(&begun);
        let script = format!("trap 'exit 33' TERM; touch {}; while :; do sleep 0.05; done", begun.display());
        let mut c = exec.command(&["--", "/bin/sh", "-c", &script])?;
        let mut child = c.spawn()?;
        eventually("the command runs", ms(5000), || Ok(std::fs::metadata(&begun).map(|_| ())?))?;
        fixture.signal(child.id().cast_signed(), rustix::process::Signal::TERM)?;
        let status = eventually("the end", ms(5000), || child.try_wait()?.context("it runs"))?;
        ensure!(status.code() == Some(33), "{status:?}");
        nothing_left(&fixture)
    })
}

#[test]
fn killed_itself_the_job_ends_too() -> Result<()> {
    let fixture = fixture!("killed_itself_the_job_ends_too");
    let stubborn = program("shape-stubborn")?.to_string_lossy().into_owned();
    both(&fixture, |exec| {
        let mut c = exec.command(&["--", &stubborn, "2", &fixture.tag])?;
        let mut child = c.stdout(std::process::Stdio::piped()).spawn()?;
        let mut out = std::io::BufReader::new(child.stdout.take().context("no stdout")?);
        let mut line = String::new();
        while !line.contains("family=") {
            line.clear();
            ensure!(std::io::BufRead::read_line(&mut out, &mut line)? > 0, "it ended");
        }
        fixture.signal(child.id().cast_signed(), rustix::process::Signal::KILL)?;
        child.wait()?;
        eventually("the job ends too", ms(5000), || {
            let left = left(&fixture);
            ensure!(left.is_empty(), "{left:?}");
            Ok(())
        })
    })
}

#[test]
fn a_job_of_the_agent_from_its_first_instruction() -> Result<()> {
    let fixture = fixture!("a_job_of_the_agent_from_its_first_instruction");
    let agent = Agent::start(&fixture, "")?;
    let report = fixture.path("report.json");
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
    c.arg(&report).args(["--", &stubborn, "2", &fixture.tag]);
    let mut child = c.stdout(std::process::Stdio::null()).spawn()?;
    let job = eventually("the job", ms(1200), || {
        agent.jobs()?.into_iter().find(|j| j.name == "nightly" && j.processes == 5).context("not yet")
    })?;
    assert_eq!(job.id.ordinal, 0, "0 = exec");
    let status = eventually("the end", ms(5000), || child.try_wait()?.context("it runs"))?;
    assert_eq!(status.code(), Some(124));
    nothing_left(&fixture)?;
    let _: Value = serde_json::from_slice(&std::fs::read(&report)?)?;
    eventually("no job stays", ms(2000), || {
        let jobs = agent.jobs()?;
        ensure!(!jobs.iter().any(|j| j.id == job.id && j.processes > 0), "{jobs:?}");
        Ok(())
    })
}

#[test]
fn leftovers_are_kept_where_asked() -> Result<()> {
    let fixture = fixture!("leftovers_are_kept_where_asked");
    let stubborn = program("shape-stubborn")?.to_string_lossy().into_owned();
    let agent = Agent::start(&fixture, "")?;
    let mut c = agent.command(&["exec", "--keep-orphans", "--", &stubborn, "1", "quit", &fixture.tag])?;
    // What stays behind holds the pipes, so the output goes to nobody.
    let status = c.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null()).status()?;
    assert_eq!(status.code(), Some(0));
    let kept = left(&fixture);
    assert_eq!(kept.len(), 2, "child and grandchild: {kept:?}");
    for pid in fixture.alive() {
        if u32::try_from(pid)? != agent.pid() {
            fixture.signal(pid, rustix::process::Signal::KILL)?;
        }
    }
    Ok(())
}

#[test]
fn as_timeout_does() -> Result<()> {
    let fixture = fixture!("as_timeout_does");
    // Where the contract says nothing else, exec gives what timeout(1) gives.
    let cases: [(&[&str], &[&str], &str); 8] = [
        (&["--timeout", "5s"], &["5"], "exit 3"),
        (&["--timeout", "300ms"], &["0.3"], "sleep 60"),
        (&["--timeout", "300ms", "-s", "USR1"], &["-s", "USR1", "0.3"], "sleep 60"),
        (&["--timeout", "300ms", "--preserve-status"], &["--preserve-status", "0.3"], "sleep 60"),
        (
            &["--timeout", "300ms", "--preserve-status"],
            &["--preserve-status", "0.3"],
            "trap 'exit 6' TERM; sleep 60 & wait",
        ),
        (
            &["--timeout", "300ms", "--grace", "5s"],
            &["-k", "5", "0.3"],
            "trap 'exit 6' TERM; sleep 60 & wait",
        ),
        (&["--timeout", "5s"], &["5"], "no-such-command-at-all"),
        (&["--timeout", "5s"], &["5"], "kill -KILL $$"),
    ];
    let exec = Exec::alone(&fixture);
    for (ours, theirs, script) in cases {
        let mut c = fixture.command("timeout");
        c.args(theirs).args(["/bin/sh", "-c", script]);
        let reference = run(c, ms(10_000))?;
        let got = exec.sh(ours, script)?;
        // As a shell sees it.
        let seen = |o: &Output| o.code().or(o.status.signal().map(|s| 128 + s));
        ensure!(seen(&got) == seen(&reference), "{ours:?} {script}: {got:?}; timeout(1): {reference:?}");
    }
    Ok(())
}

#[test]
fn as_another_user() -> Result<()> {
    let fixture = fixture!("as_another_user");
    both(&fixture, |exec| {
        let out = exec.run(&["--user", "nobody", "--", "/usr/bin/id", "-u"])?;
        ensure!(out.code() == Some(0) && out.out() == "65534\n", "{out:?}");
        let out = exec.run(&["--user", "nobody-of-that-name", "--", "/bin/true"])?;
        ensure!(out.code() == Some(125), "{out:?}");
        Ok(())
    })
}

#[test]
fn exec_inside_exec() -> Result<()> {
    let fixture = fixture!("exec_inside_exec");
    let own = program("jobwarden")?.to_string_lossy().into_owned();
    let stubborn = program("shape-stubborn")?.to_string_lossy().into_owned();
    both(&fixture, |exec| {
        let inner = [own.as_str(), "--socket", &exec.socket, "exec", "--grace", "200ms"];
        let run = |outer: &[&str], more: &[&str]| {
            let mut args = outer.to_vec();
            args.push("--");
            args.extend(inner);
            args.extend(more);
            exec.run(&args)
        };
        // The inner deadline is the inner command's status, and the outer one's.
        let out = run(&[], &["--timeout", "300ms", "--", &stubborn, "1", &fixture.tag])?;
        ensure!(out.code() == Some(124), "{out:?}");
        nothing_left(&fixture)?;
        // The outer deadline takes the inner job with it.
        let out = run(&["--timeout", "600ms", "--grace", "300ms"], &["--", &stubborn, "1", &fixture.tag])?;
        ensure!(out.code() == Some(124), "{out:?}");
        nothing_left(&fixture)
    })
}

#[test]
fn what_it_leaves_behind_may_end_by_itself() -> Result<()> {
    let fixture = fixture!("what_it_leaves_behind_may_end_by_itself");
    both(&fixture, |exec| {
        let done = fixture.path("done");
        let script = |s| format!("(sleep {s}; touch {}) >/dev/null 2>&1 & exit 3", done.display());
        // By default it is ended at once.
        let out = exec.sh(&[], &script(20.0))?;
        ensure!(out.code() == Some(3) && !done.exists(), "{out:?}");
        nothing_left(&fixture)?;
        // Given its time it ends by itself, and nobody waits longer than that.
        let begun = Instant::now();
        let out = exec.sh(&["--orphan-after", "60s"], &script(0.6))?;
        ensure!(out.code() == Some(3) && done.exists(), "{out:?}");
        let least = std::time::Duration::from_millis(500);
        ensure!(begun.elapsed() >= least && begun.elapsed() < ms(15_000), "{:?}", begun.elapsed());
        std::fs::remove_file(&done)?;
        // The time is over before.
        let out = exec.sh(&["--orphan-after", "100ms"], &script(20.0))?;
        ensure!(out.code() == Some(3) && !done.exists(), "{out:?}");
        nothing_left(&fixture)
    })
}

#[test]
fn the_report_says_how_it_ended() -> Result<()> {
    let fixture = fixture!("the_report_says_how_it_ended");
    let path = fixture.path("report.json").to_string_lossy().into_owned();
    let stubborn = program("shape-stubborn")?.to_string_lossy().into_owned();
    both(&fixture, |exec| {
        let read = || -> Result<Value> { Ok(serde_json::from_slice(&std::fs::read(&path)?)?) };
        exec.sh(&["--name", "short", "--report", &path], "exit 7")?;
        let r = read()?;
        ensure!(r["name"] == "short" && r["timed_out"] == false, "{r}");
        ensure!(r["exit"] == serde_json::json!({ "code": 7 }) && r["exit_status"] == 7, "{r}");
        ensure!(r["command"] == serde_json::json!(["/bin/sh", "-c", "exit 7"]), "{r}");
        ensure!(r["pid"].as_u64() > Some(1) && r["took_s"].as_f64() > Some(0.0), "{r}");
        ensure!(r["started"].as_str().is_some_and(|t| t.ends_with('Z')), "{r}");
        let late = ["--timeout", "500ms", "--grace", "200ms", "--report", &path];
        exec.run(&[&late[..], &["--", &stubborn, "1", &fixture.tag]].concat())?;
        let r = read()?;
        ensure!(r["timed_out"] == true && r["exit_status"] == 124, "{r}");
        ensure!(r["exit"]["signal"] == "SIGKILL", "{r}");
        let signalled = r["kill"]["signalled"].as_array().context("no list")?;
        let with = |signal: &str, outcome: &str| {
            signalled.iter().filter(|s| s["signal"] == signal && s["outcome"] == outcome).count()
        };
        ensure!(with("SIGTERM", "survived") == 3 && with("SIGKILL", "ended") == 3, "{r}");
        ensure!(r["kill"]["survivors"] == serde_json::json!([]), "{r}");
        // A path that cannot be written stops it before CMD runs.
        let out = exec.sh(&["--report", "/nowhere/at/all"], "echo ran")?;
        ensure!(out.code() == Some(125) && out.out().is_empty(), "{out:?}");
        Ok(())
    })
}

#[test]
fn a_job_that_owns_its_cgroup() -> Result<()> {
    let fixture = fixture!("a_job_that_owns_its_cgroup");
    let proc = jobwarden::sources::proc::Proc::default();
    let Some(own) = jobwarden::enforce::cgroup::of(&proc, std::process::id()).filter(|d| d.exists()) else {
        skip!("a_job_that_owns_its_cgroup: no v2 cgroup here");
    };
    let ours = || -> Result<Vec<String>> {
        let names = std::fs::read_dir(&own)?.filter_map(|e| e.ok()?.file_name().into_string().ok());
        Ok(names.filter(|n| n.starts_with("jobwarden-exec-")).collect())
    };
    let before = ours()?;
    both(&fixture, |exec| {
        let script = "cat /proc/self/cgroup; trap '' TERM; sleep 60 & setsid sleep 60 & wait; wait";
        let out = exec.sh(&["--cgroup", "--timeout", "700ms", "--grace", "200ms"], script)?;
        ensure!(out.code() == Some(124), "{out:?}");
        ensure!(out.out().lines().any(|l| l.starts_with("0::") && l.contains("jobwarden-exec-")), "{out:?}");
        nothing_left(&fixture)?;
        let left: Vec<String> = ours()?.into_iter().filter(|n| !before.contains(n)).collect();
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
}
