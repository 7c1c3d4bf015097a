//! Maps and frozen globals of the probes; one file below for each thing that is watched.
//!
//! Nothing here reads a clock other than boot time, and only `update_lineage` and the fork probe write into an entry that they
//! did not make. Helpers, map types and program types are those of Linux 5.10; what is newer is behind a
//! frozen [`Features`] switch.

mod doom;
mod exec;
mod iter;
mod job_bitmap;
mod lifecycle;
mod ring;
mod signal;
mod sparing;
mod task;
mod trace;
mod update_lineage;

use aya_ebpf::btf_maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf};
use aya_ebpf::macros::btf_map;
use monitor_abi::{
    Control, Counter, Features, INODES_MAX, Job, KINDS, KillCounter, Lineage, MEMBERS_BLOCK, Offsets, ProcKey,
};

/// Records for the agent. The loader sets the size.
#[btf_map]
static EVENTS: RingBuf<[u8; 0], { 1 << 22 }> = RingBuf::new();
/// By kind.
#[btf_map]
static COUNTERS: PerCpuArray<Counter, KINDS> = PerCpuArray::new();
#[btf_map]
static KILLS: PerCpuArray<KillCounter, 1> = PerCpuArray::new();
/// Processes that are not freed yet. The loader sets the size.
#[btf_map]
static LINEAGE: HashMap<ProcKey, Lineage, 65536> = HashMap::new();
/// Freed processes that have forked, so that a chain of lineage can be followed through them. The loader sets the size.
#[btf_map]
static DEAD: LruHashMap<ProcKey, Lineage, 32768> = LruHashMap::new();
/// A byte for each pid: not 0 = its entry in `LINEAGE` may have a job. The loader sets the size.
#[btf_map]
static MEMBERS: Array<[u8; MEMBERS_BLOCK], 512> = Array::new();
/// Written by the agent only.
#[btf_map]
static JOBS: HashMap<u64, Job, 8192> = HashMap::new();
#[btf_map]
static CONTROL: Array<Control, 1> = Array::new();
/// The inodes that the run of `iter/task_file` under way looks for.
#[btf_map]
static INODES: HashMap<u64, u32, { INODES_MAX as usize }> = HashMap::new();

/// Set by the loader from the running kernel's BTF, then frozen.
#[unsafe(no_mangle)]
static OFFSETS: Offsets = Offsets {
    task_pid: 0,
    task_tgid: 0,
    task_group_leader: 0,
    task_real_parent: 0,
    task_children: 0,
    task_sibling: 0,
    task_start_boottime: 0,
    task_flags: 0,
    task_state: 0,
    task_exit_state: 0,
    task_exit_code: 0,
    task_signal: 0,
    task_cred: 0,
    task_mm: 0,
    task_comm: 0,
    signal_live: 0,
    signal_flags: 0,
    signal_group_exit_code: 0,
    signal_subreaper: 0,
    signal_subreaper_mask: 0,
    cred_uid: 0,
    mm_arg_start: 0,
    mm_arg_end: 0,
    bprm_filename: 0,
    siginfo_code: 0,
    file_inode: 0,
    file_mode: 0,
    inode_ino: 0,
    inode_sb: 0,
    sb_dev: 0,
};
/// Set by the loader, then frozen.
#[unsafe(no_mangle)]
static FEATURES: Features = Features { exit_group_dead: 0, preempted: 0 };

/// A field of a frozen global. Each is read by itself: a copy of the whole would go over the stack, where older
/// verifiers forget that a value is constant. Volatile, because the loader has other values than the compiler.
#[inline(always)]
fn read_frozen(field: &'static u32) -> u32 {
    // SAFETY: a reference to an initialised static.
    unsafe { core::ptr::from_ref(field).read_volatile() }
}
macro_rules! frozen {
    ($global:ident . $field:ident) => {
        $crate::programs::read_frozen(&$crate::programs::$global.$field)
    };
}
use frozen;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

// bpf_send_signal, bpf_probe_read_kernel and tracing programs want a GPL-compatible licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
