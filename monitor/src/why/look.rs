//! What one process is doing at this moment: each thread's state, its system call, and the files or children that it
//! waits for. Facts only; the verdict is in `verdict`.

use std::io;

use super::ends::{self, End, Kind, Want};
use super::family::Family;
use super::syscalls;
use crate::model::key::Key;
use crate::model::outside::OutsideText;
use crate::model::schema::Ref;
use crate::sources::proc::{InSyscall, Stat, Status};

/// Threads whose system call is looked at; a process may have thousands.
const THREADS: usize = 64;
/// Children that are named.
const CHILDREN: usize = 8;

/// One process.
#[derive(Debug)]
pub(super) struct Look {
    pub who: Ref,
    pub stat: Stat,
    pub tracer: Option<Ref>,
    pub init: Option<Init>,
    pub status: Status,
    /// The live ones, the leader first.
    pub threads: Vec<Thread>,
    /// What could not be read.
    pub unread: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Init {
    Host,
    /// Of a container or another pid namespace.
    Namespace,
}

#[derive(Clone, Debug)]
pub(super) struct Thread {
    pub tid: u32,
    pub state: u8,
    pub wchan: Option<String>,
    pub switches: u64,
    pub cpu_ns: u64,
    /// The call's name; None when it is in none, or that may not be read.
    pub syscall: Option<String>,
    /// The path that the call was given.
    pub path: Option<OutsideText>,
    pub doing: Doing,
    /// Of the time between two looks, the share on a CPU; None after one look.
    pub cpu: Option<f64>,
    /// Between two looks it was in the same state and never woke.
    pub slept: bool,
}

#[derive(Clone, Debug)]
pub(super) enum Doing {
    Running,
    /// Reads, writes or polls. `direct`: one file, not a set.
    Files {
        ends: Vec<End>,
        direct: bool,
    },
    /// Any child that ends will do, the zombie too.
    AnyChild,
    /// Only these; the zombie is not among them.
    OtherChild(Vec<Ref>),
    Futex,
    Sleep,
    /// A vfork parent, until the child execs or exits.
    Vfork(Vec<Ref>),
    Other,
    Unknown,
}

// arch/x86/entry/syscalls/syscall_64.tbl
mod nr {
    pub(super) const READS: [u64; 10] = [0, 17, 19, 45, 47, 275, 276, 295, 299, 327];
    pub(super) const WRITES: [u64; 9] = [1, 18, 20, 40, 44, 46, 296, 307, 328];
    pub(super) const POLL: u64 = 7;
    pub(super) const SELECT: u64 = 23;
    pub(super) const NANOSLEEP: u64 = 35;
    pub(super) const CLONE: u64 = 56;
    pub(super) const FORK: u64 = 57;
    pub(super) const VFORK: u64 = 58;
    pub(super) const WAIT4: u64 = 61;
    pub(super) const FUTEX: u64 = 202;
    pub(super) const RESTART: u64 = 219;
    pub(super) const CLOCK_NANOSLEEP: u64 = 230;
    pub(super) const EPOLL_WAIT: u64 = 232;
    pub(super) const WAITID: u64 = 247;
    pub(super) const PSELECT6: u64 = 270;
    pub(super) const PPOLL: u64 = 271;
    pub(super) const EPOLL_PWAIT: u64 = 281;
    pub(super) const CLONE3: u64 = 435;
    pub(super) const EPOLL_PWAIT2: u64 = 441;
    pub(super) const FUTEX_WAITV: u64 = 449;
    pub(super) const FUTEX_WAIT: u64 = 455;
    /// Calls with a file in the first argument that may block otherwise: ioctl, fcntl, flock, fsync, accept, ..
    pub(super) const ON_FD: [u64; 9] = [16, 42, 43, 72, 73, 74, 75, 288, 426];

    /// Which argument is a path, of calls that may wait for a file server, a disk or the other side of a FIFO.
    pub(super) const fn path(number: u64) -> Option<usize> {
        match number {
            2 | 4 | 6 | 21 | 59 | 76 | 80 | 82..=92 => Some(0),
            257..=260 | 262 | 263 | 267..=269 | 332 | 437 | 439 => Some(1),
            _ => None,
        }
    }
}

impl Family<'_> {
    /// Looks at `pid`, who has `zombie` as a child or stands in the chain of those it waits for.
    pub(super) fn look(&self, pid: u32, zombie: Key) -> io::Result<Look> {
        let stat = self.proc.stat(pid)?;
        let mut unread = Vec::new();
        let status = self.proc.status(pid).unwrap_or_else(|e| {
            unread.push(format!("status of {pid}: {e}"));
            Status::default()
        });
        let init = match status.ns_pids.as_slice() {
            [1] => Some(Init::Host),
            [.., 1] => Some(Init::Namespace),
            _ => (pid == 1).then_some(Init::Host),
        };
        let mut look = Look {
            who: self.name_of(&stat),
            tracer: self.tracer(status.tracer),
            stat,
            init,
            status,
            threads: Vec::new(),
            unread,
        };
        let mut tids = self.proc.threads(pid)?;
        tids.sort_unstable_by_key(|&t| (t != pid, t));
        for tid in tids {
            if look.threads.len() == THREADS || self.late() {
                look.unread.push(format!("{pid} has more threads than were looked at"));
                break;
            }
            if let Some(t) = self.thread(&mut look, tid, zombie) {
                look.threads.push(t);
            }
        }
        self.attach_holders(&mut look, zombie);
        Ok(look)
    }

    fn thread(&self, look: &mut Look, tid: u32, zombie: Key) -> Option<Thread> {
        let pid = look.stat.pid;
        let state = self.proc.thread_stat(pid, tid).ok()?.state;
        if matches!(state, b'Z' | b'X' | b'x') {
            return None;
        }
        let mut t = Thread {
            tid,
            state,
            wchan: self.proc.wchan(pid, tid),
            switches: self.proc.thread_status(pid, tid).map_or(0, |s| s.switches),
            cpu_ns: self.proc.cpu_ns(pid, tid).unwrap_or(0),
            syscall: None,
            path: None,
            doing: Doing::Unknown,
            cpu: None,
            slept: false,
        };
        match self.proc.syscall(pid, tid) {
            Ok(InSyscall::Running) => t.doing = Doing::Running,
            Ok(InSyscall::Outside) => {}
            // A stack below 4 GiB is that of a 32-bit program, whose calls have other numbers.
            Ok(InSyscall::Call { number, args, stack }) if stack > u64::from(u32::MAX) => {
                t.syscall = Some(syscalls::name(number));
                if cfg!(target_arch = "x86_64") {
                    t.path = nr::path(number).and_then(|i| self.string(pid, args[i]));
                    t.doing = self.decode(look, &t, number, args, zombie);
                }
            }
            Ok(InSyscall::Call { .. }) => {
                look.unread.push(format!("{pid} is a 32-bit program: its system call"));
            }
            Err(e) => look.unread.push(format!("system call of thread {tid}: {e}")),
        }
        Some(t)
    }

    fn decode(&self, look: &Look, t: &Thread, number: u64, args: [u64; 6], zombie: Key) -> Doing {
        let pid = look.stat.pid;
        let number = if number == nr::RESTART { restarted(t.wchan.as_deref()) } else { number };
        let fd = args[0] as u32;
        let one = |want| Doing::Files { ends: self.end(pid, fd, want).into_iter().collect(), direct: true };
        match number {
            n if nr::READS.contains(&n) => one(Want::Read),
            n if nr::WRITES.contains(&n) => one(Want::Write),
            nr::POLL | nr::PPOLL => self.set(pid, self.polled(pid, args[0], args[1]), zombie),
            nr::SELECT | nr::PSELECT6 => self.set(pid, self.selected(pid, args), zombie),
            nr::EPOLL_WAIT | nr::EPOLL_PWAIT | nr::EPOLL_PWAIT2 => {
                self.set(pid, self.epolled(pid, fd, 0), zombie)
            }
            nr::WAIT4 => self.waits(look, wait4_target(args[0]), zombie),
            nr::WAITID => self.waits(look, self.waitid_target(pid, args), zombie),
            nr::FUTEX | nr::FUTEX_WAITV | nr::FUTEX_WAIT => Doing::Futex,
            nr::NANOSLEEP | nr::CLOCK_NANOSLEEP => Doing::Sleep,
            nr::CLONE | nr::FORK | nr::VFORK | nr::CLONE3 if t.state == b'D' => {
                Doing::Vfork(self.live_children(pid, |_| true))
            }
            n if nr::ON_FD.contains(&n) => one(Want::Other),
            _ => Doing::Other,
        }
    }

    /// A set of nothing but pidfds is a wait for those children.
    fn set(&self, pid: u32, ends: Vec<End>, zombie: Key) -> Doing {
        let pids: Vec<i32> =
            ends.iter().filter_map(|e| if let Kind::Pidfd(p) = e.kind { Some(p) } else { None }).collect();
        if pids.is_empty() || pids.len() < ends.len() {
            return Doing::Files { ends, direct: false };
        }
        if pids.contains(&(zombie.pid as i32)) {
            return Doing::AnyChild;
        }
        Doing::OtherChild(self.live_children(pid, |s| pids.contains(&(s.pid as i32))))
    }

    /// A C string of the process's memory; a page that is not there ends it.
    fn string(&self, pid: u32, at: u64) -> Option<OutsideText> {
        const PAGE: u64 = 4096;
        let mut buf = vec![0; (PAGE - at % PAGE).min(256) as usize];
        self.proc.memory(pid, at, &mut buf).ok()?;
        let end = buf.iter().position(|&b| b == 0).unwrap_or(buf.len());
        Some(OutsideText::from_bytes(buf.get(..end)?)).filter(|s| !s.raw().is_empty())
    }

    fn waits(&self, look: &Look, target: WaitFor, zombie: Key) -> Doing {
        let pid = look.stat.pid;
        let zombie_stat = self.proc.stat(zombie.pid).ok();
        let level = look.status.ns_pids.len().saturating_sub(1);
        match target {
            WaitFor::Any => Doing::AnyChild,
            WaitFor::NoExit => Doing::Other,
            WaitFor::Pid(p) => {
                // The number is one of the caller's own pid namespace.
                let is_it = |s: &Stat| self.pid_at(s.pid, level) == Some(p);
                if zombie_stat.as_ref().is_some_and(is_it) {
                    return Doing::AnyChild;
                }
                Doing::OtherChild(self.live_children(pid, is_it))
            }
            WaitFor::Group(g) => {
                // 0 is the caller's own group. Groups of another namespace are translated by their leader's pid.
                let group = if g == 0 { look.stat.pgrp } else { self.group_at(look, g, level) };
                if zombie_stat.is_some_and(|s| s.pgrp == group) {
                    return Doing::AnyChild;
                }
                Doing::OtherChild(self.live_children(pid, |s| s.pgrp == group))
            }
            WaitFor::Host(p) => {
                if zombie.pid == p {
                    return Doing::AnyChild;
                }
                Doing::OtherChild(self.live_children(pid, |s| s.pid == p))
            }
        }
    }

    /// The pid of `pid` at a level of nested namespaces, 0 being the reader's.
    fn pid_at(&self, pid: u32, level: usize) -> Option<u32> {
        self.proc.status(pid).ok()?.ns_pids.get(level).copied()
    }

    fn group_at(&self, look: &Look, group: u32, level: usize) -> i32 {
        let children = self.proc.children(look.stat.pid).unwrap_or_default();
        let leader = children.into_iter().find(|&c| self.pid_at(c, level) == Some(group));
        leader.map_or(group as i32, |c| c as i32)
    }

    pub(super) fn live_children(&self, pid: u32, wanted: impl Fn(&Stat) -> bool) -> Vec<Ref> {
        let children = self.proc.children(pid).unwrap_or_default();
        let stats = children.into_iter().filter_map(|c| self.proc.stat(c).ok());
        let named = stats.filter(|s| s.state != b'Z' && wanted(s)).take(CHILDREN);
        named.map(|s| self.name_of(&s)).collect()
    }

    fn waitid_target(&self, pid: u32, args: [u64; 6]) -> WaitFor {
        const WEXITED: u64 = 4;
        if args[3] & WEXITED == 0 {
            return WaitFor::NoExit;
        }
        let id = args[1] as u32;
        // P_ALL, P_PID, P_PGID, P_PIDFD
        match args[0] as u32 {
            1 => WaitFor::Pid(id),
            2 => WaitFor::Group(id),
            3 => match self.proc.fdinfo(pid, id).ok().and_then(|f| f.pid) {
                Some(p) if p > 0 => WaitFor::Host(p as u32),
                _ => WaitFor::NoExit,
            },
            _ => WaitFor::Any,
        }
    }

    /// Asks once for all ends of all threads who holds them.
    fn attach_holders(&self, look: &mut Look, zombie: Key) {
        let mut all: Vec<&mut End> = Vec::new();
        for t in &mut look.threads {
            if let Doing::Files { ends, .. } = &mut t.doing {
                all.extend(ends.iter_mut());
            }
        }
        ends::attach(self, &look.stat, zombie, &mut all, &mut look.unread);
    }
}

/// Whom a wait call wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WaitFor {
    Any,
    /// In the caller's namespace.
    Pid(u32),
    Group(u32),
    /// In the reader's namespace.
    Host(u32),
    /// Stops and continues only, or a pidfd of somebody reaped.
    NoExit,
}

fn wait4_target(arg: u64) -> WaitFor {
    match arg as i32 {
        -1 => WaitFor::Any,
        n if n >= 1 => WaitFor::Pid(n as u32),
        n => WaitFor::Group(n.unsigned_abs()),
    }
}

/// The call that `restart_syscall` goes on with; the registers still hold its arguments.
fn restarted(wchan: Option<&str>) -> u64 {
    match wchan {
        Some(w) if w.contains("poll") => nr::POLL,
        Some(w) if w.contains("futex") => nr::FUTEX,
        Some(w) if w.contains("nanosleep") => nr::NANOSLEEP,
        _ => nr::RESTART,
    }
}

impl Look {
    /// The leader, or, when it has exited, the oldest thread that lives.
    pub(super) fn main(&self) -> Option<&Thread> {
        self.threads.first()
    }

    /// Compares with an earlier look, `elapsed_ns` ago.
    pub(super) fn since(&mut self, earlier: &Self, elapsed_ns: u64) {
        for t in &mut self.threads {
            if let Some(e) = earlier.threads.iter().find(|e| e.tid == t.tid) {
                t.cpu = Some(t.cpu_ns.saturating_sub(e.cpu_ns) as f64 / elapsed_ns.max(1) as f64);
                t.slept = t.state == e.state && t.switches == e.switches && t.wchan == e.wchan;
            }
        }
    }
}
