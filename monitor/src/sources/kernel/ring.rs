//! The reader's end of the ring buffer. It gives bytes; `event` knows what they mean.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::time::Duration;

use rustix::mm::{MapFlags, ProtFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

/// While unread records are in the ring the kernel sends no wake-up: waiting this long before reading makes a burst
/// cost one wake-up, not one for each record.
const GATHER: Duration = Duration::from_millis(2);
/// What stands before each record (`BPF_RINGBUF_HDR_SZ`), its length and two flags first; both together are rounded up to as much.
const RECORD_HEAD: usize = 8;
/// `BPF_RINGBUF_BUSY_BIT`: it is being written. `BPF_RINGBUF_DISCARD_BIT`: its writer gave it back.
const BUSY: u32 = 1 << 31;
const DISCARDED: u32 = 1 << 30;

/// The ring. There is one reader.
///
/// A wake-up interrupts whoever writes the record, and costs it several times what the probe does, most of all in a VM. So as
/// long as records keep coming the reader sleeps by the clock and lets its last record stand in the ring as unread: the kernel
/// wakes a reader only at the first record after all that it has read. Before it waits for a wake-up it gives that record back.
/// An agent that is killed in between has its successor read one record again, as one that is killed while it handles it.
pub struct Ring {
    records: AsyncFd<Records>,
    /// The last drain stopped at its bound.
    more: bool,
    /// Where the last record that was given begins, until it is held.
    last: Option<u64>,
    /// The last record stands as unread until then.
    held: Option<Held>,
    /// When to look for new records while some are kept: the kernel wakes nobody then.
    look_at: Option<Instant>,
}

struct Held {
    until: Instant,
    /// What has been read, with it.
    position: u64,
}

impl Ring {
    /// Within a tokio runtime.
    pub(super) fn new(records: Records) -> io::Result<Self> {
        // What is in the ring from before (a pinned one) gave its wake-up to nobody.
        // SAFETY: the records own their descriptor and always give the same one.
        let records = unsafe { AsyncFd::register_with_interest(records, Interest::READABLE) };
        Ok(Self {
            records: records.map_err(io::Error::from)?,
            more: true,
            last: None,
            held: None,
            look_at: None,
        })
    }

    /// Waits until there is something to read, and a moment more for what comes with it. Cancel-safe.
    pub async fn readable(&mut self) -> io::Result<()> {
        if self.more {
            return Ok(());
        }
        if self.is_keeping() {
            let at = *self.look_at.get_or_insert_with(|| Instant::now() + GATHER);
            tokio::time::sleep_until(at).await;
            self.look_at = None;
            self.more = true;
            return Ok(());
        }
        self.hold();
        if let Some(h) = &self.held {
            tokio::time::sleep_until(h.until).await;
            let read = h.position;
            self.release();
            if self.records.get_ref().written() != read {
                self.more = true;
                return Ok(());
            }
        }
        // Cleared before the ring is read: what is written from now on sets it again.
        self.records.readable_mut().await?.clear_ready();
        self.more = true;
        tokio::time::sleep(GATHER).await;
        Ok(())
    }

    /// The records that [`Ring::drain`] would give now, oldest first. Those that their writers gave back are among them, empty.
    pub fn unread(&self) -> impl Iterator<Item = &[u8]> {
        self.records.get_ref().unread()
    }

    /// Gives each record there is to `handle`, oldest first and each exactly once, up to `most`; how many. A
    /// record's space is let go when `handle` has returned.
    pub fn drain(&mut self, most: usize, handle: &mut dyn FnMut(&[u8])) -> usize {
        self.drain_keeping(most, &mut |bytes| {
            handle(bytes);
            None
        })
    }

    /// As [`Ring::drain`], but where `handle` gives a number the record is not let go, nor any after it, before
    /// [`Ring::let_go`] is called with at least that number. A successor of a killed agent reads them again.
    pub fn drain_keeping(&mut self, most: usize, handle: &mut dyn FnMut(&[u8]) -> Option<u64>) -> usize {
        self.release();
        let records = self.records.get_mut();
        for n in 0..most {
            let Some(begin) = records.take(handle) else {
                self.more = false;
                return n;
            };
            self.last = Some(begin);
        }
        self.more = true;
        most
    }

    /// How far it has been read; what is kept counts as read.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.records.get_ref().position
    }

    #[must_use]
    pub fn is_keeping(&self) -> bool {
        !self.records.get_ref().kept.is_empty()
    }

    /// Lets go the records that are kept until `number` or an earlier one.
    pub fn let_go(&mut self, number: u64) {
        if !self.is_keeping() {
            return;
        }
        let records = self.records.get_mut();
        while records.kept.front().is_some_and(|&(_, until)| until <= number) {
            records.kept.pop_front();
        }
        records.publish();
        if records.kept.is_empty() {
            // A record that was written while the position stood back woke nobody: it is looked for.
            fence(Ordering::SeqCst);
            self.more = true;
            self.look_at = None;
        }
    }

    /// Lets the last record stand as unread, and what was given back behind it.
    fn hold(&mut self) {
        if let Some(begin) = self.last.take() {
            let records = self.records.get_ref();
            self.held = Some(Held { until: Instant::now() + GATHER, position: records.position });
            records.consumer.set(begin);
        }
    }

    /// All that was read is let go. What is written from now on wakes the reader, or is seen by whoever looks after this.
    fn release(&mut self) {
        if let Some(h) = self.held.take() {
            self.records.get_ref().consumer.set(h.position);
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

/// The ring's memory, and how far it has been read.
///
/// The kernel has the data twice in a row, so that a record that passes the end can be read as one piece. Of the second only as
/// much is mapped as a record can reach into: what is mapped counts as resident.
pub(super) struct Records {
    fd: OwnedFd,
    consumer: Mapping,
    /// The producer's page, then the data.
    shared: Mapping,
    size: u64,
    position: u64,
    /// Records that were read and are not let go: where each begins, and the number that it waits for. In both ascending.
    kept: VecDeque<(u64, u64)>,
}

impl Records {
    /// At the position that the shared page holds, so a record half handled before a restart comes again.
    pub(super) fn open(fd: OwnedFd) -> io::Result<Self> {
        let size = u64::from(super::stats::max_entries(&fd)?);
        let page = rustix::param::page_size();
        let consumer = Mapping::of(fd.as_fd(), 0, page, ProtFlags::READ | ProtFlags::WRITE)?;
        let shared = Mapping::of(fd.as_fd(), 1, page + size as usize + page, ProtFlags::READ)?;
        // Anybody who may open the map may have written there.
        let (read, written) = (consumer.position(), shared.position());
        let sane = written.wrapping_sub(read) <= size && read.is_multiple_of(RECORD_HEAD as u64);
        Ok(Self {
            fd,
            consumer,
            shared,
            size,
            position: if sane { read } else { written },
            kept: VecDeque::new(),
        })
    }

    fn written(&self) -> u64 {
        self.shared.position()
    }

    /// Tells the kernel how far its space is free.
    fn publish(&self) {
        self.consumer.set(self.kept.front().map_or(self.position, |&(begin, _)| begin));
    }

    /// Gives the oldest record to `handle` and then lets go of it, or keeps it; where it began, or None if there is none yet.
    fn take(&mut self, handle: &mut dyn FnMut(&[u8]) -> Option<u64>) -> Option<u64> {
        loop {
            let record = if let Some(r) = self.record(self.position) {
                r
            } else {
                // A writer sees how far it has been read, and wakes us; or we see its record here.
                fence(Ordering::SeqCst);
                self.record(self.position)?
            };
            let (begin, room, given) = (self.position, record.room, record.bytes.is_some());
            if let Some(number) = record.bytes.and_then(&mut *handle) {
                self.kept.push_back((begin, number));
            }
            self.position = begin.wrapping_add(room);
            self.publish();
            if given {
                return Some(begin);
            }
        }
    }

    fn unread(&self) -> impl Iterator<Item = &[u8]> {
        let mut position = self.position;
        std::iter::from_fn(move || {
            let record = self.record(position)?;
            position = position.wrapping_add(record.room);
            Some(record.bytes.unwrap_or_default())
        })
    }

    /// The record that stands there, if it is whole.
    fn record(&self, position: u64) -> Option<Record<'_>> {
        if position == self.written() {
            return None;
        }
        let at = rustix::param::page_size() + (position & (self.size - 1)) as usize;
        let head = self.shared.word32(at).load(Ordering::Acquire);
        if head & BUSY != 0 {
            return None;
        }
        let length = (head & !DISCARDED) as usize;
        Some(Record {
            bytes: (head & DISCARDED == 0).then(|| self.shared.bytes(at + RECORD_HEAD, length)),
            room: (RECORD_HEAD + length).next_multiple_of(RECORD_HEAD) as u64,
        })
    }
}

/// One that is whole.
struct Record<'a> {
    /// None: its writer gave it back.
    bytes: Option<&'a [u8]>,
    /// What it takes in the ring, its head included.
    room: u64,
}

impl AsRawFd for Records {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// The ring's two positions, by mappings of their own: they can be read while the reader works.
pub(super) struct Gauge {
    consumer: Mapping,
    producer: Mapping,
    size: u64,
}

/// Pages of the ring map: first the one that holds the consumer's position, then the producer's (both in the first word), then
/// the data.
struct Mapping {
    at: *mut core::ffi::c_void,
    bytes: usize,
}
// SAFETY: positions are used by atomic operations only, records by their reader only; it lives as long as the value.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn of(fd: BorrowedFd<'_>, page: usize, bytes: usize, protection: ProtFlags) -> io::Result<Self> {
        let from = (page * rustix::param::page_size()) as u64;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let at =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, fd, from) }?;
        Ok(Self { at, bytes })
    }

    fn word(&self) -> &AtomicU64 {
        // SAFETY: mapped, aligned to a page, written by atomic stores.
        unsafe { &*self.at.cast::<AtomicU64>() }
    }

    fn position(&self) -> u64 {
        self.word().load(Ordering::Acquire)
    }

    /// Of a page that is mapped for writing.
    fn set(&self, position: u64) {
        self.word().store(position, Ordering::Release);
    }

    /// `offset` is aligned and lies in the mapping.
    fn word32(&self, offset: usize) -> &AtomicU32 {
        assert!(
            offset.is_multiple_of(4) && offset + 4 <= self.bytes,
            "{offset} in a ring's {} bytes",
            self.bytes
        );
        // SAFETY: as just said; the kernel writes it by atomic stores.
        unsafe { &*self.at.byte_add(offset).cast::<AtomicU32>() }
    }

    /// What there is of these bytes in the mapping. The kernel writes none of them before they have been let go.
    fn bytes(&self, from: usize, length: usize) -> &[u8] {
        let from = from.min(self.bytes);
        // SAFETY: within the mapping.
        unsafe { std::slice::from_raw_parts(self.at.byte_add(from).cast(), length.min(self.bytes - from)) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `of` with this size; no reference outlives the value.
        let _ = unsafe { rustix::mm::munmap(self.at, self.bytes) };
    }
}

impl Gauge {
    pub(super) fn new(fd: &OwnedFd) -> io::Result<Self> {
        let size = super::stats::max_entries(fd)?.into();
        let page = rustix::param::page_size();
        Ok(Self {
            consumer: Mapping::of(fd.as_fd(), 0, page, ProtFlags::READ)?,
            producer: Mapping::of(fd.as_fd(), 1, page, ProtFlags::READ)?,
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
