//! What this host offers. Facts only, read without loading anything; the rules are in [`HostFeatures::findings`].

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::btf::Btf;
use super::offsets::{Kind, Layout, PROBES, VMLINUX};

/// Facts about the running kernel, and what this process may do with it.
#[derive(Clone, Debug, Serialize)]
pub struct HostFeatures {
    /// `uname -r` and `-m`.
    pub release: String,
    pub machine: String,
    /// Major and minor; None if the release does not begin with two numbers.
    pub version: Option<(u32, u32)>,
    /// Bytes of `/sys/kernel/btf/vmlinux`, or why it cannot be used.
    pub btf: Result<usize, String>,
    /// Fields that the probes read and this kernel does not have.
    pub missing_fields: Vec<String>,
    /// What each probe is attached to, and whether it is there.
    pub attach_points: Vec<(String, bool)>,
    /// Those of the agent's capabilities that matter, and whether it has them.
    pub capabilities: Vec<(String, bool)>,
    pub effective_uid: u32,
    pub initial_pid_namespace: bool,
    /// What this time namespace adds to boot time.
    pub time_offset_ns: i64,
    /// Where a bpffs is mounted.
    pub bpffs: Option<PathBuf>,
    /// Where cgroup v2 is mounted, whether its groups have `cgroup.kill` (5.14), and whether v1 is there too.
    pub cgroup2: Option<PathBuf>,
    pub cgroup_kill: bool,
    pub cgroup1: bool,
    /// `kernel.bpf_stats_enabled`: run times of the probes are counted.
    pub bpf_stats: Option<bool>,
    /// `net.core.bpf_jit_enable`.
    pub bpf_jit: Option<bool>,
    pub pid_max: Option<u64>,
    pub threads_max: Option<u64>,
    /// Kernel lockdown, if it is not `none`.
    pub lockdown: Option<String>,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Grade {
    Ok,
    /// Something is off; the rest works.
    Off,
    /// jobwarden cannot run here.
    Fatal,
}

/// One line of `doctor`.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    pub what: &'static str,
    pub grade: Grade,
    /// What was found.
    pub found: String,
    /// What that means and what mends it; empty if all is well.
    pub then: String,
}

/// `include/uapi/linux/capability.h`.
const CAPABILITIES: &[(&str, u32)] = &[
    ("CAP_KILL", 5),
    ("CAP_DAC_READ_SEARCH", 2),
    ("CAP_SYS_PTRACE", 19),
    ("CAP_SYS_ADMIN", 21),
    ("CAP_SYS_RESOURCE", 24),
    ("CAP_PERFMON", 38),
    ("CAP_BPF", 39),
];
pub(super) const OLDEST: (u32, u32) = (5, 10);

fn text(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|s| s.trim().to_owned())
}

pub(super) fn number(path: &str) -> Option<u64> {
    text(path)?.parse().ok()
}

pub(super) fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Mount points of this type, in /proc/mounts' order; octal escapes are undone.
fn mounts(mounts: &str, kind: &str) -> Vec<PathBuf> {
    mounts
        .lines()
        .filter_map(|l| {
            let mut f = l.split(' ');
            let (at, fs) = (f.nth(1)?, f.next()?);
            (fs == kind).then(|| {
                PathBuf::from(at.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\"))
            })
        })
        .collect()
}

/// The first bpffs that is mounted.
#[must_use]
pub fn bpffs() -> Option<PathBuf> {
    mounts(&text("/proc/self/mounts")?, "bpf").into_iter().next()
}

fn effective_capabilities() -> u64 {
    let status = text("/proc/self/status").unwrap_or_default();
    status.lines().find_map(|l| u64::from_str_radix(l.strip_prefix("CapEff:")?.trim(), 16).ok()).unwrap_or(0)
}

impl HostFeatures {
    /// Looks, and never fails: what cannot be read is absent.
    #[must_use]
    pub fn read() -> Self {
        let uname = rustix::system::uname();
        let release = uname.release().to_string_lossy().into_owned();
        let bytes = std::fs::read(VMLINUX).map_err(|e| e.to_string());
        let parsed =
            bytes.as_ref().map_err(Clone::clone).and_then(|b| Btf::parse(b).map_err(|e| e.to_string()));
        let (mut missing_fields, mut attach_points) = (Vec::new(), Vec::new());
        if let Ok(btf) = &parsed {
            missing_fields = Layout::of(btf).missing.into_iter().map(str::to_owned).collect();
            for p in PROBES.iter().filter(|p| !p.is_tracer()) {
                match p.kind {
                    Kind::Tracepoint(tp) => {
                        attach_points.push((format!("tp_btf/{tp}"), btf.tracepoint_args(tp).is_some()));
                    }
                    Kind::Iterator(i) => {
                        attach_points.push((format!("iter/{i}"), btf.has_function(&format!("bpf_iter_{i}"))));
                    }
                    Kind::ByHand => {}
                }
            }
        }
        let btf = parsed.map(|_| bytes.as_ref().map_or(0, Vec::len));
        let have = effective_capabilities();
        let all_mounts = text("/proc/self/mounts").unwrap_or_default();
        let cgroup2 = mounts(&all_mounts, "cgroup2").into_iter().next();
        let version = version(&release);
        Self {
            version,
            release,
            machine: uname.machine().to_string_lossy().into_owned(),
            btf,
            missing_fields,
            attach_points,
            capabilities: CAPABILITIES.iter().map(|&(n, bit)| (n.to_owned(), have >> bit & 1 == 1)).collect(),
            effective_uid: rustix::process::geteuid().as_raw(),
            initial_pid_namespace: super::in_initial_pid_namespace().is_ok(),
            time_offset_ns: super::time_namespace_offset(),
            bpffs: mounts(&all_mounts, "bpf").into_iter().next(),
            // The root group never has the file; the version says it as well.
            cgroup_kill: cgroup2.is_some() && version >= Some((5, 14)),
            cgroup2,
            cgroup1: !mounts(&all_mounts, "cgroup").is_empty(),
            bpf_stats: number("/proc/sys/kernel/bpf_stats_enabled").map(|n| n == 1),
            bpf_jit: number("/proc/sys/net/core/bpf_jit_enable").map(|n| n > 0),
            pid_max: number("/proc/sys/kernel/pid_max"),
            threads_max: number("/proc/sys/kernel/threads-max"),
            lockdown: lockdown(&text("/sys/kernel/security/lockdown").unwrap_or_default()),
        }
    }

    fn has(&self, capability: &str) -> bool {
        self.capabilities.iter().any(|(n, have)| n == capability && *have)
    }

    /// What follows from the facts, worst things not first: in the order in which they are asked for.
    #[must_use]
    pub fn findings(&self) -> Vec<Finding> {
        let mut all = Vec::new();
        let mut say = |what, grade, found: String, then: &str| {
            let then = if grade == Grade::Ok { String::new() } else { then.to_owned() };
            all.push(Finding { what, grade, found, then });
        };
        let or = |ok, other| if ok { Grade::Ok } else { other };
        say(
            "kernel",
            or(self.version.is_none_or(|v| v >= OLDEST), Grade::Fatal),
            format!("{} {}", self.release, self.machine),
            "Linux 5.10 or later is needed",
        );
        say(
            "kernel types (BTF)",
            or(self.btf.is_ok(), Grade::Fatal),
            self.btf.as_ref().map_or_else(Clone::clone, |n| format!("{n} bytes in {VMLINUX}")),
            "a kernel built with CONFIG_DEBUG_INFO_BTF is needed; the distributions' own kernels have it",
        );
        if self.btf.is_ok() {
            let essential = |f: &String| !super::offsets::optional(f);
            let bad = self.missing_fields.iter().any(essential);
            say(
                "fields",
                or(self.missing_fields.is_empty(), if bad { Grade::Fatal } else { Grade::Off }),
                if self.missing_fields.is_empty() {
                    "all that the probes read are there".into()
                } else {
                    format!("missing: {}", self.missing_fields.join(", "))
                },
                "what needs them is off",
            );
        }
        for (p, (name, there)) in
            PROBES.iter().filter(|p| p.kind != Kind::ByHand && !p.is_tracer()).zip(&self.attach_points)
        {
            say(
                "attach point",
                or(*there, if p.essential { Grade::Fatal } else { Grade::Off }),
                format!("{name}: {}", if *there { "there" } else { "not in this kernel" }),
                "what it tells is missing",
            );
        }
        let may_load = self.has("CAP_SYS_ADMIN") || (self.has("CAP_BPF") && self.has("CAP_PERFMON"));
        say(
            "may load probes",
            or(may_load, Grade::Fatal),
            format!(
                "uid {}, CAP_BPF {}, CAP_PERFMON {}, CAP_SYS_ADMIN {}",
                self.effective_uid,
                yes(self.has("CAP_BPF")),
                yes(self.has("CAP_PERFMON")),
                yes(self.has("CAP_SYS_ADMIN"))
            ),
            "run it as root, or with CAP_BPF and CAP_PERFMON",
        );
        say(
            "may see and signal every process",
            or(["CAP_KILL", "CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH"].iter().all(|c| self.has(c)), Grade::Off),
            format!(
                "CAP_KILL {}, CAP_SYS_PTRACE {}, CAP_DAC_READ_SEARCH {}",
                yes(self.has("CAP_KILL")),
                yes(self.has("CAP_SYS_PTRACE")),
                yes(self.has("CAP_DAC_READ_SEARCH"))
            ),
            "kills and causes are limited to what this user may touch",
        );
        say(
            "pid namespace",
            or(self.initial_pid_namespace, Grade::Fatal),
            if self.initial_pid_namespace { "the initial one".into() } else { "not the initial one".into() },
            "the probes give global pids: run it on the host, or with hostPID: true",
        );
        say("time namespace", Grade::Ok, format!("adds {} ns to boot time", self.time_offset_ns), "");
        say(
            "bpffs",
            or(self.bpffs.is_some(), Grade::Off),
            self.bpffs.as_ref().map_or("not mounted".into(), |p| format!("mounted at {}", p.display())),
            "the agent mounts it when it pins: mount -t bpf bpf /sys/fs/bpf",
        );
        say(
            "cgroups",
            or(self.cgroup2.is_some() && self.cgroup_kill, Grade::Off),
            format!(
                "v2 {}, cgroup.kill {}, v1 {}",
                self.cgroup2.as_ref().map_or("not mounted".into(), |p| format!("at {}", p.display())),
                yes(self.cgroup_kill),
                yes(self.cgroup1)
            ),
            "`exec --cgroup` ends its job by lineage alone",
        );
        if let Some(mode) = &self.lockdown {
            say(
                "lockdown",
                or(mode != "confidentiality", Grade::Fatal),
                mode.clone(),
                "kernel lockdown in confidentiality mode forbids probes to read kernel memory",
            );
        }
        say(
            "bpf_jit",
            or(self.bpf_jit != Some(false), Grade::Off),
            (if self.bpf_jit == Some(false) { "off" } else { "on" }).to_owned(),
            "the probes are interpreted: several times slower",
        );
        say(
            "bpf_stats",
            Grade::Ok,
            if self.bpf_stats == Some(true) {
                "on: run times of probes are counted".into()
            } else {
                "off: sysctl kernel.bpf_stats_enabled=1 counts the probes' run times".to_owned()
            },
            "",
        );
        all
    }
}

fn yes(b: bool) -> &'static str {
    if b { "yes" } else { "no" }
}

/// The mode in brackets, if it is not `none`.
fn lockdown(text: &str) -> Option<String> {
    let mode = text.split('[').nth(1)?.split(']').next()?;
    (mode != "none").then(|| mode.to_owned())
}

/// Whether a folder is on a bpffs.
#[must_use]
pub fn is_bpffs(path: &Path) -> bool {
    // BPF_FS_MAGIC in include/uapi/linux/magic.h.
    rustix::fs::statfs(path).is_ok_and(|s| s.f_type as u64 == 0xcafe_4a11)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_mounts() {
        assert_eq!(version("5.10.0-32-cloud-amd64"), Some((5, 10)));
        assert_eq!(version("6.18.44-fc"), Some((6, 18)));
        assert_eq!(version("7.3"), Some((7, 3)));
        assert_eq!(version("x"), None);
        let text = "bpf /sys/fs/bpf bpf rw 0 0\ncgroup2 /a\\040b cgroup2 rw 0 0\nbpf";
        assert_eq!(mounts(text, "bpf"), [PathBuf::from("/sys/fs/bpf")]);
        assert_eq!(mounts(text, "cgroup2"), [PathBuf::from("/a b")]);
        assert_eq!(lockdown("none [integrity] confidentiality"), Some("integrity".into()));
        assert_eq!(lockdown("[none] integrity"), None);
    }

    #[test]
    fn this_host() {
        let offer = HostFeatures::read();
        assert!(offer.version.is_some());
        let all = offer.findings();
        assert_eq!(all.iter().filter(|f| f.what == "attach point").count(), offer.attach_points.len());
        assert!(all.iter().all(|f| (f.grade == Grade::Ok) == f.then.is_empty()), "{all:?}");
    }

    #[test]
    fn an_old_kernel_without_types_is_refused() {
        let mut offer = HostFeatures::read();
        offer.version = Some((5, 4));
        offer.btf = Err("not found".into());
        let fatal: Vec<&str> =
            offer.findings().into_iter().filter(|f| f.grade == Grade::Fatal).map(|f| f.what).collect();
        assert!(fatal.starts_with(&["kernel", "kernel types (BTF)"]), "{fatal:?}");
    }
}
