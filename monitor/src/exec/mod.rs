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
mod watcher;

use std::time::{Duration, Instant};

use self::agent::NotRegistered;
pub(crate) use self::agent::REGISTRATION;
pub use self::options::{ExecError, Options};
use self::report::{Ended, Report};
pub use self::status::Finish;
use self::supervise::{Followed, Supervisor};
use crate::enforce::cgroup;
use crate::output::{self, error_line};
use crate::render::escape;
use crate::sources::proc::Proc;

/// Open files that the end of a job may need.
const OPEN_FILES: u64 = 1024;
/// How long the messages of this process may take to reach a slow reader of stderr, once all is done.
const STDERR_FLUSH: Duration = Duration::from_millis(500);

/// Where the job is held: by the agent, or by this process and its watcher.
enum Warden {
    Agent(agent::Agent),
    Alone(alone::Alone),
}

impl Warden {
    /// Registers the held command: with the agent if one answers, else alone; and what is to be said of that.
    fn of(o: &Options, pid: u32) -> Result<(Self, Option<String>), ExecError> {
        match agent::Agent::register(o, pid) {
            Ok(a) => Ok((Self::Agent(a), None)),
            Err(NotRegistered::Failed(e)) => Err(e),
            Err(NotRegistered::NoAgent { why, silent }) => match alone::Alone::start(o, pid) {
                Ok(a) => Ok((Self::Alone(a), silent.then(|| format!("{why}; going on without it")))),
                Err(alone) => Err(ExecError::NoWarden { agent: why, alone }),
            },
        }
    }

    /// CMD starts now.
    fn begin(&self, o: &Options) {
        if let Self::Alone(a) = self {
            a.begin(o);
        }
    }

    /// The job has ended, or was let go. A warden that is dropped without this ends the job: the watcher does, or the agent
    /// when this process has ended.
    fn job_ended(self) {
        if let Self::Alone(a) = self {
            a.job_ended();
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
    let done = run_held(o, &prepared, &signals, report);
    if done.is_err() {
        // A signal that came meanwhile is the end of this process, and a slow stderr can be interrupted.
        signals.restore();
    }
    done
}

fn run_held(
    o: &Options,
    prepared: &command::Prepared,
    signals: &signals::Signals,
    report: Option<Report>,
) -> Result<Finish, ExecError> {
    let terminal = terminal::Terminal::remember();
    let held = command::fork(prepared, signals)?;
    raise_open_files();
    let begun = Instant::now();
    let mut cage = ExecCgroup::default();
    let pid = held.pid.as_raw_nonzero().get() as u32;
    let ready = cage.shut(o, pid).and_then(|()| Warden::of(&cage.with(o), pid)).and_then(|(warden, note)| {
        // After the watcher's fork, and before CMD can use up all threads.
        let stderr = output::Background::start().map_err(ExecError::io("make a thread"))?;
        if let Some(note) = note {
            error_line(format_args!("jobwarden: {note}"));
        }
        Ok((warden, stderr))
    });
    let (warden, stderr) = match ready {
        Ok(w) => w,
        Err(e) => {
            // The pipe closes, so the child ends without having run anything.
            held.abandon();
            return Err(e);
        }
    };
    if let Some(n) = signals.pending() {
        // To a program that has not begun, its usual effect. The watcher ends first: it has inherited the pipe that holds CMD, and
        // CMD ends only when no copy of it is open.
        warden.job_ended();
        held.abandon();
        return Ok(Finish::Signal(n));
    }
    warden.begin(o);
    let supervisor = Supervisor::new(o, held.pid, &warden, signals, &terminal);
    held.release();
    let Followed { status, timed_out, ended, kill, trouble } = supervisor.follow();
    for t in &trouble {
        error_line(format_args!("jobwarden: {t}"));
    }
    for s in kill.iter().flat_map(|k| &k.stuck) {
        let (id, comm, state) = (s.process.id, &s.process.comm, escape(&s.state));
        error_line(format_args!("jobwarden: {id} ({comm}) did not end: state {state}"));
    }
    if ended {
        warden.job_ended();
    } else {
        drop(warden);
    }
    drop(cage);
    terminal.restore(timed_out);
    let finish = Finish::of(status, timed_out, o.preserve_status);
    if let Some(r) = report {
        r.write(&Ended { options: o, pid, status, timed_out, finish, kill, took: begun.elapsed() });
    }
    stderr.flush(STDERR_FLUSH);
    Ok(finish)
}

/// An end needs descriptors; a limit that is meant for CMD, which has inherited it by now, must not stop it.
fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = current.map(|c| c.max(OPEN_FILES));
    let maximum = maximum.map(|m| m.max(OPEN_FILES));
    // With CAP_SYS_RESOURCE; otherwise as far as the hard limit allows. Refused, it goes on with what there is.
    if setrlimit(Resource::Nofile, Rlimit { current: wanted, maximum }).is_err() {
        let maximum = getrlimit(Resource::Nofile).maximum;
        let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    }
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
            error_line(format_args!("jobwarden: the cgroup {} stays: {e}", dir.display()));
        }
    }
}
