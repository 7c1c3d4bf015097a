//! Each command as a user runs it: its JSON is the contract's, its text is for people, its exit status means what the
//! contract says.

use anyhow::{Context as _, Result, ensure};
use jobwarden::model::schema::{Cause, JobState, Jobs, KillReport, SignalledOutcome, State, Tree};
use jobwarden_tests::agent::{self, http, run};
use jobwarden_tests::{Agent, Events, Shape, eventually, fixture, ms, pause, skip};
use serde_json::Value;

#[test]
fn ready_soon_and_a_clean_stop() -> Result<()> {
    let fixture = fixture!("ready_soon_and_a_clean_stop");
    let agent = Agent::start(&fixture, "")?;
    jobwarden_tests::loudly(&format!("ready after {:.3} s", agent.ready_in.as_secs_f64()));
    // 0.5 s on a quiet machine; the tests run beside each other.
    ensure!(agent.ready_in < ms(3000), "{:?}", agent.ready_in);
    let socket = std::fs::metadata(&agent.socket)?;
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&socket.permissions()) & 0o777, 0o600);
    agent.stop()
}

#[test]
fn http_says_what_it_may_and_no_more() -> Result<()> {
    let fixture = fixture!("http_says_what_it_may_and_no_more");
    let agent = Agent::start(&fixture, "")?;
    for path in ["/", "/healthz", "/readyz", "/metrics"] {
        assert_eq!(agent.get(path)?.0, 200, "{path}");
        let (status, body) = http(agent.port, "HEAD", path, "")?;
        assert_eq!((status, body.as_str()), (200, ""), "HEAD {path}");
        assert!(
            (400..500).contains(&http(agent.port, "POST", path, "Content-Length: 0\r\n")?.0),
            "POST {path}"
        );
    }
    for path in ["/tree", "/v1/tree", "/kill", "/v1/kill", "/../etc/passwd", "/nothing"] {
        assert!((400..500).contains(&agent.get(path)?.0), "{path} is not served over TCP");
    }
    let (status, open) =
        http(agent.port, "GET", "/metrics", "Accept: application/openmetrics-text;version=1.0.0\r\n")?;
    assert_eq!(status, 200);
    assert!(open.trim_end().ends_with("# EOF"), "OpenMetrics ends with EOF");
    Ok(())
}

/// The body of one GET, unpacked if it was packed.
fn page(port: u16, headers: &str) -> Result<(String, String)> {
    use std::io::{Read as _, Write as _};
    let mut s = std::net::TcpStream::connect((std::net::Ipv4Addr::LOCALHOST, port))?;
    s.set_read_timeout(Some(ms(5000)))?;
    write!(s, "GET /metrics HTTP/1.0\r\nHost: localhost\r\n{headers}\r\n")?;
    let mut all = Vec::new();
    s.read_to_end(&mut all)?;
    let end = all.windows(4).position(|w| w == b"\r\n\r\n").context("no HTTP answer")?;
    let head = String::from_utf8_lossy(&all[..end]).to_ascii_lowercase();
    let mut body = String::new();
    if head.contains("content-encoding: gzip") {
        flate2::read::GzDecoder::new(&all[end + 4..]).read_to_string(&mut body)?;
    } else {
        body = String::from_utf8(all.split_off(end + 4))?;
    }
    Ok((head, body))
}

/// Names of families and of samples, without the numbers, which change from one scrape to the next.
fn names(page: &str) -> Vec<String> {
    let sample = |l: &str| l.rsplit_once(' ').map_or_else(|| l.to_owned(), |(name, _)| name.to_owned());
    page.lines().map(|l| if l.starts_with('#') { l.to_owned() } else { sample(l) }).collect()
}

#[test]
fn the_page_packed_and_as_openmetrics() -> Result<()> {
    let fixture = fixture!("the_page_packed_and_as_openmetrics");
    let config = format!(
        "[[job]]\nname = \"w\"\nmatch = {{ argv = \"{}\" }}\n[[receiver]]\nname = \"x\"\ntype = \"exec\"\ncommand = [\"/bin/true\"]\n",
        fixture.tag
    );
    let agent = Agent::start(&fixture, &config)?;
    let (head, plain) = page(agent.port, "")?;
    ensure!(head.contains("version=0.0.4") && !head.contains("content-encoding"), "{head}");
    let (head, packed) = page(agent.port, "Accept-Encoding: gzip\r\n")?;
    ensure!(head.contains("content-encoding: gzip"), "{head}");
    assert_eq!(names(&plain), names(&packed));
    let accept =
        "Accept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5\r\nAccept-Encoding: gzip\r\n";
    let (head, open) = page(agent.port, accept)?;
    ensure!(head.contains("application/openmetrics-text") && head.contains("gzip"), "{head}");
    ensure!(open.ends_with("# EOF\n") && open.matches("# EOF").count() == 1, "it ends once");
    // Each sample belongs to the family above it, by the suffixes that its type allows; a family comes once.
    let (mut family, mut kind, mut seen) = (String::new(), String::new(), std::collections::BTreeSet::new());
    for line in open.lines().filter(|l| *l != "# EOF") {
        if let Some(head) = line.strip_prefix("# TYPE ") {
            (family, kind) =
                head.split_once(' ').map(|(f, k)| (f.to_owned(), k.to_owned())).context("TYPE")?;
            ensure!(seen.insert(family.clone()), "{family} comes twice");
            ensure!(!family.ends_with("_total"), "a family's name has no _total in OpenMetrics: {family}");
        } else if !line.starts_with('#') {
            let name = line.split(['{', ' ']).next().unwrap_or_default();
            let suffix =
                name.strip_prefix(family.as_str()).with_context(|| format!("{name} under {family}"))?;
            let allowed: &[&str] = match kind.as_str() {
                "counter" => &["_total"],
                "histogram" => &["_bucket", "_sum", "_count"],
                _ => &[""],
            };
            ensure!(allowed.contains(&suffix), "{line} in a {kind}");
        }
    }
    ensure!(seen.len() > 40, "{seen:?}");
    let samples = |page: &str| names(page).into_iter().filter(|n| !n.starts_with('#')).collect::<Vec<_>>();
    assert_eq!(samples(&plain), samples(&open), "both have the same samples");
    agent.stop()
}

#[test]
fn metrics_are_well_formed() -> Result<()> {
    let fixture = fixture!("metrics_are_well_formed");
    let agent = Agent::start(&fixture, "")?;
    let metrics = agent.metrics()?;
    // From the start, every series that needs no label value known only later.
    for name in [
        "jobwarden_build_info",
        "process_cpu_seconds_total",
        "process_resident_memory_bytes",
        "process_start_time_seconds",
        "process_open_fds",
        "process_max_fds",
        "jobwarden_processes",
        "jobwarden_zombies",
        "jobwarden_orphans",
        "jobwarden_unreaping_parents",
        "jobwarden_oldest_zombie_age_seconds",
        "jobwarden_reap_delay_seconds_count",
        "jobwarden_event_lag_seconds_count",
        "jobwarden_probe_hits_total",
        "jobwarden_events_sent_total",
        "jobwarden_events_filtered_total",
        "jobwarden_events_lost_total",
        "jobwarden_events_total",
        "jobwarden_ring_used_bytes",
        "jobwarden_ring_size_bytes",
        "jobwarden_resyncs_total",
        "jobwarden_synced",
        "jobwarden_probe_attached",
        "jobwarden_store_entries",
        "jobwarden_store_max_entries",
        "jobwarden_store_evictions_total",
        "jobwarden_alerts",
        "jobwarden_alerts_fired_total",
        "jobwarden_signals_sent_total",
        "jobwarden_kernel_kills_total",
        "jobwarden_job_kills_total",
        "jobwarden_enforcement_enabled",
        "jobwarden_enforcement_fuse_open",
        "jobwarden_config_last_reload_successful",
        "jobwarden_config_last_reload_success_timestamp_seconds",
        "jobwarden_log_dropped_total",
    ] {
        ensure!(metrics.series(name).next().is_some(), "{name} is missing");
    }
    let (_, text) = agent.get("/metrics")?;
    let mut promtool = std::process::Command::new("promtool");
    promtool.args(["check", "metrics"]);
    promtool.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    promtool.stderr(std::process::Stdio::piped());
    let Ok(mut child) = promtool.spawn() else {
        skip!(
            "metrics_are_well_formed: no promtool (Debian's package prometheus); names and numbers were checked"
        );
    };
    std::io::Write::write_all(&mut child.stdin.take().context("stdin")?, text.as_bytes())?;
    let out = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&out.stderr).into_owned() + &String::from_utf8_lossy(&out.stdout);
    ensure!(out.status.success(), "promtool: {said}");
    Ok(())
}

#[test]
fn tree_shows_ancestors_it_and_descendants() -> Result<()> {
    let fixture = fixture!("tree_shows_ancestors_it_and_descendants");
    let agent = Agent::start(&fixture, "")?;
    let mut s = Shape::start(&fixture, "setsid", &[])?;
    let (child, grandchild): (u32, u32) = (s.fact("child")?, s.fact("grandchild")?);
    agent.process_when(grandchild, "there", |_| true)?;
    let one: Tree = agent.json(&["tree", &child.to_string()])?;
    let pids: Vec<u32> = one.processes.iter().map(|p| p.pid).collect();
    // Above the test lineage may be unknown: it is older than the agent.
    for pid in [std::process::id(), s.pid(), child, grandchild] {
        assert!(pids.contains(&pid), "{pid} in {pids:?}");
    }
    assert!(!pids.contains(&agent.pid()), "no relative of it: {pids:?}");
    let by_id: Tree = agent.json(&["tree", &agent.process(child)?.id.to_string()])?;
    assert_eq!(by_id.processes.len(), pids.len());
    let text = agent.cli(&["tree", &child.to_string()])?;
    assert_eq!(text.code(), Some(0));
    assert!(text.out().contains(&grandchild.to_string()) && !text.out().contains('\x1b'), "{}", text.out());
    let colour = agent.cli(&["--color", "always", "tree", &child.to_string()])?;
    assert!(colour.out().contains('\x1b'), "--color always");
    let mut none = agent.command(&["tree", "--color", "always", &child.to_string()])?;
    none.env("NO_COLOR", "1");
    assert_eq!(run(none, ms(5000))?.code(), Some(0));
    let user: Tree = agent.json(&["tree", "--user", "root", "--zombies"])?;
    assert!(user.processes.iter().all(|p| p.state != State::Gone || !p.children.is_empty()));
    s.finish()?;
    Ok(())
}

#[test]
fn kernel_threads_only_when_asked_for() -> Result<()> {
    let fixture = fixture!("kernel_threads_only_when_asked_for");
    let agent = Agent::start(&fixture, "")?;
    let tree: Tree = agent.json(&["tree"])?;
    if !tree.processes.iter().any(|p| p.kernel_thread) {
        skip!("kernel_threads_only_when_asked_for: this host shows no kernel threads");
    }
    let names: Vec<_> = tree.processes.iter().filter(|p| p.kernel_thread).map(|p| p.comm.clone()).collect();
    let kthreadd = names.iter().find(|n| *n == "kthreadd").context("JSON has them always")?;
    assert!(!agent.cli(&["tree"])?.out().contains(kthreadd.raw()));
    assert!(agent.cli(&["tree", "--all"])?.out().contains(kthreadd.raw()));
    Ok(())
}

#[test]
fn jobs_and_their_deadlines() -> Result<()> {
    let fixture = fixture!("jobs_and_their_deadlines");
    let config =
        format!("[[job]]\nname = \"named\"\nmatch = {{ argv = \"{}\" }}\ntimeout = \"1h\"\n", fixture.tag);
    let agent = Agent::start(&fixture, &config)?;
    let mut s = Shape::start(&fixture, "setsid", &[])?;
    s.fact::<u32>("grandchild")?;
    let job = eventually("the job", ms(3000), || {
        let jobs: Jobs = agent.json(&["jobs"])?;
        jobs.jobs.into_iter().find(|j| j.root.pid == s.pid() && j.processes == 3).context("no job yet")
    })?;
    assert_eq!((job.name.as_str(), job.state), ("named", JobState::Running));
    assert_eq!(job.id.ordinal, 1, "the position of its rule");
    let id = job.id.to_string();
    let before = job.deadline.context("no deadline")?;
    let extended = agent.cli(&["jobs", "extend", &id, "30m"])?;
    assert_eq!(extended.code(), Some(0), "{extended:?}");
    let jobs: Jobs = agent.json(&["jobs"])?;
    let after = jobs.jobs.iter().find(|j| j.id == job.id).and_then(|j| j.deadline.clone()).context("gone")?;
    assert!(after > before, "{after} is later than {before}");
    assert!(agent.cli(&["jobs"])?.out().contains(&id));
    let tree: Tree = agent.json(&["tree", &id])?;
    assert!(tree.processes.iter().filter(|p| p.job == Some(job.id)).count() >= 3);
    s.finish()?;
    let finished = eventually("its end is counted", ms(3000), || {
        let n = agent.metrics()?.sum("jobwarden_jobs_finished_total", &["job_name=\"named\"", "completed"]);
        ensure!(n > 0.0, "none finished");
        Ok(n)
    })?;
    assert!((finished - 1.0).abs() < f64::EPSILON);
    assert_eq!(agent.cli(&["--json", "jobs", "extend", "j-1:1-9", "1s"])?.code(), Some(4));
    Ok(())
}

#[test]
fn events_of_one_process_and_of_one_job() -> Result<()> {
    let fixture = fixture!("events_of_one_process_and_of_one_job");
    let agent = Agent::start(&fixture, "")?;
    let events = Events::start(&fixture, &agent)?;
    let mut s = Shape::start(&fixture, "signal", &["15"])?;
    let child: u32 = s.fact("child")?;
    let mut one = agent.command(&["events", "--json", "--since", "10m", "--pid", &child.to_string()])?;
    let mut one = one.stdout(std::process::Stdio::piped()).spawn()?;
    s.step()?;
    s.fact::<i32>("status")?;
    events.wait_within("reap", child, ms(15_000))?;
    pause(200);
    one.kill()?;
    let lines = String::from_utf8(one.wait_with_output()?.stdout)?;
    for line in lines.lines() {
        let v: Value = serde_json::from_str(line)?;
        assert_eq!(v["process"]["pid"], child, "{line}");
    }
    for kind in ["fork", "exit"] {
        assert!(lines.contains(&format!("\"kind\":\"{kind}\"")), "{kind} in {lines}");
    }
    assert_eq!(events.odd(), Vec::<String>::new(), "every line is an event");
    s.finish()?;
    Ok(())
}

#[test]
fn kill_ends_the_family_and_nobody_else() -> Result<()> {
    let fixture = fixture!("kill_ends_the_family_and_nobody_else");
    let agent = Agent::start(&fixture, "")?;
    let mut beside = Shape::start(&fixture, "setsid", &[])?;
    let beside_child: u32 = beside.fact("grandchild")?;
    let mut s = Shape::start(&fixture, "stubborn", &["20"])?;
    let grandchildren: Vec<u32> = s.facts("ready", 20)?;
    let pid = s.pid().to_string();
    agent.process_when(grandchildren[19], "there", |_| true)?;
    let dry: KillReport = agent.json(&["kill", "--dry-run", &pid])?;
    assert_eq!(dry.signalled.len(), 41, "the program, its children, theirs");
    assert!(s.ended()?.is_none(), "a dry run signals nobody");
    let done: KillReport = agent.json(&["kill", "--grace", "300ms", &pid])?;
    assert!(done.survivors.is_empty(), "{:?}", done.survivors);
    assert!(done.signalled.iter().any(|x| x.outcome == SignalledOutcome::Ended && x.signal == "SIGKILL"));
    assert!(done.took_s < ms(2500).as_secs_f64(), "{}", done.took_s);
    s.wait(ms(1000))?;
    for pid in grandchildren {
        ensure!(
            jobwarden_tests::truth::letter(pid).is_ok_and(|l| l == 'Z')
                || jobwarden_tests::truth::stat(pid).is_err(),
            "{pid} lives"
        );
    }
    assert!(
        jobwarden_tests::truth::letter(beside_child).is_ok_and(|l| l != 'Z'),
        "the family beside it is whole"
    );
    let audit = agent.cli(&["audit"])?;
    assert!(audit.out().contains("SIGKILL"), "{}", audit.out());
    // By now there is no such process.
    eventually("nobody to kill", ms(5000), || {
        let again = agent.cli(&["--json", "kill", &pid])?;
        ensure!(again.code() == Some(4), "{again:?}");
        Ok(())
    })?;
    beside.finish()?;
    Ok(())
}

#[test]
fn kill_by_a_name_that_fits_several_lists_them() -> Result<()> {
    let fixture = fixture!("kill_by_a_name_that_fits_several_lists_them");
    let config = format!("[[job]]\nname = \"pair\"\nmatch = {{ argv = \"{}\" }}\n", fixture.tag);
    let agent = Agent::start(&fixture, &config)?;
    let mut first = Shape::start(&fixture, "setsid", &[])?;
    let mut second = Shape::start(&fixture, "setsid", &[])?;
    for s in [&mut first, &mut second] {
        let pid = s.fact("grandchild")?;
        agent.process_when(pid, "in a job", |p| p.job.is_some())?;
    }
    let out = agent.cli(&["kill", "name:pair"])?;
    assert_eq!(out.code(), Some(1), "{out:?}");
    let said = out.out() + &out.err();
    for s in [&first, &second] {
        assert!(said.contains(&format!("j-{}:", s.pid())), "{said}");
    }
    assert!(first.ended()?.is_none() && second.ended()?.is_none(), "nothing is done");
    let several = agent.cli(&["--json", "kill", "name:pair"])?;
    assert_eq!((several.code(), several.error()?.matches.len()), (Some(1), 2));
    let all = agent.cli(&["--json", "kill", "--all", "--grace", "0s", "name:pair"])?;
    assert_eq!(all.code(), Some(0), "{all:?}");
    first.wait(ms(2000))?;
    second.wait(ms(2000))?;
    Ok(())
}

#[test]
fn why_of_a_process_that_is_neither() -> Result<()> {
    let fixture = fixture!("why_of_a_process_that_is_neither");
    let agent = Agent::start(&fixture, "")?;
    let mut s = Shape::start(&fixture, "setsid", &[])?;
    s.fact::<u32>("grandchild")?;
    let cause: Cause = agent.json(&["why", &s.pid().to_string()])?;
    assert_eq!(cause.verdict, jobwarden::model::schema::Verdict::NotAZombie);
    assert_eq!(agent.cli(&["why"])?.code(), Some(0));
    assert_eq!(agent.cli(&["--json", "why", "4194303"])?.code(), Some(4));
    s.finish()?;
    Ok(())
}

#[test]
fn status_enforcement_and_reload() -> Result<()> {
    let fixture = fixture!("status_enforcement_and_reload");
    let agent = Agent::start(&fixture, "")?;
    let status: Value = agent.json(&["status"])?;
    assert_eq!(status["synced"], true, "{status}");
    assert_eq!(agent.cli(&["status"])?.code(), Some(0));
    let on = || agent.metrics()?.one("jobwarden_enforcement_enabled", &[]);
    assert!(on()? < 0.5, "off by default");
    assert_eq!(agent.cli(&["enforcement", "on", "--for", "1s"])?.code(), Some(0));
    assert!(on()? > 0.5);
    eventually("off again by itself", ms(4000), || {
        ensure!(on()? < 0.5, "still on");
        Ok(())
    })?;
    assert_eq!(agent.cli(&["enforcement", "on"])?.code(), Some(0));
    assert_eq!(agent.cli(&["enforcement", "off"])?.code(), Some(0));
    assert!(on()? < 0.5);
    std::fs::write(&agent.config, "[zombies]\nafter = \"5 bananas\"\n")?;
    let bad = agent.cli(&["reload"])?;
    assert_eq!(bad.code(), Some(1), "{bad:?}");
    assert!(bad.err().contains("after"), "{}", bad.err());
    assert!(agent.metrics()?.one("jobwarden_config_last_reload_successful", &[])? < 0.5);
    std::fs::write(
        &agent.config,
        format!("[[job]]\nname = \"later\"\nmatch = {{ argv = \"{}\" }}\n", fixture.tag),
    )?;
    assert_eq!(agent.cli(&["reload"])?.code(), Some(0));
    assert!(agent.metrics()?.one("jobwarden_config_last_reload_successful", &[])? > 0.5);
    let mut s = Shape::start(&fixture, "setsid", &[])?;
    s.fact::<u32>("grandchild")?;
    agent.process_when(s.pid(), "the new rule", |p| p.job.is_some())?;
    s.finish()?;
    Ok(())
}

#[test]
fn notify_and_a_receiver_that_runs_a_command() -> Result<()> {
    let fixture = fixture!("notify_and_a_receiver_that_runs_a_command");
    let inbox = fixture.path("got");
    let config = format!(
        "[zombies]\nafter = \"200ms\"\n[[receiver]]\nname = \"shell\"\ntype = \"exec\"\nkinds = [\"zombie\"]\ncommand = [\"/bin/sh\", \"-c\", \"cat >>{}\"]\n",
        inbox.display()
    );
    let agent = Agent::start(&fixture, &config)?;
    let test = agent.cli(&["notify", "shell"])?;
    assert_eq!(test.code(), Some(0), "{test:?}");
    assert_eq!(agent.cli(&["--json", "notify", "nobody"])?.code(), Some(4));
    let mut s = Shape::start(&fixture, "zombie", &[])?;
    s.fact::<u32>("dead")?;
    eventually("delivered", ms(5000), || {
        let got = std::fs::read_to_string(&inbox)?;
        ensure!(got.contains("\"version\":1") && got.contains(&fixture.tag), "{got}");
        Ok(())
    })?;
    s.step()?;
    s.fact::<u32>("reaped")?;
    eventually("its end is delivered too", ms(5000), || {
        let got = std::fs::read_to_string(&inbox)?;
        ensure!(got.contains("\"resolved\""), "{got}");
        Ok(())
    })?;
    eventually("nothing is left to deliver", ms(3000), || {
        let left = agent.alerts(&["--undelivered"])?;
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })?;
    s.finish()?;
    Ok(())
}

#[test]
fn commands_that_need_no_agent() -> Result<()> {
    let fixture = fixture!("commands_that_need_no_agent");
    let program = agent::run;
    let jobwarden = |args: &[&str]| {
        let mut c = fixture.command(jobwarden_tests::fixture::program("jobwarden")?);
        c.args(args);
        program(c, ms(20_000))
    };
    let version = jobwarden(&["--version"])?;
    assert_eq!(version.code(), Some(0));
    assert!(version.out().starts_with("jobwarden "), "{}", version.out());
    let doctor = jobwarden(&["doctor"])?;
    assert_eq!(doctor.code(), Some(0), "{doctor:?}");
    let json = jobwarden(&["--json", "doctor"])?;
    json.json::<Value>()?;
    let good = fixture.path("good.toml");
    std::fs::write(&good, "[zombies]\nafter = \"1m\"\n")?;
    let good = good.to_string_lossy().into_owned();
    let check = jobwarden(&["check", "--config", &good])?;
    assert_eq!(check.code(), Some(0), "{check:?}");
    let print = jobwarden(&["check", "--print", "--config", &good])?;
    assert!(print.out().contains("1m"), "{}", print.out());
    assert_eq!(jobwarden(&["nonsense"])?.code(), Some(2));
    assert_eq!(jobwarden(&["tree", "--nonsense"])?.code(), Some(2));
    for help in [&["--help"][..], &["tree", "--help"], &["exec", "--help"]] {
        assert_eq!(jobwarden(help)?.code(), Some(0), "{help:?}");
    }
    Ok(())
}
