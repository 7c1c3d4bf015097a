//! Without an agent: probes of this process's own, unpinned, and a watcher that ends the job if this process does not.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::options::{ExecError, Options};
use super::watcher::Watcher;
use crate::api::ExecEnded;
use crate::config;
use crate::enforce::{Audit, EnforceError, Enforcer, Guards, Lineage as _, Outcome, preferred};
use crate::files::trusted_folder;
use crate::model::key::Key;
use crate::model::kill::{AskedBy, KillSpec, Reason, What};
use crate::model::schema::JobId;
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

impl Alone {
    /// Loads the probes, enters the held command and forks the watcher, which has answered on return.
    pub(super) fn start(o: &Options, pid: u32) -> Result<Self, Box<ExecError>> {
        let mut me = Self::hold(o, pid)?;
        me.watcher = Some(Watcher::start(&me, o)?);
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

    pub(super) fn order(&self, o: &Options) -> KillSpec {
        let id = JobId { root: self.root, ordinal: 0 };
        KillSpec {
            job: Some(id),
            number: self.job,
            name: o.name.clone(),
            target: id.to_string(),
            signal: o.signal,
            grace: o.grace,
            asked_by: AskedBy {
                uid: Some(rustix::process::getuid().as_raw()),
                pid: Some(std::process::id()),
                exe: self.enforcer.proc.exe(std::process::id()).ok().map(|p| p.as_path().into()),
                rule: None,
            },
            cgroup: self.cgroup.clone(),
            ..KillSpec::new(self.root, What::Whole, Reason::Exec)
        }
    }

    pub(super) async fn end(&self, o: &Options, timed_out: bool) -> Result<ExecEnded, String> {
        // This process was stopped at the deadline, goes on now, and finds CMD ended by the watcher.
        let timed_out = timed_out || self.watcher.as_ref().is_some_and(Watcher::deadline_enforced);
        let delay = if timed_out { Duration::ZERO } else { o.orphan_after };
        let order = KillSpec { delay, ..self.order(o) };
        if let Some(w) = &self.watcher {
            w.end_begins(order.delay.saturating_add(order.grace));
        }
        let report = if o.keep_orphans && !timed_out {
            self.enforcer.let_go(&order, &self.guards, "left running (--keep-orphans)")
        } else {
            // In this thread: a bomb may have taken the last one that the cgroup allows.
            // Without the capability it goes on as it is.
            let _ = preferred();
            self.run(&order).await.map(|out| out.report)
        };
        Ok(ExecEnded { report: Some(report.map_err(|e| e.to_string())?), left_s: None, timed_out })
    }

    pub(super) fn pass(&self, o: &Options, signal: u8) -> Result<usize, String> {
        self.enforcer.pass(&self.order(o), &self.guards, signal).map_err(|e| e.to_string())
    }

    /// Carries out an order in this thread. Needs a tokio runtime.
    pub(super) async fn run(&self, order: &KillSpec) -> Result<Outcome, EnforceError> {
        let done = self.enforcer.run_here(order, &self.guards).await;
        // The watcher ends without running destructors.
        self.enforcer.audit.flush(Audit::LAST);
        done
    }

    pub(super) fn remove_cgroup(&self) -> io::Result<()> {
        self.cgroup.as_deref().map_or(Ok(()), crate::enforce::cgroup::remove)
    }

    /// CMD starts now.
    pub(super) fn begin(&self, o: &Options) {
        if let Some(w) = &self.watcher {
            w.deadline_begins(o);
        }
    }

    /// The job has ended, or was let go: the watcher ends without touching it. In every other case it ends the job.
    pub(super) fn job_ended(mut self) {
        if let Some(w) = self.watcher.take() {
            w.job_ended();
        }
    }
}
