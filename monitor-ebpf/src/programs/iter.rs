//! The iterators: all processes with what the lineage map has on them, and the open files with given inodes.
//!
//! aya-ebpf has no macro for iterators, so section and context are written out. A program runs when the agent reads
//! its file; the rows are what the read gives.

use aya_ebpf::helpers::generated::bpf_seq_write;
use core::ffi::c_void;
use monitor_abi::{FdRow, KERNEL_THREAD, Lineage, ProcKey, ROW_ADOPTS, TaskRow};

use super::task::{self, Ptr};
use super::{INODES, LINEAGE, frozen};

/// `struct bpf_iter_meta`.
#[repr(C)]
pub(crate) struct Meta {
    seq: *mut c_void,
    session: u64,
    number: u64,
}

/// `struct bpf_iter__task`.
#[repr(C)]
pub(crate) struct TaskCtx {
    meta: *const Meta,
    task: Ptr,
}

/// `struct bpf_iter__task_file`.
#[repr(C)]
pub(crate) struct FileCtx {
    meta: *const Meta,
    task: Ptr,
    fd: u32,
    file: Ptr,
}

/// Writes one row. A row that does not fit makes the kernel call the program again with an empty buffer.
///
/// # Safety
/// `meta` is the iterator's own.
#[inline(always)]
unsafe fn write<T>(meta: *const Meta, row: &mut T) {
    // SAFETY: the caller's; the row is initialised, without padding.
    unsafe {
        let seq = (&raw const (*meta).seq).read_volatile();
        bpf_seq_write(seq.cast(), core::ptr::from_mut(row).cast(), size_of::<T>() as u32);
    }
}

const NO_LINEAGE: Lineage =
    Lineage { parent: ProcKey { start: 0, tgid: 0, pad: 0 }, job: 0, flags: 0, life: 0, told: 0, pad: 0 };

#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task")]
pub(crate) extern "C" fn tasks(ctx: *mut TaskCtx) -> i32 {
    // SAFETY: the kernel's context; its pointers are read once each and compared.
    unsafe {
        let task = (&raw const (*ctx).task).read_volatile();
        if task.is_null() {
            return 0;
        }
        let (pid, tgid) = task::ids(task);
        if pid != tgid {
            return 0;
        }
        let key = task::key(task);
        let (live, status, _) = task::live_and_status(task);
        let (lineage, known) = match LINEAGE.get(key) {
            Some(l) => (*l, 1),
            None => (NO_LINEAGE, 0),
        };
        let mut row = TaskRow {
            key,
            parent: task::parent_key(task),
            lineage,
            known,
            flags: (if task::is_kernel_thread(task) { u32::from(KERNEL_THREAD) } else { 0 })
                | (if task::adopts(task) { ROW_ADOPTS } else { 0 }),
            state: task::load(task, frozen!(OFFSETS.task_state)),
            exit_state: task::load(task, frozen!(OFFSETS.task_exit_state)),
            live,
            exit_code: status,
            uid: task::uid(task),
            pad: 0,
            comm: task::comm(task),
        };
        write((&raw const (*ctx).meta).read_volatile(), &mut row);
    }
    0
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
pub(crate) extern "C" fn files(ctx: *mut FileCtx) -> i32 {
    // SAFETY: as above.
    unsafe {
        let file = (&raw const (*ctx).file).read_volatile();
        let task = (&raw const (*ctx).task).read_volatile();
        if file.is_null() || task.is_null() {
            return 0;
        }
        let Some(inode) = task::follow(file, frozen!(OFFSETS.file_inode)) else { return 0 };
        let ino: u64 = task::load(inode, frozen!(OFFSETS.inode_ino));
        if INODES.get(ino).is_none() {
            return 0;
        }
        let dev = match task::follow(inode, frozen!(OFFSETS.inode_sb)) {
            Some(sb) => task::load(sb, frozen!(OFFSETS.sb_dev)),
            None => 0,
        };
        let mut row = FdRow {
            key: task::key(task),
            inode: ino,
            dev,
            tid: task::ids(task).0,
            fd: (&raw const (*ctx).fd).read_volatile(),
            mode: task::load(file, frozen!(OFFSETS.file_mode)),
        };
        write((&raw const (*ctx).meta).read_volatile(), &mut row);
    }
    0
}
