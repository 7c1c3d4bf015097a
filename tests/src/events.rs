//! `jobwarden events --json`, read live.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use jobwarden::model::schema::EventLine;

use crate::agent::Agent;
use crate::fixture::Fixture;
use crate::wait::{eventually, ms};

/// A running `events`; it ends when dropped.
pub struct Events {
    child: Child,
    lines: Arc<Mutex<Vec<EventLine>>>,
    broken: Arc<Mutex<Vec<String>>>,
}

impl Events {
    /// Starts it, and returns when it is known to deliver.
    pub fn start(fixture: &Fixture, agent: &Agent<'_>) -> Result<Self> {
        let mut c = agent.command(&["events", "--json"])?;
        let mut child = c.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let stdout = child.stdout.take().context("no stdout")?;
        let (lines, broken) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(Vec::new())));
        let (good, bad) = (lines.clone(), broken.clone());
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                match serde_json::from_str(&line) {
                    Ok(e) => good.lock().unwrap_or_else(PoisonError::into_inner).push(e),
                    Err(e) => bad.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{e}: {line}")),
                }
            }
        });
        let events = Self { child, lines, broken };
        let marker = format!("marker-{}", fixture.tag);
        eventually("the first event", ms(5000), || {
            fixture.command("/bin/true").arg(&marker).status()?;
            ensure!(
                events.any(|e| e.process.as_ref().is_some_and(|p| p.argv.iter().any(|a| *a == marker))),
                "no marker among {} events; odd lines: {:?}",
                events.all().len(),
                events.odd()
            );
            Ok(())
        })?;
        Ok(events)
    }

    /// All so far.
    #[must_use]
    pub fn all(&self) -> Vec<EventLine> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Lines that were no events.
    #[must_use]
    pub fn odd(&self) -> Vec<String> {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn any(&self, f: impl Fn(&EventLine) -> bool) -> bool {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).iter().any(f)
    }

    /// Events of one pid so far, in order.
    #[must_use]
    pub fn of(&self, pid: u32) -> Vec<EventLine> {
        self.all().into_iter().filter(|e| e.process.as_ref().is_some_and(|p| p.pid == pid)).collect()
    }

    /// Waits for the first event of this kind and pid.
    pub fn wait(&self, kind: &str, pid: u32) -> Result<EventLine> {
        self.wait_within(kind, pid, ms(5000))
    }

    pub fn wait_within(&self, kind: &str, pid: u32, within: Duration) -> Result<EventLine> {
        eventually(&format!("{kind} of {pid}"), within, || {
            let of = self.of(pid);
            of.iter().find(|e| e.kind == kind).cloned().with_context(|| format!("only {of:?}"))
        })
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
