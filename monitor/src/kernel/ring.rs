//! The reader's end of the ring buffer. It gives bytes; `event` knows what they mean.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::time::Duration;

use aya::maps::{Map, MapData, RingBuf};
use rustix::mm::{MapFlags, ProtFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

/// While unread records are in the ring the kernel sends no wake-up: waiting this long before reading makes a burst
/// cost one wake-up, not one for each record.
const GATHER: Duration = Duration::from_millis(2);
/// What stands before each record (`BPF_RINGBUF_HDR_SZ`); both together are rounded up to as much.
const RECORD_HEAD: usize = 8;
/// Most records that one [`Ring::drain`] gives, so that a flood cannot keep its caller from everything else.
pub const DRAIN_MAX: usize = 8192;

/// The ring. There is one reader.
///
/// A wake-up interrupts whoever writes the record, and costs it several times what the probe does, most of all in a VM. So as
/// long as records keep coming the reader sleeps by the clock and lets its last record stand in the ring as unread: the kernel
/// wakes a reader only at the first record after all that it has read. Before it waits for a wake-up it gives that record back.
/// An agent that is killed in between has its successor read one record again, as one that is killed while it handles it.
pub struct Ring {
    fd: AsyncFd<RingBuf<MapData>>,
    consumer: Page,
    producer: Page,
    /// The last drain stopped at its bound.
    more: bool,
    /// Bytes that the last record takes in the ring, if the last drain gave any.
    last: Option<u64>,
    /// The last record stands as unread until then.
    held: Option<Held>,
}

struct Held {
    until: Instant,
    /// What has been read, with it.
    position: u64,
}

/// Opens the ring map at the position that its shared page holds, so a record half handled before a restart comes again.
pub(super) fn open(map: OwnedFd) -> Result<RingBuf<MapData>, aya::maps::MapError> {
    RingBuf::try_from(Map::from_map_data(MapData::from_fd(map)?)?)
}

impl Ring {
    /// Within a tokio runtime.
    pub(super) fn new(ring: RingBuf<MapData>) -> io::Result<Self> {
        let consumer = Page::map(ring.as_fd(), 0, ProtFlags::READ | ProtFlags::WRITE)?;
        let producer = Page::map(ring.as_fd(), 1, ProtFlags::READ)?;
        // What is in the ring from before (a pinned one) gave its wake-up to nobody.
        // SAFETY: the ring owns its descriptor and always gives the same one.
        let fd =
            unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) }.map_err(io::Error::from)?;
        Ok(Self { fd, consumer, producer, more: true, last: None, held: None })
    }

    /// Waits until there is something to read, and a moment more for what comes with it. Cancel-safe.
    pub async fn readable(&mut self) -> io::Result<()> {
        if self.more {
            return Ok(());
        }
        self.hold();
        if let Some(h) = &self.held {
            tokio::time::sleep_until(h.until).await;
            let read = h.position;
            self.release();
            if self.producer.position() != read {
                self.more = true;
                return Ok(());
            }
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
        self.release();
        self.last = None;
        let ring = self.fd.get_mut();
        for n in 0..DRAIN_MAX {
            let Some(record) = ring.next() else {
                self.more = false;
                return n;
            };
            self.last = Some((RECORD_HEAD + record.len()).next_multiple_of(RECORD_HEAD) as u64);
            handle(&record);
        }
        self.more = true;
        DRAIN_MAX
    }

    /// Lets the last record of the last drain stand as unread.
    fn hold(&mut self) {
        if let Some(bytes) = self.last.take() {
            let position = self.consumer.position();
            self.held = Some(Held { until: Instant::now() + GATHER, position });
            self.consumer.set(position.wrapping_sub(bytes));
        }
    }

    /// All that was read is let go. What is written from now on wakes the reader, or is seen by whoever looks after this.
    fn release(&mut self) {
        if let Some(h) = self.held.take() {
            self.consumer.set(h.position);
            // As the kernel's reader has it: a writer sees the position above, or we see its record.
            fence(Ordering::SeqCst);
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.release();
    }
}

/// The ring's two positions, by mappings of their own: they can be read while the reader works.
pub(super) struct Gauge {
    consumer: Page,
    producer: Page,
    size: u64,
}

struct Page(*mut core::ffi::c_void);
// SAFETY: the mapping is used by atomic operations only, and lives as long as the value.
unsafe impl Send for Page {}
// SAFETY: as above.
unsafe impl Sync for Page {}

impl Page {
    /// Page `n` of the ring map: 0 holds the consumer's position, 1 the producer's, both in the first word.
    fn map(fd: BorrowedFd<'_>, n: u64, protection: ProtFlags) -> io::Result<Self> {
        let size = rustix::param::page_size();
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let at = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), size, protection, MapFlags::SHARED, fd, n * size as u64)
        }?;
        Ok(Self(at))
    }

    fn word(&self) -> &AtomicU64 {
        // SAFETY: mapped, aligned to a page, written by atomic stores.
        unsafe { &*self.0.cast::<AtomicU64>() }
    }

    fn position(&self) -> u64 {
        self.word().load(Ordering::Acquire)
    }

    /// Of a page that is mapped for writing.
    fn set(&self, position: u64) {
        self.word().store(position, Ordering::Release);
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
        Ok(Self {
            consumer: Page::map(fd.as_fd(), 0, ProtFlags::READ)?,
            producer: Page::map(fd.as_fd(), 1, ProtFlags::READ)?,
            size,
        })
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
