//! What the agent may still do once it runs: a named list of capabilities, each with its reason, and nothing else. Given up
//! for good, before the first other thread is there (capabilities belong to threads). Decides and acts; knows of no probe.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

/// A capability, by the name that systemd and Kubernetes give it (with and without `CAP_`), and what it is for.
pub type Named = (CapabilitySet, &'static str, &'static str);

/// Kept on every kernel.
pub const KEPT: [Named; 3] = [
    (
        CapabilitySet::SYS_PTRACE,
        "SYS_PTRACE",
        "/proc/PID/{fd,exe,syscall,ns} of others, Python frames: every `why`",
    ),
    (
        CapabilitySet::DAC_READ_SEARCH,
        "DAC_READ_SEARCH",
        "folders that others closed: runtimes' records, secrets of receivers, Python's files",
    ),
    (CapabilitySet::KILL, "KILL", "ending jobs of other users"),
];

/// Kept only where this kernel asks for it after the load: 5.10 does at each call of bpf(), where
/// kernel.unprivileged_bpf_disabled is set, and 6.1 no longer. Found out by trying.
pub const WHERE_ASKED: [Named; 1] =
    [(CapabilitySet::BPF, "BPF", "reading and writing the maps, attaching the probe that ends doomed jobs")];

/// Kept only where a folder that the agent writes to is not its own user's: root's, since others are refused.
const OVERRIDE: Named = (
    CapabilitySet::DAC_OVERRIDE,
    "DAC_OVERRIDE",
    "writing to folders of root where the agent is not root: state, socket",
);

/// Needed to start, and given up then, beside [`WHERE_ASKED`].
pub const TO_START: [Named; 5] = [
    (CapabilitySet::PERFMON, "PERFMON", "loading the probes: they read the kernel's memory"),
    (CapabilitySet::CHOWN, "CHOWN", "giving the control socket to `socket_group`"),
    (
        CapabilitySet::SYS_RESOURCE,
        "SYS_RESOURCE",
        "memory for maps on kernels before 5.11, where LimitMEMLOCK does not give it",
    ),
    (
        CapabilitySet::SYS_NICE,
        "SYS_NICE",
        "the scheduler's preference, so that a fork bomb cannot hold its own end up",
    ),
    (CapabilitySet::SETPCAP, "SETPCAP", "taking the rest out of the bounding set"),
];

/// What is left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    pub kept: Vec<&'static str>,
    /// The rest is out of the bounding set too. Without CAP_SETPCAP it cannot be; `no_new_privs` does the same then.
    pub bounding: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    #[error("capabilities cannot be given up: {0} threads run already")]
    Threads(usize),
    #[error("{doing}: {source}")]
    Refused { doing: &'static str, source: io::Error },
}

fn refused(doing: &'static str) -> impl Fn(rustix::io::Errno) -> PrivilegeError {
    move |e| PrivilegeError::Refused { doing, source: e.into() }
}

/// Which of [`WHERE_ASKED`] it is without which `rehearse` fails on this kernel. Tried with the effective set of this thread,
/// which is whole again afterwards.
pub fn asked_for(rehearse: &dyn Fn() -> io::Result<()>) -> Result<CapabilitySet, PrivilegeError> {
    let all = capabilities(None).map_err(refused("capget"))?;
    let base = KEPT.iter().fold(CapabilitySet::empty(), |s, k| s | k.0);
    let effective = base & all.permitted;
    set_capabilities(None, CapabilitySets { effective, ..all }).map_err(refused("capset"))?;
    let free = rehearse().is_ok();
    set_capabilities(None, all).map_err(refused("capset"))?;
    let asked = WHERE_ASKED.iter().fold(CapabilitySet::empty(), |s, k| s | k.0);
    Ok(if free { CapabilitySet::empty() } else { asked })
}

/// Gives up all that is not kept. `written`: folders that the agent goes on writing to.
pub fn drop_capabilities(
    rehearse: &dyn Fn() -> io::Result<()>,
    written: &[&Path],
) -> Result<Left, PrivilegeError> {
    let threads = std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count);
    if threads != 1 {
        return Err(PrivilegeError::Threads(threads));
    }
    let have = capabilities(None).map_err(refused("capget"))?.permitted;
    let asked = asked_for(rehearse)?;
    let mut keep = KEPT.iter().fold(asked, |s, k| s | k.0);
    let uid = rustix::process::geteuid().as_raw();
    if written.iter().any(|d| std::fs::metadata(d).is_ok_and(|m| m.uid() != uid)) {
        keep |= OVERRIDE.0;
    }
    let keep = keep & have;
    let bounding = have.contains(CapabilitySet::SETPCAP);
    if bounding {
        for bit in 0..u64::BITS {
            let one = CapabilitySet::from_bits_retain(1 << bit);
            // EINVAL: this kernel has no such capability, nor a later one.
            let Ok(there) = capability_is_in_bounding_set(one) else { break };
            if there && !keep.contains(one) {
                remove_capability_from_bounding_set(one).map_err(refused("drop from the bounding set"))?;
            }
        }
    }
    // EINVAL: a kernel without ambient capabilities has none to clear.
    let _ = clear_ambient_capability_set();
    let sets = CapabilitySets { effective: keep, permitted: keep, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).map_err(refused("capset"))?;
    set_no_new_privs(true).map_err(refused("no_new_privs"))?;
    Ok(Left { kept: names(keep), bounding })
}

/// Of those that are named here.
#[must_use]
pub fn names(of: CapabilitySet) -> Vec<&'static str> {
    KEPT.iter().chain(&WHERE_ASKED).chain([&OVERRIDE]).filter(|k| of.contains(k.0)).map(|k| k.1).collect()
}

/// For a forked child that is about to become a receiver's program: no capability, and no way to one, root or not; and
/// no part in the agent's own preference by the scheduler.
/// System calls only, so it may run between fork and exec.
pub fn none() -> io::Result<()> {
    // Also where the agent has not given up its own: exec as uid 0 would give back the bounding set.
    set_no_new_privs(true)?;
    let _ = clear_ambient_capability_set();
    if rustix::process::getpriority_process(None)? < 0 {
        rustix::process::setpriority_process(None, 0)?;
    }
    let empty = CapabilitySet::empty();
    Ok(set_capabilities(None, CapabilitySets { effective: empty, permitted: empty, inheritable: empty })?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::process::CommandExt as _;
    use std::process::{Command, Stdio};

    use super::*;

    /// Runs in a thread of its own, with or without one capability: what it loses stays lost there alone.
    fn with_and_without(what: CapabilitySet, may: impl Fn() -> bool + Send + Sync) -> (bool, bool) {
        std::thread::scope(|s| {
            s.spawn(|| {
                let all = capabilities(None).unwrap();
                // Only what the agent keeps: another one (DAC_OVERRIDE) would do as well.
                let kept = KEPT.iter().fold(CapabilitySet::empty(), |s, k| s | k.0);
                let try_with = |effective| {
                    set_capabilities(None, CapabilitySets { effective, ..all }).unwrap();
                    may()
                };
                (try_with(kept), try_with(kept - what))
            })
            .join()
            .unwrap()
        })
    }

    fn root(test: &str) -> bool {
        let is = rustix::process::geteuid().is_root();
        if !is {
            crate::testing::skipped(test, "needs root");
        }
        is
    }

    #[test]
    fn each_one_that_is_kept_is_needed() {
        if !root("each_one_that_is_kept_is_needed") {
            return;
        }
        let mut other = Command::new("sleep").arg("60").uid(65534).gid(65534).spawn().unwrap();
        let (pid, raw) = (rustix::process::Pid::from_child(&other), other.id());
        // Until it has execed it is this program.
        while std::fs::read(format!("/proc/{raw}/comm")).is_ok_and(|c| c != b"sleep\n") {
            std::thread::yield_now();
        }
        let read = || std::fs::read_link(format!("/proc/{raw}/fd/0")).is_ok();
        assert_eq!(with_and_without(CapabilitySet::SYS_PTRACE, read), (true, false));
        let signal = || rustix::process::test_kill_process(pid).is_ok();
        assert_eq!(with_and_without(CapabilitySet::KILL, signal), (true, false));
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::chown(dir.path(), Some(65534), Some(65534)).unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        let look = || std::fs::read_dir(dir.path()).is_ok();
        assert_eq!(with_and_without(CapabilitySet::DAC_READ_SEARCH, look), (true, false));
        other.kill().unwrap();
        other.wait().unwrap();
    }

    #[test]
    fn what_a_kernel_asks_for_is_found_out_and_the_set_is_whole_again() {
        if !root("what_a_kernel_asks_for_is_found_out_and_the_set_is_whole_again") {
            return;
        }
        std::thread::spawn(|| {
            let before = capabilities(None).unwrap();
            let needs = |what: CapabilitySet| {
                move || {
                    let has = capabilities(None)?.effective.contains(what);
                    if has { Ok(()) } else { Err(io::Error::from(io::ErrorKind::PermissionDenied)) }
                }
            };
            let bpf = CapabilitySet::BPF;
            assert_eq!(asked_for(&needs(CapabilitySet::empty())).unwrap(), CapabilitySet::empty());
            assert_eq!(asked_for(&needs(bpf)).unwrap(), bpf);
            assert_eq!(capabilities(None).unwrap(), before);
        })
        .join()
        .unwrap();
        // Other threads would keep theirs.
        assert!(matches!(drop_capabilities(&|| Ok(()), &[]), Err(PrivilegeError::Threads(2..))));
    }

    #[test]
    fn a_program_gets_none() {
        let mut c = Command::new("cat");
        c.args(["/proc/self/status", "/proc/self/stat"]).stdout(Stdio::piped());
        // SAFETY: system calls only.
        let out = unsafe {
            c.pre_exec(|| {
                // Without the capability there is no preference to lose.
                let _ = crate::enforce::preferred();
                none()
            })
        }
        .output()
        .unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        // The fields behind the name, state (3) first: nice is the 19th.
        let stat = text.lines().last().and_then(|l| l.rsplit_once(") ")).unwrap().1;
        assert!(stat.split(' ').nth(16).unwrap().parse::<i32>().unwrap() >= 0, "{stat}");
        let field = |name: &str| text.lines().find_map(|l| l.strip_prefix(name)).unwrap().trim().to_owned();
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
            assert_eq!(u64::from_str_radix(&field(set), 16).unwrap(), 0, "{set}");
        }
        assert_eq!(field("NoNewPrivs:"), "1");
    }
}
