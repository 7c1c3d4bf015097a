//! The agent's log: a bounded queue of formatted lines and one thread that writes them. Whoever logs never waits: a line
//! that finds the queue full, or that cannot be written, is dropped and counted. Formats nothing.
//!
//! The log is a file, a pipe or a terminal of somebody else: the disk may be full, the reader gone, or stopped with the pipe
//! full, and the core logs on its way to a kill.

use std::cell::RefCell;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use tracing_subscriber::fmt::MakeWriter;

/// Lines in the queue.
const LINES: usize = 4096;
/// Bytes in the queue.
const BYTES: usize = 2 << 20;
/// How often the notice about dropped lines is tried while nothing else is logged.
const RETRY: Duration = Duration::from_secs(1);

/// A handle to the log; clones share one queue.
#[derive(Clone, Debug)]
pub struct Log(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    queue: SyncSender<Vec<u8>>,
    /// The other end, until the writer is started.
    unread: Mutex<Option<Receiver<Vec<u8>>>>,
    queued_bytes: AtomicUsize,
    /// Lines that entered the queue, and lines that left it, written or not.
    entered: AtomicU64,
    left: AtomicU64,
    dropped: AtomicU64,
    /// Dropped lines that no notice has reported.
    unreported: AtomicU64,
}

thread_local! {
    /// In the writer thread: the notice that was formatted last. It bypasses the queue, so that a notice that cannot be
    /// written is not counted as one more dropped line.
    static NOTICE: RefCell<Option<Vec<u8>>> = const { RefCell::new(None) };
    static IS_WRITER: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

impl Default for Log {
    fn default() -> Self {
        let (queue, unread) = sync_channel(LINES);
        Self(Arc::new(Shared {
            queue,
            unread: Mutex::new(Some(unread)),
            queued_bytes: AtomicUsize::new(0),
            entered: AtomicU64::new(0),
            left: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            unreported: AtomicU64::new(0),
        }))
    }
}

impl Log {
    /// Starts the thread that writes to stderr; lines logged before wait in the queue. A second call does nothing. The
    /// caller drops its capabilities first: the thread inherits them.
    pub fn start(&self) -> io::Result<()> {
        self.start_to(io::stderr())
    }

    /// As [`Log::start`], to another file.
    pub fn start_to(&self, to: impl AsFd + Send + 'static) -> io::Result<()> {
        if self.unread().is_none() {
            return Ok(());
        }
        let log = self.clone();
        // The thread takes the other end itself: where no thread can be made, it is there for the next try. Of two threads that are
        // started at once, one gets it and the other ends.
        let write = move || {
            let lines = log.unread().take();
            if let Some(lines) = lines {
                log.run(&lines, Output { to, torn: false });
            }
        };
        std::thread::Builder::new().name("jobwarden-log".into()).spawn(write).map(drop)
    }

    fn unread(&self) -> std::sync::MutexGuard<'_, Option<Receiver<Vec<u8>>>> {
        self.0.unread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lines dropped since the start: the queue was full, or they could not be written.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.0.dropped.load(Ordering::Relaxed)
    }

    /// Waits until all that was logged before is written or dropped. False: that takes longer than `within`. Where no thread can be made,
    /// nothing is written and nothing is waited for.
    #[must_use]
    pub fn flush(&self, within: Duration) -> bool {
        if self.start().is_err() {
            return true;
        }
        let until = Instant::now() + within;
        let entered = self.0.entered.load(Ordering::Acquire);
        while self.0.left.load(Ordering::Acquire) < entered {
            if Instant::now() >= until {
                return false;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        true
    }

    fn push(&self, line: &[u8]) {
        if IS_WRITER.get() {
            NOTICE.set(Some(line.to_vec()));
            return;
        }
        let s = &*self.0;
        // Several threads may pass the check at once; each adds one line at most.
        let room = s.queued_bytes.load(Ordering::Relaxed) + line.len() <= BYTES;
        // Counted before the writer can take the line, so that neither difference is ever negative.
        s.queued_bytes.fetch_add(line.len(), Ordering::Relaxed);
        s.entered.fetch_add(1, Ordering::Release);
        if !room || s.queue.try_send(line.to_vec()).is_err() {
            self.leaves(line.len(), false);
        }
    }

    fn leaves(&self, bytes: usize, written: bool) {
        let s = &*self.0;
        s.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
        if !written {
            s.dropped.fetch_add(1, Ordering::Relaxed);
            s.unreported.fetch_add(1, Ordering::Relaxed);
        }
        s.left.fetch_add(1, Ordering::Release);
    }

    fn run(&self, lines: &Receiver<Vec<u8>>, mut output: Output<impl AsFd>) {
        IS_WRITER.set(true);
        loop {
            let unreported = self.0.unreported.load(Ordering::Relaxed) > 0;
            let next = if unreported {
                lines.recv_timeout(RETRY)
            } else {
                lines.recv().map_err(|_| RecvTimeoutError::Disconnected)
            };
            let works = match next {
                Ok(line) => {
                    let written = output.write(&line).is_ok();
                    self.leaves(line.len(), written);
                    // While lines wait, more may be dropped: one notice for all.
                    written && self.0.queued_bytes.load(Ordering::Relaxed) == 0
                }
                Err(RecvTimeoutError::Timeout) => true,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            if works {
                self.report_dropped(&mut output);
            }
        }
    }

    /// Says how many lines were dropped, if the line that says so can be written.
    fn report_dropped(&self, output: &mut Output<impl AsFd>) {
        let lines = self.0.unreported.load(Ordering::Relaxed);
        if lines == 0 {
            return;
        }
        // Formatted like every other line; it comes back through `push`, unless the filter keeps it out.
        tracing::error!(lines, "log lines were dropped: the log could not be written");
        if NOTICE.take().is_none_or(|line| output.write(&line).is_ok()) {
            self.0.unreported.fetch_sub(lines, Ordering::Relaxed);
        }
    }
}

/// One event of `tracing_subscriber::fmt`, which writes each with one call.
#[derive(Debug)]
pub struct Line<'a>(&'a Log);

impl io::Write for Line<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line(self)
    }
}

/// Where the lines go. Only the writer thread waits for it.
struct Output<T> {
    to: T,
    /// The last line was cut: what comes next begins a line of its own.
    torn: bool,
}

impl<T: AsFd> Output<T> {
    fn write(&mut self, line: &[u8]) -> Result<(), Errno> {
        if self.torn {
            self.write_all(b"\n")?;
            self.torn = false;
        }
        self.write_all(line)
    }

    fn write_all(&mut self, mut bytes: &[u8]) -> Result<(), Errno> {
        let whole = bytes.len();
        while !bytes.is_empty() {
            match rustix::io::write(&self.to, bytes) {
                // No file does it with bytes to write; a loop would not end.
                Ok(0) => return Err(Errno::IO),
                Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                // Another process that has this pipe or terminal open made it non-blocking.
                Err(Errno::AGAIN) => {
                    let timeout = Timespec { tv_sec: 1, tv_nsec: 0 };
                    // An error or a timeout: the next write tells.
                    let _ = poll(&mut [PollFd::new(&self.to, PollFlags::OUT)], Some(&timeout));
                }
                Err(e) => {
                    self.torn |= bytes.len() < whole;
                    return Err(e);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read as _, Write as _};

    use super::*;

    fn write(log: &Log, text: &str) {
        log.make_writer().write_all(text.as_bytes()).unwrap();
    }

    fn wait_until(what: &str, done: impl Fn() -> bool) {
        let until = Instant::now() + Duration::from_secs(20);
        while !done() {
            assert!(Instant::now() < until, "{what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn lines_logged_before_the_start_are_written_in_order() {
        let (mut read, to) = io::pipe().unwrap();
        let log = Log::default();
        write(&log, "one\n");
        log.start_to(to).unwrap();
        write(&log, "two\n");
        assert!(log.flush(Duration::from_secs(20)));
        let mut said = [0; 8];
        read.read_exact(&mut said).unwrap();
        assert_eq!((&said, log.dropped()), (b"one\ntwo\n", 0));
    }

    #[test]
    fn a_log_that_takes_nothing_counts_every_line() {
        let log = Log::default();
        log.start_to(File::options().write(true).open("/dev/full").unwrap()).unwrap();
        (0..10).for_each(|_| write(&log, "lost\n"));
        assert!(log.flush(Duration::from_secs(20)));
        // Also after notices that could not be written.
        std::thread::sleep(RETRY + RETRY / 4);
        assert_eq!(log.dropped(), 10);
    }

    #[test]
    fn a_reader_that_stopped_costs_bounded_memory_and_no_time() {
        let (mut read, to) = io::pipe().unwrap();
        let log = Log::default();
        log.start_to(to).unwrap();
        let line = "x".repeat(1000) + "\n";
        let sent = 10 * BYTES as u64 / line.len() as u64;
        let began = Instant::now();
        (0..sent).for_each(|_| write(&log, &line));
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
        assert!(log.0.queued_bytes.load(Ordering::Relaxed) <= BYTES);
        assert!(!log.flush(Duration::from_millis(20)), "the reader has read nothing");
        let dropped = log.dropped();
        assert!(dropped >= sent - (BYTES as u64 + (1 << 20)) / line.len() as u64, "{dropped} of {sent}");
        // The reader goes on: whole lines, as many as were not dropped.
        let mut said = vec![0; usize::try_from(sent - dropped).unwrap() * line.len()];
        read.read_exact(&mut said).unwrap();
        assert!(said.chunks(line.len()).all(|l| l == line.as_bytes()));
        wait_until("the queue is empty", || log.0.queued_bytes.load(Ordering::Relaxed) == 0);
    }

    #[test]
    fn a_line_after_a_cut_one_stands_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut output = Output { to: File::create(&path).unwrap(), torn: true };
        output.write(b"next\n").unwrap();
        output.write(b"last\n").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"\nnext\nlast\n");
    }

    #[test]
    fn one_notice_says_how_many_lines_were_dropped() {
        let (mut read, to) = io::pipe().unwrap();
        let log = Log::default();
        let line = "y".repeat(1000) + "\n";
        // Without a writer the queue only fills.
        (0..LINES).for_each(|_| write(&log, &line));
        let dropped = log.dropped();
        assert!(dropped > 0);
        let format = tracing_subscriber::fmt().with_ansi(false).without_time().with_writer(log.clone());
        let format = tracing::Dispatch::new(format.finish());
        let lines = log.unread().take().unwrap();
        let writer = log.clone();
        std::thread::spawn(move || {
            tracing::dispatcher::with_default(&format, || writer.run(&lines, Output { to, torn: false }));
        });
        let mut said = vec![0; (LINES - usize::try_from(dropped).unwrap()) * line.len()];
        read.read_exact(&mut said).unwrap();
        let mut notice = [0; 256];
        let n = read.read(&mut notice).unwrap();
        let notice = String::from_utf8_lossy(&notice[..n]).into_owned();
        assert!(notice.contains(&format!("lines={dropped}")) && notice.ends_with('\n'), "{notice}");
        assert_eq!((log.0.unreported.load(Ordering::Relaxed), log.dropped()), (0, dropped));
    }
}
