//! The agent as the job's warden: three requests over its control socket, each on a connection of its own.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::oneshot;

use super::options::{ExecError, Options};
use crate::api::{Class, ExecEnd, ExecEnded, ExecRegistered, ExecRequest, ExecSignal};
use crate::client::{Client, ClientError};
use crate::model::schema::JobId;
use crate::sources::host::boot_now;

/// An agent that restarts, or has all its connections taken, is asked again for as long as this.
const PATIENCE: Duration = Duration::from_secs(10);
const AGAIN: Duration = Duration::from_millis(100);
/// How long a registration may take. After that `exec` goes on without the agent.
pub(crate) const REGISTRATION: Duration = Duration::from_secs(1);
/// How long the agent may leave a ping unanswered while it ends the job.
const SILENCE: Duration = Duration::from_secs(3);
/// How long the passing on of a signal may take.
const PASS: Duration = Duration::from_secs(1);
/// How long the agent may take for an end, besides delay and grace.
const END: Duration = Duration::from_mins(1);

/// A job that the agent holds.
pub(super) struct Agent {
    job: JobId,
    ends: Sender<Question>,
    signals: Sender<Question>,
}

/// Why the agent does not hold the job.
pub(super) enum NotRegistered {
    /// No thread has been made, so the caller may still fork. `silent`: there is an agent, which does not answer.
    NoAgent {
        why: String,
        silent: bool,
    },
    Failed(ExecError),
}

impl Agent {
    /// Registers the held command.
    pub(super) fn register(o: &Options, pid: u32) -> Result<Self, NotRegistered> {
        let seconds = |d: Duration| d.as_secs_f64();
        let client =
            || Client::new(&o.socket).map(|c| c.silence(SILENCE)).map_err(ExecError::io("make a runtime"));
        let registrar = client().map_err(NotRegistered::Failed)?;
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
            asked_at: Some(boot_now()),
        };
        let job = match registrar.post_within::<ExecRegistered>("/v1/exec", &request, REGISTRATION) {
            Ok(r) => r.job,
            Err(e) => {
                let silent = matches!(e, ClientError::Silent { .. });
                return Err(NotRegistered::NoAgent { why: e.to_string(), silent });
            }
        };
        // The client blocks, so it gets a thread; now, since a bomb may take the last one that the cgroup allows. Two, so that
        // a signal is passed on while the end is waited for.
        let ask = || -> Result<Sender<Question>, ExecError> {
            let client = client()?;
            let (tx, rx) = channel();
            std::thread::Builder::new()
                .name("jobwarden-ask".into())
                .spawn(move || asker(&client, &rx))
                .map_err(ExecError::io("make a thread"))?;
            Ok(tx)
        };
        let made = || Ok(Self { job, ends: ask()?, signals: ask()? });
        made().map_err(NotRegistered::Failed)
    }

    /// Has the agent end the job, or let it go. Answered when that is over.
    pub(super) async fn end(&self, o: &Options, timed_out: bool) -> Result<ExecEnded, String> {
        let delay = if timed_out { Duration::ZERO } else { o.orphan_after };
        let end = ExecEnd {
            job: self.job,
            timed_out,
            keep: o.keep_orphans && !timed_out,
            after_s: delay.as_secs_f64(),
            grace_s: o.grace.as_secs_f64(),
            signal: o.signal,
        };
        let within = delay.saturating_add(o.grace).saturating_add(END);
        ask(&self.ends, "/v1/exec/end", end, within, PATIENCE).await
    }

    pub(super) async fn pass(&self, signal: u8) -> Result<usize, String> {
        let asked =
            ask(&self.signals, "/v1/exec/signal", ExecSignal { job: self.job, signal }, PASS, Duration::ZERO);
        // The thread may still be busy with the one before.
        tokio::time::timeout(PASS, asked).await.unwrap_or_else(|_| Err("the agent does not answer".into()))
    }
}

async fn ask<A: DeserializeOwned>(
    asker: &Sender<Question>,
    path: &'static str,
    body: impl Serialize,
    within: Duration,
    patience: Duration,
) -> Result<A, String> {
    let body = serde_json::to_value(body).map_err(|e| e.to_string())?;
    let (answer, rx) = oneshot::channel();
    let gone = || "the thread that asks the agent is gone".to_owned();
    asker.send(Question { path, body, within, patience, answer }).map_err(|_| gone())?;
    let answer = rx.await.map_err(|_| gone())??;
    serde_json::from_value(answer).map_err(|e| format!("an answer that is none of ours: {e}"))
}

struct Question {
    path: &'static str,
    body: Value,
    within: Duration,
    /// How long an agent that is not there is asked again.
    patience: Duration,
    answer: oneshot::Sender<Result<Value, String>>,
}

/// Answers questions until nobody can put one any more.
fn asker(client: &Client, questions: &Receiver<Question>) {
    while let Ok(q) = questions.recv() {
        let until = Instant::now() + q.patience;
        let said = loop {
            match client.post_within::<Value>(q.path, &q.body, q.within) {
                // One that is there and hangs was waited for.
                Err(e)
                    if e.class() == Class::Unavailable
                        && !matches!(e, ClientError::Silent { .. })
                        && Instant::now() < until =>
                {
                    std::thread::sleep(AGAIN);
                }
                said => break said.map_err(|e| e.to_string()),
            }
        };
        // The one that asked may have given up.
        let _ = q.answer.send(said);
    }
}
