//! The probes, loaded and attached, and what comes out of them: the only place that knows aya and bpf(2).
//!
//! It decodes no record, keeps no forest and decides nothing. A [`Kernel`] is ready when [`Kernel::start`] returns; two
//! of them may run beside each other, each with maps and links of its own.

pub mod btf;
mod entry;
mod error;
mod features;
mod lineage;
mod load;
mod maps;
mod marks;
mod offsets;
mod pin;
mod pin_migration;
mod ring;
mod self_test;
mod snapshot;
mod stats;
mod sys;
mod trace;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use monitor_abi::{Control, FdRow};

pub use self::error::KernelError;
pub use self::features::{Finding, Grade, HostFeatures, bpffs, is_bpffs};
use self::lineage::Edit;
use self::load::Loaded;
pub use self::load::object_hash;
use self::maps::Maps;
use self::marks::Marks;
use self::offsets::{FILES, Kind, Layout, PROBES, SYS_ENTER};
pub use self::pin::unpin;
use self::pin::{Pins, Set};
pub use self::ring::Ring;
pub use self::snapshot::Taken;
pub use self::stats::{Fill, ProbeStat};
pub use self::trace::Tracer;

/// Bytes of the ring buffer: about 8,000 whole lives of processes.
pub const RING_BYTES: u32 = 4 << 20;
/// Jobs that the kernel's map holds at once.
pub const JOBS_MAX: usize = 8192;
/// Signals that are recorded: all but SIGCHLD, SIGCONT, SIGURG, SIGWINCH, SIGALRM, SIGVTALRM, SIGPROF, SIGIO and the
/// realtime ones, which programs send themselves all day.
pub const SIGNAL_MASK: u64 = 0x7fff_ffff
    & !(bit(libc::SIGCHLD)
        | bit(libc::SIGCONT)
        | bit(libc::SIGURG)
        | bit(libc::SIGWINCH)
        | bit(libc::SIGALRM)
        | bit(libc::SIGVTALRM)
        | bit(libc::SIGPROF)
        | bit(libc::SIGIO));

const fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// How to start.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where maps and links are pinned; None = they go when the process does.
    pub bpffs: Option<PathBuf>,
    /// A power of two, at least one page.
    pub ring_bytes: u32,
    /// Bit `n - 1`: signal `n` is recorded.
    pub signal_mask: u64,
    /// The probes log by aya-log.
    pub trace: bool,
    /// Capacity of the lineage map; None = as many processes as there can be, within a bound.
    pub lineage_entries: Option<u32>,
    /// Capacity of the map of the dead.
    pub dead_entries: Option<u32>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            bpffs: None,
            ring_bytes: RING_BYTES,
            signal_mask: SIGNAL_MASK,
            trace: false,
            lineage_entries: None,
            dead_entries: None,
        }
    }
}

/// The kernel side, running.
pub struct Kernel {
    maps: Maps,
    programs: BTreeMap<&'static str, OwnedFd>,
    /// Attached while these are open.
    links: BTreeMap<&'static str, OwnedFd>,
    /// Programs left out, and why.
    off: Vec<(&'static str, String)>,
    ring: Mutex<Option<ring::Records>>,
    gauge: ring::Gauge,
    /// The link of `sys_enter`, while a job is doomed.
    doom: Mutex<Option<OwnedFd>>,
    /// One edit of jobs, labels and marks at a time.
    editing: Mutex<Marks>,
    /// One run of `iter/task_file` at a time: they share the set of inodes.
    looking: Mutex<()>,
    /// Held for the agent's whole life.
    pins: Option<Pins>,
    pinned: bool,
    /// Whether this kernel's types tell who is a subreaper.
    knows_subreapers: bool,
    lineage_max: u32,
    dead_max: u32,
    ticks_per_second: u64,
    time_offset_ns: i64,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that is guarded here can be left half done by a panic.
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Kernel {
    /// Loads and attaches everything, or opens what an earlier agent pinned; records are written from here on. Minimum
    /// kernel: 5.10 with BTF.
    pub fn start(options: &Options) -> Result<Self, KernelError> {
        recent_enough(&rustix::system::uname().release().to_string_lossy())?;
        in_initial_pid_namespace()?;
        Self::of(options, &Layout::read()?)
    }

    fn of(options: &Options, layout: &Layout) -> Result<Self, KernelError> {
        let sizes = load::sizes(options);
        let pins = options.bpffs.as_deref();
        let pins = pins.map(|root| Pins::lock(root, options, layout, sizes)).transpose()?;
        let found = pins.as_ref().map(Pins::open).transpose()?.flatten();
        let pinned = found.is_some();
        let (mut set, off) = if let Some(set) = found {
            let off = left_out(&set, layout);
            (set, off)
        } else {
            let Loaded { maps, programs, off } = load::load(options, layout, sizes)?;
            (Set { maps, programs, links: Vec::new() }, off)
        };
        // Opened once more for the reader; the pins want every map.
        let events = set.maps.iter().find(|(n, _)| *n == "EVENTS").map(|(_, fd)| sys::dup(fd.as_fd()));
        let events = events.ok_or_else(|| KernelError::Object("it has no map EVENTS".into()))?;
        let events = events.map_err(KernelError::io("keep the map EVENTS"))?;
        let gauge = ring::Gauge::new(&events).map_err(KernelError::io("map the ring's positions"))?;
        let ring = ring::Records::open(events).map_err(KernelError::io("map the ring"))?;
        let maps = Maps::new(&set.maps)?;
        // Dooms of before are in force until they are taken away, and so is who is spared.
        let before =
            maps.control.get(&0).map_err(KernelError::io("read the control map"))?.unwrap_or_default();
        let control =
            Control { signal_mask: options.signal_mask, trace: options.trace.into(), labelling: 0, ..before };
        maps.control.put(&0, &control).map_err(KernelError::io("write the control map"))?;
        if !pinned {
            set.links = attach(&set.programs)?;
            if let Some(p) = &pins {
                p.keep(&set)?;
            }
        }
        let mut links: BTreeMap<_, _> = set.links.into_iter().collect();
        let doom = links.remove(SYS_ENTER);
        let lineage_max =
            stats::max_entries(&maps.lineage.fd).map_err(KernelError::io("ask for a map's size"))?;
        let dead_max = stats::max_entries(&maps.dead.fd).map_err(KernelError::io("ask for a map's size"))?;
        let me = Self {
            maps,
            programs: set.programs.into_iter().collect(),
            links,
            off,
            ring: Mutex::new(Some(ring)),
            gauge,
            doom: Mutex::new(doom),
            editing: Mutex::default(),
            looking: Mutex::new(()),
            pins,
            pinned,
            knows_subreapers: !layout.missing.contains(&offsets::SUBREAPER),
            lineage_max,
            dead_max,
            ticks_per_second: rustix::param::clock_ticks_per_second().max(1),
            time_offset_ns: time_namespace_offset(),
        };
        me.take_over_all()?;
        me.attach_while_doomed().map_err(KernelError::io("see to the dooms that were in force"))?;
        Ok(me)
    }

    /// Whether an earlier agent's pins were opened: records from before this start are in the ring.
    #[must_use]
    pub fn from_pins(&self) -> bool {
        self.pinned
    }

    /// The reader's end of the ring, once; within a tokio runtime.
    pub fn take_ring(&self) -> io::Result<Ring> {
        let ring =
            lock(&self.ring).take().ok_or_else(|| io::Error::other("the ring has a reader already"))?;
        Ring::new(ring)
    }

    /// Nanoseconds of boot time, as the records have them.
    #[must_use]
    pub fn now(&self) -> u64 {
        snapshot::boot_now(self.time_offset_ns)
    }

    fn ticks_to_ns(&self, ticks: u64) -> u64 {
        let ns = u128::from(ticks) * 1_000_000_000 / u128::from(self.ticks_per_second);
        (ns as u64).saturating_add_signed(-self.time_offset_ns)
    }

    /// As /proc/PID/stat shows a start.
    fn ns_to_ticks(&self, ns: u64) -> u64 {
        let here = ns.saturating_add_signed(self.time_offset_ns);
        (u128::from(here) * u128::from(self.ticks_per_second) / 1_000_000_000) as u64
    }

    fn read_iter(&self, name: &'static str) -> io::Result<Vec<u8>> {
        sys::read_iter(self.iterator(name)?, true)
    }

    fn iterator(&self, name: &'static str) -> io::Result<BorrowedFd<'_>> {
        self.links
            .get(name)
            .map(|l| l.as_fd())
            .ok_or_else(|| io::Error::new(io::ErrorKind::Unsupported, format!("the iterator {name} is off")))
    }

    /// Changes the control map's one entry. A put writes all of it, so the caller holds the lock of edits.
    fn control(&self, change: impl FnOnce(&mut Control)) -> io::Result<()> {
        let mut c = self.maps.control.get(&0)?.unwrap_or_default();
        change(&mut c);
        self.maps.control.put(&0, &c)
    }

    /// Who has these inodes open, by `iter/task_file`. Processes that the iterators do not return (PID 1 on some hosts)
    /// are not among them. Unsupported where the iterator is off.
    pub fn holders(&self, inodes: &[u64]) -> io::Result<Vec<FdRow>> {
        let _guard = lock(&self.looking);
        for old in self.maps.inodes.keys(monitor_abi::INODES_MAX as usize * 2)? {
            self.maps.inodes.delete(&old)?;
        }
        for inode in inodes.iter().take(monitor_abi::INODES_MAX as usize) {
            self.maps.inodes.put(inode, &1)?;
        }
        Ok(sys::rows_of(&self.read_iter(FILES)?))
    }
}

/// Attaches what is not attached on demand only.
fn attach(programs: &[(&'static str, OwnedFd)]) -> Result<Vec<(&'static str, OwnedFd)>, KernelError> {
    let mut links = Vec::new();
    for probe in PROBES.iter().filter(|p| !p.on_demand) {
        let Some((_, program)) = programs.iter().find(|(n, _)| *n == probe.name) else { continue };
        let (to, link) = match probe.kind {
            Kind::Tracepoint(tp) => (tp, sys::attach_tp_btf(program.as_fd())),
            Kind::Iterator(iter) => (iter, sys::attach_iter(program.as_fd())),
            Kind::ByHand => continue,
        };
        let link = link.map_err(|source| KernelError::Attach { program: probe.name, to, source })?;
        links.push((probe.name, link));
    }
    Ok(links)
}

/// What a pinned set does without, and why.
fn left_out(set: &Set, layout: &Layout) -> Vec<(&'static str, String)> {
    PROBES
        .iter()
        .filter(|p| !p.is_tracer() && p.is_of_use() && set.programs.iter().all(|(n, _)| *n != p.name))
        .map(|p| {
            let why = layout.lacks(p).map_or_else(
                || "the kernel refused it when this set of pins was made".to_owned(),
                |field| format!("this kernel has no field {field}"),
            );
            (p.name, why)
        })
        .collect()
}

/// A release that names no version is let through: what it lacks is found out by its types.
fn recent_enough(release: &str) -> Result<(), KernelError> {
    match features::version(release) {
        Some(v) if v < features::OLDEST => {
            Err(KernelError::TooOld { found: release.to_owned(), oldest: features::OLDEST })
        }
        _ => Ok(()),
    }
}

/// `PROC_PID_INIT_INO` in `include/linux/proc_ns.h`.
const INITIAL_PID_NS: &str = "pid:[4026531836]";

fn in_initial_pid_namespace() -> Result<(), KernelError> {
    let link = std::fs::read_link("/proc/self/ns/pid").map_err(KernelError::io("read /proc/self/ns/pid"))?;
    let found = link.to_string_lossy().into_owned();
    if found == INITIAL_PID_NS { Ok(()) } else { Err(KernelError::PidNamespace { found }) }
}

/// What this time namespace adds to boot time, in nanoseconds; 0 where there is none. /proc shows starts with it, the
/// probes' records are without.
fn time_namespace_offset() -> i64 {
    let text = std::fs::read_to_string("/proc/self/timens_offsets").unwrap_or_default();
    parse_time_offset(&text)
}

fn parse_time_offset(text: &str) -> i64 {
    for line in text.lines() {
        let mut f = line.split_ascii_whitespace();
        if matches!(f.next(), Some("boottime" | "7")) {
            let mut number = || f.next().and_then(|s| s.parse::<i64>().ok()).unwrap_or(0);
            return number().saturating_mul(1_000_000_000).saturating_add(number());
        }
    }
    0
}
