//! A recording, told to an engine again: its events, what the policy made of them, and the forest at the end. No probe,
//! no /proc: it replays on any machine.

use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::{Frame, Header, Player, RecordingError, Timed};
use crate::config::{self, ConfigError};
use crate::engine::{AlertChange, Change, Engine, Input, Limits, Output, TreeQuery};
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
    if replay_frames(&mut Player::open(path)?, speed, out)? {
        Ok(())
    } else {
        Err(ReplayError::Empty(path.to_owned()))
    }
}

/// Replays what the player reads. False: there is no header that an engine could be made of.
pub fn replay_frames<R: Read>(
    player: &mut Player<R>,
    speed: Option<f64>,
    out: &mut dyn FnMut(Line) -> std::io::Result<()>,
) -> Result<bool, ReplayError> {
    let first = player.next_frame().filter(|(f, _)| *f == Frame::Header);
    let Some(mut header) = first.map(|(_, b)| serde_json::from_slice::<Header>(b)).transpose()? else {
        return Ok(false);
    };
    header.settings.limits = header.settings.limits.at_most(&Limits::default());
    let config = config::parse_recorded(&header.config)?;
    let mut engine = Engine::new(header.settings, &config);
    let mut pace = speed.map(Pace::new);
    let (mut output, mut events, mut last) = (Output::default(), 0, 0);
    while let Some((frame, payload)) = player.next_frame() {
        match frame {
            Frame::Event => {
                let Ok(event) = event::decode(payload) else { continue };
                if let Some(p) = &mut pace {
                    p.wait(event.at);
                }
                let context = engine.event_context(&event);
                let before = engine.jobs_of(event.process);
                engine.handle(Input::Record { event: &event, bytes: payload }, event.at, &mut output);
                let jobs = if before.is_empty() { engine.jobs_of(event.process) } else { before };
                let line = engine.event_line(&event, &context, jobs.first().copied());
                (events, last) = (events + 1, last.max(event.at));
                out(Line::Event(line)).map_err(ReplayError::Output)?;
            }
            Frame::Input => {
                let Timed { now, input } = serde_json::from_slice(payload)?;
                last = last.max(now);
                engine.handle(input, now, &mut output);
            }
            // Only the first one makes an engine.
            Frame::Header => {}
        }
        output.effects.clear();
        for change in output.changes.drain(..) {
            if let Change::Alert { change, alert } = change {
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
    out(end).map_err(ReplayError::Output)?;
    Ok(true)
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
