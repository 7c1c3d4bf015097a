//! What the service manager is told (sd_notify(3)): ready, reloading, stopping, and that the core is alive. A datagram each,
//! never waited for. Without a manager nothing is done.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

#[derive(Debug, Default)]
pub(super) struct ServiceManager {
    to: Option<(UnixDatagram, SocketAddr)>,
    ready: bool,
}

impl ServiceManager {
    /// From `NOTIFY_SOCKET`. A socket that cannot be used is told in the log.
    pub(super) fn from_env() -> Self {
        let to = std::env::var_os("NOTIFY_SOCKET").filter(|s| !s.is_empty()).and_then(|name: OsString| {
            let made = open(&name);
            if let Err(e) = &made {
                tracing::error!(socket = ?name, error = %e, "the service manager cannot be told anything");
            }
            made.ok()
        });
        Self { to, ready: false }
    }

    fn say(&self, what: &str) {
        if let Some((socket, to)) = &self.to
            && let Err(e) = socket.send_to_addr(what.as_bytes(), to)
        {
            tracing::debug!(error = %e, what, "the service manager was not told");
        }
    }

    /// Synced for the first time.
    pub(super) fn ready(&mut self) {
        if !std::mem::replace(&mut self.ready, true) {
            self.say("READY=1\nSTATUS=follows every process");
        }
    }

    /// `now`: CLOCK_MONOTONIC in µs, as Type=notify-reload wants it.
    pub(super) fn reloading(&self, now: u64) {
        self.say(&format!("RELOADING=1\nMONOTONIC_USEC={now}"));
    }

    /// With the new config or, if that was refused, the old one.
    pub(super) fn reloaded(&self) {
        self.say("READY=1");
    }

    pub(super) fn stopping(&self) {
        self.say("STOPPING=1");
    }

    /// To be called by the task that must be alive, several times within the unit's WatchdogSec.
    pub(super) fn alive(&self) {
        self.say("WATCHDOG=1");
    }
}

/// A path, or after an `@` an abstract name.
fn open(name: &OsStr) -> io::Result<(UnixDatagram, SocketAddr)> {
    let to = match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(name)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    Ok((socket, to))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manager_is_told_by_path_and_by_abstract_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("n");
        let name = format!("jobwarden-test-{}", std::process::id());
        let by_name = SocketAddr::from_abstract_name(&name).unwrap();
        let ends = [
            (UnixDatagram::bind(&path).unwrap(), path.into_os_string()),
            (UnixDatagram::bind_addr(&by_name).unwrap(), format!("@{name}").into()),
        ];
        for (end, given) in ends {
            let mut n = ServiceManager { to: Some(open(&given).unwrap()), ready: false };
            n.ready();
            n.ready();
            n.reloading(7);
            n.stopping();
            let next = || {
                let mut b = [0; 100];
                let n = end.recv(&mut b).unwrap();
                String::from_utf8_lossy(&b[..n]).into_owned()
            };
            let (ready, reloading, stopping) = (next(), next(), next());
            assert!(ready.starts_with("READY=1"), "{ready}");
            assert!(reloading.starts_with("RELOADING=1") && reloading.contains("=7"), "{reloading}");
            assert!(stopping.starts_with("STOPPING=1"), "{stopping}");
            drop(end);
            // Nobody listens any more: no harm.
            n.alive();
        }
        assert!(open(OsStr::new(&"x".repeat(200))).is_err());
    }
}
