//! A store that is damaged, locked or full, at the start and in the middle of a run: no alert that can still be read is lost.

use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use super::testing::{Act, Server, alert, resolved, until, webhook};
use super::tests::start;
use super::*;

const GRACE: Duration = Duration::from_secs(5);
const DOWN: &str = "http://127.0.0.1:1/";

fn ids(alerts: &[Alert]) -> Vec<String> {
    alerts.iter().map(|a| a.id.clone()).collect()
}

fn numbers(n: std::ops::Range<u64>) -> Vec<String> {
    n.map(|n| alert(n).id).collect()
}

/// A store with these alerts firing and owed; its file.
async fn filled(dir: &Path, n: std::ops::Range<u64>) -> PathBuf {
    let center = start(&webhook(DOWN, ""), dir);
    let long = |n| Alert { summary: format!("{n} {}", "x".repeat(1000)), ..alert(n) };
    center.submit_all(n.map(long).collect()).await.unwrap();
    center.stop(GRACE).await;
    dir.join("alerts.db")
}

async fn works(dir: &Path) -> AlertService {
    let server = Server::start(|_, _| Act::Answer(200)).await;
    let center = start(&webhook(&server.url, ""), dir);
    until("the store", async || center.storage_error().borrow().is_none()).await;
    center.submit(&alert(9_999)).await.unwrap();
    until("the delivery", async || center.pending() == 0).await;
    assert!(server.told().iter().any(|(id, _)| *id == alert(9_999).id));
    center
}

#[tokio::test]
async fn every_damaged_page_is_survived_and_costs_only_what_is_in_it() {
    let original = tempfile::tempdir().unwrap();
    let file = filled(original.path(), 0..100).await;
    let bytes = std::fs::read(&file).unwrap();
    let pages = bytes.len() / 4096;
    assert!(pages > 20, "{pages} pages");
    let mut kept = Vec::new();
    for page in 0..pages {
        let dir = tempfile::tempdir().unwrap();
        let copy = dir.path().join("alerts.db");
        std::fs::write(&copy, &bytes).unwrap();
        let wrong = std::fs::OpenOptions::new().write(true).open(&copy).unwrap();
        wrong.write_all_at(&[0xa5; 4096], page as u64 * 4096).unwrap();
        let center = start(&webhook(DOWN, ""), dir.path());
        center.submit(&alert(9_999)).await.unwrap();
        let firing = center.restore().await.len();
        kept.push(firing - 1);
        center.stop(GRACE).await;
        // What was taken over is in the new file.
        let again = start(&webhook(DOWN, ""), dir.path());
        assert_eq!(again.restore().await.len(), firing, "page {page}");
        assert!(damaged(dir.path()).len() <= 1, "the new file is sound");
        again.stop(GRACE).await;
    }
    let whole = kept.iter().filter(|n| **n >= 90).count();
    assert!(whole * 2 > pages, "{kept:?}");
}

#[tokio::test]
async fn tables_values_and_what_is_no_file() {
    type Harm = Box<dyn Fn(&Path)>;
    let sql = |statement: &'static str| {
        move |file: &Path| rusqlite::Connection::open(file).unwrap().execute_batch(statement).unwrap()
    };
    let folder = |file: &Path| {
        std::fs::remove_file(file).unwrap();
        std::fs::create_dir_all(file.join("with/content")).unwrap();
    };
    let harms: Vec<(&str, usize, Harm)> = vec![
        ("no table", 0, Box::new(sql("DROP TABLE episode"))),
        ("no receivers", 5, Box::new(sql("DROP TABLE receiver"))),
        ("no progress", 5, Box::new(sql("DROP TABLE progress"))),
        ("a column less", 5, Box::new(sql("ALTER TABLE progress DROP COLUMN parked"))),
        ("a wrong value", 5, Box::new(sql("INSERT INTO progress VALUES (1, 'zzz', 'x', -1, 0, NULL)"))),
        ("a body that is no alert", 4, Box::new(sql("UPDATE episode SET body = '{' WHERE seq = 1"))),
        ("a version that is no number", 4, Box::new(sql("UPDATE episode SET version = -3 WHERE seq = 1"))),
        ("another version", 0, Box::new(sql("PRAGMA user_version = 77"))),
        ("empty", 0, Box::new(|f: &Path| std::fs::write(f, "").unwrap())),
        ("cut in the header", 0, Box::new(|f: &Path| std::fs::write(f, "SQLite format 3\0").unwrap())),
        ("a folder", 0, Box::new(folder)),
        ("a folder for the log", 5, Box::new(|f: &Path| std::fs::create_dir(files_log(f)).unwrap())),
    ];
    for (what, left, harm) in harms {
        let dir = tempfile::tempdir().unwrap();
        let file = filled(dir.path(), 1..6).await;
        harm(&file);
        let center = works(dir.path()).await;
        let firing = center.restore().await.len() - 1;
        // What the log's folder stood for went with the file.
        assert!(firing == left || what.contains("log"), "{what}: {firing} of {left}");
        assert_eq!(damaged(dir.path()).len(), usize::from(what != "empty"), "{what}");
        center.stop(GRACE).await;
    }
}

fn files_log(file: &Path) -> PathBuf {
    crate::files::with(file, "-wal")
}

/// The file is overwritten under the running agent, beyond what SQLite has in memory.
#[tokio::test]
async fn damage_in_the_middle_of_a_run_loses_nothing_that_can_be_read() {
    let dir = tempfile::tempdir().unwrap();
    // More than SQLite keeps in memory.
    let center = start(&webhook(DOWN, ""), dir.path());
    let long = |n| Alert { summary: format!("{n} {}", "x".repeat(15_000)), ..alert(n) };
    center.submit_all((0..300).map(long).collect()).await.unwrap();
    center.stop(GRACE).await;
    let center = start(&webhook(DOWN, ""), dir.path());
    center.submit(&alert(300)).await.unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(dir.path().join("alerts.db")).unwrap();
    let pages = file.metadata().unwrap().len() / 4096;
    for page in 1..pages {
        file.write_all_at(&[0xa5; 4096], page * 4096).unwrap();
    }
    // Reading is what finds it, or writing.
    let all = center.restore().await.len();
    let mut resubmitted = Vec::new();
    for n in 301..400 {
        if center.submit(&alert(n)).await.is_ok() {
            resubmitted.push(n);
        }
    }
    until("the new store", async || {
        let _ = center.submit(&alert(400)).await;
        !damaged(dir.path()).is_empty() && center.storage_error().borrow().is_none()
    })
    .await;
    // As the core does when the store works again.
    center.submit_all((0..400).map(alert).collect()).await.unwrap();
    assert_eq!(
        center.restore().await.len(),
        401,
        "{all} read in the damaged one, {} taken",
        resubmitted.len()
    );
    center.stop(GRACE).await;
    let again = start(&webhook(DOWN, ""), dir.path());
    assert_eq!(again.restore().await.len(), 401);
    assert_eq!(damaged(dir.path()).len(), 1);
    again.stop(GRACE).await;
}

/// Another program holds the file when the agent starts. Alerts are taken and sent meanwhile; then both are one.
#[tokio::test]
async fn a_store_that_is_opened_late_is_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    let file = filled(dir.path(), 0..4).await;
    let other = rusqlite::Connection::open(&file).unwrap();
    other.execute_batch("PRAGMA locking_mode = exclusive; BEGIN EXCLUSIVE").unwrap();
    let server = Server::start(|_, _| Act::Answer(200)).await;
    let center = start(&webhook(&server.url, ""), dir.path());
    assert!(center.storage_error().borrow().as_ref().is_some_and(|e| e.contains("locked")));
    assert_eq!(center.restore().await, []);
    let late = center.submit(&alert(1)).await.unwrap_err();
    assert!(matches!(late, SubmitError::Storage(_)), "{late}");
    until("a delivery from memory", async || server.told().len() == 1).await;
    drop(other);
    until("the store", async || center.storage_error().borrow().is_none()).await;
    until("all of them", async || center.pending() == 0).await;
    // One goes on firing; the engine knows nothing of the others any more.
    assert_eq!(ids(&center.restore().await), [alert(1).id]);
    let mut ended = ids(&center.history(None).await);
    ended.sort();
    ended.dedup();
    assert_eq!(ended, numbers(0..4));
    let told = server.told();
    for n in [0, 2, 3] {
        assert_eq!(told.iter().filter(|t| t.0 == alert(n).id).count(), 1, "{told:?}");
    }
    assert!(told.iter().all(|t| t.0 == alert(1).id || t.1 == "resolved"), "{told:?}");
    assert!(told.iter().all(|t| t.0 != alert(1).id || t.1 == "firing"), "{told:?}");
    center.submit(&resolved(&alert(1))).await.unwrap();
    center.stop(GRACE).await;
    let again = start(&webhook(DOWN, ""), dir.path());
    assert_eq!(again.restore().await, []);
    assert_eq!(again.history(None).await.len(), 5);
    assert!(damaged(dir.path()).is_empty());
    again.stop(GRACE).await;
}
