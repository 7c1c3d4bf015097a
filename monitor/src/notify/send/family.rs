//! Ending all that one run of a program started: its process group; all who carry a mark in their environment, which
//! every descendant inherits at fork and which says which run it was; and who descends from any of them at that moment. A
//! descendant that clears its environment, leaves the process group and has lost its parents escapes this.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open, pidfd_send_signal};

use crate::sources::proc::Proc;

pub(super) const VARIABLE: &str = "JOBWARDEN_NOTIFY_RUN";
/// The mark stands in the first part of an environment of ours; one that was grown beyond this is not read further.
const MAX_ENVIRON: u64 = 256 * 1024;
/// A round that finds nobody ends it; something that forks faster than this many rounds is left to whoever looks next.
const ROUNDS: u32 = 20;

/// Names one run: this agent, since its start, and a number.
#[derive(Clone, Debug)]
pub(super) struct Mark(String);

impl Mark {
    pub(super) fn new(run: u64) -> Self {
        Self(format!("{}:{}:{run}", std::process::id(), crate::sources::host::boot_now()))
    }

    pub(super) fn value(&self) -> &str {
        &self.0
    }

    /// Kills the process group `leader` and all who belong to this run, until none is left; says how many were found
    /// beside the program itself. `leader` must not be reaped yet. Blocking work is done on a thread of its own.
    pub(super) async fn end(&self, leader: u32) -> usize {
        let mark = self.clone();
        let work = tokio::task::spawn_blocking(move || mark.end_blocking(leader));
        work.await.unwrap_or_default()
    }

    fn end_blocking(&self, leader: u32) -> usize {
        let needle = format!("{VARIABLE}={}", self.0).into_bytes();
        let Some(group) = Pid::from_raw(leader.cast_signed()) else { return 0 };
        let mut ended = 0;
        for round in 0..ROUNDS {
            let found = family(&needle, group);
            // The leader is not reaped, so its number is nobody else's group. An error means that the group is gone.
            let _ = kill_process_group(group, Signal::KILL);
            if found.is_empty() {
                break;
            }
            for (fd, pid) in &found {
                let killed = pidfd_send_signal(fd, Signal::KILL).is_ok();
                ended += usize::from(killed && *pid != group && round == 0);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        ended
    }
}

/// The living of this run, each held by a pidfd that was opened before it was looked at: so the one that is killed is the
/// one that was looked at, whatever became of its pid.
fn family(needle: &[u8], leader: Pid) -> Vec<(OwnedFd, Pid)> {
    let proc = Proc::default();
    let raw = |pid: Pid| pid.as_raw_nonzero().get().cast_unsigned();
    let all = || -> Vec<Pid> {
        let Ok(dir) = std::fs::read_dir("/proc") else { return Vec::new() };
        dir.flatten().filter_map(|e| pid_of(&e.file_name())).collect()
    };
    let marked = |pid: Pid| {
        let fd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        // A zombie's is empty, so the dead are not found.
        let environ = proc.environ(raw(pid), MAX_ENVIRON).ok()?;
        environ.split(|&b| b == 0).any(|v| v == needle).then_some((fd, pid))
    };
    let alive = |pid: Pid| proc.stat(raw(pid)).ok().filter(|s| !matches!(s.state, b'Z' | b'X'));
    let mut found: Vec<(OwnedFd, Pid)> = all().into_iter().filter_map(marked).collect();
    if !found.iter().any(|(_, pid)| *pid == leader)
        && let Ok(fd) = pidfd_open(leader, PidfdFlags::empty())
        && alive(leader).is_some()
    {
        found.push((fd, leader));
    }
    // Their children, who need not carry the mark. The parent still has its number after its child was seen to have it for
    // a parent, so it is a child of that one and of no stranger that got the number later.
    loop {
        let parents: HashMap<u32, usize> = found.iter().enumerate().map(|(i, (_, p))| (raw(*p), i)).collect();
        let child = |pid: Pid| {
            let fd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
            let &parent = parents.get(&alive(pid)?.ppid)?;
            test_pidfd(&found[parent].0).then_some((fd, pid))
        };
        let suspects = all().into_iter().filter(|p| !parents.contains_key(&raw(*p)));
        let new: Vec<_> = suspects
            .filter(|&p| alive(p).is_some_and(|s| parents.contains_key(&s.ppid)))
            .filter_map(child)
            .collect();
        if new.is_empty() {
            return found;
        }
        found.extend(new);
    }
}

/// Whether it has not been reaped: its pid is still its own.
fn test_pidfd(fd: &OwnedFd) -> bool {
    // SAFETY: signal 0 sends nothing; the descriptor is open and no siginfo is given.
    unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, fd.as_raw_fd(), 0, std::ptr::null::<libc::siginfo_t>(), 0)
            == 0
    }
}

fn pid_of(name: &OsStr) -> Option<Pid> {
    Pid::from_raw(name.to_str()?.parse().ok()?)
}
