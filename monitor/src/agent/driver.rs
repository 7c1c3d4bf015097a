//! The engine, and beside it the recorder that writes down all that the engine is told. Reading goes straight to the
//! engine; every call that changes it goes through here, so nothing is left out of a recording.

use std::ops::Deref;
use std::time::Duration;

use crate::config::Config;
use crate::engine::forest::{Merge, Snapshot};
use crate::engine::{Effect, Engine, ExecJob, JobRecord, Observation, Refused, Settings};
use crate::model::event::Event;
use crate::model::key::Key;
use crate::model::kill::Reason;
use crate::model::schema::{AlertKind, Cause, JobId, KillReport};
use crate::recording::{Frame, Input, Recorder, RecordingError};
use crate::state::State;

pub(super) struct Driver {
    engine: Engine,
    recorder: Option<Recorder>,
}

impl Deref for Driver {
    type Target = Engine;
    fn deref(&self) -> &Engine {
        &self.engine
    }
}

impl Driver {
    pub(super) fn new(settings: Settings, config: &Config, recorder: Option<Recorder>) -> Self {
        let start = Input::Start { settings: Box::new(settings.clone()), config: config.to_toml() };
        let mut me = Self { engine: Engine::new(settings, config), recorder };
        me.note(|| start);
        me
    }

    /// Writes an input down. A recording that cannot be written is given up, the agent goes on.
    fn note(&mut self, input: impl FnOnce() -> Input) {
        if let Some(r) = &mut self.recorder {
            let written = serde_json::to_vec(&input())
                .map_err(|e| e.to_string())
                .and_then(|b| r.write(Frame::Input, &b).map_err(|e| e.to_string()));
            if let Err(error) = written {
                tracing::error!(error, "the recording is given up");
                self.recorder = None;
            }
        }
    }

    /// What is written so far can be read after a SIGKILL.
    pub(super) fn flush(&mut self) {
        if let Some(r) = &mut self.recorder
            && let Err(e) = r.flush()
        {
            tracing::error!(error = %e, "the recording is given up");
            self.recorder = None;
        }
    }

    pub(super) fn finish(&mut self) -> Result<(), RecordingError> {
        self.recorder.take().map_or(Ok(()), Recorder::finish)
    }

    /// A record of the ring, and its bytes.
    pub(super) fn event(&mut self, e: &Event<'_>, bytes: &[u8], fx: &mut Vec<Effect>) {
        if let Some(r) = &mut self.recorder
            && let Err(e) = r.write(Frame::Event, bytes)
        {
            tracing::error!(error = %e, "the recording is given up");
            self.recorder = None;
        }
        self.engine.event(e, fx);
    }

    /// What was saved: of another boot without jobs.
    pub(super) fn restore(&mut self, s: State) {
        self.note(|| Input::RestoreEnforcement(s.enforcement.clone()));
        self.engine.restore_enforcement(s.enforcement);
        self.note(|| Input::RestoreJobs(s.jobs.clone()));
        self.engine.restore_jobs(s.jobs);
    }

    pub(super) fn restore_alerts(
        &mut self,
        alerts: Vec<crate::model::schema::Alert>,
        this_boot: bool,
        now: u64,
        fx: &mut Vec<Effect>,
    ) {
        self.note(|| Input::RestoreAlerts { alerts: alerts.clone(), this_boot, now });
        self.engine.restore_alerts(alerts, this_boot, now, fx);
    }

    pub(super) fn snapshot_started(&mut self, t0: u64) {
        self.note(|| Input::SnapshotStarted { t0 });
        self.engine.snapshot_started(t0);
    }

    pub(super) fn emptied(&mut self, number: u64, alive: bool, now: u64, fx: &mut Vec<Effect>) {
        self.note(|| Input::Emptied { number, alive, now });
        self.engine.emptied(number, alive, now, fx);
    }

    pub(super) fn snapshot(&mut self, snapshot: Snapshot, now: u64, fx: &mut Vec<Effect>) -> Merge {
        self.note(|| Input::Snapshot { snapshot: snapshot.clone(), now });
        self.engine.snapshot(snapshot, now, fx)
    }

    pub(super) fn ready(&mut self, now: u64, fx: &mut Vec<Effect>) {
        self.note(|| Input::Ready { now });
        self.engine.ready(now, fx);
    }

    pub(super) fn observe(&mut self, observation: Observation, now: u64, fx: &mut Vec<Effect>) {
        self.note(|| Input::Observe { observation: observation.clone(), now });
        self.engine.observe(observation, now, fx);
    }

    pub(super) fn tick(&mut self, now: u64, fx: &mut Vec<Effect>) {
        self.note(|| Input::Tick { now });
        self.engine.tick(now, fx);
    }

    pub(super) fn set_clock(&mut self, boot_to_wall_ns: i64) {
        self.note(|| Input::Clock { boot_to_wall_ns });
        self.engine.set_clock(boot_to_wall_ns);
    }

    pub(super) fn register_exec_job(
        &mut self,
        job: ExecJob,
        now: u64,
        fx: &mut Vec<Effect>,
    ) -> Result<JobRecord, Refused> {
        self.note(|| Input::Exec { job: Box::new(job.clone()), now });
        self.engine.register_exec_job(job, now, fx)
    }

    pub(super) fn extend(
        &mut self,
        job: JobId,
        by: Duration,
        now: u64,
        fx: &mut Vec<Effect>,
    ) -> Result<JobRecord, Refused> {
        self.note(|| Input::Extend { job, by, now });
        self.engine.extend(job, by, now, fx)
    }

    pub(super) fn release(&mut self, job: JobId, now: u64, fx: &mut Vec<Effect>) -> Result<(), Refused> {
        self.note(|| Input::Release { job, now });
        self.engine.release(job, now, fx)
    }

    pub(super) fn reload(&mut self, config: &Config, now: u64, fx: &mut Vec<Effect>) {
        self.note(|| Input::Reload { config: config.to_toml(), now });
        self.engine.reload(config, now, fx);
    }

    pub(super) fn kill_started(&mut self, job: JobId, reason: Reason) {
        self.note(|| Input::KillStarted { job, reason });
        self.engine.kill_started(job, reason);
    }

    pub(super) fn kill_finished(
        &mut self,
        job: JobId,
        reason: Reason,
        whole: bool,
        report: Result<&KillReport, &str>,
        now: u64,
        fx: &mut Vec<Effect>,
    ) {
        self.note(|| {
            let report = report.map(|r| Box::new(r.clone())).map_err(str::to_owned);
            Input::KillFinished { job, reason, whole, report, now }
        });
        self.engine.kill_finished(job, reason, whole, report, now, fx);
    }

    pub(super) fn process_killed(
        &mut self,
        root: Key,
        report: Result<&KillReport, &str>,
        now: u64,
        fx: &mut Vec<Effect>,
    ) {
        self.note(|| {
            let report = report.map(|r| Box::new(r.clone())).map_err(str::to_owned);
            Input::ProcessKilled { root, report, now }
        });
        self.engine.process_killed(root, report, now, fx);
    }

    pub(super) fn enforcement(&mut self, on: bool, lasts: Option<Duration>, now: u64, fx: &mut Vec<Effect>) {
        self.note(|| Input::Enforcement { on, lasts, now });
        self.engine.enforcement(on, lasts, now, fx);
    }

    pub(super) fn events_lost(&mut self, n: u64, now: u64, fx: &mut Vec<Effect>) {
        self.note(|| Input::Lost { n, now });
        self.engine.events_lost(n, now, fx);
    }

    pub(super) fn condition(
        &mut self,
        kind: AlertKind,
        wrong: Option<String>,
        now: u64,
        fx: &mut Vec<Effect>,
    ) {
        self.note(|| Input::Condition { kind, wrong: wrong.clone(), now });
        self.engine.condition(kind, wrong, now, fx);
    }

    pub(super) fn set_cause(&mut self, alert: &str, cause: Cause, now: u64, fx: &mut Vec<Effect>) {
        self.note(|| Input::Cause { alert: alert.to_owned(), cause: Box::new(cause.clone()), now });
        self.engine.set_cause(alert, cause, now, fx);
    }

    pub(super) fn free_number(&mut self, now: u64) -> u64 {
        self.note(|| Input::FreeNumber { now });
        self.engine.free_number(now)
    }
}
