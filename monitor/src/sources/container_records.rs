//! What container runtimes write down about their containers, for the paths that do not say it themselves: runc called by
//! hand gives a container's group any name, and containerd with the cgroupfs driver writes the bare id. Read in this process's
//! root and, for an agent in a container, in that of the host's PID 1.

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::model::container::{Cgroups, container};
use crate::sources::proc::Proc;

/// Where runc keeps a folder for each container, by root's default.
const RUNC: &str = "run/runc";
/// Where containerd's shims keep theirs: folder of the namespace, and how the runtime's systemd scopes are called.
const SHIMS: [(&str, &str); 2] = [
    ("run/containerd/io.containerd.runtime.v2.task/k8s.io", "cri-containerd-"),
    ("run/containerd/io.containerd.runtime.v2.task/moby", "docker-"),
];
/// A runc state file is some 20 kB; more is not read.
const STATE_MAX: u64 = 1 << 20;

#[derive(Deserialize)]
struct RuncState {
    cgroup_paths: std::collections::BTreeMap<String, String>,
}

/// A path that names the container, as its runtime would have written it; None where the paths say all, or nobody has
/// written anything down.
pub(crate) fn path(proc: &Proc, c: &Cgroups) -> Option<String> {
    [&c.v2, &c.v1].into_iter().flatten().find_map(|p| match container(p) {
        Some(found) if found.runtime.is_some() => None,
        Some(found) => shim(proc, p, found.id.raw()),
        None => runc(proc, p),
    })
}

fn shim(proc: &Proc, path: &str, id: &str) -> Option<String> {
    let (_, prefix) =
        SHIMS.into_iter().find(|(dir, _)| roots(proc, dir).iter().any(|d| d.join(id).is_dir()))?;
    let above = path.split_once(id)?.0;
    Some(format!("{above}{prefix}{id}.scope"))
}

/// The innermost part of the path that is a container of runc, and by runc's own word in this very group.
fn runc(proc: &Proc, path: &str) -> Option<String> {
    let mut group = path.trim_end_matches('/');
    while let Some((above, id)) = group.rsplit_once('/') {
        if !id.is_empty() && !id.starts_with('.') && has_state(proc, id, group) {
            return Some(format!("{above}/runc-{id}.scope"));
        }
        group = above;
    }
    None
}

fn has_state(proc: &Proc, id: &str, group: &str) -> bool {
    roots(proc, RUNC).iter().any(|dir| {
        let file = dir.join(id).join("state.json");
        let state = record(&file).and_then(|b| serde_json::from_slice::<RuncState>(&b).ok());
        state.is_some_and(|s| s.cgroup_paths.values().any(|p| p.ends_with(group)))
    })
}

/// A record that root wrote. A user's own runc keeps its records elsewhere; what is not root's is nobody's word.
fn record(path: &Path) -> Option<Vec<u8>> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = fs::File::options().read(true).custom_flags(flags).open(path).ok()?;
    let meta = file.metadata().ok()?;
    if !meta.is_file() || meta.uid() != 0 || meta.len() > STATE_MAX {
        return None;
    }
    let mut text = Vec::new();
    file.take(STATE_MAX).read_to_end(&mut text).ok()?;
    Some(text)
}

/// Whether the v2 group at this path has this id: it is the inode of the group's folder.
pub(crate) fn has_id(proc: &Proc, path: &str, id: u64) -> bool {
    // Beside v1 hierarchies v2 is mounted one folder further down.
    let mounts = ["sys/fs/cgroup", "sys/fs/cgroup/unified"];
    let mut all = mounts.iter().flat_map(|m| roots(proc, &format!("{m}{path}")));
    all.any(|dir| fs::metadata(dir).is_ok_and(|m| m.ino() == id))
}

fn roots(proc: &Proc, path: &str) -> [PathBuf; 2] {
    ["self", "1"].map(|of| proc.root().join(of).join("root").join(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_name_what_paths_do_not() {
        let root = tempfile::tempdir().unwrap();
        let proc = Proc::at(root.path());
        let put = |path: &str, text: &str| {
            let file = root.path().join("1/root").join(path);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        };
        let id = "0123456789abcdef".repeat(4);
        put(&format!("run/containerd/io.containerd.runtime.v2.task/k8s.io/{id}/pid"), "1");
        let v2 = |p: &str| Cgroups { v2: Some(p.to_owned()), ..Cgroups::default() };
        let told = path(&proc, &v2(&format!("/kubepods/podx/{id}"))).unwrap();
        assert_eq!(container(&told).unwrap().runtime.as_deref(), Some("containerd"));
        assert_eq!(path(&proc, &v2(&format!("/kubepods/podx/{}", "f".repeat(64)))), None, "nobody has it");

        put(
            "run/runc/web/state.json",
            r#"{"cgroup_paths":{"":"/sys/fs/cgroup/unified/apps/web","cpu":"/x"}}"#,
        );
        let told = path(&proc, &v2("/apps/web/inner"));
        // Only root's word counts.
        if rustix::process::geteuid().is_root() {
            let told = container(&told.unwrap()).unwrap();
            assert_eq!((told.id.raw(), told.runtime.as_deref()), ("web", Some("runc")));
        } else {
            assert_eq!(told, None);
        }
        assert_eq!(path(&proc, &v2("/elsewhere/web")), None, "another group of that name");
        assert_eq!(path(&proc, &v2("/")), None);
    }
}
