//! A small disk of a test's own, which can be filled.

use std::ffi::CString;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

/// A tmpfs; unmounted when dropped.
pub struct Disk(PathBuf);

impl Disk {
    /// Makes the folder and mounts it there.
    pub fn mount(at: &Path, bytes: usize) -> Result<Self> {
        std::fs::create_dir_all(at)?;
        let target = CString::new(at.as_os_str().as_bytes())?;
        let size = CString::new(format!("size={bytes},mode=0755"))?;
        let flags = libc::MS_NOSUID | libc::MS_NODEV;
        // SAFETY: all strings are NUL-terminated and outlive the call.
        let rc = unsafe {
            libc::mount(c"jwtest".as_ptr(), target.as_ptr(), c"tmpfs".as_ptr(), flags, size.as_ptr().cast())
        };
        ensure!(rc == 0, "mount a tmpfs: {}", std::io::Error::last_os_error());
        Ok(Self(at.to_owned()))
    }

    /// Whether it can be written.
    pub fn set_writable(&self, writable: bool) -> Result<()> {
        let target = CString::new(self.0.as_os_str().as_bytes())?;
        let flags = libc::MS_REMOUNT | if writable { 0 } else { libc::MS_RDONLY };
        // SAFETY: the strings are NUL-terminated and outlive the call; a remount takes no file system type.
        let rc = unsafe {
            libc::mount(std::ptr::null(), target.as_ptr(), std::ptr::null(), flags, std::ptr::null())
        };
        ensure!(rc == 0, "remount a tmpfs: {}", std::io::Error::last_os_error());
        Ok(())
    }

    /// Takes all that is free.
    pub fn fill(&self) -> Result<()> {
        let mut f = std::fs::File::create(self.0.join("ballast"))?;
        for size in [65_536, 4096, 1] {
            while f.write_all(&vec![1; size]).is_ok() {}
        }
        Ok(())
    }

    /// Gives it back.
    pub fn free(&self) -> Result<()> {
        Ok(std::fs::remove_file(self.0.join("ballast"))?)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Ok(target) = CString::new(self.0.as_os_str().as_bytes()) {
            // SAFETY: the string is NUL-terminated and outlives the call.
            unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
        }
    }
}
