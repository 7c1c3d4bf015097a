//! The watcher: a fork in a session of its own that ends the job when this process cannot: it was killed, it returned early,
//! or a member stopped it (SIGSTOP).
//!
//! It shares the probes' descriptors, so they live on with it. Both sides talk over two pipes. This process writes leases:
//! until when it will write again. The watcher ends the job when a lease runs out, and when the pipe is closed without the
//! message that the job has ended: so each way out of `exec` but that one, panics included, ends the job.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, pidfd_open, pidfd_send_signal, setsid, waitpid};

use super::alone::Alone;
use super::options::{ExecError, Options};
use crate::enforce::preferred;
use crate::model::kill::KillSpec;
use crate::model::signal::SIGKILL;
use crate::sources::host::monotonic_us;

/// How late this process may act on the deadline before the watcher does.
const DEADLINE_SLACK: Duration = Duration::from_secs(1);
/// The same from the end of the grace to the end of the job.
const KILL_SLACK: Duration = Duration::from_secs(2);
/// How long an end by the watcher may take: it gives up on survivors itself.
const WATCHER_KILL: Duration = Duration::from_secs(40);
/// How long the watcher may take to end once the job has.
const WATCHER_EXIT: Duration = Duration::from_secs(5);

/// Lease: until the next message, however long that takes.
const FOR_EVER: u64 = u64::MAX;
/// Instead of a lease: the job has ended, or was let go.
const JOB_ENDED: u64 = 0;

/// From the watcher: it is ready.
const READY: u8 = 1;
/// From the watcher: the deadline has passed unobserved, and it ends the job.
const DEADLINE_ENFORCED: u8 = 2;

/// The watcher, as its parent sees it. Dropped, it means that the job must be ended.
pub(super) struct Watcher {
    pid: Option<Pid>,
    /// Closed, the watcher ends the job.
    leases: Option<OwnedFd>,
    /// At its end when the watcher has ended.
    answers: OwnedFd,
}

impl Watcher {
    /// Forks the watcher, which is ready on return. This process must have one thread.
    pub(super) fn start(alone: &Alone, o: &Options) -> Result<Self, Box<ExecError>> {
        let pipe = |flags| {
            pipe_with(PipeFlags::CLOEXEC | flags)
                .map_err(|e| Box::new(ExecError::io("make a pipe")(e.into())))
        };
        let (leases, lease_writer) = pipe(PipeFlags::empty())?;
        let (answers, answer_writer) = pipe(PipeFlags::empty())?;
        let exec = pidfd_open(rustix::process::getpid(), PidfdFlags::empty())
            .map_err(|e| Box::new(ExecError::io("open a handle of this process")(e.into())))?;
        // SAFETY: this process has one thread: `exec` checks it, and starts no other before this.
        match unsafe { libc::fork() } {
            -1 => Err(Box::new(ExecError::io("fork the watcher")(io::Error::last_os_error()))),
            0 => {
                drop((lease_writer, answers));
                let run = || watch(alone, o, &Side { leases, answers: answer_writer, exec });
                let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
                // SAFETY: ends the child at once, without this program's exit handlers.
                unsafe { libc::_exit(i32::from(!matches!(done, Ok(Ok(()))))) }
            }
            pid => {
                drop(answer_writer);
                let watcher = Self { pid: Pid::from_raw(pid), leases: Some(lease_writer), answers };
                match rustix::io::read(&watcher.answers, &mut [0; 1]) {
                    Ok(1) => Ok(watcher),
                    _ => Err(Box::new(ExecError::Watcher)),
                }
            }
        }
    }

    /// CMD starts now: this process will act at its deadline.
    pub(super) fn deadline_begins(&self, o: &Options) {
        self.write(o.deadline().map_or(FOR_EVER, |d| lease(d + DEADLINE_SLACK)));
    }

    /// This process begins to end the job, which takes `time` and the kill.
    pub(super) fn end_begins(&self, time: Duration) {
        self.write(lease(time.saturating_add(KILL_SLACK)));
    }

    /// The job has ended, or was let go: the only message that makes the watcher go without ending the job.
    pub(super) fn job_ended(mut self) {
        self.write(JOB_ENDED);
        self.leave(WATCHER_EXIT);
    }

    /// Whether the watcher had to act at the deadline, since this process did not.
    pub(super) fn deadline_enforced(&self) -> bool {
        self.readable(Duration::ZERO) && matches!(rustix::io::read(&self.answers, &mut [0; 1]), Ok(1))
    }

    fn write(&self, lease: u64) {
        // It fails if the watcher was killed: then no one holds the job but this process. A few words fit into any pipe, so it
        // does not block, even when the watcher is stopped.
        if let Some(leases) = &self.leases {
            let _ = rustix::io::write(leases, &lease.to_ne_bytes());
        }
    }

    fn readable(&self, limit: Duration) -> bool {
        let mut fds = [PollFd::new(&self.answers, PollFlags::IN)];
        matches!(poll(&mut fds, Timespec::try_from(limit).ok().as_ref()), Ok(1..))
    }

    /// Closes the pipe and waits for the watcher's end, at most `limit`: a member may have stopped it.
    fn leave(&mut self, limit: Duration) {
        if self.leases.take().is_none() {
            return;
        }
        let until = Instant::now() + limit;
        while self.readable(until.saturating_duration_since(Instant::now())) {
            if let Ok(0) = rustix::io::read(&self.answers, &mut [0; 1]) {
                // It is in its exit.
                while let Err(rustix::io::Errno::INTR) = waitpid(self.pid, WaitOptions::empty()) {}
                return;
            }
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.leave(WATCHER_KILL);
    }
}

fn lease(time: Duration) -> u64 {
    let time = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    monotonic_us().saturating_add(time).clamp(JOB_ENDED + 1, FOR_EVER)
}

/// The watcher's ends of the pipes, and a handle of `exec`.
struct Side {
    leases: OwnedFd,
    answers: OwnedFd,
    exec: OwnedFd,
}

/// Why the watcher wakes up.
#[derive(Debug, PartialEq, Eq)]
enum Wake {
    JobEnded,
    /// `exec` is gone.
    Gone,
    /// `exec` has not written before its lease ran out. `ending`: it had begun to end the job.
    Overdue {
        ending: bool,
    },
}

/// In the watcher. Its signals are blocked as its parent's are: only SIGKILL ends it early.
fn watch(alone: &Alone, o: &Options, side: &Side) -> io::Result<()> {
    setsid()?;
    rustix::thread::set_name(c"jobwarden-watch")?;
    let_go_of_inherited()?;
    // Before it is ready: later a member may have used up what this needs.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let run = |order: &KillSpec| {
        // Without the capability it goes on as it is.
        let _ = preferred();
        runtime.block_on(alone.run(order)).map(drop).map_err(io::Error::other)
    };
    rustix::io::write(&side.answers, &[READY])?;
    let kill = KillSpec { signal: SIGKILL, grace: Duration::ZERO, ..alone.order(o) };
    let mut leases = Leases { until: FOR_EVER, written: 0 };
    loop {
        match leases.wait(&side.leases) {
            Wake::JobEnded => return Ok(()),
            Wake::Gone => {
                run(&kill)?;
                return alone.remove_cgroup();
            }
            Wake::Overdue { ending: true } => run(&kill)?,
            Wake::Overdue { ending: false } => {
                // Before the first signal: `exec` may go on at any moment, and must know why CMD ended.
                let _ = rustix::io::write(&side.answers, &[DEADLINE_ENFORCED]);
                run(&alone.order(o))?;
            }
        }
        // A stopped `exec` goes on and reports. If it has ended, this fails: the handle means no other process.
        let _ = pidfd_send_signal(&side.exec, Signal::CONT);
    }
}

/// What `exec` has written so far.
struct Leases {
    until: u64,
    written: usize,
}

impl Leases {
    fn wait(&mut self, pipe: &OwnedFd) -> Wake {
        loop {
            let left = Duration::from_micros(self.until.saturating_sub(monotonic_us()));
            let limit = Timespec::try_from(left).ok().filter(|_| self.until != FOR_EVER);
            let mut fds = [PollFd::new(pipe, PollFlags::IN)];
            match poll(&mut fds, limit.as_ref()) {
                Err(rustix::io::Errno::INTR) => continue,
                Ok(0) => {
                    // Nothing is due before `exec` writes again.
                    self.until = FOR_EVER;
                    return Wake::Overdue { ending: self.written > 1 };
                }
                _ => {}
            }
            let mut word = [0; 8];
            match rustix::io::read(pipe, &mut word) {
                Err(rustix::io::Errno::INTR) => {}
                Ok(8) => match u64::from_ne_bytes(word) {
                    JOB_ENDED => return Wake::JobEnded,
                    until => {
                        self.until = until;
                        self.written += 1;
                    }
                },
                _ => return Wake::Gone,
            }
        }
    }
}

/// What `exec` was handed stays open in no process but the command: a pipe's reader would wait for the watcher's end too. What
/// this program opened itself is marked close-on-exec, what it was handed cannot be.
fn let_go_of_inherited() -> io::Result<()> {
    use rustix::io::{FdFlags, fcntl_getfd};
    use std::os::fd::{AsRawFd as _, BorrowedFd};
    let null = File::options().read(true).write(true).open("/dev/null")?;
    for standard in 0..3 {
        // SAFETY: replaces a standard stream, which the runtime never closes, by another file.
        if unsafe { libc::dup2(null.as_raw_fd(), standard) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    let fds: Vec<i32> = std::fs::read_dir("/proc/self/fd")?
        .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
        .filter(|&fd| fd > 2)
        .collect();
    for fd in fds {
        // SAFETY: borrowed for this one question; a number that is closed by now (the folder's own) gives EBADF.
        let flags = fcntl_getfd(unsafe { BorrowedFd::borrow_raw(fd) });
        if flags.is_ok_and(|f| !f.contains(FdFlags::CLOEXEC)) {
            // SAFETY: not one of this program's own, so nothing here owns it or will close it again.
            unsafe { libc::close(fd) };
        }
    }
    Ok(())
}
