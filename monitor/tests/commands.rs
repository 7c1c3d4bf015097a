//! The program as a user runs it, against a control socket with a small task in the agent's place: what it prints, where,
//! and its exit status.
#![expect(clippy::unwrap_used, reason = "what fails in a helper here fails its test")]

use std::io::Read as _;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use jobwarden::api::{
    ApiError, Backend, Class, Feed, Matched, Metrics, Notified, Options, Readiness, Request, Server,
};
use jobwarden::model::key::Key;
use jobwarden::model::schema::{Alerts, ErrorBody, EventLine, Jobs, KillReport, Ref, Tree};
use tokio::sync::{mpsc, watch};

/// A server that answers in this process until it is dropped.
struct Fake {
    dir: tempfile::TempDir,
    _runtime: tokio::runtime::Runtime,
    _server: Server,
}

const EVIL: &str = "\x1b]0;owned\x07\n";

fn evil() -> Ref {
    Ref { id: Key::new(7, 8), pid: 7, comm: EVIL.into(), argv: vec![EVIL.into()] }
}

fn report(survivors: Vec<Ref>) -> KillReport {
    KillReport {
        target: "7".into(),
        signalled: vec![],
        survivors,
        stuck: vec![],
        spared: vec![],
        zombies: vec![],
        took_s: 0.0,
    }
}

async fn core(mut requests: mpsc::Receiver<Request>) {
    while let Some(r) = requests.recv().await {
        match r {
            Request::Tree(q, reply) => {
                let tree = Tree { at: String::new(), host: "h".into(), processes: vec![], unread: vec![] };
                let known = q.target.is_none();
                drop(reply.send(if known { Ok(tree) } else { Err(ApiError::not_found("process", "7")) }));
            }
            Request::Ping(reply) => drop(reply.send(Ok(()))),
            Request::Jobs(reply) => drop(reply.send(Ok(Jobs { jobs: vec![] }))),
            Request::Alerts(_, reply) => drop(
                reply.send(Ok(Alerts { alerts: vec![], undelivered: std::collections::BTreeMap::new() })),
            ),
            Request::Kill { kill, reply, .. } => {
                let several = || {
                    let one = Matched { target: "j-7:8-1".into(), what: EVIL.into() };
                    ApiError::several("name:pair", vec![one.clone(), one])
                };
                drop(reply.send(match kill.target.to_string().as_str() {
                    "name:pair" if !kill.all => Err(several()),
                    "7" => Ok(report(vec![evil()])),
                    _ => Ok(report(vec![])),
                }));
            }
            Request::Events(filter, reply) => {
                // Three lines, and the agent is gone.
                let mut feed = Feed::default();
                drop(reply.send(feed.subscribe(filter, 0, &|_, _, _| unreachable!("no record"))));
                for kind in ["fork", "exec", "exit"] {
                    let line = EventLine {
                        at: "2026-11-23T12:00:00Z".into(),
                        kind: kind.into(),
                        process: Some(evil()),
                        more: std::collections::BTreeMap::new(),
                    };
                    feed.announce(0, line, None);
                }
            }
            Request::Notify { reply, .. } => {
                let answer = "500 Internal Server Error".into();
                let said = Notified { receiver: "r".into(), delivered: false, answer, took_s: 0.1 };
                drop(reply.send(Ok(said)));
            }
            Request::Reload { reply, .. } => {
                let e = ApiError::new(Class::Failed, "invalid-config", "j.toml:1:1: no\nsecond line");
                drop(reply.send(Err(e)));
            }
            // Dropped: as an agent that is stopping does.
            _ => {}
        }
    }
}

impl Fake {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let inside = runtime.enter();
        let (requests, rx) = mpsc::channel(16);
        tokio::spawn(core(rx));
        let (_, ready) = watch::channel(Readiness::default());
        let metrics: Metrics = Arc::new(|_| Box::pin(async { None }));
        let options = Options {
            socket: dir.path().join("s.sock"),
            socket_group: String::new(),
            listen: None,
            version: "0".into(),
        };
        let server = Server::start(&options, &Backend { requests, metrics, ready }).unwrap();
        drop(inside);
        Self { dir, _runtime: runtime, _server: server }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("s.sock")
    }

    fn run(&self, args: &[&str]) -> Said {
        let mut c = program();
        c.env("JOBWARDEN_SOCKET", self.socket()).args(args);
        Said::of(&c.output().unwrap())
    }
}

fn program() -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_jobwarden"));
    c.env_remove("JOBWARDEN_SOCKET").env_remove("NO_COLOR").stdin(Stdio::null());
    c
}

fn run(args: &[&str]) -> Said {
    Said::of(&program().args(args).output().unwrap())
}

#[derive(Debug)]
struct Said {
    status: Option<i32>,
    out: String,
    err: String,
}

impl Said {
    fn of(o: &Output) -> Self {
        let text = |b: &[u8]| String::from_utf8(b.to_vec()).unwrap();
        Self { status: o.status.code(), out: text(&o.stdout), err: text(&o.stderr) }
    }

    /// The contract's error object on stderr, and nothing on stdout.
    fn error(&self) -> ErrorBody {
        assert_eq!(self.out, "", "{self:?}");
        serde_json::from_str(&self.err).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    fn is_clean(&self) -> bool {
        !self.out.chars().chain(self.err.chars()).any(|c| c.is_control() && c != '\n')
    }
}

#[test]
fn done_is_0_in_text_and_in_json() {
    let fake = Fake::start();
    for args in
        [&["tree"][..], &["jobs"], &["alerts"], &["alerts", "--history", "--since", "1h"], &["kill", "8"]]
    {
        let text = fake.run(args);
        assert_eq!((text.status, text.err.as_str()), (Some(0), ""), "{args:?}");
        assert!(!text.out.is_empty() && text.is_clean(), "{text:?}");
        let json = fake.run(&[&["--json"], args].concat());
        assert_eq!(json.status, Some(0), "{args:?}");
        serde_json::from_str::<serde_json::Value>(&json.out).unwrap();
        // After the subcommand it is the same option.
        assert_eq!(fake.run(&[args, &["--json"]].concat()).out, json.out);
    }
}

#[test]
fn survivors_several_and_refusals_are_1() {
    let fake = Fake::start();
    let left = fake.run(&["kill", "7"]);
    assert_eq!(left.status, Some(1));
    assert!(left.out.contains("SURVIVED") && left.is_clean(), "{left:?}");
    // A report is no error: it goes to stdout, with the same status.
    let json = fake.run(&["--json", "kill", "7"]);
    assert_eq!(json.status, Some(1));
    assert_eq!(serde_json::from_str::<KillReport>(&json.out).unwrap().survivors.len(), 1);
    let several = fake.run(&["kill", "name:pair"]);
    assert_eq!((several.status, several.out.as_str()), (Some(1), ""));
    assert!(several.err.matches("j-7:8-1").count() == 2 && several.is_clean(), "{several:?}");
    let e = fake.run(&["--json", "kill", "name:pair"]).error().error;
    assert_eq!((e.code.as_str(), e.matches.len()), ("several-match", 2));
    assert_eq!(fake.run(&["kill", "--all", "name:pair"]).status, Some(0));
    let refused = fake.run(&["reload"]);
    assert_eq!(refused.status, Some(1));
    assert!(refused.err.contains("j.toml:1:1: no\nsecond line"), "{refused:?}");
    assert_eq!(fake.run(&["notify", "r"]).status, Some(1));
}

#[test]
fn mistakes_of_usage_are_2() {
    for args in [
        &["nonsense"][..],
        &["tree", "--nonsense"],
        &["tree", "not-a-target"],
        &["tree", "--user", "nobody-is-called-so"],
        &["kill"],
        &["kill", "-5"],
        &["kill", "0"],
        &["kill", "--grace", "10", "7"],
        &["kill", "--signal", "SIGNONSENSE", "7"],
        &["jobs", "extend", "7", "1m"],
        &["events", "--pid", "0"],
        &["alerts", "--since", "1h"],
        &["enforcement", "perhaps"],
        &["why", "7", "--container"],
        &["--color", "sometimes", "tree"],
    ] {
        let text = run(args);
        assert_eq!((text.status, text.out.as_str()), (Some(2), ""), "{args:?}: {text:?}");
        assert!(!text.err.is_empty(), "{args:?}");
        let json = run(&[&["--json"], args].concat());
        assert_eq!(json.status, Some(2), "{args:?}");
        assert_eq!(json.error().error.code, "usage", "{args:?}");
    }
}

#[test]
fn no_agent_is_3_and_says_where_it_looked() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("none").to_string_lossy().into_owned();
    for args in [
        &["tree"][..],
        &["jobs"],
        &["jobs", "extend", "j-7:8-1", "1m"],
        &["alerts"],
        &["events"],
        &["why"],
        &["kill", "7"],
        &["status"],
        &["enforcement", "on"],
        &["audit"],
        &["reload"],
        &["notify", "r"],
    ] {
        let json = run(&[&["--json", "--socket", &socket], args].concat());
        assert_eq!(json.status, Some(3), "{args:?}");
        let e = json.error().error;
        assert!(e.code == "agent-not-reachable" && e.message.contains(&socket) && e.hint.is_some(), "{e:?}");
        let text = run(&[args, &["--socket", &socket]].concat());
        assert!(text.status == Some(3) && text.err.contains(&socket) && text.out.is_empty(), "{text:?}");
    }
}

#[test]
fn an_agent_that_stops_is_3_and_what_is_not_there_is_4() {
    let fake = Fake::start();
    let stopping = fake.run(&["--json", "status"]);
    assert_eq!((stopping.status, stopping.error().error.code.as_str()), (Some(3), "stopping"));
    let gone = fake.run(&["--json", "tree", "7"]);
    assert_eq!((gone.status, gone.error().error.code.as_str()), (Some(4), "no-such-process"));
}

#[test]
fn events_are_lines_and_end_with_the_agent() {
    let fake = Fake::start();
    let json = fake.run(&["--json", "events"]);
    assert_eq!(json.status, Some(3), "the agent ended them: {json:?}");
    let kinds: Vec<String> =
        json.out.lines().map(|l| serde_json::from_str::<EventLine>(l).unwrap().kind).collect();
    assert_eq!(kinds, ["fork", "exec", "exit"]);
    let text = fake.run(&["events"]);
    assert!(text.out.lines().count() == 3 && text.is_clean(), "{text:?}");
}

#[test]
fn a_pipe_that_closes_ends_it_quietly() {
    let fake = Fake::start();
    let mut c = program();
    c.env("JOBWARDEN_SOCKET", fake.socket()).arg("events").stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = c.spawn().unwrap();
    drop(child.stdout.take());
    let mut err = String::new();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    assert_eq!((child.wait().unwrap().code(), err.as_str()), (Some(0), ""));
}

#[test]
fn flag_over_environment_and_no_colour_in_a_pipe() {
    let fake = Fake::start();
    let mut c = program();
    c.env("JOBWARDEN_SOCKET", "/nowhere/at/all").args(["jobs", "--socket"]).arg(fake.socket());
    assert_eq!(c.output().unwrap().status.code(), Some(0));
    assert!(!fake.run(&["tree"]).out.contains('\x1b'));
    assert!(fake.run(&["--color", "always", "tree"]).out.contains('\x1b'));
    let mut c = program();
    c.env("JOBWARDEN_SOCKET", fake.socket()).env("NO_COLOR", "1").args(["tree"]);
    assert!(!c.output().unwrap().stdout.contains(&0x1b));
}

#[test]
fn check_names_file_line_and_column() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("j.toml");
    let path = file.to_string_lossy().into_owned();
    std::fs::write(&file, "[zombies]\nafter = \"1m\"\n").unwrap();
    assert_eq!(run(&["check", "--config", &path]).status, Some(0));
    let printed = run(&["check", "--print", "--config", &path]);
    assert!(printed.out.contains("after = \"1m\""), "{printed:?}");
    let json = run(&["--json", "check", "--config", &path]);
    let value: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!((value["valid"].as_bool(), value["config"].as_str()), (Some(true), Some(path.as_str())));
    std::fs::write(&file, "[zombies]\nafter = 30\n").unwrap();
    let bad = run(&["check", "--config", &path]);
    assert!(bad.status == Some(1) && bad.err.contains("j.toml:2:9:"), "{bad:?}");
    let json = run(&["--json", "check", "--config", &path]);
    assert_eq!((json.status, json.error().error.code.as_str()), (Some(1), "invalid-config"));
    // The agent refuses it likewise, before anything is touched.
    let socket = dir.path().join("s").to_string_lossy().into_owned();
    let agent = run(&["--socket", &socket, "agent", "--config", &path]);
    assert!(agent.status == Some(1) && agent.err.contains("j.toml:2:9:"), "{agent:?}");
    assert!(!std::path::Path::new(&socket).exists());
}

#[test]
fn version_and_help() {
    let version = run(&["--version"]).out;
    assert!(
        version.starts_with("jobwarden 0.") && version.contains("commit ") && version.contains("probes ")
    );
    for args in [&["--help"][..], &["help", "kill"], &["exec", "--help"]] {
        let help = run(args);
        assert!(help.status == Some(0) && help.out.contains("Example"), "{help:?}");
    }
}

#[test]
fn a_busy_agent_is_waited_for_no_longer_than_it_takes() {
    // Somebody who accepts and never answers is the server's 30 s; one who does not even accept is ours.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let answer = std::thread::spawn(move || {
        let (mut s, _) = listener.accept().unwrap();
        let _ = s.read(&mut [0; 4096]);
        std::thread::sleep(Duration::from_millis(100));
        drop(s);
    });
    let broken = run(&["--json", "--socket", &path.to_string_lossy(), "jobs"]);
    assert_eq!((broken.status, broken.error().error.code.as_str()), (Some(3), "agent-broke-off"));
    answer.join().unwrap();
}
