//! Reads that another process can hold up: its memory (a page of it may lie on a file system whose server never answers),
//! files of /proc whose lock it can keep another task holding, paths below its own root.
//!
//! Each such read runs in a worker thread, and the caller waits for it no longer than its limit. A read that does not come back
//! keeps its thread: the kernel offers no way to interrupt a page fault on a FUSE file. So the number of blocked reads is
//! bounded (one of each kind for a process, a few for a user, and in all); beyond these bounds a read fails at once. A worker has
//! a descriptor table of its own, so that a blocked one holds no socket and no lock of this program after the program has ended.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a caller waits for one read.
pub const LIMIT: Duration = Duration::from_millis(500);
/// Blocked reads of processes of one user other than root: others' processes stay readable.
const OF_USER: usize = 6;
/// Blocked reads of processes of all users other than root, and of all processes: root's stay readable.
const OF_USERS: usize = 18;
const OF_ALL: usize = 24;
/// Workers that wait for the next read, and how long a worker waits before it ends.
const IDLE: usize = 4;
const IDLE_FOR: Duration = Duration::from_secs(10);

type Work = Box<dyn FnOnce() + Send>;

struct Job {
    id: u64,
    work: Work,
}

/// A read that has passed its limit and has not come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocked {
    id: u64,
    pub pid: u32,
    pub uid: u32,
    /// Which kind of read: `memory`, `descriptors`, ..
    pub what: &'static str,
    pub since: Instant,
}

struct Pool {
    next: u64,
    idle: Vec<(u64, SyncSender<Job>)>,
    blocked: Vec<Blocked>,
    /// A worker that no job has been given for long ends, unless it is the last one and this is set.
    keep: bool,
}

static POOL: Mutex<Pool> = Mutex::new(Pool { next: 0, idle: Vec::new(), blocked: Vec::new(), keep: false });
static TIMED_OUT: AtomicU64 = AtomicU64::new(0);
static REFUSED: AtomicU64 = AtomicU64::new(0);

/// For /metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Numbers {
    /// Reads that are blocked at this moment.
    pub blocked: u64,
    /// Reads that passed their limit.
    pub timed_out: u64,
    /// Reads that were not begun, because reads of that process or user, or too many, were blocked.
    pub refused: u64,
}

#[must_use]
pub fn numbers() -> Numbers {
    Numbers {
        blocked: pool().blocked.len() as u64,
        timed_out: TIMED_OUT.load(Ordering::Relaxed),
        refused: REFUSED.load(Ordering::Relaxed),
    }
}

/// The reads that are blocked at this moment.
#[must_use]
pub fn blocked() -> Vec<Blocked> {
    pool().blocked.clone()
}

/// Starts a worker and keeps it: from then on a read is possible where no thread can be made any more (a full pid table).
pub fn keep_one() {
    let id = {
        let mut pool = pool();
        pool.keep = true;
        pool.id()
    };
    if let Err(error) = start(id, None) {
        tracing::warn!(%error, "no thread for reads of other processes' memory: it is tried again at the first read");
    }
}

fn pool() -> MutexGuard<'static, Pool> {
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    fn id(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Why a read of this process is not begun; None: it is.
    fn refusal(&self, pid: u32, what: &str, owner: &dyn Fn() -> u32) -> Option<&'static str> {
        if self.blocked.is_empty() {
            return None;
        }
        if self.blocked.iter().any(|b| b.pid == pid && b.what == what) {
            return Some("an earlier read of this process is still blocked");
        }
        let uid = owner();
        let others = self.blocked.iter().filter(|b| b.uid != 0);
        if uid != 0 && others.clone().filter(|b| b.uid == uid).count() >= OF_USER {
            return Some("too many reads of this user's processes are blocked");
        }
        let full = self.blocked.len() >= OF_ALL || uid != 0 && others.count() >= OF_USERS;
        full.then_some("too many reads of processes are blocked")
    }
}

fn timed_out(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, why.into())
}

/// Runs `read`, which reads from or below `dir`, the folder of process `pid` in /proc; at most `limit`. `what`: its kind; one read of each kind
/// may be blocked for a process. [`io::ErrorKind::TimedOut`]: it did not
/// come back, or was not begun because others did not.
///
/// Race: the pid may be another process's by the time that a read is found blocked; then that process is not read until the
/// blocked read comes back. It is the caller who makes sure that what was read is of the process that it means.
pub fn run<T: Send + 'static>(
    pid: u32,
    what: &'static str,
    dir: &Path,
    limit: Duration,
    read: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    // The folder is the process's own by its effective uid, whether it is dumpable or not. It does not block.
    let owner = || std::fs::metadata(dir).map_or(u32::MAX, |m| m.uid());
    let (send, receive) = sync_channel(1);
    let work: Work = Box::new(move || {
        // A caller that has given up does not listen.
        let _ = send.send(read());
    });
    let id = hand_over(pid, what, &owner, work)?;
    match receive.recv_timeout(limit) {
        Ok(result) => result,
        Err(RecvTimeoutError::Disconnected) => Err(io::Error::other("the thread that read it panicked")),
        Err(RecvTimeoutError::Timeout) => {
            let uid = owner();
            let mut pool = pool();
            // The worker sends before it takes the lock to say that it is free: what is not here now will find the entry.
            if let Ok(result) = receive.try_recv() {
                return result;
            }
            pool.blocked.push(Blocked { id, pid, uid, what, since: Instant::now() });
            TIMED_OUT.fetch_add(1, Ordering::Relaxed);
            Err(timed_out(format!("its {what}: the read did not come back within {} ms", limit.as_millis())))
        }
    }
}

/// Gives the work to an idle worker, or to a new one.
fn hand_over(pid: u32, what: &str, owner: &dyn Fn() -> u32, work: Work) -> io::Result<u64> {
    let (id, idle) = {
        let mut pool = pool();
        if let Some(why) = pool.refusal(pid, what, owner) {
            REFUSED.fetch_add(1, Ordering::Relaxed);
            return Err(timed_out(why));
        }
        (pool.id(), pool.idle.pop())
    };
    let job = Job { id, work };
    match idle {
        // A worker that is taken off the list waits for this: it ends only after it has taken itself off.
        Some((_, worker)) => {
            worker.send(job).map_err(|_| io::Error::other("the thread that was to read it has ended"))?;
        }
        None => start(id, Some(job))?,
    }
    Ok(id)
}

/// Starts worker `id`. Without a job it puts itself on the list of the idle.
fn start(id: u64, first: Option<Job>) -> io::Result<()> {
    let (sender, jobs) = sync_channel(1);
    let build = std::thread::Builder::new().name("proc-reads".into());
    build.spawn(move || worker(id, &sender, &jobs, first)).map(drop)
}

fn worker(id: u64, sender: &SyncSender<Job>, jobs: &Receiver<Job>, first: Option<Job>) {
    block_signals();
    own_descriptors();
    let mut next = first;
    loop {
        if let Some(job) = next.take() {
            (job.work)();
            pool().blocked.retain(|b| b.id != job.id);
        }
        {
            let mut pool = pool();
            if pool.idle.len() >= IDLE {
                return;
            }
            pool.idle.push((id, sender.clone()));
        }
        next = wait(id, jobs);
        if next.is_none() {
            return;
        }
    }
}

/// The next job; None: there was none for long, and the worker is off the list.
fn wait(id: u64, jobs: &Receiver<Job>) -> Option<Job> {
    loop {
        if let Ok(job) = jobs.recv_timeout(IDLE_FOR) {
            return Some(job);
        }
        let mut pool = pool();
        // Not on the list: it was taken off just now, and its job is on the way.
        let Some(at) = pool.idle.iter().position(|(i, _)| *i == id) else { continue };
        if !(pool.keep && pool.idle.len() == 1) {
            pool.idle.swap_remove(at);
            return None;
        }
    }
}

/// The kernel delivers a signal to any thread that does not block it. tokio's handler writes to a socket by its number, which a worker's
/// own table does not hold: a SIGTERM delivered here would be lost. So this comes before the table is made.
fn block_signals() {
    // SAFETY: an all-zero set is a valid value, which `sigfillset` overwrites; only this thread's mask changes.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, std::ptr::null_mut());
    }
}

/// Gives this thread a descriptor table of its own, with nothing but the standard streams, which a child process needs in their place.
fn own_descriptors() {
    const CLOSE_RANGE_UNSHARE: libc::c_uint = 1 << 1;
    // SAFETY: takes no pointer. With UNSHARE only this thread's own, new table is changed: no descriptor of others is closed. Where
    // it is refused (a seccomp filter), the thread goes on with the common table.
    let _ = unsafe {
        libc::syscall(libc::SYS_close_range, 3 as libc::c_uint, libc::c_uint::MAX, CLOSE_RANGE_UNSHARE)
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Owned by `uid`, as a process's folder is; the tests of this module use pids that no other test reads.
    fn folder(uid: u32) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::chown(dir.path(), Some(uid), None).unwrap();
        dir
    }

    fn hang(pid: u32, dir: &Path) -> (io::Error, SyncSender<()>) {
        let (release, held) = sync_channel::<()>(1);
        let read = move || held.recv().map_err(|e| io::Error::other(e.to_string()));
        (run(pid, "memory", dir, Duration::from_millis(20), read).unwrap_err(), release)
    }

    #[test]
    fn a_read_that_hangs_holds_up_only_its_own_process_and_a_bounded_number() {
        const FIRST: u32 = 4_100_000_000;
        if !rustix::process::geteuid().is_root() {
            crate::testing::skipped("blocking reads", "needs root, for folders of other users");
            return;
        }
        let (a, b, root) = (folder(65534), folder(65533), folder(0));
        let fine = |pid, dir: &tempfile::TempDir| run(pid, "memory", dir.path(), LIMIT, || Ok(7));
        let before = numbers();
        let mut held = Vec::new();
        for n in 0..OF_USER as u32 {
            let (e, release) = hang(FIRST + n, a.path());
            assert_eq!(e.kind(), io::ErrorKind::TimedOut);
            held.push(release);
        }
        let after = numbers();
        assert_eq!(after.timed_out - before.timed_out, OF_USER as u64);
        assert_eq!(blocked().iter().filter(|b| b.pid >= FIRST && b.uid == 65534).count(), OF_USER);
        // At once: neither that process nor another one of that user is waited for again.
        let began = Instant::now();
        assert_eq!(fine(FIRST, &root).unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(fine(FIRST + 100, &a).unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(began.elapsed() < LIMIT / 2);
        assert_eq!(numbers().refused - after.refused, 2);
        // Other users' are read.
        assert_eq!(fine(FIRST + 101, &b).unwrap(), 7);
        assert_eq!(fine(FIRST + 102, &root).unwrap(), 7);
        drop(held);
        let end = Instant::now() + Duration::from_secs(5);
        while blocked().iter().any(|b| b.pid >= FIRST) {
            assert!(Instant::now() < end, "reads that came back still count as blocked");
            std::thread::yield_now();
        }
        assert_eq!(fine(FIRST, &a).unwrap(), 7);
    }

    #[test]
    fn a_worker_takes_no_signal_of_the_program() {
        let status = run(4_250_000_000, "memory", Path::new("/"), LIMIT, || {
            std::fs::read_to_string("/proc/thread-self/status")
        });
        let status = status.unwrap();
        let blocked = status.lines().find_map(|l| l.strip_prefix("SigBlk:")).unwrap().trim();
        let blocked = u64::from_str_radix(blocked, 16).unwrap();
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            assert_ne!(blocked & 1 << (signal - 1), 0, "{signal}: {status}");
        }
    }

    #[test]
    fn a_worker_holds_no_descriptor_of_the_program() {
        let here = std::fs::File::open("/proc/self/stat").unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&here);
        let open = run(4_200_000_000, "memory", Path::new("/"), LIMIT, move || {
            Ok((3..64).filter(|n| std::fs::read_link(format!("/proc/thread-self/fd/{n}")).is_ok()).count())
        });
        assert_eq!(open.unwrap(), 0);
        assert!(std::fs::read_link(format!("/proc/self/fd/{fd}")).is_ok());
        let panicked =
            run(4_200_000_000, "memory", Path::new("/"), LIMIT, || -> io::Result<()> { panic!("a test") });
        assert!(panicked.is_err());
    }
}
