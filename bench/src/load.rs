//! The load that is measured: processes that live for a moment, and families that wait. It runs as a program of its own
//! (`jobwarden-bench load KIND N`), single-threaded, so that a fork is cheap. Whatever it started ends with it: children have their
//! parent's death as a death of their own, and what outlives its parent by design reads stdin and ends with that.

use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

#[derive(clap::Args)]
pub(crate) struct Args {
    kind: Kind,
    /// How many; for `flood` and `paced` seconds
    n: u64,
    /// Of a family: what a rule may match. Of a bomb: the folder of its cgroup
    mark: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    /// N times fork + exec of a static program + wait
    Execs,
    /// N times vfork + exit + wait
    Vforks,
    /// Spawns for N seconds as fast as it can; prints how many
    Flood,
    /// 5,000 lives a second for N seconds; prints how many there were
    Paced,
    /// N system calls that do nothing; prints nanoseconds for one
    Syscalls,
    /// N children that ignore SIGTERM and wait, until stdin is closed
    Family,
    /// N children that have exited and are not reaped, until stdin is closed
    Zombies,
    /// N children with 25 open files each, until stdin is closed
    Files,
    /// A parent that waits for the end of a pipe which an orphan of its zombie holds, until stdin is closed
    Incident,
    /// A child that its tracer does not let die, until stdin is closed
    Held,
    /// N processes of which each forks two and exits, and so on, in a session and a cgroup of their own; for 20 s
    Bomb,
}

/// Lives a second of `paced`.
pub(crate) const PACE: u64 = 5_000;
const BOMB_LASTS: Duration = Duration::from_secs(20);
/// Files that each child of `files` opens, beside the three that it has.
const FILES: usize = 22;

pub(crate) fn run(args: &Args) -> Result<()> {
    match args.kind {
        Kind::Execs => {
            let program = static_program()?;
            (0..args.n).try_for_each(|_| execute(&program))?;
        }
        Kind::Vforks => (0..args.n).try_for_each(|_| vfork())?,
        Kind::Flood => {
            let end = Instant::now() + Duration::from_secs(args.n);
            let mut lives = 0u64;
            while Instant::now() < end {
                vfork()?;
                lives += 1;
            }
            println!("{lives}");
        }
        Kind::Paced => println!("{}", paced(args.n)?),
        Kind::Syscalls => println!("{:.3}", syscalls(args.n)),
        Kind::Family => stand(args.n, wait_for_end)?,
        Kind::Zombies => stand(args.n, || ())?,
        Kind::Files => {
            let null = std::fs::File::open("/dev/null")?;
            stand(args.n, || {
                // SAFETY: plain calls on an open descriptor; the copies end with the child.
                (0..FILES).for_each(|_| _ = unsafe { libc::dup(null.as_raw_fd()) });
                wait_for_end();
            })?;
        }
        Kind::Incident => incident()?,
        Kind::Held => held()?,
        Kind::Bomb => bomb(args.n, Path::new(args.mark.as_deref().context("the bomb has no cgroup")?))?,
    }
    Ok(())
}

/// A static program that only exits. It has no C library: before `main`, glibc asks for the processor's caches by CPUID, which
/// a hypervisor answers, and in a virtual machine that is most of a short life, and more or less of it by what the host does.
fn static_program() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let program = own.with_file_name("jobwarden-bench-exit");
    let new = own.with_file_name(format!("jobwarden-bench-exit.{}", own_pid()));
    // Made once: a load is measured from its start.
    if std::fs::read(&program).is_ok_and(|there| there == elf()) {
        return Ok(program);
    }
    std::fs::write(&new, elf())?;
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o755))?;
    // In one step, since other loads begin now too.
    std::fs::rename(&new, &program)?;
    Ok(program)
}

/// The file of that program: a header, one segment to be loaded, and `exit(0)`.
fn elf() -> Vec<u8> {
    const HEADERS: u64 = 64 + 56;
    const BASE: u64 = 0x40_0000;
    // x86-64: mov eax, 60; xor edi, edi; syscall
    const CODE: [u8; 9] = [0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05];
    const SIZE: u64 = HEADERS + CODE.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let mut words = |words: &[(u64, usize)]| {
        for (value, bytes) in words {
            file.extend_from_slice(&value.to_le_bytes()[..*bytes]);
        }
    };
    // Executable, machine, version; entry, program headers, no sections; flags, sizes of the headers and how many there are.
    words(&[(2, 2), (62, 2), (1, 4), (BASE + HEADERS, 8), (64, 8), (0, 8)]);
    words(&[(0, 4), (64, 2), (56, 2), (1, 2), (0, 2), (0, 2), (0, 2)]);
    // Loaded, read and executed; from where to where, twice its size, and its alignment.
    words(&[(1, 4), (5, 4), (0, 8), (BASE, 8), (BASE, 8), (SIZE, 8), (SIZE, 8), (0x1000, 8)]);
    file.extend_from_slice(&CODE);
    file
}

fn execute(program: &Path) -> Result<()> {
    // No pre_exec and no signal mask: the standard library takes posix_spawn, which is vfork and exec.
    let status = std::process::Command::new(program).status()?;
    ensure!(status.success(), "{} ended with {status}", program.display());
    Ok(())
}

extern "C" fn leave(_: *mut libc::c_void) -> libc::c_int {
    0
}

/// A child that shares our memory and only exits, as vfork's does; on a stack of its own, so that it cannot spoil ours.
fn vfork() -> Result<()> {
    let mut stack = [0u128; 256];
    // SAFETY: the stack outlives the child, since CLONE_VFORK returns when the child is gone; the child touches nothing else.
    let pid = unsafe {
        let top = stack.as_mut_ptr().add(stack.len());
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        libc::clone(leave, top.cast(), flags, std::ptr::null_mut())
    };
    ensure!(pid > 0, "clone: {}", std::io::Error::last_os_error());
    reap(pid)
}

fn paced(seconds: u64) -> Result<u64> {
    let begun = Instant::now();
    let end = begun + Duration::from_secs(seconds);
    let mut lives = 0;
    while Instant::now() < end {
        let due = begun + Duration::from_nanos(lives * 1_000_000_000 / PACE);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        vfork()?;
        lives += 1;
    }
    Ok(lives)
}

fn syscalls(n: u64) -> f64 {
    let begun = cpu_ns();
    for _ in 0..n {
        // SAFETY: takes nothing, changes nothing.
        unsafe { libc::syscall(libc::SYS_getppid) };
    }
    (cpu_ns() - begun) as f64 / n as f64
}

/// CPU time of this thread: what others do at the same time does not count.
fn cpu_ns() -> i64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is valid for writing.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut t) };
    t.tv_sec * 1_000_000_000 + t.tv_nsec
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

/// Says that all is there (and a pid that may be asked for), and waits until stdin is closed.
fn ready(pid: libc::pid_t) -> Result<()> {
    println!("ready {pid}");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn stand(n: u64, child: impl Fn()) -> Result<()> {
    let mut children = Vec::new();
    for _ in 0..n {
        children.push(fork(&child)?);
    }
    ready(own_pid())?;
    children.into_iter().try_for_each(end)
}

fn own_pid() -> libc::pid_t {
    std::process::id().cast_signed()
}

fn end(child: libc::pid_t) -> Result<()> {
    // SAFETY: plain call; the child is ours and not reaped, so its pid is nobody else's.
    unsafe { libc::kill(child, libc::SIGKILL) };
    reap(child)
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

/// The child exits at once and stays a zombie; its child holds the pipe and reads our stdin, the end of which ends it, and
/// with it the wait of the parent.
fn incident() -> Result<()> {
    let mut pipe = [0; 2];
    // SAFETY: `pipe` has room for two.
    ensure!(unsafe { libc::pipe(pipe.as_mut_ptr()) } == 0, "pipe: {}", std::io::Error::last_os_error());
    let child = fork(|| {
        // An error means no orphan, and the question about it gets no such answer.
        let _ = fork(|| _ = std::io::stdin().read_to_end(&mut Vec::new()));
    })?;
    // SAFETY: our own descriptor, not used again.
    unsafe { libc::close(pipe[1]) };
    println!("ready {}", own_pid());
    let mut byte = 0u8;
    // SAFETY: room for the one byte that is asked for.
    unsafe { libc::read(pipe[0], (&raw mut byte).cast(), 1) };
    reap(child)
}

/// With PTRACE_O_TRACEEXIT the child stops on its way out, also by SIGKILL, until its tracer goes on.
fn held() -> Result<()> {
    // SAFETY: plain calls; the child is ours, and `status` valid for writing.
    unsafe {
        let child = fork(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
            libc::raise(libc::SIGSTOP);
            loop {
                libc::pause();
            }
        })?;
        let mut status = 0;
        libc::waitpid(child, &raw mut status, 0);
        let set = libc::ptrace(libc::PTRACE_SETOPTIONS, child, 0, libc::PTRACE_O_TRACEEXIT);
        let gone_on = libc::ptrace(libc::PTRACE_CONT, child, 0, 0);
        ensure!(set == 0 && gone_on == 0, "ptrace: {}", std::io::Error::last_os_error());
        ready(child)?;
        // Nothing more to be done if it is gone already: it is let go with us.
        libc::kill(child, libc::SIGKILL);
        libc::ptrace(libc::PTRACE_DETACH, child, 0, 0);
    }
    Ok(())
}

/// We stay outside of the session and the cgroup, adopt the dead and reap them, or they would use up the limit.
fn bomb(first_ones: u64, cgroup: &Path) -> Result<()> {
    let until = Instant::now() + BOMB_LASTS;
    // SAFETY: a constant.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) };
    let procs = cgroup.join("cgroup.procs");
    let first = fork(|| {
        // SAFETY: plain call.
        unsafe { libc::setsid() };
        // Without the limit no bomb is thrown.
        if std::fs::write(&procs, "0").is_err() {
            return;
        }
        for _ in 0..first_ones {
            let _ = fork(|| multiply(until));
        }
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
    })?;
    println!("ready {first}");
    std::thread::spawn(move || {
        // Ends with stdin, whatever is left is ended by who gave us the cgroup.
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(0);
    });
    loop {
        let mut status = 0;
        // SAFETY: `status` is valid for writing.
        if unsafe { libc::waitpid(-1, &raw mut status, 0) } < 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Each forks two and exits.
fn multiply(until: Instant) {
    let mut forked = 0;
    while forked < 2 && Instant::now() < until {
        // SAFETY: one thread.
        match unsafe { libc::fork() } {
            // The limit is reached: again.
            -1 => std::thread::sleep(Duration::from_millis(1)),
            0 => forked = 0,
            _ => forked += 1,
        }
    }
}

/// As the first word of a line of output.
pub(crate) fn fact<T: std::str::FromStr>(out: &[u8]) -> Result<T> {
    let text = String::from_utf8_lossy(out);
    match text.split_whitespace().next().and_then(|w| w.parse().ok()) {
        Some(v) => Ok(v),
        None => bail!("a load said {text:?}"),
    }
}
