//! The load that is measured: processes that live for a moment, and families that wait. It runs as a program of its own
//! (`xtask load KIND N`), single-threaded, so that a fork is cheap and whatever it started ends with it.

use std::io::Read;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

#[derive(clap::Args)]
pub(crate) struct Args {
    kind: Kind,
    /// How many; for `flood` seconds
    n: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    /// N times fork + exec of a small program + wait
    Execs,
    /// N times fork + exit + wait
    Forks,
    /// Forks for N seconds; prints how many
    Flood,
    /// N children that ignore SIGTERM and wait, until stdin is closed
    Family,
    /// N children that have exited and are not reaped, until stdin is closed
    Zombies,
}

pub(crate) fn run(args: &Args) -> Result<bool> {
    let mut children = Vec::new();
    match args.kind {
        Kind::Execs => (0..args.n).try_for_each(|_| execute())?,
        Kind::Forks => (0..args.n).try_for_each(|_| reap(fork(|| ())?))?,
        Kind::Flood => {
            let end = Instant::now() + Duration::from_secs(args.n);
            let mut lives = 0u64;
            while Instant::now() < end {
                reap(fork(|| ())?)?;
                lives += 1;
            }
            println!("{lives}");
        }
        Kind::Family | Kind::Zombies => {
            let waits = args.kind == Kind::Family;
            for _ in 0..args.n {
                children.push(fork(|| {
                    if waits {
                        wait_for_end();
                    }
                })?);
            }
            println!("ready");
            std::io::stdin().read_to_end(&mut Vec::new())?;
        }
    }
    for child in children {
        // SAFETY: plain calls; the child is ours and not reaped, so its pid is nobody else's.
        unsafe { libc::kill(child, libc::SIGKILL) };
        reap(child)?;
    }
    Ok(true)
}

fn execute() -> Result<()> {
    // No pre_exec and no signal mask: the standard library takes posix_spawn, which is vfork and exec.
    let status = Command::new("/bin/true").status()?;
    if !status.success() {
        bail!("/bin/true ended with {status}");
    }
    Ok(())
}

fn fork(child: impl FnOnce()) -> Result<libc::pid_t> {
    // SAFETY: this process has one thread, so the child may do what its parent may.
    match unsafe { libc::fork() } {
        -1 => Err(std::io::Error::last_os_error()).context("fork"),
        0 => {
            child();
            // SAFETY: ends the child without running its parent's destructors.
            unsafe { libc::_exit(0) }
        }
        pid => Ok(pid),
    }
}

fn wait_for_end() {
    // SAFETY: plain calls with constants; the child ends with its parent, should that be killed.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::signal(libc::SIGTERM, libc::SIG_IGN);
        loop {
            libc::pause();
        }
    }
}

fn reap(pid: libc::pid_t) -> Result<()> {
    let mut status = 0;
    // SAFETY: `status` is valid for writing.
    if unsafe { libc::waitpid(pid, &raw mut status, 0) } != pid {
        return Err(std::io::Error::last_os_error()).context("waitpid");
    }
    Ok(())
}

/// A family that waits beside the measurement, ended when dropped.
pub(super) struct Standing {
    child: Child,
    input: Option<ChildStdin>,
    _output: Option<ChildStdout>,
}

impl Standing {
    pub(super) fn new(kind: &str, n: u64) -> Result<Self> {
        let mut child = command(kind, n)?.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut output = child.stdout.take().context("the load has no output")?;
        let mut ready = [0; 6];
        output.read_exact(&mut ready).context("the load was not ready")?;
        Ok(Self { input: child.stdin.take(), child, _output: Some(output) })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How long it takes until the family's head is gone, at most 30 s.
    pub(super) fn gone(&mut self) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(30);
        while self.child.try_wait()?.is_none() {
            if Instant::now() > end {
                bail!("the family still lives");
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        drop(self.input.take());
        // It ends its family when its stdin is closed; an error means that it has ended already.
        let _ = self.child.wait();
    }
}

/// This program as a load.
pub(super) fn command(kind: &str, n: u64) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["load", kind, &n.to_string()]).stdin(Stdio::null());
    Ok(command)
}

/// Runs a load to its end; how long it took.
pub(super) fn timed(kind: &str, n: u64) -> Result<Duration> {
    let mut command = command(kind, n)?;
    let begun = Instant::now();
    let status = command.stdout(Stdio::null()).status()?;
    let took = begun.elapsed();
    if !status.success() {
        bail!("load {kind} {n} ended with {status}");
    }
    Ok(took)
}

/// One flood on each processor for `seconds`; how many lives they had together.
pub(super) fn flood(seconds: u64) -> Result<u64> {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let floods: Vec<Child> = (0..processors)
        .map(|_| Ok(command("flood", seconds)?.stdout(Stdio::piped()).spawn()?))
        .collect::<Result<_>>()?;
    let mut lives = 0;
    for flood in floods {
        let out = flood.wait_with_output()?;
        lives +=
            String::from_utf8_lossy(&out.stdout).trim().parse::<u64>().context("a flood said nothing")?;
    }
    Ok(lives)
}
