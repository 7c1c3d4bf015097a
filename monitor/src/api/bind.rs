//! The sockets themselves: taking over a stale one, refusing one in use, never a moment with the wrong mode, and putting the
//! control socket back where its path was removed.

use std::fs::{File, Permissions};
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FlockOperation, Mode, fchmod, flock};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};

use crate::files::{FolderError, trusted_folder};

/// Connections that may wait to be accepted. A full queue refuses root's clients as well, so it is long; net.core.somaxconn
/// bounds it.
const BACKLOG: i32 = 4096;

#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(
        "the control socket {path} is in use by an agent that runs already. Stop it, or give this one another --socket"
    )]
    InUse { path: PathBuf },
    #[error("{path} exists and is no socket: it is left alone. Give another --socket")]
    NoSocket { path: PathBuf },
    #[error("the control socket {path}: {source}. Another path can be given with --socket")]
    Folder { path: PathBuf, source: FolderError },
    #[error("cannot make the control socket {path}: {doing}: {source}")]
    Socket { path: PathBuf, doing: &'static str, source: io::Error },
    #[error("agent.socket_group: no group {group:?} on this host")]
    Group { group: String },
    #[error("{address} is in use: another program (or another agent) listens there. Give another --listen")]
    PortInUse { address: SocketAddr },
    #[error("cannot listen on {address}: {source}")]
    Listen { address: SocketAddr, source: io::Error },
}

/// A bound control socket's file, which goes with this. To be dropped before its listener is closed: as long as that
/// answers, no other agent takes the path over, so it cannot be another's file that is removed.
#[derive(Debug)]
struct Bound {
    path: PathBuf,
    /// For where somebody removed the file by hand and another agent made its own.
    identity: Identity,
}

/// Device, inode (which is soon reused), and the time it was made.
type Identity = (u64, u64, i64, i64);

impl Drop for Bound {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|i| i == self.identity) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<Identity> {
    std::fs::symlink_metadata(path).map(|m| (m.dev(), m.ino(), m.mtime(), m.mtime_nsec()))
}

/// The control socket's file; removed when this is dropped.
#[derive(Debug)]
pub(super) struct ControlPath(Arc<Held>);

#[derive(Debug)]
struct Held {
    path: PathBuf,
    group: Option<u32>,
    /// None: the server stops, and nothing is bound any more.
    bound: Mutex<Option<Bound>>,
}

impl ControlPath {
    pub(super) fn bind(path: &Path, group: Option<u32>) -> Result<(UnixListener, Self), ServeError> {
        let (listener, bound) = control(path, group)?;
        let bound = Mutex::new(Some(bound));
        Ok((listener, Self(Arc::new(Held { path: path.to_owned(), group, bound }))))
    }

    pub(super) fn watch(&self) -> PathWatch {
        PathWatch(Arc::clone(&self.0))
    }
}

impl Drop for ControlPath {
    fn drop(&mut self) {
        self.0.bound.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// Finds out whether the path still leads to this agent.
#[derive(Clone, Debug)]
pub(super) struct PathWatch(Arc<Held>);

/// What a look at the path gave.
#[derive(Debug)]
pub(super) enum Checked {
    /// The path leads here.
    Ours,
    /// The file was removed, or nobody listens on the one that replaced it: bound again. With the reason where the group
    /// could not be set.
    Restored(UnixListener, Option<ServeError>),
    /// Another process listens there, or the socket cannot be made.
    Lost(ServeError),
    Stopped,
}

impl PathWatch {
    /// Blocks for up to two seconds.
    ///
    /// A process that binds the same path between the look and the bind makes the bind fail; a server that stops meanwhile
    /// waits for the lock, and then removes what was bound here.
    pub(super) fn check(&self) -> Checked {
        let Held { path, group, bound } = &*self.0;
        let mut bound = bound.lock().unwrap_or_else(PoisonError::into_inner);
        match &*bound {
            None => return Checked::Stopped,
            Some(b) if identity(path).is_ok_and(|i| i == b.identity) => return Checked::Ours,
            Some(_) => {}
        }
        // CAP_CHOWN was dropped after the start: without it the file stays root's own.
        let (made, group_error) = match (control(path, *group), group) {
            (Err(e @ ServeError::Socket { .. }), Some(_)) => (control(path, None), Some(e)),
            (made, _) => (made, None),
        };
        match made {
            Ok((listener, new)) => {
                *bound = Some(new);
                Checked::Restored(listener, group_error)
            }
            Err(e) => Checked::Lost(e),
        }
    }
}

/// Binds the control socket with mode 0600, or 0660 and this group.
fn control(path: &Path, group: Option<u32>) -> Result<(UnixListener, Bound), ServeError> {
    let failed = |doing| move |source| ServeError::Socket { path: path.to_owned(), doing, source };
    let dir = path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Whoever can exchange the socket for a symbolic link between two of the steps below chooses what is given to the group.
    let dir =
        trusted_folder(dir, 0o755).map_err(|source| ServeError::Folder { path: path.to_owned(), source })?;
    // Two agents that start at once must not both take the same stale socket over: one at a time looks and binds.
    let lock = File::open(&dir).map_err(failed("opening its folder"))?;
    lock_exclusive(&lock).map_err(failed("locking its folder"))?;
    clear_stale(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let make = || -> io::Result<UnixListener> {
        let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // unix(7): the file gets the socket's own mode at bind, so nobody can connect between bind and a later chmod.
        fchmod(&fd, Mode::RUSR | Mode::WUSR)?;
        bind(&fd, &SocketAddrUnix::new(path)?)?;
        Ok(fd.into())
    };
    let listener = make().map_err(failed("binding it"))?;
    let bound = Bound { path: path.to_owned(), identity: identity(path).map_err(failed("looking at it"))? };
    if let Some(gid) = group {
        // The group first: with 0660 before it, root's own group could connect.
        std::os::unix::fs::chown(path, None, Some(gid)).map_err(failed("giving it to its group"))?;
        std::fs::set_permissions(path, Permissions::from_mode(0o660)).map_err(failed("setting its mode"))?;
    }
    // Nobody can connect before this.
    listen(listener.as_fd(), BACKLOG).map_err(io::Error::from).map_err(failed("listening on it"))?;
    Ok((listener, bound))
}

/// An exclusive flock that is not waited for without end: in a shared folder anybody may hold one.
fn lock_exclusive(dir: &File) -> io::Result<()> {
    let patience = std::time::Instant::now() + std::time::Duration::from_secs(2);
    loop {
        match flock(dir, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) if std::time::Instant::now() < patience => {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            r => return r.map_err(io::Error::from),
        }
    }
}

/// Removes a socket that nobody listens on.
fn clear_stale(path: &Path) -> Result<(), ServeError> {
    let failed = |doing| move |source| ServeError::Socket { path: path.to_owned(), doing, source };
    match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(failed("looking at what is there")(e)),
        Ok(m) if !m.file_type().is_socket() => return Err(ServeError::NoSocket { path: path.to_owned() }),
        Ok(_) => {}
    }
    // Not blocking: an agent whose backlog is full would be waited for.
    let connect = || -> io::Result<()> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        Ok(rustix::net::connect(&fd, &SocketAddrUnix::new(path)?)?)
    };
    match connect() {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed("removing the stale one"))
        }
        // Anything that answers is somebody's, also one whose backlog is full.
        Ok(()) => Err(ServeError::InUse { path: path.to_owned() }),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(ServeError::InUse { path: path.to_owned() }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(failed("trying the one that is there")(e)),
    }
}

pub(super) fn tcp(address: SocketAddr) -> Result<std::net::TcpListener, ServeError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::AddrInUse => ServeError::PortInUse { address },
        _ => ServeError::Listen { address, source },
    };
    // std sets SO_REUSEADDR, so a port in TIME_WAIT after a restart is no hindrance.
    let listener = std::net::TcpListener::bind(address).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    // std's own queue is short.
    listen(listener.as_fd(), BACKLOG).map_err(io::Error::from).map_err(failed)?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stale_is_taken_over_and_live_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/s.sock");
        let (first, bound) = control(&path, None).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        let e = control(&path, None).unwrap_err();
        assert!(matches!(e, ServeError::InUse { .. }), "{e}");
        // As a SIGKILL leaves it: nobody listens, the file is there.
        drop(first);
        // Longer than a tick of the clock that files are stamped by.
        std::thread::sleep(std::time::Duration::from_millis(30));
        let (_second, second_bound) = control(&path, None).unwrap();
        // The first one's end does not remove the second one's file.
        drop(bound);
        assert!(path.exists());
        drop(second_bound);
        assert!(!path.exists());
    }

    #[test]
    fn a_path_that_was_removed_is_bound_again_and_one_of_another_process_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        let (_first, held) = ControlPath::bind(&path, None).unwrap();
        let watch = held.watch();
        assert!(matches!(watch.check(), Checked::Ours));
        std::fs::remove_file(&path).unwrap();
        let Checked::Restored(second, None) = watch.check() else { panic!("not restored") };
        let _client = std::os::unix::net::UnixStream::connect(&path).unwrap();
        assert!(second.accept().is_ok() && matches!(watch.check(), Checked::Ours));
        std::fs::remove_file(&path).unwrap();
        let other = UnixListener::bind(&path).unwrap();
        assert!(matches!(watch.check(), Checked::Lost(ServeError::InUse { .. })));
        drop(other);
        assert!(matches!(watch.check(), Checked::Restored(..)));
        drop(held);
        assert!(matches!(watch.check(), Checked::Stopped));
        assert!(!path.exists());
    }

    #[test]
    fn other_files_are_left_alone_and_ports_in_use_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "x").unwrap();
        assert!(matches!(control(&path, None).unwrap_err(), ServeError::NoSocket { .. }));
        assert_eq!(std::fs::read(&path).unwrap(), b"x");
        let first = tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let e = tcp(first.local_addr().unwrap()).unwrap_err();
        assert!(matches!(e, ServeError::PortInUse { .. }), "{e}");
    }
}
