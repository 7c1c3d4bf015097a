//! Who is at the other end of the control socket, by the kernel's word alone.

use crate::model::outside::OutsideText;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::net::UnixStream;

use super::Peer;

/// Reads the peer's credentials. What cannot be found out makes it less privileged, never more.
///
/// Race: the peer may be gone and its pid be somebody else's before /proc is read. From Linux 6.5 on `SO_PEERPIDFD` names
/// the very process that connected; if it is alive after /proc was read, what was read is its own. Before 6.5 that much
/// time lies open: the moment between connect and accept.
pub(super) fn peer(stream: &UnixStream) -> io::Result<Peer> {
    let cred = stream.peer_cred()?;
    // 0, and no pid, for a peer that has none in this namespace.
    let pid = cred.pid().and_then(|p| u32::try_from(p).ok()).unwrap_or(0);
    let pidfd = peer_pidfd(stream.as_fd());
    let proc = Path::new("/proc").join(pid.to_string());
    let ours = std::fs::read_link("/proc/self/ns/pid")?;
    let same_ns = pid != 0 && std::fs::read_link(proc.join("ns/pid")).is_ok_and(|n| n == ours);
    let exe = std::fs::read_link(proc.join("exe"))
        .ok()
        .map(|p| OutsideText::from_bytes(std::os::unix::ffi::OsStrExt::as_bytes(p.as_os_str())));
    let sure = pidfd.is_none_or(|fd| alive(fd.as_fd()));
    Ok(Peer {
        pid,
        uid: cred.uid(),
        gid: cred.gid(),
        exe: exe.filter(|_| sure),
        privileged: cred.uid() == 0 && same_ns && sure,
    })
}

/// None where the kernel has no `SO_PEERPIDFD` (before 6.5).
fn peer_pidfd(socket: BorrowedFd<'_>) -> Option<OwnedFd> {
    let mut fd: libc::c_int = -1;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `fd` and `len` live over the call and `len` is the size of `fd`.
    let r = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERPIDFD,
            std::ptr::from_mut(&mut fd).cast(),
            &raw mut len,
        )
    };
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    (r == 0 && fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A pidfd becomes readable when its process has ended (pidfd_open(2)).
fn alive(pidfd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(pidfd, PollFlags::IN)];
    matches!(poll(&mut fds, Some(&Timespec::default())), Ok(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_peer_of_this_process_is_this_process() {
        let (a, _b) = UnixStream::pair().unwrap();
        let p = peer(&a).unwrap();
        assert_eq!(p.pid, std::process::id());
        assert_eq!(p.privileged, p.uid == 0);
        assert_eq!(p.exe.as_ref().map(OutsideText::raw), std::env::current_exe().unwrap().to_str());
    }

    #[test]
    fn an_ended_process_is_not_alive() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        let fd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
        assert!(alive(fd.as_fd()));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!alive(fd.as_fd()));
    }
}
