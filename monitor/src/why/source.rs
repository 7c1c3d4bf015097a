//! A line of a source file that the memory of a process names, read with no more rights than that process has.
//!
//! The memory is the process's own to write: it may name any file. The agent could open nearly all, so it walks the path
//! itself, from the root (or the working directory) of the process, one component at a time, and asks of each what the kernel
//! would ask the process: owner, group, mode. A symbolic link is followed by its text, within that root. Where the answer may depend on
//! more than owner and mode, there is no line: an access control list, a file system whose server decides (FUSE, NFS), a file of
//! the kernel's (proc, sysfs). Mandatory access control (SELinux, AppArmor) is not asked.
//!
//! Races: each component is opened first (`O_PATH`, which opens no device and waits for no FIFO) and judged by its
//! descriptor; what is read is that very inode, whatever has its name by then. The process may execute another program meanwhile, or its pid be
//! another's: its credentials are read again afterwards, and the caller compares its incarnation.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io::Read as _;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use crate::sources::proc::{Credentials, Proc};

/// Bytes of a file that are read, and characters of a line that are shown.
const MOST: u64 = 2 << 20;
const LINE: usize = 160;
/// Symbolic links on one path, as many as the kernel follows (include/linux/namei.h).
const LINKS: usize = 40;
const READ: u32 = 4;
const SEARCH: u32 = 1;
/// File systems on which owner, mode and POSIX access control list are all that the kernel asks (`statfs(2)`, linux/magic.h): ext2 to
/// ext4, XFS, btrfs, overlay, tmpfs, ramfs, F2FS, bcachefs, ZFS, SquashFS, EROFS, ISO 9660.
const JUDGED_BY_MODE: [u64; 12] = [
    0xEF53,
    0x5846_5342,
    0x9123_683E,
    0x794C_7630,
    0x0102_1994,
    0x8584_58F6,
    0xF2F5_2010,
    0xCA45_1A4E,
    0x2FC1_2FC1,
    0x7371_7368,
    0xE0F5_E1E2,
    0x9660,
];
// include/uapi/linux/capability.h
const CAP_DAC_OVERRIDE: u64 = 1 << 1;
const CAP_DAC_READ_SEARCH: u64 = 1 << 2;

/// What decides whether a process may open a file.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rights {
    credentials: Credentials,
    /// It has a capability that makes modes irrelevant, and has it in the agent's user namespace.
    all: bool,
}

impl Rights {
    fn of(proc: &Proc, pid: u32) -> Option<Self> {
        let credentials = proc.credentials(pid).ok()?;
        let capable = credentials.effective & (CAP_DAC_OVERRIDE | CAP_DAC_READ_SEARCH) != 0;
        let ours = || {
            let own = std::fs::read_link(proc.root().join("self/ns/user")).ok()?;
            Some(std::fs::read_link(proc.path(pid, "ns/user")).ok()? == own)
        };
        Some(Self { all: capable && ours() == Some(true), credentials })
    }

    /// Whether the process may read the file, or search the folder, behind a descriptor.
    fn may(&self, fd: &OwnedFd, stat: &Stat, what: u32) -> bool {
        if self.all {
            return true;
        }
        let c = &self.credentials;
        if stat.st_uid == c.fs_uid() {
            return stat.st_mode >> 6 & what != 0;
        }
        // With a list, the group's bits are its mask, and an entry may deny what the others' bits grant.
        if has_list(fd) {
            return false;
        }
        let shift = if c.in_group(stat.st_gid) { 3 } else { 0 };
        stat.st_mode >> shift & what != 0
    }
}

/// An access control list, or one that cannot be told.
fn has_list(fd: &OwnedFd) -> bool {
    let mut value = [0_u8; 512];
    let got = rustix::fs::getxattr(link(fd), c"system.posix_acl_access", &mut value);
    !matches!(got, Err(Errno::NODATA | Errno::OPNOTSUPP))
}

/// The path of a descriptor of this thread, whose table may be its own.
fn link(fd: &OwnedFd) -> String {
    format!("/proc/thread-self/fd/{}", fd.as_raw_fd())
}

/// Line `number` (from 1) of the file that `path` names for the process.
pub(super) fn line(proc: &Proc, pid: u32, path: &str, number: u32) -> Option<String> {
    let rights = Rights::of(proc, pid)?;
    let file = open(proc, pid, path, &rights, false)?;
    if Rights::of(proc, pid)? != rights {
        return None;
    }
    nth_line(file, number)
}

/// The regular file that `path` names for the process, if that has the rights to read it. `anywhere`: on any file system.
fn open(proc: &Proc, pid: u32, path: &str, rights: &Rights, anywhere: bool) -> Option<OwnedFd> {
    let folder = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let enter = |name| rustix::fs::open(proc.path(pid, name), folder, Mode::empty()).ok();
    let walk = Walk { rights, anywhere, root: enter("root")?, links: 0 };
    // A relative path starts at the working directory, which may lie outside of the root, as it does for the process itself.
    let start = if path.starts_with('/') { None } else { Some(enter("cwd")?) };
    walk.file(start, Path::new(path))
}

/// Whether `path` names a regular file for the process, whoever may read it.
pub(super) fn is_file(proc: &Proc, pid: u32, path: &str) -> bool {
    let any = Rights { credentials: Credentials::default(), all: true };
    open(proc, pid, path, &any, true).is_some()
}

fn nth_line(file: OwnedFd, number: u32) -> Option<String> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let opened = rustix::fs::open(link(&file), flags, Mode::empty()).ok()?;
    let mut text = Vec::new();
    std::fs::File::from(opened).take(MOST).read_to_end(&mut text).ok()?;
    let n = usize::try_from(number).ok()?.checked_sub(1)?;
    let text = String::from_utf8_lossy(&text);
    Some(text.lines().nth(n)?.trim().chars().take(LINE).collect())
}

struct Walk<'a> {
    rights: &'a Rights,
    anywhere: bool,
    root: OwnedFd,
    links: usize,
}

impl Walk<'_> {
    /// Walks from `start`, or from the root.
    fn file(mut self, start: Option<OwnedFd>, path: &Path) -> Option<OwnedFd> {
        // The folders that lead here. `rooted`: the first one is the root, above which there is nothing.
        let mut rooted = start.is_none();
        let mut dirs = vec![start.map_or_else(|| self.root.try_clone().ok(), Some)?];
        let mut rest: VecDeque<OsString> = components(path);
        while let Some(name) = rest.pop_front() {
            if name == "/" {
                (rooted, dirs) = (true, vec![self.root.try_clone().ok()?]);
                continue;
            }
            let dir = dirs.last()?;
            if !self.rights.may(dir, &self.judged(dir)?, SEARCH) {
                return None;
            }
            if name == ".." {
                match dirs.len() {
                    1 if rooted => {}
                    1 => return None,
                    _ => drop(dirs.pop()),
                }
                continue;
            }
            let fd = step(dir, &name)?;
            let found = self.judged(&fd)?;
            match FileType::from_raw_mode(found.st_mode) {
                FileType::Symlink => {
                    self.links += 1;
                    if self.links > LINKS {
                        return None;
                    }
                    let target = rustix::fs::readlinkat(&fd, c"", Vec::new()).ok()?;
                    let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
                    for part in components(&target).into_iter().rev() {
                        rest.push_front(part);
                    }
                }
                FileType::Directory => dirs.push(fd),
                FileType::RegularFile if rest.is_empty() => {
                    return self.rights.may(&fd, &found, READ).then_some(fd);
                }
                _ => return None,
            }
        }
        None
    }

    /// The attributes of a file on a file system where they decide.
    fn judged(&self, fd: &OwnedFd) -> Option<Stat> {
        if !self.anywhere {
            let kind = rustix::fs::fstatfs(fd).ok()?.f_type;
            if !JUDGED_BY_MODE.contains(&(kind as u64)) {
                return None;
            }
        }
        rustix::fs::fstat(fd).ok()
    }
}

/// One component, itself: a link is not followed.
fn step(dir: &OwnedFd, name: &OsStr) -> Option<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let within = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(dir, name, flags, Mode::empty(), within).ok()
}

fn components(path: &Path) -> VecDeque<OsString> {
    path.components().filter(|c| *c != Component::CurDir).map(|c| c.as_os_str().to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, chown, symlink};

    use super::*;

    const USER: u32 = 65_534;
    const GROUP: u32 = 65_533;

    /// A tree below a folder that stands for a process's root.
    struct Tree(tempfile::TempDir);

    impl Tree {
        /// `owner:group mode` of each path; folders end with `/`.
        fn new(files: &[(&str, u32, u32, u32)]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
            for &(name, uid, gid, mode) in files {
                let path = dir.path().join(name);
                if name.ends_with('/') {
                    std::fs::create_dir(&path).unwrap();
                } else {
                    std::fs::write(&path, "one\n  two = 2\n").unwrap();
                }
                chown(&path, Some(uid), Some(gid)).unwrap();
                std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            }
            Self(dir)
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn read(&self, rights: &Rights, path: &str) -> Option<String> {
            let folder = OFlags::PATH | OFlags::DIRECTORY;
            let root = || rustix::fs::open(self.0.path(), folder, Mode::empty()).unwrap();
            let start = if path.starts_with('/') { None } else { Some(root()) };
            let file =
                Walk { rights, anywhere: false, root: root(), links: 0 }.file(start, Path::new(path))?;
            nth_line(file, 2)
        }
    }

    fn user() -> Rights {
        let credentials =
            Credentials { uids: [USER; 4], gids: [USER; 4], groups: vec![GROUP], ..Credentials::default() };
        Rights { credentials, all: false }
    }

    fn root() -> bool {
        let is = rustix::process::geteuid().is_root();
        if !is {
            crate::testing::skipped("source lines", "needs root, for files of other users");
        }
        is
    }

    #[test]
    fn a_line_is_read_where_the_process_itself_may_open_the_file() {
        if !root() {
            return;
        }
        let t = Tree::new(&[
            ("open", 0, 0, 0o644),
            ("private", 0, 0, 0o600),
            ("groups", 0, GROUP, 0o640),
            ("strangers", 0, 65_000, 0o640),
            ("denied-to-group", 0, GROUP, 0o604),
            ("own", USER, 0, 0o400),
            ("denied-to-owner", USER, 0, 0o044),
            ("closed/", 0, 0, 0o700),
            ("closed/open", 0, 0, 0o644),
            ("through/", 0, GROUP, 0o710),
            ("through/open", 0, 0, 0o644),
            ("readable/", 0, 0, 0o744),
            ("readable/open", 0, 0, 0o644),
        ]);
        let two = Some("two = 2".to_owned());
        for (path, seen) in [
            ("/open", true),
            ("open", true),
            ("//./open", true),
            ("/../open", true),
            ("../open", false),
            ("/private", false),
            ("/groups", true),
            ("/strangers", false),
            ("/denied-to-group", false),
            ("/own", true),
            ("/denied-to-owner", false),
            ("/closed/open", false),
            ("/through/open", true),
            ("/readable/open", false),
            // Search is asked for a folder that is only passed through, too.
            ("/closed/../open", false),
            ("/open/", true),
            ("/open/x", false),
            ("/through", false),
            ("/missing", false),
            ("/", false),
            ("", false),
        ] {
            assert_eq!(t.read(&user(), path), two.clone().filter(|_| seen), "{path:?}");
            let all = Rights { all: true, ..user() };
            if !seen && t.path(path.trim_start_matches('/')).is_file() && !path.starts_with("..") {
                assert_eq!(t.read(&all, path), two, "{path:?}, with CAP_DAC_READ_SEARCH");
            }
        }
    }

    #[test]
    fn a_link_is_followed_within_the_root_and_judged_at_its_end() {
        if !root() {
            return;
        }
        let t = Tree::new(&[("a/", 0, 0, 0o755), ("a/open", 0, 0, 0o644), ("a/private", 0, 0, 0o600)]);
        let outside = Tree::new(&[("secret", 0, 0, 0o644)]);
        let secret = outside.path("secret");
        for (name, to) in [
            ("relative", Path::new("a/open")),
            ("absolute", Path::new("/a/open")),
            ("a/up", Path::new("../a/../a/open")),
            ("private", Path::new("a/private")),
            ("out", secret.as_path()),
            ("climb", &Path::new("../../../../../..").join(secret.strip_prefix("/").unwrap())),
            ("circle", Path::new("circle")),
            ("magic", Path::new("/proc/self/maps")),
        ] {
            symlink(to, t.path(name)).unwrap();
        }
        let two = Some("two = 2".to_owned());
        for path in ["/relative", "/absolute", "/a/up", "relative"] {
            assert_eq!(t.read(&user(), path), two, "{path}");
        }
        for path in ["/private", "/out", "/climb", "/circle", "/magic"] {
            assert_eq!(t.read(&user(), path), None, "{path}");
        }
    }

    #[test]
    fn what_is_no_plain_file_is_not_opened() {
        if !root() {
            return;
        }
        let t = Tree::new(&[("huge", 0, 0, 0o644)]);
        let fifo = t.path("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o666), 0).unwrap();
        let zero = rustix::fs::makedev(1, 5);
        let device = (t.path("zero"), FileType::CharacterDevice, Mode::from_raw_mode(0o666));
        rustix::fs::mknodat(rustix::fs::CWD, &device.0, device.1, device.2, zero).unwrap();
        std::fs::File::options().write(true).open(t.path("huge")).unwrap().set_len(1 << 40).unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(t.path("socket")).unwrap();
        let began = std::time::Instant::now();
        for path in ["/fifo", "/zero", "/socket"] {
            assert_eq!(t.read(&user(), path), None, "{path}");
        }
        assert_eq!(t.read(&user(), "/huge").as_deref(), Some("two = 2"));
        assert!(began.elapsed() < std::time::Duration::from_secs(2), "bounded in size");
        // The kernel's own files: their modes are not all that is asked.
        let rights = Rights { all: true, ..user() };
        let proc = Proc::default();
        assert_eq!(open(&proc, std::process::id(), "/proc/self/status", &rights, false).map(|_| ()), None);
        assert_eq!(
            open(&proc, std::process::id(), "/sys/kernel/uevent_seqnum", &rights, false).map(|_| ()),
            None
        );
        assert_eq!(open(&proc, std::process::id(), "/dev/zero", &rights, false).map(|_| ()), None);
    }

    #[test]
    fn a_file_with_an_access_control_list_is_its_owners_only() {
        if !root() {
            return;
        }
        let t = Tree::new(&[("root", 0, 0, 0o644), ("own", USER, 0, 0o644)]);
        // Version 2; user::rw-, user:USER:---, group::r--, mask::r--, other::r-- (include/uapi/linux/posix_acl_xattr.h).
        let entry = |tag: u16, perm: u16, id: u32| {
            [&tag.to_le_bytes()[..], &perm.to_le_bytes(), &id.to_le_bytes()].concat()
        };
        let none = u32::MAX;
        let list = [
            2_u32.to_le_bytes().to_vec(),
            entry(1, 6, none),
            entry(2, 0, USER),
            entry(4, 4, none),
            entry(16, 4, none),
            entry(32, 4, none),
        ]
        .concat();
        for name in ["root", "own"] {
            let set = rustix::fs::setxattr(
                t.path(name),
                c"system.posix_acl_access",
                &list,
                rustix::fs::XattrFlags::empty(),
            );
            if set == Err(Errno::OPNOTSUPP) {
                crate::testing::skipped(
                    "source lines",
                    format_args!("no access control lists in {}", t.0.path().display()),
                );
                return;
            }
            set.unwrap();
        }
        assert_eq!(t.read(&user(), "/root"), None);
        assert_eq!(t.read(&user(), "/own").as_deref(), Some("two = 2"));
    }

    #[test]
    fn rights_are_those_of_the_process() {
        let (proc, me) = (Proc::default(), std::process::id());
        let rights = Rights::of(&proc, me).unwrap();
        assert_eq!(rights.credentials.fs_uid(), rustix::process::geteuid().as_raw());
        let here = file!();
        let line = line(&proc, me, &format!("{}/../{here}", env!("CARGO_MANIFEST_DIR")), 1);
        assert!(line.unwrap().starts_with("//! A line of a source file"));
    }
}
