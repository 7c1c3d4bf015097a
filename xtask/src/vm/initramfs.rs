//! Packs files into an uncompressed `newc` archive, which the kernel unpacks as its root (kernel documentation,
//! driver-api/early-userspace/buffer-format). Writes one file; reads what it is told to pack and the libraries that
//! `ldd` names.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

const MERGED: [&str; 4] = ["bin", "sbin", "lib", "lib64"];

pub(crate) struct Initramfs {
    bytes: Vec<u8>,
    packed: BTreeSet<PathBuf>,
    inode: u32,
}

impl Initramfs {
    /// An archive with the folders that every root has, `/usr` merged.
    pub(crate) fn new() -> Self {
        let mut archive = Self { bytes: Vec::new(), packed: BTreeSet::new(), inode: 0 };
        for folder in MERGED {
            archive.folder(&Path::new("/usr").join(folder));
            archive.entry(&Path::new("/").join(folder), 0o120_777, format!("usr/{folder}").as_bytes());
        }
        for folder in ["/proc", "/sys", "/dev", "/tmp", "/run", "/etc", "/root", "/var/lib"] {
            archive.folder(Path::new(folder));
        }
        archive
    }

    /// A folder, with all that lead to it.
    pub(crate) fn folder(&mut self, path: &Path) {
        let path = merged(path);
        let up: Vec<_> = path.ancestors().filter(|a| a.parent().is_some()).collect();
        for folder in up.into_iter().rev() {
            if self.packed.insert(folder.to_path_buf()) {
                self.entry(folder, 0o040_755, b"");
            }
        }
    }

    /// A file with the given contents. A path that is already packed is left as it is.
    pub(crate) fn file(&mut self, path: &Path, mode: u32, contents: &[u8]) {
        let path = merged(path);
        if let Some(parent) = path.parent() {
            self.folder(parent);
        }
        if self.packed.insert(path.clone()) {
            self.entry(&path, 0o100_000 | mode, contents);
        }
    }

    pub(crate) fn symlink(&mut self, path: &Path, to: &str) {
        let path = merged(path);
        if let Some(parent) = path.parent() {
            self.folder(parent);
        }
        if self.packed.insert(path.clone()) {
            self.entry(&path, 0o120_777, to.as_bytes());
        }
    }

    /// A host file under the path it has here; a program brings its libraries.
    pub(crate) fn host_file(&mut self, path: &Path) -> Result<()> {
        self.host_file_as(path, path)
    }

    /// A host file under another path; a program brings its libraries and leaves its debug information behind.
    pub(crate) fn host_file_as(&mut self, from: &Path, to: &Path) -> Result<()> {
        let what = || format!("{} could not be packed", from.display());
        let mode = fs::metadata(from).with_context(what)?.permissions().mode() & 0o777;
        let contents = fs::read(from).with_context(what)?;
        if contents.starts_with(b"\x7fELF") && mode & 0o111 != 0 {
            self.file(to, mode, &stripped(from).unwrap_or(contents));
            for library in libraries(from)? {
                let bytes = fs::read(&library).with_context(|| format!("{}", library.display()))?;
                self.file(&library, 0o755, &bytes);
            }
        } else {
            self.file(to, mode, &contents);
        }
        Ok(())
    }

    /// A host folder with all that is in it, under the path it has here.
    pub(crate) fn host_folder(&mut self, path: &Path) -> Result<()> {
        self.folder(path);
        for entry in fs::read_dir(path).with_context(|| format!("{}", path.display()))? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                self.host_folder(&entry.path())?;
            } else if kind.is_symlink() {
                let to = fs::read_link(entry.path())?;
                self.symlink(&entry.path(), &to.to_string_lossy());
            } else if kind.is_file() {
                self.host_file(&entry.path())?;
            }
        }
        Ok(())
    }

    /// What a folder holds, as if it were the root. Of each folder named in `bare` only itself is packed.
    pub(crate) fn tree(&mut self, root: &Path, bare: &[&str]) -> Result<()> {
        let mut open = vec![PathBuf::new()];
        while let Some(folder) = open.pop() {
            let from = root.join(&folder);
            for entry in fs::read_dir(&from).with_context(|| format!("{}", from.display()))? {
                let entry = entry?;
                let inside = folder.join(entry.file_name());
                let to = Path::new("/").join(&inside);
                let kind = entry.file_type()?;
                if kind.is_dir() {
                    self.folder(&to);
                    if !bare.iter().any(|b| inside == Path::new(b)) {
                        open.push(inside);
                    }
                } else if kind.is_symlink() {
                    self.symlink(&to, &fs::read_link(entry.path())?.to_string_lossy());
                } else if kind.is_file() {
                    let mode = entry.metadata()?.permissions().mode() & 0o7777;
                    self.file(&to, mode, &fs::read(entry.path())?);
                }
            }
        }
        Ok(())
    }

    /// Ends the archive and writes it; returns its size in bytes.
    pub(crate) fn write(mut self, to: &Path) -> Result<usize> {
        self.entry(Path::new("TRAILER!!!"), 0, b"");
        let mut file = fs::File::create(to).with_context(|| format!("{}", to.display()))?;
        file.write_all(&self.bytes)?;
        Ok(self.bytes.len())
    }

    fn entry(&mut self, path: &Path, mode: u32, contents: &[u8]) {
        self.inode += 1;
        let text = path.to_string_lossy();
        let name = text.trim_start_matches('/');
        let links = if mode & 0o170_000 == 0o040_000 { 2 } else { 1 };
        // inode, mode, uid, gid, links, mtime, size, device twice two, length of the name, checksum
        let head =
            [self.inode, mode, 0, 0, links, 0, contents.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in head {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(contents);
        self.pad();
    }

    fn pad(&mut self) {
        while !self.bytes.len().is_multiple_of(4) {
            self.bytes.push(0);
        }
    }
}

/// Where a file lies once /bin, /sbin, /lib and /lib64 are links into /usr, as on any current distribution.
fn merged(path: &Path) -> PathBuf {
    let inside = path.strip_prefix("/").unwrap_or(path);
    if MERGED.iter().any(|m| inside.starts_with(m)) {
        Path::new("/usr").join(inside)
    } else {
        Path::new("/").join(inside)
    }
}

/// The program without debug information, which is most of a dev build; `None` where strip is absent or refuses.
fn stripped(program: &Path) -> Option<Vec<u8>> {
    let out = std::env::temp_dir().join(format!("jobwarden-strip-{}", std::process::id()));
    let done = Command::new("strip").arg("--strip-debug").arg("-o").arg(&out).arg(program).status().ok()?;
    let bytes = done.success().then(|| fs::read(&out).ok()).flatten();
    // Absent when strip failed; then there is nothing to remove.
    let _ = fs::remove_file(&out);
    bytes
}

/// The shared libraries and the loader that `ldd` names; none for a static program.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let out = Command::new("ldd").arg(program).output().context("ldd could not be started")?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    Ok(text
        .split_whitespace()
        .filter(|w| w.starts_with('/') && !w.ends_with(':'))
        .map(PathBuf::from)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_go_where_the_links_lead() {
        assert_eq!(merged(Path::new("/lib64/ld-linux.so")), Path::new("/usr/lib64/ld-linux.so"));
        assert_eq!(merged(Path::new("/usr/lib/x")), Path::new("/usr/lib/x"));
        assert_eq!(merged(Path::new("/library/x")), Path::new("/library/x"));
    }

    #[test]
    fn folders_come_before_their_files_and_everything_is_padded_to_four() {
        let mut archive = Initramfs::new();
        archive.file(Path::new("/a/b/c"), 0o644, b"hello");
        archive.file(Path::new("/a/b/d"), 0o755, b"");
        let text = String::from_utf8_lossy(&archive.bytes).into_owned();
        let at = |name: &str| text.find(name).expect("packed");
        assert!(at("a\0") < at("a/b\0") && at("a/b\0") < at("a/b/c\0") && at("a/b/c\0") < at("a/b/d\0"));
        assert!(text.contains("usr/bin\0") && text.contains("bin\0"));
        assert_eq!(archive.bytes.len() % 4, 0);
    }

    #[test]
    fn a_tree_becomes_the_root_without_what_is_in_the_folders_left_bare() {
        let root = std::env::temp_dir().join(format!("jobwarden-initramfs-{}", std::process::id()));
        for folder in ["usr/bin", "var/cache/apt"] {
            fs::create_dir_all(root.join(folder)).expect("a folder");
        }
        fs::write(root.join("usr/bin/program"), "it").expect("a file");
        fs::write(root.join("var/cache/apt/list"), "long").expect("a file");
        std::os::unix::fs::symlink("usr/bin", root.join("bin")).expect("a link");
        let mut archive = Initramfs::new();
        let packed = archive.tree(&root, &["var/cache"]);
        fs::remove_dir_all(&root).expect("made above");
        packed.expect("packed");
        let text = String::from_utf8_lossy(&archive.bytes).into_owned();
        assert!(text.contains("usr/bin/program\0") && text.contains("var/cache\0"));
        assert!(!text.contains("var/cache/"));
        // The link is that of every root, once.
        assert_eq!(text.matches("\0bin\0").count() + text.matches("0bin\0").count(), 1);
    }
}
