//! What is wrong is said, with what to do, and with the exit status of the contract; nothing half-started stays.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use jobwarden_tests::agent::{Output, free_port, run};
use jobwarden_tests::fixture::program;
use jobwarden_tests::{Agent, Fixture, fixture, ms};
use serde_json::Value;

fn jobwarden(fixture: &Fixture, args: &[&str]) -> Result<Output> {
    let mut c = fixture.command(program("jobwarden")?);
    c.args(args);
    run(c, ms(20_000))
}

/// `check` of this text must fail and name this line and this word.
fn refused(fixture: &Fixture, text: &str, line: u32, word: &str) -> Result<()> {
    let file = fixture.path("bad.toml");
    std::fs::write(&file, text)?;
    let file = file.to_string_lossy().into_owned();
    let out = jobwarden(fixture, &["check", "--config", &file])?;
    ensure!(out.code() == Some(1), "{text}: {out:?}");
    let said = out.err() + &out.out();
    ensure!(said.contains(&format!("bad.toml:{line}:")), "file, line and column: {said}");
    ensure!(said.contains(word), "{word}: {said}");
    if text.contains("listen") {
        // The flag below would override it.
        return Ok(());
    }
    // The agent refuses it likewise, before it has touched anything.
    let (socket, state) = (fixture.path("no-sock"), fixture.path("no-state"));
    let mut c = fixture.command(program("jobwarden")?);
    c.arg("--socket").arg(&socket).args(["agent", "--no-pin", "--config", &file, "--state-dir"]).arg(&state);
    c.args(["--listen", &format!("127.0.0.1:{}", free_port()?)]);
    let out = run(c, ms(10_000))?;
    ensure!(out.code() == Some(1), "{text}: {out:?}");
    ensure!(!socket.exists(), "nothing starts");
    Ok(())
}

#[test]
fn configs_that_are_wrong() -> Result<()> {
    let fixture = fixture!("configs_that_are_wrong");
    refused(&fixture, "[zombies]\nafterwards = \"1s\"\n", 2, "afterwards")?;
    refused(&fixture, "[zombies]\nafter = 30\n", 2, "after")?;
    refused(&fixture, "[zombies]\nafter = \"30\"\n", 2, "after")?;
    refused(&fixture, "[zombies]\nafter = \"5 bananas\"\n", 2, "bananas")?;
    refused(&fixture, "[[job]]\nname = \"a\"\nmatch = { argv = \"(\" }\n", 3, "argv")?;
    refused(&fixture, "[[job]]\nname = \"a b\"\nmatch = { argv = \"x\" }\n", 2, "name")?;
    let two =
        "[[job]]\nname = \"a\"\nmatch = { argv = \"x\" }\n[[job]]\nname = \"a\"\nmatch = { argv = \"y\" }\n";
    refused(&fixture, two, 5, "a")?;
    refused(&fixture, "[[job]]\nname = \"a\"\nmatch = {}\n", 3, "match")?;
    refused(
        &fixture,
        "[[job]]\nname = \"a\"\nmatch = { user = \"nobody-of-that-name\" }\n",
        3,
        "nobody-of-that-name",
    )?;
    refused(&fixture, "[agent]\nlisten = \"0.0.0.0:19750\"\n", 2, "allow_plain")?;
    refused(&fixture, "[[receiver]]\nname = \"r\"\ntype = \"pigeon\"\n", 3, "pigeon")?;
    refused(&fixture, "[agent\n", 1, "")?;
    Ok(())
}

#[test]
fn no_privilege() -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let fixture = fixture!("no_privilege");
    // Readable and executable for another user.
    let copy = fixture.path("jobwarden");
    std::fs::copy(program("jobwarden")?, &copy)?;
    std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o755))?;
    std::fs::set_permissions(fixture.path("."), std::fs::Permissions::from_mode(0o755))?;
    let as_nobody = |args: &[&str]| {
        let mut c = fixture.command(&copy);
        std::os::unix::process::CommandExt::uid(&mut c, 65534);
        std::os::unix::process::CommandExt::gid(&mut c, 65534);
        c.args(args);
        run(c, ms(10_000))
    };
    let state = fixture.path("nobody's");
    std::fs::create_dir(&state)?;
    std::os::unix::fs::chown(&state, Some(65534), Some(65534))?;
    let state = state.to_string_lossy();
    let out = as_nobody(&["--socket", "/tmp/jwt-none", "agent", "--no-pin", "--state-dir", &state])?;
    ensure!(out.code() == Some(1), "{out:?}");
    ensure!(
        out.err().contains("root") || out.err().contains("CAP_"),
        "it says what is missing: {}",
        out.err()
    );
    let out = as_nobody(&["exec", "--", "/bin/touch", "/tmp/jwt-must-not-be"])?;
    ensure!(out.code() == Some(125), "{out:?}");
    ensure!(!std::path::Path::new("/tmp/jwt-must-not-be").exists(), "CMD is not started");
    // A live agent's socket is root's.
    let agent = Agent::start(&fixture, "")?;
    let socket = agent.socket.to_string_lossy().into_owned();
    let out = as_nobody(&["--json", "--socket", &socket, "tree"])?;
    ensure!(out.code() == Some(3), "{out:?}");
    out.error()?;
    Ok(())
}

#[test]
fn no_agent() -> Result<()> {
    let fixture = fixture!("no_agent");
    let socket = fixture.path("nobody").to_string_lossy().into_owned();
    for command in
        [&["tree"][..], &["jobs"], &["alerts"], &["status"], &["kill", "1234567"], &["why"], &["events"]]
    {
        let mut args = vec!["--json", "--socket", &socket];
        args.extend(command);
        let out = jobwarden(&fixture, &args)?;
        ensure!(out.code() == Some(3), "{command:?}: {out:?}");
        let e = out.error()?;
        ensure!(e.message.contains(&socket), "it says where it looked: {e:?}");
        ensure!(e.hint.is_some(), "and what to do: {e:?}");
        let plain = jobwarden(&fixture, &args[1..])?;
        ensure!(plain.code() == Some(3) && plain.err().contains(&socket), "{plain:?}");
    }
    Ok(())
}

#[test]
fn socket_in_use_and_stale() -> Result<()> {
    let fixture = fixture!("socket_in_use_and_stale");
    let first = Agent::start(&fixture, "")?;
    let mut c = fixture.command(program("jobwarden")?);
    c.arg("--socket")
        .arg(&first.socket)
        .args(["agent", "--no-pin", "--state-dir"])
        .arg(fixture.path("state2"));
    c.args(["--listen", &format!("127.0.0.1:{}", free_port()?)]);
    let out = run(c, ms(10_000))?;
    ensure!(out.code() == Some(1), "{out:?}");
    ensure!(out.err().contains(&*first.socket.to_string_lossy()), "{}", out.err());
    assert_eq!(first.cli(&["status"])?.code(), Some(0), "the first one lives on");
    let socket = first.socket.clone();
    first.crash()?;
    ensure!(socket.exists(), "SIGKILL leaves a stale socket");
    let second = Agent::start(&fixture, "")?;
    assert_eq!(second.socket, socket);
    assert_eq!(second.cli(&["status"])?.code(), Some(0), "it was taken over");
    Ok(())
}

#[test]
fn port_in_use() -> Result<()> {
    let fixture = fixture!("port_in_use");
    let taken = std::net::TcpListener::bind("127.0.0.1:0")?;
    let port = taken.local_addr()?.port().to_string();
    let mut c = fixture.command(program("jobwarden")?);
    c.arg("--socket")
        .arg(fixture.path("sock"))
        .args(["agent", "--no-pin", "--state-dir"])
        .arg(fixture.path("state"));
    c.args(["--listen", &format!("127.0.0.1:{port}")]);
    let out = run(c, ms(10_000))?;
    ensure!(out.code() == Some(1), "{out:?}");
    ensure!(out.err().contains(&port), "{}", out.err());
    ensure!(!fixture.path("sock").exists(), "and its socket is gone");
    Ok(())
}

#[test]
fn no_such_process_job_or_alert() -> Result<()> {
    let fixture = fixture!("no_such_process_job_or_alert");
    let agent = Agent::start(&fixture, "")?;
    for args in [
        &["tree", "4194303"][..],
        &["tree", "4194303:1"],
        &["tree", "j-4194303:1-1"],
        &["why", "4194303"],
        &["why", "0123456789abcdef"],
        &["kill", "4194303"],
        &["kill", "name:nobody-is-called-so"],
        &["jobs", "extend", "j-4194303:1-1", "1s"],
    ] {
        let mut all = vec!["--json"];
        all.extend(args);
        let out = agent.cli(&all)?;
        ensure!(out.code() == Some(4), "{args:?}: {out:?}");
        out.error().with_context(|| format!("{args:?}"))?;
    }
    for args in
        [&["kill", "--grace", "10", "4194303"][..], &["kill", "-5"], &["kill", "one:two:three"], &["kill"]]
    {
        let out = agent.cli(args)?;
        ensure!(out.code() == Some(2), "{args:?}: {out:?}");
    }
    Ok(())
}

#[test]
fn the_agent_and_its_ancestors_are_never_signalled() -> Result<()> {
    let fixture = fixture!("the_agent_and_its_ancestors_are_never_signalled");
    let agent = Agent::start(&fixture, "")?;
    // Dry runs only: these are the ones that must be safe.
    for target in [1, agent.pid(), std::process::id()] {
        let out = agent.cli(&["--json", "kill", "--dry-run", &target.to_string()])?;
        let report: Value = out.any_json().unwrap_or_default();
        let would: Vec<u64> = report["signalled"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|s| s["outcome"] != "spared")
            .filter_map(|s| s["process"]["pid"].as_u64())
            .collect();
        for safe in [1, agent.pid(), std::process::id()] {
            ensure!(!would.contains(&u64::from(safe)), "kill {target} would signal {safe}: {out:?}");
        }
    }
    Ok(())
}

#[test]
fn a_request_that_is_nonsense() -> Result<()> {
    use std::io::{Read as _, Write as _};
    let fixture = fixture!("a_request_that_is_nonsense");
    let agent = Agent::start(&fixture, "")?;
    let huge = format!(
        "POST /v1/kill HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n{}",
        "x".repeat(1 << 16)
    );
    for bytes in [&b"\0\0\0\0\r\n\r\n"[..], b"GET\r\n\r\n", b"{}", huge.as_bytes()] {
        let mut s = std::os::unix::net::UnixStream::connect(&agent.socket)?;
        s.set_read_timeout(Some(ms(300)))?;
        s.set_write_timeout(Some(ms(2000)))?;
        let _ = s.write_all(bytes);
        let _ = s.shutdown(std::net::Shutdown::Write);
        let _ = s.read(&mut [0; 4096]);
    }
    assert_eq!(agent.cli(&["status"])?.code(), Some(0), "it goes on");
    Ok(())
}

#[test]
fn commands_for_exec_that_cannot_run() -> Result<()> {
    let fixture = fixture!("commands_for_exec_that_cannot_run");
    let script = fixture.path("not-executable");
    std::fs::write(&script, "#!/bin/sh\n")?;
    let script = script.to_string_lossy().into_owned();
    let agent = Agent::start(&fixture, "")?;
    let socket = agent.socket.to_string_lossy().into_owned();
    let nowhere = fixture.path("nowhere").to_string_lossy().into_owned();
    for socket in [&socket, &nowhere] {
        for (cmd, want) in
            [("/no/such/command", 127), ("no-such-command-anywhere", 127), (script.as_str(), 126)]
        {
            let out = jobwarden(&fixture, &["--socket", socket, "exec", "--", cmd])?;
            ensure!(out.code() == Some(want), "{cmd}: {out:?}");
            ensure!(out.err().contains(cmd), "{}", out.err());
        }
        let out = jobwarden(&fixture, &["--socket", socket, "exec"])?;
        ensure!(out.code() == Some(2) || out.code() == Some(125), "no command: {out:?}");
    }
    Ok(())
}

#[test]
fn shown_in_a_pipe_that_closes() -> Result<()> {
    let fixture = fixture!("shown_in_a_pipe_that_closes");
    let agent = Agent::start(&fixture, "")?;
    let line = format!(
        "{} --socket {} tree --all | head -n 1",
        program("jobwarden")?.display(),
        agent.socket.display()
    );
    let mut c: Command = fixture.command("/bin/sh");
    c.args(["-c", &line]);
    let out = run(c, ms(5000))?;
    ensure!(!out.err().contains("panicked"), "{}", out.err());
    Ok(())
}

/// Valid, and more than anybody can mean: named, on any host and on this one, and the exit status stays 0.
#[test]
fn rules_that_would_end_the_host_are_named() -> Result<()> {
    let fixture = fixture!("rules_that_would_end_the_host_are_named");
    // Its argv has an escape sequence, a newline and the tag.
    let evil = format!("\u{1b}]0;owned\u{7}\n{}", fixture.tag);
    let mut c = fixture.command("/bin/sh");
    c.args(["-c", "read line", &evil]).stdin(std::process::Stdio::piped());
    let mut victim = c.spawn()?;
    let me = std::env::current_exe()?;
    let file = fixture.path("dangerous.toml");
    let rule = |name: &str, matches: &str| {
        format!(
            "[[job]]\nname = \"{name}\"\nmatch = {{ {matches} }}\ntimeout = \"1h\"\non_timeout = \"kill\"\n"
        )
    };
    let text = rule("meant", &format!("argv = '(?s)read line .*{}$', comm = '^sh$'", fixture.tag))
        + &rule("own", &format!("exe = '^{}$'", me.display()))
        + &rule("agent", "argv = '^/usr/bin/jobwarden agent$'")
        + &rule("root", "user = 0")
        + &rule("all", "argv = '.*'");
    std::fs::write(&file, text)?;
    let file = file.to_string_lossy().into_owned();
    let check = |more: &[&str]| {
        let mut args = vec!["check", "--config", &file];
        args.extend(more);
        let out = jobwarden(&fixture, &args)?;
        ensure!(out.code() == Some(0), "{out:?}");
        Ok(out)
    };
    let plain = check(&[])?.out();
    for (rule, what) in [
        ("agent", "the agent as it usually runs"),
        ("root", "every process of root"),
        ("all", "every process, and on_timeout is \"kill\""),
    ] {
        ensure!(plain.contains(&format!("warning: rule {rule}: it matches {what}")), "{what}: {plain}");
    }
    ensure!(!plain.contains("rule meant") && !plain.contains("rule own"), "{plain}");
    let host = check(&["--against-host"])?.out();
    ensure!(host.contains("rule meant: matches 1 of "), "{host}");
    ensure!(!host.contains('\u{1b}') && host.contains("\\x1b]0;owned\\x07\\n"), "escaped: {host}");
    ensure!(!host.contains("warning: rule meant"), "{host}");
    ensure!(host.contains("warning: rule own: its jobs contain this command (PID "), "{host}");
    ensure!(host.contains("warning: rule root: its jobs contain PID 1"), "{host}");
    let json: Value = check(&["--json", "--against-host"])?.json()?;
    let warnings = json["warnings"].as_array().context("warnings")?;
    ensure!(warnings.len() >= 5 && warnings.iter().all(Value::is_string), "{json}");
    let meant = &json["host"]["rules"][0];
    ensure!(meant["matches"] == 1 && meant["examples"][0]["pid"] == victim.id(), "{json}");
    ensure!(meant["examples"][0]["argv"][3] == evil.as_str(), "{json}");
    drop(victim.stdin.take());
    victim.wait()?;
    Ok(())
}

/// The agent says the same when it starts and when it takes a new config. Nothing of this host has this argv.
#[test]
fn the_agent_logs_dangerous_rules() -> Result<()> {
    let fixture = fixture!("the_agent_logs_dangerous_rules");
    let rule = |name: &str| {
        format!(
            "[[job]]\nname = \"{name}\"\nmatch = {{ argv = '^/usr/bin/jobwarden agent$' }}\non_orphan = \"kill\"\n"
        )
    };
    let agent = Agent::start(&fixture, &rule("first"))?;
    let logged = |name: &str| {
        jobwarden_tests::eventually(name, ms(5000), || {
            let log = std::fs::read_to_string(&agent.log)?;
            ensure!(log.contains(&format!("rule {name}: it matches the agent as it usually runs")), "{log}");
            Ok(())
        })
    };
    logged("first")?;
    std::fs::write(&agent.config, rule("second"))?;
    ensure!(agent.cli(&["reload"])?.code() == Some(0), "{}", agent.log_tail());
    logged("second")
}
