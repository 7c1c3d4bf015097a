//! A child by clone with CLONE_VFORK | CLONE_VM, as vfork(2) makes it; its parent stands still until it has exited 5.

use std::ffi::c_void;

use jobwarden_tests::shape::{bounded, pid, quit, say, step, wait};

extern "C" fn child(_: *mut c_void) -> libc::c_int {
    bounded();
    say("child", pid());
    step();
    quit(5)
}

fn main() {
    bounded();
    let mut stack = vec![0u128; 16 << 10];
    // SAFETY: the stack is the child's own, grows down from its aligned end, and lives until the child has exited,
    // because CLONE_VFORK holds this thread until then.
    let got = unsafe {
        libc::clone(
            child,
            stack.as_mut_ptr_range().end.cast(),
            libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD,
            std::ptr::null_mut(),
        )
    };
    say("forked", got);
    // The child shared this memory, its alarm it did not.
    say("status", wait(got));
    step();
}
