//! Which fields of the kernel the probes read, where they are in this kernel, and which probe needs which.

use std::path::Path;

use monitor_abi::{ABSENT, Features, Offsets};

use super::btf::Btf;
use super::error::KernelError;

/// Where the running kernel tells its own types.
pub(super) const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

/// A field: its name in [`Offsets`], and its path, with what older kernels call it.
struct Field {
    paths: &'static [&'static str],
    at: fn(&mut Offsets) -> &mut u32,
}

macro_rules! fields {
    ($($name:ident = $($path:literal)|+;)*) => {
        const FIELDS: &[Field] = &[$(Field { paths: &[$($path),+], at: |o| &mut o.$name }),*];
    };
}

fields! {
    task_pid = "task_struct.pid";
    task_tgid = "task_struct.tgid";
    task_group_leader = "task_struct.group_leader";
    task_real_parent = "task_struct.real_parent";
    task_children = "task_struct.children";
    task_sibling = "task_struct.sibling";
    task_start_boottime = "task_struct.start_boottime";
    task_flags = "task_struct.flags";
    task_state = "task_struct.__state" | "task_struct.state"; // renamed in 5.14
    task_exit_state = "task_struct.exit_state";
    task_exit_code = "task_struct.exit_code";
    task_signal = "task_struct.signal";
    task_cred = "task_struct.cred";
    task_mm = "task_struct.mm";
    task_comm = "task_struct.comm";
    signal_live = "signal_struct.live";
    signal_flags = "signal_struct.flags";
    signal_group_exit_code = "signal_struct.group_exit_code";
    cred_uid = "cred.uid";
    mm_arg_start = "mm_struct.arg_start";
    mm_arg_end = "mm_struct.arg_end";
    bprm_filename = "linux_binprm.filename";
    siginfo_code = "kernel_siginfo.si_code";
    file_inode = "file.f_inode";
    file_mode = "file.f_mode";
    inode_ino = "inode.i_ino";
    inode_sb = "inode.i_sb";
    sb_dev = "super_block.s_dev";
}

/// A bit field. Without it anybody may be one who adopts: who forked those that ran before the probes is not inferred then.
pub(super) const SUBREAPER: &str = "signal_struct.is_child_subreaper";

/// What this kernel's types say: offsets, features, and what is missing.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    pub(super) offsets: Offsets,
    pub(super) features: Features,
    /// Fields that this kernel does not have, by their newest path.
    pub(super) missing: Vec<&'static str>,
}

impl Layout {
    pub(super) fn of(btf: &Btf<'_>) -> Self {
        let mut offsets = Offsets::default();
        let mut missing = Vec::new();
        for f in FIELDS {
            *(f.at)(&mut offsets) = btf.offset_of_any(f.paths).unwrap_or_else(|_| {
                missing.push(f.paths[0]);
                ABSENT
            });
        }
        (offsets.signal_subreaper, offsets.signal_subreaper_mask) = btf.bit(SUBREAPER).unwrap_or_else(|_| {
            missing.push(SUBREAPER);
            (0, 0)
        });
        let features = Features {
            exit_group_dead: u32::from(btf.tracepoint_args("sched_process_exit").is_some_and(|n| n > 1)),
            preempted: preempts_programs().into(),
        };
        Self { offsets, features, missing }
    }
}

/// How a program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// To a tracepoint, by its BTF-typed arguments.
    Tracepoint(&'static str),
    /// Run when its file is read.
    Iterator(&'static str),
    /// Run by hand.
    ByHand,
}

/// A program of the probe object.
pub(super) struct Probe {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    /// Without it there is no jobwarden.
    pub(super) essential: bool,
    /// Attached only while it is needed.
    pub(super) on_demand: bool,
    /// The one whose work this does for whom it passed over. Only where the kernel preempts programs, and skips what is in the
    /// middle of being run on the same CPU.
    pub(super) behind: Option<&'static str>,
    /// Fields whose absence switches it off.
    pub(super) needs: &'static [&'static str],
}

impl Probe {
    pub(super) fn is_tracer(&self) -> bool {
        self.name.starts_with("trace_")
    }

    /// Whether this kernel has a use for it.
    pub(super) fn is_of_use(&self) -> bool {
        self.behind.is_none() || preempts_programs()
    }
}

const fn probe(name: &'static str, kind: Kind) -> Probe {
    Probe { name, kind, essential: true, on_demand: false, behind: None, needs: &[] }
}

const fn again(name: &'static str, behind: &'static str, tracepoint: &'static str) -> Probe {
    Probe { behind: Some(behind), ..probe(name, Kind::Tracepoint(tracepoint)) }
}

/// A program that only writes lines, while somebody reads them.
const fn tracer(name: &'static str, tracepoint: &'static str) -> Probe {
    Probe { essential: false, on_demand: true, ..probe(name, Kind::Tracepoint(tracepoint)) }
}

/// Tracepoints run without disabling preemption since Linux 7.0 (one before is taken too: a skipped fork costs more than a look),
/// and on real-time kernels.
fn preempts_programs() -> bool {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let recent = super::features::version(&release).is_none_or(|v| v >= (6, 19));
    recent || std::fs::read("/sys/kernel/realtime").is_ok_and(|b| b.starts_with(b"1"))
}

pub(super) const FORK: &str = "fork";
pub(super) const EXEC: &str = "exec";
pub(super) const EXIT: &str = "exit";
pub(super) const FREE: &str = "free";
pub(super) const TASKS: &str = "tasks";
pub(super) const FILES: &str = "files";
pub(super) const SYS_ENTER: &str = "sys_enter";
pub(super) const UPDATE_LINEAGE: &str = "update_lineage";

/// All programs. Fork comes first, so that no process can be seen to exit whose fork was not.
pub(super) const PROBES: &[Probe] = &[
    probe(FORK, Kind::Tracepoint("sched_process_fork")),
    again("fork_again", FORK, "sched_process_fork"),
    probe(EXEC, Kind::Tracepoint("sched_process_exec")),
    again("exec_again", EXEC, "sched_process_exec"),
    probe(EXIT, Kind::Tracepoint("sched_process_exit")),
    again("exit_again", EXIT, "sched_process_exit"),
    probe(FREE, Kind::Tracepoint("sched_process_free")),
    again("free_again", FREE, "sched_process_free"),
    Probe {
        essential: false,
        needs: &["kernel_siginfo.si_code"],
        ..probe("signal", Kind::Tracepoint("signal_generate"))
    },
    Probe { essential: false, on_demand: true, ..probe(SYS_ENTER, Kind::Tracepoint("sys_enter")) },
    probe(TASKS, Kind::Iterator("task")),
    Probe {
        essential: false,
        needs: &["file.f_inode", "file.f_mode", "inode.i_ino", "inode.i_sb", "super_block.s_dev"],
        ..probe(FILES, Kind::Iterator("task_file"))
    },
    probe(UPDATE_LINEAGE, Kind::ByHand),
    tracer("trace_fork", "sched_process_fork"),
    tracer("trace_exec", "sched_process_exec"),
    tracer("trace_exit", "sched_process_exit"),
    tracer("trace_free", "sched_process_free"),
];

/// Fields that can be done without, or only a probe needs that can.
pub(super) fn optional(field: &str) -> bool {
    field == SUBREAPER || PROBES.iter().any(|p| !p.essential && p.needs.contains(&field))
}

impl Layout {
    /// Reads the running kernel's BTF; an error if an essential field is not there.
    pub(super) fn read() -> Result<Self, KernelError> {
        let bytes = std::fs::read(Path::new(VMLINUX)).map_err(KernelError::NoBtf)?;
        let layout = Self::of(&Btf::parse(&bytes).map_err(KernelError::Btf)?);
        match layout.missing.iter().find(|f| !optional(f)) {
            Some(field) => Err(KernelError::NoField(field)),
            None => Ok(layout),
        }
    }

    /// The first field that this program needs and the kernel lacks.
    pub(super) fn lacks(&self, probe: &Probe) -> Option<&'static str> {
        probe.needs.iter().copied().find(|f| self.missing.contains(f))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_kernel_has_every_field() {
        let Ok(bytes) = std::fs::read(VMLINUX) else {
            crate::testing::skipped("running_kernel_has_every_field", format_args!("no {VMLINUX}"));
            return;
        };
        let layout = Layout::of(&Btf::parse(&bytes).unwrap());
        assert_eq!(layout.missing, Vec::<&str>::new());
        let o = layout.offsets;
        // Fixed neighbours in every kernel: `pid_t pid; pid_t tgid;`.
        assert_eq!(o.task_pid + 4, o.task_tgid);
        assert_eq!(o.mm_arg_start + 8, o.mm_arg_end);
    }
}
