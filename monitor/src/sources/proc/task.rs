//! What a thread is at: system call, wait channel, kernel stack, time on a CPU; and a process's children, user memory
//! and mounts.

use std::io::{self, Read as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};

use super::Proc;
use crate::model::outside::OutsideText;

/// /proc/PID/task/TID/syscall (`proc_pid_syscall(5)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InSyscall {
    /// On a CPU, or ready for one.
    Running,
    /// Blocked, but not in a system call: a page fault, say.
    Outside,
    Call {
        number: u64,
        args: [u64; 6],
        stack: u64,
    },
}

/// Parses it.
#[must_use]
pub fn parse_syscall(b: &[u8]) -> Option<InSyscall> {
    let text = std::str::from_utf8(b).ok()?.trim();
    if text == "running" {
        return Some(InSyscall::Running);
    }
    let mut words = text.split_ascii_whitespace();
    let Ok(number) = words.next()?.parse::<u64>() else {
        return text.starts_with("-1").then_some(InSyscall::Outside);
    };
    let mut hex = || u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok();
    let mut args = [0; 6];
    for a in &mut args {
        *a = hex()?;
    }
    Some(InSyscall::Call { number, args, stack: hex()? })
}

/// A line of /proc/PID/mountinfo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    pub id: u64,
    pub point: OutsideText,
    pub fs: OutsideText,
    pub source: OutsideText,
}

/// Parses one line (`proc_pid_mountinfo(5)`).
#[must_use]
pub fn parse_mount(line: &str) -> Option<Mount> {
    let (left, right) = line.split_once(" - ")?;
    let mut l = left.split(' ');
    let mut r = right.split(' ');
    Some(Mount {
        id: l.next()?.parse().ok()?,
        point: l.nth(3)?.into(),
        fs: r.next()?.into(),
        source: r.next()?.into(),
    })
}

impl Proc {
    fn thread_file(&self, pid: u32, tid: u32, name: &str) -> io::Result<Vec<u8>> {
        read_bounded(&self.path(pid, &format!("task/{tid}/{name}")))
    }

    pub fn thread_status(&self, pid: u32, tid: u32) -> io::Result<super::Status> {
        Ok(super::parse_status(&self.thread_file(pid, tid, "status")?))
    }

    pub fn syscall(&self, pid: u32, tid: u32) -> io::Result<InSyscall> {
        // It waits while the process executes a program, and that while its memory is held.
        let name = format!("task/{tid}/syscall");
        let b = self.guarded(pid, || self.in_time(pid, &name, |path| read_bounded(&path)))?;
        parse_syscall(&b).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "not in the form of proc_pid_syscall(5)")
        })
    }

    /// The kernel function it sleeps in; None if it does not sleep or the kernel does not tell.
    #[must_use]
    pub fn wchan(&self, pid: u32, tid: u32) -> Option<String> {
        let b = self.guarded(pid, || self.thread_file(pid, tid, "wchan")).ok()?;
        let s = String::from_utf8_lossy(&b).trim().to_owned();
        (!s.is_empty() && s != "0").then_some(s)
    }

    /// Kernel functions, innermost first (needs CAP_SYS_ADMIN).
    pub fn stack(&self, pid: u32, tid: u32) -> io::Result<Vec<String>> {
        let name = format!("task/{tid}/stack");
        let b = self.guarded(pid, || self.in_time(pid, &name, |path| read_bounded(&path)))?;
        let text = String::from_utf8_lossy(&b);
        Ok(text.lines().filter_map(|l| Some(l.split_once("] ")?.1.split('+').next()?.to_owned())).collect())
    }

    /// Nanoseconds on a CPU (CONFIG_SCHED_INFO).
    pub fn cpu_ns(&self, pid: u32, tid: u32) -> io::Result<u64> {
        let b = self.thread_file(pid, tid, "schedstat")?;
        let first = String::from_utf8_lossy(&b).split_ascii_whitespace().next().and_then(|s| s.parse().ok());
        first.ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Children that it would have to reap, of all its threads. Without CONFIG_PROC_CHILDREN every stat is read.
    pub fn children(&self, pid: u32) -> io::Result<Vec<u32>> {
        let mut found = Vec::new();
        for tid in self.threads(pid)? {
            match self.thread_file(pid, tid, "children") {
                Ok(b) => {
                    let text = String::from_utf8_lossy(&b);
                    found.extend(text.split_ascii_whitespace().filter_map(|s| s.parse::<u32>().ok()));
                }
                Err(_) if !self.path(pid, &format!("task/{tid}")).exists() => {}
                Err(_) => return self.children_by_scan(pid),
            }
        }
        Ok(found)
    }

    fn children_by_scan(&self, pid: u32) -> io::Result<Vec<u32>> {
        Ok(self.pids()?.into_iter().filter(|&p| self.stat(p).is_ok_and(|s| s.ppid == pid)).collect())
    }

    /// User memory at `at`, `buf.len()` bytes. The process is not stopped.
    pub fn memory(&self, pid: u32, at: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut own = vec![0; buf.len()];
        let read = move |path: std::path::PathBuf| {
            std::fs::File::open(path)?.read_exact_at(&mut own, at)?;
            Ok(own)
        };
        buf.copy_from_slice(&self.guarded(pid, || self.in_time(pid, "mem", read))?);
        Ok(())
    }

    /// The mount that holds a file, by fdinfo's `mnt_id`.
    #[must_use]
    pub fn mount(&self, pid: u32, id: u64) -> Option<Mount> {
        let b = self.in_time(pid, "mountinfo", |path| read_bounded(&path)).ok()?;
        String::from_utf8_lossy(&b).lines().filter_map(parse_mount).find(|m| m.id == id)
    }

    /// The mount that an absolute path of the process is on, by its longest prefix; the path is not looked up.
    #[must_use]
    pub fn mount_of(&self, pid: u32, path: &str) -> Option<Mount> {
        let b = self.in_time(pid, "mountinfo", |path| read_bounded(&path)).ok()?;
        let text = String::from_utf8_lossy(&b);
        let holds = |m: &Mount| std::path::Path::new(path).starts_with(m.point.raw());
        text.lines().filter_map(parse_mount).filter(holds).max_by_key(|m| m.point.raw().len())
    }

    /// Whether the process has mapped a file whose path contains `part`.
    #[must_use]
    pub fn maps(&self, pid: u32, part: &str) -> bool {
        let maps = self.guarded(pid, || self.in_time(pid, "maps", |path| read_bounded(&path)));
        maps.is_ok_and(|b| String::from_utf8_lossy(&b).contains(part))
    }
}

/// More than any of these files has, or than one `why` should read of it.
const MOST: u64 = 4 << 20;

/// Never waits on a FIFO that a fake root may hold.
fn read_bounded(path: &std::path::Path) -> io::Result<Vec<u8>> {
    let f = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let mut b = Vec::new();
    f.take(MOST).read_to_end(&mut b)?;
    Ok(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn syscall_lines() {
        let line = b"0 0x4 0x7f 0x1000 0x0 0x0 0x0 0x7ffc1 0x7fed2\n";
        let want = InSyscall::Call { number: 0, args: [4, 0x7f, 0x1000, 0, 0, 0], stack: 0x7_ffc1 };
        assert_eq!(parse_syscall(line), Some(want));
        assert_eq!(parse_syscall(b"running\n"), Some(InSyscall::Running));
        assert_eq!(parse_syscall(b"-1 0x7ffc 0x7fed\n"), Some(InSyscall::Outside));
        for bad in [&b""[..], b"0", b"0 0x4", b"0 4 5 6 7 8 9 1 2", b"\xff", b"x 0x1"] {
            assert_eq!(parse_syscall(bad), None);
        }
    }

    #[test]
    fn mount_lines() {
        let m =
            parse_mount("36 35 98:0 /m /mnt/n\\040x rw,noatime master:1 - nfs4 srv:/e rw,errors=x").unwrap();
        assert_eq!((m.id, m.point.raw(), m.fs.raw(), m.source.raw()), (36, "/mnt/n\\040x", "nfs4", "srv:/e"));
        assert_eq!(parse_mount("36 35 - "), None);
    }

    #[test]
    fn mount_of_a_path() {
        let m = Proc::default().mount_of(std::process::id(), "/proc/self/stat").unwrap();
        assert_eq!((m.point.raw(), m.fs.raw()), ("/proc", "proc"));
        assert_eq!(Proc::default().mount_of(std::process::id(), "relative"), None);
    }

    #[test]
    fn own_memory_children_and_cpu() {
        let (p, me) = (Proc::default(), std::process::id());
        let data = 0x1234_5678_u64;
        let mut buf = [0; 8];
        p.memory(me, (&raw const data) as u64, &mut buf).unwrap();
        assert_eq!(u64::from_ne_bytes(buf), data);
        assert!(p.memory(me, 8, &mut buf).is_err());
        assert!(p.cpu_ns(me, me).unwrap() > 0);
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let (listed, scanned) = (p.children(me), p.children_by_scan(me));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(listed.unwrap().contains(&child.id()) && scanned.unwrap().contains(&child.id()));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic(b in proptest::collection::vec(proptest::num::u8::ANY, 0..200), s in ".{0,80}") {
            let _ = (parse_syscall(&b), super::super::parse_stat(&b), super::super::parse_status(&b));
            let _ = (super::super::fd::parse_fdinfo(&b), parse_mount(&s), crate::model::argv::split_argv(&b).count());
            let _ = super::super::fd::parse_fdinfo(format!("tfd: {s}").as_bytes());
        }
    }
}
