//! Causes on the running kernel, through the real agent, its probes and its commands: the incident with a real Python
//! worker, told and cured by the remedy as it is printed; and each verdict by a process in that very state.
//!
//! The long form of the mixed scenario is an ignored test (JWTEST_WHY_ROUNDS rounds); a round of it runs always.

use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, ensure};
use jobwarden::model::schema::{Alert, AlertKind, AlertState, Cause, Evidence, Exit, State, Verdict};
use jobwarden::sources::proc::{InSyscall, Proc};
use jobwarden_tests::{Agent, Events, Fixture, Shape, eventually, fixture, ms, rounds, skip, truth};
use rustix::process::Signal;

/// The environment variable that marks what one family has started.
const MARK: &str = "JWTEST_FAMILY";
static NEXT: AtomicU32 = AtomicU32::new(0);

/// Every script begins with this: facts as the helper programs say them, and children.
const PRELUDE: &str = "\
import ctypes, os, select, signal, socket, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long] * 4
def say(**what):
    os.write(1, ''.join(f'{k}={v}\\n' for k, v in what.items()).encode())
def dead():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    return pid
def sleeper(*close):
    pid = os.fork()
    if pid == 0:
        for fd in close:
            os.close(fd)
        os.execvp('sleep', ['sleep', '300'])
    return pid
";

/// The interpreter itself: what stands first on the path may be a script that looks for it.
fn python() -> Option<&'static str> {
    static PATH: OnceLock<Option<String>> = OnceLock::new();
    let find = || {
        let said = Command::new("python3").args(["-c", "import sys; print(sys.executable)"]).output().ok()?;
        let path = String::from_utf8(said.stdout).ok()?.trim().to_owned();
        (said.status.success() && !path.is_empty()).then_some(path)
    };
    PATH.get_or_init(find).as_deref()
}

/// A Python script and all that it starts; ended when dropped.
struct Family<'g> {
    shape: Shape,
    fixture: &'g Fixture,
    mark: String,
}

impl<'g> Family<'g> {
    fn start(fixture: &'g Fixture, script: &str) -> Result<Self> {
        Self::by(fixture, &[], script)
    }

    /// Run by `prefix`.
    fn by(fixture: &'g Fixture, prefix: &[&str], script: &str) -> Result<Self> {
        Self::with(fixture, prefix, script, &[])
    }

    fn with(fixture: &'g Fixture, prefix: &[&str], script: &str, args: &[&str]) -> Result<Self> {
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let file = fixture.path(&format!("family-{n}.py"));
        std::fs::write(&file, format!("{PRELUDE}{script}"))?;
        let mut words = prefix.iter().copied().chain([python().context("no python3")?]);
        let mut c = fixture.command(words.next().unwrap_or_default());
        let mark = format!("{}-{n}", fixture.tag);
        c.args(words).arg(&file).arg(&fixture.tag).args(args).env(MARK, &mark);
        Ok(Self { shape: Shape::spawn(&format!("family {n}"), c)?, fixture, mark })
    }

    fn pid(&self) -> u32 {
        self.shape.pid()
    }

    /// A pid that it says.
    fn says(&mut self, name: &str) -> Result<u32> {
        self.shape.fact(name)
    }

    fn signal(&self, pid: u32, signal: Signal) -> Result<()> {
        self.fixture.signal(i32::try_from(pid)?, signal)
    }
}

impl Drop for Family<'_> {
    fn drop(&mut self) {
        let mark = format!("{MARK}={}", self.mark).into_bytes();
        let ours = |pid: &i32| {
            let env = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            env.split(|&b| b == 0).any(|v| v == mark)
        };
        // Until none is left: what forked meanwhile is found by the next round.
        for _ in 0..200 {
            let left: Vec<i32> = self.fixture.alive().into_iter().filter(ours).collect();
            if left.is_empty() {
                break;
            }
            for pid in left {
                let _ = self.fixture.signal(pid, Signal::KILL);
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

/// A rule that makes a job of each family.
fn config(fixture: &Fixture, more: &str) -> String {
    format!("[[job]]\nname = \"family\"\nmatch = {{ argv = \"{}\" }}\n{more}\n", fixture.tag)
}

fn why(agent: &Agent<'_>, pid: u32) -> Result<Cause> {
    let c: Cause = agent.json(&["why", &pid.to_string()])?;
    ensure!((1..=3).contains(&c.summary.lines().count()), "{}", c.summary);
    ensure!(!c.remedy.is_empty(), "{c:#?}");
    Ok(c)
}

fn is(c: &Cause, verdict: Verdict) -> Result<()> {
    ensure!(c.verdict == verdict, "not {verdict:?}: {c:#?}");
    Ok(())
}

// System calls of x86-64.
const READ: i64 = 0;
const POLL: i64 = 7;
const RECVFROM: i64 = 45;
const WAIT4: i64 = 61;
const FUTEX: i64 = 202;
const CLOCK_NANOSLEEP: i64 = 230;
const EPOLL_WAIT: i64 = 232;

/// Until its main thread sleeps in one of these calls.
fn until_in(pid: u32, calls: &[i64]) -> Result<()> {
    eventually(&format!("{pid} in call {calls:?}"), ms(15_000), || {
        let now = Proc::default().syscall(pid, pid)?;
        let there =
            matches!(now, InSyscall::Call { number, .. } if calls.iter().any(|&c| c as u64 == number));
        ensure!(there && truth::letter(pid)? == 'S', "{now:?}");
        Ok(())
    })
}

/// For a while: a process is in D for a moment also when it waits for a page of its own program.
fn until_letter(pid: u32, letter: char) -> Result<()> {
    eventually(&format!("{pid} in state {letter}"), ms(15_000), || {
        for _ in 0..20 {
            let is = truth::letter(pid)?;
            ensure!(is == letter, "it is in state {is}");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        Ok(())
    })
}

/// With patience: while others leave ten thousands of dead behind, the agent's looks at each become seldom.
fn zombie(agent: &Agent<'_>, pid: u32) -> Result<()> {
    eventually(&format!("{pid}: a zombie"), ms(40_000), || {
        let p = agent.process(pid)?;
        ensure!(p.state == State::Zombie, "{p:?}");
        Ok(())
    })
}

fn firing(agent: &Agent<'_>, kind: AlertKind, subject: u32) -> Result<Alert> {
    let about = |a: &Alert| a.kind == kind && a.subject.as_ref().is_some_and(|p| p.pid == subject);
    let all = agent.alerts(&[])?;
    let found = all.iter().find(|a| about(a) && a.state == AlertState::Firing);
    found.cloned().with_context(|| format!("no {kind} alert about {subject} among {all:?}"))
}

fn has(c: &Cause, what: &str, fits: impl Fn(&Evidence) -> bool) -> Result<()> {
    ensure!(c.evidence.iter().any(fits), "no {what} in {c:#?}");
    Ok(())
}

fn held_by(c: &Cause, pid: u32) -> Result<()> {
    has(c, "holder", |e| matches!(e, Evidence::Holder { process, .. } if process.pid == pid))
}

fn noted(c: &Cause, words: &str) -> Result<()> {
    has(c, words, |e| matches!(e, Evidence::Note { text } if text.contains(words)))
}

/// The command: on its timeout it ends its own child only, whose child lives on with the pipe.
const COMMAND: &str = "\
child = os.fork()
if child == 0:
    os.write(int(sys.argv[2]), f'{os.getpid()} {sleeper()}'.encode())
    while True:
        time.sleep(300)
time.sleep(0.2)
os.kill(child, signal.SIGTERM)
os.waitpid(child, 0)
sys.exit(1)
";

/// The worker. The mistake is `stderr.read()`.
const WORKER: &str = "\
told, tell = os.pipe()
popen = subprocess.Popen([sys.executable, 'command.py', sys.argv[1], str(tell)], stderr=subprocess.PIPE, pass_fds=[tell])
child, orphan = os.read(told, 99).split()
os.close(tell)
say(command=popen.pid, child=int(child), orphan=int(orphan))
errors = popen.stderr.read()
say(status=popen.wait())
sys.stdin.read()
";

#[test]
fn the_incident_in_python_is_told_and_its_remedy_cures_it() -> Result<()> {
    let fixture = fixture!("the_incident_in_python_is_told_and_its_remedy_cures_it");
    if python().is_none() {
        skip!("the_incident_in_python_is_told_and_its_remedy_cures_it: no python3");
    }
    std::fs::write(fixture.path("command.py"), format!("{PRELUDE}{COMMAND}"))?;
    let agent =
        Agent::start(&fixture, &config(&fixture, "zombie_after = \"500ms\"\norphan_after = \"500ms\""))?;
    let mut f = Family::start(&fixture, WORKER)?;
    let (worker, command) = (f.pid(), f.says("command")?);
    let (child, orphan) = (f.says("child")?, f.says("orphan")?);
    zombie(&agent, command)?;
    let adopted = agent.process_when(orphan, "an orphan", |p| p.orphan && p.adopter.is_some())?;
    until_in(worker, &[READ])?;

    let c = why(&agent, command)?;
    is(&c, Verdict::ParentBlockedOnPipe)?;
    ensure!(c.process.pid == command && c.process.kernel_state.as_deref() == Some("Z"), "{:?}", c.process);
    let blocked = c.evidence.iter().find_map(|e| match e {
        Evidence::Blocked { thread, syscall, fd: Some(fd), inode: Some(inode), .. }
            if *thread == worker && syscall == "read" =>
        {
            Some((*fd, inode.clone()))
        }
        _ => None,
    });
    let (fd, pipe) = blocked.with_context(|| format!("nothing blocked in {c:#?}"))?;
    let link = std::fs::read_link(format!("/proc/{worker}/fd/{fd}"))?;
    ensure!(link.to_str() == Some(pipe.raw()) && pipe.raw().starts_with("pipe:["), "{fd} {pipe} is {link:?}");
    let reaper = truth::stat(orphan)?.ppid;
    ensure!(adopted.adopter.as_ref().is_some_and(|a| a.pid == reaper), "adopted by {reaper}");
    has(&c, "holder", |e| {
        matches!(e, Evidence::Holder { process, inode, mode, relation, .. }
            if process.id == adopted.id && *inode == pipe && mode == "w"
                && relation.contains("orphan of this job") && relation.contains(&format!("({reaper})")))
    })?;
    // Who killed the holder's parent, and by which signal.
    has(&c, "death of its parent", |e| {
        matches!(e, Evidence::ParentExit { process, exit: Some(Exit::Signal { signal, sender: Some(s), .. }) }
            if process.pid == child && signal == "SIGTERM" && s.pid == command)
    })?;
    has(&c, "signal", |e| {
        matches!(e, Evidence::Signal { signal, sender: Some(s), target, .. }
            if signal == "SIGTERM" && s.pid == command && target.pid == child)
    })?;
    ensure!(c.summary.contains(&format!("was not sent to sleep ({orphan})")), "{}", c.summary);
    // The line of Python: by the helper, which is the program itself.
    let at = WORKER.lines().position(|l| l.contains("stderr.read()")).context("no such line")?;
    let at = u32::try_from(PRELUDE.lines().count() + at + 1)?;
    has(&c, "line of Python", |e| {
        matches!(e, Evidence::Python { thread, file, line: l, function, source: Some(s) }
            if *thread == u64::from(worker) && file.raw().contains("/family-") && *l == at && function == "<module>"
                && s == "errors = popen.stderr.read()")
    })?;

    // The alert says the same, and so does the tree.
    let alert = eventually("alert with its cause", ms(5000), || {
        let a = firing(&agent, AlertKind::Zombie, worker)?;
        ensure!(a.cause.is_some(), "{a:?}");
        Ok(a)
    })?;
    let cause = alert.cause.as_ref().context("no cause")?;
    ensure!((cause.verdict, &cause.remedy) == (c.verdict, &c.remedy), "{cause:#?}");
    let state = |p: &jobwarden::model::schema::Process| p.kernel_state.clone();
    ensure!(state(&cause.process).as_deref() == Some("Z"), "{:?}", cause.process);
    ensure!(alert.subject.as_ref().and_then(state).as_deref() == Some("S"), "{:?}", alert.subject);
    let drawn = agent.cli(&["tree", &worker.to_string()])?.out();
    let id = agent.process(worker)?.id;
    ensure!(drawn.contains(&format!("<parent-blocked-on-pipe, see: jobwarden why {id}>")), "{drawn}");

    // As an engineer would copy it.
    let text = agent.cli(&["why", &command.to_string()])?.out();
    let remedy = text.lines().skip_while(|l| l.trim() != "remedy:").nth(1).context("no remedy")?.trim();
    ensure!(remedy == format!("jobwarden kill {}", adopted.id), "{text}");
    let mut sh = fixture.command("sh");
    let program = jobwarden_tests::fixture::program("jobwarden")?;
    let folder = program.parent().context("no folder")?.display().to_string();
    let path = format!("{folder}:{}", std::env::var("PATH").unwrap_or_default());
    sh.args(["-c", remedy]).env("PATH", path).env("JOBWARDEN_SOCKET", &agent.socket);
    let done = jobwarden_tests::agent::run(sh, ms(20_000))?;
    ensure!(done.code() == Some(0), "{done:?}");
    ensure!(f.shape.fact::<i32>("status")? == 1, "the worker goes on and reaps");
    eventually("resolved", ms(5000), || {
        ensure!(firing(&agent, AlertKind::Zombie, worker).is_err(), "it still fires");
        Ok(())
    })
}

/// A worker that reads `ours`, whose dead child's child holds `theirs`.
fn through(open: &str, read: &str) -> String {
    format!(
        "\
{open}
os.set_inheritable(theirs, True)
r, w = os.pipe()
z = os.fork()
if z == 0:
    os.close(ours)
    os.write(w, str(sleeper()).encode())
    os._exit(0)
os.close(theirs)
say(z=z, holder=int(os.read(r, 9)))
{read}
"
    )
}

/// `sh` leaves a process behind that holds both of its pipes.
fn command(read: &str) -> String {
    format!(
        "\
p = subprocess.Popen(['sh', '-c', 'sleep 300 & echo $!; exit 3'], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
say(z=p.pid, holder=int(p.stdout.readline()))
{read}
"
    )
}

/// The holder's parent dies, then the subreaper that adopted it, too.
const TWO_ADOPTIONS: &str = "\
r, w = os.pipe()
os.set_inheritable(w, True)
told, tell = os.pipe()
z = os.fork()
if z == 0:
    a = os.fork()
    if a == 0:
        libc.prctl(36, 1, 0, 0, 0)
        b = os.fork()
        if b == 0:
            os.write(tell, str(sleeper(r)).encode())
            os._exit(0)
        os.waitpid(b, 0)
        time.sleep(0.1)
        os._exit(0)
    os.waitpid(a, 0)
    os._exit(0)
os.close(w)
say(z=z, holder=int(os.read(told, 9)))
os.read(r, 1)
";

#[test]
fn whatever_it_reads_and_however() -> Result<()> {
    let fixture = fixture!("whatever_it_reads_and_however");
    if python().is_none() {
        skip!("whatever_it_reads_and_however: no python3");
    }
    let agent = Agent::start(&fixture, &config(&fixture, ""))?;
    let fifo = "os.mkfifo('f'); ours = os.open('f', os.O_RDONLY | os.O_NONBLOCK); theirs = os.open('f', os.O_WRONLY); os.set_blocking(ours, True)";
    let pair = "a, b = socket.socketpair(); ours, theirs = a.fileno(), b.fileno()";
    let epoll = "e = select.epoll(); e.register(p.stderr, select.EPOLLIN); e.poll()";
    let all = [
        (command("p.communicate()"), POLL, "pipe:["),
        (command(epoll), EPOLL_WAIT, "pipe:["),
        (through("ours, theirs = os.openpty()", "os.read(ours, 9)"), READ, "/dev/pts/"),
        (through(pair, "a.recv(9)"), RECVFROM, "socket:["),
        (through(fifo, "os.read(ours, 9)"), READ, "/f"),
        (TWO_ADOPTIONS.to_owned(), READ, "pipe:["),
    ];
    for (script, call, inode) in all {
        let mut f = Family::start(&fixture, &script)?;
        let (z, holder) = (f.says("z")?, f.says("holder")?);
        zombie(&agent, z)?;
        let id = agent.process_when(holder, "an orphan", |p| p.orphan)?.id;
        until_in(f.pid(), &[call])?;
        let c = why(&agent, z)?;
        is(&c, Verdict::ParentBlockedOnPipe).with_context(|| script.clone())?;
        has(&c, "holder", |e| {
            matches!(e, Evidence::Holder { process, inode: i, relation, .. }
                if process.pid == holder && i.raw().contains(inode) && relation.contains("orphan of this job"))
        })
        .with_context(|| script.clone())?;
        ensure!(c.remedy == format!("jobwarden kill {id}"), "{script}: {}", c.remedy);
    }
    Ok(())
}

const VFORK: &str = "\
os.mkfifo(f'v{os.getpid()}')
say(z=dead())
os.posix_spawn('/bin/true', ['true'], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 5, f'v{os.getpid()}', os.O_RDONLY, 0)])
";

/// What each does after it has said the zombie; and by what it is known to be there.
const MIX: [(&str, Verdict); 9] = [
    (
        "r, w = os.pipe(); os.set_inheritable(w, True); c = sleeper(r); os.close(w); say(z=dead(), c=c); os.read(r, 1)",
        Verdict::ParentBlockedOnPipe,
    ),
    (
        "p = subprocess.Popen(['sleep', '300'], stdout=-1, stderr=-1); say(z=dead(), c=p.pid); p.communicate()",
        Verdict::ParentBlockedOnPipe,
    ),
    ("c = sleeper(); say(z=dead(), c=c); os.waitpid(c, 0)", Verdict::ParentWaitingForOtherChild),
    ("say(z=dead()); os.kill(os.getpid(), signal.SIGSTOP)", Verdict::ParentStopped),
    ("say(z=dead()); time.sleep(300)", Verdict::ParentBlocked),
    ("l = threading.Lock(); l.acquire(); say(z=dead()); l.acquire()", Verdict::ParentBlocked),
    ("say(z=dead())\nwhile True: pass", Verdict::ParentBusy),
    (VFORK, Verdict::ParentUninterruptible),
    (
        "p = subprocess.Popen(['sleep', '300']); say(z=dead(), c=p.pid); p.wait()",
        Verdict::ParentWaitingForOtherChild,
    ),
];

fn there(f: &Family<'_>, verdict: Verdict) -> Result<()> {
    match verdict {
        Verdict::ParentBlockedOnPipe => until_in(f.pid(), &[READ, POLL]),
        Verdict::ParentWaitingForOtherChild => until_in(f.pid(), &[WAIT4]),
        Verdict::ParentStopped => until_letter(f.pid(), 'T'),
        Verdict::ParentBlocked => until_in(f.pid(), &[CLOCK_NANOSLEEP, FUTEX]),
        Verdict::ParentUninterruptible => until_letter(f.pid(), 'D'),
        _ => Ok(()),
    }
}

/// All at once: each asked about in turn, then each one's alert.
fn mixed(fixture: &Fixture, rounds: u64) -> Result<()> {
    let agent = Agent::start(fixture, "[zombies]\nafter = \"1s\"\n")?;
    for round in 0..rounds {
        let mut crowd = Vec::new();
        for (script, verdict) in MIX {
            crowd.push((Family::start(fixture, script)?, verdict));
        }
        for (f, verdict) in &mut crowd {
            let z = f.says("z")?;
            zombie(&agent, z)?;
            there(f, *verdict)?;
            let c = why(&agent, z)?;
            is(&c, *verdict).with_context(|| format!("round {round}"))?;
        }
        for (does, signals, verdict) in [
            ("pass", &[][..], Verdict::ParentKilled),
            ("signal.signal(signal.SIGTERM, signal.SIG_IGN)", &[Signal::TERM][..], Verdict::IgnoredSignal),
        ] {
            let (f, parent, child) = couple(fixture, &agent, does)?;
            for &s in signals {
                f.signal(child, s)?;
            }
            f.signal(parent, Signal::TERM)?;
            agent.process_when(child, "an orphan", |p| p.orphan)?;
            is(&why(&agent, child)?, verdict).with_context(|| format!("round {round}"))?;
        }
        // They fire together, and the machine has few CPUs: a cause may come late, but it comes.
        for (f, verdict) in &crowd {
            let alert = eventually("alert with its cause", ms(20_000), || {
                let a = firing(&agent, AlertKind::Zombie, f.pid())?;
                ensure!(a.cause.is_some(), "{a:?}");
                Ok(a)
            })?;
            is(alert.cause.as_ref().context("no cause")?, *verdict)?;
        }
    }
    Ok(())
}

#[test]
fn a_mixed_crowd() -> Result<()> {
    let fixture = fixture!("a_mixed_crowd");
    if python().is_none() {
        skip!("a_mixed_crowd: no python3");
    }
    mixed(&fixture, 1)
}

#[test]
#[ignore = "long: JWTEST_WHY_ROUNDS (100)"]
fn a_mixed_crowd_many_times() -> Result<()> {
    let fixture = fixture!("a_mixed_crowd_many_times");
    if python().is_none() {
        skip!("a_mixed_crowd_many_times: no python3");
    }
    mixed(&fixture, rounds("JWTEST_WHY_ROUNDS", 100))
}

/// What it waits for, who stopped it, and what its child does, are named.
#[test]
fn what_a_parent_does_instead_is_named() -> Result<()> {
    let fixture = fixture!("what_a_parent_does_instead_is_named");
    if python().is_none() {
        skip!("what_a_parent_does_instead_is_named: no python3");
    }
    let agent = Agent::start(&fixture, &config(&fixture, ""))?;

    let mut f = Family::start(&fixture, MIX[2].0)?;
    let (z, child) = (f.says("z")?, f.says("c")?);
    zombie(&agent, z)?;
    until_in(f.pid(), &[WAIT4])?;
    let c = why(&agent, z)?;
    is(&c, Verdict::ParentWaitingForOtherChild)?;
    has(&c, "child", |e| matches!(e, Evidence::WaitsFor { process } if process.pid == child))?;
    drop(f);

    // Stopped, let go on, and stopped again by another: the probes do not see the SIGCONT.
    let mut f = Family::start(&fixture, "say(z=dead())\ntime.sleep(300)")?;
    let z = f.says("z")?;
    let script = format!("os.kill({0}, signal.SIGSTOP); os.kill({0}, signal.SIGCONT); say(sent=1)", f.pid());
    let mut other = Family::start(&fixture, &script)?;
    other.says("sent")?;
    drop(other);
    zombie(&agent, z)?;
    f.signal(f.pid(), Signal::STOP)?;
    until_letter(f.pid(), 'T')?;
    let c = why(&agent, z)?;
    is(&c, Verdict::ParentStopped)?;
    let me = std::process::id();
    has(&c, "sender", |e| {
        matches!(e, Evidence::Signal { signal, sender: Some(s), target, .. }
            if signal == "SIGSTOP" && s.pid == me && target.pid == f.pid())
    })?;
    ensure!(c.remedy.contains(&agent.process(f.pid())?.id.to_string()), "{}", c.remedy);
    drop(f);

    let mut f = Family::start(&fixture, "say(z=dead())\ntime.sleep(300)")?;
    let z = f.says("z")?;
    let tracer = tracer(&fixture, 16, f.pid())?;
    until_letter(f.pid(), 't')?;
    zombie(&agent, z)?;
    let c = why(&agent, z)?;
    is(&c, Verdict::ParentTraced)?;
    has(&c, "tracer", |e| matches!(e, Evidence::Tracer { process } if process.pid == tracer.pid()))?;
    drop((tracer, f));

    let mut f = Family::start(&fixture, VFORK)?;
    let z = f.says("z")?;
    zombie(&agent, z)?;
    until_letter(f.pid(), 'D')?;
    let c = why(&agent, z)?;
    is(&c, Verdict::ParentUninterruptible)?;
    has(&c, "wchan", |e| matches!(e, Evidence::Wchan { process, .. } if process.pid == f.pid()))?;
    has(&c, "child", |e| matches!(e, Evidence::WaitsFor { .. }))
}

/// `PTRACE_ATTACH` is 16, `PTRACE_SEIZE` 0x4206.
fn tracer(fixture: &Fixture, how: u32, target: u32) -> Result<Family<'_>> {
    let mut f =
        Family::start(fixture, &format!("say(r=libc.ptrace({how}, {target}, 0, 0))\ntime.sleep(300)"))?;
    ensure!(f.shape.fact::<i64>("r")? == 0, "ptrace");
    Ok(f)
}

#[test]
fn who_else_keeps_a_dead_process() -> Result<()> {
    let fixture = fixture!("who_else_keeps_a_dead_process");
    if python().is_none() {
        skip!("who_else_keeps_a_dead_process: no python3");
    }
    let agent = Agent::start(&fixture, &config(&fixture, ""))?;

    let mut f = Family::start(&fixture, "z = sleeper()\nsay(z=z)\nos.waitpid(z, 0)")?;
    let z = f.says("z")?;
    until_in(z, &[CLOCK_NANOSLEEP])?;
    let tracer = tracer(&fixture, 0x4206, z)?;
    f.signal(z, Signal::KILL)?;
    zombie(&agent, z)?;
    let c = why(&agent, z)?;
    is(&c, Verdict::HeldByTracer)?;
    has(&c, "tracer", |e| matches!(e, Evidence::Tracer { process } if process.pid == tracer.pid()))?;
    drop((tracer, f));

    let script =
        "threading.Thread(target=time.sleep, args=(300,)).start()\nsay(ready=1)\nlibc.syscall(60, 0)";
    let mut f = Family::start(&fixture, script)?;
    f.says("ready")?;
    agent.process_when(f.pid(), "without its leader", |p| p.state == State::LeaderExited)?;
    is(&why(&agent, f.pid())?, Verdict::LeaderExited)?;
    drop(f);

    let script = "\
a = os.fork()
if a == 0:
    if os.fork() == 0:
        time.sleep(0.2)
        os._exit(0)
    os._exit(0)
os.waitpid(a, 0)
say(ready=1)
time.sleep(300)
";
    let mut f = Family::by(&fixture, &["unshare", "--pid", "--fork", "--kill-child"], script)?;
    f.says("ready")?;
    let proc = Proc::default();
    let init = *proc.children(f.pid())?.first().context("unshare has no child")?;
    let z = eventually("adopted", ms(5000), || Ok(*proc.children(init)?.first().context("none")?))?;
    zombie(&agent, z)?;
    let c = why(&agent, z)?;
    is(&c, Verdict::InitNotReaping)?;
    ensure!(c.remedy.contains("--init"), "{}", c.remedy);
    Ok(())
}

/// A parent and its child, `child` being what the child does first.
fn couple<'g>(fixture: &'g Fixture, agent: &Agent<'_>, child: &str) -> Result<(Family<'g>, u32, u32)> {
    let script = format!(
        "\
p = os.fork()
if p == 0:
    if os.fork() == 0:
        {child}
        say(parent=os.getppid(), child=os.getpid())
        while True:
            time.sleep(300)
    while True:
        time.sleep(300)
os.waitpid(p, 0)
time.sleep(300)
"
    );
    let mut f = Family::start(fixture, &script)?;
    let (parent, child) = (f.says("parent")?, f.says("child")?);
    agent.process_when(child, "there", |_| true)?;
    Ok((f, parent, child))
}

#[test]
fn why_an_orphan_was_left() -> Result<()> {
    let fixture = fixture!("why_an_orphan_was_left");
    if python().is_none() {
        skip!("why_an_orphan_was_left: no python3");
    }
    let agent = Agent::start(&fixture, &config(&fixture, ""))?;
    let me = std::process::id();
    let ignores = "signal.signal(signal.SIGTERM, signal.SIG_IGN)";
    let broken =
        "r, w = os.pipe(); os.close(r); [libc.write(w, b'x', 1) for _ in range(9)]; os.path.exists('/')";
    let handler = "signal.signal(signal.SIGTERM, lambda *a: None)";
    // What the child does; what is sent to it before its parent gets SIGTERM; the verdict, and words of the summary.
    let all: [(&str, &[Signal], Verdict, &str); 5] = [
        ("pass", &[], Verdict::ParentKilled, "was not sent to"),
        (ignores, &[Signal::TERM], Verdict::IgnoredSignal, "ignores it"),
        // It ignores SIGPIPE, as CPython does; nobody else wanted to end it.
        (broken, &[], Verdict::ParentKilled, "was not sent to"),
        (handler, &[Signal::TERM], Verdict::ParentKilled, "has a handler for it"),
        ("pass", &[Signal::STOP, Signal::TERM], Verdict::ParentKilled, "it is stopped"),
    ];
    for (does, signals, verdict, words) in all {
        let (f, parent, child) = couple(&fixture, &agent, does)?;
        for &s in signals {
            f.signal(child, s)?;
            if s == Signal::STOP {
                until_letter(child, 'T')?;
            }
        }
        f.signal(parent, Signal::TERM)?;
        let id = agent.process_when(child, "an orphan", |p| p.orphan)?.id;
        let c = why(&agent, child)?;
        is(&c, verdict).with_context(|| format!("{does} {signals:?}"))?;
        ensure!(c.summary.contains(words), "{does} {signals:?}: {}", c.summary);
        has(&c, "signal", |e| {
            matches!(e, Evidence::Signal { signal, sender: Some(s), target, .. }
                if signal == "SIGTERM" && s.pid == me && target.pid == parent)
        })?;
        ensure!(c.remedy.contains(&id.to_string()), "{}", c.remedy);
    }

    let script = "\
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        say(child=os.getpid())
        time.sleep(300)
    os._exit(0)
os.wait()
time.sleep(300)
";
    let mut f = Family::start(&fixture, script)?;
    let child = f.says("child")?;
    agent.process_when(child, "an orphan", |p| p.orphan)?;
    is(&why(&agent, child)?, Verdict::Daemonized)
}

/// The holder of the pipe waits for a child of its own, which is stopped.
#[test]
fn two_nested_causes() -> Result<()> {
    let fixture = fixture!("two_nested_causes");
    if python().is_none() {
        skip!("two_nested_causes: no python3");
    }
    let agent = Agent::start(&fixture, &config(&fixture, ""))?;
    let mut f = Family::start(
        &fixture,
        "\
r, w = os.pipe()
os.set_inheritable(w, True)
told, tell = os.pipe()
z = os.fork()
if z == 0:
    if os.fork() == 0:
        c = sleeper(w)
        os.kill(c, signal.SIGSTOP)
        os.write(tell, f'{os.getpid()} {c}'.encode())
        os.waitpid(c, 0)
    os._exit(0)
os.close(w)
h, c = (int(x) for x in os.read(told, 99).split())
say(z=z, holder=h, last=c)
os.read(r, 1)
",
    )?;
    let (z, holder, last) = (f.says("z")?, f.says("holder")?, f.says("last")?);
    zombie(&agent, z)?;
    agent.process_when(holder, "an orphan", |p| p.orphan)?;
    until_in(f.pid(), &[READ])?;
    until_in(holder, &[WAIT4])?;
    until_letter(last, 'T')?;
    let c = why(&agent, z)?;
    is(&c, Verdict::ParentBlockedOnPipe)?;
    held_by(&c, holder)?;
    has(&c, "child", |e| matches!(e, Evidence::WaitsFor { process } if process.pid == last))?;
    noted(&c, &format!("({last}) is stopped"))?;
    has(&c, "who stopped it", |e| {
        matches!(e, Evidence::Signal { signal, sender: Some(s), target, .. }
            if signal == "SIGSTOP" && s.pid == holder && target.pid == last)
    })
}

/// The oldest zombie is reaped, the next one is it: the alert's cause follows.
#[test]
fn the_cause_of_a_firing_alert_is_renewed() -> Result<()> {
    let fixture = fixture!("the_cause_of_a_firing_alert_is_renewed");
    let agent = Agent::start(&fixture, "[zombies]\nafter = \"300ms\"\n")?;
    if python().is_none() {
        skip!("the_cause_of_a_firing_alert_is_renewed: no python3");
    }
    let script = "\
a = dead(); time.sleep(0.05); b = dead()
say(a=a, b=b)
sys.stdin.readline()
os.waitpid(a, 0)
time.sleep(300)
";
    let mut f = Family::start(&fixture, script)?;
    let (a, b) = (f.says("a")?, f.says("b")?);
    let pid = f.pid();
    let about = |want: u32| {
        let alert = firing(&agent, AlertKind::Zombie, pid)?;
        let cause = alert.cause.context("no cause")?;
        ensure!(cause.process.pid == want, "about {}", cause.process.pid);
        Ok(())
    };
    eventually("cause", ms(5000), || about(a))?;
    f.shape.step()?;
    eventually("renewed cause", ms(15_000), || about(b))?;
    // With no argument: what the alerts have, at once.
    let all: serde_json::Value = agent.json(&["why"])?;
    let causes = all["causes"].as_array().context("no causes")?;
    ensure!(causes.iter().any(|c| c["process"]["pid"] == b), "{all}");
    ensure!(all["more"] == 0, "{all}");
    Ok(())
}

/// Many parents at once: nobody waits for all of their causes, and in the end every alert has its own.
#[test]
fn the_causes_of_many_alerts() -> Result<()> {
    const MANY: usize = 60;
    let fixture = fixture!("the_causes_of_many_alerts");
    if python().is_none() {
        skip!("the_causes_of_many_alerts: no python3");
    }
    let agent = Agent::start(&fixture, "[zombies]\nafter = \"500ms\"\n")?;
    let script = format!(
        "all = [subprocess.Popen(['sh', '-c', 'true & exec sleep 300']) for _ in range({MANY})]
say(ready=1)
sys.stdin.read()
"
    );
    let mut f = Family::start(&fixture, &script)?;
    f.says("ready")?;
    let parents = Proc::default().children(f.pid())?;
    let about = |a: &Alert| a.subject.as_ref().is_some_and(|p| parents.contains(&p.pid));
    let ours = || Ok::<_, anyhow::Error>(agent.alerts(&[])?.into_iter().filter(about).collect::<Vec<_>>());
    eventually("all alerts", ms(10_000), || {
        let n = ours()?.len();
        ensure!(n == MANY, "{n} fire");
        Ok(())
    })?;
    let all: serde_json::Value = agent.json(&["why"])?;
    let causes = all["causes"].as_array().context("no causes")?.len();
    let more = usize::try_from(all["more"].as_u64().context("no number of more")?)?;
    ensure!(causes >= 20 && causes + more >= MANY, "{causes} causes, {more} more");
    eventually("a cause for each", ms(30_000), || {
        let alerts = ours()?;
        let without = alerts.iter().filter(|a| a.cause.is_none()).count();
        ensure!(without == 0, "{without} have no cause");
        for a in &alerts {
            is(a.cause.as_ref().context("no cause")?, Verdict::ParentBlocked)?;
        }
        Ok(())
    })
}

/// In argv, in a process's own name, in the source that Python shows and in the name of a FIFO.
#[test]
fn a_secret_is_shown_nowhere() -> Result<()> {
    const SECRET: &str = "s3cr3tword";
    let fixture = fixture!("a_secret_is_shown_nowhere");
    if python().is_none() {
        skip!("a_secret_is_shown_nowhere: no python3");
    }
    let rule = config(&fixture, "zombie_after = \"300ms\"\norphan_after = \"300ms\"");
    let agent = Agent::start(&fixture, &format!("[agent]\nredact = [\"s3cr3t[a-z]+\"]\n{rule}"))?;
    let events = Events::start(&fixture, &agent)?;
    let script = format!(
        "\
os.mkfifo('{SECRET}')
r = os.open('{SECRET}', os.O_RDONLY | os.O_NONBLOCK)
w = os.open('{SECRET}', os.O_WRONLY)
os.set_inheritable(w, True)
os.set_blocking(r, True)
told, tell = os.pipe()
z = os.fork()
if z == 0:
    c = os.fork()
    if c == 0:
        libc.prctl(15, b'{SECRET}', 0, 0, 0)
        os.write(tell, str(os.getpid()).encode())
        while True:
            time.sleep(300)
    os._exit(0)
os.close(w)
say(z=z, holder=int(os.read(told, 9)))
os.read(r, len('{SECRET}'))
"
    );
    let mut f = Family::with(&fixture, &[], &script, &[&format!("--password={SECRET}")])?;
    let (z, holder) = (f.says("z")?, f.says("holder")?);
    zombie(&agent, z)?;
    until_in(f.pid(), &[READ])?;
    let orphan = agent.process_when(holder, "an orphan", |p| p.orphan)?;
    let alert = eventually("alerts with their causes", ms(10_000), || {
        let (a, b) =
            (firing(&agent, AlertKind::Zombie, f.pid())?, firing(&agent, AlertKind::Orphan, holder)?);
        ensure!(a.cause.is_some() && b.cause.is_some(), "{a:?} {b:?}");
        Ok(a)
    })?;
    let (z, holder, id) = (z.to_string(), holder.to_string(), orphan.id.to_string());
    let mut masked = 0;
    for args in [
        &["tree"][..],
        &["tree", &z],
        &["why"],
        &["why", &z],
        &["why", &holder],
        &["why", &alert.id],
        &["alerts", "--all"],
        &["kill", "--dry-run", &holder],
        &["kill", "--grace", "0s", &id],
        &["audit"],
        &["alerts", "--history"],
    ] {
        for json in [&["--json"][..], &[]] {
            let out = agent.cli(&[json, args].concat())?;
            let text = out.out() + &out.err();
            ensure!(!text.contains(SECRET), "{args:?} {json:?} shows it:\n{text}");
            masked += usize::from(text.contains("***"));
        }
    }
    // The mask stands there, so the secret would have.
    ensure!(masked > 12, "only {masked} answers had anything to mask");
    let told = serde_json::to_string(&events.all())?;
    ensure!(told.contains("--password=***") && !told.contains(SECRET), "{told}");
    let log = std::fs::read_to_string(&agent.log)?;
    ensure!(!log.contains(SECRET), "{log}");
    Ok(())
}
