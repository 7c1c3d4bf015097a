//! Without an agent: probes of this process's own, unpinned, and a watcher that ends the job should this process be killed.
//!
//! The watcher is a fork in a session of its own. It shares the probes' descriptors, so they live on with it, and sleeps on a
//! pipe: a byte means that all is done, the end of the pipe that its other end has died.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, WaitOptions, setsid, waitpid};

use super::options::{ExecError, Options};
use crate::api::ExecEnded;
use crate::config;
use crate::enforce::{Audit, Enforcer, Guards, Lineage as _, Order, preferred};
use crate::files::trusted_folder;
use crate::model::key::Key;
use crate::model::kill::{AskedBy, Reason, What};
use crate::model::schema::JobId;
use crate::model::signal::SIGKILL;
use crate::redact::Redactor;
use crate::sources::host::boot_now;
use crate::sources::kernel::{self, Kernel};
use crate::sources::proc::Proc;

/// Nobody reads the ring here; the smallest there is.
const RING_BYTES: u32 = 4096;

/// A job that this process holds.
pub(super) struct Alone {
    enforcer: Enforcer,
    guards: Guards,
    job: u64,
    root: Key,
    cgroup: Option<PathBuf>,
    watcher: Option<Watcher>,
}

/// The watcher, as its parent sees it.
struct Watcher {
    pid: Option<Pid>,
    /// Its end is what the watcher waits for.
    alive: OwnedFd,
}

impl Alone {
    /// Loads the probes, enters the held command and forks the watcher, which has answered on return.
    pub(super) fn start(o: &Options, pid: u32) -> Result<Self, Box<ExecError>> {
        let mut me = Self::hold(o, pid)?;
        me.watcher = Some(me.watch(o)?);
        Ok(me)
    }

    /// The same for a command that runs already, since the agent that held it is gone: what has left its family by then is
    /// not found. Without a watcher.
    pub(super) fn hold(o: &Options, pid: u32) -> Result<Self, Box<ExecError>> {
        let config = config::load(None, &config::environment(), &config::Overrides::default())
            .map_err(|e| Box::new(e.into()))?;
        let options =
            kernel::Options { bpffs: None, ring_bytes: RING_BYTES, signal_mask: 0, ..Default::default() };
        let kernel = Kernel::start(&options).map_err(|e| Box::new(ExecError::Kernel(e.to_string())))?;
        let io = |doing| move |e| Box::new(ExecError::io(doing)(e));
        let start = kernel.start_of(pid).map_err(io("ask for the command's start"))?;
        let gone = || Box::new(ExecError::Kernel("the command was killed before it ran".into()));
        let root = Key::new(pid, start.ok_or_else(gone)?);
        let job = boot_now();
        kernel.label(job, 0, root).map_err(io("register the job"))?;
        let proc = Proc::default();
        let e = &config.enforcement;
        let mut guards = Guards::new(e.protect.clone(), e.protect_defaults);
        guards
            .keep(std::process::id(), "exec", &proc, &kernel)
            .map_err(io("ask for this process's ancestors"))?;
        let dir = &config.agent.state_dir;
        let dir = if dir.is_dir() { trusted_folder(dir, 0o700).ok() } else { None };
        let audit = dir.map_or_else(Audit::log_only, |dir| Audit::open(&dir));
        let enforcer = Enforcer {
            lineage: Arc::new(kernel),
            proc,
            audit: Arc::new(audit),
            redact: Arc::new(Redactor::new(config.agent.redact)),
        };
        Ok(Self { enforcer, guards, job, root, cgroup: o.cage.clone(), watcher: None })
    }

    fn order(&self, o: &Options) -> Order {
        let id = JobId { root: self.root, ordinal: 0 };
        Order {
            job: self.job,
            id: Some(id),
            name: o.name.clone(),
            root: self.root,
            target: id.to_string(),
            what: What::Whole,
            signal: o.signal,
            grace: o.grace,
            delay: Duration::ZERO,
            settle: Order::SETTLE,
            reason: Reason::Exec,
            asked_by: AskedBy {
                uid: Some(rustix::process::getuid().as_raw()),
                pid: Some(std::process::id()),
                exe: self.enforcer.proc.exe(std::process::id()).ok().map(|p| p.display().to_string()),
                rule: None,
            },
            dry_run: false,
            cgroup: self.cgroup.clone(),
        }
    }

    pub(super) async fn end(&self, o: &Options, timed_out: bool) -> Result<ExecEnded, String> {
        let delay = if timed_out { Duration::ZERO } else { o.orphan_after };
        let order = Order { delay, ..self.order(o) };
        let report = if o.keep_orphans && !timed_out {
            self.enforcer.let_go(&order, &self.guards, "left running (--keep-orphans)")
        } else {
            // In this thread: a bomb may have taken the last one that the cgroup allows.
            // Without the capability it goes on as it is.
            let _ = preferred();
            self.enforcer.run_here(&order, &self.guards).await.map(|out| out.report)
        };
        Ok(ExecEnded { report: Some(report.map_err(|e| e.to_string())?), left_s: None })
    }

    pub(super) fn pass(&self, o: &Options, signal: u8) -> Result<usize, String> {
        self.enforcer.pass(&self.order(o), &self.guards, signal).map_err(|e| e.to_string())
    }

    fn watch(&self, o: &Options) -> Result<Watcher, Box<ExecError>> {
        let pipe =
            || pipe_with(PipeFlags::CLOEXEC).map_err(|e| Box::new(ExecError::io("make a pipe")(e.into())));
        let (sleep, alive) = pipe()?;
        let (answer, ready) = pipe()?;
        // SAFETY: this process has one thread: `exec` checks it, and starts no runtime with more.
        match unsafe { libc::fork() } {
            -1 => Err(Box::new(ExecError::io("fork the watcher")(io::Error::last_os_error()))),
            0 => {
                drop((alive, answer));
                let ok = self.watcher(o, sleep, ready).is_ok();
                // SAFETY: ends the child at once, without this program's exit handlers.
                unsafe { libc::_exit(i32::from(!ok)) }
            }
            pid => {
                drop(ready);
                let watcher = Watcher { pid: Pid::from_raw(pid), alive };
                match File::from(answer).read(&mut [0]) {
                    Ok(1) => Ok(watcher),
                    _ => Err(Box::new(ExecError::Watcher)),
                }
            }
        }
    }

    /// In the watcher. Its signals are blocked as its parent's are: only SIGKILL ends it early.
    fn watcher(&self, o: &Options, sleep: OwnedFd, ready: OwnedFd) -> io::Result<()> {
        setsid()?;
        rustix::thread::set_name(c"jobwarden-watch")?;
        let_go_of_inherited()?;
        File::from(ready).write_all(&[1])?;
        if let Ok(1) = File::from(sleep).read(&mut [0]) {
            return Ok(());
        }
        let order = Order { signal: SIGKILL, grace: Duration::ZERO, ..self.order(o) };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        // Without the capability it goes on as it is.
        let _ = preferred();
        runtime.block_on(self.enforcer.run_here(&order, &self.guards)).map_err(io::Error::other)?;
        self.enforcer.audit.flush(Audit::LAST);
        if let Some(dir) = &self.cgroup {
            crate::enforce::cgroup::remove(dir)?;
        }
        Ok(())
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        let Some(w) = self.watcher.take() else { return };
        // It fails if the watcher was killed: then there is nobody to tell.
        let _ = rustix::io::write(&w.alive, &[1]);
        while let Err(rustix::io::Errno::INTR) = waitpid(w.pid, WaitOptions::empty()) {}
    }
}

/// What `exec` was handed stays open in nobody but the command: a pipe's reader would wait for the watcher's end too. What
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
            // SAFETY: not one of this program's own, so nobody here owns it or will close it again.
            unsafe { libc::close(fd) };
        }
    }
    Ok(())
}
