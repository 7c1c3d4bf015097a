//! What is read on behalf of a process, and for whom: a line of source only where the process itself may open the file; what the
//! kernel guards by ptrace access only to root and to the process's own user; and memory that never comes holds up nobody.

use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use jobwarden::model::outside::OutsideText;
use jobwarden::model::schema::{Alerts, Cause, Evidence, KillReport, Tree};
use jobwarden_tests::agent::{self, Options};
use jobwarden_tests::{Agent, Fixture, Shape, eventually, fixture, ms, skip};
use rustix::fs::{FileType, Mode};
use rustix::process::Signal;
use rustix::thread::{CapabilitySet, capabilities};
use serde::de::DeserializeOwned;

const NOBODY: u32 = 65_534;
const OTHER: u32 = 65_533;
const GROUP: (&str, u32) = ("games", 60);
const PYTHON: &str = "/usr/bin/python3";

/// A frame in each file that its arguments name, at line 2, and a zombie child.
const SCRIPT: &str = "\
import os, sys, time
root, uid, gid = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
if root:
    os.chroot(root)
    os.chdir('/')
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
def leaf():
    if os.fork() == 0:
        os._exit(0)
    os.write(1, b'ready=1\\n')
    time.sleep(300)
call = leaf
for path in sys.argv[5:]:
    inner = {'call': call}
    exec(compile('def f():\\n    call()', path, 'exec'), inner)
    call = inner['f']
call()
";

/// Why it cannot run here.
fn missing(fixture: &Fixture) -> Option<String> {
    let group = format!("{}:x:{}:", GROUP.0, GROUP.1);
    if !std::fs::read_to_string("/etc/group").is_ok_and(|g| g.contains(&group)) {
        return Some(format!("no group {} with gid {}", GROUP.0, GROUP.1));
    }
    if !Path::new(PYTHON).exists() {
        return Some(format!("no {PYTHON}"));
    }
    let mut c = fixture.command(jobwarden_tests::fixture::program("jobwarden").ok()?);
    c.arg("--version").uid(NOBODY).gid(NOBODY).current_dir("/");
    let runs = agent::run(c, ms(5000)).is_ok_and(|o| o.code() == Some(0));
    (!runs).then(|| "another user cannot run the program where it lies".to_owned())
}

fn open_folder(path: &Path) -> Result<()> {
    Ok(std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))?)
}

fn python(fixture: &Fixture, root: &str, uid: u32, paths: &[String]) -> Result<Shape> {
    let script = fixture.path("frames.py");
    std::fs::write(&script, SCRIPT)?;
    let mut c = fixture.command(PYTHON);
    c.arg(script).arg(&fixture.tag).arg(root).arg(uid.to_string()).arg(GROUP.1.to_string()).args(paths);
    if root.is_empty() {
        // Before the exec: a process that changes its user itself is not dumpable, and closed to its own user.
        c.uid(uid).gid(GROUP.1);
    }
    let mut shape = Shape::spawn("frames", c)?;
    let _: u32 = shape.fact("ready")?;
    Ok(shape)
}

/// A command of the client as a member of the group.
fn as_reader<T: DeserializeOwned>(
    fixture: &Fixture,
    agent: &Agent<'_>,
    uid: u32,
    args: &[&str],
) -> Result<T> {
    let mut c = fixture.command(jobwarden_tests::fixture::program("jobwarden")?);
    c.arg("--json").arg("--socket").arg(&agent.socket).args(args).uid(uid).gid(GROUP.1).current_dir("/");
    agent::run(c, ms(20_000))?.json().with_context(|| format!("{uid}: {args:?}"))
}

fn frames(c: &Cause) -> Vec<(&str, Option<&str>)> {
    let mut all = Vec::new();
    for e in &c.evidence {
        if let Evidence::Python { file, source, .. } = e {
            all.push((file.raw(), source.as_ref().map(OutsideText::raw)));
        }
    }
    all
}

/// Each frame of `wanted`, with its line or without.
fn has_lines(c: &Cause, wanted: &[(String, Option<&str>)]) -> Result<()> {
    let frames = frames(c);
    for (path, line) in wanted {
        let found =
            frames.iter().find(|f| f.0 == path).with_context(|| format!("no frame in {path}: {c:#?}"))?;
        ensure!(found.1 == *line, "{path}: {:?}, expected {line:?}", found.1);
    }
    Ok(())
}

/// What is guarded, of whomever.
fn inside(c: &Cause) -> bool {
    c.evidence.iter().any(|e| match e {
        Evidence::Python { .. } | Evidence::Holder { .. } | Evidence::Wchan { .. } => true,
        Evidence::Blocked { fd, inode, syscall, .. } => {
            fd.is_some() || inode.is_some() || syscall != "unknown"
        }
        _ => false,
    })
}

fn put(path: &Path, owner: (u32, u32), mode: u32) -> Result<()> {
    std::fs::write(path, "one\nPASSWORD=hunter2\n")?;
    chown(path, Some(owner.0), Some(owner.1))?;
    Ok(std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?)
}

/// Files that the user may read, and such that it may not: the paths, with the line that is to be seen.
fn files(fixture: &Fixture) -> Result<Vec<(String, Option<&'static str>)>> {
    let at = |name: &str| fixture.path(name);
    let line = Some("PASSWORD=hunter2");
    std::fs::create_dir(at("closed"))?;
    std::fs::set_permissions(at("closed"), std::fs::Permissions::from_mode(0o700))?;
    put(&at("closed/open"), (0, 0), 0o644)?;
    put(&at("private"), (OTHER, 0), 0o600)?;
    put(&at("strangers"), (0, 4), 0o640)?;
    put(&at("groups"), (0, GROUP.1), 0o640)?;
    put(&at("huge"), (0, 0), 0o644)?;
    std::fs::File::options().write(true).open(at("huge"))?.set_len(1 << 40)?;
    symlink("closed/open", at("link"))?;
    symlink("groups", at("good-link"))?;
    let node = |name, kind, dev| {
        let mode = Mode::from_raw_mode(0o666);
        rustix::fs::mknodat(rustix::fs::CWD, fixture.path(name), kind, mode, dev)
    };
    node("fifo", FileType::Fifo, 0)?;
    node("zero", FileType::CharacterDevice, rustix::fs::makedev(1, 5))?;
    let wanted = [
        ("closed/open", None),
        ("private", None),
        ("strangers", None),
        ("link", None),
        ("fifo", None),
        ("zero", None),
        ("groups", line),
        ("good-link", line),
        ("huge", line),
    ];
    Ok(wanted.into_iter().map(|(name, line)| (at(name).display().to_string(), line)).collect())
}

#[test]
fn a_line_of_source_is_read_with_the_rights_of_the_process() -> Result<()> {
    let fixture = fixture!("a_line_of_source_is_read_with_the_rights_of_the_process");
    if let Some(why) = missing(&fixture) {
        skip!("a_line_of_source_is_read_with_the_rights_of_the_process: {why}");
    }
    open_folder(&fixture.path(""))?;
    let wanted = files(&fixture)?;
    let config = format!("[agent]\nsocket_group = \"{}\"\n[zombies]\nafter = \"500ms\"\n", GROUP.0);
    let agent = Agent::start(&fixture, &config)?;
    open_folder(&fixture.path("agent"))?;
    let paths: Vec<String> = wanted.iter().map(|w| w.0.clone()).collect();
    let s = python(&fixture, "", NOBODY, &paths)?;
    let pid = s.pid().to_string();
    let began = Instant::now();
    let c: Cause = agent.json(&["why", &pid])?;
    ensure!(began.elapsed() < ms(5000), "why took {:?}", began.elapsed());
    has_lines(&c, &wanted).context("root")?;
    // Its own user sees the same, another user nothing of what the kernel guards.
    has_lines(&as_reader(&fixture, &agent, NOBODY, &["why", &pid])?, &wanted).context("its user")?;
    let c: Cause = as_reader(&fixture, &agent, OTHER, &["why", &pid])?;
    ensure!(!inside(&c) && c.process.exe.is_none(), "another user is shown {c:#?}");
    ensure!(!format!("{c:?}").contains("hunter2"), "{c:#?}");

    // Receivers are shown what the process may read; readers no cause that was found with other rights.
    let firing = eventually("an alert with its cause", ms(10_000), || {
        let all = agent.alerts(&[])?;
        let of_it = all.into_iter().find(|a| a.subject.as_ref().is_some_and(|p| p.pid == s.pid()));
        of_it.filter(|a| a.cause.is_some()).context("no such alert yet")
    })?;
    has_lines(firing.cause.as_ref().context("no cause")?, &wanted).context("the alert")?;
    let seen_in = |args: &[&str]| -> Result<()> {
        let seen: Alerts = as_reader(&fixture, &agent, NOBODY, args)?;
        ensure!(seen.alerts.iter().any(|a| a.id == firing.id), "{args:?}: {seen:?}");
        ensure!(seen.alerts.iter().all(|a| a.cause.is_none()), "{args:?}: {seen:?}");
        Ok(())
    };
    seen_in(&["alerts"])?;
    let tree: Tree = as_reader(&fixture, &agent, NOBODY, &["tree"])?;
    let exe = |pid| tree.processes.iter().find(|p| p.pid == pid).map(|p| p.exe.is_some());
    ensure!((exe(s.pid()), exe(agent.pid())) == (Some(true), Some(false)), "executables: {tree:?}");
    drop(s);
    eventually("the alert in the history", ms(10_000), || seen_in(&["alerts", "--history"]))?;
    agent.stop()
}

#[test]
fn a_path_means_what_it_means_to_the_process() -> Result<()> {
    let fixture = fixture!("a_path_means_what_it_means_to_the_process");
    if let Some(why) = missing(&fixture) {
        skip!("a_path_means_what_it_means_to_the_process: {why}");
    }
    let root = fixture.path("root");
    std::fs::create_dir(&root)?;
    [fixture.path(""), root.clone()].iter().try_for_each(|d| open_folder(d))?;
    put(&fixture.path("outside"), (0, 0), 0o644)?;
    let outside = fixture.path("outside").display().to_string();
    put(&root.join("within"), (0, 0), 0o644)?;
    symlink(&outside, root.join("out"))?;
    symlink("../../../../../..".to_owned() + &outside, root.join("climb"))?;
    symlink("/within", root.join("absolute"))?;
    let line = Some("PASSWORD=hunter2");
    let wanted: Vec<(String, Option<&str>)> = [
        ("/within", line),
        ("within", line),
        ("/absolute", line),
        (&*outside, None),
        ("/out", None),
        ("/climb", None),
    ]
    .map(|(path, line)| (path.to_owned(), line))
    .into();
    let agent = Agent::start(&fixture, "")?;
    let paths: Vec<String> = wanted.iter().map(|w| w.0.clone()).collect();
    let s = python(&fixture, &root.display().to_string(), NOBODY, &paths)?;
    has_lines(&agent.json(&["why", &s.pid().to_string()])?, &wanted)?;
    agent.stop()
}

/// Processes whose argv is on a page that never comes.
fn blocked_argv(fixture: &Fixture, n: usize) -> Result<Vec<Shape>> {
    (0..n)
        .map(|i| {
            let dir = fixture.path(&format!("fuse-{i}"));
            std::fs::create_dir(&dir)?;
            let mut s = Shape::start(fixture, "blocked-argv", &[&dir.display().to_string()])?;
            let _: u32 = s.fact("zombie")?;
            Ok(s)
        })
        .collect()
}

#[test]
fn memory_that_never_comes_holds_up_nobody() -> Result<()> {
    let fixture = fixture!("memory_that_never_comes_holds_up_nobody");
    if !Path::new("/dev/fuse").exists() {
        skip!("memory_that_never_comes_holds_up_nobody: no /dev/fuse");
    }
    // PR_SET_MM needs it (prctl(2)).
    if !capabilities(None)?.effective.contains(CapabilitySet::SYS_RESOURCE) {
        skip!("memory_that_never_comes_holds_up_nobody: no CAP_SYS_RESOURCE");
    }
    // More than reads of one user's processes may be blocked.
    let all = blocked_argv(&fixture, 8)?;
    let config = "[[job]]\nname = \"nobody\"\nmatch = { argv = \"no such argv\" }\n";
    let began = Instant::now();
    let agent = Agent::start(&fixture, config)?;
    let in_time = |what: &str, began: Instant, limit: Duration| {
        let took = began.elapsed();
        ensure!(took < limit, "{what} took {took:?}");
        Ok(())
    };
    in_time("the start", began, ms(8000))?;
    let began = Instant::now();
    let m = eventually("blocked reads", ms(4000), || {
        let m = agent.metrics()?;
        ensure!(m.one("jobwarden_blocked_reads", &[])? >= 1.0);
        Ok(m)
    })?;
    ensure!(m.one("jobwarden_blocked_reads", &[])? <= 6.0, "more than one user's reads may be");
    in_time("/metrics", began, ms(4500))?;
    // What is left out is said.
    let began = Instant::now();
    let tree = agent.tree()?;
    in_time("tree", began, ms(1500))?;
    let pids: Vec<u32> = all.iter().map(Shape::pid).collect();
    ensure!(tree.unread.iter().any(|u| pids.contains(&u.pid) && u.what == "memory"), "{:?}", tree.unread);
    for s in &all[..2] {
        let began = Instant::now();
        let c: Cause = agent.json(&["why", &s.pid().to_string()])?;
        in_time("why", began, ms(5000))?;
        ensure!(c.process.pid == s.pid(), "{c:?}");
    }
    let blocked = tree.unread.iter().find(|u| pids.contains(&u.pid)).context("none")?.pid;
    let c: Cause = agent.json(&["why", &blocked.to_string()])?;
    let said = |e: &Evidence| matches!(e, Evidence::Note { text } if text.contains("not read: memory"));
    ensure!(c.evidence.iter().any(said), "what was left out is not said: {c:#?}");
    // Another user's process is read as ever.
    let mut c = fixture.command("sleep");
    c.arg("600");
    let other = Shape::spawn("sleep", c)?;
    let p = agent.process_when(other.pid(), "its argv", |p| p.argv == ["sleep", "600"])?;
    ensure!(p.uid == Some(0), "{p:?}");

    // A blocked reader keeps an ended agent from being reaped, but nothing that the next one needs.
    agent.signal(Signal::TERM)?;
    eventually("the socket is gone", ms(8000), || {
        if agent.socket.exists() {
            bail!("the agent still serves");
        }
        Ok(())
    })?;
    let next = Agent::with(&fixture, &Options { config, ..Options::default() })?;
    // Nor is the end of such a process held up.
    for s in &all {
        let began = Instant::now();
        let report: KillReport = next.json(&["kill", "--grace", "0s", &s.pid().to_string()])?;
        ensure!(report.survivors.is_empty(), "{report:?}");
        in_time("kill", began, ms(3000))?;
    }
    drop(all);
    eventually("no blocked read", ms(5000), || {
        let n = next.metrics()?.one("jobwarden_blocked_reads", &[])?;
        ensure!(n == 0.0, "{n}");
        Ok(())
    })?;
    next.stop()?;
    drop(agent);
    Ok(())
}
