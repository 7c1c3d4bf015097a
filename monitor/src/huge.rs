//! Huge pages for what is large: with a million processes most of what an event touches is found by a walk over page tables,
//! which costs more than the event, in a virtual machine several times more.

use std::alloc::{GlobalAlloc, Layout, System};

/// From here on. A host of ten thousand processes has nothing as large.
const LARGE: usize = 4 << 20;

/// The system's allocator, which is also told that huge pages are welcome (`madvise(2)`; where they are switched off that does nothing).
struct Huge;

#[global_allocator]
static ALLOCATOR: Huge = Huge;

fn advise(at: *mut u8, bytes: usize) {
    if at.is_null() || bytes < LARGE {
        return;
    }
    let page = rustix::param::page_size();
    let skip = at.align_offset(page);
    // SAFETY: whole pages of what was just allocated; their contents stay.
    let _ = unsafe {
        rustix::mm::madvise(at.add(skip).cast(), (bytes - skip) & !(page - 1), rustix::mm::Advice::LinuxHugepage)
    };
}

// SAFETY: all memory is the system allocator's, by the layouts that it was asked for with.
unsafe impl GlobalAlloc for Huge {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's.
        let at = unsafe { System.alloc(layout) };
        advise(at, layout.size());
        at
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's.
        let at = unsafe { System.alloc_zeroed(layout) };
        advise(at, layout.size());
        at
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(at, layout) };
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        if bytes < LARGE {
            // SAFETY: the caller's.
            return unsafe { System.realloc(at, layout, bytes) };
        }
        // Copied: pages that the kernel moves (`mremap(2)`) stay small, or become so.
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
            println!("SKIPPED: huge pages: this kernel has none");
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
