//! Each verdict, reached by a real process in that state on the running kernel. The question that the forest would ask is
//! built from /proc and from what the test knows of the lineage.

#![expect(clippy::similar_names, reason = "z the zombie, w the worker, c the cause")]

mod odd;
mod orphans;
mod zombies;

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::*;
use crate::model::event::SignalResult;
use crate::model::key::Key;
use crate::model::outside::OutsideText;
use crate::model::question::SignalSeen;
use crate::model::schema::{Exit, JobId, LineageKnown, Process, Ref, SignalBy};

/// The environment variable that marks what a test started, whoever has adopted it.
const MARK: &str = "JOBWARDEN_WHY_TEST";

/// A family of processes, made by a Python script; all of it is ended on drop.
struct Made {
    mark: String,
    child: Child,
    out: BufReader<ChildStdout>,
    dir: tempfile::TempDir,
}

static NEXT: AtomicU32 = AtomicU32::new(0);

const PRELUDE: &str = "\
import ctypes, json, os, select, signal, socket, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def say(**what):
    print(json.dumps(what), flush=True)
def dead():
    # A child that ends at once and is not waited for.
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

impl Made {
    /// Runs the script by `python3`, or by `prefix` followed by it.
    fn by(prefix: &[&str], script: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("worker.py");
        std::fs::File::create(&file).unwrap().write_all(format!("{PRELUDE}{script}").as_bytes()).unwrap();
        let mark = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let mut words = prefix.iter().copied().chain(["python3"]);
        let mut child = Command::new(words.next().unwrap())
            .args(words)
            .arg(&file)
            .current_dir(dir.path())
            .env(MARK, &mark)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        Self { mark, child, out, dir }
    }

    fn new(script: &str) -> Self {
        Self::by(&[], script)
    }

    /// The next line that the script says: names and pids.
    fn said(&mut self) -> serde_json::Value {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("the script said {line:?}: {e}"))
    }

    fn marked(&self) -> Vec<u32> {
        let want = format!("{MARK}={}", self.mark).into_bytes();
        let p = Proc::default();
        let is_ours = |pid: &u32| {
            let env = std::fs::read(p.path(*pid, "environ")).unwrap_or_default();
            env.split(|&b| b == 0).any(|v| v == want)
        };
        p.pids().unwrap().into_iter().filter(is_ours).collect()
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        // Again until none is left: what forks meanwhile is found by the next round.
        for _ in 0..100 {
            let left = self.marked();
            for &pid in &left {
                kill(pid, libc::SIGKILL);
            }
            if left.is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Only of what the test itself has started.
fn kill(pid: u32, signal: i32) {
    let signal = rustix::process::Signal::from_named_raw(signal).unwrap();
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    let _ = rustix::process::kill_process(pid, signal);
}

fn pid(v: &serde_json::Value, name: &str) -> u32 {
    v[name].as_u64().unwrap_or_else(|| panic!("no {name} in {v}")) as u32
}

fn until(what: &str, mut f: impl FnMut() -> bool) {
    let began = Instant::now();
    while !f() {
        assert!(began.elapsed() < Duration::from_secs(20), "not within 20 s: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// For a while: a process is so for a moment also when it waits for a page of its own program.
fn stays_uninterruptible(pid: u32) -> bool {
    (0..20).all(|_| {
        std::thread::sleep(Duration::from_millis(5));
        state(pid) == Some(b'D')
    })
}

fn state(pid: u32) -> Option<u8> {
    Proc::default().stat(pid).ok().map(|s| s.state)
}

fn until_zombie(pid: u32) {
    until("a zombie", || state(pid) == Some(b'Z'));
}

/// Until the leader sleeps in one of these calls.
fn until_in(pid: u32, calls: &[&str]) {
    until(&format!("{pid} in {calls:?}"), || {
        let call = Proc::default().syscall(pid, pid);
        matches!(call, Ok(crate::sources::proc::InSyscall::Call { number, .. })
            if calls.contains(&syscalls::name(number).as_str()))
    });
}

fn key(pid: u32) -> Key {
    let s = Proc::default().stat(pid).unwrap();
    Key::new(pid, s.start_ticks * holders::NS_PER_TICK)
}

/// As the forest would give it.
fn process(pid: u32, lineage_parent: Option<Key>) -> Process {
    let p = Proc::default();
    let s = p.stat(pid).unwrap();
    let zombie = s.state == b'Z';
    Process {
        id: key(pid),
        pid,
        ppid: Some(s.ppid),
        lineage_parent,
        lineage: if lineage_parent.is_some() { LineageKnown::Known } else { LineageKnown::Unknown },
        adopter: None,
        state: if zombie { State::Zombie } else { State::Running },
        kernel_state: None,
        orphan: lineage_parent.is_some_and(|l| l.pid != s.ppid),
        state_s: 42.0,
        started: String::new(),
        comm: OutsideText::from_bytes(s.comm.bytes()),
        exe: None,
        argv: p.argv(pid).unwrap_or_default().iter().map(|a| OutsideText::from_bytes(a)).collect(),
        uid: Some(0),
        job: None,
        jobs: Vec::new(),
        container: None,
        cgroup: None,
        pid_ns: None,
        ns_pid: None,
        kernel_thread: false,
        exit: None,
        children: Vec::new(),
        elided: 0,
        argv_cut: false,
    }
}

/// A process that has been reaped.
fn reaped(key: Key, lineage_parent: Option<Key>, exit: Exit) -> Process {
    let me = process(std::process::id(), lineage_parent);
    let (state, comm) = (State::Gone, "dead".into());
    Process {
        id: key,
        pid: key.pid,
        ppid: None,
        lineage_parent,
        state,
        comm,
        exit: Some(exit),
        argv: Vec::new(),
        ..me
    }
}

fn by_signal(name: &str, sender: Option<Ref>) -> Exit {
    Exit::Signal { signal: name.into(), core: false, sender }
}

fn question(subject: Process, family: Vec<Process>) -> Question {
    Question { subject, family, signals: Vec::new(), lost: None, alert: None }
}

fn in_job(q: &mut Question, root: Key) -> JobId {
    let job = JobId { root, ordinal: 1 };
    for p in std::iter::once(&mut q.subject).chain(&mut q.family) {
        p.job = Some(job);
        p.jobs = vec![job];
    }
    job
}

fn sent(signal: u8, sender: &Process, target: &Process, result: SignalResult) -> SignalSeen {
    let (sender, target) = (Some(sender.to_ref()), target.to_ref());
    SignalSeen { at: 1, signal, by: SignalBy::Process, sender, target, result }
}

fn ask(q: &Question) -> Cause {
    let proc = Proc::default();
    ask_by(q, &proc, &ProcHolders(proc.clone()))
}

fn ask_by(q: &Question, proc: &Proc, holders: &dyn Holders) -> Cause {
    let cause = explain(q, proc, holders, &Limits::default());
    assert!(cause.summary.lines().count() <= 3 && !cause.summary.is_empty(), "{}", cause.summary);
    assert!(!cause.remedy.is_empty(), "{cause:?}");
    cause
}

/// The zombie of a parent, asked with its lineage known.
fn ask_zombie(zombie: u32, parent: u32) -> Cause {
    until_zombie(zombie);
    let parent = process(parent, None);
    ask(&question(process(zombie, Some(parent.id)), vec![parent]))
}

fn holders<'a>(c: &'a Cause) -> Vec<(u32, &'a str, &'a str)> {
    let one = |e: &'a Evidence| match e {
        Evidence::Holder { process, inode, relation, .. } => {
            Some((process.pid, inode.raw(), relation.as_str()))
        }
        _ => None,
    };
    c.evidence.iter().filter_map(one).collect()
}

/// Syscall, fd and inode of the first `blocked`.
fn blocked_in(c: &Cause) -> (&str, Option<u32>, &str) {
    let found = c.evidence.iter().find_map(|e| match e {
        Evidence::Blocked { syscall, fd, inode, .. } => {
            Some((syscall.as_str(), *fd, inode.as_ref().map_or("", OutsideText::raw)))
        }
        _ => None,
    });
    found.unwrap_or_else(|| panic!("nothing blocked in {c:#?}"))
}

fn waits_for(c: &Cause) -> Vec<u32> {
    let one = |e: &Evidence| if let Evidence::WaitsFor { process } = e { Some(process.pid) } else { None };
    c.evidence.iter().filter_map(one).collect()
}
