//! The signals that `exec` takes, by signalfd, and the dispositions that the command gets as `exec` got them.

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Passed on to the job. SIGHUP, SIGINT and SIGTERM by the contract; the others would otherwise end `exec` alone, and its job
/// with it by SIGKILL.
const PASSED: [i32; 6] =
    [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGUSR1, libc::SIGUSR2];

/// One signal that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Came {
    pub number: i32,
    /// The kernel sent it (a terminal, a dying session), so all of the process group got it.
    pub by_kernel: bool,
}

/// Blocked signals, and the mask there was before.
pub(super) struct Signals {
    before: libc::sigset_t,
    taken: libc::sigset_t,
}

impl Signals {
    /// Blocks what `exec` takes. A signal that was ignored when this process began stays ignored, for the command too
    /// (nohup, background jobs of a shell without job control).
    pub(super) fn block() -> io::Result<Self> {
        // SAFETY: plain system calls on structures of this stack; sigset_t and sigaction are plain data.
        unsafe {
            let mut taken: libc::sigset_t = std::mem::zeroed();
            let mut before: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut taken);
            for n in PASSED {
                let mut old: libc::sigaction = std::mem::zeroed();
                libc::sigaction(n, std::ptr::null(), &raw mut old);
                if old.sa_sigaction != libc::SIG_IGN {
                    libc::sigaddset(&raw mut taken, n);
                }
            }
            // An ignored SIGCHLD would reap the command behind our back.
            libc::signal(libc::SIGCHLD, libc::SIG_DFL);
            libc::sigaddset(&raw mut taken, libc::SIGCHLD);
            if libc::sigprocmask(libc::SIG_BLOCK, &raw const taken, &raw mut before) != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Self { before, taken })
        }
    }

    /// In the forked child: the mask as it was; SIGPIPE as a program expects it, since Rust ignores it; and, as timeout(1) does
    /// it, the terminal's stops.
    pub(super) fn for_the_command(&self) {
        // SAFETY: async-signal-safe calls on this process.
        unsafe {
            for n in [libc::SIGPIPE, libc::SIGTTIN, libc::SIGTTOU] {
                libc::signal(n, libc::SIG_DFL);
            }
            libc::sigprocmask(libc::SIG_SETMASK, &raw const self.before, std::ptr::null_mut());
        }
    }

    /// A signal that has come and would be passed on to the job; it is taken.
    pub(super) fn pending(&self) -> Option<u8> {
        // SAFETY: plain calls on valid sets of this stack; no information on the signal is asked for.
        let n = unsafe {
            let mut wanted = self.taken;
            libc::sigdelset(&raw mut wanted, libc::SIGCHLD);
            let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            libc::sigtimedwait(&raw const wanted, std::ptr::null_mut(), &raw const now)
        };
        u8::try_from(n).ok().filter(|&n| n != 0)
    }

    /// Unblocks again: what has come meanwhile has its usual effect at once.
    pub(super) fn restore(&self) {
        // SAFETY: `before` is a valid set.
        unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const self.before, std::ptr::null_mut()) };
    }

    /// Needs a tokio runtime.
    pub(super) fn stream(&self) -> io::Result<Stream> {
        // SAFETY: `taken` is a valid set; a descriptor that is not negative is new and ours.
        let fd = unsafe {
            let fd = libc::signalfd(-1, &raw const self.taken, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        // SAFETY: an OwnedFd keeps its descriptor open and the same until it is dropped, and AsyncFd drops it last.
        let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?;
        Ok(Stream(fd))
    }
}

pub(super) struct Stream(AsyncFd<OwnedFd>);

impl Stream {
    pub(super) async fn next(&self) -> io::Result<Came> {
        loop {
            let mut ready = self.0.readable().await?;
            // Not ready after all: `try_io` has noted that, and the next look waits.
            if let Ok(came) = ready.try_io(|fd| read(fd.get_ref())) {
                return came;
            }
        }
    }
}

fn read(fd: &OwnedFd) -> io::Result<Came> {
    // SAFETY: all-zero is a valid value of this plain C struct, which the kernel fills up to its size.
    let mut info: libc::signalfd_siginfo = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::signalfd_siginfo>();
    // SAFETY: the buffer is that structure, writable for `size` bytes.
    let n = unsafe { libc::read(fd.as_raw_fd(), (&raw mut info).cast(), size) };
    if n < 0 {
        return Err(io::Error::last_os_error());
    }
    // Numbers and codes fit: the kernel widened them from int. SI_KERNEL and above are the kernel's own.
    Ok(Came { number: info.ssi_signo as i32, by_kernel: info.ssi_code > 0 })
}
