//! What can fail at the kernel's side: what was tried, on what, and what to do.

use std::io;
use std::path::PathBuf;

use super::btf::BtfError;

/// Why the probes are not there.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error(
        "cannot read the kernel's types at /sys/kernel/btf/vmlinux: {0}; a kernel with CONFIG_DEBUG_INFO_BTF is needed"
    )]
    NoBtf(#[source] io::Error),
    #[error("cannot understand the kernel's types at /sys/kernel/btf/vmlinux: {0}")]
    Btf(#[source] BtfError),
    #[error("this kernel is {found}: Linux {}.{} or later is needed", oldest.0, oldest.1)]
    TooOld { found: String, oldest: (u32, u32) },
    #[error("this kernel has no field {0}: it is not supported (Linux 5.10 or later is needed)")]
    NoField(&'static str),
    #[error(
        "this process is not in the initial pid namespace ({found}): the probes give global pids; run it on the host, or with hostPID"
    )]
    PidNamespace { found: String },
    #[error(
        "no permission to {what}: {source}; CAP_BPF, CAP_PERFMON and CAP_SYS_RESOURCE are needed (before 5.8: CAP_SYS_ADMIN), most simply root; in a container also a seccomp profile that allows bpf()"
    )]
    Permission { what: String, source: io::Error },
    #[error("cannot read the probe object: {0}")]
    Object(String),
    #[error("the kernel refused the program {program}: {reason}{log}")]
    Load { program: &'static str, reason: String, log: String },
    #[error("cannot attach the program {program} to {to}: {source}")]
    Attach { program: &'static str, to: &'static str, source: io::Error },
    #[error("cannot {what}: {source}")]
    Io { what: String, source: io::Error },
    #[error("{path}: {what}; `jobwarden unpin` removes all pins")]
    Pin { path: PathBuf, what: String },
    #[error("{path} is held by another jobwarden agent")]
    Locked { path: PathBuf },
}

impl KernelError {
    pub(super) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::Permission { what, source },
            _ => Self::Io { what, source },
        }
    }
}

/// The last lines of a verifier's log, on lines of their own; empty if there is none.
pub(super) fn last_lines(log: &str) -> String {
    const LINES: usize = 12;
    let all: Vec<&str> = log.lines().filter(|l| !l.trim().is_empty()).collect();
    let from = all.len().saturating_sub(LINES);
    all[from..].iter().fold(String::new(), |s, l| s + "\n    " + l)
}
