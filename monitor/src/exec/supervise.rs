//! The life of the command: its signals, its stops, its deadline, its end.

use std::io;
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitOptions, getpgid, getpgrp, getpid, kill_process, waitpid};
use tokio::time::Instant;

use super::options::Options;
use super::signals::{Came, Signals, Stream};
use super::terminal::Terminal;
use super::{Warden, alone};
use crate::api::ExecEnded;
use crate::model::event::WaitStatus;
use crate::model::schema::KillReport;
use crate::output::error_line;
use crate::sources::proc::Proc;

/// A command that stops for the terminal is looked at again after this long: Ctrl-Z stops and continues the whole group, and
/// this process may be told of the command's stop when all go on already.
const STOP_LOOK: Duration = Duration::from_millis(50);

pub(super) struct Supervisor<'a> {
    o: &'a Options,
    pid: Pid,
    warden: &'a Warden,
    signals: &'a Signals,
    terminal: &'a Terminal,
    status: Option<WaitStatus>,
    trouble: Vec<String>,
}

/// How it went.
pub(super) struct Followed {
    /// None: the command has not ended.
    pub status: Option<WaitStatus>,
    pub timed_out: bool,
    /// The job was ended, or let go; else its warden must do it.
    pub ended: bool,
    pub kill: Option<KillReport>,
    /// What went wrong on jobwarden's side, for stderr.
    pub trouble: Vec<String>,
}

impl<'a> Supervisor<'a> {
    pub(super) fn new(
        o: &'a Options,
        pid: Pid,
        warden: &'a Warden,
        signals: &'a Signals,
        terminal: &'a Terminal,
    ) -> Self {
        Self { o, pid, warden, signals, terminal, status: None, trouble: Vec::new() }
    }

    /// Until the command and its job have ended.
    pub(super) fn follow(mut self) -> Followed {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let (timed_out, end) = runtime.and_then(|r| r.block_on(self.live())).unwrap_or_else(|e| {
            self.trouble.push(format!("the command cannot be followed: {e}: its job is ended"));
            (false, None)
        });
        let ended = end.is_some();
        let kill = end.and_then(|e| e.report);
        Followed { status: self.status, timed_out, ended, kill, trouble: self.trouble }
    }

    async fn live(&mut self) -> io::Result<(bool, Option<ExecEnded>)> {
        let stream = self.signals.stream()?;
        let mut deadline = self.o.deadline().map(|t| Instant::now() + t);
        loop {
            let late = tokio::select! {
                // However many signals come.
                biased;
                () = sleep_until(deadline) => true,
                came = stream.next() => {
                    self.signal(came?).await;
                    false
                }
            };
            // The command's end and its deadline at once: it has ended.
            self.reap();
            if self.status.is_some() {
                let ended = self.end(&stream, false).await?;
                return Ok((ended.as_ref().is_some_and(|e| e.timed_out), ended));
            }
            if late {
                match self.end(&stream, true).await? {
                    // Moved by `jobs extend`.
                    Some(ExecEnded { report: None, left_s, .. }) => {
                        deadline = left_s
                            .and_then(|s| Duration::try_from_secs_f64(s).ok())
                            .map(|d| Instant::now() + d.max(Duration::from_millis(1)));
                    }
                    ended => {
                        self.reap();
                        return Ok((true, ended));
                    }
                }
            }
        }
    }

    /// Ends the job while signals are still taken.
    async fn end(&mut self, stream: &Stream, timed_out: bool) -> io::Result<Option<ExecEnded>> {
        let o = self.o;
        if timed_out && o.verbose {
            let (signal, grace) = (crate::model::signal::name(o.signal), o.grace.as_secs_f64());
            error_line(format_args!(
                "jobwarden: the deadline has passed: {signal} to the job, SIGKILL after {grace} s"
            ));
        }
        let warden = self.warden;
        let end = async {
            match warden {
                Warden::Agent(a) => a.end(o, timed_out).await,
                Warden::Alone(a) => a.end(o, timed_out).await,
            }
        };
        tokio::pin!(end);
        let ended = loop {
            tokio::select! {
                ended = &mut end => break ended,
                came = stream.next() => self.signal(came?).await,
            }
        };
        let ended = match ended {
            Ok(e) => Some(e),
            Err(e) => self.without_the_agent(timed_out, e).await,
        };
        if let Some(r) = ended.as_ref().and_then(|e| e.report.as_ref()) {
            self.tell(timed_out, r);
        }
        Ok(ended)
    }

    /// The agent that held the job does not answer: what can still be found of it is ended from here.
    async fn without_the_agent(&mut self, timed_out: bool, why: String) -> Option<ExecEnded> {
        self.trouble.push(format!("the job's end failed: {why}"));
        if !matches!(self.warden, Warden::Agent(_)) || (self.status.is_some() && !timed_out) {
            return None;
        }
        self.trouble.push("what has left the command's family cannot be found any more".into());
        let held = alone::Alone::hold(self.o, self.pid.as_raw_nonzero().get() as u32);
        let ended = match held {
            Ok(a) => a.end(self.o, timed_out).await,
            Err(e) => Err(e.to_string()),
        };
        ended.map_err(|e| self.trouble.push(e)).ok()
    }

    /// What a person wants to know of it.
    fn tell(&self, timed_out: bool, r: &KillReport) {
        if self.o.keep_orphans && !timed_out {
            for s in &r.spared {
                let argv = crate::model::outside::command_line(&s.process.argv);
                error_line(format_args!("jobwarden: {}: {} {argv}", s.why, s.process.id));
            }
        } else if self.o.verbose && !r.signalled.is_empty() {
            let (sent, survivors) = (r.signalled.len(), r.survivors.len());
            error_line(format_args!("jobwarden: {sent} signals sent, {survivors} survivors"));
        }
    }

    async fn signal(&mut self, came: Came) {
        if came.number == libc::SIGCHLD {
            if let Some(by) = self.reap() {
                self.stopped(by).await;
            }
            return;
        }
        // Ctrl-C and the like went to the whole group, so the command has it already.
        if came.by_kernel && self.status.is_none() && getpgid(Some(self.pid)).is_ok_and(|g| g == getpgrp()) {
            return;
        }
        let number = came.number as u8;
        let passed = match self.warden {
            Warden::Agent(a) => a.pass(number).await,
            Warden::Alone(a) => a.pass(self.o, number),
        };
        if let Err(e) = passed {
            // CMD at least: not reaped, so its pid is its own.
            if let Some(signal) = Signal::from_named_raw(came.number).filter(|_| self.status.is_none()) {
                let _ = kill_process(self.pid, signal);
            }
            self.trouble.push(format!(
                "{} was passed on to the command only: {e}",
                crate::model::signal::name(number)
            ));
        }
    }

    /// Takes the command's status if it has ended; gives the signal that stopped it if one just did.
    fn reap(&mut self) -> Option<i32> {
        if self.status.is_some() {
            return None;
        }
        let (_, s) = waitpid(Some(self.pid), WaitOptions::NOHANG | WaitOptions::UNTRACED).ok().flatten()?;
        if s.stopped() {
            return s.stopping_signal();
        }
        self.status = Some(WaitStatus(s.as_raw()));
        None
    }

    /// A command that stops itself for the terminal (and not by Ctrl-Z, which stops this process too) would leave the shell
    /// waiting: this process stops with it, and takes it along when it goes on.
    async fn stopped(&self, by: i32) {
        if !self.terminal.is_there() || ![libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU].contains(&by) {
            return;
        }
        tokio::time::sleep(STOP_LOOK).await;
        let pid = self.pid.as_raw_nonzero().get() as u32;
        if Proc::default().stat(pid).is_ok_and(|s| s.state == b'T') {
            // Neither fails: this process, and a child that is not reaped.
            let _ = kill_process(getpid(), Signal::STOP);
            let _ = kill_process(self.pid, Signal::CONT);
        }
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(d) => tokio::time::sleep_until(d).await,
        None => std::future::pending().await,
    }
}
