//! A recording, told to an engine again: its events, what the policy made of them, and the forest at the end. No probe,
//! no /proc: it replays on any machine.

use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::input::{Input, config};
use super::{Frame, Player, RecordingError};
use crate::config::ConfigError;
use crate::engine::{AlertChange, Effect, Engine, TreeQuery};
use crate::model::event;
use crate::model::schema::{Alert, EventLine, Job, Tree};

/// What a replay tells, in order; as JSON a line each.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Line {
    Event(EventLine),
    Alert {
        kind: &'static str,
        change: AlertChange,
        alert: Box<Alert>,
    },
    /// The last one.
    End {
        kind: &'static str,
        /// The recording breaks off: the agent was killed, or still writes.
        truncated: bool,
        events: u64,
        jobs: Vec<Job>,
        tree: Tree,
    },
}

#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    #[error(transparent)]
    Recording(#[from] RecordingError),
    #[error("{0} holds nothing: the agent was killed before it had begun")]
    Empty(std::path::PathBuf),
    #[error("the recording's config is not understood by this version: {0}")]
    Config(#[from] ConfigError),
    #[error("the recording was made by another version: {0}")]
    Input(#[from] serde_json::Error),
    #[error("the output: {0}")]
    Output(std::io::Error),
}

/// Replays the file. `speed`: how many times as fast as it happened; None: as fast as it goes.
pub fn replay(
    path: &Path,
    speed: Option<f64>,
    out: &mut dyn FnMut(Line) -> std::io::Result<()>,
) -> Result<(), ReplayError> {
    let mut player = Player::open(path)?;
    let first =
        player.next_frame().filter(|(f, _)| *f == Frame::Input).map(|(_, b)| serde_json::from_slice(b));
    let Some(Input::Start { settings, config: text }) = first.transpose()? else {
        return Err(ReplayError::Empty(path.to_owned()));
    };
    let mut engine = Engine::new(*settings, &config(&text)?);
    let mut pace = speed.map(Pace::new);
    let (mut fx, mut events, mut last) = (Vec::new(), 0, 0);
    while let Some((frame, payload)) = player.next_frame() {
        match frame {
            Frame::Event => {
                let Ok(e) = event::decode(payload) else { continue };
                if let Some(p) = &mut pace {
                    p.wait(e.at);
                }
                let moment = engine.moment(&e);
                let before = engine.jobs_of(e.process);
                engine.event(&e, &mut fx);
                let jobs = if before.is_empty() { engine.jobs_of(e.process) } else { before };
                let line = engine.event_line(&e, &moment, jobs.first().copied());
                (events, last) = (events + 1, last.max(e.at));
                out(Line::Event(line)).map_err(ReplayError::Output)?;
            }
            Frame::Input => {
                let input: Input = serde_json::from_slice(payload)?;
                if let Input::Tick { now } | Input::Observe { now, .. } | Input::Snapshot { now, .. } = &input
                {
                    last = last.max(*now);
                }
                input.replay(&mut engine, &mut fx)?;
            }
        }
        for f in fx.drain(..) {
            if let Effect::Alert { change, alert } = f {
                out(Line::Alert { kind: "alert", change, alert }).map_err(ReplayError::Output)?;
            }
        }
    }
    let tree = engine.tree(&TreeQuery { all: true, ..TreeQuery::default() }, last).unwrap_or_else(|_| Tree {
        at: String::new(),
        host: String::new(),
        processes: Vec::new(),
        unread: Vec::new(),
    });
    let end = Line::End { kind: "end", truncated: player.truncated(), events, jobs: engine.jobs(), tree };
    out(end).map_err(ReplayError::Output)
}

/// Holds events back to the time at which they happened, times a factor.
struct Pace {
    speed: f64,
    began: Instant,
    first: Option<u64>,
}

impl Pace {
    fn new(speed: f64) -> Self {
        Self { speed: speed.max(1e-6), began: Instant::now(), first: None }
    }

    fn wait(&mut self, at: u64) {
        let first = *self.first.get_or_insert(at);
        let due = Duration::from_secs_f64(at.saturating_sub(first) as f64 / 1e9 / self.speed);
        if let Some(left) = due.checked_sub(self.began.elapsed()) {
            std::thread::sleep(left);
        }
    }
}
