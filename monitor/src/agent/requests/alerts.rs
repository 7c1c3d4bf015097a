//! `alerts`, and delivering a test alert (`notify`).

use std::collections::BTreeMap;

use crate::agent::core::Core;
use crate::api::{AlertQuery, ApiError, Notified, Reply};
use crate::model::schema::{Alert, Alerts};
use crate::sources::host;

pub(super) fn alerts(core: &Core, q: &AlertQuery, reply: Reply<Alerts>) {
    if q.history || q.undelivered {
        let (service, q) = (core.alert_service.clone(), q.clone());
        core.background.spawn(async move {
            let audience = q.audience;
            let mut undelivered: BTreeMap<_, Vec<_>> = BTreeMap::new();
            let mut alerts: Vec<Alert> = if q.undelivered {
                let owed = service.undelivered().await.into_iter();
                owed.map(|u| {
                    undelivered.entry(u.alert.id.clone()).or_default().extend(u.undelivered);
                    u.alert
                })
                .collect()
            } else {
                let now =
                    i64::try_from((host::boot_now() + host::boot_to_wall()) / 1_000_000).unwrap_or(i64::MAX);
                service.history(q.since_s.map(|s| now.saturating_sub((s * 1e3) as i64))).await
            };
            for a in &mut alerts {
                audience.alert(a);
            }
            let _ = reply.send(Ok(Alerts { alerts, undelivered }));
        });
        return;
    }
    let mut alerts = core.engine.alerts(q.all);
    for a in &mut alerts {
        a.subject.iter_mut().for_each(|p| core.proc_reader.show(p));
        core.redact.alert(a);
        q.audience.alert(a);
    }
    let _ = reply.send(Ok(Alerts { alerts, undelivered: BTreeMap::new() }));
}

pub(super) fn notify(core: &Core, receiver: String, reply: Reply<Notified>) {
    let service = core.alert_service.clone();
    core.background.spawn(async move {
        let done = service.notify(&receiver).await.map(|r| Notified {
            receiver: r.receiver,
            delivered: r.delivered,
            answer: r.answers.join("; "),
            took_s: r.took_s,
        });
        let _ = reply.send(done.ok_or_else(|| ApiError::not_found("receiver", &receiver)));
    });
}
