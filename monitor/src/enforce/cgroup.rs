//! cgroups as far as the end of a job touches them: where v2 is mounted, who is in one, `cgroup.kill`, and whether a process
//! is frozen.

use std::io;
use std::path::{Path, PathBuf};

use crate::model::container::Cgroups;
use crate::sources::proc::Proc;

/// Where a hierarchy is mounted: the first mount in `/proc/self/mountinfo` whose type is `kind` and whose options name
/// `controller` ("" = any).
fn mount(proc: &Proc, kind: &str, controller: &str) -> Option<PathBuf> {
    let text = std::fs::read_to_string(proc.root().join("self/mountinfo")).ok()?;
    text.lines().find_map(|line| {
        // proc_pid_mountinfo(5): id parent dev root POINT options [optional..] - TYPE source SUPER
        let (left, right) = line.split_once(" - ")?;
        let mut right = right.split(' ');
        let options = (right.next()? == kind).then(|| right.nth(1)).flatten()?;
        (controller.is_empty() || options.split(',').any(|o| o == controller))
            .then(|| left.split(' ').nth(4).map(PathBuf::from))?
    })
}

/// The root of the v2 hierarchy; on hybrid hosts it is beside v1.
#[must_use]
pub fn v2_root(proc: &Proc) -> Option<PathBuf> {
    mount(proc, "cgroup2", "")
}

/// The v2 cgroup folder that a process is in.
#[must_use]
pub fn of(proc: &Proc, pid: u32) -> Option<PathBuf> {
    let path = Cgroups::parse(&crate::sources::proc::read(&proc.path(pid, "cgroup")).ok()?).v2?;
    Some(v2_root(proc)?.join(path.trim_start_matches('/')))
}

/// The processes in a v2 cgroup and in those below it.
pub fn processes(dir: &Path) -> io::Result<Vec<u32>> {
    let mut pids = Vec::new();
    let mut todo = vec![dir.to_path_buf()];
    while let Some(d) = todo.pop() {
        let text = std::fs::read_to_string(d.join("cgroup.procs"))?;
        pids.extend(text.lines().filter_map(|l| l.parse::<u32>().ok()));
        for e in std::fs::read_dir(&d)? {
            let e = e?;
            if e.file_type()?.is_dir() {
                todo.push(e.path());
            }
        }
    }
    Ok(pids)
}

/// SIGKILL to all in a v2 cgroup and below (Linux 5.14).
pub fn kill(dir: &Path) -> io::Result<()> {
    std::fs::write(dir.join("cgroup.kill"), "1")
}

/// Removes a v2 cgroup and those below it, once nobody is in them.
pub fn remove(dir: &Path) -> io::Result<()> {
    for e in std::fs::read_dir(dir)? {
        let e = e?;
        if e.file_type()?.is_dir() {
            remove(&e.path())?;
        }
    }
    std::fs::remove_dir(dir)
}

/// Whether a process sits in a frozen cgroup: v2's own state, or v1's freezer (which holds even SIGKILL back).
#[must_use]
pub fn frozen(proc: &Proc, pid: u32) -> bool {
    let says = |p: PathBuf, what: &str| {
        std::fs::read_to_string(p).is_ok_and(|t| t.lines().any(|l| l.trim_end() == what))
    };
    if of(proc, pid).is_some_and(|d| says(d.join("cgroup.events"), "frozen 1")) {
        return true;
    }
    let Ok(lines) = std::fs::read_to_string(proc.path(pid, "cgroup")) else { return false };
    let freezer = lines.lines().find_map(|l| {
        let mut f = l.splitn(3, ':');
        let named = f.nth(1)?.split(',').any(|c| c == "freezer");
        named.then(|| f.next()).flatten()
    });
    freezer.zip(mount(proc, "cgroup", "freezer")).is_some_and(|(path, root)| {
        says(root.join(path.trim_start_matches('/')).join("freezer.state"), "FROZEN")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_and_freezers_of_a_hybrid_host() {
        let d = tempfile::tempdir().unwrap();
        let root = d.path().display();
        std::fs::create_dir_all(d.path().join("self")).unwrap();
        std::fs::create_dir_all(d.path().join("7")).unwrap();
        let mounts = format!(
            "30 1 0:2 / {root}/fz rw - cgroup cgroup rw,freezer\n\
             31 1 0:3 / {root}/pids rw,nosuid shared:9 - cgroup cgroup rw,pids\n\
             32 1 0:4 / {root}/unified rw shared:1 - cgroup2 cgroup2 rw,nsdelegate\n"
        );
        std::fs::write(d.path().join("self/mountinfo"), mounts).unwrap();
        std::fs::write(d.path().join("7/cgroup"), "5:freezer:/a\n0::/b\n").unwrap();
        let p = Proc::at(d.path());
        assert_eq!(v2_root(&p), Some(d.path().join("unified")));
        assert_eq!(of(&p, 7), Some(d.path().join("unified/b")));
        assert!(!frozen(&p, 7) && !frozen(&p, 8));
        std::fs::create_dir_all(d.path().join("fz/a")).unwrap();
        std::fs::write(d.path().join("fz/a/freezer.state"), "FROZEN\n").unwrap();
        assert!(frozen(&p, 7));
        std::fs::write(d.path().join("fz/a/freezer.state"), "THAWED\n").unwrap();
        std::fs::create_dir_all(d.path().join("unified/b/c")).unwrap();
        std::fs::write(d.path().join("unified/b/cgroup.events"), "populated 1\nfrozen 1\n").unwrap();
        assert!(frozen(&p, 7));
        std::fs::write(d.path().join("unified/b/cgroup.procs"), "7\n").unwrap();
        std::fs::write(d.path().join("unified/b/c/cgroup.procs"), "8\n9\n").unwrap();
        let mut pids = processes(&d.path().join("unified/b")).unwrap();
        pids.sort_unstable();
        assert_eq!(pids, [7, 8, 9]);
    }
}
