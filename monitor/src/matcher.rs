//! MATCH of the config against the facts of one process. Pure: who asks has gathered the facts, from events or /proc.

use crate::config::{Match, Pattern};

/// What a MATCH can ask about. None = unknown, and an unknown fact matches nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Facts<'a> {
    /// Joined by one space.
    pub argv: Option<&'a str>,
    /// The resolved path; a trailing ` (deleted)` is passed over, so that an upgraded daemon is still itself.
    pub exe: Option<&'a str>,
    pub comm: Option<&'a str>,
    pub uid: Option<u32>,
    /// The v2 path; on v1 that of the pids or name=systemd hierarchy.
    pub cgroup: Option<&'a str>,
    pub container_id: Option<&'a str>,
    pub container_name: Option<&'a str>,
    /// Of the lineage parent.
    pub parent: Option<&'a Facts<'a>>,
}

/// What must be known to answer a MATCH, so that nothing is read for nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    pub argv: bool,
    pub exe: bool,
    pub comm: bool,
    pub uid: bool,
    pub cgroup: bool,
    pub container: bool,
    /// Generations of lineage parents that are asked about.
    pub parents: usize,
}

impl Needs {
    /// The needs of both; those of parents are not told apart from its own.
    #[must_use]
    pub fn and(self, o: Self) -> Self {
        Self {
            argv: self.argv || o.argv,
            exe: self.exe || o.exe,
            comm: self.comm || o.comm,
            uid: self.uid || o.uid,
            cgroup: self.cgroup || o.cgroup,
            container: self.container || o.container,
            parents: self.parents.max(o.parents),
        }
    }
}

impl Match {
    /// Whether all the given fields match. A MATCH with no field matches nobody.
    #[must_use]
    pub fn matches(&self, f: &Facts<'_>) -> bool {
        let regex = |r: &Option<Pattern>, v: Option<&str>| {
            r.as_ref().is_none_or(|r| v.is_some_and(|v| r.is_match(v)))
        };
        let exe = f.exe.map(existing);
        !self.is_empty()
            && regex(&self.argv, f.argv)
            && regex(&self.exe, exe)
            && regex(&self.comm, f.comm)
            && self.user.as_ref().is_none_or(|u| f.uid == Some(u.uid))
            && regex(&self.cgroup, f.cgroup)
            && self.container.as_deref().is_none_or(|c| {
                f.container_id.is_some_and(|id| id.starts_with(c)) || f.container_name == Some(c)
            })
            && self.parent.as_ref().is_none_or(|m| f.parent.is_some_and(|p| m.matches(p)))
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.needs() == Needs::default()
    }

    #[must_use]
    pub fn needs(&self) -> Needs {
        let own = Needs {
            argv: self.argv.is_some(),
            exe: self.exe.is_some(),
            comm: self.comm.is_some(),
            uid: self.user.is_some(),
            cgroup: self.cgroup.is_some(),
            container: self.container.is_some(),
            parents: 0,
        };
        match &self.parent {
            None => own,
            Some(p) => {
                let p = p.needs();
                Needs { parents: p.parents + 1, ..own.and(p) }
            }
        }
    }
}

/// The path without the kernel's mark of a file that was unlinked or replaced.
pub(crate) fn existing(exe: &str) -> &str {
    exe.strip_suffix(" (deleted)").unwrap_or(exe)
}

/// Folders where only root installs: a build product that happens to be called `kubelet` is not protected.
const SYSTEM: [&str; 9] =
    ["/usr/", "/bin/", "/sbin/", "/lib/", "/lib64/", "/opt/", "/snap/", "/var/lib/", "/nix/store/"];

/// `protect_defaults`: what no job's end takes with it, by exe path and uid 0.
#[must_use]
pub fn protected_by_default(exe: Option<&str>, uid: Option<u32>) -> bool {
    let (Some(exe), Some(0)) = (exe.map(existing), uid) else { return false };
    let Some((folder, name)) = exe.rsplit_once('/') else { return false };
    // The folder keeps its slash, so that `/usrlocal/` is not `/usr/`.
    SYSTEM.iter().any(|s| format!("{folder}/").starts_with(s))
        && (matches!(name, "dbus-daemon" | "sshd" | "containerd" | "dockerd" | "crio" | "conmon" | "kubelet")
            || name.starts_with("systemd")
            || name.starts_with("containerd-shim"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::User;

    fn re(s: &str) -> Option<Pattern> {
        Pattern::new(s).ok()
    }

    #[test]
    fn all_given_fields_must_match_and_an_unknown_one_does_not() {
        let m = Match { argv: re("^sleep 1"), comm: re("sleep"), ..Match::default() };
        let f = Facts { argv: Some("sleep 100"), comm: Some("sleep"), ..Facts::default() };
        assert!(m.matches(&f));
        assert!(!m.matches(&Facts { comm: None, ..f }));
        assert!(!m.matches(&Facts { argv: Some("a sleep 1"), ..f }));
        assert!(!Match::default().matches(&f));
    }

    #[test]
    fn user_container_and_parent() {
        let m = Match {
            user: Some(User { given: "root".into(), uid: 0 }),
            container: Some("abc".into()),
            parent: Some(Box::new(Match {
                exe: re("/worker$"),
                parent: Some(Box::new(Match { comm: re("^init$"), ..Match::default() })),
                ..Match::default()
            })),
            ..Match::default()
        };
        assert_eq!(m.needs().parents, 2);
        assert!(m.needs().exe && m.needs().comm && !m.needs().argv);
        let init = Facts { comm: Some("init"), ..Facts::default() };
        let worker = Facts { exe: Some("/bin/worker (deleted)"), parent: Some(&init), ..Facts::default() };
        let f =
            Facts { uid: Some(0), container_id: Some("abcdef"), parent: Some(&worker), ..Facts::default() };
        assert!(m.matches(&f));
        assert!(!m.matches(&Facts { uid: Some(1), ..f }));
        assert!(!m.matches(&Facts { container_id: Some("xabc"), ..f }));
        assert!(m.matches(&Facts { container_id: None, container_name: Some("abc"), ..f }));
        assert!(!m.matches(&Facts { parent: Some(&init), ..f }));
        assert!(!m.matches(&Facts { parent: None, ..f }));
    }

    #[test]
    fn defaults_by_path_and_uid() {
        for yes in [
            "/usr/lib/systemd/systemd-journald",
            "/usr/sbin/sshd",
            "/bin/systemd",
            "/usr/bin/kubelet (deleted)",
            "/usr/bin/containerd-shim-runc-v2",
            "/var/lib/rancher/k3s/data/x/bin/containerd",
        ] {
            assert!(protected_by_default(Some(yes), Some(0)), "{yes}");
            assert!(!protected_by_default(Some(yes), Some(1000)), "{yes}");
        }
        for no in [
            "/home/a/kubelet",
            "/usr/bin/sshd-helper",
            "/usrlocal/sshd",
            "/tmp/systemd",
            "sshd",
            "/usr/bin/bash",
        ] {
            assert!(!protected_by_default(Some(no), Some(0)), "{no}");
        }
        assert!(!protected_by_default(None, Some(0)));
    }
}
