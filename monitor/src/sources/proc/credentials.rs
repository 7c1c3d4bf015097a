//! Whose a process is: the credentials that decide what it may open, and whether a reader may look inside it.

use std::io;
use std::os::unix::fs::MetadataExt as _;

use super::{Proc, read};
use crate::model::audience::Audience;

/// What is used of the credentials in /proc/PID/status (`credentials(7)`, `capabilities(7)`). Ids are those of the reader's user
/// namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Credentials {
    /// Real, effective, saved, file system.
    pub uids: [u32; 4],
    pub gids: [u32; 4],
    pub groups: Vec<u32>,
    pub permitted: u64,
    pub effective: u64,
}

impl Credentials {
    #[must_use]
    pub const fn fs_uid(&self) -> u32 {
        self.uids[3]
    }

    #[must_use]
    pub fn in_group(&self, gid: u32) -> bool {
        self.gids[3] == gid || self.groups.contains(&gid)
    }
}

/// Parses /proc/PID/status; None unless all of it is there.
#[must_use]
pub fn parse_credentials(b: &[u8]) -> Option<Credentials> {
    let value = |name: &[u8]| {
        let line = b.split(|&c| c == b'\n').find_map(|l| l.strip_prefix(name))?;
        std::str::from_utf8(line).ok()
    };
    let numbers = |name: &[u8]| -> Option<Vec<u32>> {
        value(name)?.split_ascii_whitespace().map(|n| n.parse().ok()).collect()
    };
    let mask = |name: &[u8]| u64::from_str_radix(value(name)?.trim(), 16).ok();
    Some(Credentials {
        uids: numbers(b"Uid:")?.try_into().ok()?,
        gids: numbers(b"Gid:")?.try_into().ok()?,
        groups: numbers(b"Groups:")?,
        permitted: mask(b"CapPrm:")?,
        effective: mask(b"CapEff:")?,
    })
}

/// Which program a process is running: its start, and where the stack of the program begins, which is another place after
/// each exec (`randomize_va_space`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Incarnation {
    start_ticks: u64,
    start_stack: u64,
}

/// Fields 22 and 28 of /proc/PID/stat.
fn parse_incarnation(b: &[u8]) -> Option<Incarnation> {
    let rest = std::str::from_utf8(b.get(b.iter().rposition(|&c| c == b')')? + 1..)?).ok()?;
    let mut fields = rest.split_ascii_whitespace();
    let start_ticks = fields.nth(19)?.parse().ok()?;
    Some(Incarnation { start_ticks, start_stack: fields.nth(5).and_then(|f| f.parse().ok()).unwrap_or(0) })
}

impl Proc {
    pub fn credentials(&self, pid: u32) -> io::Result<Credentials> {
        let path = self.path(pid, "status");
        parse_credentials(&read(&path)?).ok_or_else(|| super::bad("no credentials in it", &path))
    }

    pub fn incarnation(&self, pid: u32) -> io::Result<Incarnation> {
        let path = self.path(pid, "stat");
        parse_incarnation(&read(&path)?)
            .ok_or_else(|| super::bad("not in the form of proc_pid_stat(5)", &path))
    }

    /// Whether the audience may see what the kernel guards by `ptrace_may_access` (descriptors, system calls, memory): as the kernel
    /// decides for a reader without capabilities, but that a process with any capability is refused. Gives what to compare afterwards.
    fn inspectable(&self, pid: u32, uid: u32, gid: u32) -> io::Result<Incarnation> {
        let before = self.incarnation(pid)?;
        let c = self.credentials(pid)?;
        // Of a process that is not dumpable (a setuid program was executed) these files are root's.
        let owner = std::fs::symlink_metadata(self.path(pid, "fd"))?.uid();
        let own = c.uids == [uid; 4] && c.gids == [gid; 4] && owner == uid && c.permitted == 0;
        if own { Ok(before) } else { Err(refused(pid)) }
    }

    /// Runs a read of what the kernel guards, if the audience may see it.
    ///
    /// Race: the process may execute a setuid program between the check and the read. The check is repeated after the read, and
    /// what was read is dropped unless it is still the same program of the same user.
    pub(super) fn guarded<T>(&self, pid: u32, read: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let (uid, gid) = match self.audience {
            Audience::Full => return read(),
            Audience::Reader { uid, gid } => (uid, gid),
            Audience::Nobody => return Err(refused(pid)),
        };
        let before = self.inspectable(pid, uid, gid)?;
        let found = read()?;
        if self.inspectable(pid, uid, gid)? == before { Ok(found) } else { Err(refused(pid)) }
    }

    /// The same for reads that are not made by [`Proc`].
    #[must_use]
    pub fn may_inspect(&self, pid: u32) -> Option<Incarnation> {
        match self.audience {
            Audience::Full => self.incarnation(pid).ok(),
            Audience::Reader { uid, gid } => self.inspectable(pid, uid, gid).ok(),
            Audience::Nobody => None,
        }
    }
}

fn refused(pid: u32) -> io::Error {
    let text = format!("process {pid} is another user's: only root is shown what it does");
    io::Error::new(io::ErrorKind::PermissionDenied, text)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt as _;
    use std::process::Command;

    use super::*;

    #[test]
    fn parsed_as_the_kernel_writes_them() {
        let text = b"Name:\tx\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t9 10 \nCapPrm:\t0000000000000006\nCapEff:\t4\n";
        let c = parse_credentials(text).unwrap();
        assert_eq!((c.uids, c.gids, c.permitted, c.effective), ([1, 2, 3, 4], [5, 6, 7, 8], 6, 4));
        assert!(c.in_group(8) && c.in_group(10) && !c.in_group(5));
        assert_eq!(parse_credentials(b"Uid:\t1\t2\t3\n"), None);
        assert_eq!(
            parse_credentials(&[&text[..], b"CapPrm: x"].concat()[9..]),
            None,
            "no first line, no user"
        );
        let (p, me) = (Proc::default(), std::process::id());
        assert_eq!(p.credentials(me).unwrap().uids[1], rustix::process::geteuid().as_raw());
    }

    /// `sleep`, as another user.
    struct Sleep(std::process::Child);

    impl Sleep {
        fn new(uid: u32, gid: u32) -> Self {
            let child = Command::new("sleep").arg("60").uid(uid).gid(gid).spawn().unwrap();
            // Until it has executed it, it is this program, and not dumpable.
            while std::fs::read(format!("/proc/{}/comm", child.id())).unwrap() != b"sleep\n" {
                std::thread::yield_now();
            }
            Self(child)
        }
    }

    impl Drop for Sleep {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_reader_is_shown_the_inside_of_own_processes_only() {
        if !rustix::process::geteuid().is_root() {
            crate::testing::skipped("credentials", "needs root, for processes of other users");
            return;
        }
        let (own, group, root) = (Sleep::new(65534, 65533), Sleep::new(65534, 65532), Sleep::new(0, 0));
        let reader = Audience::Reader { uid: 65534, gid: 65533 };
        let all = [(&own, reader, true), (&group, reader, false), (&root, reader, false)];
        let never = [(&own, Audience::Nobody, false), (&root, Audience::Reader { uid: 0, gid: 0 }, false)];
        for (process, audience, may) in all.into_iter().chain(never).chain([(&root, Audience::Full, true)]) {
            let (proc, pid) = (Proc::default().for_audience(audience), process.0.id());
            let reads: [(&str, bool); 9] = [
                ("exe", proc.exe(pid).is_ok()),
                ("fd", proc.fds(pid).is_ok()),
                ("a link", proc.fd_link(pid, 0).is_ok()),
                ("fdinfo", proc.fdinfo(pid, 0).is_ok()),
                ("attributes", proc.attributes(pid, "fd/0").is_ok()),
                ("syscall", proc.syscall(pid, pid).is_ok()),
                ("environ", proc.environ(pid, 10).is_ok()),
                ("maps", proc.maps(pid, "/")),
                ("all", proc.may_inspect(pid).is_some()),
            ];
            for (what, read) in reads {
                assert_eq!(read, may, "{what} for {audience:?}");
            }
            assert!(proc.argv(pid).is_ok() && proc.stat(pid).is_ok() && proc.status(pid).is_ok());
        }
    }

    #[test]
    fn an_exec_makes_another_incarnation() {
        let mut c = Command::new("sh");
        let mut child =
            c.args(["-c", "read x; exec sleep 60"]).stdin(std::process::Stdio::piped()).spawn().unwrap();
        let (p, pid) = (Proc::default(), child.id());
        let comm = |name: &[u8]| {
            while std::fs::read(format!("/proc/{pid}/comm")).unwrap() != name {
                std::thread::yield_now();
            }
        };
        comm(b"sh\n");
        let before = p.incarnation(pid).unwrap();
        assert_eq!(p.incarnation(pid).unwrap(), before);
        drop(child.stdin.take());
        comm(b"sleep\n");
        let fixed = std::fs::read("/proc/sys/kernel/randomize_va_space").is_ok_and(|b| b == b"0\n");
        assert!(fixed || p.incarnation(pid).unwrap() != before);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
