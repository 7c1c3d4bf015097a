//! `--report F`: how the command ended and what its end took, as JSON.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, SystemTime};

use serde::Serialize;

use super::options::{ExecError, Options};
use super::status::Finish;
use crate::model::event::WaitStatus;
use crate::model::outside::{OutsideText, escape_json};
use crate::model::schema::{Exit, KillReport};
use crate::output::error_line;

/// The file, made before the command starts, so that a path that cannot be written stops it.
pub(super) struct Report {
    file: File,
    started: SystemTime,
}

/// How it came out.
pub(super) struct Ended<'a> {
    pub options: &'a Options,
    pub pid: u32,
    pub status: Option<WaitStatus>,
    pub timed_out: bool,
    pub finish: Finish,
    pub kill: Option<KillReport>,
    pub took: Duration,
}

#[derive(Serialize)]
struct Body<'a> {
    name: &'a str,
    command: Vec<OutsideText>,
    pid: u32,
    /// RFC 3339, UTC.
    started: String,
    took_s: f64,
    timed_out: bool,
    /// Of the command; null = it did not end.
    exit: Option<Exit>,
    /// Of `exec` itself, as a shell shows it.
    exit_status: u8,
    /// What was done to the job; null = nothing was left to do.
    kill: Option<KillReport>,
}

impl Report {
    pub(super) fn create(path: &Path) -> Result<Self, ExecError> {
        let file = File::create(path).map_err(ExecError::io("write the report"))?;
        Ok(Self { file, started: SystemTime::now() })
    }

    pub(super) fn write(mut self, e: &Ended<'_>) {
        use std::os::unix::ffi::OsStrExt as _;
        let exit = e.status.map(|s| match s.signal() {
            Some(n) => Exit::Signal { signal: crate::model::signal::name(n), core: s.core(), sender: None },
            None => Exit::Code { code: s.code().unwrap_or_default() },
        });
        let body = Body {
            name: &e.options.name,
            command: e.options.command.iter().map(|a| OutsideText::from_bytes(a.as_bytes())).collect(),
            pid: e.pid,
            started: humantime::format_rfc3339_micros(self.started).to_string(),
            took_s: e.took.as_secs_f64(),
            timed_out: e.timed_out,
            exit,
            exit_status: e.finish.shown(),
            kill: e.kill.clone(),
        };
        let written = serde_json::to_string(&body)
            .map_err(std::io::Error::from)
            .and_then(|json| self.file.write_all(format!("{}\n", escape_json(&json)).as_bytes()));
        if let Err(e) = written {
            error_line(format_args!("jobwarden: the report cannot be written: {e}"));
        }
    }
}
