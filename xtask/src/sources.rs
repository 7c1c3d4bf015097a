//! The fingerprint of what the probe object is built from. `monitor/build.rs` includes this file too, so it uses the
//! standard library only.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// 32 hex digits over the names and contents of the probes' sources, of the toolchain file, and of what Cargo.lock says
/// about the crates that only the probes use. It guards against a forgotten rebuild, not against malice (FNV-1a).
pub(crate) fn fingerprint(root: &Path) -> io::Result<String> {
    let mut files = vec![root.join("monitor-ebpf/Cargo.toml"), root.join("rust-toolchain.toml")];
    rust_files(&root.join("monitor-ebpf/src"), &mut files)?;
    files.sort();
    let mut hash = Fnv::new();
    for file in &files {
        let name = file.strip_prefix(root).unwrap_or(file);
        hash.field(name.to_string_lossy().as_bytes());
        hash.field(&fs::read(file)?);
    }
    let lock = fs::read_to_string(root.join("Cargo.lock"))?;
    for package in lock.split("\n[[package]]\n").filter(|p| is_probe_crate(p)) {
        hash.field(package.trim().as_bytes());
    }
    Ok(format!("{:032x}", hash.0))
}

fn is_probe_crate(package: &str) -> bool {
    package
        .strip_prefix("name = \"")
        .is_some_and(|p| p.starts_with("aya-ebpf") || p.starts_with("aya-log-ebpf"))
}

/// Adds the Rust files below a folder.
pub(crate) fn rust_files(dir: &Path, into: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            rust_files(&path, into)?;
        } else if path.extension().is_some_and(|e| e == "rs") {
            into.push(path);
        }
    }
    Ok(())
}

struct Fnv(u128);

impl Fnv {
    fn new() -> Self {
        Self(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }
    fn field(&mut self, bytes: &[u8]) {
        for b in (bytes.len() as u64).to_le_bytes().iter().chain(bytes) {
            self.0 = (self.0 ^ u128::from(*b)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
        }
    }
}
