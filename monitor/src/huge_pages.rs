//! Huge pages for what is large: with a million processes most of what an event touches is found by a walk over page tables,
//! which costs more than the event, in a virtual machine several times more.

use std::alloc::{GlobalAlloc, Layout, System};

/// From here on. A host of ten thousand processes has nothing as large.
const LARGE: usize = 4 << 20;

/// The system's allocator; what is large has a mapping of its own, to which huge pages are welcome (`madvise(2)`; where they are
/// switched off that does nothing). Never a part of the heap: that would keep them for what is small when it is freed.
struct Huge;

#[global_allocator]
static ALLOCATOR: Huge = Huge;

/// Null if there is no memory. Mappings begin at a page, which suits every type.
fn map(bytes: usize) -> *mut u8 {
    use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping, at an address of the kernel's choice.
    let Ok(at) = (unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, access, MapFlags::PRIVATE) }) else {
        return std::ptr::null_mut();
    };
    // SAFETY: advice changes no contents. Refused, it is as if it had not been given.
    let _ = unsafe { madvise(at, bytes, Advice::LinuxHugepage) };
    at.cast()
}

// SAFETY: by its size a layout is the system allocator's or a mapping, in each of these calls the same way.
unsafe impl GlobalAlloc for Huge {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's.
        if layout.size() < LARGE { unsafe { System.alloc(layout) } } else { map(layout.size()) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's. A new mapping is zero.
        if layout.size() < LARGE { unsafe { System.alloc_zeroed(layout) } } else { map(layout.size()) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's: it was allocated by this layout.
        unsafe {
            if layout.size() < LARGE {
                System.dealloc(at, layout);
            } else {
                let _ = rustix::mm::munmap(at.cast(), layout.size());
            }
        }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        if layout.size().max(bytes) < LARGE {
            // SAFETY: the caller's.
            return unsafe { System.realloc(at, layout, bytes) };
        }
        // Copied: huge pages that the kernel moves (`mremap(2)`) become small ones.
        // SAFETY: the caller's; the new block is another one than the old.
        unsafe {
            let new = self.alloc(Layout::from_size_align_unchecked(bytes, layout.align()));
            if !new.is_null() {
                std::ptr::copy_nonoverlapping(at, new, layout.size().min(bytes));
                self.dealloc(at, layout);
            }
            new
        }
    }
}

#[cfg(test)]
mod tests {
    /// `VmFlags` of the mapping that an address lies in.
    fn flags(of: usize) -> String {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        for line in maps.lines() {
            let range = line.split(' ').next().and_then(|r| r.split_once('-'));
            if let Some((from, to)) = range.and_then(|(a, b)| {
                Some((usize::from_str_radix(a, 16).ok()?, usize::from_str_radix(b, 16).ok()?))
            }) {
                inside = (from..to).contains(&of);
            } else if inside && let Some(f) = line.strip_prefix("VmFlags:") {
                return f.to_owned();
            }
        }
        String::new()
    }

    #[test]
    fn what_is_large_is_advised_and_what_grows_keeps_its_contents() {
        if !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
            crate::testing::skipped(
                "what_is_large_is_advised_and_what_grows_keeps_its_contents",
                "this kernel has no transparent huge pages",
            );
            return;
        }
        let mut v: Vec<u64> = Vec::with_capacity(1 << 20);
        v.extend(0..1 << 20);
        assert!(flags(v[1 << 19..].as_ptr() as usize).contains(" hg"), "8 MiB");
        v.extend(1 << 20..3 << 20);
        assert!(flags(v[1 << 19..].as_ptr() as usize).contains(" hg"), "grown");
        assert!(v.iter().copied().eq(0..3 << 20));
        v.truncate(100);
        v.shrink_to_fit();
        assert!(v.iter().copied().eq(0..100));
        let zeroed = vec![0_u8; 8 << 20];
        assert!(flags(zeroed.as_ptr() as usize + (4 << 20)).contains(" hg"), "zeroed");
        assert!(zeroed.iter().all(|b| *b == 0));
        let small = vec![1_u8; 1 << 20];
        assert!(!flags(small.as_ptr() as usize + 4096).contains(" hg"), "1 MiB");
    }
}
