//! Which container a process is in, told from its cgroup paths: pure. Container runtimes write the container's id
//! into the path, each in its own way; a path that none of them would write belongs to no container, unless the runtime's
//! own records (see `records.rs`) name it.

use crate::model::outside::OutsideText;
use crate::model::schema::Container;

/// The lines of /proc/PID/cgroup that matter: the v2 path, and for v1 hosts the path of the `pids` controller or of
/// `name=systemd`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cgroups {
    pub v2: Option<String>,
    pub v1: Option<String>,
    /// A path as the runtime would have written it, where only the runtime's own records tell whose container this is.
    pub recorded: Option<String>,
}

impl Cgroups {
    /// Parses /proc/PID/cgroup (cgroups(7)): `hierarchy:controllers:path`, a line each. The path may hold colons.
    #[must_use]
    pub fn parse(b: &[u8]) -> Self {
        let mut all = Self::default();
        let mut systemd = None;
        for line in b.split(|&c| c == b'\n') {
            let mut parts = line.splitn(3, |&c| c == b':');
            let (Some(id), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
                continue;
            };
            let path = || Some(OutsideText::from_bytes(path).into_raw());
            if id == b"0" && controllers.is_empty() {
                // A zombie stays in a group that has been removed.
                all.v2 = path().map(|p| p.strip_suffix(" (deleted)").map(str::to_owned).unwrap_or(p));
            } else if controllers.split(|&c| c == b',').any(|c| c == b"pids") {
                all.v1 = path();
            } else if controllers == b"name=systemd" {
                systemd = path();
            }
        }
        if all.v1.as_deref().is_none_or(|p| p == "/") {
            all.v1 = systemd.or(all.v1);
        }
        all
    }

    /// The path by which rules match and which people are shown: the v2 path; on hybrid hosts, where everything may
    /// sit in the v2 root, the v1 path if that one says more.
    #[must_use]
    pub fn path(&self) -> Option<&str> {
        match (self.v2.as_deref(), self.v1.as_deref()) {
            (Some("/"), Some(v1)) if v1 != "/" => Some(v1),
            (Some(v2), _) => Some(v2),
            (None, v1) => v1,
        }
    }

    /// The container that any of the paths names.
    #[must_use]
    pub fn container(&self) -> Option<Container> {
        named(&self.kept()?)
    }

    /// What a dead process's file says: on v1 the kernel has moved it into the root groups, which tells nothing.
    #[must_use]
    pub fn of_the_dead(self) -> Self {
        let tells = |p: &String| p != "/";
        let v2 = if self.v1.is_some() { self.v2.filter(tells) } else { self.v2 };
        Self { v2, v1: self.v1.filter(tells), ..self }
    }

    /// What is kept of them for a process, as one string: the path that is shown, and below it, a line each, the others
    /// that name a container. (No cgroup has a newline in its name: the kernel refuses it.)
    #[must_use]
    pub fn kept(&self) -> Option<String> {
        let path = self.path()?;
        let mut kept = path.to_owned();
        for other in [&self.v2, &self.v1, &self.recorded].into_iter().flatten() {
            if other != path && container(other).is_some() {
                kept.push('\n');
                kept.push_str(other);
            }
        }
        Some(kept)
    }
}

/// The path that is shown, of what [`Cgroups::kept`] made.
#[must_use]
pub fn shown(kept: &str) -> &str {
    kept.split('\n').next().unwrap_or_default()
}

/// The container, of what [`Cgroups::kept`] made: the one whose runtime is told, before one that is only an id.
#[must_use]
pub fn named(kept: &str) -> Option<Container> {
    let mut all: Vec<Container> = kept.split('\n').filter_map(container).collect();
    let best = all.iter().position(|c| c.runtime.is_some()).unwrap_or(0);
    (best < all.len()).then(|| all.swap_remove(best))
}

/// The last part of a cgroup path: how runtimes that take names (runc) call their container.
#[must_use]
pub fn name(path: &str) -> Option<&str> {
    path.rsplit('/').next().filter(|n| !n.is_empty())
}

/// What a namespace's PID 1 is, in words.
#[must_use]
pub fn init_of(container: Option<&Container>, pid_ns: Option<u64>) -> String {
    match (container, pid_ns) {
        (Some(c), _) => format!("init of container {:.12}", c.id),
        (None, Some(ns)) => format!("init of pid namespace {ns}"),
        (None, None) => "init of a pid namespace".to_owned(),
    }
}

/// systemd scope prefixes, by runtime.
const SCOPES: [(&str, &str); 5] = [
    ("docker-", "docker"),
    ("cri-containerd-", "containerd"),
    ("crio-", "cri-o"),
    ("libpod-", "podman"),
    ("runc-", "runc"),
];

/// The container named by a cgroup path, innermost last: `/docker/ID`, `/libpod_parent/libpod-ID`,
/// `/kubepods/burstable/podUID/ID`, `…/cri-containerd-ID.scope`, `/…slice:crio:ID`, `/user.slice/…/libpod-ID.scope/container`.
#[must_use]
pub fn container(path: &str) -> Option<Container> {
    let mut parent = "";
    let mut found = None;
    for part in path.split('/').filter(|p| !p.is_empty()) {
        if let Some((id, runtime)) = part_id(part, parent) {
            found = Some(Container { id: id.into(), runtime, pod: pod(path) });
        }
        parent = part;
    }
    found
}

fn part_id(part: &str, parent: &str) -> Option<(String, Option<String>)> {
    let bare = part.strip_suffix(".scope").unwrap_or(part);
    // containerd without systemd: `system.slice:cri-containerd:ID`
    if let Some((rest, id)) = bare.rsplit_once(':')
        && is_id(id)
    {
        let runtime = rest.rsplit(':').next().map(|r| if r == "crio" { "cri-o" } else { "containerd" });
        return Some((id.to_owned(), runtime.map(str::to_owned)));
    }
    for (prefix, runtime) in SCOPES {
        if let Some(id) = bare.strip_prefix(prefix)
            && (is_id(id) || (runtime == "runc" && !id.is_empty()))
        {
            return Some((id.to_owned(), Some(runtime.to_owned())));
        }
    }
    if is_id(bare) {
        let runtime = match parent {
            "docker" => Some("docker"),
            "libpod_parent" => Some("podman"),
            _ => None,
        };
        return Some((bare.to_owned(), runtime.map(str::to_owned)));
    }
    None
}

/// 64 hex digits: the id of docker, containerd (CRI), CRI-O and podman.
fn is_id(s: &str) -> bool {
    s.len() == 64 && s.bytes().all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(&c))
}

/// The pod's UID in a kubelet path: `podUID`, or `…-podUID_WITH_UNDERSCORES.slice`.
fn pod(path: &str) -> Option<String> {
    path.split('/').find_map(|part| {
        let bare = part.strip_suffix(".slice").unwrap_or(part);
        let uid = bare.rsplit_once("-pod").map(|(_, u)| u).or_else(|| bare.strip_prefix("pod"))?;
        let uid = uid.replace('_', "-");
        // A UID of the API server has 36 characters; a static pod's is the 32 digits of a hash.
        let ok = matches!(uid.len(), 32 | 36) && uid.bytes().all(|c| c.is_ascii_hexdigit() || c == b'-');
        ok.then_some(uid)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_each_runtime() {
        let id = "0123456789abcdef".repeat(4);
        let uid = "1a2b3c4d-0000-1111-2222-333344445555";
        let under = uid.replace('-', "_");
        let cases = [
            (format!("/docker/{id}"), Some("docker"), None),
            (format!("/system.slice/docker-{id}.scope"), Some("docker"), None),
            (format!("/machine.slice/libpod-{id}.scope/container"), Some("podman"), None),
            (format!("/libpod_parent/libpod-{id}"), Some("podman"), None),
            (format!("/kubepods/burstable/pod{uid}/{id}"), None, Some(uid)),
            (
                format!(
                    "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{under}.slice/cri-containerd-{id}.scope"
                ),
                Some("containerd"),
                Some(uid),
            ),
            (format!("/kubepods.slice/kubepods-pod{under}.slice/crio-{id}.scope"), Some("cri-o"), Some(uid)),
            (
                format!("/system.slice/containerd.service/kubepods-pod{under}.slice:cri-containerd:{id}"),
                Some("containerd"),
                None,
            ),
        ];
        for (path, runtime, pod) in cases {
            let c = container(&path).unwrap_or_else(|| panic!("{path}"));
            assert_eq!((c.id.raw(), c.runtime.as_deref()), (id.as_str(), runtime), "{path}");
            if pod.is_some() {
                assert_eq!(c.pod.as_deref(), pod, "{path}");
            }
        }
        for none in
            ["/", "/user.slice/user-0.slice/session-1.scope", "/system.slice/ssh.service", "/docker/abc"]
        {
            assert_eq!(container(none), None, "{none}");
        }
    }

    #[test]
    fn hybrid_hosts_use_the_path_that_says_more() {
        let c = Cgroups::parse(b"11:pids:/a:b\n1:name=systemd:/s\n0::/\n");
        assert_eq!(c.path(), Some("/a:b"));
        let c = Cgroups::parse(b"11:pids:/\n1:name=systemd:/s\n");
        assert_eq!(c.path(), Some("/s"));
        let c = Cgroups::parse(b"0::/x/y\n11:pids:/\n");
        assert_eq!(c.path(), Some("/x/y"));
        assert_eq!(Cgroups::parse(b"0::/x (deleted)\n").path(), Some("/x"));
        // A dead one sits in the v1 roots, wherever it was; in its v2 group it stays.
        let dead = |b: &[u8]| Cgroups::parse(b).of_the_dead().path().map(str::to_owned);
        assert_eq!(dead(b"11:pids:/\n0::/\n"), None);
        assert_eq!(dead(b"11:pids:/\n0::/x\n").as_deref(), Some("/x"));
        assert_eq!(dead(b"0::/\n").as_deref(), Some("/"));
    }

    #[test]
    fn either_path_of_a_hybrid_host_names_the_container() {
        let id = "0123456789abcdef".repeat(4);
        // docker with the cgroupfs driver: the v2 group is still that of the daemon which started it.
        let text = format!("11:pids:/docker/{id}\n0::/system.slice/containerd.service\n");
        let kept = Cgroups::parse(text.as_bytes()).kept().unwrap();
        assert_eq!(shown(&kept), "/system.slice/containerd.service");
        let c = named(&kept).unwrap();
        assert_eq!((c.id, c.runtime.as_deref()), (id.as_str().into(), Some("docker")));
        // What the runtime has written down says more than the path.
        let mut all = Cgroups::parse(format!("0::/kubepods/podx/{id}\n").as_bytes());
        assert_eq!(named(&all.kept().unwrap()).unwrap().runtime, None);
        all.recorded = Some(format!("/kubepods/podx/cri-containerd-{id}.scope"));
        let kept = all.kept().unwrap();
        assert_eq!(named(&kept).unwrap().runtime.as_deref(), Some("containerd"));
        assert_eq!(shown(&kept), format!("/kubepods/podx/{id}"));
        assert_eq!((named("/x"), shown("/x")), (None, "/x"));
        assert_eq!(Cgroups::parse(b"\xff\n::\n0:\n").path(), None);
    }
}
