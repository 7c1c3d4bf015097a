//! A process that lives under a millisecond: forked, execs /bin/true with the arguments given after `--`, exits, is
//! reaped at once.

use std::ffi::{CString, OsString};
use std::os::unix::ffi::OsStringExt as _;

use jobwarden_tests::shape::{bounded, fork, say, step, wait};

fn main() {
    bounded();
    let argv: Vec<CString> = std::env::args_os()
        .skip_while(|a| a != "--")
        .skip(1)
        .map(OsString::into_vec)
        .filter_map(|a| CString::new(a).ok())
        .collect();
    let mut pointers: Vec<_> = argv.iter().map(|a| a.as_ptr()).collect();
    pointers.push(std::ptr::null());
    step();
    let child = fork(|| {
        // SAFETY: valid C strings and a NULL at the end of the vector.
        unsafe { libc::execv(c"/bin/true".as_ptr(), pointers.as_ptr()) };
        127
    });
    say("status", wait(child));
    say("child", child);
    step();
}
