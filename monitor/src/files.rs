//! Opening of files by paths from outside. Files that are read (configs, secrets, recordings) must be regular and bounded, so
//! that a FIFO or a device cannot hold up the reader. Files that are written must lie where no other user can redirect the
//! write: a privileged process that follows a planted symbolic link overwrites the link's target.

use std::ffi::OsString;
use std::fs::{DirBuilder, File};
use std::io::{self, Read as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Mode, OFlags};

/// path_resolution(7): the kernel gives up after as many.
const MAX_LINKS: usize = 40;
/// How many damaged files are kept for each name.
pub const DAMAGED_KEPT: u32 = 3;

/// Why a file was not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("it is {0}, not a regular file")]
    Kind(&'static str),
    #[error("it belongs to uid {0}")]
    Owner(u32),
    #[error("it has more than one name (hard links)")]
    Linked,
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl OpenError {
    /// The path holds something that this program did not put there, or that it cannot use.
    #[must_use]
    pub fn is_unusable(&self) -> bool {
        match self {
            Self::Kind(_) | Self::Owner(_) | Self::Linked => true,
            Self::Io(e) => e.kind() == io::ErrorKind::PermissionDenied,
        }
    }

    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Io(e) if e.kind() == io::ErrorKind::NotFound)
    }
}

impl From<OpenError> for io::Error {
    fn from(e: OpenError) -> Self {
        match e {
            OpenError::Io(e) => e,
            other => Self::new(io::ErrorKind::InvalidInput, other.to_string()),
        }
    }
}

/// Why a folder is not used.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    #[error(
        "{} belongs to uid {owner}, who could redirect what is written there to another file. Choose a path of which every \
         folder belongs to root or to uid {own}, or change the owner (`chown {own} {}`)",
        path.display(), path.display()
    )]
    Owner { path: PathBuf, owner: u32, own: u32 },
    #[error(
        "{} can be written by other users (mode {mode:04o}), who could redirect what is written there to another file. \
         Choose another path, or take the right away (`chmod go-w {}`)",
        path.display(), path.display()
    )]
    Writable { path: PathBuf, mode: u32 },
    #[error("{} is not a folder", path.display())]
    NotFolder { path: PathBuf },
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

/// Opens a regular file for reading; symbolic links are followed (Kubernetes mounts configs and secrets as links).
///
/// Anything else is refused without being opened: opening a FIFO waits for a writer, and opening a device can act on it.
pub fn open_regular(path: &Path) -> Result<File, OpenError> {
    let handle = open_path(path, OFlags::empty())?;
    let metadata = handle.metadata()?;
    if !metadata.is_file() {
        return Err(OpenError::Kind(kind(&metadata)));
    }
    reopen(&handle, OFlags::RDONLY)
}

/// Reads a regular file of at most `max` bytes.
pub fn read_regular(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    read_bounded(open_regular(path)?, max)
}

/// What is left of an open file, if that is at most `max` bytes.
pub fn read_bounded(file: File, max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(max.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("it has more than {max} bytes")));
    }
    Ok(bytes)
}

/// Opens this process's own file, for which `flags` say how (`CREATE` makes it with mode 0600). Refuses what another user may
/// have put in its place: a symbolic link, a file of another owner or with another name, anything that is not a regular file.
///
/// The folder must be a [`trusted_folder`]; then nobody can exchange the file between the check and the use.
pub fn open_own(path: &Path, flags: OFlags) -> Result<File, OpenError> {
    let new = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match open_path(path, OFlags::NOFOLLOW) {
        Ok(handle) => {
            check_own(&handle)?;
            reopen(&handle, flags - OFlags::CREATE)
        }
        Err(e) if e.is_not_found() && flags.contains(OFlags::CREATE) => {
            Ok(File::from(rustix::fs::open(path, new, Mode::RUSR | Mode::WUSR).map_err(io::Error::from)?))
        }
        Err(e) => Err(e),
    }
}

/// As [`open_own`] checks it, without opening the content. None: there is no such file.
pub fn own_metadata(path: &Path) -> Result<Option<std::fs::Metadata>, OpenError> {
    match open_path(path, OFlags::NOFOLLOW) {
        Ok(handle) => check_own(&handle).map(Some),
        Err(e) if e.is_not_found() => Ok(None),
        Err(e) => Err(e),
    }
}

/// A file of this user has mode 0600 afterwards: a stricter mode stops a process without CAP_DAC_OVERRIDE, root included.
fn check_own(handle: &File) -> Result<std::fs::Metadata, OpenError> {
    let metadata = handle.metadata()?;
    let own = rustix::process::geteuid().as_raw();
    if !metadata.is_file() {
        return Err(OpenError::Kind(kind(&metadata)));
    }
    if metadata.uid() != own {
        return Err(OpenError::Owner(metadata.uid()));
    }
    if metadata.nlink() > 1 {
        return Err(OpenError::Linked);
    }
    if metadata.mode() & 0o7777 != 0o600 {
        // A failure (a read-only file system) shows when the file is opened for writing.
        let _ = std::fs::set_permissions(by_descriptor(handle), std::fs::Permissions::from_mode(0o600));
    }
    Ok(metadata)
}

/// A handle that opens nothing: for looking at what is there first.
fn open_path(path: &Path, flags: OFlags) -> Result<File, OpenError> {
    let fd = rustix::fs::open(path, flags | OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    Ok(File::from(fd.map_err(io::Error::from)?))
}

/// Opens the very file that was looked at, whatever the path leads to by now.
fn reopen(handle: &File, flags: OFlags) -> Result<File, OpenError> {
    let fd = rustix::fs::open(by_descriptor(handle), flags | OFlags::CLOEXEC | OFlags::NOCTTY, Mode::empty());
    Ok(File::from(fd.map_err(io::Error::from)?))
}

fn by_descriptor(handle: &File) -> String {
    format!("/proc/self/fd/{}", handle.as_raw_fd())
}

fn kind(m: &std::fs::Metadata) -> &'static str {
    let t = m.file_type();
    if t.is_dir() {
        "a folder"
    } else if t.is_symlink() {
        "a symbolic link"
    } else if t.is_fifo() {
        "a FIFO"
    } else if t.is_socket() {
        "a socket"
    } else {
        "a device"
    }
}

/// The folder at `path`, made if it is not there (with `mode`), as a path without symbolic links. Refused where another user
/// than root and this process's own can decide what the path leads to: each component is looked at, a link by its owner and
/// then by what it points to. In a folder with the sticky bit (/tmp) only an entry's owner can exchange the entry.
pub fn trusted_folder(path: &Path, mode: u32) -> Result<PathBuf, FolderError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| FolderError::Io { path, source }
    };
    let own = rustix::process::geteuid().as_raw();
    let absolute = std::path::absolute(path).map_err(io(path))?;
    let mut done = PathBuf::from("/");
    let mut left = components(&absolute);
    let mut links = 0;
    while let Some(name) = left.pop() {
        if name.as_bytes() == b".." {
            // `done` holds no link, so its parent is the one that the kernel would go to.
            done.pop();
            continue;
        }
        let next = done.join(&name);
        let metadata = match std::fs::symlink_metadata(&next) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let mode = if left.is_empty() { mode } else { 0o755 };
                DirBuilder::new().mode(mode).create(&next).map_err(io(&next))?;
                std::fs::symlink_metadata(&next)
            }
            other => other,
        }
        .map_err(io(&next))?;
        if metadata.uid() != 0 && metadata.uid() != own {
            return Err(FolderError::Owner { path: next, owner: metadata.uid(), own });
        }
        if metadata.is_symlink() {
            links += 1;
            if links > MAX_LINKS {
                return Err(io(&next)(rustix::io::Errno::LOOP.into()));
            }
            let target = std::fs::read_link(&next).map_err(io(&next))?;
            if target.is_absolute() {
                done = PathBuf::from("/");
            }
            left.extend(components(&target));
            continue;
        }
        if !metadata.is_dir() {
            return Err(FolderError::NotFolder { path: next });
        }
        let by_others = metadata.mode() & 0o002 != 0 || (metadata.mode() & 0o020 != 0 && metadata.gid() != 0);
        if by_others && metadata.mode() & 0o1000 == 0 {
            return Err(FolderError::Writable { path: next, mode: metadata.mode() & 0o7777 });
        }
        done = next;
    }
    Ok(done)
}

/// The names of a path, the last one first.
fn components(path: &Path) -> Vec<OsString> {
    let names = path.components().filter_map(|c| match c {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    });
    let mut names: Vec<OsString> = names.collect();
    names.reverse();
    names
}

/// Renames a damaged file, and those that belong to it (`path` with each of `endings`), to `NAME.bad`, `NAME.bad2`, ..; the new
/// name. When all names are taken, the oldest damaged file is replaced: there are never more than [`DAMAGED_KEPT`].
pub fn set_aside(path: &Path, endings: &[&str]) -> io::Result<PathBuf> {
    let bad = bad_name(path)?;
    match std::fs::rename(path, &bad) {
        // The others may be there without it.
        Err(e) if e.kind() == io::ErrorKind::NotFound && !endings.is_empty() => {}
        r => r?,
    }
    for ending in endings {
        match std::fs::rename(with(path, ending), with(&bad, ending)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                // What is left of a file that was replaced does not belong to this one.
                let _ = std::fs::remove_file(with(&bad, ending));
            }
            r => r?,
        }
    }
    Ok(bad)
}

/// The damaged files of this name that are kept.
#[must_use]
pub fn damaged(path: &Path) -> Vec<PathBuf> {
    bad_names(path).filter(|p| std::fs::symlink_metadata(p).is_ok()).collect()
}

fn bad_names(path: &Path) -> impl Iterator<Item = PathBuf> {
    (1..=DAMAGED_KEPT).map(|n| with(path, &if n == 1 { ".bad".into() } else { format!(".bad{n}") }))
}

/// A free one, else that of the oldest file. A folder is never replaced.
fn bad_name(path: &Path) -> io::Result<PathBuf> {
    let mut oldest = None;
    for name in bad_names(path) {
        match std::fs::symlink_metadata(&name) {
            Err(_) => return Ok(name),
            Ok(m) if !m.is_dir() => {
                let at = (m.ctime(), m.ctime_nsec());
                if oldest.as_ref().is_none_or(|(t, _)| at < *t) {
                    oldest = Some((at, name));
                }
            }
            Ok(_) => {}
        }
    }
    let full = || io::Error::other("there is no name left to set it aside: remove the .bad folders");
    oldest.map(|(_, name)| name).ok_or_else(full)
}

/// `path` with `ending` behind its name.
#[must_use]
pub fn with(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{chown, symlink};

    use super::*;

    const NOBODY: u32 = 65_534;

    fn fifo(path: &Path) {
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    }

    fn is_root() -> bool {
        rustix::process::geteuid().is_root()
    }

    #[test]
    fn only_regular_files_of_bounded_size_are_read() {
        let d = tempfile::tempdir().unwrap();
        let (pipe, file, link) = (d.path().join("pipe"), d.path().join("file"), d.path().join("link"));
        fifo(&pipe);
        std::fs::write(&file, "12345").unwrap();
        symlink(&file, &link).unwrap();
        assert_eq!(read_regular(&link, 5).unwrap(), b"12345");
        assert_eq!(read_regular(&file, 4).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        for (path, what) in [(&*pipe, "a FIFO"), (d.path(), "a folder"), (Path::new("/dev/zero"), "a device")]
        {
            let e = read_regular(path, 5).unwrap_err().to_string();
            assert!(e.contains(what), "{path:?}: {e}");
        }
        assert_eq!(read_regular(&d.path().join("none"), 5).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn what_another_user_may_have_put_there_is_not_opened_for_writing() {
        let d = tempfile::tempdir().unwrap();
        let path = d.path().join("f");
        let victim = d.path().join("victim");
        std::fs::write(&victim, "v").unwrap();
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC;
        let refused = || open_own(&path, flags).map(drop).unwrap_err();
        symlink(&victim, &path).unwrap();
        assert!(matches!(refused(), OpenError::Kind("a symbolic link")));
        std::fs::remove_file(&path).unwrap();
        symlink(d.path().join("nothing"), &path).unwrap();
        assert!(matches!(refused(), OpenError::Kind("a symbolic link")), "nor is it made behind a link");
        std::fs::remove_file(&path).unwrap();
        std::fs::hard_link(&victim, &path).unwrap();
        assert!(matches!(refused(), OpenError::Linked));
        std::fs::remove_file(&path).unwrap();
        fifo(&path);
        assert!(matches!(refused(), OpenError::Kind("a FIFO")));
        std::fs::remove_file(&path).unwrap();
        drop(open_own(&path, flags).unwrap());
        let mode = || std::fs::metadata(&path).unwrap().mode() & 0o7777;
        assert_eq!(mode(), 0o600);
        // Of this user, but read-only, or readable for all.
        for wrong in [0o400, 0o644] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(wrong)).unwrap();
            drop(open_own(&path, flags).unwrap());
            assert_eq!(mode(), 0o600);
        }
        if is_root() {
            chown(&path, Some(NOBODY), None).unwrap();
            assert!(matches!(refused(), OpenError::Owner(NOBODY)));
        } else {
            crate::testing::skipped("the owner's check", "needs root");
        }
        assert_eq!(std::fs::read(&victim).unwrap(), b"v");
    }

    #[test]
    fn a_folder_is_trusted_if_nobody_else_decides_where_it_is() {
        let d = tempfile::tempdir().unwrap();
        let top = d.path().canonicalize().unwrap();
        let made = trusted_folder(&top.join("a/../b/c"), 0o700).unwrap();
        assert_eq!(made, top.join("b/c"));
        assert_eq!(std::fs::metadata(&made).unwrap().mode() & 0o777, 0o700);
        symlink("b/./c", top.join("link")).unwrap();
        assert_eq!(trusted_folder(&top.join("link"), 0o700).unwrap(), made);
        symlink("loop", top.join("loop")).unwrap();
        assert!(matches!(trusted_folder(&top.join("loop"), 0o700), Err(FolderError::Io { .. })));
        std::fs::write(top.join("file"), "").unwrap();
        let file = trusted_folder(&top.join("file/x"), 0o700).unwrap_err();
        assert!(matches!(file, FolderError::NotFolder { .. }), "{file}");
        let set_mode = |of: &str, mode| {
            std::fs::set_permissions(top.join(of), std::fs::Permissions::from_mode(mode)).unwrap();
        };
        set_mode("b", 0o777);
        let writable = trusted_folder(&made, 0o700).unwrap_err();
        assert!(writable.to_string().contains("0777"), "{writable}");
        // As /tmp is: others cannot exchange what is in it.
        set_mode("b", 0o1777);
        trusted_folder(&made, 0o700).unwrap();
        if !is_root() {
            crate::testing::skipped("the owners' check", "needs root");
            return;
        }
        std::os::unix::fs::lchown(top.join("link"), Some(NOBODY), None).unwrap();
        assert!(matches!(trusted_folder(&top.join("link"), 0o700), Err(FolderError::Owner { .. })));
        chown(top.join("b"), Some(NOBODY), None).unwrap();
        let theirs = trusted_folder(&made, 0o700).unwrap_err();
        assert!(theirs.to_string().contains("chown"), "{theirs}");
    }

    #[test]
    fn a_bounded_number_of_damaged_files_is_kept() {
        let d = tempfile::tempdir().unwrap();
        let path = d.path().join("f");
        for n in 0..10 {
            std::fs::write(&path, n.to_string()).unwrap();
            if n % 2 == 0 {
                std::fs::write(with(&path, "-wal"), n.to_string()).unwrap();
            }
            let bad = set_aside(&path, &["-wal", "-shm"]).unwrap();
            assert_eq!(std::fs::read_to_string(&bad).unwrap(), n.to_string());
            assert_eq!(with(&bad, "-wal").exists(), n % 2 == 0, "a log beside another file's content");
            // The clock of the file system is coarse.
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let mut kept: Vec<String> =
            damaged(&path).iter().map(|p| std::fs::read_to_string(p).unwrap()).collect();
        kept.sort();
        assert_eq!(kept, ["7", "8", "9"]);
        // Folders are no evidence that may be lost.
        let folder = d.path().join("g");
        for _ in 0..DAMAGED_KEPT {
            std::fs::create_dir(&folder).unwrap();
            set_aside(&folder, &[]).unwrap();
        }
        std::fs::create_dir(&folder).unwrap();
        assert!(set_aside(&folder, &[]).unwrap_err().to_string().contains("remove"), "and are never removed");
    }
}
