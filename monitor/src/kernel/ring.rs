//! The reader's end of the ring buffer. It gives bytes; `event` knows what they mean.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use aya::maps::{Map, MapData, RingBuf};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// While unread records are in the ring the kernel sends no wake-up: waiting this long before reading makes a burst
/// cost one wake-up, not one for each record.
const GATHER: Duration = Duration::from_millis(2);
/// Most records that one [`Ring::drain`] gives, so that a flood cannot keep its caller from everything else.
pub const DRAIN_MAX: usize = 8192;

/// The ring. There is one reader.
pub struct Ring {
    fd: AsyncFd<RingBuf<MapData>>,
    /// The last drain stopped at its bound.
    more: bool,
}

/// Opens the ring map at the position that its shared page holds, so a record half handled before a restart comes again.
pub(super) fn open(map: OwnedFd) -> Result<RingBuf<MapData>, aya::maps::MapError> {
    RingBuf::try_from(Map::from_map_data(MapData::from_fd(map)?)?)
}

impl Ring {
    /// Within a tokio runtime.
    pub(super) fn new(ring: RingBuf<MapData>) -> io::Result<Self> {
        // What is in the ring from before (a pinned one) gave its wake-up to nobody.
        // SAFETY: the ring owns its descriptor and always gives the same one.
        let fd =
            unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) }.map_err(io::Error::from)?;
        Ok(Self { fd, more: true })
    }

    /// Waits until there is something to read, and a moment more for what comes with it. Cancel-safe.
    pub async fn readable(&mut self) -> io::Result<()> {
        if self.more {
            return Ok(());
        }
        // Cleared before the ring is read: what is written from now on sets it again.
        self.fd.readable_mut().await?.clear_ready();
        self.more = true;
        tokio::time::sleep(GATHER).await;
        Ok(())
    }

    /// Gives each record there is to `handle`, oldest first and each exactly once, up to [`DRAIN_MAX`]; how many. A
    /// record's space is let go when `handle` has returned.
    pub fn drain(&mut self, handle: &mut dyn FnMut(&[u8])) -> usize {
        let ring = self.fd.get_mut();
        for n in 0..DRAIN_MAX {
            let Some(record) = ring.next() else {
                self.more = false;
                return n;
            };
            handle(&record);
        }
        self.more = true;
        DRAIN_MAX
    }
}

/// The ring's two positions, by mappings of their own: they can be read while the reader works.
pub(super) struct Gauge {
    consumer: Page,
    producer: Page,
    size: u64,
}

struct Page(*mut core::ffi::c_void);
// SAFETY: the mapping is read only, by atomic loads, and lives as long as the value.
unsafe impl Send for Page {}
// SAFETY: as above.
unsafe impl Sync for Page {}

impl Page {
    /// Page `n` of the ring map: 0 holds the consumer's position, 1 the producer's, both in the first word.
    fn map(fd: &OwnedFd, n: u64) -> io::Result<Self> {
        use rustix::mm::{MapFlags, ProtFlags};
        let size = rustix::param::page_size();
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let at = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                size,
                ProtFlags::READ,
                MapFlags::SHARED,
                fd,
                n * size as u64,
            )
        }?;
        Ok(Self(at))
    }

    fn position(&self) -> u64 {
        // SAFETY: mapped, aligned to a page, written by atomic stores.
        unsafe { &*self.0.cast::<std::sync::atomic::AtomicU64>() }.load(std::sync::atomic::Ordering::Acquire)
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this size; no reference outlives `position`.
        let _ = unsafe { rustix::mm::munmap(self.0, rustix::param::page_size()) };
    }
}

impl Gauge {
    pub(super) fn new(fd: &OwnedFd) -> io::Result<Self> {
        let size = super::stats::max_entries(fd)?.into();
        Ok(Self { consumer: Page::map(fd, 0)?, producer: Page::map(fd, 1)?, size })
    }

    pub(super) fn used(&self) -> u64 {
        let (read, written) = self.positions();
        written.saturating_sub(read)
    }

    /// Read and written. The consumer's first: it never overtakes the producer.
    pub(super) fn positions(&self) -> (u64, u64) {
        let read = self.consumer.position();
        (read, self.producer.position())
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }
}
