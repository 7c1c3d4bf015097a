//! `jobwarden exec`: a command as a job from before its first instruction; at its deadline, or when it ends, nothing of it
//! stays. With an agent, the agent holds the job; without one, this process loads the probes itself and forks a watcher.
//!
//! It forks, so it must be called while the process has one thread and no runtime. It reads no config but the rails'.

mod agent;
mod alone;
mod command;
mod options;
mod report;
mod signals;
mod status;
mod supervise;
mod terminal;

use std::time::Instant;

pub use self::options::{ExecError, Options};
use self::report::{Ended, Report};
pub use self::status::Finish;
use self::supervise::{Followed, Supervisor};
use crate::enforce::cgroup;
use crate::sources::proc::Proc;

/// Where the job is held: by the agent, or by this process and its watcher.
enum Warden {
    Agent(agent::Agent),
    Alone(alone::Alone),
}

impl Warden {
    /// Registers the held command: with the agent if one answers, else alone.
    fn of(o: &Options, pid: u32) -> Result<Self, ExecError> {
        match agent::Agent::register(o, pid) {
            Ok(a) => Ok(Self::Agent(a)),
            Err(no_agent) => match alone::Alone::start(o, pid) {
                Ok(a) => Ok(Self::Alone(a)),
                Err(alone) => Err(ExecError::NoWarden { agent: no_agent, alone }),
            },
        }
    }
}

/// Runs the command to its end. Errors are jobwarden's own (exit status 125); the command was not started then.
///
/// # Errors
/// [`ExecError`], before the command ran.
pub fn run(o: &Options) -> Result<Finish, ExecError> {
    command::one_thread()?;
    let report = o.report.as_deref().map(Report::create).transpose()?;
    let prepared = command::Prepared::new(&o.command, o.user.as_deref())?;
    let signals = signals::Signals::block().map_err(ExecError::io("block signals"))?;
    let terminal = terminal::Terminal::remember();
    let held = command::fork(&prepared, &signals)?;
    let begun = Instant::now();
    let mut cage = ExecCgroup::default();
    let pid = held.pid.as_raw_nonzero().get() as u32;
    let warden = match cage.shut(o, pid).and_then(|()| Warden::of(&cage.with(o), pid)) {
        Ok(w) => w,
        Err(e) => {
            // The pipe closes, so the child ends without having run anything.
            held.abandon();
            return Err(e);
        }
    };
    let supervisor = Supervisor::new(o, held.pid, &warden, signals, &terminal);
    held.release();
    let followed = supervisor.follow();
    let Followed { status, timed_out, kill, trouble } = followed;
    for t in &trouble {
        eprintln!("jobwarden: {t}");
    }
    if let Some(k) = &kill {
        for s in &k.stuck {
            eprintln!("jobwarden: {} ({}) did not end: state {}", s.process.id, s.process.comm, s.state);
        }
    }
    drop(warden);
    drop(cage);
    terminal.restore(timed_out);
    let finish = Finish::of(status, timed_out, o.preserve_status);
    if let Some(r) = report {
        r.write(&Ended { options: o, pid, status, timed_out, finish, kill, took: begun.elapsed() });
    }
    Ok(finish)
}

/// The cgroup of `--cgroup`, removed when it is dropped.
#[derive(Default)]
struct ExecCgroup(Option<std::path::PathBuf>);

impl ExecCgroup {
    fn shut(&mut self, o: &Options, pid: u32) -> Result<(), ExecError> {
        if !o.cgroup {
            return Ok(());
        }
        let proc = Proc::default();
        let own = cgroup::of(&proc, std::process::id()).ok_or(ExecError::NoCgroup)?;
        let dir = own.join(format!("jobwarden-exec-{pid}"));
        std::fs::create_dir(&dir).map_err(ExecError::io("make the cgroup"))?;
        self.0 = Some(dir.clone());
        std::fs::write(dir.join("cgroup.procs"), pid.to_string())
            .map_err(ExecError::io("move the command into its cgroup"))
    }

    fn with(&self, o: &Options) -> Options {
        Options { cage: self.0.clone(), ..o.clone() }
    }
}

impl Drop for ExecCgroup {
    fn drop(&mut self) {
        if let Some(dir) = self.0.take()
            && let Err(e) = cgroup::remove(&dir)
        {
            eprintln!("jobwarden: the cgroup {} stays: {e}", dir.display());
        }
    }
}
