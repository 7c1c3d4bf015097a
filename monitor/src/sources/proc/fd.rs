//! Open files as /proc/PID/fd and /proc/PID/fdinfo give them (`proc_pid_fd(5)`, `proc_pid_fdinfo(5)`).

use std::io;
use std::path::PathBuf;

use rustix::fs::{AtFlags, Statx, StatxFlags};

use super::Proc;
use crate::model::outside::OutsideText;

/// What a link in /proc/PID/fd says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FdLink {
    Pipe(u64),
    Socket(u64),
    /// `[eventpoll]`, `[eventfd]`, `[pidfd]`, ..
    Anon(String),
    Path(PathBuf),
}

impl FdLink {
    /// As /proc has it.
    #[must_use]
    pub fn text(&self) -> OutsideText {
        match self {
            Self::Pipe(n) => format!("pipe:[{n}]").into(),
            Self::Socket(n) => format!("socket:[{n}]").into(),
            Self::Anon(s) => format!("anon_inode:{s}").into(),
            Self::Path(p) => p.as_path().into(),
        }
    }
}

impl std::fmt::Display for FdLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.text().fmt(f)
    }
}

/// Parses the text of such a link.
#[must_use]
pub fn parse_link(path: PathBuf) -> FdLink {
    let bracketed = |s: &str, name| s.strip_prefix(name)?.strip_suffix(']')?.parse().ok();
    let Some(s) = path.to_str() else { return FdLink::Path(path) };
    if let Some(n) = bracketed(s, "pipe:[") {
        FdLink::Pipe(n)
    } else if let Some(n) = bracketed(s, "socket:[") {
        FdLink::Socket(n)
    } else if let Some(kind) = s.strip_prefix("anon_inode:") {
        FdLink::Anon(kind.to_owned())
    } else {
        FdLink::Path(path)
    }
}

/// One watched file of an epoll instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EpollItem {
    /// The number under which it was added: it may be another file by now, the inode decides.
    pub fd: u32,
    pub events: u32,
    /// Linux 4.13 and later.
    pub inode: Option<u64>,
}

/// What is used of /proc/PID/fdinfo/N.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FdInfo {
    /// `O_*`, as in `open(2)`.
    pub flags: u32,
    /// Linux 5.14 and later.
    pub inode: Option<u64>,
    /// `mnt_id`, as in mountinfo.
    pub mount: Option<u64>,
    /// Of a terminal's master side: N of /dev/pts/N.
    pub tty_index: Option<u32>,
    /// Of a pidfd: the process, in the reader's namespace; -1 once it is reaped.
    pub pid: Option<i32>,
    pub epoll: Vec<EpollItem>,
}

impl FdInfo {
    #[must_use]
    pub const fn readable(&self) -> bool {
        matches!(self.flags & 3, 0 | 2)
    }

    #[must_use]
    pub const fn writable(&self) -> bool {
        matches!(self.flags & 3, 1 | 2)
    }
}

/// Parses /proc/PID/fdinfo/N; lines that are missing or odd leave their default.
#[must_use]
pub fn parse_fdinfo(b: &[u8]) -> FdInfo {
    let mut f = FdInfo::default();
    for line in String::from_utf8_lossy(b).lines() {
        let Some((name, value)) = line.split_once(':') else { continue };
        let value = value.trim();
        match name {
            "flags" => f.flags = u32::from_str_radix(value, 8).unwrap_or(0),
            "ino" => f.inode = value.parse().ok(),
            "mnt_id" => f.mount = value.parse().ok(),
            "tty-index" => f.tty_index = value.parse().ok(),
            "Pid" => f.pid = value.parse().ok(),
            "tfd" => f.epoll.extend(parse_epoll(value)),
            _ => {}
        }
    }
    f
}

// `tfd:        5 events:       19 data:                5  pos:0 ino:6da7 sdev:e`: all but tfd and pos in hex.
fn parse_epoll(s: &str) -> Option<EpollItem> {
    let mut words = s.split_ascii_whitespace();
    let fd = words.next()?.parse().ok()?;
    let mut item = EpollItem { fd, events: 0, inode: None };
    let mut name = "";
    for w in words {
        let (n, value) = w.split_once(':').unwrap_or((name, w));
        name = n;
        match n {
            "events" if !value.is_empty() => item.events = u32::from_str_radix(value, 16).unwrap_or(0),
            "ino" if !value.is_empty() => item.inode = u64::from_str_radix(value, 16).ok(),
            _ => {}
        }
    }
    Some(item)
}

impl Proc {
    /// Open file descriptors of a process.
    pub fn fds(&self, pid: u32) -> io::Result<Vec<u32>> {
        self.guarded(pid, || super::numbers(&self.path(pid, "fd")))
    }

    pub fn fd_link(&self, pid: u32, fd: u32) -> io::Result<FdLink> {
        let link = self.guarded(pid, || std::fs::read_link(self.path(pid, &format!("fd/{fd}"))))?;
        Ok(parse_link(link))
    }

    pub fn fdinfo(&self, pid: u32, fd: u32) -> io::Result<FdInfo> {
        let name = format!("fdinfo/{fd}");
        // Of an epoll instance under its mutex, which the kernel holds while it copies events to a page that may be missing.
        let text = self.guarded(pid, || self.in_time(pid, &name, |path| super::read(&path)))?;
        Ok(parse_fdinfo(&text))
    }

    /// Attributes of the file behind a link in the process's folder (`fd/N`, `root/dev/ptmx`), as they are cached: a file server that
    /// is gone is not waited for.
    pub fn attributes(&self, pid: u32, name: &str) -> io::Result<Statx> {
        let stat = |path: PathBuf| {
            let flags = AtFlags::STATX_DONT_SYNC;
            Ok(rustix::fs::statx(rustix::fs::CWD, path, flags, StatxFlags::BASIC_STATS)?)
        };
        self.guarded(pid, || self.in_time(pid, name, stat))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links() {
        for (text, link) in [
            ("pipe:[12]", FdLink::Pipe(12)),
            ("socket:[7]", FdLink::Socket(7)),
            ("anon_inode:[eventpoll]", FdLink::Anon("[eventpoll]".into())),
            ("/tmp/x (deleted)", FdLink::Path("/tmp/x (deleted)".into())),
            ("pipe:[x]", FdLink::Path("pipe:[x]".into())),
        ] {
            assert_eq!(parse_link(text.into()), link);
            assert_eq!(link.to_string(), text);
        }
    }

    #[test]
    fn epoll_lines() {
        let f = parse_fdinfo(
            b"pos:\t0\nflags:\t02000002\nmnt_id:\t16\nino:\t1058\n\
              tfd:        5 events:       19 data:                5  pos:0 ino:6da7 sdev:e\n\
              tfd:       -1 events: x\ntfd:\n",
        );
        assert_eq!(f.epoll, [EpollItem { fd: 5, events: 0x19, inode: Some(0x6da7) }]);
        assert_eq!((f.inode, f.readable(), f.writable()), (Some(1058), true, true));
    }

    #[test]
    fn own_pipe() {
        let (r, w) = std::io::pipe().unwrap();
        let (p, me) = (Proc::default(), std::process::id());
        let info = |fd: &dyn std::os::fd::AsRawFd| p.fdinfo(me, fd.as_raw_fd() as u32).unwrap();
        assert!(info(&r).readable() && !info(&r).writable());
        assert!(info(&w).writable() && !info(&w).readable());
        let link = p.fd_link(me, std::os::fd::AsRawFd::as_raw_fd(&r) as u32).unwrap();
        assert_eq!(link, FdLink::Pipe(info(&w).inode.unwrap()));
    }
}
