//! Delivery against a server of the test's own, programs, restarts and long outages.

use std::sync::atomic::{AtomicBool, Ordering};

use super::testing::{Act, Server, alert, config, resolved, until, webhook};
use super::*;

const GRACE: Duration = Duration::from_secs(5);

pub(super) fn start(cfg: &Config, dir: &Path) -> AlertService {
    AlertService::start(cfg, dir, Clock::system()).unwrap()
}

fn pair(n: u64, state: &str) -> (String, String) {
    (alert(n).id, state.to_owned())
}

#[tokio::test]
async fn an_alert_is_told_once_signed_and_then_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let secret = dir.path().join("secret");
    std::fs::write(&secret, "hunter2\n").unwrap();
    let server = Server::start(|_, _| Act::Answer(200)).await;
    let center = start(&webhook(&server.url, &format!("secret_file = {secret:?}")), dir.path());
    let a = alert(1);
    center.submit(&Alert { state: AlertState::Pending, ..a.clone() }).await.unwrap();
    center.submit(&a).await.unwrap();
    center.submit(&a).await.unwrap();
    until("the firing", async || server.requests().len() == 1).await;
    center.submit(&resolved(&a)).await.unwrap();
    center.submit(&resolved(&a)).await.unwrap();
    until("the end", async || server.requests().len() == 2).await;
    until("all told", async || center.pending() == 0).await;
    assert_eq!(server.told(), [pair(1, "firing"), pair(1, "resolved")]);
    for r in server.requests() {
        use hmac::Mac as _;
        let mut mac = hmac::Hmac::<sha2::Sha256>::new_from_slice(b"hunter2").unwrap();
        mac.update(&r.body);
        let said = r.headers["x-jobwarden-signature"].strip_prefix("sha256=").unwrap();
        let bytes: Vec<u8> =
            (0..32).map(|i| u8::from_str_radix(&said[2 * i..2 * i + 2], 16).unwrap()).collect();
        mac.verify_slice(&bytes).unwrap();
        assert_eq!(r.headers["content-type"], "application/json");
    }
    let n = center.notifications();
    assert_eq!((n[0].sent, n[0].pending, n[0].duration.count()), (2, 0, 2));
    assert_eq!(center.history(None).await, [resolved(&a)]);
    assert_eq!(center.history(Some(Clock::system().now() + 1000)).await, []);
    center.stop(GRACE).await;
}

#[tokio::test]
async fn what_fails_is_tried_again_and_what_is_refused_is_parked() {
    let dir = tempfile::tempdir().unwrap();
    let acts = [
        Act::Answer(500),
        Act::HalfClose,
        Act::Close,
        Act::Hang,
        Act::Answer(408),
        Act::Answer(425),
        Act::RetryAfter(503, 1),
        Act::Answer(202),
        Act::Answer(400),
        Act::Redirect,
    ];
    let server = Server::start(move |n, _| acts.get(n).copied().unwrap_or(Act::Answer(200))).await;
    let cfg = webhook(&format!("{}/t0ken-in-path", server.url), "timeout = \"200ms\"");
    let center = AlertService::start(&cfg, dir.path(), Clock::fast(50)).unwrap();
    let a = alert(1);
    center.submit(&a).await.unwrap();
    until("success after seven failures", async || center.pending() == 0).await;
    assert_eq!(server.requests().len(), 8);
    let b = alert(2);
    center.submit(&b).await.unwrap();
    let parked = async || center.undelivered().await.into_iter().find(|u| u.undelivered[0].parked);
    until("the refusal", async || parked().await.is_some()).await;
    let u = parked().await.unwrap();
    assert_eq!(u.alert.id, b.id);
    let error = u.undelivered[0].error.clone().unwrap();
    assert!(error.contains("400") && error.contains("answer") && !error.contains("t0ken"), "{error}");
    assert_eq!((center.pending(), center.notifications()[0].parked), (0, 1));
    // A newer state is tried anew; this one meets a redirect, which is not followed.
    center.submit(&Alert { count: 2, ..b.clone() }).await.unwrap();
    let redirected = async || center.undelivered().await[0].undelivered[0].clone();
    until("the redirect", async || {
        let u = redirected().await;
        u.parked && u.error.is_some_and(|e| e.contains("302"))
    })
    .await;
    // As is everything that is parked after a reload.
    center.reload(&cfg).await.unwrap();
    until("the second chance", async || center.undelivered().await.is_empty()).await;
    let failed = &center.notifications()[0].failed;
    assert_eq!(
        (failed["timeout"], failed["connect"], failed["unavailable"], failed["refused"]),
        (1, 2, 4, 2)
    );
    center.stop(GRACE).await;
}

#[tokio::test]
async fn retry_after_is_honoured() {
    let dir = tempfile::tempdir().unwrap();
    let server =
        Server::start(|n, _| if n == 0 { Act::RetryAfter(429, 300) } else { Act::Answer(200) }).await;
    let clock = Clock::fast(300);
    let center = AlertService::start(&webhook(&server.url, ""), dir.path(), clock.clone()).unwrap();
    let before = clock.now();
    center.submit(&alert(1)).await.unwrap();
    until("the second try", async || center.pending() == 0).await;
    let waited = clock.now() - before;
    assert!((300_000..900_000).contains(&waited), "{waited}");
    center.stop(GRACE).await;
}

#[tokio::test]
async fn one_bad_alert_of_a_batch_costs_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let bad = alert(3).id;
    let has_bad = {
        let bad = bad.clone();
        move |r: &testing::Request| r.told().iter().any(|(id, _)| *id == bad)
    };
    let server = Server::start(move |_, r| Act::Answer(if has_bad(r) { 400 } else { 200 })).await;
    let center = start(&webhook(&server.url, ""), dir.path());
    center.submit_all((0..10).map(alert).collect()).await.unwrap();
    until("all but one", async || center.pending() == 0).await;
    let left = center.undelivered().await;
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].alert.id, bad);
    center.stop(GRACE).await;
}

/// One hour without the receiver, at 600 times the speed.
#[tokio::test]
async fn an_hours_outage_loses_nothing_and_keeps_the_order() {
    let dir = tempfile::tempdir().unwrap();
    let up = Arc::new(AtomicBool::new(true));
    let state = Arc::clone(&up);
    let server = Server::start(move |n, _| match (state.load(Ordering::SeqCst), n % 3) {
        (true, _) => Act::Answer(200),
        (false, 0) => Act::Answer(503),
        (false, 1) => Act::Close,
        (false, _) => Act::HalfClose,
    })
    .await;
    let clock = Clock::fast(600);
    let center = AlertService::start(&webhook(&server.url, ""), dir.path(), clock.clone()).unwrap();
    center.submit(&alert(1)).await.unwrap();
    until("the first", async || center.pending() == 0).await;
    up.store(false, Ordering::SeqCst);
    let down_since = clock.now();
    let before = server.requests().len();
    center.submit(&resolved(&alert(1))).await.unwrap();
    for n in 2..40 {
        center.submit(&alert(n)).await.unwrap();
        for count in 2..5 {
            center.submit(&Alert { count, ..alert(n) }).await.unwrap();
        }
        if n % 2 == 0 {
            center.submit(&resolved(&alert(n))).await.unwrap();
        }
        clock.sleep(30_000).await;
    }
    // It fires again while its end has not been told.
    let again = Alert { since: "2026-01-01T02:00:00.000Z".into(), ..alert(2) };
    center.submit(&again).await.unwrap();
    while clock.now() < down_since + 3_600_000 {
        clock.sleep(60_000).await;
    }
    let tries = server.requests().len() - before;
    assert!((40..600).contains(&tries), "{tries} tries in an hour");
    up.store(true, Ordering::SeqCst);
    let (back, seen) = (clock.now(), server.requests().len());
    until("all told", async || center.pending() == 0).await;
    assert!(clock.now() - back < 300_000, "{} ms after the outage", clock.now() - back);
    let mut told: Vec<_> = server.requests().iter().skip(seen).flat_map(testing::Request::told).collect();
    let of_two: Vec<_> = told.iter().filter(|t| t.0 == alert(2).id).map(|t| t.1.clone()).collect();
    assert_eq!(of_two, ["resolved", "firing"]);
    told.sort();
    let mut want: Vec<_> = (2..40).map(|n| pair(n, if n % 2 == 0 { "resolved" } else { "firing" })).collect();
    want.extend([pair(1, "resolved"), pair(2, "firing")]);
    want.sort();
    assert_eq!(told, want);
    center.stop(GRACE).await;
}

#[tokio::test]
async fn a_restart_goes_on_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let down = webhook("http://127.0.0.1:1/", "");
    let center = start(&down, dir.path());
    center.submit_all(vec![alert(1), alert(2)]).await.unwrap();
    center.submit(&resolved(&alert(2))).await.unwrap();
    center.stop(GRACE).await;
    assert_eq!(center.submit(&alert(9)).await, Err(SubmitError::Stopped));

    let server = Server::start(|_, _| Act::Answer(200)).await;
    let center = start(&webhook(&server.url, ""), dir.path());
    assert_eq!(center.restore().await, [alert(1)]);
    until("what was owed", async || center.pending() == 0).await;
    let mut told = server.told();
    told.sort();
    assert_eq!(told, [pair(1, "firing"), pair(2, "resolved")]);
    center.stop(GRACE).await;

    // A receiver of another name is new: it hears of what fires, not of the past.
    let cfg =
        config(&format!("[[receiver]]\nname = \"new\"\ntype = \"webhook\"\nurl = \"{}/new\"", server.url));
    let center = start(&cfg, dir.path());
    until("the newcomer", async || center.pending() == 0).await;
    assert_eq!(server.told()[2..], [pair(1, "firing")]);
    center.stop(GRACE).await;
}

#[tokio::test]
async fn reload_adds_changes_and_removes_receivers() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) =
        (Server::start(|_, _| Act::Answer(200)).await, Server::start(|_, _| Act::Answer(200)).await);
    let receiver = |name: &str, url: &str, more: &str| {
        format!("[[receiver]]\nname = \"{name}\"\ntype = \"webhook\"\nurl = \"{url}\"\n{more}\n")
    };
    let center = start(&config(&receiver("a", &one.url, "min_severity = \"error\"")), dir.path());
    center.submit_all(vec![alert(1), alert(2)]).await.unwrap();
    center.submit(&resolved(&alert(2))).await.unwrap();
    let both = receiver("a", &one.url, "") + &receiver("b", &two.url, "send_resolved = false");
    center.reload(&config(&both)).await.unwrap();
    until("who joined", async || center.pending() == 0 && !two.told().is_empty()).await;
    // What had ended below the old threshold is not brought up.
    assert_eq!((one.told(), two.told()), (vec![pair(1, "firing")], vec![pair(1, "firing")]));
    let missing = receiver("a", &one.url, "secret_file = \"/nonexistent\"");
    assert!(matches!(center.reload(&config(&missing)).await, Err(AlertError::Target(_))));
    center.submit(&resolved(&alert(1))).await.unwrap();
    until("the end", async || center.pending() == 0).await;
    assert_eq!((one.told().len(), two.told().len()), (2, 1));
    center.reload(&config(&receiver("b", &two.url, ""))).await.unwrap();
    center.submit(&alert(5)).await.unwrap();
    until("who stayed", async || two.told().len() == 2).await;
    assert_eq!(one.told().len(), 2);
    assert_eq!(center.notifications().len(), 1);
    center.stop(GRACE).await;
}

#[tokio::test]
async fn filters_keep_out_kinds_and_severities() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(|_, _| Act::Answer(200)).await;
    let more = "kinds = [\"zombie\", \"job-timeout\"]\nmin_severity = \"warning\"";
    let center = start(&webhook(&server.url, more), dir.path());
    let kind = |n, kind, severity| Alert { kind, severity, ..alert(n) };
    let all = vec![
        kind(1, AlertKind::Zombie, Severity::Info),
        kind(2, AlertKind::Orphan, Severity::Critical),
        kind(3, AlertKind::JobTimeout, Severity::Warning),
    ];
    center.submit_all(all).await.unwrap();
    until("one of three", async || center.pending() == 0).await;
    assert_eq!(server.told(), [pair(3, "firing")]);
    center.stop(GRACE).await;
}

#[tokio::test]
async fn pagerduty_gets_trigger_and_resolve_with_the_key_from_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let key = dir.path().join("key");
    std::fs::write(&key, "R0UTING\n").unwrap();
    let server = Server::start(|_, _| Act::Answer(202)).await;
    let cfg = config(&format!(
        "[[receiver]]\nname = \"pd\"\ntype = \"pagerduty\"\nurl = \"{}/v2/enqueue\"\nrouting_key_file = {key:?}",
        server.url
    ));
    let center = start(&cfg, dir.path());
    center.submit(&alert(1)).await.unwrap();
    until("the trigger", async || server.requests().len() == 1).await;
    center.submit(&resolved(&alert(1))).await.unwrap();
    until("the resolve", async || server.requests().len() == 2).await;
    let bodies: Vec<_> = server.requests().iter().map(testing::Request::json).collect();
    assert_eq!(bodies[0]["event_action"], "trigger");
    assert_eq!(bodies[1]["event_action"], "resolve");
    for b in &bodies {
        assert_eq!((&b["routing_key"], &b["dedup_key"]), (&"R0UTING".into(), &alert(1).id.into()));
        assert!(["summary", "source", "severity"].iter().all(|k| b["payload"][k].is_string()), "{b}");
        assert!(b["links"][0]["href"].as_str().is_some_and(|l| l.ends_with("docs/alerts/zombie.md")));
    }
    std::fs::remove_file(&key).unwrap();
    center.submit(&alert(2)).await.unwrap();
    let error = async || center.undelivered().await.first().and_then(|u| u.undelivered[0].error.clone());
    until("the missing key", async || error().await.is_some()).await;
    assert!(!error().await.unwrap().contains("R0UTING"));
    assert_eq!(center.notifications()[0].failed["secret"], 1);
    center.stop(GRACE).await;
}

#[tokio::test]
async fn alertmanager_is_told_again_before_its_alerts_end() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(|_, _| Act::Answer(200)).await;
    let cfg = config(&format!(
        "[[receiver]]\nname = \"am\"\ntype = \"alertmanager\"\nurls = [\"{}\", \"http://127.0.0.1:1\"]",
        server.url
    ));
    let clock = Clock::fast(600);
    let center = AlertService::start(&cfg, dir.path(), clock.clone()).unwrap();
    let started = clock.now();
    center.submit(&alert(1)).await.unwrap();
    until("ten tellings", async || server.requests().len() >= 10).await;
    let spent = clock.now() - started;
    assert!((9 * 55_000..1_200_000).contains(&spent), "{spent}");
    assert_eq!(center.pending(), 0, "one peer is enough");
    center.submit(&resolved(&alert(1))).await.unwrap();
    let last = || server.requests().last().unwrap().json()[0].clone();
    until("the end", async || last()["endsAt"] == "2026-01-01T00:01:00.000Z").await;
    let n = server.requests().len();
    clock.sleep(300_000).await;
    assert_eq!(server.requests().len(), n, "an end is told once");
    for r in server.requests() {
        assert_eq!(r.path, "/api/v2/alerts");
        let a = &r.json()[0];
        assert_eq!(a["startsAt"], "2026-01-01T00:00:00.000Z");
        assert_eq!(
            (&a["labels"]["alertname"], &a["labels"]["alert_id"]),
            (&"JobwardenZombie".into(), &alert(1).id.into())
        );
        assert_eq!(a["annotations"]["summary"], "alert 1");
    }
    center.stop(GRACE).await;
}

pub(super) fn exec(script: &str, timeout: &str) -> Config {
    config(&format!(
        "[[receiver]]\nname = \"x\"\ntype = \"exec\"\ncommand = [\"/bin/sh\", \"-c\", {}]\ntimeout = \"{timeout}\"",
        toml::Value::from(script)
    ))
}

pub(super) fn alive(pid_file: &Path) -> bool {
    let pid = std::fs::read_to_string(pid_file).unwrap();
    std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()))
        .is_ok_and(|s| !s.contains(") Z ") && !s.contains(") X "))
}

#[tokio::test]
async fn a_program_gets_the_alert_and_leaves_nobody_behind() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().display();
    // The grandchild leaves the session, ignores SIGTERM and holds standard error open.
    let script = format!(
        "cat > {at}/body; echo \"$JOBWARDEN_ALERT_ID $JOBWARDEN_ALERT_STATE $JOBWARDEN_ALERT_KIND\" > {at}/env; \
         setsid sh -c 'trap \"\" TERM; echo $$ > {at}/pid; sleep 1000' & \
         while ! test -s {at}/pid; do sleep 0.01; done"
    );
    let center = start(&exec(&script, "10s"), dir.path());
    center.submit(&alert(1)).await.unwrap();
    until("the program", async || center.pending() == 0).await;
    assert_eq!(
        std::fs::read_to_string(dir.path().join("env")).unwrap(),
        format!("{} firing zombie\n", alert(1).id)
    );
    let body: serde_json::Value =
        serde_json::from_slice(&std::fs::read(dir.path().join("body")).unwrap()).unwrap();
    assert_eq!((&body["version"], &body["alerts"][0]["id"]), (&1.into(), &alert(1).id.into()));
    assert!(!alive(&dir.path().join("pid")));
    center.stop(GRACE).await;
}

#[tokio::test]
async fn what_waits_for_its_cause_is_on_the_disk_and_is_told_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(|_, _| Act::Answer(200)).await;
    let center = start(&webhook(&server.url, ""), dir.path());
    let held = |n| Submission { alert: alert(n), hold: Some(Duration::from_mins(10)) };
    center.submit_each(vec![held(1), held(2)]).await.unwrap();
    // The cause of the second one comes.
    let with_cause = Alert { summary: "blocked on a pipe".into(), ..alert(2) };
    center.submit(&with_cause).await.unwrap();
    until("the second", async || center.pending() == 1).await;
    assert_eq!(server.told(), [pair(2, "firing")], "once, with its cause, and the first not yet");
    assert_eq!(server.requests()[0].json()["alerts"][0]["summary"], "blocked on a pipe");
    center.stop(GRACE).await;
    // Nobody is there any more who could say that the wait is over.
    let center = start(&webhook(&server.url, ""), dir.path());
    until("the first", async || center.pending() == 0).await;
    assert_eq!(server.told(), [pair(2, "firing"), pair(1, "firing")]);
    center.stop(GRACE).await;
}

#[tokio::test]
async fn a_program_that_hangs_or_fails_is_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().display();
    let script = format!(
        "if test -e {at}/second; then exit 0; elif test -e {at}/first; then touch {at}/second; echo no luck >&2; exit 3; \
         else touch {at}/first; setsid sh -c 'echo $$ > {at}/pid; sleep 1000' & wait; fi"
    );
    let center = start(&exec(&script, "400ms"), dir.path());
    center.submit(&alert(1)).await.unwrap();
    let error = async || {
        let left = center.undelivered().await;
        left.first().and_then(|u| u.undelivered[0].error.clone()).unwrap_or_default()
    };
    until("the timeout", async || error().await.contains("not ended after 0.4 s")).await;
    assert!(!alive(&dir.path().join("pid")));
    until("the failure", async || error().await.contains("no luck")).await;
    until("success", async || center.pending() == 0).await;
    let failed = &center.notifications()[0].failed;
    assert_eq!((failed["timeout"], failed["program"]), (1, 1));
    center.stop(GRACE).await;
}

#[tokio::test]
async fn notify_says_what_came_back() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(|n, _| Act::Answer(if n < 2 { 200 } else { 403 })).await;
    let center = start(&webhook(&server.url, "min_severity = \"critical\""), dir.path());
    let r = center.notify("hook").await.unwrap();
    assert!(r.delivered && r.answers.len() == 2, "{r:?}");
    let told = server.told();
    assert_eq!((told[0].1.as_str(), told[1].1.as_str()), ("firing", "resolved"));
    let r = center.notify("hook").await.unwrap();
    assert!(!r.delivered && r.answers[0].contains("403"), "{r:?}");
    assert_eq!(center.notify("nobody").await, None);
    assert_eq!(center.undelivered().await, []);
    center.stop(GRACE).await;
}

#[tokio::test]
async fn ten_thousand_alerts_arrive_with_bounded_memory() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(|_, _| Act::Answer(200)).await;
    let center = AlertService::start(&webhook(&server.url, ""), dir.path(), Clock::fast(50)).unwrap();
    for chunk in (0..10_000u64).collect::<Vec<_>>().chunks(500) {
        center.submit_all(chunk.iter().map(|&n| alert(n)).collect()).await.unwrap();
    }
    until("all", async || center.pending() == 0).await;
    let mut ids: Vec<_> = server.told().into_iter().map(|(id, _)| id).collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 10_000);
    assert!(server.requests().len() >= 10_000 / 32);
    center.stop(GRACE).await;
}

#[tokio::test]
async fn more_alerts_than_there_is_room_for_push_out_the_oldest_that_ended() {
    let dir = tempfile::tempdir().unwrap();
    let center = start(&webhook("http://127.0.0.1:1/", ""), dir.path());
    let most = queue::MAX_EPISODES as u64;
    center.submit_all((0..most).map(alert).collect()).await.unwrap();
    let full = center.submit(&alert(most)).await;
    assert_eq!(full, Err(SubmitError::Full { kept: queue::MAX_EPISODES }));
    center.submit(&resolved(&alert(7))).await.unwrap();
    center.submit(&alert(most)).await.unwrap();
    assert_eq!(center.history(None).await, []);
    assert_eq!(center.notifications()[0].dropped, 2, "one was not kept, one was forgotten");
    assert_eq!(center.restore().await.len(), queue::MAX_EPISODES);
    center.stop(GRACE).await;
}

#[tokio::test]
async fn a_store_that_does_not_read_is_moved_away() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("alerts.db"), vec![b'x'; 8192]).unwrap();
    let server = Server::start(|_, _| Act::Answer(200)).await;
    let center = start(&webhook(&server.url, ""), dir.path());
    center.submit(&alert(1)).await.unwrap();
    until("the alert", async || center.pending() == 0).await;
    assert!(dir.path().join("alerts.db.bad").exists());
    center.stop(GRACE).await;
}
