//! Who asked for what, and every signal sent: JSON lines in the state folder and `tracing` events with target `audit`.
//!
//! Append only; at [`FILE_MAX`] bytes the file is renamed to `audit.log.1`, at most [`FILES`] files are kept. A line that
//! cannot be written never stops or delays a kill: a thread of its own writes, and keeps in memory, up to a bound, what the disk
//! does not take.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use crate::files::{self, OpenError};
use crate::model::kill::{AskedBy, Reason};
use crate::model::schema::{JobId, Ref, SignalledOutcome};

/// Bytes after which a file is put aside.
pub const FILE_MAX: u64 = 16 << 20;
/// Files kept, the present one included.
pub const FILES: u32 = 5;
const NAME: &str = "audit.log";
/// Bytes of lines kept while the disk takes none; later ones are only in the log.
const UNSAVED_MAX: usize = 1 << 20;
/// What the disk refused is tried again this often.
const RETRY: Duration = Duration::from_secs(1);
/// How long an end waits for the last lines.
const LAST: Duration = Duration::from_secs(2);

/// What an entry is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    /// A mutating request on the control socket: `detail` says which.
    Request,
    /// A job's end begins.
    Kill,
    /// One signal to one process.
    Signal,
    /// A process that the guards keep out of it: `detail` says why.
    Spared,
    /// A job's end is over: `detail` has the counts.
    Done,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// RFC 3339, UTC.
    pub at: String,
    pub what: What,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<JobId>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub job_name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
    pub asked_by: AskedBy,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<Ref>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<String>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
}

impl Entry {
    /// An entry of this moment, with nothing but who asked.
    #[must_use]
    pub fn now(what: What, asked_by: AskedBy) -> Self {
        Self {
            at: humantime::format_rfc3339_micros(SystemTime::now()).to_string(),
            what,
            job: None,
            job_name: String::new(),
            reason: None,
            asked_by,
            process: None,
            signal: None,
            outcome: None,
            detail: String::new(),
        }
    }

    /// A mutating request, by whom, and what came of it.
    #[must_use]
    pub fn request(asked_by: AskedBy, detail: impl Into<String>, outcome: impl Into<String>) -> Self {
        Self { outcome: Some(outcome.into()), detail: detail.into(), ..Self::now(What::Request, asked_by) }
    }

    #[must_use]
    pub fn outcome(mut self, o: SignalledOutcome) -> Self {
        self.outcome = Some(o.as_str().into());
        self
    }
}

/// The audit log. Shared behind an `Arc`; each write is one `write(2)` of whole lines.
#[derive(Debug)]
pub struct Audit {
    shared: Option<Arc<Shared>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    /// There is something to write, or the end has come.
    wake: Condvar,
    /// The queue was tried.
    tried: Condvar,
    /// Locked by the writer only, for as long as the disk takes.
    file: Mutex<LogFile>,
}

/// Lines on their way to the disk.
#[derive(Debug, Default)]
struct Queue {
    unsaved: Vec<u8>,
    /// Bytes that are being written now.
    writing: usize,
    /// Entries that found no room.
    lost: u64,
    /// What the disk said last; None: it took all.
    error: Option<String>,
    ended: bool,
}

#[derive(Debug)]
struct LogFile {
    dir: PathBuf,
    /// None: it could not be opened yet.
    open: Option<(File, u64)>,
}

impl LogFile {
    fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), open: None }
    }

    /// Opens or makes it. What is in its place and cannot be used is moved aside.
    fn ensure(&mut self) -> io::Result<&mut (File, u64)> {
        if self.open.is_none() {
            let path = self.dir.join(NAME);
            let open = || files::open_own(&path, OFlags::RDWR | OFlags::APPEND | OFlags::CREATE);
            let mut file = match open() {
                Err(e) if e.is_unusable() => {
                    let bad = files::set_aside(&path, &[])?;
                    tracing::error!(file = %path.display(), moved_to = %bad.display(), error = %e, "the audit log was unusable and was moved aside");
                    open()?
                }
                r => r?,
            };
            let mut size = file.metadata()?.len();
            // A line that a crash or the disk cut short would spoil the one after it.
            let mut last = [b'\n'];
            if size > 0 {
                file.read_exact_at(&mut last, size - 1)?;
            }
            if last != *b"\n" {
                file.write_all(b"\n")?;
                size += 1;
            }
            self.open = Some((file, size));
        }
        self.open.as_mut().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn rotate(&mut self) -> io::Result<()> {
        for path in (1..FILES).map(|n| numbered(&self.dir, n)) {
            if std::fs::symlink_metadata(&path).is_ok_and(|m| m.is_dir()) {
                files::set_aside(&path, &[])?;
            }
        }
        for n in (0..FILES - 1).rev() {
            match std::fs::rename(numbered(&self.dir, n), numbered(&self.dir, n + 1)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound || n == 0 => return Err(e),
                _ => {}
            }
        }
        self.open = None;
        Ok(())
    }

    fn append(&mut self, lines: &[u8], max: u64) -> io::Result<()> {
        let (_, size) = *self.ensure()?;
        if size > 0 && size + lines.len() as u64 > max {
            self.rotate()?;
        }
        let (file, size) = self.ensure()?;
        file.write_all(lines).inspect_err(|_| {
            // Half a line would spoil the one after it. Making a file shorter takes no room.
            let _ = file.set_len(*size);
        })?;
        *size += lines.len() as u64;
        Ok(())
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        // The lines are whole at every moment, so a panic of another holder spoils nothing.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes what is not on the disk yet. Others may add lines meanwhile.
    fn flush(&self) {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let mut queue = self.queue();
        let mut lines = std::mem::take(&mut queue.unsaved);
        queue.writing = lines.len();
        drop(queue);
        let written = file.append(&lines, FILE_MAX);
        let mut queue = self.queue();
        queue.writing = 0;
        let dir = file.dir.display();
        match written {
            Ok(()) => {
                if queue.error.take().is_some() {
                    tracing::info!(folder = %dir, "the audit log is written again");
                }
            }
            Err(e) => {
                lines.append(&mut queue.unsaved);
                queue.unsaved = lines;
                let text = format!("the audit log in {dir}: {e}");
                if queue.error.as_ref() != Some(&text) {
                    tracing::error!(folder = %dir, error = %e, "the audit log cannot be written");
                    queue.error = Some(text);
                }
            }
        }
        drop(queue);
        self.tried.notify_all();
    }

    /// The thread. At the end it tries once more.
    fn run(&self) {
        loop {
            let mut queue = self.queue();
            let retry = Instant::now() + RETRY;
            while !queue.ended {
                let left = retry.saturating_duration_since(Instant::now());
                if queue.error.is_none() && !queue.unsaved.is_empty()
                    || queue.error.is_some() && left.is_zero()
                {
                    break;
                }
                queue = if queue.error.is_some() {
                    self.wake.wait_timeout(queue, left).map_or_else(|e| e.into_inner().0, |(q, _)| q)
                } else {
                    self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner)
                };
            }
            let (ended, nothing) = (queue.ended, queue.unsaved.is_empty());
            drop(queue);
            if !nothing || !ended {
                self.flush();
            }
            if ended {
                return;
            }
        }
    }
}

fn numbered(dir: &Path, n: u32) -> PathBuf {
    if n == 0 { dir.join(NAME) } else { dir.join(format!("{NAME}.{n}")) }
}

impl Audit {
    /// `audit.log` in an existing folder. Lines are written by whoever gives them until [`Audit::start`]. A file that cannot be
    /// opened is no error here: it is one of [`Audit::error`], and opened again with each write.
    #[must_use]
    pub fn open(dir: &Path) -> Self {
        let shared = Shared {
            queue: Mutex::default(),
            wake: Condvar::new(),
            tried: Condvar::new(),
            file: Mutex::new(LogFile::new(dir)),
        };
        shared.flush();
        Self { shared: Some(Arc::new(shared)), thread: Mutex::default() }
    }

    /// To the log only: where there is no state folder (`exec` without an agent).
    #[must_use]
    pub fn log_only() -> Self {
        Self { shared: None, thread: Mutex::default() }
    }

    /// From now on a thread writes, and nobody waits for the disk.
    pub fn start(&self) -> io::Result<()> {
        let Some(shared) = self.shared.clone() else { return Ok(()) };
        let thread = std::thread::Builder::new().name("audit".into()).spawn(move || shared.run())?;
        *self.thread() = Some(thread);
        Ok(())
    }

    fn thread(&self) -> MutexGuard<'_, Option<JoinHandle<()>>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn write(&self, entry: &Entry) {
        self.write_all(std::slice::from_ref(entry));
    }

    /// All of them with one `write(2)`.
    pub fn write_all(&self, entries: &[Entry]) {
        let mut lines = Vec::new();
        for e in entries {
            tracing::info!(
                target: "audit",
                what = ?e.what, job = e.job.map(tracing::field::display), job_name = %e.job_name,
                reason = e.reason.map(Reason::as_str), uid = e.asked_by.uid, by = e.asked_by.pid,
                exe = e.asked_by.exe, rule = e.asked_by.rule,
                process = e.process.as_ref().map(|p| tracing::field::display(p.id)),
                comm = e.process.as_ref().map(|p| p.comm.as_str()),
                signal = e.signal, outcome = e.outcome, detail = %e.detail,
            );
            // A string-keyed struct of strings and numbers always serializes.
            if serde_json::to_writer(&mut lines, e).is_ok() {
                lines.push(b'\n');
            }
        }
        let Some(shared) = &self.shared else { return };
        let mut queue = shared.queue();
        let kept = queue.unsaved.len() + queue.writing;
        if kept + lines.len() > UNSAVED_MAX && kept > 0 {
            queue.lost += entries.len() as u64;
        } else {
            queue.unsaved.extend_from_slice(&lines);
        }
        drop(queue);
        if self.thread().is_some() {
            shared.wake.notify_one();
        } else {
            shared.flush();
        }
    }

    /// Comes back when the lines given so far are on the disk, the disk has refused them, or the time is over.
    pub fn settle(&self, within: Duration) {
        let Some(shared) = &self.shared else { return };
        let until = Instant::now() + within;
        let mut queue = shared.queue();
        while queue.error.is_none() && queue.unsaved.len() + queue.writing > 0 {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            queue = shared.tried.wait_timeout(queue, left).map_or_else(|e| e.into_inner().0, |(q, _)| q);
        }
    }

    /// What is wrong, as long as lines wait for the disk.
    #[must_use]
    pub fn error(&self) -> Option<String> {
        let queue = self.shared.as_ref()?.queue();
        let lost = match queue.lost {
            0 => String::new(),
            n => format!(", {n} entries are in the agent's log only"),
        };
        queue.error.as_ref().map(|e| format!("{e}{lost}"))
    }
}

impl Drop for Audit {
    fn drop(&mut self) {
        let Some(shared) = &self.shared else { return };
        shared.queue().ended = true;
        shared.wake.notify_one();
        let Some(thread) = self.thread().take() else { return };
        let until = Instant::now() + LAST;
        while !thread.is_finished() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Audit logs that were unusable and moved aside, as long as they are there.
#[must_use]
pub fn damaged(dir: &Path) -> Vec<PathBuf> {
    (0..FILES).flat_map(|n| files::damaged(&numbered(dir, n))).collect()
}

/// The entries of the audit log in `dir`, oldest first: those since `since` and of `job` (an id or a name), if given. A
/// half-written or unreadable line is skipped, and so is an unusable file. At most `max` entries, the newest.
pub fn read(dir: &Path, since: Option<SystemTime>, job: Option<&str>, max: usize) -> io::Result<Vec<Entry>> {
    let mut kept = std::collections::VecDeque::new();
    for n in (0..FILES).rev() {
        let file = match files::open_regular(&numbered(dir, n)) {
            Ok(f) => f,
            Err(e) if e.is_not_found() || matches!(e, OpenError::Kind(_)) => continue,
            Err(e) => return Err(e.into()),
        };
        for line in BufReader::new(file).split(b'\n') {
            let Ok(e) = serde_json::from_slice::<Entry>(&line?) else { continue };
            let late = since.is_none_or(|s| humantime::parse_rfc3339(&e.at).is_ok_and(|at| at >= s));
            let of = job.is_none_or(|j| e.job_name == j || e.job.is_some_and(|id| id.to_string() == j));
            if late && of {
                if kept.len() == max {
                    kept.pop_front();
                }
                kept.push_back(e);
            }
        }
    }
    Ok(kept.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_lines_are_read_back_and_filtered() {
        let d = tempfile::tempdir().unwrap();
        let a = Audit::open(d.path());
        let who = AskedBy { uid: Some(0), ..AskedBy::default() };
        let mut e = Entry::now(What::Signal, who.clone()).outcome(SignalledOutcome::Ended);
        e.job_name = "batch".into();
        a.write_all(&[e.clone(), Entry::request(who, "reload", "done")]);
        // A line that a crash cut short.
        std::fs::OpenOptions::new()
            .append(true)
            .open(d.path().join(NAME))
            .unwrap()
            .write_all(b"{\"at\":")
            .unwrap();
        assert_eq!(read(d.path(), None, None, 10).unwrap().len(), 2);
        assert_eq!(read(d.path(), None, None, 1).unwrap()[0].detail, "reload");
        assert_eq!(read(d.path(), None, Some("batch"), 10).unwrap(), [e]);
        let later = SystemTime::now() + std::time::Duration::from_secs(5);
        assert!(read(d.path(), Some(later), None, 10).unwrap().is_empty());
        let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(d.path().join(NAME)).unwrap());
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn rotation_keeps_a_bounded_number_of_files() {
        let d = tempfile::tempdir().unwrap();
        let mut o = LogFile::new(d.path());
        for i in 0..20 {
            o.append(format!("{i:09}\n").as_bytes(), 15).unwrap();
        }
        assert_eq!(std::fs::read_dir(d.path()).unwrap().count(), FILES as usize);
        assert_eq!(std::fs::read(numbered(d.path(), 0)).unwrap(), b"000000019\n");
        assert_eq!(std::fs::read(numbered(d.path(), 4)).unwrap(), b"000000015\n");
        // A folder in the place of an older file.
        std::fs::remove_file(numbered(d.path(), 2)).unwrap();
        std::fs::create_dir_all(numbered(d.path(), 2).join("x")).unwrap();
        o.append(b"more than fits\n", 15).unwrap();
        assert_eq!(std::fs::read(numbered(d.path(), 1)).unwrap(), b"000000019\n");
        assert_eq!(damaged(d.path()), [d.path().join("audit.log.2.bad")]);
    }

    #[test]
    fn an_unusable_file_is_moved_aside_and_a_cut_line_spoils_no_other() {
        let d = tempfile::tempdir().unwrap();
        let path = d.path().join(NAME);
        let victim = d.path().join("victim");
        std::fs::write(&victim, "v").unwrap();
        let details = || -> Vec<String> {
            read(d.path(), None, None, 10).unwrap().into_iter().map(|e| e.detail).collect()
        };
        let write = |detail: &str| {
            let a = Audit::open(d.path());
            a.write(&Entry::request(AskedBy::default(), detail, "y"));
            assert_eq!(a.error(), None);
        };
        std::os::unix::fs::symlink(&victim, &path).unwrap();
        write("link");
        assert_eq!(std::fs::read(&victim).unwrap(), b"v", "a symbolic link is not followed");
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(details().is_empty());
        write("folder");
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o400)).unwrap();
        std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"at\":").unwrap();
        write("cut");
        assert_eq!(details(), ["folder", "cut"]);
        assert_eq!(damaged(d.path()).len(), 2);
    }

    /// The folder is not where it was, and nothing can be appended without a rotation.
    fn broken(a: &Audit) {
        a.shared.as_ref().unwrap().file.lock().unwrap().ensure().unwrap().1 = FILE_MAX;
    }

    #[test]
    fn what_cannot_be_written_is_reported_and_written_later() {
        let top = tempfile::tempdir().unwrap();
        let (d, away) = (top.path().join("state"), top.path().join("away"));
        std::fs::create_dir(&d).unwrap();
        let a = Audit::open(&d);
        assert_eq!(a.error(), None);
        broken(&a);
        std::fs::rename(&d, &away).unwrap();
        a.write(&Entry::request(AskedBy::default(), "first", "y"));
        a.start().unwrap();
        a.write(&Entry::request(AskedBy::default(), "second", "y"));
        assert!(a.error().unwrap().contains("audit log"), "{:?}", a.error());
        std::fs::rename(&away, &d).unwrap();
        let since = Instant::now();
        while a.error().is_some() {
            assert!(since.elapsed() < Duration::from_secs(20), "{:?}", a.error());
            std::thread::sleep(Duration::from_millis(5));
        }
        let said: Vec<String> = read(&d, None, None, 10).unwrap().into_iter().map(|e| e.detail).collect();
        assert_eq!(said, ["first", "second"]);
    }

    #[test]
    fn a_disk_that_takes_nothing_costs_so_much_memory_at_most() {
        let d = tempfile::tempdir().unwrap();
        let a = Audit::open(d.path());
        broken(&a);
        drop(d);
        let long = Entry::request(AskedBy::default(), "x".repeat(64 << 10), "y");
        for _ in 0..40 {
            a.write(&long);
        }
        assert!(a.shared.as_ref().unwrap().queue().unsaved.len() <= UNSAVED_MAX);
        assert!(a.error().unwrap().contains("entries are in the agent's log only"), "{:?}", a.error());
    }

    /// A FIFO without a reader in the place of the disk: `write(2)` to it blocks when it is full.
    #[test]
    fn a_disk_that_hangs_holds_up_no_caller() {
        let d = tempfile::tempdir().unwrap();
        let fifo = d.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)
            .unwrap();
        let a = Audit::open(d.path());
        let pipe = std::fs::OpenOptions::new().read(true).write(true).open(&fifo).unwrap();
        let drain = pipe.try_clone().unwrap();
        a.shared.as_ref().unwrap().file.lock().unwrap().open = Some((pipe, 0));
        a.start().unwrap();
        let long = Entry::request(AskedBy::default(), "x".repeat(64 << 10), "y");
        let begun = Instant::now();
        for _ in 0..40 {
            a.write(&long);
        }
        a.settle(Duration::from_millis(50));
        assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
        // So that the thread can end.
        std::thread::spawn(move || io::copy(&mut &drain, &mut io::sink()));
    }
}
