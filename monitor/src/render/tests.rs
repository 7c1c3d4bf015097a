//! What people read, of hand-made values: the incident, and what a hostile process can put into its name.

use std::collections::{BTreeMap, HashMap};
use std::time::SystemTime;

use super::*;
use crate::model::key::Key;
use crate::model::schema::{
    Alert, AlertKind, AlertState, Alerts, Cause, Container, EventLine, Evidence, Exit, Job, JobId, JobState,
    Jobs, KillReport, LineageKnown, Process, Ref, Severity, SignalBy, SignalOutcome, Signalled,
    SignalledOutcome, Spared, State, Tree, Undelivered, Verdict,
};
use crate::model::tree_rows::TreeRows;

const NOW: &str = "2026-11-23T12:01:00Z";

fn now() -> SystemTime {
    wall(NOW).unwrap()
}

fn process(pid: u32, parent: Option<u32>, args: &[&str]) -> Process {
    let comm = args.first().map_or("x", |a| a.rsplit('/').next().unwrap_or(a)).into();
    Process {
        id: Key::new(pid, u64::from(pid)),
        pid,
        ppid: parent,
        lineage_parent: parent.map(|p| Key::new(p, u64::from(p))),
        lineage: LineageKnown::Known,
        adopter: None,
        state: State::Running,
        kernel_state: Some("S".into()),
        orphan: false,
        state_s: 60.0,
        started: "2026-11-23T12:00:00Z".into(),
        comm,
        exe: None,
        argv: args.iter().map(|a| (*a).into()).collect(),
        uid: Some(0),
        job: None,
        jobs: vec![],
        container: None,
        cgroup: None,
        pid_ns: None,
        ns_pid: None,
        kernel_thread: false,
        exit: None,
        children: vec![],
        elided: 0,
        argv_cut: false,
    }
}

fn reference(pid: u32, comm: &str) -> Ref {
    Ref { id: Key::new(pid, u64::from(pid)), pid, comm: comm.into(), argv: vec![comm.into()] }
}

const JOB: JobId = JobId { root: Key::new(410, 410), ordinal: 1 };

/// PID 1, a worker, its zombie command, a step that was killed by the worker, and the orphan that holds the pipe.
fn incident() -> Vec<Process> {
    let worker = Process { job: Some(JOB), ..process(410, Some(1), &["python3", "/srv/worker.py"]) };
    let zombie = Process {
        state: State::Zombie,
        kernel_state: Some("Z".into()),
        state_s: 42.0,
        exit: Some(Exit::Code { code: 1 }),
        job: Some(JOB),
        ..process(411, Some(410), &["sh", "run.sh"])
    };
    let killed = Process {
        state: State::Gone,
        kernel_state: None,
        ppid: None,
        state_s: 44.0,
        exit: Some(Exit::Signal {
            signal: "SIGTERM".into(),
            core: false,
            sender: Some(reference(410, "python3")),
        }),
        job: Some(JOB),
        ..process(412, Some(411), &["step"])
    };
    let orphan = Process {
        ppid: Some(1),
        orphan: true,
        adopter: Some(reference(1, "init")),
        lineage_parent: Some(Key::new(412, 412)),
        job: Some(JOB),
        ..process(413, Some(412), &["helper", "--serve"])
    };
    vec![process(1, None, &["/sbin/init"]), worker, zombie, killed, orphan, process(500, Some(1), &["cron"])]
}

fn draw(processes: Vec<Process>, style: Style) -> String {
    let t = Tree { at: NOW.into(), host: "h".into(), processes, unread: Vec::new() };
    let jobs = HashMap::from([(JOB, "etl".to_owned())]);
    let users = |uid| (uid == 0).then(|| "root".to_owned());
    let causes = HashMap::new();
    let json = serde_json::to_vec(&TreeRows::from(&t)).unwrap();
    let rows = TreeRows::parse(&json).unwrap();
    let draw = |rows: &TreeRows<'_>| {
        let view =
            TreeView { tree: rows, jobs: &jobs, users: &users, causes: &causes, kernel_threads: false };
        tree(&view, style)
    };
    let text = draw(&rows);
    // From the whole JSON it is the same.
    let whole = serde_json::to_vec(&t).unwrap();
    assert_eq!(draw(&TreeRows::parse(&whole).unwrap()), text);
    text
}

/// The subject of a firing alert: what is known of its cause, and what to type.
#[test]
fn a_cause_among_the_notes() {
    let t = Tree { at: NOW.into(), host: "h".into(), processes: incident(), unread: Vec::new() };
    let (worker, orphan) = (t.processes[1].id, t.processes[4].id);
    let causes = HashMap::from([(worker, Some(Verdict::ParentBlockedOnPipe)), (orphan, None)]);
    let (jobs, users) = (HashMap::new(), |_| None);
    let json = serde_json::to_vec(&TreeRows::from(&t)).unwrap();
    let rows = TreeRows::parse(&json).unwrap();
    let view = TreeView { tree: &rows, jobs: &jobs, users: &users, causes: &causes, kernel_threads: false };
    let got = tree(&view, Style::default());
    assert!(got.contains("<parent-blocked-on-pipe, see: jobwarden why 410:410>"), "\n{got}");
    assert!(got.contains("<see: jobwarden why 413:413>"), "\n{got}");
}

#[test]
fn the_incident_as_a_tree() {
    let want = r"  PID S    AGE USER COMMAND
    1 S  1m00s root /sbin/init
  410 S  1m00s root  \_ python3 /srv/worker.py [etl j-410:410-1]
  411 Z  1m00s root  |   \_ sh run.sh <zombie for 42s: exit 1; not reaped by 410 (python3)>
  412 -  1m00s root  |       \_ step <ended 44s ago: killed by SIGTERM from 410 (python3)>
  413 S  1m00s root  |           \_ helper --serve <orphan, adopted by 1 (init)>
  500 S  1m00s root  \_ cron
";
    let got = draw(incident(), Style::default());
    assert_eq!(got, want, "\n{got}");
    // The order in which they came does not matter.
    let mut turned = incident();
    turned.reverse();
    assert_eq!(draw(turned, Style::default()), want);
}

#[test]
fn colours_only_where_they_are_asked_for_and_width_only_on_a_terminal() {
    let long = Process { argv: vec!["x".repeat(5000).into()], ..process(600, Some(1), &["x"]) };
    let mut all = incident();
    all.push(long);
    let pipe = draw(all.clone(), Style::default());
    assert!(!pipe.contains('\x1b') && pipe.contains(&"x".repeat(5000)));
    for columns in [1, 20, 40, 80, 200] {
        let terminal = draw(all.clone(), Style { color: false, width: Some(columns) });
        // The columns before the command are never cut.
        let most = columns.max(60);
        let longest = terminal.lines().map(super::style::width).max().unwrap();
        assert!(longest <= most, "{longest} of {columns}\n{terminal}");
    }
    // What matters is what stays.
    assert!(draw(all.clone(), Style { color: false, width: Some(100) }).contains("not reaped by 410"));
    let colour = draw(all, Style { color: true, width: None });
    assert!(colour.contains("\x1b[1;31msh run.sh\x1b[0m"), "{colour}");
}

const EVIL: &str = "a\x1b]0;owned\x07\n\u{9b}31m\u{202e}\\xff";

#[test]
fn no_text_lets_a_hostile_process_write_to_the_terminal() {
    let evil = Ref { comm: EVIL.into(), argv: vec![EVIL.into()], ..reference(9, "x") };
    let p = Process {
        comm: EVIL.into(),
        argv: vec![EVIL.into()],
        orphan: true,
        adopter: Some(evil.clone()),
        exit: Some(Exit::Signal { signal: EVIL.into(), core: true, sender: Some(evil.clone()) }),
        state: State::Zombie,
        kernel_state: Some(EVIL.into()),
        container: Some(Container { id: EVIL.into(), runtime: Some(EVIL.into()), pod: None }),
        ns_pid: Some(3),
        job: Some(JOB),
        started: EVIL.into(),
        ..process(9, Some(1), &[])
    };
    let cause = Cause {
        process: p.clone(),
        verdict: Verdict::Unknown,
        summary: EVIL.into(),
        evidence: vec![
            Evidence::Blocked {
                process: Some(evil.clone()),
                thread: 9,
                syscall: EVIL.into(),
                fd: Some(1),
                inode: Some(EVIL.into()),
            },
            Evidence::Holder {
                process: evil.clone(),
                fd: 1,
                mode: EVIL.into(),
                inode: EVIL.into(),
                relation: EVIL.into(),
            },
            Evidence::Signal {
                signal: EVIL.into(),
                sender: Some(evil.clone()),
                by: SignalBy::Process,
                target: evil.clone(),
                outcome: SignalOutcome::Ignored,
            },
            Evidence::ParentExit { process: evil.clone(), exit: p.exit.clone() },
            Evidence::Python {
                thread: 1,
                file: EVIL.into(),
                line: 1,
                function: EVIL.into(),
                source: Some(EVIL.into()),
            },
            Evidence::Wchan { process: evil.clone(), thread: 1, wchan: EVIL.into() },
            Evidence::Tracer { process: evil.clone() },
            Evidence::WaitsFor { process: evil.clone() },
            Evidence::Note { text: EVIL.into() },
        ],
        remedy: EVIL.into(),
        alert: None,
    };
    let alert = Alert {
        id: EVIL.into(),
        kind: AlertKind::Zombie,
        state: AlertState::Firing,
        severity: Severity::Warning,
        job: None,
        job_name: EVIL.into(),
        subject: Some(p.clone()),
        count: 1,
        since: EVIL.into(),
        resolved_at: None,
        summary: EVIL.into(),
        labels: BTreeMap::new(),
        cause: Some(cause.clone()),
    };
    let report = KillReport {
        target: EVIL.into(),
        signalled: vec![Signalled {
            process: evil.clone(),
            signal: EVIL.into(),
            outcome: SignalledOutcome::Ended,
        }],
        survivors: vec![evil.clone()],
        stuck: vec![],
        spared: vec![Spared { process: evil.clone(), why: EVIL.into() }],
        zombies: vec![evil.clone()],
        took_s: 0.1,
    };
    let more = BTreeMap::from([
        (EVIL.to_owned(), serde_json::json!(EVIL)),
        ("exit".into(), serde_json::to_value(&p.exit).unwrap()),
        ("sender".into(), serde_json::to_value(&evil).unwrap()),
        ("list".into(), serde_json::json!([EVIL])),
    ]);
    let line = EventLine { at: EVIL.into(), kind: EVIL.into(), process: Some(evil), more };
    let told = Undelivered { receiver: EVIL.into(), parked: true, attempts: 3, error: Some(EVIL.into()) };
    let undelivered = BTreeMap::from([(EVIL.to_owned(), vec![told])]);
    let plain = Style::default();
    for text in [
        draw(vec![p], plain),
        why(&cause, plain),
        alerts(&Alerts { alerts: vec![alert], undelivered }, "none", now(), plain),
        kill(&report, false, plain),
        event(&line, plain),
    ] {
        let bad: Vec<char> =
            text.chars().filter(|&c| c != '\n' && (c.is_control() || c == '\u{202e}')).collect();
        assert!(bad.is_empty(), "{bad:?} in {text}");
        assert!(text.contains(r"\x1b]0;owned\x07\n\u{9b}31m\u{202e}\xff"), "{text}");
    }
}

#[test]
fn a_tree_from_outside_may_be_nonsense_and_is_drawn_all_the_same() {
    // A loop, a process that is its own parent, and a parent that is missing.
    let mut a = process(10, Some(11), &["a"]);
    let mut b = process(11, Some(10), &["b"]);
    a.ppid = None;
    b.ppid = None;
    let own = process(12, Some(12), &["own"]);
    let lost = process(13, Some(999), &["lost"]);
    let text = draw(vec![a, b, own, lost], Style::default());
    for word in [" a", " b", " own", " lost"] {
        assert_eq!(text.lines().filter(|l| l.ends_with(word)).count(), 1, "{word}\n{text}");
    }
    let chain = (2..20_000).map(|n| process(n, Some(n - 1), &["c"])).collect();
    let text = draw(chain, Style { color: false, width: Some(80) });
    assert_eq!(text.lines().count(), 19_999);
    assert!(text.lines().last().unwrap().ends_with(r" (19997) \_ c"), "{:?}", text.lines().last());
}

#[test]
fn unknown_lineage_is_not_drawn_as_lineage() {
    let old = Process {
        lineage: LineageKnown::Unknown,
        lineage_parent: None,
        ppid: Some(1),
        ..process(7, Some(1), &["old"])
    };
    let kthread = Process { kernel_thread: true, ..process(2, None, &[]) };
    let text = draw(vec![process(1, None, &["init"]), old, kthread], Style::default());
    assert!(text.contains(r" \? old") && text.lines().count() == 3, "{text}");
}

#[test]
fn why_says_it_in_three_lines_and_ends_with_a_command() {
    let all = incident();
    let cause = Cause {
        process: all[2].clone(),
        verdict: Verdict::ParentBlockedOnPipe,
        summary: "410 (python3) reads a pipe that 413 (helper) holds open".into(),
        evidence: vec![
            Evidence::Blocked {
                process: Some(reference(410, "python3")),
                thread: 410,
                syscall: "read".into(),
                fd: Some(4),
                inode: Some("pipe:[71622]".into()),
            },
            Evidence::Holder {
                process: reference(413, "helper"),
                fd: 2,
                mode: "w".into(),
                inode: "pipe:[71622]".into(),
                relation: "an orphan of the zombie".into(),
            },
        ],
        remedy: "jobwarden kill 413:413".into(),
        alert: None,
    };
    let want = "\
411:411 sh run.sh
  zombie for 42s, exit 1, its parent is 410, job j-410:410-1
  parent-blocked-on-pipe: 410 (python3) reads a pipe that 413 (helper) holds open

  - 410 (python3) is blocked in read of fd 4, pipe:[71622]
    - 413 helper holds pipe:[71622] open for writing as fd 2; an orphan of the zombie

  remedy:
    jobwarden kill 413:413
";
    let got = why(&cause, Style::default());
    assert_eq!(got, want, "\n{got}");
}

#[test]
fn a_kill_says_what_is_left() {
    let gone = Signalled {
        process: reference(413, "helper"),
        signal: "SIGKILL".into(),
        outcome: SignalledOutcome::Ended,
    };
    let mut report = KillReport {
        target: "j-410:410-1".into(),
        signalled: vec![gone],
        survivors: vec![],
        stuck: vec![],
        spared: vec![],
        zombies: vec![],
        took_s: 0.21,
    };
    let text = kill(&report, false, Style::default());
    assert!(text.ends_with("j-410:410-1: 1 process ended in 0.2s, none left\n"), "{text}");
    report.survivors.push(reference(414, "stuck"));
    assert!(kill(&report, false, Style::default()).contains("1 process left"));
    report.survivors.clear();
    report.signalled[0].outcome = SignalledOutcome::DryRun;
    assert!(kill(&report, true, Style::default()).contains("would get   SIGKILL  413:413 helper"));
}

#[test]
fn jobs_show_what_is_left_of_their_time() {
    let job = Job {
        id: JOB,
        name: "etl".into(),
        root: JOB.root,
        state: JobState::Running,
        started: "2026-11-23T12:00:00Z".into(),
        deadline: Some("2026-11-23T12:03:00Z".into()),
        processes: 3,
        zombies: 1,
        orphans: 0,
    };
    let over = Job { deadline: Some("2026-11-23T12:00:20Z".into()), ..job.clone() };
    let text = jobs(&Jobs { jobs: vec![job, over] }, now(), Style { color: false, width: Some(20) });
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[1].contains("1m00s  2m00s") && lines[2].contains("-40s"), "{text}");
    assert!(lines.iter().skip(1).all(|l| l.ends_with("j-410:410-1")), "ids are never cut: {text}");
}
