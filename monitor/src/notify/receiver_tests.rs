//! What single kinds of receivers promise: PagerDuty whatever it answers, a peer of Alertmanager that missed an end, a
//! receiver behind a private CA, a program whose family hides.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::Value;

use super::testing::{Act, Request, Server, alert, config, resolved, until, webhook};
use super::tests::{alive, exec, start};
use super::*;

const GRACE: Duration = Duration::from_secs(5);

/// An event as PagerDuty's documentation (Events API v2) has it; what it would refuse is a panic.
fn event(r: &Request) -> (String, String) {
    assert_eq!((r.path.as_str(), r.headers["content-type"].as_str()), ("/v2/enqueue", "application/json"));
    assert!(r.body.len() <= 512 * 1024);
    let e = r.json();
    let keys = |v: &Value| v.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    let known =
        ["routing_key", "event_action", "dedup_key", "payload", "images", "links", "client", "client_url"];
    assert!(keys(&e).iter().all(|k| known.contains(&k.as_str())), "{e}");
    let text = |v: &Value, max: usize| {
        let s = v.as_str().unwrap_or_else(|| panic!("{e}"));
        assert!((1..=max).contains(&s.chars().count()), "{e}");
        s.to_owned()
    };
    assert_eq!(e["routing_key"], "R0UTING");
    let action = text(&e["event_action"], 12);
    assert!(["trigger", "resolve"].contains(&action.as_str()), "{e}");
    let p = &e["payload"];
    let known =
        ["summary", "source", "severity", "timestamp", "component", "group", "class", "custom_details"];
    assert!(keys(p).iter().all(|k| known.contains(&k.as_str())), "{e}");
    text(&p["summary"], 1024);
    text(&p["source"], 1024);
    assert!(["critical", "error", "warning", "info"].contains(&p["severity"].as_str().unwrap()), "{e}");
    humantime::parse_rfc3339(p["timestamp"].as_str().unwrap()).unwrap();
    assert!(e["links"].as_array().unwrap().iter().all(|l| l["href"].is_string()), "{e}");
    (text(&e["dedup_key"], 255), action)
}

#[tokio::test]
async fn pagerduty_whatever_it_answers() {
    let dir = tempfile::tempdir().unwrap();
    let key = dir.path().join("key");
    std::fs::write(&key, "R0UTING").unwrap();
    let acts = [
        Act::RetryAfter(429, 2),
        Act::Answer(500),
        Act::Hang,
        Act::HalfClose,
        Act::Close,
        Act::Answer(202),
        Act::Answer(400),
    ];
    // A port on which nobody listens yet: it is down at first.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let cfg = config(&format!(
        "[[receiver]]\nname = \"pd\"\ntype = \"pagerduty\"\nurl = \"http://127.0.0.1:{port}/v2/enqueue\"\n\
         routing_key_file = {key:?}\ntimeout = \"200ms\""
    ));
    let center = AlertService::start(&cfg, dir.path(), Clock::fast(50)).unwrap();
    center.submit(&alert(1)).await.unwrap();
    let failed = |reason: &str| center.notifications()[0].failed[reason];
    until("a failure", async || failed("connect") > 0).await;
    let down = failed("connect");
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await.unwrap();
    let server = Server::on(listener, move |n, _| acts.get(n).copied().unwrap_or(Act::Answer(202)));
    until("the trigger", async || center.pending() == 0).await;
    assert!(failed("connect") >= down + 2, "half an answer, and none");
    assert_eq!((failed("rate_limited"), failed("unavailable"), failed("timeout")), (1, 1, 1));
    center.submit(&alert(2)).await.unwrap();
    until("the refusal", async || center.notifications()[0].parked == 1).await;
    assert!(center.undelivered().await[0].undelivered[0].error.clone().unwrap().contains("400"));
    center.submit(&resolved(&alert(1))).await.unwrap();
    until("the resolve", async || center.pending() == 0).await;
    let told: Vec<_> = server.requests().iter().map(event).collect();
    let of = |n: u64, action: &str| (alert(n).id, action.to_owned());
    assert!(told[..6].iter().all(|t| *t == of(1, "trigger")), "{told:?}");
    assert_eq!(told[6..], [of(2, "trigger"), of(1, "resolve")]);
    center.stop(GRACE).await;
}

/// Bodies of a peer's requests, as (id, whether it is an end).
fn heard(s: &Server) -> Vec<(String, bool)> {
    let one = |a: &Value| {
        let ends = humantime::parse_rfc3339(a["endsAt"].as_str().unwrap()).unwrap();
        (a["labels"]["alert_id"].as_str().unwrap().to_owned(), ends <= std::time::SystemTime::now())
    };
    s.requests()
        .iter()
        .flat_map(|r| r.json().as_array().unwrap().iter().map(one).collect::<Vec<_>>())
        .collect()
}

#[tokio::test]
async fn a_peer_of_alertmanager_that_missed_an_end_is_told_it_later() {
    let dir = tempfile::tempdir().unwrap();
    let ill = Arc::new(AtomicBool::new(false));
    let up = Server::start(|_, _| Act::Answer(200)).await;
    let flaky = Arc::clone(&ill);
    let other =
        Server::start(move |_, _| Act::Answer(if flaky.load(Ordering::SeqCst) { 503 } else { 200 })).await;
    let cfg = config(&format!(
        "[[receiver]]\nname = \"am\"\ntype = \"alertmanager\"\nurls = [\"{}\", \"{}\"]",
        up.url, other.url
    ));
    let center = AlertService::start(&cfg, dir.path(), Clock::system()).unwrap();
    center.submit_all(vec![alert(1), alert(2)]).await.unwrap();
    until("both", async || heard(&up).len() == 2 && heard(&other).len() == 2).await;
    ill.store(true, Ordering::SeqCst);
    center.submit_all(vec![resolved(&alert(1)), resolved(&alert(2))]).await.unwrap();
    until("the ends at one", async || center.pending() == 0).await;
    until("an attempt at the other", async || heard(&other).len() > 2).await;
    // One of them fires anew before the other peer is well: its old end is not told any more.
    let again = Alert { since: "2026-01-01T00:02:00.000Z".into(), ..alert(2) };
    center.submit(&again).await.unwrap();
    until("the second firing", async || center.pending() == 0).await;
    ill.store(false, Ordering::SeqCst);
    let before = heard(&other).len();
    until("the end that was missed", async || heard(&other).len() > before).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(heard(&other)[before..], [(alert(1).id, true)]);
    assert_eq!(heard(&up).iter().filter(|h| h.1).count(), 2, "who had them is not told again");
    center.stop(GRACE).await;
}

/// A CA and a server's certificate for 127.0.0.1 made by it, by the openssl command. None where there is none.
fn certificates(dir: &Path) -> Option<[PathBuf; 3]> {
    let script = "
        openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout ca.key -out ca.pem \
            -days 2 -subj /CN=test-ca -addext basicConstraints=critical,CA:TRUE &&
        openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout key.pem -out csr.pem \
            -subj /CN=receiver &&
        printf 'subjectAltName=IP:127.0.0.1\\nbasicConstraints=CA:FALSE\\n' > ext &&
        openssl x509 -req -in csr.pem -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out cert.pem";
    let done = Command::new("sh").args(["-c", script]).current_dir(dir).output().ok()?;
    // 127: the shell did not find openssl. Everything else is a fault of the script.
    if done.status.code() == Some(127) {
        return None;
    }
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    Some(["ca.pem", "cert.pem", "key.pem"].map(|f| dir.join(f)))
}

/// An HTTPS server that takes everything; how many it took, and its URL.
fn https(cert: &Path, key: &Path) -> (Arc<AtomicUsize>, String) {
    let certs = CertificateDer::pem_file_iter(cert).unwrap().collect::<Result<Vec<_>, _>>().unwrap();
    let key = PrivateKeyDer::from_pem_file(key).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls =
        rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let tls = Arc::new(tls.with_no_client_auth().with_single_cert(certs, key).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://{}/", listener.local_addr().unwrap());
    let taken = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&taken);
    // Lives as long as the test's process; each connection ends with its client.
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let connection = rustls::ServerConnection::new(Arc::clone(&tls)).unwrap();
            let mut s = rustls::StreamOwned::new(connection, stream);
            let (mut request, mut buf) = (Vec::new(), [0; 4096]);
            // An error is a client that does not trust this server.
            while let Ok(n @ 1..) = s.read(&mut buf) {
                request.extend_from_slice(&buf[..n]);
                if request.ends_with(b"}") {
                    count.fetch_add(1, Ordering::SeqCst);
                    let _ = s.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
                    break;
                }
            }
        }
    });
    (taken, url)
}

#[tokio::test]
async fn a_receiver_with_a_ca_of_its_own_is_trusted_and_no_other() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (Some([ca, cert, key]), Some([stranger, ..])) =
        (certificates(dir.path()), certificates(other.path()))
    else {
        crate::testing::skipped(
            "a_receiver_with_a_ca_of_its_own_is_trusted_and_no_other",
            "no openssl (Debian's package openssl)",
        );
        return;
    };
    let (taken, url) = https(&cert, &key);
    for untrusted in [String::new(), format!("ca_file = {stranger:?}")] {
        let state = tempfile::tempdir().unwrap();
        let center = AlertService::start(&webhook(&url, &untrusted), state.path(), Clock::system()).unwrap();
        let said = center.notify("hook").await.unwrap();
        assert!(!said.delivered && said.answers[0].contains("certificate"), "{said:?}");
        center.stop(GRACE).await;
    }
    assert_eq!(taken.load(Ordering::SeqCst), 0);
    let center =
        AlertService::start(&webhook(&url, &format!("ca_file = {ca:?}")), dir.path(), Clock::system())
            .unwrap();
    center.submit(&alert(1)).await.unwrap();
    until("the alert", async || center.pending() == 0).await;
    assert_eq!(taken.load(Ordering::SeqCst), 1);
    // A file that holds no certificate is refused at once, and nothing is changed.
    let bad = center.reload(&webhook(&url, &format!("ca_file = {key:?}"))).await;
    assert!(bad.is_err_and(|e| e.to_string().contains("no certificate")));
    center.stop(GRACE).await;
}

/// The mark is gone from every environment, so only the process group and the parentage tell who is whose.
#[tokio::test]
async fn a_family_that_clears_its_environment_is_ended_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().display();
    let wait = |file: &str| format!("while ! test -s {at}/{file}; do sleep 0.01; done");
    // One stays in the group and loses its parent; one leaves the group and keeps its parent to the timeout.
    let group =
        format!("env -i sh -c 'echo $$ > {at}/group; exec sleep 1000' & {}; exec sleep 0", wait("group"));
    let center = start(&exec(&group, "10s"), dir.path());
    center.submit(&alert(1)).await.unwrap();
    until("the program", async || center.pending() == 0).await;
    assert!(!alive(&dir.path().join("group")), "it was in the program's process group");
    center.stop(GRACE).await;
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().display();
    let child = format!("exec env -i sh -c 'setsid sh -c \"echo \\$\\$ > {at}/child; sleep 1000\" & wait'");
    let center = start(&exec(&child, "600ms"), dir.path());
    center.submit(&alert(1)).await.unwrap();
    let error = async || {
        let left = center.undelivered().await;
        left.first().and_then(|u| u.undelivered[0].error.clone()).unwrap_or_default()
    };
    until("the timeout", async || error().await.contains("not ended after")).await;
    assert!(!alive(&dir.path().join("child")), "its parent was the program");
    center.stop(GRACE).await;
}
