//! How `exec` itself ends, from how the command did.

use std::process::ExitCode;

use crate::model::event::WaitStatus;

/// The deadline has passed.
pub(super) const TIMED_OUT: u8 = 124;
/// jobwarden failed.
pub(super) const FAILED: u8 = 125;
/// The command was found and could not be run.
pub(super) const NOT_RUNNABLE: u8 = 126;
pub(super) const NOT_FOUND: u8 = 127;

/// What this process does at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    Exit(u8),
    /// Ends itself by this signal, without a core.
    Signal(u8),
}

impl Finish {
    /// `status` None: the command did not end (it survived SIGKILL, or is spared).
    #[must_use]
    pub(super) fn of(status: Option<WaitStatus>, timed_out: bool, preserve: bool) -> Self {
        match status {
            _ if timed_out && !preserve => Self::Exit(TIMED_OUT),
            None => Self::Exit(if timed_out { TIMED_OUT } else { FAILED }),
            Some(s) => match (s.code(), s.signal()) {
                (Some(code), _) => Self::Exit(code as u8),
                (None, Some(n)) => Self::Signal(n),
                (None, None) => Self::Exit(FAILED),
            },
        }
    }

    /// As a shell shows it.
    #[must_use]
    pub(super) const fn shown(self) -> u8 {
        match self {
            Self::Exit(code) => code,
            Self::Signal(n) => 128 + (n & 0x7f),
        }
    }

    /// Ends this process by the signal, if that is how it shall end; else the exit code to return from `main`.
    #[must_use]
    pub fn code(self) -> ExitCode {
        if let Self::Signal(n) = self {
            let n = i32::from(n);
            // SAFETY: plain system calls on this process alone; the sets and structures live on this stack.
            unsafe {
                let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
                libc::setrlimit(libc::RLIMIT_CORE, &raw const none);
                libc::prctl(libc::PR_SET_DUMPABLE, 0);
                libc::signal(n, libc::SIG_DFL);
                let mut set: libc::sigset_t = std::mem::zeroed();
                libc::sigemptyset(&raw mut set);
                libc::sigaddset(&raw mut set, n);
                libc::sigprocmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
                libc::kill(libc::getpid(), n);
            }
        }
        // Reached with a signal only if that signal's default is not to end a process.
        ExitCode::from(self.shown())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn to_the_letter_of_the_contract() {
        let exited = |c: i32| Some(WaitStatus(c << 8));
        let killed = |s: i32| Some(WaitStatus(s | 0x80));
        for (status, late, preserve, want) in [
            (exited(0), false, false, Finish::Exit(0)),
            (exited(42), false, true, Finish::Exit(42)),
            (exited(0), true, false, Finish::Exit(124)),
            (killed(9), true, false, Finish::Exit(124)),
            (killed(9), true, true, Finish::Signal(9)),
            (exited(3), true, true, Finish::Exit(3)),
            (killed(15), false, false, Finish::Signal(15)),
            (None, true, true, Finish::Exit(124)),
            (None, false, false, Finish::Exit(125)),
        ] {
            assert_eq!(Finish::of(status, late, preserve), want, "{status:?} {late} {preserve}");
        }
        assert_eq!(Finish::Signal(9).shown(), 137);
    }
}
