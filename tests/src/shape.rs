//! What the helper programs share: a bounded life, facts on stdout, steps from stdin.
//!
//! A helper prints each fact as a line `name=value` in one `write`, so its children may print too. It waits where it
//! says so for a line on stdin. Whoever outlives its parent on purpose ends when stdin is closed. Nobody lives
//! longer than [`LIFE`] seconds. Not touched here: the agent.

use std::ffi::{CString, c_int};
use std::fmt::Display;
use std::io;

pub use libc::pid_t;

/// Seconds until SIGALRM ends a helper process, whatever it waits for.
pub const LIFE: u32 = 120;

extern "C" fn enough(_: c_int) {
    quit(99)
}

/// Bounds this process's life; a fork does not inherit the alarm, an exec does.
pub fn bounded() {
    // A handler, because SIGALRM's default action does not end the init of a pid namespace.
    // SAFETY: alarm(2) has no memory effects; the handler does nothing but _exit(2).
    unsafe {
        libc::signal(libc::SIGALRM, enough as *const () as libc::sighandler_t);
        libc::alarm(LIFE * crate::slow().min(5));
    }
}

fn write_all(text: &str) {
    let mut b = text.as_bytes();
    while !b.is_empty() {
        // SAFETY: the buffer is valid for its length.
        let n = unsafe { libc::write(1, b.as_ptr().cast(), b.len()) };
        let Ok(n @ 1..) = usize::try_from(n) else { return };
        b = &b[n..];
    }
}

/// Prints a fact.
pub fn say(name: &str, value: impl Display) {
    write_all(&format!("{name}={value}\n"));
}

/// Waits for one line on stdin; at its end the process exits 0, for nobody is left to tell it more.
pub fn step() {
    loop {
        match read_byte(0) {
            Some(b'\n') => return,
            Some(_) => {}
            None => quit(0),
        }
    }
}

/// Waits until stdin is closed, leaving its lines to others.
pub fn linger() {
    let mut p = libc::pollfd { fd: 0, events: 0, revents: 0 };
    // SAFETY: one valid pollfd. Without POLLIN in `events` only POLLHUP and errors wake it.
    while unsafe { libc::poll(&raw mut p, 1, -1) } < 0 || p.revents == 0 {}
}

/// One byte of `fd`; None at its end.
#[must_use]
pub fn read_byte(fd: c_int) -> Option<u8> {
    let mut b = 0u8;
    loop {
        // SAFETY: one valid byte.
        match unsafe { libc::read(fd, (&raw mut b).cast(), 1) } {
            1 => return Some(b),
            -1 if io::Error::last_os_error().raw_os_error() == Some(libc::EINTR) => {}
            _ => return None,
        }
    }
}

pub fn send_byte(fd: c_int) {
    // SAFETY: one valid byte.
    unsafe { libc::write(fd, c"".as_ptr().cast(), 1) };
}

/// `_exit`: no destructors, no buffers flushed twice.
pub fn quit(code: i32) -> ! {
    // SAFETY: ends the process.
    unsafe { libc::_exit(code) }
}

#[must_use]
pub fn pid() -> pid_t {
    // SAFETY: no effects.
    unsafe { libc::getpid() }
}

#[must_use]
pub fn ppid() -> pid_t {
    // SAFETY: no effects.
    unsafe { libc::getppid() }
}

/// Forks; the child's life is bounded too and ends with what `child` returns.
pub fn fork(child: impl FnOnce() -> i32) -> pid_t {
    // SAFETY: the helper programs fork while they have one thread, so the child may do whatever its parent could.
    let pid = unsafe { libc::fork() };
    start(pid, child)
}

/// Like [`fork`], by clone(2) with further flags.
pub fn clone(flags: c_int, child: impl FnOnce() -> i32) -> pid_t {
    // SAFETY: no new stack and no CLONE_VM: a fork. As in `fork`, there is one thread.
    let pid =
        unsafe { libc::syscall(libc::SYS_clone, libc::c_long::from(flags | libc::SIGCHLD), 0, 0, 0, 0) };
    start(pid as pid_t, child)
}

/// Like [`fork`], with the pid that the child shall have. Needs `CAP_SYS_ADMIN` or `CAP_CHECKPOINT_RESTORE`, Linux 5.5.
pub fn fork_as(pid: pid_t, child: impl FnOnce() -> i32) -> io::Result<pid_t> {
    // include/uapi/linux/sched.h, struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack,
    // stack_size, tls, set_tid, set_tid_size.
    let set_tid = [pid];
    let args: [u64; 10] = [0, 0, 0, 0, libc::SIGCHLD as u64, 0, 0, 0, set_tid.as_ptr() as u64, 1];
    // SAFETY: `args` and `set_tid` are valid for the call; otherwise as in `fork`.
    let got = unsafe { libc::syscall(libc::SYS_clone3, args.as_ptr(), size_of_val(&args)) } as pid_t;
    if got < 0 { Err(io::Error::last_os_error()) } else { Ok(start(got, child)) }
}

fn start(pid: pid_t, child: impl FnOnce() -> i32) -> pid_t {
    match pid {
        0 => {
            bounded();
            let code = child();
            quit(code)
        }
        -1 => {
            eprintln!("fork: {}", io::Error::last_os_error());
            quit(70)
        }
        pid => pid,
    }
}

/// Reaps `pid`; its raw wait status.
#[must_use]
pub fn wait(pid: pid_t) -> i32 {
    let mut status = 0;
    // SAFETY: `status` is valid for the call.
    while unsafe { libc::waitpid(pid, &raw mut status, 0) } < 0 {
        if io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
            return -1;
        }
    }
    status
}

/// Waits until `pid` has died, without reaping it.
pub fn wait_death(pid: pid_t) {
    // SAFETY: a zeroed siginfo is valid, and waitid writes only into it.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        libc::waitid(libc::P_PID, pid as libc::id_t, &raw mut info, libc::WEXITED | libc::WNOWAIT);
    }
}

/// Signals a child that has not been reaped yet, so its pid is its own.
pub fn kill(child: pid_t, signal: c_int) {
    // SAFETY: kill(2) has no memory effects.
    unsafe { libc::kill(child, signal) };
}

/// Sets what a signal does: `SIG_IGN` or `SIG_DFL`.
pub fn disposition(signal: c_int, what: libc::sighandler_t) {
    // SAFETY: no handler is installed.
    unsafe { libc::signal(signal, what) };
}

pub fn setsid() {
    // SAFETY: no memory effects.
    unsafe { libc::setsid() };
}

/// prctl(2) with one numeric argument.
#[must_use]
pub fn prctl(option: c_int, arg: libc::c_ulong) -> bool {
    // SAFETY: used only with options whose argument is a number.
    unsafe { libc::prctl(option, arg, 0, 0, 0) == 0 }
}

pub fn set_name(name: &str) {
    if let Ok(name) = CString::new(name) {
        // SAFETY: a valid C string; the kernel copies at most 16 bytes of it.
        unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
    }
}

/// A pipe: read end, write end.
#[must_use]
pub fn pipe() -> (c_int, c_int) {
    let mut fds = [0; 2];
    // SAFETY: room for two descriptors.
    if unsafe { libc::pipe(fds.as_mut_ptr()) } != 0 {
        quit(71);
    }
    (fds[0], fds[1])
}

pub fn close(fd: c_int) {
    // SAFETY: the helpers own the raw descriptors that they close.
    unsafe { libc::close(fd) };
}

pub fn nap(ms: u64) {
    std::thread::sleep(std::time::Duration::from_millis(ms));
}

/// The n-th argument as a number.
#[must_use]
pub fn number(n: usize, default: u64) -> u64 {
    std::env::args().nth(n).and_then(|s| s.parse().ok()).unwrap_or(default)
}

/// Execs `path` with `argv` (its own name included); returns only if that failed.
pub fn exec(path: &str, argv: &[&str]) {
    let Ok(path) = CString::new(path) else { return };
    let argv: Vec<CString> = argv.iter().filter_map(|a| CString::new(*a).ok()).collect();
    let mut pointers: Vec<*const libc::c_char> = argv.iter().map(|a| a.as_ptr()).collect();
    pointers.push(std::ptr::null());
    // SAFETY: valid C strings and a NULL at the end of the vector.
    unsafe { libc::execv(path.as_ptr(), pointers.as_ptr()) };
}

/// The path of this program, for a helper that execs itself.
#[must_use]
pub fn own_path() -> String {
    std::env::current_exe().map(|p| p.to_string_lossy().into_owned()).unwrap_or_default()
}
