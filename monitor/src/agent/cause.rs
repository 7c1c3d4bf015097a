//! Causes, sought beside the core: `why` reads /proc and may take a while.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::core::{Core, Internal};
use crate::api::Reply;
use crate::contract::Cause;
use crate::enforce::Lineage;
use crate::host;
use crate::kernel::Kernel;
use crate::key::Key;
use crate::why::{self, FdRow, Holders, Limits, Question};

/// `f_mode` bits of `include/linux/fs.h`.
const FMODE_READ: u32 = 1;
const FMODE_WRITE: u32 = 2;

impl Holders for Kernel {
    fn holders(&self, inodes: &[u64]) -> io::Result<Vec<FdRow>> {
        let row = |r: monitor_abi::FdRow| FdRow {
            process: r.key.into(),
            fd: r.fd,
            inode: r.inode,
            read: r.mode & FMODE_READ != 0,
            write: r.mode & FMODE_WRITE != 0,
        };
        Ok(Self::holders(self, inodes)?.into_iter().map(row).collect())
    }

    fn keys(&self) -> io::Result<Vec<Key>> {
        Self::keys(self)
    }

    fn lineage_parent(&self, process: Key) -> io::Result<Option<Key>> {
        Lineage::lineage_parent(self, process)
    }
}

/// Of so many of a family it is read in which container and namespace they are, if that is not known yet.
const PLACED: usize = 64;

/// For an alert that has just fired; without an answer in time the alert goes out without a cause.
pub(super) fn of_alert(core: &Core, alert: String, wait: Duration) {
    let tx = core.internal.clone();
    let question = core.engine.alert_subject(&alert).and_then(|k| core.engine.question(k, host::boot_now()));
    let Some(mut question) = question else {
        let _ = tx.send(Internal::Cause { alert, cause: None });
        return;
    };
    question.alert = Some(alert.clone());
    let job = explain(core, vec![question]);
    tokio::spawn(async move {
        let cause = tokio::time::timeout(wait, job).await.ok().and_then(|mut all| all.pop());
        let _ = tx.send(Internal::Cause { alert, cause: cause.map(Box::new) });
    });
}

/// For `why`.
pub(super) fn of(core: &Core, keys: Vec<(Key, Option<String>)>, reply: Reply<Vec<Cause>>) {
    let now = host::boot_now();
    let questions: Vec<Question> = keys
        .into_iter()
        .filter_map(|(key, alert)| core.engine.question(key, now).map(|q| Question { alert, ..q }))
        .collect();
    let job = explain(core, questions);
    tokio::spawn(async move {
        let _ = reply.send(Ok(job.await));
    });
}

/// One after the other, on a thread for blocking work.
fn explain(core: &Core, questions: Vec<Question>) -> impl Future<Output = Vec<Cause>> + use<> {
    let (looker, holders, redact) =
        (core.looker.clone(), Arc::clone(&core.kernel) as Arc<dyn Holders>, Arc::clone(&core.redact));
    async move {
        let job = tokio::task::spawn_blocking(move || {
            let host_ns = looker.own_pid_ns();
            questions
                .into_iter()
                .map(|mut q| {
                    for p in std::iter::once(&mut q.subject).chain(q.family.iter_mut().take(PLACED)) {
                        looker.place(p, host_ns);
                    }
                    let mut cause = why::explain(&q, &looker.proc, &*holders, &Limits::default());
                    redact.cause(&mut cause);
                    cause
                })
                .collect()
        });
        job.await.unwrap_or_default()
    }
}
