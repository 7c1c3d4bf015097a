//! The state directory: where it is, that it can be trusted, and that no other agent uses it.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{FlockOperation, flock};

use crate::files::{FolderError, trusted_folder};

#[derive(Debug, thiserror::Error)]
pub enum StateDirError {
    #[error("the state directory: {0}. Another one can be given with --state-dir")]
    Folder(#[from] FolderError),
    #[error(
        "{} is the state directory of another agent that runs; stop that one, or give this one another with --state-dir",
        path.display()
    )]
    Held { path: PathBuf },
}

impl StateDirError {
    /// The disk is full, read-only or broken: an agent runs without it. Everything else is a mistake in the config or a
    /// missing privilege, which stops the start.
    #[must_use]
    pub fn is_of_disk(&self) -> bool {
        let Self::Folder(FolderError::Io { source, .. }) = self else { return false };
        let of_disk = [libc::ENOSPC, libc::EDQUOT, libc::EROFS, libc::EIO, libc::ESTALE, libc::EUCLEAN];
        source.raw_os_error().is_some_and(|e| of_disk.contains(&e))
    }
}

/// Held by its lock (flock) for the agent's whole life: two agents would write over each other's jobs and alerts.
#[derive(Debug)]
pub struct StateDir {
    given: PathBuf,
    held: Mutex<Option<Held>>,
}

#[derive(Debug)]
struct Held {
    path: PathBuf,
    lock: File,
}

impl StateDir {
    /// Makes it if it is not there, checks it and locks it. Where the disk does not let it, [`StateDir::ensure`] tries again.
    pub fn open(given: &Path) -> Result<(Self, Option<StateDirError>), StateDirError> {
        let dir = Self { given: given.to_owned(), held: Mutex::default() };
        match dir.ensure() {
            Ok(_) => Ok((dir, None)),
            Err(e) if e.is_of_disk() => Ok((dir, Some(e))),
            Err(e) => Err(e),
        }
    }

    /// Its path without symbolic links, once it is this agent's.
    pub fn ensure(&self) -> Result<PathBuf, StateDirError> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(h) = held.as_ref() {
            return Ok(h.path.clone());
        }
        let path = trusted_folder(&self.given, 0o700)?;
        let io = |source| FolderError::Io { path: path.clone(), source };
        let lock = File::open(&path).map_err(io)?;
        // The sticky bit is enough for a folder above it, but not where others could make files of SQLite's names.
        let mode = lock.metadata().map_err(io)?.mode();
        if mode & 0o022 != 0 {
            return Err(FolderError::Writable { path, mode: mode & 0o7777 }.into());
        }
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(StateDirError::Held { path }),
            Err(e) => return Err(io(io::Error::from(e)).into()),
        }
        *held = Some(Held { path: path.clone(), lock });
        Ok(path)
    }

    /// Its path without symbolic links if it is this agent's already, else as it was given.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.as_ref().map_or_else(|| self.given.clone(), |h| h.path.clone())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Explicitly: a receiver's program that was forked and has not come to its exec holds a copy of the descriptor.
        let _ = flock(&self.lock, FlockOperation::Unlock);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_holder_of_a_state_directory() {
        let top = tempfile::tempdir().unwrap();
        let path = top.path().join("a/state");
        let (held, trouble) = StateDir::open(&path).unwrap();
        assert!(trouble.is_none());
        let second = StateDir::open(&path).unwrap_err();
        assert!(matches!(second, StateDirError::Held { .. }), "{second}");
        drop(held);
        StateDir::open(&path).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o1777)).unwrap();
        assert!(StateDir::open(&path).unwrap_err().to_string().contains("1777"));
    }
}
