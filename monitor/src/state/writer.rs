//! The thread that writes the state files, so that no caller ever waits for the disk. One state at a time: while one is written,
//! changes pile up at the caller, and the next state holds all of them.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::{State, StateDir, Store};

/// How long a power cut may go back: what was not synced at once is synced after this time. Also how often a missing state
/// directory is tried again, and moved-aside files are looked at.
const PERIOD: Duration = Duration::from_secs(1);

/// Between two states: a state is made of all jobs, so a flood of changes must not make one for each.
const PAUSE: Duration = Duration::from_millis(2);

/// How it stands with the files, told after each write and when it changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Why the last state could not be written.
    pub error: Option<String>,
    /// Damaged files that were moved aside and are still there.
    pub damaged: Vec<String>,
}

struct Job {
    number: u64,
    state: State,
    /// On the disk, not only outside of this process, before it counts as written.
    synced: bool,
}

/// Its thread ends after it, when what it was given is synced.
#[derive(Debug)]
pub struct StateWriter {
    jobs: SyncSender<Job>,
    tried: watch::Receiver<u64>,
    put: u64,
    put_at: Option<Instant>,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job").field("number", &self.number).finish_non_exhaustive()
    }
}

impl StateWriter {
    /// `damaged`: the other stores' moved-aside files. `report` is called by the thread.
    pub fn start(
        dir: Arc<StateDir>,
        damaged: impl Fn() -> Vec<PathBuf> + Send + 'static,
        report: impl Fn(Report) + Send + 'static,
    ) -> io::Result<Self> {
        // At most one state is under way, so that a put never waits.
        let (jobs, inbox) = sync_channel(1);
        let (done, tried) = watch::channel(0);
        let work = move || Work::new(dir).run(&inbox, &done, &damaged, &report);
        std::thread::Builder::new().name("state".into()).spawn(work)?;
        Ok(Self { jobs, tried, put: 0, put_at: None })
    }

    /// Whether a state is being written; another one has to wait for its end.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        *self.tried.borrow() < self.put
    }

    /// Since when the state that is being written is.
    #[must_use]
    pub fn busy_since(&self) -> Option<Instant> {
        self.put_at.filter(|_| self.is_busy())
    }

    /// The number of the last state that was given.
    #[must_use]
    pub const fn last(&self) -> u64 {
        self.put
    }

    /// The number of the last state that was tried, written or not.
    #[must_use]
    pub fn tried(&self) -> u64 {
        *self.tried.borrow()
    }

    /// Takes a state, unless it [is busy](Self::is_busy). Never waits.
    pub fn put(&mut self, state: State, synced: bool) {
        let number = self.put + 1;
        if !self.is_busy() && self.jobs.try_send(Job { number, state, synced }).is_ok() {
            self.put = number;
            self.put_at = Some(Instant::now());
        }
    }

    /// Comes back when state `number` was tried, or after `within`.
    pub fn wait(&self, number: u64, within: Duration) -> impl Future<Output = ()> + Send + 'static {
        let mut tried = self.tried.clone();
        async move {
            // A thread that has ended tries nothing more.
            let _ = tokio::time::timeout(within, tried.wait_for(|n| *n >= number)).await;
        }
    }
}

/// What the thread works on.
struct Work {
    dir: Arc<StateDir>,
    /// Written, not synced; since when.
    unsynced: Option<(Instant, State)>,
    not_written: Option<String>,
    not_synced: Option<String>,
    told: Report,
}

impl Work {
    fn new(dir: Arc<StateDir>) -> Self {
        Self { dir, unsynced: None, not_written: None, not_synced: None, told: Report::default() }
    }

    fn run(
        mut self,
        inbox: &Receiver<Job>,
        tried: &watch::Sender<u64>,
        damaged: &dyn Fn() -> Vec<PathBuf>,
        report: &dyn Fn(Report),
    ) {
        loop {
            let mut done = false;
            match inbox.recv_timeout(PERIOD) {
                Ok(job) => {
                    let number = job.number;
                    self.write(job);
                    tried.send_replace(number);
                    done = true;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return self.sync(),
            }
            if self.unsynced.as_ref().is_some_and(|(since, _)| since.elapsed() >= PERIOD) {
                self.sync();
            }
            let all = Store::new(&self.dir.path()).damaged().into_iter().chain(damaged());
            let now = Report {
                error: self.not_written.clone().or_else(|| self.not_synced.clone()),
                damaged: all.map(|p| p.display().to_string()).collect(),
            };
            if done || now != self.told {
                self.told = now.clone();
                report(now);
            }
            if done {
                std::thread::sleep(PAUSE);
            }
        }
    }

    fn write(&mut self, job: Job) {
        // On a full disk there may have been no room for the directory.
        let written = self.dir.ensure().map_err(|e| e.to_string());
        let written = written.and_then(|dir| Store::new(&dir).save(&job.state).map_err(|e| e.to_string()));
        self.not_written = written.err();
        let since = self.unsynced.take().map_or_else(Instant::now, |(since, _)| since);
        self.unsynced = Some((since, job.state));
        if job.synced {
            self.sync();
        }
    }

    /// What fails is tried again after [`PERIOD`].
    fn sync(&mut self) {
        let Some((_, state)) = self.unsynced.take() else { return };
        self.not_synced = Store::new(&self.dir.path()).save_synced(&state).err().map(|e| e.to_string());
        if self.not_synced.is_some() {
            self.unsynced = Some((Instant::now(), state));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn state(boot: &str) -> State {
        State { version: super::super::VERSION, boot_id: boot.into(), ..State::default() }
    }

    #[tokio::test]
    async fn a_state_is_written_then_synced_and_what_is_set_aside_is_told() {
        let top = tempfile::tempdir().unwrap();
        let (dir, _) = StateDir::open(&top.path().join("s")).unwrap();
        let path = dir.path();
        let reports = Arc::new(Mutex::new(Vec::new()));
        let tell = Arc::clone(&reports);
        let mut w =
            StateWriter::start(Arc::new(dir), Vec::new, move |r| tell.lock().unwrap().push(r)).unwrap();
        w.put(state("one"), false);
        w.wait(1, Duration::from_secs(5)).await;
        assert!(!w.is_busy());
        assert!(path.join("jobs.json").exists() && !path.join("jobs.synced.json").exists());
        std::fs::create_dir(path.join("jobs.json.new")).unwrap();
        w.put(state("two"), true);
        w.wait(2, Duration::from_secs(5)).await;
        let synced = || super::super::read(&path.join("jobs.synced.json")).unwrap().unwrap().boot_id;
        assert_eq!(synced(), "two");
        w.put(state("three"), false);
        let since = Instant::now();
        while synced() != "three" {
            assert!(since.elapsed() < 10 * PERIOD, "a state is synced after a while");
            std::thread::sleep(Duration::from_millis(20));
        }
        let told = reports.lock().unwrap();
        assert_eq!(told[0], Report::default());
        assert!(told[1].damaged[0].ends_with("jobs.json.new.bad"), "{told:?}");
    }
}
