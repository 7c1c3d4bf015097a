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
    let own = |e: &&Evidence| matches!(e, Evidence::Python { file, .. } if !file.raw().contains("/lib/python") && !file.raw().starts_with('<'));
    let Evidence::Python { file, line, function, source, .. } = frames.iter().find(own).or(frames.first())?
    else {
        return None;
    };
    let source = source.as_ref().map_or_else(String::new, |s| format!(": {s}"));
    Some(format!("{file}:{line} in {function}{source}"))
}

#[cfg(feature = "python")]
mod spy {
    use std::os::unix::process::CommandExt as _;
    use std::path::Path;
    use std::process::{Command, ExitCode, Stdio};
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::super::source;
    use super::{Duration, Evidence, Proc};
    use crate::sources::proc::blocking;

    const FRAMES: usize = 10;

    /// The helper's name, by which it knows itself.
    const HELPER: &str = "jobwarden-python-frames";
    /// Bytes of address space that the helper may have: it maps the interpreter's files.
    const HELPER_MEMORY: u64 = 2 << 30;

    /// Whether `main` answers to [`HELPER`].
    static HAS_HELPER: AtomicBool = AtomicBool::new(false);

    pub(in super::super) fn frames(proc: &Proc, pid: u32, tid: u32, limit: Duration) -> Vec<Evidence> {
        // py-spy reads /proc itself, wherever `proc` points.
        if limit.is_zero() || proc.root() != Path::new("/proc") || !is_python(proc, pid) {
            return Vec::new();
        }
        let Some(before) = proc.may_inspect(pid) else { return Vec::new() };
        let dir = proc.path(pid, "");
        let ask = move || {
            let frames =
                if HAS_HELPER.load(Ordering::Acquire) { ask_helper(pid, tid, limit) } else { look(pid, tid) };
            Ok(frames.unwrap_or_default())
        };
        let Ok(mut frames) = blocking::run(pid, "Python frames", &dir, limit, ask) else { return Vec::new() };
        let (reader, bare) = (proc.clone(), frames.clone());
        let sources = move || Ok(bare.iter().map(|f| line_of(&reader, pid, f)).collect::<Vec<_>>());
        // Without its lines where that takes too long.
        if let Ok(lines) = blocking::run(pid, "source files", &dir, blocking::LIMIT, sources) {
            for (frame, line) in frames.iter_mut().zip(lines) {
                if let Evidence::Python { source, .. } = frame {
                    *source = line.map(Into::into);
                }
            }
        }
        // It may have executed a program of another user meanwhile, and the pid may be another process's.
        if proc.may_inspect(pid) == Some(before) { frames } else { Vec::new() }
    }

    fn line_of(proc: &Proc, pid: u32, frame: &Evidence) -> Option<String> {
        let Evidence::Python { file, line, .. } = frame else { return None };
        source::line(proc, pid, file.raw(), *line)
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
        let frames = look(pid, tid).and_then(|f| serde_json::to_vec(&f).ok());
        let Some(text) = frames else { return Some(ExitCode::FAILURE) };
        let printed = crate::output::print(&format!("{}\n", String::from_utf8_lossy(&text)));
        Some(if printed.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    /// The interpreter itself, or a program that embeds it.
    fn is_python(proc: &Proc, pid: u32) -> bool {
        let exe = proc.exe(pid).unwrap_or_default();
        let name = exe.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.starts_with("python") || name.starts_with("uwsgi") || proc.maps(pid, "/libpython")
    }

    /// Whether each library that py-spy would open by its path in the process's root is a plain file that the process itself may
    /// read: no FIFO, no device. (Its executable is opened by /proc/PID/exe, which is the file that is being run.)
    ///
    /// Race: the name may be another file's by the time that py-spy opens it; then the helper opens that one, and shows nothing of it.
    fn libraries_are_files(proc: &Proc, pid: u32) -> bool {
        let Ok(maps) = std::fs::read_to_string(proc.path(pid, "maps")) else { return false };
        let mut libraries: Vec<&str> =
            maps.lines().filter_map(|l| l.find('/').and_then(|at| l.get(at..))).collect();
        libraries.retain(|path| path.contains("/libpython"));
        libraries.dedup();
        libraries.into_iter().all(|path| source::is_file(proc, pid, path))
    }

    fn look(pid: u32, tid: u32) -> Option<Vec<Evidence>> {
        if !libraries_are_files(&Proc::default(), pid) {
            return None;
        }
        let config = py_spy::Config {
            blocking: py_spy::config::LockingStrategy::NonBlocking,
            // Short names are made by looking for `__init__.py` along paths that the process chose.
            full_filenames: true,
            ..Default::default()
        };
        let mut spy = py_spy::PythonSpy::new(i32::try_from(pid).ok()?, &config).ok()?;
        // What was changed while it was read gives an error: once more, then.
        let traces = spy.get_stack_traces().or_else(|_| spy.get_stack_traces()).ok()?;
        let of = |t: &py_spy::StackTrace| t.os_thread_id == Some(u64::from(tid));
        let alone = traces.len() == 1;
        let trace = traces.into_iter().find(|t| of(t) || alone)?;
        let evidence = |f: &py_spy::Frame| Evidence::Python {
            thread: u64::from(tid),
            source: None,
            file: f.filename.as_str().into(),
            line: f.line.max(0) as u32,
            function: f.name.as_str().into(),
        };
        Some(trace.frames.iter().take(FRAMES).map(evidence).collect())
    }
}
