//! Pid namespaces and containers, by the real runtimes: the incident inside, told with both pids and cured; an init that
//! never reaps; and who may ask the agent for what from where.

use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use jobwarden::model::schema::{Alert, AlertKind, AlertState, Cause, KillReport, Process, State, Verdict};
use jobwarden::privileges::{KEPT, TO_START, WHERE_ASKED};
use jobwarden_tests::{Agent, Fixture, Limit, Output, Shape, agent, eventually, fixture, ms, skip};

/// Nobody's uid, and a group that the base system has.
const NOBODY: u32 = 65534;
const GROUP: (&str, u32) = ("games", 60);

fn has(program: &str) -> bool {
    Command::new(program)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|s| s.success())
}

/// A root file system with busybox's shell, and these programs with their libraries.
fn rootfs(fixture: &Fixture, programs: &[&str]) -> Result<PathBuf> {
    let root = fixture.path("rootfs");
    for dir in ["bin", "proc", "dev", "sys", "tmp", "etc"] {
        std::fs::create_dir_all(root.join(dir))?;
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|p| Path::new(p).exists());
    std::fs::copy(busybox.context("no busybox")?, root.join("bin/sh"))?;
    for name in programs {
        let program = jobwarden_tests::fixture::program(name)?;
        std::fs::copy(&program, root.join("bin").join(name))?;
        let out = Command::new("ldd").arg(&program).output()?;
        for lib in String::from_utf8_lossy(&out.stdout).split_whitespace().filter(|w| w.starts_with('/')) {
            let to = root.join(&lib[1..]);
            std::fs::create_dir_all(to.parent().context("no folder")?)?;
            std::fs::copy(lib, &to)?;
        }
    }
    Ok(root)
}

/// A container of runc; deleted at the end, whatever happens.
struct Runc {
    id: String,
    root: PathBuf,
}

impl Runc {
    fn command(&self, fixture: &Fixture) -> Command {
        let mut c = fixture.command("runc");
        c.arg("--root").arg(&self.root);
        c
    }

    /// Prepares a bundle. `mounts`: host paths that are seen at the same path inside.
    fn new(fixture: &Fixture, programs: &[&str], args: &[&str], mounts: &[&Path]) -> Result<Self> {
        rootfs(fixture, programs)?;
        // The folder that the agent looks at.
        let me = Self { id: fixture.tag.clone(), root: "/run/runc".into() };
        let spec = me.command(fixture).arg("spec").current_dir(fixture.path("")).output()?;
        ensure!(spec.status.success(), "runc spec: {}", String::from_utf8_lossy(&spec.stderr));
        let file = fixture.path("config.json");
        let mut c: serde_json::Value = serde_json::from_slice(&std::fs::read(&file)?)?;
        c["process"]["terminal"] = false.into();
        c["process"]["args"] = args.into();
        c["root"]["readonly"] = false.into();
        let env = c["process"]["env"].as_array_mut().context("no env")?;
        env.push(format!("JWTEST_TOKEN={}", fixture.tag).into());
        for m in mounts {
            let all = c["mounts"].as_array_mut().context("no mounts")?;
            all.push(
                serde_json::json!({"destination": m, "type": "bind", "source": m, "options": ["bind", "rw"]}),
            );
        }
        std::fs::write(file, serde_json::to_vec(&c)?)?;
        Ok(me)
    }

    fn run(&self, fixture: &Fixture) -> Command {
        let mut c = self.command(fixture);
        c.arg("run").arg("--bundle").arg(fixture.path("")).arg(&self.id);
        c
    }
}

/// The DaemonSet's container: the host's pid namespace and network, a read-only root, and these capabilities alone.
fn as_in_the_daemonset(fixture: &Fixture) -> Result<()> {
    let file = fixture.path("config.json");
    let mut c: serde_json::Value = serde_json::from_slice(&std::fs::read(&file)?)?;
    c["root"]["readonly"] = true.into();
    c["process"]["noNewPrivileges"] = true.into();
    // What is missing here itself cannot be given (SYS_RESOURCE: only kernels before 5.11 need it).
    let have = rustix::thread::capabilities(None)?.permitted;
    let named =
        KEPT.iter().chain(&WHERE_ASKED).chain(&TO_START).filter(|k| k.1 != "CHOWN" && have.contains(k.0));
    let caps: Vec<String> = named.map(|k| format!("CAP_{}", k.1)).collect();
    c["process"]["capabilities"] =
        serde_json::json!({"bounding": caps, "effective": caps, "permitted": caps, "ambient": []});
    let namespaces = c["linux"]["namespaces"].as_array_mut().context("no namespaces")?;
    namespaces.retain(|n| n["type"] != "pid" && n["type"] != "network");
    std::fs::write(file, serde_json::to_vec(&c)?)?;
    Ok(())
}

impl Drop for Runc {
    fn drop(&mut self) {
        // A container that is gone already is none; what it left behind is found by the ground.
        let _ =
            Command::new("runc").arg("--root").arg(&self.root).args(["delete", "--force", &self.id]).output();
    }
}

fn firing(agent: &Agent<'_>, kind: AlertKind, good: impl Fn(&Process) -> bool) -> Result<Alert> {
    eventually(&format!("{kind} alert"), ms(10_000), || {
        let all = agent.alerts(&[])?;
        let found = all.iter().find(|a| {
            a.kind == kind && a.state == AlertState::Firing && a.subject.as_ref().is_some_and(&good)
        });
        found.cloned().with_context(|| format!("none fits among {all:?}"))
    })
}

/// The process that has this pid in this container.
fn inside(agent: &Agent<'_>, container: &str, ns_pid: u32) -> Result<Process> {
    eventually(&format!("pid {ns_pid} in {container}"), ms(5000), || {
        let all = agent.tree()?.processes;
        let found = all.iter().find(|p| {
            p.state != State::Gone
                && p.ns_pid == Some(ns_pid)
                && p.container.as_ref().is_some_and(|c| c.id.raw().starts_with(container))
        });
        found.cloned().with_context(|| {
            let theirs: Vec<_> = all.iter().filter(|p| p.container.is_some()).collect();
            format!("those in containers: {theirs:?}")
        })
    })
}

/// The incident in a container whose init is a shell: told with host and container pids, and cured from outside.
fn incident(agent: &Agent<'_>, s: &mut Shape, container: &str, runtime: &str) -> Result<()> {
    let (command, holder): (u32, u32) = (s.fact("command")?, s.fact("holder")?);
    let (zombie, orphan) = (inside(agent, container, command)?, inside(agent, container, holder)?);
    let init = inside(agent, container, 1)?;
    ensure!(orphan.pid != holder && orphan.pid_ns == init.pid_ns, "another pid outside: {orphan:?}");
    for p in [&zombie, &orphan, &init] {
        let c = p.container.as_ref().context("no container")?;
        ensure!(c.runtime.as_deref() == Some(runtime), "{c:?}");
        ensure!(p.cgroup.as_ref().is_some_and(|g| g.raw().contains(c.id.raw())), "{p:?}");
    }
    let worker = zombie.ppid.context("no parent")?;

    let alert = firing(agent, AlertKind::Zombie, |p| p.pid == worker)?;
    let label = alert.labels.get("container").context("no label container")?;
    ensure!(label.starts_with(container), "{label}");
    let subject = alert.subject.as_ref().context("no subject")?;
    ensure!(subject.ns_pid.is_some_and(|n| n != worker), "{subject:?}");

    // Asked as somebody in the container would say it.
    let why: Cause = agent.json(&["why", &command.to_string(), "--container", container])?;
    ensure!(why.process.id == zombie.id && why.verdict == Verdict::ParentBlockedOnPipe, "{why:?}");
    ensure!(why.remedy.contains(&orphan.id.to_string()), "host IDs to copy: {}", why.remedy);
    let text = agent.cli(&["tree", "--container", container])?.out();
    ensure!(text.contains(&format!("(pid {holder} inside)")), "{text}");
    ensure!(text.contains(&format!("adopted by {} (sh), init of container", init.pid)), "{text}");
    let said = agent.cli(&["why", &alert.id])?.out();
    let from = text.lines().position(|l| l.contains("(pid 1 inside)")).unwrap_or(0);
    let theirs: Vec<&str> = text.lines().skip(from).collect();
    jobwarden_tests::loudly(&format!("{runtime}: {}\n{}\n{said}", alert.summary, theirs.join("\n")));

    let report: KillReport = agent.json(&["kill", "--grace", "1s", &orphan.id.to_string()])?;
    ensure!(report.survivors.is_empty(), "{report:?}");
    ensure!(s.fact::<i32>("status")? == 0, "the worker reaped its child");
    eventually("resolved", ms(5000), || {
        ensure!(!agent.alerts(&[])?.iter().any(|a| a.id == alert.id), "it still fires");
        Ok(())
    })
}

const CONFIG: &str = "[zombies]\nafter = \"1500ms\"\n";

#[test]
fn the_incident_in_a_container_of_runc() -> Result<()> {
    let fixture = fixture!("the_incident_in_a_container_of_runc");
    if !has("runc") || !has("ldd") {
        skip!("the_incident_in_a_container_of_runc: no runc (Debian's package runc)");
    }
    let agent = Agent::start(&fixture, CONFIG)?;
    let script = format!("/bin/shape-incident {}; exit 0", fixture.tag);
    let c = Runc::new(&fixture, &["shape-incident"], &["/bin/sh", "-c", &script], &[])?;
    let mut s = Shape::spawn("incident in runc", c.run(&fixture))?;
    incident(&agent, &mut s, &c.id, "runc")?;
    s.finish()?;
    agent.stop()
}

#[test]
fn the_incident_in_a_container_that_only_v1_paths_name() -> Result<()> {
    let test = "the_incident_in_a_container_that_only_v1_paths_name";
    let fixture = fixture!(test);
    if !has("unshare") {
        skip!("{test}: no unshare (Debian's package util-linux)");
    }
    let Some((group, id)) = Limit::docker_v1(&fixture) else {
        skip!("{test}: no v1 hierarchy of pids at /sys/fs/cgroup/pids");
    };
    let agent = Agent::start(&fixture, CONFIG)?;
    let mut c = fixture.command("unshare");
    let program = jobwarden_tests::fixture::program("shape-incident")?;
    c.args(["--pid", "--fork", "--mount-proc", "/bin/sh", "-c"]);
    c.arg(format!("{} {}; exit 0", program.display(), fixture.tag));
    group.holds(&mut c);
    let mut s = Shape::spawn("incident in v1", c)?;
    let init = inside(&agent, &id, 1)?;
    let groups = std::fs::read_to_string(format!("/proc/{}/cgroup", init.pid))?;
    let named: Vec<&str> = groups.lines().filter(|l| l.contains(&id)).collect();
    ensure!(named.len() == 1 && named[0].contains(":pids:/docker/"), "{groups}");
    incident(&agent, &mut s, &id, "docker")?;
    s.finish()?;
    agent.stop()
}

#[test]
fn the_incident_in_a_container_of_podman() -> Result<()> {
    let fixture = fixture!("the_incident_in_a_container_of_podman");
    if !has("podman") || !has("runc") {
        skip!("the_incident_in_a_container_of_podman: no podman (Debian's package podman) with runc");
    }
    let agent = Agent::start(&fixture, CONFIG)?;
    let root = rootfs(&fixture, &["shape-incident"])?;
    let podman = || {
        let mut c = fixture.command("podman");
        c.arg("--root").arg(fixture.path("storage")).arg("--runroot").arg(fixture.path("run"));
        c.args(["--cgroup-manager=cgroupfs", "--storage-driver=vfs", "--runtime", "runc"]);
        c
    };
    let mut c = podman();
    c.args(["run", "--rm", "--interactive", "--network=host", "--name", &fixture.tag]);
    c.args(["--ulimit", "nofile=4096:4096", "--ulimit", "nproc=4096:4096"]);
    c.arg("--env").arg(format!("JWTEST_TOKEN={}", fixture.tag)).arg("--rootfs").arg(&root);
    c.args(["/bin/sh", "-c", &format!("/bin/shape-incident {}; exit 0", fixture.tag)]);
    let mut s = Shape::spawn("incident in podman", c)?;
    s.fact::<u32>("command")?;
    let mut ask = podman();
    ask.args(["ps", "--quiet", "--no-trunc"]);
    let id = agent::run(ask, ms(20_000))?.out().trim().to_owned();
    ensure!(id.len() == 64, "podman ps: {id:?}");
    incident(&agent, &mut s, &id[..12], "podman")?;
    s.finish()?;
    agent.stop()
}

#[test]
fn an_init_that_never_reaps_and_one_inside_it() -> Result<()> {
    let fixture = fixture!("an_init_that_never_reaps_and_one_inside_it");
    if !has("unshare") {
        skip!("an_init_that_never_reaps_and_one_inside_it: no unshare (util-linux)");
    }
    let agent = Agent::start(&fixture, "[zombies]\nafter = \"1200ms\"\n")?;
    // Once in a namespace, and once in a namespace inside another.
    for depth in [1, 2] {
        let mut c = fixture.command("unshare");
        c.args(["--pid", "--fork", "--kill-child"]);
        if depth == 2 {
            c.args(["unshare", "--pid", "--fork", "--kill-child"]);
        }
        // The shell becomes a program that knows nothing of its children.
        let time = format!("600.{}{depth}", std::process::id());
        c.args(["sh", "-c", &format!("sleep 0.1 & sleep 0.1 & exec sleep {time}")]);
        let s = Shape::spawn("init", c)?;
        let of_this = |p: &Process| p.ns_pid == Some(1) && p.argv.last().is_some_and(|a| *a == time);
        let alert = firing(&agent, AlertKind::Zombie, of_this)?;
        ensure!(alert.count == 2, "{alert:?}");
        ensure!(alert.summary.contains("init of pid namespace"), "{}", alert.summary);
        let init = alert.subject.as_ref().context("no subject")?;
        let status = std::fs::read_to_string(format!("/proc/{}/status", init.pid))?;
        let pids = status.lines().find_map(|l| l.strip_prefix("NSpid:")).context("no NSpid")?;
        ensure!(pids.split_whitespace().count() == depth + 1, "depth {depth}: {pids}");
        let why: Cause = agent.json(&["why", &alert.id])?;
        ensure!(why.verdict == Verdict::InitNotReaping, "{why:?}");
        ensure!(why.remedy.contains("--init") && why.remedy.contains("tini"), "{}", why.remedy);
        ensure!(why.process.ns_pid.is_some_and(|n| n < 10) && why.process.pid_ns == init.pid_ns, "{why:?}");
        s.kill()?;
        eventually("resolved", ms(5000), || {
            ensure!(!agent.alerts(&[])?.iter().any(|a| a.id == alert.id), "it still fires");
            Ok(())
        })?;
    }
    agent.stop()
}

/// Somebody to be killed.
fn sleeper(fixture: &Fixture) -> Result<Shape> {
    let mut c = fixture.command("sleep");
    c.arg("600");
    Shape::spawn("sleep", c)
}

/// A command of the client as somebody else.
fn as_user(fixture: &Fixture, agent: &Agent<'_>, uid: u32, gid: u32, args: &[&str]) -> Result<Output> {
    let mut c = fixture.command(jobwarden_tests::fixture::program("jobwarden")?);
    c.arg("--json").arg("--socket").arg(&agent.socket).args(args).uid(uid).gid(gid);
    agent::run(c, ms(10_000))
}

#[test]
fn who_may_ask_for_what() -> Result<()> {
    let fixture = fixture!("who_may_ask_for_what");
    if std::fs::read_to_string("/etc/group")
        .is_ok_and(|g| !g.contains(&format!("{}:x:{}:", GROUP.0, GROUP.1)))
    {
        skip!("who_may_ask_for_what: no group {} with gid {}", GROUP.0, GROUP.1);
    }
    let agent = Agent::start(&fixture, &format!("[agent]\nsocket_group = \"{}\"\n", GROUP.0))?;
    for dir in [fixture.path(""), fixture.path("agent")] {
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755))?;
    }
    // The program itself must be within reach of everybody.
    let s = sleeper(&fixture)?;
    let pid = s.pid().to_string();
    let reads: [&[&str]; 5] = [&["tree"], &["jobs"], &["alerts"], &["why", &pid], &["status"]];
    let changes: [&[&str]; 5] = [
        &["kill", &pid],
        &["kill", "--dry-run", &pid],
        &["enforcement", "off"],
        &["reload"],
        &["notify", "nobody"],
    ];
    if as_user(&fixture, &agent, NOBODY, NOBODY, &["--version"]).map_or(true, |o| o.code() != Some(0)) {
        skip!("who_may_ask_for_what: another user cannot run the program where it lies");
    }
    for args in reads.iter().chain(&changes) {
        let out = as_user(&fixture, &agent, NOBODY, NOBODY, args)?;
        ensure!(out.code() == Some(3), "nobody, {args:?}: {out:?}");
    }
    for args in reads {
        let out = as_user(&fixture, &agent, NOBODY, GROUP.1, args)?;
        ensure!(out.code() == Some(0), "a reader of the group, {args:?}: {out:?}");
    }
    for args in changes {
        let out = as_user(&fixture, &agent, NOBODY, GROUP.1, args)?;
        ensure!(out.code() == Some(3), "a reader of the group, {args:?}: {out:?}");
    }
    ensure!(Path::new(&format!("/proc/{pid}")).exists(), "nobody ended it");
    drop(s);
    agent.stop()
}

#[test]
fn a_containers_root_with_the_socket_may_not_kill() -> Result<()> {
    let fixture = fixture!("a_containers_root_with_the_socket_may_not_kill");
    if !has("runc") || !has("ldd") {
        skip!("a_containers_root_with_the_socket_may_not_kill: no runc (Debian's package runc)");
    }
    let agent = Agent::start(&fixture, "")?;
    let s = sleeper(&fixture)?;
    let socket = agent.socket.display().to_string();
    let script = format!(
        "/bin/jobwarden --socket {socket} status >/dev/null; echo status=$?; \
         /bin/jobwarden --socket {socket} kill {0}; echo kill=$?; \
         /bin/jobwarden --socket {socket} enforcement on; echo enforcement=$?; \
         /bin/jobwarden --socket {socket} reload; echo reload=$?",
        s.pid()
    );
    let c = Runc::new(&fixture, &["jobwarden"], &["/bin/sh", "-c", &script], &[&agent.socket])?;
    let out = agent::run(c.run(&fixture), ms(20_000))?;
    // Root inside may read what the socket's owner may: that was decided by whoever mounted it.
    for want in ["status=0", "kill=3", "enforcement=3", "reload=3"] {
        ensure!(out.out().lines().any(|l| l == want), "{want}: {out:?}");
    }
    ensure!(Path::new(&format!("/proc/{}", s.pid())).exists(), "it was ended");
    drop(s);
    agent.stop()
}

#[test]
fn the_agent_works_in_a_container_with_the_daemonsets_capabilities() -> Result<()> {
    let fixture = fixture!("the_agent_works_in_a_container_with_the_daemonsets_capabilities");
    if !has("runc") || !has("ldd") {
        skip!("the_agent_works_in_a_container: no runc (Debian's package runc)");
    }
    let (run, state) = (fixture.path("run"), fixture.path("state"));
    for dir in [&run, &state] {
        std::fs::create_dir_all(dir)?;
    }
    let port = agent::free_port()?;
    let socket = run.join("sock");
    let (listen, at) = (format!("127.0.0.1:{port}"), socket.display().to_string());
    let kept = state.display().to_string();
    let args =
        ["/bin/jobwarden", "--socket", &at, "agent", "--no-pin", "--listen", &listen, "--state-dir", &kept];
    let c = Runc::new(&fixture, &["jobwarden"], &args, &[&run, &state])?;
    as_in_the_daemonset(&fixture)?;
    let mut inner =
        c.run(&fixture).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let cli = |args: &[&str]| -> Result<Output> {
        let mut c = fixture.command(jobwarden_tests::fixture::program("jobwarden")?);
        c.arg("--json").arg("--socket").arg(&socket).args(args);
        agent::run(c, ms(10_000))
    };
    let synced = eventually("synced", ms(15_000), || {
        let status: jobwarden::api::Status = cli(&["status"])?.json()?;
        ensure!(status.synced, "{:?}", status.not_ready);
        Ok(status)
    });
    let done = synced.and_then(|status| {
        let of = std::fs::read_to_string(format!("/proc/{}/status", status.pid))?;
        let eff = of.lines().find_map(|l| l.strip_prefix("CapEff:")).context("no CapEff")?;
        let eff = u64::from_str_radix(eff.trim(), 16)?;
        let must = KEPT.iter().fold(0, |s, k| s | k.0.bits());
        ensure!(eff & must == must, "{eff:x}");
        // Somebody of another user on the host: seen, explained and ended from in there.
        let mut other = fixture.command("sleep");
        other.arg("600").uid(NOBODY).gid(NOBODY);
        let mut other = Shape::spawn("sleep", other)?;
        let pid = other.pid().to_string();
        let p = eventually("in the tree", ms(5000), || {
            let tree: jobwarden::model::schema::Tree = cli(&["tree", &pid])?.json()?;
            let p = tree.processes.into_iter().find(|p| p.pid == other.pid()).context("not there")?;
            ensure!(p.uid == Some(NOBODY) && p.ns_pid == Some(p.pid), "{p:?}");
            Ok(p)
        })?;
        let report: KillReport = cli(&["kill", &p.id.to_string()])?.json()?;
        ensure!(report.survivors.is_empty() && report.signalled.len() == 1, "{report:?}");
        other.wait(ms(5000))?;
        Ok(())
    });
    drop(c);
    let _ = inner.wait();
    let mut log = String::new();
    if let Some(mut e) = inner.stderr.take() {
        std::io::Read::read_to_string(&mut e, &mut log)?;
    }
    done.context(log)
}
