//! The controlling terminal. The command stays in this process's group, so that Ctrl-C and Ctrl-Z reach it as they reach any
//! program of the shell's job; what it changed and could not put back, since it was killed, is put back here.

use std::fs::File;
use std::os::fd::AsFd as _;

use rustix::process::{Pid, test_kill_process_group};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetpgrp, tcsetattr, tcsetpgrp};

/// What the terminal was like, if there is one and this process was in its foreground.
#[derive(Debug)]
pub(super) struct Terminal(Option<Was>);

#[derive(Debug)]
struct Was {
    tty: File,
    group: Pid,
    modes: Termios,
}

impl Terminal {
    pub(super) fn remember() -> Self {
        let was = || {
            let tty = File::open("/dev/tty").ok()?;
            let group = rustix::process::getpgrp();
            let modes = tcgetattr(tty.as_fd()).ok()?;
            (tcgetpgrp(tty.as_fd()).ok()? == group).then_some(Was { tty, group, modes })
        };
        Self(was())
    }

    /// Whether there is a shell that controls this process's stops.
    pub(super) fn is_there(&self) -> bool {
        self.0.is_some()
    }

    /// The foreground back to this process's group, if a group that is dead by now had taken it (a shell did, for one), and
    /// after a kill the modes too.
    pub(super) fn restore(&self, killed: bool) {
        let Some(was) = &self.0 else { return };
        // SAFETY: changes this process's disposition only; from a background group, tcsetpgrp would stop us otherwise.
        let old = unsafe { libc::signal(libc::SIGTTOU, libc::SIG_IGN) };
        let fd = was.tty.as_fd();
        match tcgetpgrp(fd) {
            // Nobody of that group is left. A living one (a shell that took the terminal back) keeps it.
            Ok(g) if g != was.group && test_kill_process_group(g).is_err() => {
                // It fails when the session has another owner by now: then it is not ours to give.
                let _ = tcsetpgrp(fd, was.group);
            }
            _ => {}
        }
        if killed && tcgetpgrp(fd).is_ok_and(|g| g == was.group) {
            let _ = tcsetattr(fd, OptionalActions::Now, &was.modes);
        }
        // SAFETY: puts back what was there.
        unsafe { libc::signal(libc::SIGTTOU, old) };
    }
}
