//! What the agent must know again after it was killed: its jobs. One small JSON file in the state directory, written to
//! a temporary file, synced and renamed, so that a crash at any moment leaves the old state or the new one.

use std::collections::VecDeque;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::engine::{EnforcementState, JobRecord};
use crate::model::key::Key;
use crate::model::kill::AskedBy;
use crate::model::schema::JobId;

/// Raised when the file's meaning changes; a file of another version is refused by name, never guessed at.
pub const VERSION: u32 = 1;
/// A file larger than this is none of ours.
const MAX_BYTES: u64 = 64 << 20;

/// The whole file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub version: u32,
    /// Boot-time numbers mean nothing on another boot.
    pub boot_id: String,
    pub jobs: Vec<JobRecord>,
    /// The operator's word and the fuse hold over a restart.
    pub enforcement: EnforcementState,
    /// Wall clock minus boot clock (ns) when it was saved.
    #[serde(default)]
    pub boot_to_wall: u64,
    /// Lost records of this boot's probes that were told.
    #[serde(default)]
    pub lost: u64,
    /// What an operator has ordered and is not done: who asked is told nothing more, but the order holds. (What policy decides
    /// it decides again.)
    #[serde(default)]
    pub kills: Vec<Kill>,
}

/// `jobwarden kill` that is under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kill {
    /// None: what descends from processes outside of jobs.
    pub job: Option<JobId>,
    pub root: Key,
    pub target: String,
    /// These and what descends from them; none: the whole job.
    pub roots: Vec<Key>,
    pub signal: u8,
    /// When the grace is over, in boot-time ns.
    pub until: u64,
    pub asked_by: AskedBy,
    /// The client and its ancestors, who are spared whether the client lives or not.
    pub kept: Vec<Key>,
}

impl State {
    /// What is left of it on another boot: no jobs, but what an operator said holds until its time by the wall clock, and
    /// the fuse stays open.
    #[must_use]
    pub fn on_another_boot(self, boot_id: &str, boot_to_wall: u64) -> Self {
        let EnforcementState { by_operator, until, fuse_open, ended: _ } = self.enforcement;
        let until = until.map(|u| u.saturating_add(self.boot_to_wall).saturating_sub(boot_to_wall));
        let ended = VecDeque::new();
        let enforcement = EnforcementState { by_operator, until, fuse_open, ended };
        Self { version: VERSION, boot_id: boot_id.to_owned(), enforcement, boot_to_wall, ..Self::default() }
    }
}

/// The state directory, held by its lock (flock) for the agent's whole life: two agents would write over each other's jobs
/// and alerts.
#[derive(Debug)]
pub struct Held(std::fs::File);

impl Held {
    pub fn lock(state_dir: &Path) -> Result<Self, StateError> {
        let io = |source| StateError::Io { path: state_dir.to_owned(), source };
        let dir = std::fs::File::open(state_dir).map_err(io)?;
        match rustix::fs::flock(&dir, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self(dir)),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(StateError::Held { path: state_dir.to_owned() }),
            Err(e) => Err(io(e.into())),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // By hand: a receiver's program that was forked and has not come to its exec holds a copy of the descriptor.
        let _ = rustix::fs::flock(&self.0, rustix::fs::FlockOperation::Unlock);
    }
}

#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("{path}: {source}. Look at the file system and the permissions of the state directory")]
    Io { path: PathBuf, source: std::io::Error },
    #[error(
        "{path} is no state of this program ({why}). Move it away to start without the jobs that it may hold"
    )]
    Foreign { path: PathBuf, why: String },
    #[error(
        "{path} is the state directory of another agent that runs; stop that one, or give this one another with --state-dir"
    )]
    Held { path: PathBuf },
}

/// The state file in one state directory.
#[derive(Clone, Debug)]
pub struct Store {
    path: PathBuf,
}

impl Store {
    #[must_use]
    pub fn new(state_dir: &Path) -> Self {
        Self { path: state_dir.join("jobs.json") }
    }

    fn io(&self, source: std::io::Error) -> StateError {
        StateError::Io { path: self.path.clone(), source }
    }

    /// The saved state; None if there is none yet.
    pub fn load(&self) -> Result<Option<State>, StateError> {
        let foreign = |why: String| StateError::Foreign { path: self.path.clone(), why };
        match std::fs::metadata(&self.path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(self.io(e)),
            Ok(m) if m.len() > MAX_BYTES => return Err(foreign(format!("{} bytes", m.len()))),
            Ok(_) => {}
        }
        let bytes = std::fs::read(&self.path).map_err(|e| self.io(e))?;
        let state: State = serde_json::from_slice(&bytes).map_err(|e| foreign(e.to_string()))?;
        if state.version != VERSION {
            return Err(foreign(format!("version {}, this program knows {VERSION}", state.version)));
        }
        Ok(Some(state))
    }

    /// Replaces the saved state.
    pub fn save(&self, state: &State) -> Result<(), StateError> {
        let bytes = serde_json::to_vec(state).map_err(|e| self.io(e.into()))?;
        let tmp = self.path.with_extension("json.new");
        let write = || -> std::io::Result<()> {
            let mut f = std::fs::File::create(&tmp)?;
            f.write_all(&bytes)?;
            f.sync_all()?;
            std::fs::rename(&tmp, &self.path)?;
            // The rename itself must survive a power cut too.
            std::fs::File::open(self.path.parent().unwrap_or(Path::new("/")))?.sync_all()
        };
        write().map_err(|e| self.io(e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::JobPolicy;
    use crate::model::key::Key;
    use crate::model::schema::JobId;

    #[test]
    fn saved_is_loaded_and_foreign_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        assert_eq!(store.load().unwrap(), None);
        let job = JobRecord {
            number: 3,
            id: JobId { root: Key::new(1, 2), ordinal: 0 },
            name: "n".into(),
            rule: None,
            outer: 0,
            started: 4,
            deadline: Some(5),
            policy: JobPolicy {
                timeout_ns: Some(1),
                zombie_after_ns: None,
                orphan_after_ns: Some(2),
                kill_on_timeout: true,
                kill_on_orphan: false,
                kill_daemons: false,
                enforce_existing: false,
                stop_signal: 15,
                grace_ns: 10,
                severity: None,
            },
            existing: false,
            supervisor: None,
            expired: false,
            members: Vec::new(),
        };
        let state = State { version: VERSION, jobs: vec![job], boot_id: "b".into(), ..State::default() };
        store.save(&state).unwrap();
        assert_eq!(store.load().unwrap().unwrap().jobs, state.jobs);
        for bad in [&b"{"[..], b"", b"{\"version\":99,\"boot_id\":\"\",\"jobs\":[],\"enforcement\":{\"by_operator\":null,\"until\":null,\"fuse_open\":false}}"] {
            std::fs::write(dir.path().join("jobs.json"), bad).unwrap();
            assert!(matches!(store.load(), Err(StateError::Foreign { .. })), "{bad:?}");
        }
    }

    #[test]
    fn another_boot_keeps_the_word_and_the_fuse() {
        let enforcement = EnforcementState {
            by_operator: Some(false),
            until: Some(70),
            fuse_open: true,
            ended: VecDeque::from([(60, 1)]),
        };
        let old = State {
            boot_id: "a".into(),
            enforcement,
            boot_to_wall: 1000,
            lost: 7,
            jobs: Vec::new(),
            version: VERSION,
            kills: Vec::new(),
        };
        // Booted at 1030 by the wall clock: the word holds until 1070.
        let new = old.on_another_boot("b", 1030);
        assert_eq!((new.boot_id.as_str(), new.lost), ("b", 0));
        assert_eq!(
            new.enforcement,
            EnforcementState {
                by_operator: Some(false),
                until: Some(40),
                fuse_open: true,
                ended: VecDeque::new()
            }
        );
    }

    #[test]
    fn one_holder_of_a_state_directory() {
        let dir = tempfile::tempdir().unwrap();
        let held = Held::lock(dir.path()).unwrap();
        let second = Held::lock(dir.path()).unwrap_err();
        assert!(matches!(second, StateError::Held { .. }), "{second}");
        drop(held);
        Held::lock(dir.path()).unwrap();
    }
}
