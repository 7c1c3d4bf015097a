//! The files that a thread waits on, and who holds their other ends.

use super::family::{Closeness, Family, Relation};
use super::holders::{FdRow, rows_of};
use crate::model::key::Key;
use crate::model::outside::OutsideText;
use crate::model::schema::Ref;
use crate::sources::proc::{FdLink, Stat};

/// Files of one poll, select or epoll set that are looked at.
const SET: usize = 256;
/// Inodes in one question to the kernel (what the iterator's map holds).
const AT_ONCE: usize = monitor_abi::INODES_MAX as usize;
/// Holders of one end that are named.
const HOLDERS: usize = 32;
/// epoll instances may watch each other (5 deep, in the kernel).
const NESTED: u8 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Want {
    Read,
    Write,
    /// Neither: a lock, a connection.
    Other,
}

#[derive(Clone, Debug)]
pub(super) struct End {
    pub fd: u32,
    pub want: Want,
    /// What /proc/PID/fd says.
    pub link: FdLink,
    pub kind: Kind,
    /// Others who hold the other end.
    pub holders: Vec<Holder>,
    /// The process holds the other end itself as well, with this file.
    pub own: Option<u32>,
    /// `fs of source on mount point`, for other files.
    pub mount: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Pipe,
    /// A named pipe: device and inode.
    Fifo(u64, u64),
    SocketPair(Option<u64>),
    /// A unix socket with a name, or none at all: a connection to a server.
    Socket(Option<u64>),
    /// The master of terminal N, on the file system with that device number, if it can be told.
    Master(u32),
    /// Terminal N.
    Slave(u32),
    Pidfd(i32),
    Other,
}

impl Kind {
    /// Whether only who holds the other end can end the wait.
    pub(super) const fn is_pipe(self) -> bool {
        matches!(self, Self::Pipe | Self::Fifo(..) | Self::SocketPair(_) | Self::Master(_) | Self::Slave(_))
    }

    /// The same, before sock_diag has been asked.
    pub(super) const fn may_be_pipe(self) -> bool {
        self.is_pipe() || matches!(self, Self::Socket(None))
    }
}

#[derive(Clone, Debug)]
pub(super) struct Holder {
    pub who: Ref,
    pub fd: u32,
    pub mode: &'static str,
    pub inode: OutsideText,
    pub relation: Relation,
}

/// Terminal numbers: `(major - 136) * 256 + minor` (Documentation/admin-guide/devices.txt).
const UNIX98_SLAVES: std::ops::RangeInclusive<u32> = 136..=143;
/// devpts gives terminal N the inode N + 3, and `ptmx` 2 (fs/devpts/inode.c).
const DEVPTS_FIRST: u64 = 3;
const DEVPTS_PTMX: u64 = 2;

struct Node {
    mode: u32,
    rdev: (u32, u32),
    dev: u64,
    inode: u64,
}

impl Family<'_> {
    fn node(&self, pid: u32, name: &str) -> Option<Node> {
        let s = self.proc.attributes(pid, name).ok()?;
        Some(Node {
            mode: u32::from(s.stx_mode),
            rdev: (s.stx_rdev_major, s.stx_rdev_minor),
            dev: u64::from(s.stx_dev_major) << 32 | u64::from(s.stx_dev_minor),
            inode: s.stx_ino,
        })
    }

    pub(super) fn end(&self, pid: u32, fd: u32, want: Want) -> Option<End> {
        let link = self.proc.fd_link(pid, fd).ok()?;
        let mut end = End { fd, want, kind: Kind::Other, holders: Vec::new(), own: None, mount: None, link };
        end.kind = match &end.link {
            FdLink::Pipe(_) => Kind::Pipe,
            FdLink::Socket(_) => Kind::Socket(None),
            FdLink::Anon(s) if s == "[pidfd]" => {
                Kind::Pidfd(self.proc.fdinfo(pid, fd).ok().and_then(|f| f.pid).unwrap_or(-1))
            }
            // From Linux 6.9 on pidfds have a file system of their own.
            FdLink::Path(p) if p.to_str().is_some_and(|p| p.starts_with("pidfd:")) => {
                Kind::Pidfd(self.proc.fdinfo(pid, fd).ok().and_then(|f| f.pid).unwrap_or(-1))
            }
            FdLink::Anon(_) => Kind::Other,
            FdLink::Path(_) => self.path_kind(pid, fd, &mut end.mount),
        };
        Some(end)
    }

    fn path_kind(&self, pid: u32, fd: u32, mount: &mut Option<String>) -> Kind {
        let info = self.proc.fdinfo(pid, fd).unwrap_or_default();
        let Some(node) = self.node(pid, &format!("fd/{fd}")) else { return Kind::Other };
        match node.mode & libc::S_IFMT {
            libc::S_IFIFO => Kind::Fifo(node.dev, node.inode),
            libc::S_IFCHR if node.rdev == (5, 2) => info.tty_index.map_or(Kind::Other, Kind::Master),
            libc::S_IFCHR if UNIX98_SLAVES.contains(&node.rdev.0) => {
                Kind::Slave((node.rdev.0 - UNIX98_SLAVES.start()) * 256 + node.rdev.1)
            }
            // /dev/tty: the terminal of its session.
            libc::S_IFCHR if node.rdev == (5, 0) => {
                self.proc.stat(pid).ok().and_then(|s| terminal(s.tty)).map_or(Kind::Other, Kind::Slave)
            }
            _ => {
                let found = info.mount.and_then(|id| self.proc.mount(pid, id));
                *mount = found.map(|m| format!("{} ({} of {})", m.point, m.fs, m.source));
                Kind::Other
            }
        }
    }

    /// The set of a poll or ppoll, from the process's memory.
    pub(super) fn polled(&self, pid: u32, at: u64, count: u64) -> Vec<End> {
        let mut buf = vec![0; (count as usize).min(SET) * 8];
        if self.proc.memory(pid, at, &mut buf).is_err() {
            return Vec::new();
        }
        let entry = |c: &[u8]| {
            let fd = i32::from_ne_bytes(c.get(..4)?.try_into().ok()?);
            let events = i16::from_ne_bytes(c.get(4..6)?.try_into().ok()?);
            Some((u32::try_from(fd).ok()?, u32::from(events as u16)))
        };
        let set = buf.chunks_exact(8).filter_map(entry);
        set.filter_map(|(fd, events)| self.end(pid, fd, wanted(events))).collect()
    }

    /// The sets of a select or pselect6.
    pub(super) fn selected(&self, pid: u32, args: [u64; 6]) -> Vec<End> {
        let count = (args[0] as usize).min(1024);
        let mut ends = Vec::new();
        for (at, want) in [(args[1], Want::Read), (args[2], Want::Write)] {
            let mut bits = vec![0; count.div_ceil(8)];
            if at == 0 || self.proc.memory(pid, at, &mut bits).is_err() {
                continue;
            }
            let set = (0..count).filter(|fd| bits.get(fd / 8).is_some_and(|b| b & 1 << (fd % 8) != 0));
            ends.extend(set.take(SET).filter_map(|fd| self.end(pid, fd as u32, want)));
        }
        ends
    }

    /// What an epoll instance watches, by its fdinfo.
    pub(super) fn epolled(&self, pid: u32, epfd: u32, depth: u8) -> Vec<End> {
        let mut ends = Vec::new();
        for item in self.proc.fdinfo(pid, epfd).unwrap_or_default().epoll.into_iter().take(SET) {
            let Some(end) = self.end(pid, item.fd, wanted(item.events)) else { continue };
            let still = match &end.link {
                // The number may belong to another file since it was added.
                FdLink::Pipe(n) | FdLink::Socket(n) => item.inode.is_none_or(|i| i == *n),
                FdLink::Anon(_) | FdLink::Path(_) => true,
            };
            if matches!(&end.link, FdLink::Anon(s) if s == "[eventpoll]") && depth < NESTED {
                ends.extend(self.epolled(pid, item.fd, depth + 1));
            } else if still {
                ends.push(end);
            }
        }
        ends
    }
}

/// `tty_nr` of stat to the number of a Unix98 terminal.
fn terminal(tty: i32) -> Option<u32> {
    let tty = tty as u32;
    let (major, minor) = (tty >> 8 & 0xfff, tty & 0xff | tty >> 12 & 0xfff00);
    UNIX98_SLAVES.contains(&major).then(|| (major - UNIX98_SLAVES.start()) * 256 + minor)
}

fn wanted(events: u32) -> Want {
    const IN: u32 = libc::POLLIN as u32 | libc::POLLPRI as u32 | libc::POLLHUP as u32;
    const OUT: u32 = libc::POLLOUT as u32;
    if events & IN != 0 || events & OUT == 0 { Want::Read } else { Want::Write }
}

/// Finds who holds the other ends: one question to the kernel for all of them, PID 1 by /proc (the iterator may leave
/// it out), each answer compared with /proc.
pub(super) fn attach(
    f: &Family<'_>,
    me: &Stat,
    zombie: Key,
    ends: &mut [&mut End],
    unread: &mut Vec<String>,
) {
    socket_peers(f, me.pid, ends, unread);
    let mut inodes: Vec<u64> = ends.iter().flat_map(|e| other_inodes(f, me.pid, e)).collect();
    inodes.sort_unstable();
    inodes.dedup();
    if inodes.is_empty() {
        return;
    }
    let asked: std::io::Result<Vec<Vec<FdRow>>> =
        inodes.chunks(AT_ONCE).map(|i| f.holders.holders(i)).collect();
    let mut rows = asked.map_or_else(
        |e| {
            unread.push(format!("the kernel's iterator over open files: {e}"));
            super::ProcHolders(f.proc.clone()).holders(&inodes).unwrap_or_default()
        },
        |rows| rows.concat(),
    );
    if me.pid != 1 && !rows.iter().any(|r| r.process.pid == 1) {
        rows.extend(rows_of(f.proc, 1, &inodes));
    }
    for end in ends.iter_mut() {
        let mut others: Vec<(Stat, FdRow, OutsideText)> = Vec::new();
        for row in &rows {
            let Some(inode) = verified(f, me.pid, end, row) else { continue };
            if row.process.pid == me.pid {
                end.own = Some(row.fd);
            } else if let Ok(stat) = f.proc.stat(row.process.pid)
                && others.len() < HOLDERS
                // One file of a process is enough.
                && !others.iter().any(|(s, ..)| s.pid == stat.pid)
            {
                others.push((stat, *row, inode));
            }
        }
        end.holders =
            others.into_iter().map(|(stat, row, inode)| holder(f, me, zombie, &stat, &row, inode)).collect();
        // The nearest first: they are the likeliest cause, and the ones that are followed.
        end.holders.sort_by_key(|h| std::cmp::Reverse((h.relation.closeness, h.relation.orphan)));
    }
}

use super::Holders as _;

fn holder(f: &Family<'_>, me: &Stat, zombie: Key, stat: &Stat, row: &FdRow, inode: OutsideText) -> Holder {
    let who = f.name_of(stat);
    let relation = f.relation(who.id, stat, zombie, me);
    let mode = match (row.read, row.write) {
        (true, false) => "r",
        (false, true) => "w",
        _ => "rw",
    };
    Holder { who, fd: row.fd, mode, inode, relation }
}

/// Fills in the peers of unix sockets.
fn socket_peers(f: &Family<'_>, pid: u32, ends: &mut [&mut End], unread: &mut Vec<String>) {
    let mut sockets: Vec<(&mut Kind, u32)> = Vec::new();
    for end in ends.iter_mut() {
        if let (Kind::Socket(None), FdLink::Socket(n)) = (end.kind, &end.link)
            && let Ok(n) = u32::try_from(*n)
        {
            sockets.push((&mut end.kind, n));
        }
    }
    if sockets.is_empty() {
        return;
    }
    let inodes: Vec<u32> = sockets.iter().map(|s| s.1).collect();
    match super::unix::peers(f.proc, pid, &inodes) {
        Ok(peers) => {
            for ((kind, _), peer) in sockets.iter_mut().zip(peers) {
                match peer {
                    Some(p) if p.named => **kind = Kind::Socket(p.inode),
                    Some(p) => **kind = Kind::SocketPair(p.inode),
                    None => {}
                }
            }
        }
        Err(e) => unread.push(format!("the peers of unix sockets: {e}")),
    }
}

/// Inode numbers under which the other end may be open.
fn other_inodes(f: &Family<'_>, pid: u32, end: &End) -> Vec<u64> {
    match (end.kind, &end.link) {
        (Kind::Pipe, FdLink::Pipe(n)) => vec![*n],
        (Kind::Fifo(_, n) | Kind::SocketPair(Some(n)) | Kind::Socket(Some(n)), _) => vec![n],
        (Kind::Master(n), _) => vec![DEVPTS_FIRST + u64::from(n)],
        (Kind::Slave(_), _) => {
            let mut v = vec![DEVPTS_PTMX];
            v.extend(
                ["root/dev/ptmx", "root/dev/pts/ptmx"].iter().filter_map(|p| Some(f.node(pid, p)?.inode)),
            );
            v
        }
        _ => Vec::new(),
    }
}

/// Whether the row is the other end of `end`: the file in /proc is compared, since inode numbers are unique only within a
/// file system and the row may be old. Gives the text of the holder's link.
fn verified(f: &Family<'_>, pid: u32, end: &End, row: &FdRow) -> Option<OutsideText> {
    let fits = match end.want {
        Want::Read => row.write,
        Want::Write => row.read,
        Want::Other => false,
    };
    let two_sided = !matches!(end.kind, Kind::Pipe | Kind::Fifo(..));
    if !(fits || two_sided) {
        return None;
    }
    let holder = row.process.pid;
    let link = f.proc.fd_link(holder, row.fd).ok()?;
    let text = link.text();
    let path = || f.node(holder, &format!("fd/{}", row.fd));
    let is_it = match (end.kind, &link) {
        (Kind::Pipe, FdLink::Pipe(_)) => link == end.link,
        (Kind::SocketPair(peer) | Kind::Socket(peer), FdLink::Socket(n)) => peer == Some(*n),
        (Kind::Fifo(dev, inode), FdLink::Path(_)) => path().is_some_and(|n| (n.dev, n.inode) == (dev, inode)),
        (Kind::Master(_), FdLink::Path(_)) => path().is_some_and(|n| {
            UNIX98_SLAVES.contains(&n.rdev.0) && same_terminals(f, pid, end.fd, n.dev) && {
                let number = (n.rdev.0 - UNIX98_SLAVES.start()) * 256 + n.rdev.1;
                end.kind == Kind::Master(number)
            }
        }),
        (Kind::Slave(n), FdLink::Path(_)) => {
            f.proc.fdinfo(holder, row.fd).is_ok_and(|i| i.tty_index == Some(n))
                && f.node(pid, &format!("fd/{}", end.fd))
                    .is_some_and(|slave| same_terminals(f, holder, row.fd, slave.dev))
        }
        _ => false,
    };
    is_it.then_some(text)
}

/// Whether a master and a terminal on the devpts with device number `dev` belong together: containers have a devpts of
/// their own, with terminals of the same numbers. A master that was opened by a node outside devpts may be of any.
fn same_terminals(f: &Family<'_>, pid: u32, master: u32, dev: u64) -> bool {
    f.node(pid, &format!("fd/{master}")).is_none_or(|m| m.inode != DEVPTS_PTMX || m.dev == dev)
}

/// The nearest of all holders.
pub(super) fn nearest(ends: &[End]) -> Option<Closeness> {
    ends.iter().filter(|e| e.kind.is_pipe()).flat_map(|e| &e.holders).map(|h| h.relation.closeness).max()
}
