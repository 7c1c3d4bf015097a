//! Processes by pidfd: opened, signalled, and their end noticed. A pidfd names one process for good, so nothing here can
//! reach whoever gets the pid next. Knows nothing of jobs.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::epoll;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

use crate::model::key::Key;

/// A handle on one process (Linux 5.3).
#[derive(Debug)]
pub struct Pidfd(OwnedFd);

impl Pidfd {
    /// None: no process has this pid. Whether it is the one that was meant must be asked *after* this.
    pub fn open(pid: u32) -> io::Result<Option<Self>> {
        let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => Ok(Some(Self(fd))),
            // EINVAL, ENOENT: the number lives on as a thread's, or as that of a group or session whose leader is reaped.
            Err(Errno::SRCH | Errno::INVAL | Errno::NOENT) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Sends a signal from 1 to 64; false: it is gone already.
    pub fn signal(&self, signal: u8) -> io::Result<bool> {
        // SAFETY: the number is only handed to the kernel, which refuses what is no signal; the C library's reserved
        // signals concern handlers of this process, and this signals another.
        let signal = unsafe { Signal::from_raw_unchecked(i32::from(signal)) };
        match pidfd_send_signal(&self.0, signal) {
            Ok(()) => Ok(true),
            Err(Errno::SRCH) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// Whether every thread of it has ended (it may be a zombie still).
    pub fn ended(&self) -> io::Result<bool> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        Ok(poll(&mut fds, Some(&Timespec::default()))? > 0)
    }
}

impl AsFd for Pidfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Processes whose end is awaited: one epoll instance over their pidfds.
#[derive(Debug)]
pub struct PidfdSet {
    epoll: AsyncFd<OwnedFd>,
    held: HashMap<u64, (Key, Pidfd)>,
    tokens: HashMap<Key, u64>,
    next: u64,
}

/// Most ends that one look takes from the kernel.
const BATCH: usize = 256;

impl PidfdSet {
    /// Needs a tokio runtime with I/O.
    pub fn new() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        // SAFETY: an OwnedFd keeps its descriptor open and the same until it is dropped, and AsyncFd drops it last.
        let epoll = unsafe { AsyncFd::register(epoll)? };
        Ok(Self { epoll, held: HashMap::new(), tokens: HashMap::new(), next: 0 })
    }

    pub fn add(&mut self, key: Key, pidfd: Pidfd) -> io::Result<()> {
        let token = self.next;
        self.next += 1;
        let data = epoll::EventData::new_u64(token);
        epoll::add(self.epoll.get_ref(), &pidfd, data, epoll::EventFlags::IN)?;
        self.held.insert(token, (key, pidfd));
        self.tokens.insert(key, token);
        Ok(())
    }

    /// The handle of a process whose end is still awaited.
    #[must_use]
    pub fn get(&self, key: Key) -> Option<&Pidfd> {
        self.held.get(self.tokens.get(&key)?).map(|(_, fd)| fd)
    }

    /// How many have not ended.
    #[must_use]
    pub fn len(&self) -> usize {
        self.held.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Those that have ended since the last look, without waiting. Their handles are closed.
    pub fn take(&mut self) -> io::Result<Vec<Key>> {
        let mut ended = Vec::new();
        loop {
            let mut events = Vec::with_capacity(BATCH);
            let none = rustix::event::Timespec::default();
            let n = match epoll::wait(self.epoll.get_ref(), spare_capacity(&mut events), Some(&none)) {
                Ok(n) => n,
                Err(Errno::INTR) => continue,
                Err(e) => return Err(e.into()),
            };
            for e in &events {
                if let Some((key, pidfd)) = self.held.remove(&e.data.u64()) {
                    epoll::delete(self.epoll.get_ref(), &pidfd)?;
                    self.tokens.remove(&key);
                    ended.push(key);
                }
            }
            if n < BATCH {
                return Ok(ended);
            }
        }
    }

    /// Waits until all have ended, or until `deadline`; gives those that did.
    pub async fn all(&mut self, deadline: Instant) -> io::Result<Vec<Key>> {
        let mut ended = self.take()?;
        while !self.is_empty() {
            match tokio::time::timeout_at(deadline, self.epoll.readable()).await {
                // Cleared before the look: an end between the two makes it ready again.
                Ok(guard) => guard?.clear_ready(),
                Err(_) => break,
            }
            ended.append(&mut self.take()?);
            // A family dies in a burst: one look each millisecond instead of one a process.
            if !self.is_empty() {
                tokio::time::sleep_until(deadline.min(Instant::now() + Duration::from_millis(1))).await;
                ended.append(&mut self.take()?);
            }
        }
        Ok(ended)
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    fn sleeper() -> Child {
        Command::new("sleep").arg("1000").spawn().unwrap()
    }

    #[test]
    fn a_process_that_is_gone_is_no_error() {
        let mut c = sleeper();
        let fd = Pidfd::open(c.id()).unwrap().unwrap();
        assert!(!fd.ended().unwrap());
        assert!(fd.signal(9).unwrap());
        c.wait().unwrap();
        assert!(fd.ended().unwrap());
        assert!(!fd.signal(9).unwrap());
        assert!(Pidfd::open(c.id()).unwrap().is_none());
        assert!(Pidfd::open(0).unwrap().is_none());
        assert!(Pidfd::open(u32::MAX).unwrap().is_none());
    }

    #[tokio::test]
    async fn ends_are_noticed_without_asking() {
        let mut ends = PidfdSet::new().unwrap();
        let mut children: Vec<Child> = (0..300).map(|_| sleeper()).collect();
        for c in &children {
            ends.add(Key::new(c.id(), 1), Pidfd::open(c.id()).unwrap().unwrap()).unwrap();
        }
        assert!(ends.take().unwrap().is_empty());
        let early = ends.all(Instant::now() + Duration::from_millis(20)).await.unwrap();
        assert!(early.is_empty() && ends.len() == 300);
        for c in &children {
            ends.get(Key::new(c.id(), 1)).unwrap().signal(9).unwrap();
        }
        let t = Instant::now();
        assert_eq!(ends.all(t + Duration::from_secs(20)).await.unwrap().len(), 300);
        assert!(ends.is_empty() && t.elapsed() < Duration::from_secs(10));
        for c in &mut children {
            c.wait().unwrap();
        }
    }
}
