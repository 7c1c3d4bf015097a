//! The queue on disk: SQLite with a write-ahead log in the state directory. Each call is one transaction, on the disk
//! when it returns. Nothing is decided here.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension as _, params};
use rustix::fs::OFlags;

use super::clock::Millis;
use super::queue::{Episode, Filter, MAX_EPISODES, Slot};
use crate::files;
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

/// What SQLite keeps beside the file.
const BESIDE: [&str; 3] = ["-wal", "-shm", "-journal"];
/// Of one table; there are progress rows for each episode and receiver.
const MAX_ROWS: usize = MAX_EPISODES * 64;
/// How long another program may hold the file, each time.
const BUSY: Duration = Duration::from_millis(500);

/// The disk did not take it, or did not give it back.
#[derive(Debug, thiserror::Error)]
pub(super) enum StoreError {
    #[error("the alerts' store {}: {source}; look at the file system's free space and permissions", path.display())]
    Sql { path: PathBuf, source: rusqlite::Error },
    #[error("the alerts' store {}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("the alerts' store {} is not open", path.display())]
    Closed { path: PathBuf },
    #[error("the alerts' store {} was replaced a moment ago and is damaged again: {why}", path.display())]
    Damaged { path: PathBuf, why: String },
}

impl StoreError {
    /// The file itself is wrong: another one must take its place. Anything else may pass.
    pub(super) fn is_damage(&self) -> bool {
        let Self::Sql { source, .. } = self else { return false };
        is_damage(source)
    }
}

pub(super) struct Store {
    path: PathBuf,
    /// None: it could not be opened yet.
    conn: Option<Connection>,
}

/// What is in a store.
#[derive(Default)]
pub(super) struct Contents {
    /// Oldest first.
    pub(super) rows: Vec<Row>,
    /// The receivers of the last run.
    pub(super) receivers: BTreeSet<String>,
    /// What is wrong with the file, and how many of its rows could be read nevertheless is in `rows`.
    pub(super) damage: Option<String>,
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
    /// Not open yet.
    pub(super) fn new(state_dir: &Path) -> Self {
        Self { path: state_dir.join(FILE), conn: None }
    }

    pub(super) const fn is_open(&self) -> bool {
        self.conn.is_some()
    }

    /// Opens or makes the file, and reads what can be read of it. One that is damaged stays closed.
    pub(super) fn open(&mut self) -> Result<Contents, StoreError> {
        if let Err(e) = check(&self.path) {
            if e.is_unusable() {
                return Ok(Contents { damage: Some(e.to_string()), ..Contents::default() });
            }
            return Err(StoreError::Io { path: self.path.clone(), source: e.into() });
        }
        match connect(&self.path) {
            Ok(conn) => {
                let contents = read(&conn);
                if contents.damage.is_none() {
                    self.conn = Some(conn);
                }
                Ok(contents)
            }
            Err(e) if is_damage(&e) => Ok(Contents { damage: Some(e.to_string()), ..Contents::default() }),
            Err(e) => Err(self.sql(e)),
        }
    }

    /// Closes it and moves the file aside; its new name.
    pub(super) fn set_aside(&mut self) -> Result<PathBuf, StoreError> {
        // First: when SQLite closes a file it removes the log beside it, by its name.
        self.conn = None;
        files::set_aside(&self.path, &BESIDE)
            .map_err(|source| StoreError::Io { path: self.path.clone(), source })
    }

    /// The damaged file, for what can still be read of it.
    pub(super) fn salvage(path: &Path) -> Option<Self> {
        let conn = connect(path).ok()?;
        Some(Self { path: path.to_owned(), conn: Some(conn) })
    }

    fn sql(&self, source: rusqlite::Error) -> StoreError {
        StoreError::Sql { path: self.path.clone(), source }
    }

    pub(super) fn closed(&self) -> StoreError {
        StoreError::Closed { path: self.path.clone() }
    }

    pub(super) fn damaged_again(&self, why: &str) -> StoreError {
        StoreError::Damaged { path: self.path.clone(), why: why.to_owned() }
    }

    fn conn(&self) -> Result<&Connection, StoreError> {
        self.conn.as_ref().ok_or_else(|| self.closed())
    }

    fn with(&mut self, work: impl FnOnce(&mut Connection) -> rusqlite::Result<()>) -> Result<(), StoreError> {
        let Some(conn) = &mut self.conn else { return Err(StoreError::Closed { path: self.path.clone() }) };
        work(conn).map_err(|source| StoreError::Sql { path: self.path.clone(), source })
    }

    pub(super) fn set_receivers(&mut self, filters: &[Filter]) -> Result<(), StoreError> {
        self.with(|conn| {
            let tx = conn.transaction()?;
            tx.execute("DELETE FROM receiver", [])?;
            for f in filters {
                tx.execute("INSERT OR IGNORE INTO receiver VALUES (?)", [&f.name])?;
            }
            tx.execute("DELETE FROM progress WHERE receiver NOT IN (SELECT name FROM receiver)", [])?;
            tx.commit()
        })
    }

    /// All or nothing.
    pub(super) fn write(&mut self, filters: &[Filter], changes: &[Change<'_>]) -> Result<(), StoreError> {
        self.with(|conn| Self::write_all(conn, filters, changes))
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
        let conn = self.conn()?;
        let read = || {
            let mut q = conn.prepare_cached("SELECT body FROM episode WHERE seq = ?")?;
            q.query_row([seq as i64], |r| r.get(0)).optional()
        };
        read().map_err(|e| self.sql(e))
    }

    /// Folds the log into the file; what fails here is still in the log.
    pub(super) fn close(self) {
        let Some(conn) = &self.conn else { return };
        let folded = conn.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()));
        if let Err(e) = folded {
            tracing::debug!(error = %e, "the alerts' log stays beside the store");
        }
    }
}

/// Damaged stores that were moved aside, as long as they are there.
pub(super) fn damaged(state_dir: &Path) -> Vec<PathBuf> {
    files::damaged(&state_dir.join(FILE))
}

/// Whether the file, which is made here so that nobody else may read it, and those beside it are this process's own.
fn check(path: &Path) -> Result<(), files::OpenError> {
    files::open_own(path, OFlags::RDONLY | OFlags::CREATE)?;
    BESIDE.iter().try_for_each(|ending| files::own_metadata(&files::with(path, ending)).map(drop))
}

fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut conn = Connection::open_with_flags(path, flags)?;
    conn.busy_timeout(BUSY)?;
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

/// All that can be read. Damage in one place (a page, a table, a value) costs what is there and nothing else.
fn read(conn: &Connection) -> Contents {
    let mut receivers = BTreeSet::new();
    let names = each(conn, "SELECT name FROM receiver ORDER BY name", |r| {
        receivers.insert(r.get(0)?);
        Ok(())
    });
    let mut progress: BTreeMap<u64, BTreeMap<String, Slot>> = BTreeMap::new();
    let slots = "SELECT seq, receiver, acked, parked, attempts, error FROM progress ORDER BY seq";
    let slots = each(conn, slots, |r| {
        let error: Option<String> = r.get(5)?;
        let slot = Slot {
            acked: r.get(2)?,
            parked: r.get(3)?,
            attempts: r.get(4)?,
            error: error.map(Into::into),
            ..Slot::default()
        };
        progress.entry(sequence(r)?).or_default().insert(r.get(1)?, slot);
        Ok(())
    });
    let mut rows = BTreeMap::new();
    let episodes = each(conn, "SELECT seq, version, resolved, body FROM episode ORDER BY seq", |r| {
        let (seq, body) = (sequence(r)?, r.get::<_, String>(3)?);
        let alert = serde_json::from_str(&body);
        let alert = alert.map_err(|e| {
            rusqlite::Error::FromSqlConversionFailure(3, rusqlite::types::Type::Text, Box::new(e))
        })?;
        let progress = progress.remove(&seq).unwrap_or_default();
        let row = Row { seq, version: r.get(1)?, resolved: r.get(2)?, alert, progress };
        rows.entry(seq).or_insert(row);
        Ok(())
    });
    let wrong: Vec<String> = [names, slots, episodes].into_iter().filter_map(Result::err).collect();
    Contents {
        rows: rows.into_values().collect(),
        receivers,
        damage: (!wrong.is_empty()).then(|| wrong.join("; ")),
    }
}

/// Calls `row` for each row of an ordered query. A row that it does not understand costs no other, and where the file is damaged
/// the rows behind the damage are read from the other end.
fn each(
    conn: &Connection,
    sql: &str,
    mut row: impl FnMut(&rusqlite::Row<'_>) -> rusqlite::Result<()>,
) -> Result<(), String> {
    let mut wrong = Ok(());
    let mut all = |sql: &str| -> rusqlite::Result<()> {
        let mut q = conn.prepare(sql)?;
        let mut rows = q.query([])?;
        for _ in 0..MAX_ROWS {
            let Some(r) = rows.next()? else { return Ok(()) };
            if let Err(e) = row(r) {
                wrong = Err(e.to_string());
            }
        }
        // A damaged tree can lead back to where it came from.
        Err(rusqlite::Error::QueryReturnedMoreThanOneRow)
    };
    if let Err(e) = all(sql) {
        // As far as the damage again.
        let _ = all(&format!("{sql} DESC"));
        return Err(e.to_string());
    }
    wrong
}

fn sequence(r: &rusqlite::Row<'_>) -> rusqlite::Result<u64> {
    let seq: i64 = r.get(0)?;
    u64::try_from(seq).map_err(|_| rusqlite::Error::IntegralValueOutOfRange(0, seq))
}

/// Whether the file is wrong, and not the disk, its room or a right to it.
fn is_damage(e: &rusqlite::Error) -> bool {
    use ErrorCode::{
        CannotOpen, DatabaseBusy, DatabaseLocked, DiskFull, FileLockingProtocolFailed, OperationInterrupted,
        OutOfMemory, PermissionDenied, ReadOnly, SystemIoFailure,
    };
    !matches!(
        e.sqlite_error_code(),
        Some(
            CannotOpen
                | DatabaseBusy
                | DatabaseLocked
                | DiskFull
                | FileLockingProtocolFailed
                | OperationInterrupted
                | OutOfMemory
                | PermissionDenied
                | ReadOnly
                | SystemIoFailure
        )
    )
}
