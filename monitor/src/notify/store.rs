//! The queue on disk: SQLite with a write-ahead log in the state directory. Each call is one transaction, on the disk
//! when it returns. Nothing is decided here.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension as _, params};

use super::clock::Millis;
use super::queue::{Episode, Filter, Slot};
use crate::model::schema::Alert;

const FILE: &str = "alerts.db";
/// Raised with the schema; a file of another version is moved away, never guessed at.
const VERSION: i64 = 1;
const SCHEMA: &str = "
    CREATE TABLE episode (
        seq INTEGER PRIMARY KEY, version INTEGER NOT NULL, resolved INTEGER, body TEXT NOT NULL
    );
    CREATE TABLE receiver (name TEXT PRIMARY KEY) WITHOUT ROWID;
    CREATE TABLE progress (
        seq INTEGER NOT NULL, receiver TEXT NOT NULL, acked INTEGER NOT NULL, parked INTEGER NOT NULL,
        attempts INTEGER NOT NULL, error TEXT, PRIMARY KEY (seq, receiver)
    ) WITHOUT ROWID;
    PRAGMA user_version = 1;
";

/// The disk did not take it, or did not give it back.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("the alerts' store {}: {source}; look at the file system's free space and permissions", path.display())]
    Sql { path: PathBuf, source: rusqlite::Error },
    #[error("the alerts' store {}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
}

pub(super) struct Store {
    path: PathBuf,
    conn: Connection,
}

/// One episode as it stands on the disk.
pub(super) struct Row {
    pub(super) seq: u64,
    pub(super) version: u32,
    pub(super) resolved: Option<Millis>,
    pub(super) alert: Alert,
    /// By receiver.
    pub(super) progress: BTreeMap<String, Slot>,
}

/// One episode to be written.
pub(super) struct Change<'a> {
    pub(super) seq: u64,
    /// None: forgotten.
    pub(super) episode: Option<&'a Episode>,
    /// None: unchanged.
    pub(super) body: Option<&'a str>,
}

impl Store {
    /// Opens or makes the file. One that SQLite cannot read, or of another version, is moved to `alerts.db.bad`; that is
    /// said in the second value.
    pub(super) fn open(state_dir: &Path) -> Result<(Self, Option<String>), StoreError> {
        let path = state_dir.join(FILE);
        match Self::try_open(&path) {
            Ok(conn) => Ok((Self { path, conn }, None)),
            Err(e) if is_foreign(&e) => {
                let bad = path.with_extension("db.bad");
                for end in ["", "-wal", "-shm"] {
                    let from = PathBuf::from(format!("{}{end}", path.display()));
                    let to = PathBuf::from(format!("{}{end}", bad.display()));
                    match std::fs::rename(&from, &to) {
                        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                            return Err(StoreError::Io { path, source });
                        }
                        _ => {}
                    }
                }
                let said =
                    format!("{} could not be read ({e}) and was moved to {}", path.display(), bad.display());
                let conn =
                    Self::try_open(&path).map_err(|source| StoreError::Sql { path: path.clone(), source })?;
                Ok((Self { path, conn }, Some(said)))
            }
            Err(source) => Err(StoreError::Sql { path, source }),
        }
    }

    fn try_open(path: &Path) -> rusqlite::Result<Connection> {
        let mut conn = Connection::open(path)?;
        conn.busy_timeout(Duration::from_secs(2))?;
        // One process uses it: no shared memory file, and a second agent on the same directory is refused as busy.
        conn.pragma_update(None, "locking_mode", "exclusive")?;
        conn.pragma_update(None, "journal_mode", "wal")?;
        // In WAL mode FULL syncs the log at each commit: what was accepted outlives a power cut too.
        conn.pragma_update(None, "synchronous", "full")?;
        conn.pragma_update(None, "journal_size_limit", 4 << 20)?;
        let version: i64 = conn.query_row("PRAGMA user_version", [], |r| r.get(0))?;
        if version == 0 {
            let tx = conn.transaction()?;
            tx.execute_batch(SCHEMA)?;
            tx.commit()?;
        } else if version != VERSION {
            return Err(rusqlite::Error::IntegralValueOutOfRange(0, version));
        }
        Ok(conn)
    }

    fn sql(&self, source: rusqlite::Error) -> StoreError {
        StoreError::Sql { path: self.path.clone(), source }
    }

    /// All episodes, oldest first. A row that does not read is skipped and counted.
    pub(super) fn load(&self) -> Result<(Vec<Row>, usize), StoreError> {
        self.load_rows().map_err(|e| self.sql(e))
    }

    fn load_rows(&self) -> rusqlite::Result<(Vec<Row>, usize)> {
        let mut progress: BTreeMap<u64, BTreeMap<String, Slot>> = BTreeMap::new();
        let mut q =
            self.conn.prepare("SELECT seq, receiver, acked, parked, attempts, error FROM progress")?;
        let mut rows = q.query([])?;
        while let Some(r) = rows.next()? {
            let error: Option<String> = r.get(5)?;
            let slot = Slot {
                acked: r.get(2)?,
                parked: r.get(3)?,
                attempts: r.get(4)?,
                error: error.map(Into::into),
                ..Slot::default()
            };
            progress.entry(r.get::<_, i64>(0)? as u64).or_default().insert(r.get(1)?, slot);
        }
        let mut q = self.conn.prepare("SELECT seq, version, resolved, body FROM episode ORDER BY seq")?;
        let mut rows = q.query([])?;
        let (mut all, mut bad) = (Vec::new(), 0);
        while let Some(r) = rows.next()? {
            let seq = r.get::<_, i64>(0)? as u64;
            let body: String = r.get(3)?;
            match serde_json::from_str(&body) {
                Ok(alert) => all.push(Row {
                    seq,
                    version: r.get(1)?,
                    resolved: r.get(2)?,
                    alert,
                    progress: progress.remove(&seq).unwrap_or_default(),
                }),
                Err(_) => bad += 1,
            }
        }
        Ok((all, bad))
    }

    /// Who was a receiver at the last stop.
    pub(super) fn receivers(&self) -> Result<Vec<String>, StoreError> {
        let read = || {
            let mut q = self.conn.prepare("SELECT name FROM receiver")?;
            let names = q.query_map([], |r| r.get(0))?;
            names.collect::<rusqlite::Result<Vec<String>>>()
        };
        read().map_err(|e| self.sql(e))
    }

    pub(super) fn set_receivers(&mut self, filters: &[Filter]) -> Result<(), StoreError> {
        let write = |conn: &mut Connection| {
            let tx = conn.transaction()?;
            tx.execute("DELETE FROM receiver", [])?;
            for f in filters {
                tx.execute("INSERT OR IGNORE INTO receiver VALUES (?)", [&f.name])?;
            }
            tx.execute("DELETE FROM progress WHERE receiver NOT IN (SELECT name FROM receiver)", [])?;
            tx.commit()
        };
        write(&mut self.conn).map_err(|e| self.sql(e))
    }

    /// All or nothing.
    pub(super) fn write(&mut self, filters: &[Filter], changes: &[Change<'_>]) -> Result<(), StoreError> {
        Self::write_all(&mut self.conn, filters, changes).map_err(|e| self.sql(e))
    }

    fn write_all(conn: &mut Connection, filters: &[Filter], changes: &[Change<'_>]) -> rusqlite::Result<()> {
        let tx = conn.transaction()?;
        {
            let mut put = tx.prepare_cached(
                "INSERT INTO episode VALUES (?1, ?2, ?3, ?4) ON CONFLICT (seq) DO UPDATE \
                 SET version = ?2, resolved = ?3, body = ?4",
            )?;
            let mut mark = tx.prepare_cached("INSERT OR REPLACE INTO progress VALUES (?, ?, ?, ?, ?, ?)")?;
            let mut forget = tx.prepare_cached("DELETE FROM episode WHERE seq = ?")?;
            let mut unmark = tx.prepare_cached("DELETE FROM progress WHERE seq = ?")?;
            for c in changes {
                let seq = c.seq as i64;
                let Some(e) = c.episode else {
                    forget.execute([seq])?;
                    unmark.execute([seq])?;
                    continue;
                };
                if let Some(body) = c.body {
                    put.execute(params![seq, e.version, e.resolved, body])?;
                }
                for (f, s) in filters.iter().zip(&e.slots) {
                    if s.acked > 0 || s.parked > 0 || s.attempts > 0 {
                        mark.execute(params![
                            seq,
                            f.name,
                            s.acked,
                            s.parked,
                            s.attempts,
                            s.error.as_deref()
                        ])?;
                    }
                }
            }
        }
        tx.commit()
    }

    /// The alert as it was last written.
    pub(super) fn body(&self, seq: u64) -> Result<Option<String>, StoreError> {
        let read = || {
            let mut q = self.conn.prepare_cached("SELECT body FROM episode WHERE seq = ?")?;
            q.query_row([seq as i64], |r| r.get(0)).optional()
        };
        read().map_err(|e| self.sql(e))
    }

    /// Folds the log into the file; what fails here is still in the log.
    pub(super) fn close(self) {
        let folded = self.conn.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()));
        if let Err(e) = folded {
            tracing::debug!(error = %e, "the alerts' log stays beside the store");
        }
    }
}

fn is_foreign(e: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
    matches!(e, rusqlite::Error::IntegralValueOutOfRange(..))
        || matches!(e.sqlite_error_code(), Some(DatabaseCorrupt | NotADatabase))
}
