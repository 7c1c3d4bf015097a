//! What the agent must know again after it was killed: its jobs, the operator's word on enforcement, and kills under way. Two
//! small JSON files in the state directory; see [`Store`].

mod dir;
mod writer;

use std::collections::VecDeque;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

pub use self::dir::{StateDir, StateDirError};
pub use self::writer::{Report, StateWriter};
use crate::engine::{EnforcementState, JobRecord};
use crate::files::{self, OpenError};
use crate::model::key::Key;
use crate::model::kill::KillSpec;

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

/// A `jobwarden kill` that has not ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kill {
    #[serde(flatten)]
    pub spec: KillSpec,
    /// When the grace is over, in boot-time ns.
    pub until: u64,
    /// The client and its ancestors, which are spared whether or not the client still lives.
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

/// A file could not be written.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}. Look at the file system and the permissions of the state directory", path.display())]
pub struct StateError {
    path: PathBuf,
    source: io::Error,
}

/// What [`Store::load`] found.
#[derive(Debug, Default)]
pub struct Loaded {
    /// None: there is no state yet, or none that can be read.
    pub state: Option<State>,
    /// What was damaged, and where it was moved.
    pub damage: Vec<String>,
}

/// The state files in one state directory.
///
/// `jobs.json` is replaced by a rename and not synced: that outlives a SIGKILL of the agent at any moment, and costs no wait
/// for the disk. Only a power cut can damage it, and after a power cut all jobs are gone with their boot. What outlives a
/// boot, the operator's word and the fuse, is in `jobs.synced.json`, which is synced before its rename: at once when one of the
/// two has changed, and for everything else at most once a second.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
}

/// The newest first.
const FILES: [&str; 2] = ["jobs.json", "jobs.synced.json"];
const TEMPORARY: &str = "jobs.json.new";

impl Store {
    #[must_use]
    pub fn new(state_dir: &Path) -> Self {
        Self { dir: state_dir.to_owned() }
    }

    /// The saved state. A file that cannot be used is moved aside and reported: it never keeps an agent from starting.
    #[must_use]
    pub fn load(&self, boot_id: &str) -> Loaded {
        let mut loaded = Loaded::default();
        let [newest, synced] = FILES.map(|name| (self.dir.join(name), read(&self.dir.join(name))));
        // Of a power cut: the name was on the disk before the content.
        let power_cut = matches!(&synced.1, Ok(Some(s)) if s.boot_id != boot_id);
        for (path, found) in [newest, synced] {
            match found {
                Ok(state) => loaded.state = loaded.state.or(state),
                Err(why) if power_cut => {
                    tracing::info!(file = %path.display(), why, "cut short by the end of another boot");
                }
                Err(why) => {
                    let said = match files::set_aside(&path, &[]) {
                        Ok(bad) => format!(
                            "{} is damaged ({why}); it was moved to {}",
                            path.display(),
                            bad.display()
                        ),
                        Err(e) => format!("{} is damaged ({why}) and cannot be moved: {e}", path.display()),
                    };
                    loaded.damage.push(said);
                }
            }
        }
        loaded
    }

    /// Replaces the saved state; a crash of this process at any moment leaves the old one or the new one.
    pub fn save(&self, state: &State) -> Result<(), StateError> {
        self.replace(FILES[0], state, false)
    }

    /// As [`save`](Self::save), and a power cut does as well.
    pub fn save_synced(&self, state: &State) -> Result<(), StateError> {
        self.replace(FILES[1], state, true)
    }

    fn replace(&self, name: &str, state: &State, sync: bool) -> Result<(), StateError> {
        let path = self.dir.join(name);
        let write = || -> io::Result<()> {
            let bytes = serde_json::to_vec(state)?;
            let tmp = self.dir.join(TEMPORARY);
            let mut file = writable(&tmp)?;
            file.write_all(&bytes)?;
            if sync {
                file.sync_data()?;
            }
            if std::fs::symlink_metadata(&path).is_ok_and(|m| m.is_dir()) {
                files::set_aside(&path, &[])?;
            }
            std::fs::rename(&tmp, &path)?;
            if sync {
                // The rename itself must survive a power cut too.
                std::fs::File::open(&self.dir)?.sync_all()?;
            }
            Ok(())
        };
        write().map_err(|source| StateError { path: path.clone(), source })
    }

    /// Damaged files that were moved aside, as long as they are there.
    #[must_use]
    pub fn damaged(&self) -> Vec<PathBuf> {
        FILES.iter().chain(&[TEMPORARY]).flat_map(|name| files::damaged(&self.dir.join(name))).collect()
    }
}

/// The temporary file, empty. What is in its place and cannot be used is moved aside.
fn writable(path: &Path) -> io::Result<std::fs::File> {
    let open = || files::open_own(path, OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC);
    match open() {
        Err(e) if e.is_unusable() => {
            files::set_aside(path, &[])?;
            Ok(open()?)
        }
        r => Ok(r?),
    }
}

/// None: there is no such file. An error says what is wrong with it.
fn read(path: &Path) -> Result<Option<State>, String> {
    let file = match files::open_own(path, OFlags::RDONLY) {
        Err(OpenError::Io(e)) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        r => r.map_err(|e| e.to_string())?,
    };
    let bytes = files::read_bounded(file, MAX_BYTES).map_err(|e| e.to_string())?;
    let state: State = serde_json::from_slice(&bytes).map_err(|e| e.to_string())?;
    if state.version != VERSION {
        return Err(format!("version {}, this program knows {VERSION}", state.version));
    }
    Ok(Some(state))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::JobPolicy;
    use crate::model::kill::{Reason, What};
    use crate::model::schema::JobId;

    #[test]
    fn saved_is_loaded_and_damaged_is_moved_aside() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        assert!(store.load("b").state.is_none());
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
        assert_eq!(store.load("b").state.unwrap().jobs, state.jobs);
        let old = State { jobs: Vec::new(), ..state.clone() };
        store.save_synced(&old).unwrap();
        let other = b"{\"version\":99,\"boot_id\":\"\",\"jobs\":[],\"enforcement\":{\"by_operator\":null,\"until\":null,\"fuse_open\":false}}";
        for bad in [&b"{"[..], b"", other] {
            std::fs::write(dir.path().join("jobs.json"), bad).unwrap();
            let loaded = store.load("b");
            assert_eq!(loaded.state, Some(old.clone()), "the synced one is used instead");
            assert!(loaded.damage[0].contains("jobs.json.bad"), "{loaded:?}");
        }
        assert_eq!(store.damaged().len(), 3, "{:?}", store.damaged());
        // The content of a file that was renamed right before a power cut.
        std::fs::write(dir.path().join("jobs.json"), "").unwrap();
        let loaded = store.load("another boot");
        assert_eq!((loaded.state, loaded.damage), (Some(old), Vec::new()));
        store.save(&state).unwrap();
        assert_eq!(store.load("b").state, Some(state));
    }

    /// Kills as version 1 of the file has always had them: a file that cannot be read after an upgrade loses all jobs.
    #[test]
    fn a_kill_is_saved_as_it_always_was() {
        let (whole, part) = (
            r#"{"job":"j-1:2-0","root":"1:2","target":"name:n","roots":[],"signal":15,"until":99,"asked_by":{"uid":0,"pid":7,"exe":null,"rule":null},"kept":["7:8"]}"#,
            r#"{"job":null,"root":"3:4","target":"3","roots":["3:4"],"signal":2,"until":5,"asked_by":{"uid":null,"pid":null,"exe":null,"rule":null},"kept":[]}"#,
        );
        let read = |text: &str| serde_json::from_str::<Kill>(text).unwrap();
        let spec = read(whole).spec;
        assert_eq!((spec.what.clone(), spec.reason, spec.signal), (What::Whole, Reason::Operator, 15));
        assert_eq!(
            (spec.settle, spec.dry_run),
            (KillSpec::new(spec.root, What::Whole, Reason::Exec).settle, false)
        );
        assert_eq!(read(part).spec.what, What::Descendants { number: 0, roots: vec![Key::new(3, 4)] });
        for text in [whole, part] {
            let before: serde_json::Value = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::to_value(read(text)).unwrap(), before);
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
}
