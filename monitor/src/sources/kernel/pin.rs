//! Pins: maps, programs and links kept in a bpffs while the agent is down, under `<bpffs>/jobwarden/<set>/`.
//!
//! A set's name is the hash of everything that decides its layout, so an agent that finds its own name opens what is
//! there by path and loads nothing. A set is built under another name and renamed when it is whole: one that is cut off
//! by SIGKILL is never taken for one. The folder is locked (flock) for the agent's whole life.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use monitor_abi::ABI_VERSION;
use sha2::{Digest as _, Sha256};

use super::error::KernelError;
use super::features::is_bpffs;
use super::load::{MAPS, OBJECT};
use super::offsets::{Layout, PROBES, SYS_ENTER};
use super::{Options, sys};

/// Below the bpffs.
const FOLDER: &str = "jobwarden";
/// A set that is not whole yet, or not any more.
const UNFINISHED: &str = "unfinished-";

/// The agent's folder in a bpffs, held by its lock.
pub(super) struct Pins {
    folder: PathBuf,
    /// Of this agent's set.
    set: PathBuf,
    _lock: Lock,
}

/// The flock on the folder. Unlocked by hand when it goes: a receiver's program that was forked and has not come to its exec
/// holds a copy of the descriptor, and would keep the next agent out.
struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        // The lock goes with the last copy in any case.
        let _ = rustix::fs::flock(&self.0, rustix::fs::FlockOperation::Unlock);
    }
}

/// What a set holds.
pub(super) struct Set {
    pub(super) maps: Vec<(&'static str, OwnedFd)>,
    pub(super) programs: Vec<(&'static str, OwnedFd)>,
    pub(super) links: Vec<(&'static str, OwnedFd)>,
}

fn set_name(options: &Options, layout: &Layout, sizes: [u32; 3]) -> String {
    let mut hash = Sha256::new();
    hash.update(OBJECT);
    hash.update(format!("{:?} {:?} {:?} {}", layout.offsets, layout.features, sizes, options.trace));
    let digest = hash.finalize();
    let hex = digest[..8].iter().fold(String::new(), |s, b| s + &format!("{b:02x}"));
    format!("v{ABI_VERSION}-{hex}")
}

fn broken(path: &Path, what: impl Into<String>) -> KernelError {
    KernelError::Pin { path: path.to_owned(), what: what.into() }
}

/// Mounts a bpffs where there is none.
fn mount(root: &Path) -> Result<(), KernelError> {
    let what = || format!("mount a bpffs at {}", root.display());
    fs::create_dir_all(root).map_err(KernelError::io(what()))?;
    if is_bpffs(root) {
        return Ok(());
    }
    let target = std::ffi::CString::new(root.as_os_str().as_bytes())
        .map_err(|_| broken(root, "a path with a NUL in it"))?;
    // SAFETY: all strings end with a NUL and live through the call.
    let r = unsafe {
        libc::mount(
            c"bpf".as_ptr(),
            target.as_ptr(),
            c"bpf".as_ptr(),
            libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC,
            c"mode=0700".as_ptr().cast(),
        )
    };
    if r == 0 { Ok(()) } else { Err(KernelError::io(what())(io::Error::last_os_error())) }
}

/// Opens and locks `<root>/jobwarden`.
fn lock(folder: &Path) -> Result<Lock, KernelError> {
    let what = || format!("open {}", folder.display());
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
        .open(folder)
        .map_err(KernelError::io(what()))?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Lock(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(KernelError::Locked { path: folder.to_owned() }),
        Err(e) => Err(KernelError::io(format!("lock {}", folder.display()))(e.into())),
    }
}

/// Removes a set: its links are detached when nobody else holds them.
fn remove(set: &Path) -> io::Result<usize> {
    let mut n = 0;
    // Links first, so that no probe runs without what it writes to being counted as there.
    let mut files: Vec<PathBuf> =
        fs::read_dir(set)?.map(|e| e.map(|e| e.path())).collect::<io::Result<_>>()?;
    files.sort_by_key(|f| !f.file_name().is_some_and(|n| n.as_bytes().starts_with(b"link_")));
    for file in files {
        fs::remove_file(file)?;
        n += 1;
    }
    fs::remove_dir(set)?;
    Ok(n)
}

impl Pins {
    /// Mounts the bpffs if it is not, and takes the lock.
    pub(super) fn lock(
        root: &Path,
        options: &Options,
        layout: &Layout,
        sizes: [u32; 3],
    ) -> Result<Self, KernelError> {
        mount(root)?;
        let folder = root.join(FOLDER);
        match fs::DirBuilder::new().mode(0o700).create(&folder) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                return Err(KernelError::io(format!("create {}", folder.display()))(e));
            }
            _ => {}
        }
        let lock = lock(&folder)?;
        let set = folder.join(set_name(options, layout, sizes));
        let me = Self { folder, set, _lock: lock };
        for old in me.sets(|name| name.starts_with(UNFINISHED))? {
            remove(&old).map_err(KernelError::io(format!("remove {}", old.display())))?;
        }
        Ok(me)
    }

    fn sets(&self, which: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>, KernelError> {
        let what = || KernelError::io(format!("read {}", self.folder.display()));
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(what())? {
            let path = entry.map_err(what())?.path();
            if path.file_name().and_then(|n| n.to_str()).is_some_and(&which) {
                all.push(path);
            }
        }
        Ok(all)
    }

    /// This agent's set, if an earlier one left it.
    pub(super) fn open(&self) -> Result<Option<Set>, KernelError> {
        if self.set.exists() { open_set(&self.set).map(Some) } else { Ok(None) }
    }

    /// Sets of other probe objects or sizes.
    pub(super) fn others(&self) -> Result<Vec<PathBuf>, KernelError> {
        Ok(self.sets(|n| !n.starts_with(UNFINISHED))?.into_iter().filter(|p| *p != self.set).collect())
    }

    /// Pins a set, whole or not at all.
    pub(super) fn keep(&self, set: &Set) -> Result<(), KernelError> {
        let name = self.set.file_name().unwrap_or_default().to_string_lossy();
        let unfinished = self.folder.join(format!("{UNFINISHED}{name}"));
        let what = |p: &Path| KernelError::io(format!("pin {}", p.display()));
        fs::DirBuilder::new().mode(0o700).create(&unfinished).map_err(what(&unfinished))?;
        for (kind, all) in [("map", &set.maps), ("prog", &set.programs), ("link", &set.links)] {
            for (name, fd) in all {
                let path = unfinished.join(format!("{kind}_{name}"));
                sys::pin(fd.as_fd(), &path).map_err(what(&path))?;
            }
        }
        fs::rename(&unfinished, &self.set).map_err(what(&self.set))
    }

    /// Pins or unpins the link of `sys_enter`, so that a doom goes on while the agent is down.
    pub(super) fn keep_doom(&self, link: Option<&OwnedFd>) -> io::Result<()> {
        let path = self.set.join(format!("link_{SYS_ENTER}"));
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        link.map_or(Ok(()), |fd| sys::pin(fd.as_fd(), &path))
    }
}

/// Opens every object of a set by its path.
pub(super) fn open_set(set: &Path) -> Result<Set, KernelError> {
    let open = |kind: &str, name: &'static str| {
        let path = set.join(format!("{kind}_{name}"));
        match sys::open_pin(&path) {
            Ok(fd) => Ok(Some((name, fd))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(broken(&path, e.to_string())),
        }
    };
    let mut found = Set { maps: Vec::new(), programs: Vec::new(), links: Vec::new() };
    for name in MAPS {
        found.maps.extend(open("map", name)?);
    }
    for p in PROBES {
        found.programs.extend(open("prog", p.name)?);
        found.links.extend(open("link", p.name)?);
    }
    let programs: Vec<_> = found.programs.iter().map(|(n, _)| *n).collect();
    let links: Vec<_> = found.links.iter().map(|(n, _)| *n).collect();
    let whole = found.maps.len() == MAPS.len()
        && PROBES.iter().filter(|p| p.essential && p.is_of_use()).all(|p| {
            programs.contains(&p.name) && (p.kind == super::offsets::Kind::ByHand || links.contains(&p.name))
        });
    if whole { Ok(found) } else { Err(broken(set, "this set of pins is not whole")) }
}

/// Detaches and removes another agent's set.
pub(super) fn drop_set(set: &Path) -> Result<(), KernelError> {
    remove(set).map(drop).map_err(KernelError::io(format!("remove {}", set.display())))
}

/// Removes everything that agents have pinned below `root`: the kernel forgets lineage and jobs. How many objects.
/// Refused while an agent runs.
pub fn unpin(root: &Path) -> Result<usize, KernelError> {
    let folder = root.join(FOLDER);
    if !folder.exists() {
        return Ok(0);
    }
    let lock = lock(&folder)?;
    let what = || KernelError::io(format!("remove what is below {}", folder.display()));
    let mut n = 0;
    for entry in fs::read_dir(&folder).map_err(what())? {
        let path = entry.map_err(what())?.path();
        if path.is_dir() {
            n += remove(&path).map_err(what())?;
        } else {
            fs::remove_file(&path).map_err(what())?;
            n += 1;
        }
    }
    fs::remove_dir(&folder).map_err(what())?;
    drop(lock);
    Ok(n)
}
