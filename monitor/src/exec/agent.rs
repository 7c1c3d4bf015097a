//! The agent as the job's warden: three requests over its control socket, each on a connection of its own.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::options::Options;
use crate::api::{Class, Client, ExecEnd, ExecEnded, ExecRegistered, ExecRequest, ExecSignal};
use crate::contract::JobId;

/// An agent that restarts, or has all its connections taken, is asked again for as long as this.
const PATIENCE: Duration = Duration::from_secs(10);
const AGAIN: Duration = Duration::from_millis(100);

/// A job that the agent holds.
pub(super) struct Agent {
    socket: PathBuf,
    job: JobId,
}

impl Agent {
    /// Registers the held command. Uses a runtime of this thread only, which is gone on return: the caller may still fork.
    pub(super) fn register(o: &Options, pid: u32) -> Result<Self, String> {
        let seconds = |d: Duration| d.as_secs_f64();
        let request = ExecRequest {
            pid,
            name: o.name.clone(),
            timeout_s: o.timeout.map(seconds),
            grace_s: seconds(o.grace),
            signal: o.signal,
            orphan_after_s: Some(seconds(o.orphan_after)),
            keep_orphans: o.keep_orphans,
            cgroup: o.cage.clone(),
            number: None,
        };
        let client = Client::new(&o.socket).map_err(|e| e.to_string())?;
        match client.post::<ExecRegistered>("/v1/exec", &request) {
            Ok(r) => Ok(Self { socket: o.socket.clone(), job: r.job }),
            Err(e) => Err(e.to_string()),
        }
    }

    /// Has the agent end the job, or let it go. Answered when that is over.
    pub(super) async fn end(&self, o: &Options, timed_out: bool) -> Result<ExecEnded, String> {
        let end = ExecEnd {
            job: self.job,
            timed_out,
            keep: o.keep_orphans && !timed_out,
            after_s: if timed_out { 0.0 } else { o.orphan_after.as_secs_f64() },
            grace_s: o.grace.as_secs_f64(),
            signal: o.signal,
        };
        self.ask("/v1/exec/end", end).await
    }

    pub(super) async fn pass(&self, signal: u8) -> Result<usize, String> {
        self.ask("/v1/exec/signal", ExecSignal { job: self.job, signal }).await
    }

    /// Asked from a thread of its own: the client blocks. Nothing is forked any more by now.
    async fn ask<A>(&self, path: &'static str, question: impl Serialize) -> Result<A, String>
    where
        A: DeserializeOwned + Send + 'static,
    {
        let question = serde_json::to_value(question).map_err(|e| e.to_string())?;
        let socket = self.socket.clone();
        let asked = tokio::task::spawn_blocking(move || {
            let client = Client::new(&socket).map_err(|e| e.to_string())?;
            let until = Instant::now() + PATIENCE;
            loop {
                match client.post(path, &question) {
                    Err(e) if e.class() == Class::Unavailable && Instant::now() < until => {
                        std::thread::sleep(AGAIN);
                    }
                    answer => return answer.map_err(|e| e.to_string()),
                }
            }
        });
        asked.await.map_err(|e| e.to_string())?
    }
}
