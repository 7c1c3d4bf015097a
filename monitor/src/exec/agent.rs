//! The agent as the job's warden: three requests over its control socket, each on a connection of its own.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::oneshot;

use super::options::Options;
use crate::api::{Class, ExecEnd, ExecEnded, ExecRegistered, ExecRequest, ExecSignal};
use crate::client::Client;
use crate::model::schema::JobId;

/// An agent that restarts, or has all its connections taken, is asked again for as long as this.
const PATIENCE: Duration = Duration::from_secs(10);
const AGAIN: Duration = Duration::from_millis(100);

/// A job that the agent holds.
pub(super) struct Agent {
    job: JobId,
    ends: Sender<Question>,
    signals: Sender<Question>,
}

impl Agent {
    /// Registers the held command. If that fails, no thread has been made: the caller may still fork.
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
        let job = client.post::<ExecRegistered>("/v1/exec", &request).map_err(|e| e.to_string())?.job;
        // The client blocks, so it gets a thread; now, since a bomb may take the last one that the cgroup allows. Two, so that
        // a signal is passed on while the end is waited for.
        let ask = || -> Result<Sender<Question>, String> {
            let client = Client::new(&o.socket).map_err(|e| e.to_string())?;
            let (tx, rx) = channel();
            std::thread::Builder::new()
                .name("jobwarden-ask".into())
                .spawn(move || asker(&client, &rx))
                .map_err(|e| e.to_string())?;
            Ok(tx)
        };
        let (ends, signals) = (ask()?, ask()?);
        Ok(Self { job, ends, signals })
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
        ask(&self.ends, "/v1/exec/end", end).await
    }

    pub(super) async fn pass(&self, signal: u8) -> Result<usize, String> {
        ask(&self.signals, "/v1/exec/signal", ExecSignal { job: self.job, signal }).await
    }
}

async fn ask<A: DeserializeOwned>(
    asker: &Sender<Question>,
    path: &'static str,
    question: impl Serialize,
) -> Result<A, String> {
    let question = serde_json::to_value(question).map_err(|e| e.to_string())?;
    let (tx, rx) = oneshot::channel();
    let gone = || "the thread that asks the agent is gone".to_owned();
    asker.send((path, question, tx)).map_err(|_| gone())?;
    let answer = rx.await.map_err(|_| gone())??;
    serde_json::from_value(answer).map_err(|e| format!("an answer that is none of ours: {e}"))
}

type Question = (&'static str, Value, oneshot::Sender<Result<Value, String>>);

/// Answers questions until nobody can put one any more.
fn asker(client: &Client, questions: &Receiver<Question>) {
    while let Ok((path, question, answer)) = questions.recv() {
        let until = Instant::now() + PATIENCE;
        let said = loop {
            match client.post::<Value>(path, &question) {
                Err(e) if e.class() == Class::Unavailable && Instant::now() < until => {
                    std::thread::sleep(AGAIN);
                }
                said => break said.map_err(|e| e.to_string()),
            }
        };
        // Who asked may have given up.
        let _ = answer.send(said);
    }
}
