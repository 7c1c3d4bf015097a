//! Processes that multiply as fast as they can, until SECONDS after the start: `chains N SECONDS` keeps N chains in which
//! each process forks one successor and exits; `tree LIMIT SECONDS` forks wherever it may; `native LIMIT SECONDS` does so by
//! vfork with an exec, and by clone with CLONE_PARENT. All are to be run under a `pids` limit.

use std::ffi::CString;
use std::time::Duration;

use jobwarden_tests::shape::{bounded, disposition, fork, nap, number, prctl, quit, say, setsid};

fn now() -> Duration {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a valid timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut t) };
    Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
}

/// The forked one goes on: 0; -1 where it may not.
fn raw_fork() -> libc::pid_t {
    // SAFETY: one thread.
    unsafe { libc::fork() }
}

fn chain(until: Duration) -> i32 {
    let mut generation = 0u32;
    while now() < until {
        if raw_fork() > 0 {
            quit(0);
        }
        generation += 1;
        if generation.is_multiple_of(3) {
            setsid();
        }
    }
    0
}

fn tree(until: Duration) -> i32 {
    while now() < until {
        if raw_fork() < 0 {
            nap(1);
        }
    }
    0
}

/// By turns: a child by vfork and exec, and one by clone that is a child of this one's parent.
fn native(until: Duration) -> i32 {
    let mut args: Vec<CString> =
        std::env::args_os().filter_map(|a| CString::new(a.as_encoded_bytes()).ok()).collect();
    let at = CString::new(until.as_secs().to_string()).unwrap_or_default();
    args.splice(1..4, [c"again".to_owned(), at, c"0".to_owned()]);
    while now() < until {
        if !vfork(&args) {
            nap(1);
        }
        // SAFETY: no new stack and no CLONE_VM: a fork, by one thread.
        unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_PARENT | libc::SIGCHLD, 0, 0, 0, 0) };
    }
    0
}

struct Image<'a>(&'a [*const libc::c_char]);

extern "C" fn image(arg: *mut libc::c_void) -> libc::c_int {
    // SAFETY: the parent sleeps in clone until the exec, so what it points to is there.
    unsafe {
        let Image(argv) = &*arg.cast::<Image>();
        libc::execv(c"/proc/self/exe".as_ptr(), argv.as_ptr());
    }
    1
}

/// A child in this process's memory that becomes another image at once.
fn vfork(args: &[CString]) -> bool {
    let mut pointers: Vec<*const libc::c_char> = args.iter().map(|a| a.as_ptr()).collect();
    pointers.push(std::ptr::null());
    let mut arg = Image(&pointers);
    let mut stack = vec![0_u64; 8192];
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: a stack of its own, which grows down from its end; both outlive the child's use of them.
    unsafe {
        let top = stack.as_mut_ptr().add(stack.len());
        libc::clone(image, top.cast(), flags, (&raw mut arg).cast()) > 0
    }
}

fn main() {
    if std::env::args().nth(1).as_deref() == Some("again") {
        std::process::exit(native(Duration::from_secs(number(2, 0))));
    }
    bounded();
    let until = now() + Duration::from_secs(number(3, 5));
    disposition(libc::SIGTERM, libc::SIG_IGN);
    // Who adopts the dead of the chains reaps them at once, or they use up the host's pids.
    disposition(libc::SIGCHLD, libc::SIG_IGN);
    if !prctl(libc::PR_SET_CHILD_SUBREAPER, 1) {
        return;
    }
    let n = number(2, 20);
    if std::env::args().nth(1).as_deref() == Some("chains") {
        for _ in 0..n {
            fork(|| chain(until));
        }
    } else if std::env::args().nth(1).as_deref() == Some("native") {
        fork(|| native(until));
    } else {
        fork(|| tree(until));
    }
    say("started", n);
    while now() < until {
        nap(20);
    }
}
