//! The uid at the other end of a TCP connection within this host, from the kernel (sock_diag(7)). Reads nothing of /proc: its
//! table of sockets is as long as the clients make it.

use std::io;
use std::net::{IpAddr, SocketAddr};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
};

/// `linux/sock_diag.h`.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
/// `struct nlmsghdr`, `struct inet_diag_req_v2`, `struct inet_diag_msg`.
const HEADER: usize = 16;
const REQUEST: usize = 56;
const MESSAGE: usize = 72;
/// Of `idiag_uid` and `idiag_inode` in the last.
const UID: usize = 64;
const INODE: usize = 68;

/// The uid of the socket that is `peer` to our `local`. None: it is not on this host, or it is closed already (the kernel gives
/// uid 0 for a socket that no process has), or the kernel cannot tell.
pub(super) fn uid(local: SocketAddr, peer: SocketAddr) -> Option<u32> {
    let (local, peer) = (canonical(local), canonical(peer));
    // A client on this host that uses another of its addresses is found as well: it has the same address as we.
    if !peer.ip().is_loopback() && peer.ip() != local.ip() {
        return None;
    }
    ask(&request(peer, local)).ok().flatten()
}

/// An IPv6 socket shows IPv4 clients as mapped addresses.
fn canonical(a: SocketAddr) -> SocketAddr {
    SocketAddr::new(a.ip().to_canonical(), a.port())
}

fn request(source: SocketAddr, destination: SocketAddr) -> [u8; HEADER + REQUEST] {
    let mut b = [0; HEADER + REQUEST];
    let mut at = 0;
    let mut put = |bytes: &[u8]| {
        b[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
    };
    put(&((HEADER + REQUEST) as u32).to_ne_bytes());
    put(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    put(&NLM_F_REQUEST.to_ne_bytes());
    put(&[0; 8]);
    let family = if source.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    put(&[family.as_raw() as u8, libc::IPPROTO_TCP as u8, 0, 0]);
    // Every state.
    put(&u32::MAX.to_ne_bytes());
    put(&source.port().to_be_bytes());
    put(&destination.port().to_be_bytes());
    for a in [source.ip(), destination.ip()] {
        let mut padded = [0; 16];
        match a {
            IpAddr::V4(a) => padded[..4].copy_from_slice(&a.octets()),
            IpAddr::V6(a) => padded = a.octets(),
        }
        put(&padded);
    }
    put(&[0; 4]);
    // INET_DIAG_NOCOOKIE.
    put(&[0xff; 8]);
    b
}

/// The kernel answers before send(2) returns, so nothing is waited for.
fn ask(request: &[u8]) -> io::Result<Option<u32>> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, Some(netlink::INET_DIAG))?;
    send(&fd, request, SendFlags::empty())?;
    let mut answer = [0; 1024];
    let (n, _) = recv(&fd, &mut answer[..], RecvFlags::empty())?;
    Ok(answer.get(..n).and_then(owner))
}

fn owner(answer: &[u8]) -> Option<u32> {
    let kind = u16::from_ne_bytes(answer.get(4..6)?.try_into().ok()?);
    let message = answer.get(HEADER..HEADER + MESSAGE).filter(|_| kind == SOCK_DIAG_BY_FAMILY)?;
    let word = |at: usize| Some(u32::from_ne_bytes(message.get(at..at + 4)?.try_into().ok()?));
    word(UID).filter(|_| word(INODE).is_some_and(|i| i != 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn a_socket_of_this_process_has_its_uid_and_a_closed_one_has_none() {
        let own = rustix::process::geteuid().as_raw();
        for address in ["127.0.0.1:0", "127.0.0.9:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else {
                // A kernel without IPv6; the IPv4 ones are always there.
                assert!(address.starts_with('['), "{address}");
                continue;
            };
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (ours, peer) = listener.accept().unwrap();
            let local = ours.local_addr().unwrap();
            assert_eq!(uid(local, peer), Some(own), "{address}");
            drop(client);
            assert_eq!(uid(local, peer), None, "{address}: the client has closed it");
        }
        let far = |a: &str| a.parse().unwrap();
        assert_eq!(uid(far("192.0.2.1:80"), far("192.0.2.2:1234")), None);
    }

    #[test]
    fn an_ipv4_client_of_an_ipv6_socket_is_found() {
        let Ok(listener) = TcpListener::bind("[::]:0") else { return };
        let port = listener.local_addr().unwrap().port();
        let _client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let (ours, peer) = listener.accept().unwrap();
        assert_eq!(uid(ours.local_addr().unwrap(), peer), Some(rustix::process::geteuid().as_raw()));
    }

    #[test]
    fn answers_that_are_cut_or_errors_name_nobody() {
        assert_eq!(owner(&[]), None);
        assert_eq!(owner(&[0; HEADER]), None);
        let mut error = [1; HEADER + MESSAGE];
        error[4..6].copy_from_slice(&2_u16.to_ne_bytes());
        assert_eq!(owner(&error), None);
    }
}
