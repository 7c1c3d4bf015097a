//! Who has a pipe, socket or terminal open: asked of the kernel's iterator, or, slower, of /proc.

use std::io;
use std::os::unix::fs::MetadataExt as _;

use crate::model::key::Key;
use crate::sources::proc::{FdLink, Proc};

/// An open file of a process. A hint: inode numbers are unique only within one file system, so the reader of rows
/// compares /proc/PID/fd/N before it believes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FdRow {
    pub process: Key,
    pub fd: u32,
    pub inode: u64,
    pub read: bool,
    pub write: bool,
}

/// What `why` asks of the kernel side, beside /proc.
pub trait Holders: Send + Sync {
    /// The open files with one of these inode numbers, of any file system, in all processes that the kernel's iterator
    /// returns (PID 1 may be missing: the caller looks at it by itself).
    fn holders(&self, inodes: &[u64]) -> io::Result<Vec<FdRow>>;

    /// The full-nanosecond keys of all processes, zombies included; asked once for an `explain`. None: only /proc's
    /// ticks are to be had.
    fn keys(&self) -> io::Result<Vec<Key>> {
        Ok(Vec::new())
    }

    /// The lineage parent, of a dead process too, as long as the kernel's maps remember it.
    fn lineage_parent(&self, _process: Key) -> io::Result<Option<Key>> {
        Ok(None)
    }
}

/// The fallback: reads every /proc/PID/fd (2 to 4 us a file).
#[derive(Clone, Debug, Default)]
pub struct ProcHolders(pub Proc);

impl Holders for ProcHolders {
    fn holders(&self, inodes: &[u64]) -> io::Result<Vec<FdRow>> {
        let mut rows = Vec::new();
        for pid in self.0.pids()? {
            rows.extend(rows_of(&self.0, pid, inodes));
        }
        Ok(rows)
    }
}

/// /proc gives the start in ticks of 10 ms only: good enough to name a process, not to signal it.
fn key_by_ticks(proc: &Proc, pid: u32) -> io::Result<Key> {
    Ok(Key::new(pid, proc.stat(pid)?.start_ticks * NS_PER_TICK))
}

/// `USER_HZ` is 100 on every architecture that Linux still has.
pub(crate) const NS_PER_TICK: u64 = 10_000_000;

/// The rows of one process; none if it is gone or may not be looked at.
pub(crate) fn rows_of(proc: &Proc, pid: u32, inodes: &[u64]) -> Vec<FdRow> {
    let Ok(fds) = proc.fds(pid) else { return Vec::new() };
    let mut rows = Vec::new();
    let mut key = None;
    for fd in fds {
        let path = proc.path(pid, &format!("fd/{fd}"));
        let (Some(inode), Ok(link)) = (inode_of(proc, pid, fd), std::fs::symlink_metadata(&path)) else {
            continue;
        };
        if inodes.contains(&inode) {
            let Some(process) = key.or_else(|| key_by_ticks(proc, pid).ok()) else { return rows };
            key = Some(process);
            // The link's own mode says how the file was opened: r-x, -wx, rwx.
            let (read, write) = (link.mode() & 0o400 != 0, link.mode() & 0o200 != 0);
            rows.push(FdRow { process, fd, inode, read, write });
        }
    }
    rows
}

/// From the link's text or fdinfo, never by `stat`: that would wait for a file server that is gone.
fn inode_of(proc: &Proc, pid: u32, fd: u32) -> Option<u64> {
    match proc.fd_link(pid, fd).ok()? {
        FdLink::Pipe(n) | FdLink::Socket(n) => Some(n),
        FdLink::Anon(_) => None,
        FdLink::Path(_) => proc.fdinfo(pid, fd).ok()?.inode,
    }
}
