//! Where a CPython process is in its source, by the `py-spy` crate: its memory is read while it goes on; it is neither
//! stopped nor changed. Without the feature `python` there are no frames.
//!
//! py-spy follows pointers and sizes that stand in the other process's memory, and that process may be hostile: what
//! makes it panic is caught, but a size that makes it ask for too much memory would abort. So the program runs itself
//! once more for it, as a helper with bounded memory and time, where its `main` answers to that.

use std::time::Duration;

use crate::model::schema::Evidence;
use crate::sources::proc::Proc;

/// The frames of one thread, innermost first. Empty: not CPython, no such thread, or not within `limit`.
#[cfg(not(feature = "python"))]
pub(super) fn frames(_proc: &Proc, _pid: u32, _tid: u32, _limit: Duration) -> Vec<Evidence> {
    Vec::new()
}

#[cfg(feature = "python")]
pub(super) use spy::frames;

/// To be called first thing in `main`: does the helper's work if this process is the helper, and gives its exit status.
/// Otherwise None, and from then on helpers are used instead of a thread.
#[must_use]
pub fn helper_main() -> Option<std::process::ExitCode> {
    #[cfg(feature = "python")]
    return spy::helper_main();
    #[cfg(not(feature = "python"))]
    None
}

/// The innermost frame that is not of Python's own library, in words.
pub(super) fn where_it_is(frames: &[Evidence]) -> Option<String> {
    let own = |e: &&Evidence| matches!(e, Evidence::Python { file, .. } if !file.contains("/lib/python") && !file.starts_with('<'));
    let Evidence::Python { file, line, function, source, .. } = frames.iter().find(own).or(frames.first())?
    else {
        return None;
    };
    let source = source.as_ref().map_or_else(String::new, |s| format!(": {s}"));
    Some(format!("{file}:{line} in {function}{source}"))
}

#[cfg(feature = "python")]
mod spy {
    use std::io::Read as _;
    use std::os::unix::fs::MetadataExt as _;
    use std::os::unix::process::CommandExt as _;
    use std::path::Path;
    use std::process::{Command, ExitCode, Stdio};
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::sync::mpsc;

    use rustix::fs::{Mode, OFlags, ResolveFlags};

    use super::{Duration, Evidence, Proc};

    const FRAMES: usize = 10;
    /// Looks that may be under way at once; one that hangs (on a file server that is gone) is left to itself.
    const AT_ONCE: usize = 2;
    /// Bytes of a source file that are read, and of a line that are shown.
    const SOURCE: u64 = 2 << 20;
    const LINE: usize = 160;

    /// The helper's name, by which it knows itself.
    const HELPER: &str = "jobwarden-python-frames";
    /// Bytes of address space that the helper may have: it maps the interpreter's files.
    const HELPER_MEMORY: u64 = 2 << 30;

    /// Whether `main` answers to [`HELPER`].
    static HAS_HELPER: AtomicBool = AtomicBool::new(false);
    static UNDER_WAY: AtomicUsize = AtomicUsize::new(0);

    struct Slot;

    impl Slot {
        fn take() -> Option<Self> {
            let slot = Self;
            (UNDER_WAY.fetch_add(1, Ordering::AcqRel) < AT_ONCE).then_some(slot)
        }
    }

    impl Drop for Slot {
        fn drop(&mut self) {
            UNDER_WAY.fetch_sub(1, Ordering::AcqRel);
        }
    }

    pub(in super::super) fn frames(proc: &Proc, pid: u32, tid: u32, limit: Duration) -> Vec<Evidence> {
        // py-spy reads /proc itself, wherever `proc` points.
        if limit.is_zero() || proc.root() != Path::new("/proc") || !is_python(proc, pid) {
            return Vec::new();
        }
        let Some(slot) = Slot::take() else { return Vec::new() };
        let (send, receive) = mpsc::channel();
        let proc = proc.clone();
        let spawned = std::thread::Builder::new().name("python-frames".into()).spawn(move || {
            let _slot = slot;
            let frames = if HAS_HELPER.load(Ordering::Acquire) {
                ask_helper(pid, tid, limit)
            } else {
                std::panic::catch_unwind(|| look(&proc, pid, tid)).ok().flatten()
            };
            // The receiver may have given up by now.
            let _ = send.send(frames.unwrap_or_default());
        });
        if spawned.is_err() {
            return Vec::new();
        }
        receive.recv_timeout(limit).unwrap_or_default()
    }

    fn ask_helper(pid: u32, tid: u32, limit: Duration) -> Option<Vec<Evidence>> {
        let seconds = limit.as_secs() + 1;
        let done = Command::new("/proc/self/exe")
            .arg0(HELPER)
            .args([pid.to_string(), tid.to_string(), seconds.to_string()])
            .env_clear()
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output();
        serde_json::from_slice(&done.ok()?.stdout).ok()
    }

    pub(super) fn helper_main() -> Option<ExitCode> {
        let mut args = std::env::args();
        if args.next().as_deref() != Some(HELPER) {
            HAS_HELPER.store(true, Ordering::Release);
            return None;
        }
        let mut number = || args.next()?.parse::<u32>().ok();
        let (Some(pid), Some(tid), Some(seconds)) = (number(), number(), number()) else {
            return Some(ExitCode::from(2));
        };
        let limit = |current| rustix::process::Rlimit { current: Some(current), maximum: Some(current) };
        // Neither can fail: both only lower a limit of its own.
        let _ = rustix::process::setrlimit(rustix::process::Resource::As, limit(HELPER_MEMORY));
        let _ = rustix::process::setrlimit(rustix::process::Resource::Core, limit(0));
        // SAFETY: alarm has no preconditions. Nobody here handles SIGALRM: it ends the process.
        unsafe { libc::alarm(seconds) };
        let frames = look(&Proc::default(), pid, tid).and_then(|f| serde_json::to_string(&f).ok());
        let Some(text) = frames else { return Some(ExitCode::FAILURE) };
        let printed = crate::output::print(&format!("{text}\n"));
        Some(if printed.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    /// The interpreter itself, or a program that embeds it.
    fn is_python(proc: &Proc, pid: u32) -> bool {
        let exe = proc.exe(pid).unwrap_or_default();
        let name = exe.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.starts_with("python") || name.starts_with("uwsgi") || proc.maps(pid, "/libpython")
    }

    fn look(proc: &Proc, pid: u32, tid: u32) -> Option<Vec<Evidence>> {
        let config =
            py_spy::Config { blocking: py_spy::config::LockingStrategy::NonBlocking, ..Default::default() };
        let mut spy = py_spy::PythonSpy::new(i32::try_from(pid).ok()?, &config).ok()?;
        // What was changed while it was read gives an error: once more, then.
        let traces = spy.get_stack_traces().or_else(|_| spy.get_stack_traces()).ok()?;
        let of = |t: &py_spy::StackTrace| t.os_thread_id == Some(u64::from(tid));
        let alone = traces.len() == 1;
        let trace = traces.into_iter().find(|t| of(t) || alone)?;
        let uid = proc.status(pid).ok().and_then(|s| s.uid);
        let evidence = |f: &py_spy::Frame| Evidence::Python {
            thread: u64::from(tid),
            source: uid.and_then(|uid| source(proc, pid, uid, &f.filename, f.line)),
            file: f.filename.clone(),
            line: f.line.max(0) as u32,
            function: f.name.clone(),
        };
        Some(trace.frames.iter().take(FRAMES).map(evidence).collect())
    }

    /// The line of source, as the process itself would find it: in its own root, and only from a regular file that
    /// everybody, or its own user, may read. Its memory names the file, so it must not make the agent show
    /// others' secrets.
    fn source(proc: &Proc, pid: u32, uid: u32, file: &str, line: i32) -> Option<String> {
        let root = std::fs::File::open(proc.path(pid, "root")).ok()?;
        let path = if file.starts_with('/') {
            file.to_owned()
        } else {
            format!("{}/{file}", std::fs::read_link(proc.path(pid, "cwd")).ok()?.to_str()?)
        };
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let within = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let opened = rustix::fs::openat2(&root, path.as_str(), flags, Mode::empty(), within).ok()?;
        let opened = std::fs::File::from(opened);
        let meta = opened.metadata().ok()?;
        let may = meta.mode() & 0o004 != 0 || meta.uid() == uid && meta.mode() & 0o400 != 0;
        if !meta.is_file() || !may {
            return None;
        }
        let mut text = Vec::new();
        opened.take(SOURCE).read_to_end(&mut text).ok()?;
        let n = usize::try_from(line).ok()?.checked_sub(1)?;
        let text = String::from_utf8_lossy(&text);
        Some(text.lines().nth(n)?.trim().chars().take(LINE).collect())
    }
}
