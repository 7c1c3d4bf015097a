//! Clients that mean no good: the agent goes on, others are answered, and what is held for a client is bounded.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use jobwarden_tests::agent::{Options, http};
use jobwarden_tests::{Agent, Fixture, eventually, fixture, loudly, ms};
use rustix::process::{Gid, Resource, Rlimit, Uid, getrlimit, setrlimit};

/// nobody and nogroup on Debian, and a uid that nobody has.
const NOBODY: u32 = 65534;
const OTHER: u32 = 65533;

const JOBS: &[u8] = b"GET /v1/jobs HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
const EVENTS: &[u8] = b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n";
const TREE: &[u8] = b"GET /v1/tree HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";

/// An agent whose control socket members of nogroup may read.
fn agent(fixture: &Fixture) -> Result<Agent<'_>> {
    std::fs::set_permissions(fixture.path("."), std::fs::Permissions::from_mode(0o755))?;
    let config = "[agent]\nsocket_group = \"nogroup\"\n";
    let agent = Agent::with(fixture, &Options { config, ..Options::default() })?;
    std::fs::set_permissions(fixture.path("agent"), std::fs::Permissions::from_mode(0o755))?;
    Ok(agent)
}

/// Runs in a thread of its own that has given up root: credentials belong to threads.
fn as_reader<T: Send>(uid: u32, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let gid = Gid::from_raw(NOBODY);
    std::thread::scope(|s| {
        let thread = s.spawn(|| {
            rustix::thread::set_thread_groups(&[])?;
            rustix::thread::set_thread_res_gid(gid, gid, gid)?;
            let uid = Uid::from_raw(uid);
            rustix::thread::set_thread_res_uid(uid, uid, uid)?;
            f()
        });
        thread.join().map_err(|_| anyhow::anyhow!("the reader's thread panicked"))?
    })
}

fn unix(socket: &Path) -> Result<UnixStream> {
    let s = UnixStream::connect(socket)?;
    s.set_read_timeout(Some(ms(5000)))?;
    s.set_write_timeout(Some(ms(5000)))?;
    Ok(s)
}

fn tcp(port: u16) -> Result<TcpStream> {
    let s = TcpStream::connect(("127.0.0.1", port))?;
    s.set_read_timeout(Some(ms(5000)))?;
    s.set_write_timeout(Some(ms(5000)))?;
    Ok(s)
}

/// All of the answer until the agent closes; what came before a timeout or a reset.
fn answer(mut s: impl Read + Write, request: &[u8]) -> String {
    let _ = s.write_all(request);
    let mut all = Vec::new();
    let _ = s.read_to_end(&mut all);
    String::from_utf8_lossy(&all).into_owned()
}

fn status(answer: &str) -> u16 {
    answer.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0)
}

fn resident(agent: &Agent<'_>) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{}/status", agent.pid()))?;
    let kib = text.lines().find_map(|l| l.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(kib.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}

/// Of all its threads.
fn cpu(agent: &Agent<'_>) -> Result<Duration> {
    let text = std::fs::read_to_string(format!("/proc/{}/stat", agent.pid()))?;
    let (_, rest) = text.rsplit_once(')').context("no comm")?;
    let ticks: u64 = rest.split_whitespace().skip(11).take(2).filter_map(|n| n.parse::<u64>().ok()).sum();
    Ok(Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64))
}

fn unharmed(agent: &Agent<'_>) -> Result<()> {
    assert_eq!(agent.cli(&["status"])?.code(), Some(0), "it goes on");
    assert_eq!(agent.get("/healthz")?.0, 200);
    let log = std::fs::read_to_string(&agent.log)?;
    ensure!(!log.contains("panicked"), "{}", agent.log_tail());
    Ok(())
}

#[test]
fn idle_connections_of_a_user_keep_nobody_out() -> Result<()> {
    let fixture = fixture!("idle_connections_of_a_user_keep_nobody_out");
    let agent = agent(&fixture)?;
    let (port, socket) = (agent.port, agent.socket.as_path());
    let stop = AtomicBool::new(false);
    let opened = AtomicUsize::new(0);
    // Half of a request on 80 connections of TCP and as many of the control socket, each anew as soon as it is closed.
    let slow = |tcp_too: bool| {
        while !stop.load(Ordering::SeqCst) {
            let mut byte = [0; 1];
            let half = b"GET / HTTP/1.1\r\nX: ";
            if tcp_too {
                let mut s = tcp(port)?;
                opened.fetch_add(1, Ordering::SeqCst);
                let _ = s.write_all(half).and_then(|()| s.read(&mut byte));
            } else {
                let mut s = unix(socket)?;
                let _ = s.write_all(half).and_then(|()| s.read(&mut byte));
            }
        }
        anyhow::Ok(())
    };
    std::thread::scope(|s| {
        let threads: Vec<_> =
            (0..160).map(|n| s.spawn(move || as_reader(NOBODY, || slow(n % 2 == 0)))).collect();
        let asked = (|| {
            eventually("80 clients are there", ms(5000), || {
                ensure!(opened.load(Ordering::SeqCst) >= 80);
                Ok(())
            })?;
            for round in 0..20 {
                for path in ["/healthz", "/metrics"] {
                    let (status, _) = agent.get(path).with_context(|| format!("round {round}: {path}"))?;
                    ensure!(status == 200, "round {round}: {path}: {status}");
                    let other = as_reader(OTHER, || Ok(http(port, "GET", path, "")?.0))?;
                    ensure!(other == 200, "round {round}: {path}: {other} to another user");
                }
                let other = as_reader(OTHER, || Ok(status(&answer(unix(socket)?, JOBS))))?;
                ensure!(other == 200, "round {round}: {other} to another reader");
                ensure!(agent.cli(&["status"])?.code() == Some(0), "round {round}: root");
                std::thread::sleep(Duration::from_millis(50));
            }
            Ok(())
        })();
        stop.store(true, Ordering::SeqCst);
        for t in threads {
            t.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        asked
    })?;
    unharmed(&agent)
}

/// Seconds until the agent closes it.
fn kept(mut s: impl Read + Write) -> f64 {
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(20) && s.write_all(b"x").is_ok() {
        std::thread::sleep(Duration::from_millis(500));
        match s.read(&mut [0; 1]) {
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            _ => break,
        }
    }
    begun.elapsed().as_secs_f64()
}

#[test]
fn a_byte_now_and_then_does_not_keep_a_connection() -> Result<()> {
    let fixture = fixture!("a_byte_now_and_then_does_not_keep_a_connection");
    let agent = agent(&fixture)?;
    let (a, b) = (tcp(agent.port)?, unix(&agent.socket)?);
    a.set_read_timeout(Some(Duration::from_millis(1)))?;
    b.set_read_timeout(Some(Duration::from_millis(1)))?;
    let (on_tcp, on_unix) = std::thread::scope(|s| {
        let on_tcp = s.spawn(|| kept(a));
        let on_unix = kept(b);
        (on_tcp.join().unwrap_or(f64::MAX), on_unix)
    });
    for took in [on_tcp, on_unix] {
        ensure!((3.0..10.0).contains(&took), "closed after {took:.1} s");
    }
    unharmed(&agent)
}

#[test]
fn event_streams_of_a_user_are_bounded() -> Result<()> {
    let fixture = fixture!("event_streams_of_a_user_are_bounded");
    let agent = agent(&fixture)?;
    let socket = agent.socket.as_path();
    // Opens streams until one is refused.
    let follow = |uid| {
        as_reader(uid, || {
            let mut open = Vec::new();
            for _ in 0..40 {
                let mut s = unix(socket)?;
                s.write_all(EVENTS)?;
                let mut head = [0; 12];
                s.read_exact(&mut head)?;
                if &head != b"HTTP/1.1 200" {
                    return Ok((open, String::from_utf8_lossy(&head).into_owned()));
                }
                open.push(s);
            }
            Ok((open, "none refused".to_owned()))
        })
    };
    let (first, refused) = follow(NOBODY)?;
    assert_eq!((first.len(), refused.as_str()), (8, "HTTP/1.1 503"));
    // Others have their own, and together they leave root's reserve.
    let all: Vec<_> = (0..5).map(|n| follow(OTHER - n)).collect::<Result<_>>()?;
    assert_eq!(all.iter().map(|(s, _)| s.len()).sum::<usize>(), 16, "24 of 32 for readers");
    let mut root = Vec::new();
    for _ in 0..8 {
        let mut s = unix(socket)?;
        s.write_all(EVENTS)?;
        let mut head = [0; 12];
        s.read_exact(&mut head)?;
        assert_eq!(&head, b"HTTP/1.1 200", "root's reserve");
        root.push(s);
    }
    // One that is closed makes room for another one.
    drop(first);
    eventually("a stream of its own again", ms(5000), || {
        let (open, _) = follow(NOBODY)?;
        ensure!(!open.is_empty());
        Ok(())
    })?;
    unharmed(&agent)
}

#[test]
fn a_client_that_reads_nothing_is_closed() -> Result<()> {
    let fixture = fixture!("a_client_that_reads_nothing_is_closed");
    let agent = agent(&fixture)?;
    let before = resident(&agent)?;
    // Trees, one behind the other, far more than the socket has room for. As root, whose rate is the highest.
    let many = b"GET /v1/tree HTTP/1.1\r\nHost: x\r\n\r\n".repeat(100);
    let mut all: Vec<_> = (0..4).map(|_| unix(&agent.socket)).collect::<Result<_>>()?;
    for s in &mut all {
        s.write_all(&many)?;
    }
    let begun = Instant::now();
    eventually("all are closed", ms(15_000), || {
        // Writing fails as soon as the agent has closed it, with nothing read.
        let closed = |s: &mut UnixStream| s.write(b"x").is_err_and(|e| e.kind() == ErrorKind::BrokenPipe);
        let open = all.iter_mut().filter_map(|s| (!closed(s)).then_some(())).count();
        ensure!(open == 0, "{open} are open after {:.1} s", begun.elapsed().as_secs_f64());
        Ok(())
    })?;
    let grown = resident(&agent)?.saturating_sub(before);
    ensure!(grown < 32 << 20, "{} KiB more", grown >> 10);
    unharmed(&agent)
}

#[test]
fn ten_thousand_requests_at_once() -> Result<()> {
    const REQUESTS: usize = 10_000;
    let fixture = fixture!("ten_thousand_requests_at_once");
    let limit = getrlimit(Resource::Nofile);
    // As many descriptors as clients, in this process only: the agent is given what the test had.
    let agent = agent(&fixture)?;
    let more = Rlimit { current: Some(12_000), maximum: limit.maximum.map(|m| m.max(12_000)) };
    setrlimit(Resource::Nofile, more).context("12,000 descriptors")?;
    let (before, begun) = (resident(&agent)?, Instant::now());
    let mut all = Vec::new();
    for _ in 0..REQUESTS {
        // The queue of connections may be full for a moment.
        let Ok(mut s) = tcp(agent.port) else { continue };
        let _ = s.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        all.push(s);
    }
    let peak = resident(&agent)?;
    let mut answers = std::collections::BTreeMap::new();
    for s in all {
        s.set_read_timeout(Some(ms(1000)))?;
        *answers.entry(status(&answer(s, b""))).or_insert(0_usize) += 1;
    }
    let socket = agent.socket.as_path();
    // The control socket: by 100 at a time, each as soon as it is there.
    let left = AtomicUsize::new(REQUESTS);
    let answered = AtomicUsize::new(0);
    std::thread::scope(|s| {
        for n in 0..100_u32 {
            let (left, answered) = (&left, &answered);
            s.spawn(move || {
                as_reader(OTHER - n, || {
                    while left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok()
                    {
                        let got = status(&answer(unix(socket)?, JOBS));
                        answered.fetch_add(usize::from(matches!(got, 200 | 429 | 503)), Ordering::SeqCst);
                    }
                    Ok(())
                })
            });
        }
    });
    let (peak, answered) = (peak.max(resident(&agent)?), answered.into_inner());
    loudly(&format!(
        "{answers:?} on TCP, {answered} answered on the control socket, {:.1} s, {} KiB more than before",
        begun.elapsed().as_secs_f64(),
        peak.saturating_sub(before) >> 10
    ));
    ensure!(answers.get(&200).is_some_and(|&n| n > 50), "{answers:?}");
    ensure!(answers.keys().all(|s| [0, 200, 429, 503].contains(s)), "{answers:?}");
    ensure!(answered > REQUESTS / 2, "{answered} answered");
    ensure!(peak.saturating_sub(before) < 64 << 20, "{} KiB more", peak.saturating_sub(before) >> 10);
    unharmed(&agent)
}

/// Hostile requests, and the status of the answer; 0: closed without one.
fn hostile() -> Vec<(&'static str, Vec<u8>, &'static [u16])> {
    let head = |line: &str, rest: &str| format!("{line}\r\nHost: x\r\n{rest}\r\n").into_bytes();
    let get = |target: &str| head(&format!("GET {target} HTTP/1.1"), "Connection: close\r\n");
    let post = |rest: &str| head("POST /v1/kill HTTP/1.1", rest);
    vec![
        (
            "a header of 100 KiB",
            get("/").into_iter().chain(vec![b'a'; 100 << 10]).collect(),
            &[0, 200, 400, 404, 431],
        ),
        ("a long header", head("GET / HTTP/1.1", &format!("X: {}\r\n", "a".repeat(100 << 10))), &[431]),
        ("a thousand headers", head("GET / HTTP/1.1", &"X: y\r\n".repeat(1000)), &[431]),
        ("a long target", get(&format!("/{}", "a".repeat(100 << 10))), &[414, 431]),
        ("a line without an end", vec![b'G'; 200 << 10], &[400, 414, 431]),
        ("NUL in the target", get("/v1/\0jobs"), &[400]),
        ("NUL in a header", head("GET / HTTP/1.1", "X: a\0b\r\n"), &[400]),
        ("NULs only", vec![0; 4096], &[0, 400]),
        ("HTTP/0.9", b"GET /\r\n\r\n".to_vec(), &[0, 400]),
        ("HTTP/3.7", head("GET / HTTP/3.7", ""), &[0, 400, 505]),
        ("HTTP/2's preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), &[0, 400]),
        ("a method of its own", head("JUMP / HTTP/1.1", "Connection: close\r\n"), &[400, 404, 405]),
        ("CONNECT", head("CONNECT a:80 HTTP/1.1", "Connection: close\r\n"), &[400, 404, 405]),
        ("OPTIONS *", head("OPTIONS * HTTP/1.1", "Connection: close\r\n"), &[400, 404, 405]),
        ("another's absolute form", get("http://example.invalid/nothing"), &[400, 404]),
        ("an absolute form without a path", get("http://example.invalid"), &[200, 400, 404]),
        ("percent-encoded", get("/%76%31/%6aobs"), &[400, 404]),
        ("out of the root", get("/../../etc/passwd"), &[400, 404]),
        ("half of a percent", get("/v1/tree?target=%zz&target=%"), &[400, 404]),
        ("bytes that are not UTF-8", b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(), &[400, 404]),
        ("a fragment", get("/v1/tree#x"), &[200, 400, 404]),
        (
            "two lengths",
            post("Content-Length: 2\r\nContent-Length: 3\r\nConnection: close\r\n\r\n{}"),
            &[400, 405],
        ),
        ("a negative length", post("Content-Length: -1\r\n"), &[400]),
        ("a length of 2^64", post("Content-Length: 18446744073709551616\r\n"), &[400]),
        (
            "length and chunks",
            post("Content-Length: 2\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n{}"),
            &[400, 405],
        ),
        (
            "chunks of nonsense",
            post("Transfer-Encoding: chunked\r\nConnection: close\r\n\r\nzz\r\n{}\r\n"),
            &[400, 405],
        ),
        (
            "a chunk of 2^64",
            post("Transfer-Encoding: chunked\r\nConnection: close\r\n\r\nffffffffffffffffff\r\n"),
            &[400, 405],
        ),
        (
            "an encoding of its own",
            post("Transfer-Encoding: gzip\r\nConnection: close\r\n"),
            &[400, 405, 501],
        ),
        (
            "a long chunk extension",
            post(&format!(
                "Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n1;{}\r\n",
                "a".repeat(64 << 10)
            )),
            &[400, 405],
        ),
        ("a header without a colon", head("GET / HTTP/1.1", "nonsense\r\n"), &[400]),
        ("a folded header", head("GET / HTTP/1.1", "X: a\r\n b\r\n"), &[400]),
        ("line feeds only", b"GET /nothing HTTP/1.1\nHost: x\nConnection: close\n\n".to_vec(), &[400, 404]),
    ]
}

#[test]
fn hostile_requests_are_refused() -> Result<()> {
    let fixture = fixture!("hostile_requests_are_refused");
    let agent = agent(&fixture)?;
    let before = resident(&agent)?;
    for (what, bytes, wanted) in hostile() {
        for (at, got) in
            [("TCP", answer(tcp(agent.port)?, &bytes)), ("control", answer(unix(&agent.socket)?, &bytes))]
        {
            let got = status(&got);
            // A reset may overtake the answer where much is left unread.
            ensure!(wanted.contains(&got) || (bytes.len() > 16 << 10 && got == 0), "{what}, {at}: {got}");
        }
    }
    // Pipelined ones are answered one after the other.
    let two = [
        b"HEAD /healthz HTTP/1.1\r\nHost: x\r\n\r\n".repeat(50),
        b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".to_vec(),
    ]
    .concat();
    let got = answer(tcp(agent.port)?, &two);
    assert_eq!((got.matches("HTTP/1.1 200").count(), got.matches("HTTP/1.1 404").count()), (50, 1), "{got}");
    // A body that is promised and never sent has its time, and holds up nobody.
    let mut promised = unix(&agent.socket)?;
    promised.write_all(b"POST /v1/kill HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n{")?;
    promised.set_read_timeout(Some(ms(15_000)))?;
    let mut said = String::new();
    let _ = promised.read_to_string(&mut said);
    assert_eq!(status(&said), 400, "{said}");
    let grown = resident(&agent)?.saturating_sub(before);
    ensure!(grown < 16 << 20, "{} KiB more", grown >> 10);
    unharmed(&agent)
}

#[test]
fn a_control_socket_that_is_removed_or_replaced() -> Result<()> {
    let fixture = fixture!("a_control_socket_that_is_removed_or_replaced");
    let agent = Agent::start(&fixture, "")?;
    let reached = || {
        let out = agent.cli(&["status"])?;
        ensure!(out.code() == Some(0), "{out:?}");
        Ok(())
    };
    std::fs::remove_file(&agent.socket)?;
    eventually("its file is back", ms(10_000), reached)?;
    let mode = std::fs::metadata(&agent.socket)?.permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    // Another process takes the path: it is left alone, and the agent says that it cannot be reached.
    std::fs::remove_file(&agent.socket)?;
    let other = UnixListener::bind(&agent.socket)?;
    eventually("it says so", ms(10_000), || {
        let (status, body) = agent.get("/readyz")?;
        ensure!(status == 200 && body.contains("clients do not reach this agent"), "{status} {body}");
        Ok(())
    })?;
    ensure!(std::fs::read_to_string(&agent.log)?.contains("clients do not reach this agent"));
    // Nobody listens there any more.
    drop(other);
    eventually("its own file is back", ms(10_000), reached)?;
    let (_, body) = agent.get("/readyz")?;
    ensure!(!body.contains("clients do not reach"), "{body}");
    agent.stop()
}

#[test]
fn a_flood_of_trees_costs_a_share_of_a_processor() -> Result<()> {
    const TIME: Duration = Duration::from_secs(4);
    let fixture = fixture!("a_flood_of_trees_costs_a_share_of_a_processor");
    let agent = agent(&fixture)?;
    let socket = agent.socket.as_path();
    let (before, begun) = (cpu(&agent)?, Instant::now());
    let answered = AtomicUsize::new(0);
    let (used, took, slowest) = std::thread::scope(|s| {
        for _ in 0..16 {
            let answered = &answered;
            s.spawn(move || {
                as_reader(NOBODY, || {
                    while begun.elapsed() < TIME {
                        let got = status(&answer(unix(socket)?, TREE));
                        answered.fetch_add(usize::from(got == 200), Ordering::SeqCst);
                    }
                    Ok(())
                })
            });
        }
        let mut slowest = Duration::ZERO;
        // What root itself asks is little beside it.
        while begun.elapsed() < TIME.checked_sub(Duration::from_secs(1)).unwrap() {
            let asked = Instant::now();
            agent.tree()?;
            slowest = slowest.max(asked.elapsed());
            std::thread::sleep(Duration::from_millis(200));
        }
        std::thread::sleep(TIME.saturating_sub(begun.elapsed()));
        anyhow::Ok((cpu(&agent)?.saturating_sub(before), begun.elapsed(), slowest))
    })?;
    let share = used.as_secs_f64() / took.as_secs_f64();
    let answered = answered.into_inner();
    loudly(&format!("{:.0} % of a processor, {answered} trees, root's slowest {slowest:?}", share * 100.0));
    ensure!(share < 0.5, "{:.0} % of a processor", share * 100.0);
    ensure!(answered > 20, "readers are answered: {answered}");
    ensure!(slowest < ms(1000), "root waits {slowest:?}");
    assert!(agent.metrics()?.sum("jobwarden_events_lost_total", &[]) < 0.5);
    unharmed(&agent)
}
