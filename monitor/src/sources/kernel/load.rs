//! From the probe object to loaded programs and maps, by aya. What comes out are plain descriptors, the same as those
//! that are opened from pins.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::thread::ScopedJoinHandle;

use aya::programs::{BtfTracePoint, Iter, Program, ProgramError, RawTracePoint};
use aya::{Btf, EbpfLoader, VerifierLogLevel};
use monitor_abi::{Features, MEMBERS_BLOCK, Offsets};
use sha2::{Digest as _, Sha256};

use super::Options;
use super::error::{KernelError, last_lines};
use super::offsets::{Kind, Layout, PROBES, Probe};
use super::sys;

/// The compiled probes, kept in the repository (`cargo xtask ebpf` rebuilds them).
pub(super) static OBJECT: &[u8] = aya::include_bytes_aligned!("../../../probes/probes.o");

/// The probe object's name in metrics, `status` and `--version`: the first 12 hex digits of its SHA-256.
#[must_use]
pub fn object_hash() -> &'static str {
    static HASH: LazyLock<String> = LazyLock::new(|| {
        let digest = Sha256::digest(OBJECT);
        digest[..6].iter().map(|b| format!("{b:02x}")).collect()
    });
    &HASH
}

/// The maps, in the order of [`MAPS`].
pub(super) const MAPS: &[&str] =
    &["EVENTS", "COUNTERS", "KILLS", "LINEAGE", "DEAD", "MEMBERS", "JOBS", "CONTROL", "INODES"];

#[repr(transparent)]
#[derive(Clone, Copy)]
struct Global<T>(T);
// SAFETY: only integers of one width, so no padding.
unsafe impl aya::Pod for Global<Offsets> {}
// SAFETY: as above.
unsafe impl aya::Pod for Global<Features> {}

/// Everything that was loaded. Nothing is attached yet.
pub(super) struct Loaded {
    pub(super) maps: Vec<(&'static str, OwnedFd)>,
    pub(super) programs: Vec<(&'static str, OwnedFd)>,
    /// Programs that were left out, and why.
    pub(super) off: Vec<(&'static str, String)>,
}

/// Most entries of the lineage map, if the kernel could ever have more processes than that.
const LINEAGE_MAX: u32 = 65_536;
const DEAD_MAX: u32 = 32_768;

/// The lineage map's capacity: as many processes as there can be, within a bound.
fn lineage_entries() -> u32 {
    limit("pid_max").min(limit("threads-max")).clamp(1024, LINEAGE_MAX)
}

fn limit(name: &str) -> u32 {
    let told = super::features::number(&format!("/proc/sys/kernel/{name}"));
    told.and_then(|n| n.try_into().ok()).unwrap_or(u32::MAX)
}

/// `PID_MAX_LIMIT` in `include/linux/threads.h`.
const PID_MAX: u32 = 1 << 22;

/// A byte for each pid that there can be.
fn members_entries() -> u32 {
    limit("pid_max").min(PID_MAX) / MEMBERS_BLOCK as u32 + 1
}

/// Capacities: bytes of the ring, entries of the lineage map and of that of the dead.
pub(super) fn sizes(options: &Options) -> [u32; 3] {
    let lineage = options.lineage_entries.unwrap_or_else(lineage_entries);
    [options.ring_bytes, lineage, options.dead_entries.unwrap_or(DEAD_MAX)]
}

/// Before 5.11 map memory counts against this limit. It may not be ours to raise; then the load says so. Later it is
/// left alone, since children inherit it.
fn raise_memory_limit() {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    if super::features::version(&release).is_some_and(|v| v < (5, 11)) {
        let _ = rustix::process::setrlimit(
            rustix::process::Resource::Memlock,
            rustix::process::Rlimit { current: None, maximum: None },
        );
    }
}

/// Loads the object into the kernel.
pub(super) fn load(options: &Options, layout: &Layout, sizes: [u32; 3]) -> Result<Loaded, KernelError> {
    raise_memory_limit();
    let [ring, lineage, dead] = sizes;
    let (offsets, features) = (Global(layout.offsets), Global(layout.features));
    // Reading all of the kernel's types and verifying the larger programs take most of a start: beside each other.
    let (btf, ebpf) = beside(Btf::from_sys_fs, || {
        EbpfLoader::new()
            .override_global("OFFSETS", &offsets, true)
            .override_global("FEATURES", &features, true)
            .map_max_entries("EVENTS", ring)
            .map_max_entries("LINEAGE", lineage)
            .map_max_entries("DEAD", dead)
            .map_max_entries("MEMBERS", members_entries())
            .verifier_log_level(VerifierLogLevel::VERBOSE | VerifierLogLevel::STATS)
            .load(OBJECT)
    });
    let mut ebpf = ebpf.map_err(object_error)?;
    let btf = btf.map_err(|e| KernelError::Object(e.to_string()))?;
    let mut loaded = Loaded { maps: Vec::new(), programs: Vec::new(), off: Vec::new() };
    let mut wanted = Vec::new();
    for probe in PROBES {
        // Writers of lines are loaded only to be read: they are the largest programs by far.
        if probe.is_tracer() && !options.trace || !probe.is_of_use() {
            continue;
        }
        match layout.lacks(probe) {
            Some(field) => loaded.off.push((probe.name, format!("this kernel has no field {field}"))),
            None => wanted.push(probe),
        }
    }
    let mut programs: HashMap<&str, &mut Program> = ebpf.programs_mut().collect();
    let each = wanted.into_iter().map(|probe| (probe, programs.remove(probe.name))).collect();
    let outcomes = load_programs(each, &btf);
    for (probe, outcome) in outcomes {
        match outcome {
            Ok(fd) => loaded.programs.push((probe.name, fd)),
            Err(e) if probe.essential => return Err(e),
            Err(e) => loaded.off.push((probe.name, e.to_string())),
        }
    }
    for name in MAPS {
        let map = ebpf.map(name).ok_or_else(|| {
            KernelError::Object(format!("it has no map {name}; rebuild it: cargo xtask ebpf"))
        })?;
        loaded.maps.push((name, map_fd(map).map_err(KernelError::io(format!("keep the map {name}")))?));
    }
    Ok(loaded)
}

fn map_fd(map: &aya::maps::Map) -> io::Result<OwnedFd> {
    use aya::maps::Map;
    match map {
        Map::RingBuf(m) | Map::PerCpuArray(m) | Map::HashMap(m) | Map::LruHashMap(m) | Map::Array(m) => {
            sys::dup(m.fd().as_fd())
        }
        _ => Err(io::Error::other("not of the type that the agent expects")),
    }
}

fn object_error(e: aya::EbpfError) -> KernelError {
    if let aya::EbpfError::MapError(aya::maps::MapError::CreateError { name, io_error, .. }) = e {
        return KernelError::io(format!("create the map {name}"))(io_error);
    }
    KernelError::Object(e.to_string())
}

/// Both, the first one in a thread of its own; after each other where no thread can be made (a limit of processes).
fn beside<A: Send, B>(other: impl Fn() -> A + Sync, own: impl FnOnce() -> B) -> (A, B) {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, &other).ok();
        let own = own();
        (thread.map_or_else(&other, joined), own)
    })
}

type Outcome = Result<OwnedFd, KernelError>;

/// Each in a thread of its own, as far as threads can be made.
fn load_programs<'a>(each: Vec<(&'a Probe, Option<&mut Program>)>, btf: &Btf) -> Vec<(&'a Probe, Outcome)> {
    let each: Vec<_> = each.into_iter().map(|(probe, program)| (probe, Mutex::new(program))).collect();
    let load = |i: usize| {
        let (probe, program) = &each[i];
        let mut program = program.lock().unwrap_or_else(PoisonError::into_inner);
        load_program(program.as_deref_mut(), probe, btf)
    };
    let load = &load;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..each.len())
            .map(|i| std::thread::Builder::new().spawn_scoped(scope, move || load(i)).ok())
            .collect();
        let outcomes = threads.into_iter().enumerate().map(|(i, t)| t.map_or_else(|| load(i), joined));
        each.iter().map(|(probe, _)| *probe).zip(outcomes).collect()
    })
}

/// What a thread gives; its panic goes on here.
fn joined<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn load_program(program: Option<&mut Program>, probe: &Probe, btf: &Btf) -> Outcome {
    let program = program.ok_or_else(|| {
        KernelError::Object(format!("it has no program {}; rebuild it: cargo xtask ebpf", probe.name))
    })?;
    let refused = |e| load_error(probe.name, e);
    match probe.kind {
        Kind::Tracepoint(tp) => {
            let p: &mut BtfTracePoint = program.try_into().map_err(refused)?;
            p.load(tp, btf).map_err(refused)?;
        }
        Kind::Iterator(iter) => {
            let p: &mut Iter = program.try_into().map_err(refused)?;
            p.load(iter, btf).map_err(refused)?;
        }
        Kind::ByHand => {
            let p: &mut RawTracePoint = program.try_into().map_err(refused)?;
            p.load().map_err(refused)?;
        }
    }
    let fd = program.fd().map_err(refused)?;
    sys::dup(fd.as_fd()).map_err(KernelError::io(format!("keep the program {}", probe.name)))
}

fn load_error(program: &'static str, e: ProgramError) -> KernelError {
    match e {
        // EPERM comes with no log when the caller may not, and with one when the verifier may not.
        ProgramError::LoadError { io_error, verifier_log }
            if io_error.raw_os_error() == Some(libc::EPERM) && verifier_log.to_string().is_empty() =>
        {
            KernelError::Permission { what: format!("load the program {program}"), source: io_error }
        }
        ProgramError::LoadError { io_error, verifier_log } => KernelError::Load {
            program,
            reason: io_error.to_string(),
            log: last_lines(&verifier_log.to_string()),
        },
        e => KernelError::Load { program, reason: e.to_string(), log: String::new() },
    }
}
