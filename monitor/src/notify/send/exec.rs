//! A program as a receiver: the webhook's JSON on its standard input, the key fields in its environment. When it has
//! ended, or its time is up, all that it started is ended too.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::process::{ChildStderr, Command};

use super::webhook::Body;
use super::{DeliveryResult, Reason, family, text};
use crate::model::outside::{escape, escape_json, escape_lines};
use crate::model::schema::{Alert, AlertState};

/// Of what the program says on its standard error no more is kept.
const MAX_SAID: usize = 4 * 1024;
/// Characters of one variable.
const MAX_VARIABLE: usize = 4 * 1024;

#[derive(Debug)]
pub(in crate::notify) struct Exec {
    command: Vec<String>,
    timeout: Duration,
    runs: AtomicU64,
}

impl Exec {
    pub(super) fn new(command: &[String], timeout: Duration) -> Self {
        Self { command: command.to_vec(), timeout, runs: AtomicU64::new(0) }
    }

    pub(super) async fn run(&self, a: &Alert) -> DeliveryResult {
        let Some((program, args)) = self.command.split_first() else {
            return DeliveryResult::Refused { error: "no program is given".into() };
        };
        let Ok(body) = serde_json::to_string(&Body::of(std::slice::from_ref(a))) else {
            return DeliveryResult::Refused { error: "the alert cannot be written as JSON".into() };
        };
        // The program may print it.
        let body = escape_json(&body).into_owned();
        let mark = family::Mark::new(self.runs.fetch_add(1, Ordering::Relaxed));
        let mut command = Command::new(program);
        command
            .args(args)
            .env_clear()
            .envs(kept())
            .envs(variables(a))
            .env(family::VARIABLE, mark.value())
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        // SAFETY: system calls only.
        unsafe { command.pre_exec(crate::privileges::none) };
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(e) => return DeliveryResult::failed(Reason::Program, format!("{program}: {e}")),
        };
        // It is waited for without being reaped: until its family is ended its number must not become somebody else's.
        let dead = child.id().and_then(|pid| Some((pid, pidfd(pid)?)));
        let Some((pid, dead)) = dead else {
            return DeliveryResult::failed(
                Reason::Program,
                format!("{program}: no pidfd of it could be had, killed"),
            );
        };
        // Both run beside the wait: a program that does not read, and a descendant that holds standard error for ever,
        // must not hold this up.
        let writer = child.stdin.take().map(|mut stdin| {
            tokio::spawn(async move {
                // A program that does not want its input closes it.
                let _ = stdin.write_all(body.as_bytes()).await;
            })
        });
        let reader = child.stderr.take().map(|stderr| tokio::spawn(last_said(stderr)));
        let in_time = tokio::time::timeout(self.timeout, dead.readable()).await.is_ok();
        let left = mark.end(pid).await;
        let status = child.wait().await;
        if let Some(w) = writer {
            w.abort();
        }
        let said = match reader {
            // All who could hold its other end are dead, but for what escaped.
            Some(r) => tokio::time::timeout(Duration::from_millis(200), r)
                .await
                .ok()
                .and_then(Result::ok)
                .unwrap_or_default(),
            None => String::new(),
        };
        let said = if said.is_empty() { said } else { format!(" ({said})") };
        let left = if left == 0 { String::new() } else { format!("; {left} it left behind were ended") };
        match status {
            _ if !in_time => {
                let s = self.timeout.as_secs_f64();
                DeliveryResult::failed(
                    Reason::Timeout,
                    format!("{program}: not ended after {s} s, killed{said}"),
                )
            }
            Ok(status) if status.success() => {
                DeliveryResult::Delivered { answer: format!("{program}: {status}{left}") }
            }
            Ok(status) => DeliveryResult::failed(Reason::Program, format!("{program}: {status}{said}{left}")),
            Err(e) => DeliveryResult::failed(Reason::Program, format!("{program}: {e}")),
        }
    }
}

/// Readable once the process has died, reaped or not.
fn pidfd(pid: u32) -> Option<AsyncFd<OwnedFd>> {
    let pid = rustix::process::Pid::from_raw(pid.cast_signed())?;
    let fd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok()?;
    // SAFETY: the descriptor is owned, so it stays open and the same for as long as the `AsyncFd` has it.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.ok()
}

/// Of the agent's own environment only what a program needs to run.
fn kept() -> impl Iterator<Item = (OsString, OsString)> {
    const KEPT: [&str; 5] = ["PATH", "LANG", "LC_ALL", "TZ", "HOME"];
    std::env::vars_os().filter(|(k, _)| KEPT.iter().any(|kept| k == kept))
}

/// The key fields; no variable holds a control character but line breaks of its own, or is long.
fn variables(a: &Alert) -> Vec<(&'static str, String)> {
    let state = if a.state == AlertState::Resolved { "resolved" } else { "firing" };
    let remedy = a.cause.as_ref().map(|c| c.remedy.clone()).unwrap_or_default();
    let cause = a.cause.as_ref().map(|c| c.summary.clone()).unwrap_or_default();
    let all = [
        ("JOBWARDEN_ALERT_ID", a.id.clone()),
        ("JOBWARDEN_ALERT_KIND", a.kind.to_string()),
        ("JOBWARDEN_ALERT_STATE", state.into()),
        ("JOBWARDEN_ALERT_SEVERITY", a.severity.as_str().into()),
        ("JOBWARDEN_ALERT_SUMMARY", a.summary.clone()),
        ("JOBWARDEN_ALERT_SINCE", a.since.clone()),
        ("JOBWARDEN_ALERT_COUNT", a.count.to_string()),
        ("JOBWARDEN_ALERT_JOB", a.job.map(|j| j.to_string()).unwrap_or_default()),
        ("JOBWARDEN_ALERT_JOB_NAME", a.job_name.clone()),
        ("JOBWARDEN_ALERT_SUBJECT", a.subject.as_ref().map(|s| s.id.to_string()).unwrap_or_default()),
        ("JOBWARDEN_ALERT_CAUSE", cause),
        ("JOBWARDEN_ALERT_REMEDY", remedy),
        ("JOBWARDEN_ALERT_RUNBOOK", text::runbook(a.kind)),
    ];
    all.into_iter().map(|(k, v)| (k, text::clip(&escape_lines(&v), MAX_VARIABLE))).collect()
}

/// The end of what is said, on one line. Reads on, so that the program never blocks on it.
async fn last_said(mut stderr: ChildStderr) -> String {
    let mut kept = Vec::new();
    let mut buf = [0; 4096];
    while let Ok(n @ 1..) = stderr.read(&mut buf).await {
        kept.extend_from_slice(&buf[..n]);
        let over = kept.len().saturating_sub(MAX_SAID);
        kept.drain(..over);
    }
    let text = String::from_utf8_lossy(&kept);
    let line = text.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or_default();
    escape(&text::clip(line.trim(), 200)).into_owned()
}
