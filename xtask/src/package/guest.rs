//! `cargo xtask guest`: what is asked of the package under systemd as PID 1. Runs in the guest that `systemd.rs` boots and
//! nowhere else. A line for each thing that holds; the first that does not ends it, with what systemd and the journal say.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

const CONFIG: &str = "/etc/jobwarden/jobwarden.toml";
const STATE: &str = "/var/lib/jobwarden";
const PINS: &str = "/sys/fs/bpf/jobwarden";
const DROP_IN: &str = "/run/systemd/system/jobwarden.service.d";
/// The README's SYS_PTRACE, DAC_READ_SEARCH and KILL, by their numbers (capability.h). This kernel asks for no BPF.
const KEPT: u64 = 1 << 19 | 1 << 2 | 1 << 5;
/// Under emulation all is slow, and a restart loads the probes anew.
const PATIENCE: Duration = Duration::from_mins(1);
/// The unit's TimeoutStopSec.
const STOP_WITHIN: Duration = Duration::from_secs(20);

const ZOMBIES_SOON: &str = "\
[zombies]
after = \"1s\"
[[job]]
name = \"leaver\"
match = { argv = \"leaves-an-orphan\" }
orphan_after = \"1s\"
";
/// The incident: it reads from a pipe whose other end its child's child has, and so does not reap its child.
const WORKER: &str = "\
import os
def work():
    end, other = os.pipe()
    if os.fork() == 0:
        if os.fork() == 0:
            os.dup2(other, 1)
            os.execvp('sleep', ['sleep', '8002'])
        os._exit(3)
    os.close(other)
    os.read(end, 1)
    os.wait()
work()
";
const BROKEN: &str = "[zombies]\nafter = 7\n";

type Step = (&'static str, fn(&mut Guest) -> Result<String>);

const STEPS: [Step; 12] = [
    ("dpkg -i enables it, starts it, and returns when it is ready", installed),
    ("the unit's fences hold", fenced),
    ("systemctl reload reads the config again; an orphan is alerted", orphan),
    ("a zombie is alerted with its cause, and the remedy cures", incident),
    ("a broken config is refused with the reason, and the old one stays", refused),
    ("the journal has levels", journal),
    ("killed, it is started anew and knows the job of before", killed),
    ("frozen, it is ended by the watchdog and started anew", frozen),
    ("an upgrade restarts it and keeps the job", upgraded),
    ("jobs of other sessions, users and cgroups are ended", ends),
    ("systemctl stop is clean and keeps the pins", stopped),
    ("a purge leaves nothing", purged),
];

#[derive(Default)]
struct Guest {
    /// The client of the job that outlives the agent's ends, and the job's id.
    kept: Option<(Child, String)>,
}

pub(crate) fn run() -> Result<bool> {
    ensure!(read("/proc/1/comm")?.trim() == "systemd", "PID 1 is no systemd: this is for a guest only");
    ensure!(read("/proc/cmdline")?.contains("console=ttyS0 panic=-1"), "this is no guest of ours");
    let mut guest = Guest::default();
    for (what, step) in STEPS {
        let begun = Instant::now();
        match step(&mut guest) {
            Ok(found) => println!("ok {what}: {found} ({:.0} s)", begun.elapsed().as_secs_f64()),
            Err(e) => {
                println!("FAILED {what}: {e:#}");
                for args in [&["systemctl", "status", "--no-pager", "-l", "jobwarden"][..], &JOURNAL_TAIL] {
                    let said = command(args).output()?;
                    println!("{}", String::from_utf8_lossy(&said.stdout));
                }
                return Ok(false);
            }
        }
    }
    Ok(true)
}

const JOURNAL_TAIL: [&str; 6] = ["journalctl", "--no-pager", "-o", "short-monotonic", "-n", "60"];

fn installed(_: &mut Guest) -> Result<String> {
    must(&["dpkg", "-i", "/root/one.deb"])?;
    // Not waited for: Type=notify made systemctl wait, and dpkg with it.
    let status = json(&["status"])?;
    ensure!(status["synced"] == true, "not ready when dpkg was done: {status}");
    ensure!(must(&["systemctl", "is-active", "jobwarden"])?.trim() == "active");
    ensure!(must(&["systemctl", "is-enabled", "jobwarden"])?.trim() == "enabled");
    let (kind, pid) = (show("Type")?, show("MainPID")?);
    ensure!(
        kind == "notify" && status["pid"].as_u64() == pid.parse().ok(),
        "{kind}, main pid {pid}: {status}"
    );
    let pins = pins()?;
    ensure!(status["pinned"] == true && !pins.is_empty(), "{pins:?}: {status}");
    ensure!(status["probes_off"].as_object().is_some_and(|off| !off.contains_key("fork")), "{status}");
    Ok(format!("kernel {}, pid {pid}, {} pins", status["kernel"], pins.len()))
}

fn fenced(_: &mut Guest) -> Result<String> {
    let pid = show("MainPID")?;
    let mut threads = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        let field = |name: &str| -> Result<u64> {
            let value = status.lines().find_map(|l| l.strip_prefix(name)).context("no such field")?;
            Ok(u64::from_str_radix(value.trim(), 16)?)
        };
        let expected =
            [("CapEff:", KEPT), ("CapPrm:", KEPT), ("CapBnd:", KEPT), ("CapInh:", 0), ("CapAmb:", 0)];
        for (name, value) in expected.into_iter().chain([("NoNewPrivs:", 1), ("Seccomp:", 2)]) {
            let found = field(name)?;
            ensure!(found == value, "{name} {found:x}, expected {value:x}\n{status}");
        }
        threads += 1;
    }
    // As the agent sees the file system, whoever asks.
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    for folder in ["usr", "etc", "root", "sys/fs/cgroup", "sys/fs/bpf", "var/lib/jobwarden", "run/jobwarden"]
    {
        let made = fs::create_dir(root.join(folder).join("probe"));
        let open = ["sys/", "var/", "run/"].iter().any(|o| folder.starts_with(o));
        match made {
            Ok(()) if open => fs::remove_dir(root.join(folder).join("probe"))?,
            Err(e) if !open && e.raw_os_error() == Some(libc::EROFS) => {}
            other => bail!("/{folder} should be {}: {other:?}", if open { "open" } else { "read-only" }),
        }
    }
    ensure!(Path::new("/dev/ttyS1").exists() && !root.join("dev/ttyS1").exists(), "it sees the devices");
    Ok(format!("{threads} threads, each with capabilities {KEPT:x} and a system call filter"))
}

fn orphan(_: &mut Guest) -> Result<String> {
    let before = show("MainPID")?;
    fs::write(CONFIG, ZOMBIES_SOON)?;
    must(&["systemctl", "reload", "jobwarden"])?;
    ensure!(show("MainPID")? == before, "a reload is no restart");
    // Not `must`: the orphan would hold what that reads from.
    command(&["sh", "-c", ": leaves-an-orphan; sleep 8001 & exit 0"]).status()?;
    let alert = firing("orphan", |subject| subject["argv"][1] == "8001")?;
    let (subject, job) = (&alert["subject"], &alert["job_name"]);
    ensure!(job == "leaver" && subject["adopter"]["pid"] == 1, "{alert}");
    let why = json(&["why", text(&alert, "id")?])?;
    ensure!(why["verdict"] == "parent-exited", "{why}");
    must(&["jobwarden", "kill", "--grace", "1s", text(subject, "id")?])?;
    ensure!(running("800")?.is_empty(), "the orphan is still there");
    Ok(text(&alert, "summary")?.to_owned())
}

fn incident(_: &mut Guest) -> Result<String> {
    fs::write("/root/worker.py", WORKER)?;
    let mut worker = command(&["python3", "/root/worker.py"]).spawn()?;
    let alert = firing("zombie", |subject| subject["pid"] == worker.id())?;
    let why = json(&["why", text(&alert, "id")?])?;
    ensure!(why["verdict"] == "parent-blocked-on-pipe" && why["process"]["state"] == "zombie", "{why}");
    let evidence = |kind: &str| {
        let mut all = why["evidence"].as_array().into_iter().flatten();
        all.find(|e| e["kind"] == kind).with_context(|| format!("no {kind}: {why}"))
    };
    // Who may not look into others' /proc, not read their memory or not open what they have open knows nothing of this.
    ensure!(evidence("python")?["source"] == "os.read(end, 1)", "{why}");
    let holder = &evidence("holder")?["process"];
    ensure!(holder["argv"][1] == "8002" && text(&why, "remedy")?.contains(text(holder, "id")?), "{why}");
    must(&["jobwarden", "kill", "--grace", "1s", text(holder, "id")?])?;
    ensure!(worker.wait()?.success(), "the remedy did not cure the worker");
    Ok(text(&why, "summary")?.replace('\n', "; "))
}

fn refused(_: &mut Guest) -> Result<String> {
    let before = show("MainPID")?;
    fs::write(CONFIG, BROKEN)?;
    let out = command(&["systemctl", "reload", "jobwarden"]).output()?;
    fs::write(CONFIG, ZOMBIES_SOON)?;
    ensure!(!out.status.success(), "a broken config was taken");
    ensure!(show("ActiveState")? == "active" && show("MainPID")? == before, "it did not go on");
    let status = json(&["status"])?;
    ensure!(status["synced"] == true && status["config_ok"] == false, "{status}");
    let told = lines()?.into_iter().find(|l| l["MESSAGE"].as_str().is_some_and(|m| m.contains("toml:2:9")));
    let told = told.context("the journal does not have the place of the mistake, line 2, column 9")?;
    must(&["systemctl", "reload", "jobwarden"])?;
    ensure!(json(&["status"])?["config_ok"] == true, "mended, it is still refused");
    Ok(text(&told, "MESSAGE")?.to_owned())
}

fn journal(_: &mut Guest) -> Result<String> {
    let mut levels = BTreeSet::new();
    for line in lines()? {
        // An array of numbers where it is no plain text, as with colours.
        let message = line["MESSAGE"].as_str().with_context(|| format!("no plain text: {line}"))?;
        let level = text(&line, "PRIORITY")?;
        let expected = match message.trim_start().split(' ').next() {
            Some("ERROR" | "jobwarden:") => "3",
            Some("WARN") => "4",
            Some("INFO") => "6",
            _ => level,
        };
        ensure!(level == expected, "level {level} for {message:?}");
        ensure!(!message.starts_with(['<', '2']), "a level or a time in the text: {message:?}");
        levels.insert(level.to_owned());
    }
    ensure!(levels.contains("3") && levels.contains("6"), "errors and news look alike: {levels:?}");
    Ok(format!("levels {levels:?}"))
}

fn killed(guest: &mut Guest) -> Result<String> {
    let script = "sleep 8101 & sleep 8102 & wait";
    let client = command(&["jobwarden", "exec", "--name", "kept", "--", "sh", "-c", script]).spawn()?;
    let job = eventually("the job", || {
        let job = job_named("kept")?;
        ensure!(job["processes"] == 3, "{job}");
        Ok(text(&job, "id")?.to_owned())
    })?;
    guest.kept = Some((client, job));
    let pid = show("MainPID")?;
    signal(&pid, libc::SIGKILL)?;
    let now = anew(&pid)?;
    ensure!(show("NRestarts")? == "1", "not restarted by systemd");
    guest.knows_the_job()?;
    Ok(format!("pid {pid}, then {now}; the job has its 3 members"))
}

fn frozen(guest: &mut Guest) -> Result<String> {
    ensure!(show("WatchdogUSec")? == "30s", "the unit has another watchdog: {}", show("WatchdogUSec")?);
    // Thirty seconds are much for a test.
    fs::create_dir_all(DROP_IN)?;
    fs::write(Path::new(DROP_IN).join("soon.conf"), "[Service]\nWatchdogSec=6s\n")?;
    must(&["systemctl", "daemon-reload"])?;
    must(&["systemctl", "restart", "jobwarden"])?;
    let pid = show("MainPID")?;
    // It says that it is alive, or would not live for longer than that.
    std::thread::sleep(Duration::from_secs(9));
    ensure!(show("MainPID")? == pid && show("NRestarts")? == "0", "the watchdog ended a healthy agent");
    signal(&pid, libc::SIGSTOP)?;
    let now = anew(&pid)?;
    ensure!(show("NRestarts")? == "1", "not restarted by systemd");
    let all = must(&["journalctl", "-u", "jobwarden", "--no-pager", "-o", "cat"])?;
    ensure!(all.contains("Watchdog timeout"), "it ended otherwise:\n{all}");
    fs::remove_dir_all(DROP_IN)?;
    must(&["systemctl", "daemon-reload"])?;
    guest.knows_the_job()?;
    Ok(format!("pid {pid}, then {now}"))
}

fn upgraded(guest: &mut Guest) -> Result<String> {
    let pid = show("MainPID")?;
    // The config was changed here.
    must(&["dpkg", "--force-confold", "-i", "/root/next.deb"])?;
    let version = must(&["dpkg-query", "-W", "-f", "${Version}", "jobwarden"])?;
    ensure!(version.ends_with("+next"), "{version}");
    let status = json(&["status"])?;
    let now = show("MainPID")?;
    ensure!(status["synced"] == true && now != pid, "main pid {pid}, then {now}: {status}");
    ensure!(read(CONFIG)? == ZOMBIES_SOON, "the operator's config was changed");
    guest.knows_the_job()?;
    Ok(format!("{version}, pid {pid}, then {now}"))
}

fn ends(_: &mut Guest) -> Result<String> {
    let script =
        "setsid sh -c 'sleep 8201 & exec sleep 8202' & setsid -f sleep 8203; trap '' TERM; sleep 8204 & wait";
    let mut said = Vec::new();
    // nobody's: CAP_KILL. In a cgroup of its own: cgroup.kill.
    for (name, option) in [("walker", &["--user", "nobody"][..]), ("caged", &["--cgroup"])] {
        let exec = [&["jobwarden", "exec", "--name", name], option, &["--", "sh", "-c", script]].concat();
        let mut client = command(&exec).spawn()?;
        eventually("four sleepers", || {
            let (job, all) = (job_named(name)?, running("820")?);
            ensure!(all.len() == 4 && job["processes"].as_u64() >= Some(5), "{all:?} {job}");
            Ok(())
        })?;
        let report = json(&["kill", "--grace", "1s", &format!("name:{name}")])?;
        let none = |key: &str| report[key].as_array().is_some_and(Vec::is_empty);
        ensure!(none("survivors") && none("spared"), "{report}");
        ensure!(running("820")?.is_empty(), "some live: {:?} {report}", running("820")?);
        client.wait()?;
        said.push(format!("{name}: {} signals", report["signalled"].as_array().map_or(0, Vec::len)));
    }
    Ok(said.join(", "))
}

fn stopped(guest: &mut Guest) -> Result<String> {
    let begun = Instant::now();
    must(&["systemctl", "stop", "jobwarden"])?;
    let took = begun.elapsed();
    ensure!(took < STOP_WITHIN, "it took {took:?}");
    let end = [show("ActiveState")?, show("Result")?, show("ExecMainStatus")?];
    ensure!(end == ["inactive", "success", "0"], "{end:?}");
    let pins = pins()?;
    ensure!(!pins.is_empty() && running("810")?.len() == 2, "it took pins or jobs with it: {pins:?}");
    must(&["systemctl", "start", "jobwarden"])?;
    ensure!(json(&["status"])?["synced"] == true, "started, it is not ready");
    guest.knows_the_job()?;
    let (mut client, job) = guest.kept.take().context("no job")?;
    must(&["jobwarden", "kill", "--grace", "1s", &job])?;
    client.wait()?;
    Ok(format!("after {:.1} s, {} pins", took.as_secs_f64(), pins.len()))
}

fn purged(_: &mut Guest) -> Result<String> {
    let pid = show("MainPID")?;
    must(&["dpkg", "--purge", "jobwarden"])?;
    ensure!(!Path::new("/proc").join(&pid).exists(), "the agent still runs");
    ensure!(show("LoadState")? == "not-found", "systemd still has the unit");
    for gone in [PINS, STATE, CONFIG, "/run/jobwarden"] {
        ensure!(!Path::new(gone).exists(), "{gone} is still there");
    }
    let found = must(&["find", "/etc", "/usr", "/var", "/run", "/sys/fs/bpf", "-name", "*jobwarden*"])?;
    ensure!(found.is_empty(), "still there:\n{found}");
    Ok("no process, unit, pin, state or file".to_owned())
}

impl Guest {
    /// The job that was begun before, under the same id and with all its members.
    fn knows_the_job(&self) -> Result<()> {
        let (_, id) = self.kept.as_ref().context("no job")?;
        let job = job_named("kept")?;
        ensure!(job["id"] == **id && job["processes"] == 3 && running("810")?.len() == 2, "{id}: {job}");
        Ok(())
    }
}

/// Waits until another main process than `pid` is ready; returns its pid.
fn anew(pid: &str) -> Result<String> {
    eventually("started anew", || {
        let now = show("MainPID")?;
        let state = show("ActiveState")?;
        ensure!(now != pid && now != "0" && state == "active", "main pid {now}, {state}");
        let status = json(&["status"])?;
        ensure!(status["synced"] == true, "{status}");
        Ok(now)
    })
}

fn firing(kind: &str, good: impl Fn(&Value) -> bool) -> Result<Value> {
    eventually(kind, || {
        let all = json(&["alerts"])?;
        let mut alerts = all["alerts"].as_array().into_iter().flatten();
        let found = alerts.find(|a| a["kind"] == kind && a["state"] == "firing" && good(&a["subject"]));
        found.cloned().with_context(|| format!("none fits: {all}"))
    })
}

fn job_named(name: &str) -> Result<Value> {
    let all = json(&["jobs"])?;
    let found = all["jobs"].as_array().into_iter().flatten().find(|j| j["name"] == name);
    found.cloned().with_context(|| format!("no job {name}: {all}"))
}

/// The sleepers whose time begins so.
fn running(time: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for pid in names("/proc")?.into_iter().filter(|n| n.bytes().all(|b| b.is_ascii_digit())) {
        // One that has ended meanwhile is none.
        let argv = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if argv.starts_with(&format!("sleep\0{time}")) {
            found.push(pid);
        }
    }
    Ok(found)
}

/// What the unit has said, and the manager of it, as journald keeps it.
fn lines() -> Result<Vec<Value>> {
    let all = must(&["journalctl", "-u", "jobwarden", "--no-pager", "-o", "json"])?;
    let lines: Vec<Value> = all.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    Ok(lines.into_iter().filter(|l| l["SYSLOG_IDENTIFIER"] == "jobwarden").collect())
}

fn eventually<T>(what: &str, mut look: impl FnMut() -> Result<T>) -> Result<T> {
    let end = Instant::now() + PATIENCE;
    loop {
        match look() {
            Ok(found) => return Ok(found),
            Err(e) if Instant::now() > end => {
                return Err(e.context(format!("not within {PATIENCE:?}: {what}")));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
        }
    }
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(args[0]);
    command.args(&args[1..]).stdin(Stdio::null());
    command
}

fn must(args: &[&str]) -> Result<String> {
    let Output { status, stdout, stderr } = command(args).output().with_context(|| args.join(" "))?;
    let (out, err) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    ensure!(status.success(), "{} ended with {status}: {out}{err}", args.join(" "));
    Ok(out.into_owned())
}

fn json(args: &[&str]) -> Result<Value> {
    let out = must(&[&["jobwarden", "--json"], args].concat())?;
    serde_json::from_str(&out).with_context(|| out)
}

/// A property of the unit.
fn show(property: &str) -> Result<String> {
    Ok(must(&["systemctl", "show", "-P", property, "jobwarden"])?.trim().to_owned())
}

fn text<'a>(value: &'a Value, key: &str) -> Result<&'a str> {
    value[key].as_str().with_context(|| format!("no {key}: {value}"))
}

/// What is pinned. The agent has a folder of its own version in there.
fn pins() -> Result<Vec<String>> {
    let found = must(&["find", PINS, "-type", "f"])?;
    Ok(found.lines().map(str::to_owned).collect())
}

fn names(folder: &str) -> Result<Vec<String>> {
    let entries = fs::read_dir(folder).with_context(|| folder.to_owned())?;
    entries.map(|e| Ok(e?.file_name().to_string_lossy().into_owned())).collect()
}

fn read(file: &str) -> Result<String> {
    fs::read_to_string(file).with_context(|| file.to_owned())
}

fn signal(pid: &str, signal: libc::c_int) -> Result<()> {
    // SAFETY: no memory effects; the pid is the unit's main process, which systemd has not reaped.
    ensure!(unsafe { libc::kill(pid.parse()?, signal) } == 0, "kill: {}", std::io::Error::last_os_error());
    Ok(())
}
