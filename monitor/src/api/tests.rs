//! The server over real sockets, with a small task in the core's place.

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};

use super::*;
use crate::client::Client;
use crate::model::schema::{Jobs, KillReport, Tree};

struct Running {
    server: Option<Server>,
    socket: PathBuf,
    tcp: SocketAddr,
    ready: watch::Sender<Readiness>,
    _dir: tempfile::TempDir,
}

/// Two processes, of root and of a user whom nobody names.
fn two() -> Tree {
    let process = |pid: u32, above: Option<&str>, uid: u32| {
        serde_json::json!({
            "id": format!("{pid}:5"), "pid": pid, "ppid": 1, "lineage_parent": above, "lineage": "known", "adopter": null,
            "state": "running", "kernel_state": "S", "orphan": false, "state_s": 3.0, "started": "2026-01-01T00:00:00.000Z",
            "comm": "x", "exe": "/x", "argv": ["x", "y z"], "uid": uid, "job": null, "jobs": [], "container": null,
            "cgroup": null, "pid_ns": null, "ns_pid": null, "kernel_thread": pid == 9, "exit": null, "children": [],
        })
    };
    let all = [process(7, None, 0), process(8, Some("7:5"), 4_000_000_000), process(9, None, 0)];
    serde_json::from_value(
        serde_json::json!({"at": "2026-01-01T00:01:00.000Z", "host": "h", "processes": all}),
    )
    .unwrap()
}

/// Answers `tree` with [`two`], `jobs` with none, `kill` with an empty report, and gives every `events` reader one line that it keeps open.
async fn core(mut requests: mpsc::Receiver<Request>) {
    let mut feed = Feed::default();
    while let Some(r) = requests.recv().await {
        match r {
            Request::Tree(_, reply) => drop(reply.send(Ok(two()))),
            Request::Ping(reply) => drop(reply.send(Ok(()))),
            Request::Jobs(reply) => drop(reply.send(Ok(Jobs { jobs: vec![] }))),
            Request::Kill { kill, peer, reply } => {
                assert!(peer.privileged);
                let report = KillReport { target: kill.target.to_string(), ..empty_report() };
                drop(reply.send(Ok(report)));
            }
            Request::Events(filter, reply) => {
                drop(reply.send(feed.subscribe(filter, 0, &|_, _, _| unreachable!("no record"))));
                let line = r#"{"at":"t","kind":"lost","process":null,"count":1}"#;
                feed.announce(0, serde_json::from_str(line).unwrap(), None);
            }
            // The reply is dropped: as a core that is stopping does.
            _ => {}
        }
    }
}

fn empty_report() -> KillReport {
    serde_json::from_str(r#"{"target":"","signalled":[],"survivors":[],"spared":[],"zombies":[],"took_s":0}"#)
        .unwrap()
}

fn start(group: &str) -> Running {
    let dir = tempfile::tempdir().unwrap();
    // Others must reach the socket itself, so that its own mode is what is tested.
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let socket = dir.path().join("s.sock");
    let (tx, rx) = mpsc::channel(16);
    tokio::spawn(core(rx));
    let (ready, watch) = watch::channel(Readiness { ready: false, reasons: vec!["first snapshot".into()] });
    let page: Metrics = Arc::new(|f| Box::pin(async move { Some(format!("x 1 {f:?}\n").repeat(100)) }));
    let options = Options {
        socket: socket.clone(),
        socket_group: group.into(),
        listen: Some("127.0.0.1:0".parse().unwrap()),
        version: "1.2.3".into(),
    };
    let server = Server::start(&options, &Backend { requests: tx, metrics: page, ready: watch }).unwrap();
    Running { tcp: server.tcp_address().unwrap(), server: Some(server), socket, ready, _dir: dir }
}

/// Sends bytes and reads until the other end closes, or for two seconds.
fn raw(mut s: impl std::io::Read + std::io::Write, bytes: &[u8]) -> String {
    // A server that refuses early may close before all is written.
    let _ = s.write_all(bytes);
    let mut out = Vec::new();
    let _ = s.read_to_end(&mut out);
    String::from_utf8_lossy(&out).into_owned()
}

fn tcp(a: SocketAddr) -> std::net::TcpStream {
    let s = std::net::TcpStream::connect(a).unwrap();
    s.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    s
}

fn unix(p: &Path) -> std::os::unix::net::UnixStream {
    let s = std::os::unix::net::UnixStream::connect(p).unwrap();
    s.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    s
}

fn get(a: SocketAddr, path: &str, headers: &str) -> String {
    raw(tcp(a), format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n").as_bytes())
}

fn post(path: &str, body: &str) -> Vec<u8> {
    let n = body.len();
    format!("POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {n}\r\n\r\n{body}")
        .into_bytes()
}

fn status(answer: &str) -> &str {
    answer.split(' ').nth(1).unwrap_or(answer)
}

/// Each from a connection of its own, all at once.
fn at_once(n: usize, f: impl Fn() -> String + Sync) -> Vec<String> {
    std::thread::scope(|s| {
        let all: Vec<_> = (0..n).map(|_| s.spawn(&f)).collect();
        all.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

const KILL: &str = r#"{"target":"7:8","signal":null,"grace_s":null}"#;

#[tokio::test(flavor = "multi_thread")]
async fn tcp_is_for_reading_and_nothing_else() {
    let r = start("");
    let a = r.tcp;
    tokio::task::spawn_blocking(move || {
        assert!(get(a, "/", "").contains("jobwarden 1.2.3"));
        assert_eq!(status(&get(a, "/healthz", "")), "200");
        let not_yet = get(a, "/readyz", "");
        assert_eq!(status(&not_yet), "503");
        assert!(not_yet.contains("first snapshot"));
        r.ready.send_replace(Readiness { ready: true, reasons: vec![] });
        assert_eq!(status(&get(a, "/readyz", "")), "200");
        assert!(get(a, "/metrics", "").contains("text/plain; version=0.0.4"));
        let open = get(a, "/metrics", "Accept: application/openmetrics-text;version=1.0.0\r\n");
        assert!(open.contains("x 1 OpenMetrics") && open.contains("application/openmetrics-text"));
        let packed = get(a, "/metrics", "Accept-Encoding: gzip\r\n");
        assert!(packed.contains("content-encoding: gzip") && !packed.contains("x 1"));
        let head = raw(tcp(a), b"HEAD /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        assert!(status(&head) == "200" && !head.contains("x 1"), "{head}");
        for path in ["/v1/jobs", "/v1/kill", "/metrics/", "/..%2f"] {
            assert_eq!(status(&get(a, path, "")), "404", "{path}");
            let refused = raw(tcp(a), &post(path, KILL));
            assert_eq!(status(&refused), "405", "{path}");
            assert!(refused.contains("allow: GET, HEAD"));
        }
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_scrapes_are_refused_and_probes_are_not() {
    let r = start("");
    let a = r.tcp;
    tokio::task::spawn_blocking(move || {
        // 16 at a time, each as fast as it can: 50 a second are allowed in the long run, 100 at once.
        let many = || {
            let mut s = tcp(a);
            let mut buf = vec![0; 1 << 16];
            let mut refused = 0;
            for _ in 0..25 {
                s.write_all(b"HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
                let n = s.read(&mut buf).unwrap();
                refused += usize::from(status(&String::from_utf8_lossy(&buf[..n])) == "429");
            }
            refused.to_string()
        };
        let refused: usize = at_once(16, many).iter().map(|n| n.parse::<usize>().unwrap()).sum();
        assert!(refused > 0, "400 scrapes at once were all served");
        let mut s = tcp(a);
        let mut buf = vec![0; 1 << 16];
        for _ in 0..400 {
            s.write_all(b"HEAD /readyz HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
            let n = s.read(&mut buf).unwrap();
            assert_eq!(status(&String::from_utf8_lossy(&buf[..n])), "503");
        }
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_is_refused_and_the_server_lives() {
    let r = start("");
    let socket = r.socket.clone();
    let a = r.tcp;
    tokio::task::spawn_blocking(move || {
        let long = format!("GET /v1/jobs?{} HTTP/1.1\r\nHost: x\r\n\r\n", "a".repeat(100_000));
        for bytes in [
            &b"\x00\xff\xfe"[..],
            b"GET\r\n\r\n",
            b"\r\n\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            long.as_bytes(),
        ] {
            let answer = raw(unix(&socket), bytes);
            assert!(answer.is_empty() || status(&answer).starts_with('4'), "{answer}");
            let answer = raw(tcp(a), bytes);
            assert!(answer.is_empty() || status(&answer).starts_with('4'), "{answer}");
        }
        for (path, body) in [
            ("/v1/kill", ""),
            ("/v1/kill", "{"),
            ("/v1/kill", r#"{"target":"nonsense","signal":null,"grace_s":null}"#),
            ("/v1/kill", r#"{"target":"7","signal":0,"grace_s":null}"#),
            ("/v1/kill", r#"{"target":"7","signal":null,"grace_s":-1}"#),
            ("/v1/kill", r#"{"target":"7","signal":null,"grace_s":1e300}"#),
            ("/v1/kill", r#"{"target":"7","unknown":1}"#),
            ("/v1/kill", "[[[[[[[[[["),
            ("/v1/extend", r#"{"job":"j-7:8-1","by_s":null}"#),
            ("/v1/nothing", "{}"),
        ] {
            let answer = raw(unix(&socket), &post(path, body));
            assert_eq!(status(&answer), "400", "{path} {body}: {answer}");
            assert!(answer.contains(r#"{"error":{"code":""#), "{answer}");
        }
        let big = raw(unix(&socket), &post("/v1/kill", &" ".repeat(1 << 20)));
        assert!(big.is_empty() || status(&big) == "400", "{big}");
        let bad_query =
            raw(unix(&socket), b"GET /v1/tree?x=1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        assert_eq!(status(&bad_query), "400");
        let dropped = raw(unix(&socket), b"GET /v1/status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        assert!(status(&dropped) == "503" && dropped.contains("stopping"), "{dropped}");
        let fine = raw(unix(&socket), b"GET /v1/jobs HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        assert!(fine.contains(r#"{"jobs":[]}"#), "{fine}");
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tree_comes_as_it_was_made_and_with_what_explains_it() {
    let r = start("");
    let socket = r.socket.clone();
    tokio::task::spawn_blocking(move || {
        let client = Client::new(&socket).unwrap();
        let json = client.get_text("/v1/tree", &TreeQuery::default()).unwrap();
        assert_eq!(json, serde_json::to_string(&two()).unwrap());
        let (tree, jobs, alerts) = client.tree(&TreeQuery::default()).unwrap();
        assert_eq!(tree, json.as_bytes());
        // The core gives no alerts here: the tree comes without.
        assert!(jobs.is_some_and(|j| j.jobs.is_empty()) && alerts.is_none());
    })
    .await
    .unwrap();
}

/// 80 clients that send a byte now and then, each anew as soon as it is thrown out: a scrape is answered all the same.
#[tokio::test(flavor = "multi_thread")]
async fn idle_and_slow_clients_make_room() {
    let r = start("");
    let a = r.tcp;
    tokio::task::spawn_blocking(move || {
        let mut slow: Vec<_> = (0..200).map(|_| tcp(a)).collect();
        for s in &mut slow {
            let _ = s.write_all(b"GET /metrics HTTP/1.1\r\nX: ");
        }
        for _ in 0..20 {
            assert_eq!(status(&get(a, "/healthz", "")), "200");
        }
        let fine = raw(unix(&r.socket), b"GET /v1/jobs HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        assert_eq!(status(&fine), "200");
        // The rest is thrown out after its 5 s, though each sends a byte now and then.
        let begun = Instant::now();
        let mut open = slow.len();
        while open > 0 {
            assert!(begun.elapsed() < Duration::from_secs(9), "{open} slow clients are never thrown out");
            std::thread::sleep(Duration::from_millis(500));
            slow.retain_mut(|s| {
                s.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
                let waits = |e: &std::io::Error| e.kind() == std::io::ErrorKind::WouldBlock;
                s.write_all(b"x").is_ok() && s.read(&mut [0; 1]).is_err_and(|e| waits(&e))
            });
            open = slow.len();
        }
    })
    .await
    .unwrap();
}

/// A client in Python: prints the status and the error's code, or the exception.
const CLIENT: &str = r#"
import socket, sys, json
s = socket.socket(socket.AF_UNIX)
try:
    s.connect(sys.argv[1])
    body = sys.argv[3].encode()
    s.sendall(f"{sys.argv[2]} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    d = b""
    while (b := s.recv(65536)): d += b
    head, _, rest = d.partition(b"\r\n\r\n")
    print(head.split()[1].decode(), json.loads(rest).get("error", {}).get("code", "ok"))
except PermissionError: print("EACCES")
"#;

fn client(before: &[&str], uid: Option<u32>, socket: &Path, request: &str, body: &str) -> String {
    let words: Vec<&str> = before.iter().copied().chain(["python3", "-c", CLIENT]).collect();
    let mut c = Command::new(words[0]);
    c.args(&words[1..]).arg(socket).args([request, body]).current_dir("/");
    if let Some(u) = uid {
        c.uid(u).gid(u);
    }
    let out = c.output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).trim().to_owned()
}

/// nobody and nogroup on Debian.
const NOBODY: u32 = 65534;

#[tokio::test(flavor = "multi_thread")]
async fn who_may_do_what() {
    if !rustix::process::geteuid().is_root() {
        crate::testing::skipped("who_may_do_what", "needs root, to become other users");
        return;
    }
    let (closed, open) = (start(""), start("nogroup"));
    tokio::task::spawn_blocking(move || {
        let (kill, jobs) = ("POST /v1/kill", "GET /v1/jobs");
        assert_eq!(client(&[], None, &closed.socket, kill, KILL), "200 ok");
        assert_eq!(client(&[], Some(NOBODY), &closed.socket, jobs, ""), "EACCES");
        // A member of the group reads, and changes nothing.
        assert_eq!(client(&[], Some(NOBODY), &open.socket, jobs, ""), "200 ok");
        for (path, body) in [
            (kill, KILL),
            ("POST /v1/exec", "{}"),
            ("POST /v1/exec/end", "{}"),
            ("POST /v1/reload", ""),
            ("POST /v1/notify", r#"{"receiver":"r"}"#),
            ("POST /v1/enforcement", r#"{"on":true,"for_s":null}"#),
            ("POST /v1/extend", r#"{"job":"j-7:8-1","by_s":1}"#),
            ("GET /v1/audit", ""),
        ] {
            assert_eq!(client(&[], Some(NOBODY), &open.socket, path, body), "403 not-permitted", "{path}");
        }
        // A container's root: uid 0, another pid namespace.
        let inside = ["unshare", "--pid", "--fork"];
        assert_eq!(client(&inside, None, &closed.socket, kill, KILL), "403 not-permitted");
        assert_eq!(client(&inside, None, &closed.socket, jobs, ""), "200 ok");
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn events_stream_and_a_stop_ends_everything() {
    let mut r = start("");
    let server = r.server.take().unwrap();
    let socket = r.socket.clone();
    let reader = tokio::task::spawn_blocking(move || {
        let started = Instant::now();
        let mut s = unix(&socket);
        s.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        s.write_all(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let mut out = String::new();
        let _ = s.read_to_string(&mut out);
        (out, started.elapsed())
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    server.stop().await;
    let (out, took) = reader.await.unwrap();
    assert!(out.contains(r#""kind":"lost""#), "{out}");
    assert!(took < Duration::from_secs(5), "{took:?}");
    assert!(!r.socket.exists());
    assert!(std::net::TcpStream::connect(r.tcp).is_err());
}
