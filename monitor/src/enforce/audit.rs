//! Who asked for what, and every signal sent: JSON lines in the state folder and `tracing` events with target `audit`.
//!
//! Append only; at [`FILE_MAX`] bytes the file is renamed to `audit.log.1`, at most [`FILES`] files are kept. A thread of its
//! own writes, so that a disk that is full or does not answer neither stops nor delays a kill: lines wait in memory, up to
//! a bound.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use crate::files::{self, OpenError};
use crate::model::kill::{AskedBy, Reason};
use crate::model::outside::escape_json;
use crate::model::schema::{JobId, Ref, SignalledOutcome};

/// Bytes after which a file is put aside.
pub const FILE_MAX: u64 = 16 << 20;
/// Files kept, the present one included.
pub const FILES: u32 = 5;
const NAME: &str = "audit.log";
/// Bytes of lines kept while the disk takes none; later ones are only in the log.
const UNSAVED_MAX: usize = 1 << 20;
/// After a failed write the next attempt is made so much later.
const RETRY: Duration = Duration::from_secs(1);
/// A write that takes longer is an error: the disk does not answer.
const WRITE_MAX: Duration = Duration::from_secs(5);

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

/// The audit log. Shared behind an `Arc`. No method but [`Audit::flush`] and the drop waits for the disk, and these two only
/// so long.
#[derive(Debug)]
pub struct Audit {
    file: Option<Arc<Shared>>,
}

#[derive(Debug)]
struct Shared {
    lines: Mutex<Lines>,
    changed: Condvar,
    /// Locked while it is written, by the writer alone.
    file: Mutex<LogFile>,
}

/// What is not on the disk yet.
#[derive(Debug, Default)]
struct Lines {
    unsaved: Vec<u8>,
    /// Bytes that are being written, and since when.
    writing: Option<(usize, Instant)>,
    /// Why the last write failed; None: all was written.
    error: Option<String>,
    /// Entries for which there was no room.
    lost: u64,
    /// The writer runs. It starts with the first line: until then the process may fork, and drop capabilities.
    started: bool,
    /// Nobody writes entries any more.
    closed: bool,
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
    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(self: &Arc<Self>, lines: &[u8], entries: usize) {
        let mut l = self.lock();
        let waiting = l.unsaved.len() + l.writing.map_or(0, |(bytes, _)| bytes);
        if waiting > 0 && waiting + lines.len() > UNSAVED_MAX {
            l.lost += entries as u64;
        } else {
            l.unsaved.extend_from_slice(lines);
        }
        self.start(&mut l);
        drop(l);
        self.changed.notify_all();
    }

    /// Starts the writer, once there is something to write or to open. Where no thread can be made, the next call tries again.
    fn start(self: &Arc<Self>, l: &mut Lines) {
        if !l.started && (!l.unsaved.is_empty() || l.error.is_some()) {
            let me = Arc::clone(self);
            let thread = std::thread::Builder::new().name("jobwarden-audit".into());
            l.started = thread.spawn(move || me.run()).is_ok();
        }
    }

    fn run(&self) {
        let mut l = self.lock();
        while !(l.closed && (l.unsaved.is_empty() || l.error.is_some())) {
            l = if l.unsaved.is_empty() && l.error.is_none() {
                self.changed.wait(l).unwrap_or_else(PoisonError::into_inner)
            } else {
                let l = self.write(l);
                let pause = if l.error.is_some() { RETRY } else { Duration::ZERO };
                let paused = self.changed.wait_timeout_while(l, pause, |l| !l.closed);
                paused.unwrap_or_else(PoisonError::into_inner).0
            };
        }
    }

    /// One write of all that waits, without the lock on the lines.
    fn write<'a>(&'a self, mut l: MutexGuard<'a, Lines>) -> MutexGuard<'a, Lines> {
        let mut lines = std::mem::take(&mut l.unsaved);
        l.writing = Some((lines.len(), Instant::now()));
        drop(l);
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let done = file.append(&lines, FILE_MAX);
        let folder = file.dir.display();
        let mut l = self.lock();
        l.writing = None;
        match done {
            Ok(()) if l.error.take().is_some() => tracing::info!(%folder, "the audit log is written again"),
            Ok(()) => {}
            Err(e) => {
                lines.append(&mut l.unsaved);
                l.unsaved = lines;
                let error = format!("the audit log in {folder}: {e}");
                if l.error.as_ref() != Some(&error) {
                    tracing::error!(%folder, error = %e, "the audit log cannot be written");
                    l.error = Some(error);
                }
            }
        }
        self.changed.notify_all();
        l
    }
}

fn numbered(dir: &Path, n: u32) -> PathBuf {
    if n == 0 { dir.join(NAME) } else { dir.join(format!("{NAME}.{n}")) }
}

impl Audit {
    /// How long the last lines may take at an end.
    pub const LAST: Duration = Duration::from_secs(1);

    /// Opens or makes `audit.log` in an existing folder. One that cannot be opened is tried again, and lines wait for it.
    #[must_use]
    pub fn open(dir: &Path) -> Self {
        let file = Mutex::new(LogFile::new(dir));
        let shared = Shared { lines: Mutex::default(), changed: Condvar::new(), file };
        drop(shared.write(shared.lock()));
        Self { file: Some(Arc::new(shared)) }
    }

    /// To the log only: where there is no state folder (`exec` without an agent).
    #[must_use]
    pub fn log_only() -> Self {
        Self { file: None }
    }

    pub fn write(&self, entry: &Entry) {
        self.write_all(std::slice::from_ref(entry));
    }

    /// All of them, as one piece.
    pub fn write_all(&self, entries: &[Entry]) {
        let mut lines = Vec::new();
        for e in entries {
            tracing::info!(
                target: "audit",
                what = ?e.what, job = e.job.map(tracing::field::display), job_name = %e.job_name,
                reason = e.reason.map(Reason::as_str), uid = e.asked_by.uid, by = e.asked_by.pid,
                exe = e.asked_by.exe.as_ref().map(tracing::field::display), rule = e.asked_by.rule,
                process = e.process.as_ref().map(|p| tracing::field::display(p.id)),
                comm = e.process.as_ref().map(|p| tracing::field::display(&p.comm)),
                signal = e.signal, outcome = e.outcome, detail = %e.detail,
            );
            // A string-keyed struct of strings and numbers always serializes.
            let line = serde_json::to_string(e).unwrap_or_default();
            let _ = writeln!(lines, "{}", escape_json(&line));
        }
        if let Some(file) = &self.file {
            file.add(&lines, entries.len());
        }
    }

    /// Starts the writer if there is something to do and no thread could be made before.
    pub fn retry(&self) {
        if let Some(file) = &self.file {
            file.start(&mut file.lock());
        }
    }

    /// Waits until all that was written before is in the file. False: the disk does not take it, or not within that time.
    pub fn flush(&self, within: Duration) -> bool {
        let Some(file) = &self.file else { return true };
        let waits = |l: &mut Lines| l.error.is_none() && (l.writing.is_some() || !l.unsaved.is_empty());
        let mut l = file.lock();
        file.start(&mut l);
        if !l.started && !l.unsaved.is_empty() {
            // No thread can be made.
            l = file.write(l);
        }
        let l = file.changed.wait_timeout_while(l, within, waits).unwrap_or_else(PoisonError::into_inner).0;
        l.unsaved.is_empty() && l.writing.is_none()
    }

    /// What is wrong, as long as lines wait for the disk.
    #[must_use]
    pub fn error(&self) -> Option<String> {
        let l = self.file.as_ref()?.lock();
        let stuck = l.writing.is_some_and(|(_, since)| since.elapsed() > WRITE_MAX);
        let stuck = stuck.then(|| "the audit log: the disk does not answer".to_owned());
        let error = l.error.clone().or(stuck)?;
        let lost = match l.lost {
            0 => String::new(),
            n => format!(", {n} entries are in the agent's log only"),
        };
        Some(format!("{error}{lost}"))
    }
}

/// Audit logs that were unusable and moved aside, as long as they are there.
#[must_use]
pub fn damaged(dir: &Path) -> Vec<PathBuf> {
    (0..FILES).flat_map(|n| files::damaged(&numbered(dir, n))).collect()
}

impl Drop for Audit {
    fn drop(&mut self) {
        self.flush(Self::LAST);
        if let Some(file) = &self.file {
            file.lock().closed = true;
            file.changed.notify_all();
        }
    }
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

    const SOON: Duration = Duration::from_secs(20);

    /// Nothing can be appended any more without a rotation, which needs the folder where it was.
    fn unwritable(a: &Audit) {
        a.file.as_ref().unwrap().file.lock().unwrap().ensure().unwrap().1 = FILE_MAX;
    }

    fn wait_until(what: &str, done: impl Fn() -> bool) {
        let until = Instant::now() + SOON;
        while !done() {
            assert!(Instant::now() < until, "{what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn written_lines_are_read_back_and_filtered() {
        let d = tempfile::tempdir().unwrap();
        let a = Audit::open(d.path());
        let who = AskedBy { uid: Some(0), ..AskedBy::default() };
        let mut e = Entry::now(What::Signal, who.clone()).outcome(SignalledOutcome::Ended);
        e.job_name = "batch".into();
        a.write_all(&[e.clone(), Entry::request(who, "reload", "done")]);
        assert!(a.flush(SOON));
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
            assert!(a.flush(SOON), "{:?}", a.error());
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

    #[test]
    fn what_cannot_be_written_is_told_and_written_later() {
        let top = tempfile::tempdir().unwrap();
        let (d, away) = (top.path().join("state"), top.path().join("away"));
        std::fs::create_dir(&d).unwrap();
        let a = Audit::open(&d);
        assert_eq!(a.error(), None);
        unwritable(&a);
        std::fs::rename(&d, &away).unwrap();
        a.write(&Entry::request(AskedBy::default(), "first", "y"));
        a.write(&Entry::request(AskedBy::default(), "second", "y"));
        assert!(!a.flush(SOON));
        assert!(a.error().unwrap().contains("audit log"), "{:?}", a.error());
        std::fs::rename(&away, &d).unwrap();
        wait_until("it is written", || a.error().is_none());
        let said: Vec<String> = read(&d, None, None, 10).unwrap().into_iter().map(|e| e.detail).collect();
        assert_eq!(said, ["first", "second"]);
    }

    #[test]
    fn a_disk_that_takes_nothing_costs_so_much_memory_at_most() {
        let d = tempfile::tempdir().unwrap();
        let a = Audit::open(d.path());
        unwritable(&a);
        drop(d);
        let long = Entry::request(AskedBy::default(), "x".repeat(64 << 10), "y");
        for _ in 0..40 {
            a.write(&long);
        }
        assert!(!a.flush(SOON));
        assert!(a.file.as_ref().unwrap().lock().unsaved.len() <= UNSAVED_MAX);
        assert!(a.error().unwrap().contains("entries are in the agent's log only"), "{:?}", a.error());
    }

    #[test]
    fn a_disk_that_does_not_answer_delays_nobody() {
        let d = tempfile::tempdir().unwrap();
        // A FIFO that is full stands for the disk: a write to it does not return.
        let path = d.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR)
            .unwrap();
        let reader = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let size = rustix::pipe::fcntl_setpipe_size(&reader, 4096).unwrap();
        (&reader).write_all(&vec![b'\n'; size]).unwrap();
        let began = Instant::now();
        let a = Audit::open(d.path());
        a.file.as_ref().unwrap().file.lock().unwrap().open = Some((reader.try_clone().unwrap(), 0));
        let long = Entry::request(AskedBy::default(), "x".repeat(64 << 10), "y");
        for _ in 0..40 {
            a.write(&long);
        }
        assert!(!a.flush(Duration::from_millis(50)));
        assert_eq!(a.error(), None, "not so soon");
        let l = a.file.as_ref().unwrap().lock();
        assert!(l.lost > 0 && l.unsaved.len() + l.writing.unwrap().0 <= UNSAVED_MAX, "{}", l.lost);
        drop(l);
        drop(a);
        assert!(began.elapsed() < Audit::LAST * 4, "{:?}", began.elapsed());
    }
}
