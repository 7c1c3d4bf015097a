//! The command: forked, held on a pipe until its job is registered, then let go into its program.

use std::ffi::{CStr, CString, OsString};
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, WaitOptions, waitpid};

use super::options::ExecError;
use super::signals::Signals;
use super::status::{FAILED, NOT_FOUND, NOT_RUNNABLE};

/// A fork of a process with several threads copies locks that nobody will ever open.
pub(super) fn one_thread() -> Result<(), ExecError> {
    let n = std::fs::read_dir("/proc/self/task").map_err(ExecError::io("read /proc/self/task"))?.count();
    if n == 1 { Ok(()) } else { Err(ExecError::Threads(n)) }
}

/// Everything that is needed after the fork, made before it.
pub(super) struct Prepared {
    argv: Vec<CString>,
    user: Option<User>,
}

/// Whom the command runs as, and what a login would have put into its environment.
struct User {
    uid: u32,
    gid: u32,
    groups: Vec<libc::gid_t>,
    environment: [(&'static CStr, CString); 4],
}

impl Prepared {
    pub(super) fn new(command: &[OsString], user: Option<&str>) -> Result<Self, ExecError> {
        let argv = command.iter().map(|a| CString::new(a.as_bytes()).map_err(|_| ExecError::Nul));
        let user = user.map(|u| User::find(u).ok_or_else(|| ExecError::User(u.into()))).transpose()?;
        Ok(Self { argv: argv.collect::<Result<_, _>>()?, user })
    }
}

impl User {
    /// By name or uid, as the system's name service gives it.
    fn find(given: &str) -> Option<Self> {
        let mut buffer = vec![0; 1 << 16];
        let mut found = std::ptr::null_mut();
        let name = CString::new(given).ok()?;
        // SAFETY: name and buffer outlive the calls, the buffer is writable for its length, and on success the entry's
        // strings are NUL-terminated inside it.
        unsafe {
            let mut entry: libc::passwd = std::mem::zeroed();
            let (e, b, n, f) = (&raw mut entry, buffer.as_mut_ptr(), buffer.len(), &raw mut found);
            libc::getpwnam_r(name.as_ptr(), e, b, n, f);
            if found.is_null() {
                libc::getpwuid_r(given.parse().ok()?, e, b, n, f);
            }
            if found.is_null() {
                return None;
            }
            let text = |p: *const libc::c_char| CStr::from_ptr(p).to_owned();
            let login = text(entry.pw_name);
            let mut groups = vec![0; 1 << 10];
            let mut n = groups.len() as i32;
            if libc::getgrouplist(login.as_ptr(), entry.pw_gid, groups.as_mut_ptr(), &raw mut n) < 0 {
                return None;
            }
            groups.truncate(n as usize);
            Some(Self {
                uid: entry.pw_uid,
                gid: entry.pw_gid,
                groups,
                environment: [
                    (c"HOME", text(entry.pw_dir)),
                    (c"SHELL", text(entry.pw_shell)),
                    (c"USER", login.clone()),
                    (c"LOGNAME", login),
                ],
            })
        }
    }

    /// In the forked child.
    fn become_it(&self) -> io::Result<()> {
        // SAFETY: this process has one thread; all pointers are to data that outlives the calls.
        unsafe {
            for (name, value) in &self.environment {
                libc::setenv(name.as_ptr(), value.as_ptr(), 1);
            }
            if libc::setgroups(self.groups.len(), self.groups.as_ptr()) != 0
                || libc::setgid(self.gid) != 0
                || libc::setuid(self.uid) != 0
            {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }
}

/// The forked child, waiting.
pub(super) struct Held {
    pub pid: Pid,
    release: OwnedFd,
}

/// Forks. The child does nothing until it is released, and ends when this process dies before that.
pub(super) fn fork(prepared: &Prepared, signals: &Signals) -> Result<Held, ExecError> {
    let (wait, release) =
        pipe_with(PipeFlags::CLOEXEC).map_err(|e| ExecError::io("make a pipe")(e.into()))?;
    // SAFETY: this process has one thread (`one_thread`), so the child may do what it likes.
    match unsafe { libc::fork() } {
        0 => {
            drop(release);
            let status = in_child(prepared, signals, wait);
            // SAFETY: ends the child at once, without this program's exit handlers.
            unsafe { libc::_exit(i32::from(status)) }
        }
        pid => match (pid > 0).then(|| Pid::from_raw(pid)).flatten() {
            Some(pid) => Ok(Held { pid, release }),
            None => Err(ExecError::io("fork")(io::Error::last_os_error())),
        },
    }
}

impl Held {
    /// Lets it go into its program.
    pub(super) fn release(self) {
        // It fails only if the child was killed meanwhile: its status tells.
        let _ = rustix::io::write(&self.release, &[1]);
    }

    /// Ends it without having run anything.
    pub(super) fn abandon(self) {
        drop(self.release);
        while let Err(rustix::io::Errno::INTR) = waitpid(Some(self.pid), WaitOptions::empty()) {}
    }
}

/// Returns only if there is no program to become.
fn in_child(prepared: &Prepared, signals: &Signals, wait: OwnedFd) -> u8 {
    let mut wait = File::from(wait);
    if !matches!(wait.read(&mut [0]), Ok(1)) {
        return FAILED;
    }
    signals.for_the_command();
    let name = prepared.argv[0].to_string_lossy();
    let say = |what: &str, e: &io::Error| {
        // Nobody is there to be told that stderr is closed.
        let _ = writeln!(io::stderr(), "jobwarden: {what} {name:?}: {e}");
    };
    if let Some(Err(e)) = prepared.user.as_ref().map(User::become_it) {
        say("cannot change the user for", &e);
        return FAILED;
    }
    let mut argv: Vec<*const libc::c_char> = prepared.argv.iter().map(|a| a.as_ptr()).collect();
    argv.push(std::ptr::null());
    // SAFETY: the array ends with a null pointer, and each other pointer is to a NUL-terminated string that outlives the call.
    unsafe { libc::execvp(argv[0], argv.as_ptr()) };
    let e = io::Error::last_os_error();
    say("cannot run", &e);
    if e.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { NOT_RUNNABLE }
}
