//! Looks at /proc that the core asked for. Reading only; what it means is decided by the forest.
//!
//! Races: the pid may be reused between the event and the look. The start in /proc (clock ticks, 10 ms) is compared, so
//! a stranger is mistaken for the dead one only if it started in the very same tick; the forest, which has seen the
//! stranger's fork, refuses such an answer by key.

use std::os::unix::ffi::OsStringExt as _;

use crate::engine::Observation;
use crate::engine::forest::{ARGV_MAX, Facts, Look, Seen};
use crate::model::container::{self, Cgroups};
use crate::model::key::Key;
use crate::model::outside::OutsideText;
use crate::model::schema::{Process, State};
use crate::sources::proc::{self, Proc};
use crate::sources::{container_records, host};

/// A reader of /proc that knows how its clock relates to the kernel's.
#[derive(Clone, Debug)]
pub(super) struct ProcReader {
    pub proc: Proc,
    ticks_per_second: u64,
}

impl ProcReader {
    pub(super) fn new(proc: Proc) -> Self {
        Self { proc, ticks_per_second: rustix::param::clock_ticks_per_second() }
    }

    /// The start in clock ticks, as /proc/PID/stat shows it for this key (`nsec_to_clock_t`).
    fn ticks(&self, key: Key) -> u64 {
        key.start.saturating_add_signed(host::time_offset()) / (1_000_000_000 / self.ticks_per_second.max(1))
    }

    /// State, parent and whether any thread lives: two or three small files that never block on the process's memory. None:
    /// it could not be found out (no descriptor was left, say), which is no sign of death.
    pub(super) fn look(&self, key: Key) -> Option<Seen> {
        let stat = match self.proc.stat(key.pid) {
            Ok(stat) if stat.start_ticks == self.ticks(key) => stat,
            Ok(_) => return Some(Seen::Absent),
            Err(e) => return proc::is_absence(&e).then_some(Seen::Absent),
        };
        Some(Seen::Present(Look {
            state: stat.state,
            ppid: stat.ppid,
            pgrp: stat.pgrp,
            session: stat.session,
            live_thread: stat.state != b'Z' || self.proc.has_live_thread(key.pid),
        }))
    }

    /// What rules and views want to know beside that. May take [`proc::blocking::LIMIT`]: /proc/PID/cmdline lies in the process's
    /// memory. What does not come within it is left out.
    pub(super) fn facts(&self, key: Key) -> Option<Facts> {
        let pid = key.pid;
        let status = self.proc.status(pid).ok()?;
        let mut facts = Facts {
            argv: self.proc.cmdline(pid, ARGV_MAX as u64).ok().filter(|b| !b.is_empty()),
            exe: self.proc.exe(pid).ok().map(|p| p.into_os_string().into_vec()),
            cgroup: None,
            uid: status.uid,
            pid_ns: self.pid_ns(pid),
            ns_pid: status.ns_pids.last().copied(),
        };
        // Last: after its own reading it makes sure that the pid is still that process's, so all above was read of it too.
        match self.cgroups(key) {
            Some(c) => facts.cgroup = c.kept(),
            None if self.proc.stat(pid).ok()?.start_ticks != self.ticks(key) => return None,
            None => {}
        }
        Some(facts)
    }

    /// Its cgroups, and what the runtimes' records add. `None`: gone.
    fn cgroups(&self, key: Key) -> Option<Cgroups> {
        let mut all = Cgroups::parse(&proc::read(&self.proc.path(key.pid, "cgroup")).ok()?);
        // After it was read: the pid is still that process's.
        let stat = self.proc.stat(key.pid).ok().filter(|s| s.start_ticks == self.ticks(key))?;
        if stat.state == b'Z' {
            all = all.of_the_dead();
        }
        all.recorded = container_records::path(&self.proc, &all);
        Some(all)
    }

    /// The answer to `Effect::ReadCgroup`. That the id alone tells the path is said only where no v1 hierarchy is there, and
    /// the group at that path has this id: the process may have moved since its exec.
    pub(super) fn cgroup(&self, key: Key, id: u64) -> Observation {
        let all = self.cgroups(key);
        let by_id = all.as_ref().is_some_and(|c| {
            c.v1.is_none() && c.v2.as_deref().is_some_and(|p| container_records::has_id(&self.proc, p, id))
        });
        Observation::Cgroup { key, id, cgroup: all.and_then(|c| c.kept()), by_id }
    }

    /// Fills in, for a view, where a process is: cgroup, container, namespace, pid inside. What the engine may keep of it
    /// is returned.
    pub(super) fn place(&self, p: &mut Process, host: Option<u64>) -> [Option<Observation>; 2] {
        if p.state == State::Gone || p.kernel_thread {
            return [None, None];
        }
        let inside = if p.ns_pid.is_none() { self.inside(p.id, host) } else { None };
        if let Some((ns, pid)) = inside {
            (p.pid_ns, p.ns_pid) = (Some(ns), Some(pid));
        }
        let cgroup = if p.cgroup.is_none() { self.cgroups(p.id).and_then(|c| c.kept()) } else { None };
        if let Some(c) = &cgroup {
            (p.container, p.cgroup) = (container::named(c), Some(container::shown(c).into()));
        }
        [
            inside.map(|(pid_ns, ns_pid)| Observation::Inside { key: p.id, pid_ns, ns_pid }),
            cgroup.map(|c| Observation::Cgroup { key: p.id, id: 0, cgroup: Some(c), by_id: false }),
        ]
    }

    /// The inode of its pid namespace.
    fn pid_ns(&self, pid: u32) -> Option<u64> {
        let link = std::fs::read_link(self.proc.path(pid, "ns/pid")).ok()?;
        link.to_str()?.strip_prefix("pid:[")?.strip_suffix(']')?.parse().ok()
    }

    /// The pid namespace and the pid inside it, for views. Facts are read of few processes; a link costs little, and the
    /// status is read only of those that are in another namespace than `host`.
    pub(super) fn inside(&self, key: Key, host: Option<u64>) -> Option<(u64, u32)> {
        let ns = self.pid_ns(key.pid)?;
        let pid = if host == Some(ns) { key.pid } else { *self.proc.status(key.pid).ok()?.ns_pids.last()? };
        // After it was read: the pid is still that process's.
        let same = self.proc.stat(key.pid).is_ok_and(|s| s.start_ticks == self.ticks(key));
        same.then_some((ns, pid))
    }

    /// The pid namespace of the agent itself.
    pub(super) fn own_pid_ns(&self) -> Option<u64> {
        self.pid_ns(std::process::id())
    }

    /// Fills in the letter of /proc/PID/stat at this moment, and the name (no event tells of a prctl), for views.
    pub(super) fn show(&self, p: &mut Process) {
        if p.state != State::Gone
            && let Ok(stat) = self.proc.stat(p.pid)
            && stat.start_ticks == self.ticks(p.id)
        {
            (p.kernel_state, p.comm) =
                (Some(char::from(stat.state).to_string()), OutsideText::from_bytes(stat.comm.bytes()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A /proc with one process that started at tick 100, and these lines in its cgroup file.
    fn fake(state: char, cgroup: &str) -> (tempfile::TempDir, ProcReader, Key) {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("7");
        std::fs::create_dir_all(&dir).unwrap();
        let zeros = "0 ".repeat(14);
        std::fs::write(dir.join("stat"), format!("7 (x y) {state} 1 7 7 0 {zeros}100 0 0\n")).unwrap();
        std::fs::write(dir.join("cgroup"), cgroup).unwrap();
        let proc_reader = ProcReader::new(Proc::at(root.path()));
        let start = 100 * (1_000_000_000 / proc_reader.ticks_per_second);
        (root, proc_reader, Key::new(7, start.saturating_add_signed(-host::time_offset())))
    }

    fn path(o: &Observation) -> (Option<String>, bool) {
        let Observation::Cgroup { cgroup, by_id, .. } = o else { panic!("{o:?}") };
        (cgroup.clone(), *by_id)
    }

    #[test]
    fn an_id_tells_the_path_only_where_it_does() {
        let mkdir = |root: &tempfile::TempDir| {
            let dir = root.path().join("1/root/sys/fs/cgroup/a/b");
            std::fs::create_dir_all(&dir).unwrap();
            std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(dir).unwrap())
        };
        let (root, l, key) = fake('S', "0::/a/b\n");
        let id = mkdir(&root);
        assert_eq!(path(&l.cgroup(key, id)), (Some("/a/b".into()), true));
        assert_eq!(path(&l.cgroup(key, id + 1)), (Some("/a/b".into()), false), "it has moved since");
        let stranger = Key::new(7, key.start + 20_000_000);
        assert_eq!(path(&l.cgroup(stranger, id)), (None, false));
        // BackgroundTasks a v1 hierarchy two in one v2 group may be in two containers.
        let (root, l, key) = fake('S', "5:pids:/x\n0::/a/b\n");
        let id = mkdir(&root);
        assert_eq!(path(&l.cgroup(key, id)), (Some("/a/b".into()), false));
    }

    #[test]
    fn a_v1_host_and_its_zombies() {
        let id = "0123456789abcdef".repeat(4);
        let docker = format!("5:pids:/docker/{id}\n1:name=systemd:/docker/{id}\n");
        let (_root, l, key) = fake('S', &docker);
        let kept = path(&l.cgroup(key, 1)).0.unwrap();
        assert_eq!(container::shown(&kept), format!("/docker/{id}"));
        assert_eq!(container::named(&kept).unwrap().runtime.as_deref(), Some("docker"));
        let (_root, l, key) = fake('Z', "5:pids:/\n1:name=systemd:/\n");
        assert_eq!(path(&l.cgroup(key, 1)).0, None, "the root group says nothing of a dead one");
    }
}
