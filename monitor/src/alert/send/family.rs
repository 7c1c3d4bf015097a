//! Ending all that one run of a program started, wherever it went: by a mark in the environment, which every descendant
//! inherits at fork, and which says which run it was. A descendant that clears its environment and leaves the process
//! group escapes this.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open, pidfd_send_signal};

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
        Self(format!("{}:{}:{run}", std::process::id(), crate::host::boot_now()))
    }

    pub(super) fn value(&self) -> &str {
        &self.0
    }

    /// Kills the process group `leader` and all who carry the mark, until none is left; says how many were found beside
    /// the program itself. Blocking work is done on a thread of its own.
    pub(super) async fn end(&self, leader: Option<u32>) -> usize {
        let mark = self.clone();
        let work = tokio::task::spawn_blocking(move || mark.end_blocking(leader));
        work.await.unwrap_or_default()
    }

    fn end_blocking(&self, leader: Option<u32>) -> usize {
        let needle = format!("{VARIABLE}={}", self.0).into_bytes();
        let mut ended = 0;
        for round in 0..ROUNDS {
            // The group lives on under this number while it has a member, and the number is not given to a process
            // before: no stranger can be hit as long as a member carries the mark. So look first.
            let found = carriers(&needle);
            if found.is_empty() {
                break;
            }
            if let Some(group) = leader.and_then(|p| Pid::from_raw(p.cast_signed()))
                && found.iter().any(|(_, pid)| rustix::process::getpgid(Some(*pid)) == Ok(group))
            {
                // An error means that it is gone.
                let _ = kill_process_group(group, Signal::KILL);
            }
            for (fd, pid) in &found {
                let killed = pidfd_send_signal(fd, Signal::KILL).is_ok();
                ended += usize::from(
                    killed && Some(pid.as_raw_nonzero().get().cast_unsigned()) != leader && round == 0,
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        ended
    }
}

/// The living who carry the mark, each held by a pidfd that was opened before its environment was read: so the one that
/// is killed is the one that was looked at, whatever became of its pid.
fn carriers(needle: &[u8]) -> Vec<(OwnedFd, Pid)> {
    let Ok(dir) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = dir.flatten().filter_map(|e| pid_of(&e.file_name()));
    pids.filter_map(|pid| {
        let fd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        let mut environ = Vec::new();
        let file = File::open(format!("/proc/{}/environ", pid.as_raw_nonzero())).ok()?;
        // A zombie's is empty, so the dead are not found.
        file.take(MAX_ENVIRON).read_to_end(&mut environ).ok()?;
        environ.split(|&b| b == 0).any(|v| v == needle).then_some((fd, pid))
    })
    .collect()
}

fn pid_of(name: &OsStr) -> Option<Pid> {
    Pid::from_raw(name.to_str()?.parse().ok()?)
}
