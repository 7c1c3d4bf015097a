//! The only writer to standard output and standard error.
//!
//! `print!` and `eprint!` panic when the reader is gone or the disk is full, so lints forbid them everywhere else. A line to
//! stderr never fails and never panics. With [`Background`], it does not block either.

use std::fmt::Display;
use std::io::{self, Write as _};
use std::sync::OnceLock;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

/// Lines that wait for a slow reader; further ones are dropped.
const QUEUE: usize = 64;

enum Message {
    Line(String),
    /// Answered once everything before it is written.
    Flush(SyncSender<()>),
}

static BACKGROUND: OnceLock<SyncSender<Message>> = OnceLock::new();

/// One line to stderr. Errors (EPIPE, ENOSPC, EIO, ..) are ignored: no channel is left to report them on.
pub fn error_line(text: impl Display) {
    let line = format!("{text}\n");
    match BACKGROUND.get() {
        // Full: the reader has stopped.
        Some(queue) => drop(queue.try_send(Message::Line(line))),
        None => write_stderr(&line),
    }
}

/// Text to stdout, flushed.
pub fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

fn write_stderr(line: &str) {
    let _ = io::stderr().lock().write_all(line.as_bytes());
}

/// From its start on, [`error_line`] and the panic message are written by a thread of their own: a full pipe, a stopped
/// terminal or a hung disk behind stderr delays nothing else in this process.
///
/// A write with `O_NONBLOCK` is no alternative: the flag would apply to every process that shares the open file, and `poll`
/// before a write is racy as soon as another process writes to the same pipe.
#[derive(Debug)]
pub struct Background(());

impl Background {
    /// # Errors
    /// No thread can be made.
    pub fn start() -> io::Result<Self> {
        let (tx, rx) = sync_channel(QUEUE);
        std::thread::Builder::new().name("jobwarden-err".into()).spawn(move || {
            do_not_stop_for_terminal();
            for message in rx {
                match message {
                    Message::Line(line) => write_stderr(&line),
                    // The one that flushes may have given up.
                    Message::Flush(done) => drop(done.try_send(())),
                }
            }
        })?;
        if BACKGROUND.set(tx).is_ok() {
            std::panic::set_hook(Box::new(|info| {
                error_line(format_args!("jobwarden: internal error: {info}"));
            }));
        }
        Ok(Self(()))
    }

    /// Waits until everything is written, at most `limit`.
    pub fn flush(&self, limit: Duration) {
        let (tx, rx) = sync_channel(1);
        if let Some(queue) = BACKGROUND.get()
            && queue.try_send(Message::Flush(tx)).is_ok()
        {
            let _ = rx.recv_timeout(limit);
        }
    }
}

/// A write from a background process group stops the whole process (`stty tostop`), unless the writing thread blocks SIGTTOU
/// (termios(3)).
fn do_not_stop_for_terminal() {
    // SAFETY: plain calls on a set on this stack; only this thread's mask changes.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGTTOU);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
    }
}
