//! bpf(2), as far as aya does not reach: objects opened from pins, iterators read more than once, programs run by hand,
//! a program's recursion misses. Nothing here knows what the maps mean. All of it is in Linux 5.10.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

/// `enum bpf_cmd` in `include/uapi/linux/bpf.h`.
#[derive(Clone, Copy)]
enum Cmd {
    MapLookup = 1,
    MapUpdate = 2,
    MapDelete = 3,
    ObjPin = 6,
    ObjGet = 7,
    TestRun = 10,
    InfoByFd = 15,
    RawTracepointOpen = 17,
    MapLookupBatch = 24,
    LinkCreate = 28,
    IterCreate = 33,
}

const BPF_TRACE_ITER: u32 = 28;

/// Types whose every byte is initialised and whose every bit pattern is a value: what maps and rows are made of.
///
/// # Safety
/// No padding, no references, no niches.
pub(super) unsafe trait Plain: Copy + Default {}
// SAFETY: integers.
unsafe impl Plain for u32 {}
// SAFETY: integers.
unsafe impl Plain for u64 {}
macro_rules! plain {
    ($($t:ty),*) => { $(
        // SAFETY: `repr(C)` integers without implicit padding; the ABI asserts its sizes.
        unsafe impl Plain for $t {}
    )* };
}
plain!(
    monitor_abi::ProcKey,
    monitor_abi::Lineage,
    monitor_abi::Job,
    monitor_abi::Control,
    monitor_abi::Counter,
    monitor_abi::KillCounter,
    monitor_abi::TaskRow,
    monitor_abi::FdRow
);

/// Rows as an iterator wrote them; what is left over at the end is dropped.
pub(super) fn rows_of<T: Plain>(b: &[u8]) -> Vec<T> {
    // SAFETY: `Plain`; the chunk has the size, and the read need not be aligned.
    b.chunks_exact(size_of::<T>()).map(|c| unsafe { c.as_ptr().cast::<T>().read_unaligned() }).collect()
}

/// `attr` holds the command's part of `union bpf_attr`; what it leaves out is 0 to the kernel.
///
/// # Safety
/// Pointers in `attr` are valid for what the command does with them.
unsafe fn bpf<A>(cmd: Cmd, attr: &mut A) -> io::Result<i32> {
    // SAFETY: the caller's.
    let r = unsafe { libc::syscall(libc::SYS_bpf, cmd as i32, std::ptr::from_mut(attr), size_of::<A>()) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(r as i32) }
}

/// # Safety
/// `fd` was just returned by the kernel and nobody else owns it.
unsafe fn own(fd: i32) -> OwnedFd {
    // SAFETY: the caller's.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

#[repr(C)]
struct MapAttr {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

fn map_attr(map: BorrowedFd<'_>, key: *const u8, value: *mut u8) -> MapAttr {
    MapAttr { map: map.as_raw_fd() as u32, pad: 0, key: key as u64, value: value as u64, flags: 0 }
}

/// `value` has the map's value size (of a per-CPU map: 8-byte aligned values of each possible CPU).
pub(super) fn map_lookup<K: Plain>(map: BorrowedFd<'_>, key: &K, value: &mut [u8]) -> io::Result<bool> {
    let mut a = map_attr(map, std::ptr::from_ref(key).cast(), value.as_mut_ptr());
    // SAFETY: the caller gives buffers of the map's sizes.
    match unsafe { bpf(Cmd::MapLookup, &mut a) } {
        Ok(_) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Writes an entry; with `new_only` an entry that is there already stays, and `AlreadyExists` is the error.
pub(super) fn map_update<K: Plain, V: Plain>(
    map: BorrowedFd<'_>,
    key: &K,
    value: &V,
    new_only: bool,
) -> io::Result<()> {
    const BPF_NOEXIST: u64 = 1;
    let mut a = map_attr(map, std::ptr::from_ref(key).cast(), std::ptr::from_ref(value).cast_mut().cast());
    a.flags = if new_only { BPF_NOEXIST } else { 0 };
    // SAFETY: key and value are of the map's types; the kernel only reads them.
    unsafe { bpf(Cmd::MapUpdate, &mut a) }.map(drop)
}

/// False if there was no such entry.
pub(super) fn map_delete<K: Plain>(map: BorrowedFd<'_>, key: &K) -> io::Result<bool> {
    let mut a = map_attr(map, std::ptr::from_ref(key).cast(), std::ptr::null_mut());
    // SAFETY: the key is of the map's type.
    match unsafe { bpf(Cmd::MapDelete, &mut a) } {
        Ok(_) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Most entries of one call of [`map_keys`]: more than a bucket of a hash map ever has.
const BATCH: usize = 4096;

/// Appends the keys of a hash map's buckets from `bucket` (None: the first) on, some thousand of them; the bucket to go on from,
/// None at the end. A bucket is read as a whole, so each key that is there all the while comes exactly once.
pub(super) fn map_keys<K: Plain, V: Plain>(
    map: BorrowedFd<'_>,
    bucket: Option<u32>,
    keys: &mut Vec<K>,
) -> io::Result<Option<u32>> {
    #[repr(C)]
    struct BatchAttr {
        from: u64,
        to: u64,
        keys: u64,
        values: u64,
        count: u32,
        map: u32,
        entry_flags: u64,
        flags: u64,
    }
    let (mut next, before) = (0_u32, keys.len());
    keys.resize(before + BATCH, K::default());
    let mut values = vec![V::default(); BATCH];
    let mut a = BatchAttr {
        from: bucket.as_ref().map_or(0, |b| std::ptr::from_ref(b) as u64),
        to: &raw mut next as u64,
        keys: keys[before..].as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count: BATCH as u32,
        map: map.as_raw_fd() as u32,
        entry_flags: 0,
        flags: 0,
    };
    // SAFETY: all buffers live through the call; keys and values are of the map's types, and have room for `count`.
    let done = unsafe { bpf(Cmd::MapLookupBatch, &mut a) };
    let end = matches!(&done, Err(e) if e.raw_os_error() == Some(libc::ENOENT));
    keys.truncate(before + if done.is_ok() || end { (a.count as usize).min(BATCH) } else { 0 });
    if end { Ok(None) } else { done.map(|_| Some(next)) }
}

#[repr(C)]
struct ObjAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Pins an object in a bpffs.
pub(super) fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut a = ObjAttr { path: path.as_ptr() as u64, fd: fd.as_raw_fd() as u32, flags: 0 };
    // SAFETY: the path lives through the call.
    unsafe { bpf(Cmd::ObjPin, &mut a) }.map(drop)
}

/// Opens a pinned object.
pub(super) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut a = ObjAttr { path: path.as_ptr() as u64, fd: 0, flags: 0 };
    // SAFETY: the path lives through the call; the descriptor is new.
    unsafe { bpf(Cmd::ObjGet, &mut a).map(|fd| own(fd)) }
}

#[repr(C)]
struct TestRunAttr {
    prog: u32,
    retval: u32,
    data_in_len: u32,
    data_out_len: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_in_len: u32,
    ctx_out_len: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
}

/// Runs a raw tracepoint program once, here and now, with these arguments; gives what it returned.
pub(super) fn run<const N: usize>(prog: BorrowedFd<'_>, args: &[u64; N]) -> io::Result<i32> {
    let mut a = TestRunAttr {
        prog: prog.as_raw_fd() as u32,
        retval: 0,
        data_in_len: 0,
        data_out_len: 0,
        data_in: 0,
        data_out: 0,
        repeat: 0,
        duration: 0,
        ctx_in_len: (N * 8) as u32,
        ctx_out_len: 0,
        ctx_in: args.as_ptr() as u64,
        ctx_out: 0,
        flags: 0,
        cpu: 0,
    };
    // SAFETY: the arguments live through the call.
    unsafe { bpf(Cmd::TestRun, &mut a) }?;
    Ok(a.retval as i32)
}

#[repr(C)]
struct RawTracepointAttr {
    name: u64,
    prog: u32,
    pad: u32,
}

/// Attaches a `tp_btf` program where it was loaded for. It is detached when the last descriptor or pin is gone.
pub(super) fn attach_tp_btf(prog: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut a = RawTracepointAttr { name: 0, prog: prog.as_raw_fd() as u32, pad: 0 };
    // SAFETY: no pointers; the descriptor is new.
    unsafe { bpf(Cmd::RawTracepointOpen, &mut a).map(|fd| own(fd)) }
}

#[repr(C)]
struct LinkAttr {
    prog: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

/// A link from which [`read_iter`] makes a file as often as it is read.
pub(super) fn attach_iter(prog: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut a = LinkAttr { prog: prog.as_raw_fd() as u32, target: 0, attach_type: BPF_TRACE_ITER, flags: 0 };
    // SAFETY: no pointers; the descriptor is new.
    unsafe { bpf(Cmd::LinkCreate, &mut a).map(|fd| own(fd)) }
}

/// Runs an iterator and gives all that it wrote, or only what one read gives (`whole` is false): it does not go on then.
pub(super) fn read_iter(link: BorrowedFd<'_>, whole: bool) -> io::Result<Vec<u8>> {
    let mut a = [link.as_raw_fd() as u32, 0];
    // SAFETY: no pointers; the descriptor is new.
    let fd = unsafe { bpf(Cmd::IterCreate, &mut a).map(|fd| own(fd)) }?;
    let mut rows = File::from(fd);
    if !whole {
        let mut out = vec![0; 4096];
        let n = io::Read::read(&mut rows, &mut out)?;
        out.truncate(n);
        return Ok(out);
    }
    let mut out = Vec::with_capacity(64 * 1024);
    io::Read::read_to_end(&mut rows, &mut out)?;
    Ok(out)
}

/// What is used of `struct bpf_prog_info`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ProgInfo {
    pub(super) id: u32,
    /// Nanoseconds and number of runs while `kernel.bpf_stats_enabled` was 1.
    pub(super) run_time_ns: u64,
    pub(super) runs: u64,
    /// None before 5.12.
    pub(super) recursion_misses: Option<u64>,
}

pub(super) fn prog_info(prog: BorrowedFd<'_>) -> io::Result<ProgInfo> {
    #[repr(C)]
    struct InfoAttr {
        fd: u32,
        len: u32,
        info: u64,
    }
    // Offsets in `struct bpf_prog_info`; an older kernel fills less and says how much.
    const ID: usize = 4;
    const RUN_TIME: usize = 192;
    const RUNS: usize = 200;
    const MISSES: usize = 208;
    const LEN: usize = 216;
    let mut info = [0_u64; LEN / 8];
    let mut a = InfoAttr { fd: prog.as_raw_fd() as u32, len: LEN as u32, info: info.as_mut_ptr() as u64 };
    // SAFETY: the buffer has the length that is given.
    unsafe { bpf(Cmd::InfoByFd, &mut a) }?;
    let filled = a.len as usize;
    Ok(ProgInfo {
        id: u32::from_ne_bytes([0, 1, 2, 3].map(|i| info[ID / 8].to_ne_bytes()[ID % 8 + i])),
        run_time_ns: info[RUN_TIME / 8],
        runs: info[RUNS / 8],
        recursion_misses: (filled >= MISSES + 8).then(|| info[MISSES / 8]),
    })
}

/// A duplicate of any object's descriptor, closed on exec.
pub(super) fn dup(fd: impl AsFd) -> io::Result<OwnedFd> {
    fd.as_fd().try_clone_to_owned()
}
