//! Spawns N processes as fast as it can (posix_spawn of /bin/true, which is vfork and exec), reaps each, and prints
//! what it counted. Each child's argv is `true TAG INDEX`. With `bare` as the second argument the children only exit, which
//! is several times as fast.

use std::ffi::{CString, c_int, c_void};

use jobwarden_tests::shape::{bounded, number, pid_t, quit, say, step, wait};

unsafe extern "C" {
    static environ: *const *mut libc::c_char;
}

fn spawn(tag: &CString, index: u64) -> Option<pid_t> {
    let index = CString::new(index.to_string()).ok()?;
    let argv = [
        c"true".as_ptr().cast_mut(),
        tag.as_ptr().cast_mut(),
        index.as_ptr().cast_mut(),
        std::ptr::null_mut(),
    ];
    let mut pid = 0;
    // SAFETY: valid C strings, both vectors end with NULL, and nobody changes the environment.
    let e = unsafe {
        libc::posix_spawn(
            &raw mut pid,
            c"/bin/true".as_ptr(),
            std::ptr::null(),
            std::ptr::null(),
            argv.as_ptr(),
            environ,
        )
    };
    (e == 0).then_some(pid)
}

extern "C" fn leave(_: *mut c_void) -> c_int {
    quit(0)
}

fn bare(stack: &mut [u128]) -> Option<pid_t> {
    // SAFETY: the stack is the child's own, grows down from its aligned end, and CLONE_VFORK holds this thread until the
    // child has exited.
    let pid = unsafe {
        libc::clone(
            leave,
            stack.as_mut_ptr_range().end.cast(),
            libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD,
            std::ptr::null_mut(),
        )
    };
    (pid > 0).then_some(pid)
}

fn main() {
    bounded();
    let n = number(1, 1000);
    let only_exit = std::env::args().nth(2).as_deref() == Some("bare");
    let mut stack = vec![0u128; 4 << 10];
    let tag = CString::new(std::env::args().next_back().unwrap_or_default()).unwrap_or_default();
    step();
    let (mut spawned, mut reaped) = (0u64, 0u64);
    for i in 0..n {
        let child = if only_exit { bare(&mut stack) } else { spawn(&tag, i) };
        let Some(child) = child else { continue };
        spawned += 1;
        if wait(child) == 0 {
            reaped += 1;
        }
    }
    say("spawned", spawned);
    say("reaped", reaped);
    step();
}
