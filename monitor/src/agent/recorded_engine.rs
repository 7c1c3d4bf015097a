//! The engine with its recorder. Queries go straight to the engine; every input passes [`RecordedEngine::handle`], so a recording
//! leaves nothing out.

use std::ops::Deref;

use crate::config::Config;
use crate::engine::{Answer, Engine, Input, Output, Settings};
use crate::recording::{Recorder, RecordingError};

pub(super) struct RecordedEngine {
    engine: Engine,
    recorder: Option<Recorder>,
}

impl Deref for RecordedEngine {
    type Target = Engine;
    fn deref(&self) -> &Engine {
        &self.engine
    }
}

impl RecordedEngine {
    pub(super) fn new(settings: Settings, config: &Config, recorder: Option<Recorder>) -> Self {
        let mut new = Self { engine: Engine::new(settings.clone(), config), recorder };
        new.record(|r| r.header(&settings, config));
        new
    }

    /// Records the input, then hands it to the engine.
    pub(super) fn handle(&mut self, input: Input<'_>, now: u64, out: &mut Output) -> Answer {
        if self.recorder.is_some() {
            self.record(|r| r.input(&input, now));
        }
        self.engine.handle(input, now, out)
    }

    /// What is written so far can be read after a SIGKILL.
    pub(super) fn flush(&mut self) {
        self.record(Recorder::flush);
    }

    pub(super) fn finish(&mut self) -> Result<(), RecordingError> {
        self.recorder.take().map_or(Ok(()), Recorder::finish)
    }

    /// A recording that cannot be written ends; the agent goes on.
    fn record(&mut self, write: impl FnOnce(&mut Recorder) -> Result<(), RecordingError>) {
        if let Some(r) = &mut self.recorder
            && let Err(error) = write(r)
        {
            tracing::error!(%error, "recording stopped");
            self.recorder = None;
        }
    }
}
