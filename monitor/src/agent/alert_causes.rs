//! Causes of alerts: searched for when an alert fires, and again while it keeps firing.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::cause_cache::{FRESH, RECENT};
use super::core::Core;
use super::message::Message;
use crate::model::audience::Audience;
use crate::model::key::Key;
use crate::model::schema::{Cause, Verdict};
use crate::sources::host;

/// The cause of a firing alert is renewed at this interval, the one at which receivers are sent the alert again ..
const RENEWED: Duration = Duration::from_mins(1);
/// .. and after this time already if the alert is about another process by then.
const CHANGED: Duration = Duration::from_secs(10);
/// Most causes that are renewed in a second: a thousand alerts must not keep the machine busy.
const RENEWALS: usize = 4;

/// Searches for the cause of an alert that has just fired. If it takes longer than `wait`, the alert is sent without a cause, which
/// follows.
pub(super) fn search(core: &mut Core, alert: String, wait: Duration) {
    let found = core.engine.alert_subject(&alert).and_then(|k| start(core, &alert, k, FRESH));
    let tx = core.messages.clone();
    let Some(mut job) = found else {
        let _ = tx.send(Message::Cause { alert, cause: None });
        return;
    };
    core.background.spawn(async move {
        let soon = timeout(wait, &mut job).await;
        let late = soon.is_err();
        let cause = soon.ok().and_then(Result::ok).flatten().map(Box::new);
        let _ = tx.send(Message::Cause { alert: alert.clone(), cause });
        if late && let Ok(Some(cause)) = job.await {
            let _ = tx.send(Message::Cause { alert, cause: Some(Box::new(cause)) });
        }
    });
}

/// Each second: renews the causes of firing alerts that are old, or whose alert is about another process by now. Causes from before
/// a restart are among them.
pub(super) fn renew(core: &mut Core) {
    let mut due: Vec<(Option<Instant>, String, Key)> = Vec::new();
    let mut firing = 0;
    for (id, key) in core.engine.to_explain() {
        firing += 1;
        let searched = core.causes.searched.get(id);
        let is_due = searched.is_none_or(|(k, at)| at.elapsed() > if *k == key { RENEWED } else { CHANGED });
        if is_due {
            due.push((searched.map(|s| s.1), id.to_owned(), key));
        }
    }
    if core.causes.searched.len() > firing {
        let engine = &core.engine;
        core.causes.searched.retain(|id, _| engine.alert_subject(id).is_some());
    }
    due.sort_unstable();
    for (_, alert, key) in due.into_iter().take(RENEWALS) {
        let Some(job) = start(core, &alert, key, RECENT) else { continue };
        let tx = core.messages.clone();
        core.background.spawn(async move {
            // The alert is about to be resolved: keep the cause that was sent with it.
            let over = [Verdict::BeingReaped, Verdict::NotAZombie];
            if let Ok(Some(cause)) = job.await
                && !over.contains(&cause.verdict)
            {
                let _ = tx.send(Message::Cause { alert, cause: Some(Box::new(cause)) });
            }
        });
    }
}

fn start(core: &mut Core, alert: &str, key: Key, fresh: Duration) -> Option<JoinHandle<Option<Cause>>> {
    core.causes.searched.insert(alert.to_owned(), (key, Instant::now()));
    let mut question = core.engine.question(key, host::boot_now())?;
    question.alert = Some(alert.to_owned());
    let (finder, redact) = (Arc::clone(&core.causes.finder), Arc::clone(&core.redact));
    Some(core.background.spawn(async move {
        // The config names the receivers. They, too, get a line of source only where the process itself may read the file.
        let mut cause = finder.find(question, Audience::Full, fresh, &finder.for_alerts).await?;
        redact.cause(&mut cause);
        Some(cause)
    }))
}
