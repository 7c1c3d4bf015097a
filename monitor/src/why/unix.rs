//! The other end of a unix socket, by `sock_diag(7)` (CONFIG_UNIX_DIAG), in the network namespace of the process that
//! is asked about.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::time::Duration;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use crate::sources::proc::Proc;

/// A unix socket, seen from its other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Peer {
    /// None: it is not connected (any more).
    pub inode: Option<u64>,
    /// Bound to a name, or its peer is: a connection to a server rather than one of a pair.
    pub named: bool,
}

// include/uapi/linux/{netlink,sock_diag,unix_diag}.h
const NETLINK_SOCK_DIAG: u32 = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_HEAD: usize = 16;
const UNIX_DIAG_MSG: usize = 16;
const UDIAG_SHOW_NAME: u32 = 1;
const UDIAG_SHOW_PEER: u32 = 4;
const UNIX_DIAG_NAME: u16 = 0;
const UNIX_DIAG_PEER: u16 = 2;

/// The peers of the unix sockets with these inode numbers, in order; None: no unix socket, or gone.
///
/// Works in a thread of its own where that has to enter another network namespace (CAP_SYS_ADMIN).
pub(super) fn peers(proc: &Proc, pid: u32, inodes: &[u32]) -> io::Result<Vec<Option<Peer>>> {
    let theirs = std::fs::read_link(proc.path(pid, "ns/net"))?;
    if std::fs::read_link(proc.root().join("self/ns/net")).is_ok_and(|ours| ours == theirs) {
        return ask(inodes);
    }
    let ns = File::open(proc.path(pid, "ns/net"))?;
    std::thread::scope(|s| {
        let asked = std::thread::Builder::new().spawn_scoped(s, || {
            let kind = Some(rustix::thread::LinkNameSpaceType::Network);
            rustix::thread::move_into_link_name_space(ns.as_fd(), kind)?;
            ask(inodes)
        })?;
        asked.join().unwrap_or_else(|_| Err(io::Error::other("the thread that asked sock_diag panicked")))
    })
}

fn ask(inodes: &[u32]) -> io::Result<Vec<Option<Peer>>> {
    let protocol = std::num::NonZeroU32::new(NETLINK_SOCK_DIAG).map(rustix::net::Protocol::from_raw);
    let fd =
        rustix::net::socket_with(AddressFamily::NETLINK, SocketType::DGRAM, SocketFlags::CLOEXEC, protocol)?;
    rustix::net::sockopt::set_socket_timeout(
        &fd,
        rustix::net::sockopt::Timeout::Recv,
        Some(Duration::from_millis(200)),
    )?;
    let one = |inode: u32| -> io::Result<Option<(Option<u64>, bool)>> {
        rustix::net::send(&fd, &request(inode), SendFlags::empty())?;
        let mut buf = [0_u8; 4096];
        let (n, _) = rustix::net::recv(&fd, &mut buf, RecvFlags::empty())?;
        Ok(answer(buf.get(..n).unwrap_or_default()))
    };
    let mut found = Vec::new();
    for &inode in inodes {
        let Some((peer, mut named)) = one(inode)? else {
            found.push(None);
            continue;
        };
        if let Some(Some((_, peer_named))) = peer.and_then(|p| u32::try_from(p).ok()).map(one).transpose()? {
            named |= peer_named;
        }
        found.push(Some(Peer { inode: peer, named }));
    }
    Ok(found)
}

/// `struct nlmsghdr` and `struct unix_diag_req` for one socket by inode, whatever its cookie.
fn request(inode: u32) -> Vec<u8> {
    let mut b = Vec::with_capacity(NLMSG_HEAD + 24);
    b.extend((NLMSG_HEAD as u32 + 24).to_ne_bytes());
    b.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    b.extend(NLM_F_REQUEST.to_ne_bytes());
    b.extend([0; 8]);
    b.extend([AddressFamily::UNIX.as_raw() as u8, 0, 0, 0]);
    b.extend(u32::MAX.to_ne_bytes());
    b.extend(inode.to_ne_bytes());
    b.extend((UDIAG_SHOW_NAME | UDIAG_SHOW_PEER).to_ne_bytes());
    b.extend([0xff; 8]);
    b
}

/// The peer's inode, and whether the socket has a name; None for an error (no such socket).
fn answer(b: &[u8]) -> Option<(Option<u64>, bool)> {
    let u16_at = |at: usize| Some(u16::from_ne_bytes(b.get(at..at + 2)?.try_into().ok()?));
    let u32_at = |at: usize| Some(u32::from_ne_bytes(b.get(at..at + 4)?.try_into().ok()?));
    if u16_at(4)? != SOCK_DIAG_BY_FAMILY {
        return None;
    }
    let (mut peer, mut named) = (None, false);
    let end = (u32_at(0)? as usize).min(b.len());
    let mut at = NLMSG_HEAD + UNIX_DIAG_MSG;
    while at + 4 <= end {
        let len = usize::from(u16_at(at)?);
        match u16_at(at + 2)? {
            UNIX_DIAG_PEER => peer = u32_at(at + 4).map(u64::from),
            UNIX_DIAG_NAME => named = len > 4,
            _ => {}
        }
        at += len.max(4).next_multiple_of(4);
    }
    Some((peer.filter(|&p| p != 0), named))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;
    use std::os::unix::fs::MetadataExt as _;
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    fn inode(s: &impl std::os::fd::AsFd) -> u64 {
        let fd = s.as_fd().as_raw_fd();
        std::fs::metadata(format!("/proc/self/fd/{fd}")).unwrap().ino()
    }

    #[test]
    fn a_pair_and_a_connection() {
        let (a, b) = UnixStream::pair().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let client = UnixStream::connect(dir.path().join("s")).unwrap();
        let (server, _) = listener.accept().unwrap();
        let asked = [inode(&a) as u32, inode(&client) as u32, 1];
        let got = peers(&Proc::default(), std::process::id(), &asked).unwrap();
        let pair = Peer { inode: Some(inode(&b)), named: false };
        let connection = Peer { inode: Some(inode(&server)), named: true };
        assert_eq!(got, [Some(pair), Some(connection), None]);
        drop(b);
        assert_eq!(ask(&asked[..1]).unwrap(), [Some(Peer { inode: None, named: false })]);
    }

    proptest::proptest! {
        #[test]
        fn no_answer_panics(mut b in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            if b.len() > 6 {
                b[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
            }
            let _ = answer(&b);
        }
    }
}
