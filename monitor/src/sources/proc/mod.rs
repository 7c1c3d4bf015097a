//! A reader of /proc with an injected root. Every file may vanish or be empty between two reads: each call can fail
//! and none panics. It knows nothing of the forest.
//!
//! What the kernel guards by `ptrace_may_access` is given only to an audience that may see it ([`Proc::for_audience`]), and
//! what another process can hold up is read in a thread of its own, with a time limit ([`blocking`]).

use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use crate::model::argv::split_argv;
use crate::model::audience::Audience;
use crate::model::event::Comm;

pub mod blocking;
pub mod credentials;
pub mod fd;
pub mod task;

pub use credentials::{Credentials, Incarnation};
pub use fd::{EpollItem, FdInfo, FdLink};
pub use task::{InSyscall, Mount};

/// /proc, or a folder that looks like it.
#[derive(Clone, Debug)]
pub struct Proc {
    root: PathBuf,
    audience: Audience,
}

impl Default for Proc {
    fn default() -> Self {
        Self::at("/proc")
    }
}

/// What is used of /proc/PID/stat (`proc_pid_stat(5)`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    pub pid: u32,
    pub comm: Comm,
    /// `R`, `S`, `D`, `T`, `t`, `Z`, `X`, `I`.
    pub state: u8,
    pub ppid: u32,
    pub pgrp: i32,
    pub session: i32,
    pub tty: i32,
    pub flags: u32,
    /// Clock ticks, user and system.
    pub cpu_ticks: u64,
    pub threads: u32,
    /// Clock ticks since boot (of this time namespace): a first sieve, no identity.
    pub start_ticks: u64,
}

/// What is used of /proc/PID/status.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    pub tgid: u32,
    pub ppid: u32,
    pub tracer: u32,
    pub uid: Option<u32>,
    pub threads: u32,
    /// The pid in each namespace, outermost (the reader's) first.
    pub ns_pids: Vec<u32>,
    pub blocked: u64,
    pub ignored: u64,
    pub caught: u64,
    pub pending: u64,
    pub shared_pending: u64,
    /// How often it gave up the CPU by itself: unchanged between two looks, it has slept all the while.
    pub switches: u64,
}

/// Whether an error of a read below /proc/PID says that there is no such process; any other one says nothing about it.
#[must_use]
pub fn is_absence(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

fn bad(what: &str, path: &Path) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{}: {what}", path.display()))
}

/// Parses /proc/PID/stat. The comm stands in brackets and may itself hold brackets, blanks and newlines, so it ends
/// at the last `)`.
#[must_use]
pub fn parse_stat(b: &[u8]) -> Option<Stat> {
    let open = b.iter().position(|&c| c == b'(')?;
    let close = b.iter().rposition(|&c| c == b')')?;
    let pid = std::str::from_utf8(b.get(..open)?).ok()?.trim().parse().ok()?;
    let comm = Comm::from_bytes(b.get(open + 1..close)?);
    let rest = std::str::from_utf8(b.get(close + 1..)?).ok()?;
    let f: Vec<&str> = rest.split_ascii_whitespace().collect();
    let num = |i: usize| f.get(i).and_then(|s| s.parse::<i64>().ok());
    Some(Stat {
        pid,
        comm,
        state: *f.first()?.as_bytes().first()?,
        ppid: num(1)?.try_into().ok()?,
        pgrp: num(2)?.try_into().ok()?,
        session: num(3)?.try_into().ok()?,
        tty: num(4)?.try_into().ok()?,
        flags: num(6)?.try_into().ok()?,
        cpu_ticks: f.get(11)?.parse::<u64>().ok()?.saturating_add(f.get(12)?.parse().ok()?),
        threads: num(17)?.try_into().ok()?,
        start_ticks: f.get(19)?.parse().ok()?,
    })
}

/// Parses /proc/PID/status; lines that are missing or odd leave their default.
#[must_use]
pub fn parse_status(b: &[u8]) -> Status {
    let mut s = Status::default();
    for line in b.split(|&c| c == b'\n') {
        let Ok(line) = std::str::from_utf8(line) else { continue };
        let Some((name, value)) = line.split_once(':') else { continue };
        let value = value.trim();
        let first = || value.split_ascii_whitespace().next().and_then(|v| v.parse::<u32>().ok());
        let mask = || u64::from_str_radix(value, 16).unwrap_or(0);
        match name {
            "Tgid" => s.tgid = first().unwrap_or(0),
            "PPid" => s.ppid = first().unwrap_or(0),
            "TracerPid" => s.tracer = first().unwrap_or(0),
            "Uid" => s.uid = first(),
            "Threads" => s.threads = first().unwrap_or(0),
            "NSpid" => s.ns_pids = value.split_ascii_whitespace().filter_map(|v| v.parse().ok()).collect(),
            "SigBlk" => s.blocked = mask(),
            "SigIgn" => s.ignored = mask(),
            "SigCgt" => s.caught = mask(),
            "SigPnd" => s.pending = mask(),
            "ShdPnd" => s.shared_pending = mask(),
            "voluntary_ctxt_switches" => s.switches = value.parse().unwrap_or(0),
            _ => {}
        }
    }
    s
}

impl Proc {
    #[must_use]
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), audience: Audience::Full }
    }

    /// The same, for what is shown to this audience: a read of what it may not see is refused, as the kernel would refuse it.
    #[must_use]
    pub fn for_audience(&self, audience: Audience) -> Self {
        Self { root: self.root.clone(), audience }
    }

    /// `ROOT/PID/NAME`.
    #[must_use]
    pub fn path(&self, pid: u32, name: &str) -> PathBuf {
        self.root.join(pid.to_string()).join(name)
    }

    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn stat(&self, pid: u32) -> io::Result<Stat> {
        let p = self.path(pid, "stat");
        parse_stat(&read(&p)?).ok_or_else(|| bad("not in the form of proc_pid_stat(5)", &p))
    }

    /// Of a thread of `pid`.
    pub fn thread_stat(&self, pid: u32, tid: u32) -> io::Result<Stat> {
        let p = self.path(pid, &format!("task/{tid}/stat"));
        parse_stat(&read(&p)?).ok_or_else(|| bad("not in the form of proc_pid_stat(5)", &p))
    }

    pub fn status(&self, pid: u32) -> io::Result<Status> {
        Ok(parse_status(&read(&self.path(pid, "status"))?))
    }

    /// Empty for kernel threads and zombies.
    pub fn argv(&self, pid: u32) -> io::Result<Vec<Vec<u8>>> {
        Ok(split_argv(&self.cmdline(pid, u64::MAX)?).map(<[u8]>::to_vec).collect())
    }

    /// The first `most` bytes of /proc/PID/cmdline, which may have megabytes. It lies in the process's memory.
    pub fn cmdline(&self, pid: u32, most: u64) -> io::Result<Vec<u8>> {
        self.in_time(pid, "cmdline", move |path| read_most(&path, most))
    }

    /// The same of /proc/PID/environ.
    pub fn environ(&self, pid: u32, most: u64) -> io::Result<Vec<u8>> {
        self.guarded(pid, || self.in_time(pid, "environ", move |path| read_most(&path, most)))
    }

    /// A read that the process can hold up, with its time limit.
    fn in_time<T: Send + 'static>(
        &self,
        pid: u32,
        name: &str,
        read: impl FnOnce(PathBuf) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let what = match name.split('/').next() {
            Some("cmdline" | "environ" | "maps" | "mem") => "memory",
            Some("fdinfo") => "descriptors",
            Some("task") => "threads",
            Some("mountinfo") => "mounts",
            _ => "paths",
        };
        let (dir, path) = (self.path(pid, ""), self.path(pid, name));
        blocking::run(pid, what, &dir, blocking::LIMIT, move || read(path))
    }

    /// The resolved path; ` (deleted)` is left as the kernel gives it.
    pub fn exe(&self, pid: u32) -> io::Result<PathBuf> {
        self.guarded(pid, || std::fs::read_link(self.path(pid, "exe")))
    }

    /// Process ids, in no order. A pid that vanishes meanwhile may be in it or not.
    pub fn pids(&self) -> io::Result<Vec<u32>> {
        numbers(&self.root)
    }

    /// Thread ids of a process.
    pub fn threads(&self, pid: u32) -> io::Result<Vec<u32>> {
        numbers(&self.path(pid, "task"))
    }

    /// Whether any thread of the process is not dead (state other than Z and X). A process that is gone has none.
    #[must_use]
    pub fn has_live_thread(&self, pid: u32) -> bool {
        let Ok(tids) = self.threads(pid) else { return false };
        tids.iter().any(|&t| self.thread_stat(pid, t).is_ok_and(|s| !matches!(s.state, b'Z' | b'X' | b'x')))
    }
}

/// A file of /proc, whole. It has no size that could be asked for, and is mostly smaller than the buffer: one read, and one that
/// says that this was all.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = std::fs::File::open(path)?;
    let (mut all, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(all),
            Ok(n) => all.extend_from_slice(&buffer[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

fn read_most(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let mut all = Vec::new();
    std::fs::File::open(path)?.take(most).read_to_end(&mut all)?;
    Ok(all)
}

fn numbers(dir: &Path) -> io::Result<Vec<u32>> {
    let mut v = Vec::new();
    for e in std::fs::read_dir(dir)? {
        if let Some(n) = e?.file_name().to_str().and_then(|s| s.parse().ok()) {
            v.push(n);
        }
    }
    Ok(v)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_with_brackets_blanks_and_newlines_in_comm() {
        let s = parse_stat(b"12 (a) b\n(c) S 1 12 12 34816 12 4194560 5 6 7 8 9 10 11 12 20 0 3 0 777 1 2 3")
            .unwrap();
        assert_eq!((s.pid, s.comm.bytes(), s.state, s.ppid), (12, &b"a) b\n(c"[..], b'S', 1));
        assert_eq!((s.threads, s.start_ticks, s.cpu_ticks), (3, 777, 19));
        for bad in [&b""[..], b"1", b"1 (", b"1 (a) ", b"x (a) S 1", b") 1 ("] {
            assert_eq!(parse_stat(bad), None);
        }
    }

    #[test]
    fn own_process() {
        let p = Proc::default();
        let me = std::process::id();
        assert_eq!(p.stat(me).unwrap().pid, me);
        assert_eq!(p.status(me).unwrap().tgid, me);
        assert!(p.has_live_thread(me));
        assert!(p.stat(u32::MAX).is_err());
    }
}
