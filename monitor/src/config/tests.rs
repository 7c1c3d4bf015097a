use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use proptest::prelude::*;

use super::*;

const EXAMPLE: &str = include_str!("../../../deploy/jobwarden.toml");

fn read(text: &str) -> Result<Config, ConfigError> {
    parse(Path::new("t.toml"), text, &BTreeMap::new(), &Overrides::default())
}

/// The one problem of `text`: line, column, message.
fn problem(text: &str) -> (usize, usize, String) {
    let e = read(text).expect_err(text);
    let [p] = e.problems() else { panic!("{text}\n{e}") };
    match &p.place {
        Place::File { line, column, .. } => (*line, *column, p.message.clone()),
        other => panic!("{other:?}"),
    }
}

fn env(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect()
}

#[test]
fn no_file_is_the_default() {
    let c = read("").unwrap();
    assert_eq!(c.to_toml(), Config::default().to_toml());
    assert_eq!(c.agent.listen.to_string(), DEFAULT_LISTEN);
    assert_eq!(c.zombies.after, Duration::from_secs(30));
    assert!(c.agent.pin && !c.enforcement.enabled && c.enforcement.protect_defaults);
    assert_eq!(c.enforcement.max_job_kills_per_minute, 10);
}

#[test]
fn the_example_reads_and_is_the_same_when_printed() {
    let c = read(EXAMPLE).unwrap_or_else(|e| panic!("{e}"));
    assert!(!c.jobs.is_empty() && !c.receivers.is_empty());
    let printed = c.to_toml();
    assert_eq!(read(&printed).unwrap_or_else(|e| panic!("{e}\n{printed}")).to_toml(), printed);
    assert!(
        ["alertmanager", "pagerduty", "webhook", "exec"]
            .iter()
            .all(|t| c.receivers.iter().any(|r| r.kind.as_str() == *t))
    );
}

/// What stands behind a comment in the example is a default: saying it changes nothing.
#[test]
fn the_defaults_that_the_example_tells_are_the_defaults() {
    let lines = EXAMPLE.lines().take_while(|l| !l.starts_with("# ===== "));
    let told: String = lines
        .filter_map(|l| {
            l.strip_prefix('#').map_or(Some(l), |rest| rest.starts_with(char::is_alphabetic).then_some(rest))
        })
        .fold(String::new(), |all, l| all + l + "\n");
    let c = read(&told).unwrap_or_else(|e| panic!("{e}\n{told}"));
    assert!(told.contains("max_job_kills_per_minute"), "{told}");
    assert_eq!(c.to_toml(), Config::default().to_toml());
}

#[test]
fn each_mistake_is_told_with_its_place() {
    let cases = [
        ("[agent]\nsokcet = \"/x\"", 2, 1, "did you mean `socket`"),
        ("[agnet]", 1, 2, "did you mean `agent`"),
        ("[zombies]\nafter = 30", 2, 9, "expected a duration such as"),
        ("[zombies]\nafter = \"30\"", 2, 9, "expected a duration such as"),
        ("[agent]\nlisten = \"0.0.0.0:1\"", 2, 10, "allow_plain = true"),
        ("[agent]\nlisten = \"localhost\"", 2, 10, "expected an address and port"),
        ("[agent]\nsocket = \"relative\"", 2, 10, "expected an absolute path"),
        ("[agent]\nsocket_group = \"no-such-group-here\"", 2, 16, "a group of this machine"),
        ("[agent]\nredact = [\"a\", \"(\"]", 2, 16, "unclosed group"),
        ("[agent]\nlog_format = \"xml\"", 2, 14, "\"text\", \"json\""),
        ("[agent]\nlabels = { kind = \"a\" }", 2, 12, "set by jobwarden"),
        ("[agent]\nlabels = { \"a-b\" = \"a\" }", 2, 12, "label name"),
        ("[agent]\npin = \"yes\"", 2, 7, "expected true or false, found \"yes\""),
        ("[enforcement]\nprotect = [{}]", 2, 12, "must not be empty"),
        ("[enforcement]\nmax_job_kills_per_minute = 0", 2, 28, "from 1 to 1000000"),
        ("[agent]\nring_bytes = 5000", 2, 14, "a power of two"),
        ("[agent]\nlineage_entries = 5", 2, 19, "0 or a number from 16"),
        ("[[job]]\nname = \"a b\"\nmatch = { exe = \"x\" }", 2, 8, "1 to 64 letters"),
        ("[[job]]\nname = \"a\"", 1, 1, "expected the key `match`"),
        ("[[job]]\nname = \"a\"\nmatch = { user = \"no-such-user-here\" }", 3, 18, "a user of this machine"),
        ("[[job]]\nname = \"a\"\nmatch = { exe = \"\" }", 3, 17, "an empty one"),
        (
            "[[job]]\nname = \"a\"\nmatch = { exe = \"x\" }\nstop_signal = \"SIGNOT\"",
            4,
            15,
            "name of a signal",
        ),
        ("[[job]]\nname = \"a\"\nmatch = { exe = \"x\" }\ntimeout = \"0s\"", 4, 11, "longer than zero"),
        (
            "[[job]]\nname = \"a\"\nmatch = { exe = \"x\" }\n[[job]]\nname = \"a\"\nmatch = { exe = \"x\" }",
            5,
            8,
            "is that of line 2",
        ),
        ("[[receiver]]\nname = \"a\"\ntype = \"slack\"", 3, 8, "\"alertmanager\", \"pagerduty\""),
        ("[[receiver]]\nname = \"a\"\ntype = \"exec\"\ncommand = [\"ls\"]", 4, 11, "absolute path"),
        ("[[receiver]]\nname = \"a\"\ntype = \"webhook\"\nurl = \"ftp://x/\"", 4, 7, "http:// or https://"),
        ("[[receiver]]\nname = \"a\"\ntype = \"webhook\"", 1, 1, "expected the key `url`"),
        ("[[receiver]]\nname = \"a\"\ntype = \"alertmanager\"", 1, 1, "either `url` or `urls`"),
        ("a = [1", 1, 7, "array"),
        ("[agent]\n[agent]", 2, 2, "duplicate"),
    ];
    for (text, line, column, words) in cases {
        let (l, c, message) = problem(text);
        assert_eq!((l, c), (line, column), "{text}\n{message}");
        assert!(message.contains(words), "{text}\n{message}");
    }
}

#[test]
fn all_mistakes_are_told_at_once_and_the_line_is_shown() {
    let e = read("[zombies]\nafter = 30\n[agent]\npin = 1\nfoo = 2\n").unwrap_err();
    assert_eq!(e.problems().len(), 3, "{e}");
    let text = e.to_string();
    assert!(text.contains("t.toml:2:9: `after`: expected a duration"), "{text}");
    assert!(text.contains("  2 | after = 30\n    |         ^^\n"), "{text}");
}

#[test]
fn a_secret_in_the_wrong_place_is_not_repeated() {
    let head = "[[receiver]]\nname = \"a\"\n";
    for rest in [
        "type = \"pagerduty\"\nrouting_key = \"hunter2\"\nrouting_key_file = \"/k\"",
        "type = \"webhook\"\nurl = \"https://me:hunter2@host/\"",
    ] {
        let e = read(&format!("{head}{rest}")).unwrap_err().to_string();
        assert!(!e.contains("hunter2"), "{e}");
    }
}

#[test]
fn escape_sequences_do_not_reach_the_terminal() {
    let e = read("[agent]\n\"\\u001b[31m\" = 1 # \u{202e}").unwrap_err().to_string();
    assert!(!e.contains('\u{1b}') && !e.contains('\u{202e}'), "{e:?}");
}

#[test]
fn a_config_that_is_no_regular_file_is_refused_and_not_waited_for() {
    let d = tempfile::tempdir().unwrap();
    let fifo = d.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)
        .unwrap();
    let load = |path: &Path| super::load(Some(path), &BTreeMap::new(), &Overrides::default()).unwrap_err();
    for (path, what) in [(&*fifo, "a FIFO"), (d.path(), "a folder"), (Path::new("/dev/zero"), "a device")] {
        let e = load(path).to_string();
        assert!(e.contains(what) && e.contains(&*path.to_string_lossy()), "{e}");
    }
    let large = d.path().join("large");
    std::fs::File::create(&large).unwrap().set_len(1 << 40).unwrap();
    assert!(load(&large).to_string().contains("more than 4194304 bytes"));
}

#[test]
fn an_unknown_variable_is_a_warning_that_names_what_is_near() {
    let none = unknown_environment(&env(&[
        ("JOBWARDEN_SOCKET", ""),
        ("JOBWARDEN_AGENT_LISTEN", ""),
        ("JOBWARDEN_ALERT_ID", ""),
        ("JOBWARDEN_PORT_80_TCP", ""),
        // Refused with the whole config.
        ("JOBWARDEN_AGENT_LISTNE", ""),
    ]));
    assert!(none.is_empty(), "{none:?}");
    let said = |name: &str| {
        let all = unknown_environment(&env(&[(name, "1")]));
        assert_eq!(all.len(), 1, "{all:?}");
        all[0].clone()
    };
    assert!(!said("JOBWARDEN_NOPE_OF_THEM").contains("did you mean"));
    assert!(said("JOBWARDEN_SOKET").contains("did you mean JOBWARDEN_SOCKET?"));
    assert!(said("JOBWARDEN_AGNT_LISTEN").contains("JOBWARDEN_AGENT_LISTEN"));
    assert!(said("JOBWARDEN_\u{1b}[2J").contains("\\u{1b}"));
}

#[test]
fn flag_over_environment_over_file() {
    let text = "[agent]\nlisten = \"127.0.0.1:1\"\nsocket = \"/file\"\npin = true\n";
    let vars = env(&[
        ("JOBWARDEN_AGENT_LISTEN", "127.0.0.1:2"),
        ("JOBWARDEN_SOCKET", "/env"),
        ("JOBWARDEN_AGENT_PIN", "false"),
        ("JOBWARDEN_ZOMBIES_AFTER", "5s"),
        ("JOBWARDEN_ENFORCEMENT_MAX_JOB_KILLS_PER_MINUTE", "3"),
        ("JOBWARDEN_AGENT_SERVICE_HOST", "10.0.0.1"),
        ("JOBWARDEN_OTHER", "x"),
    ]);
    let path = Path::new("t");
    let c = parse(path, text, &vars, &Overrides::default()).unwrap();
    assert_eq!((c.agent.listen.port(), c.agent.socket.to_str(), c.agent.pin), (2, Some("/env"), false));
    assert_eq!(c.zombies.after, Duration::from_secs(5));
    assert_eq!(c.enforcement.max_job_kills_per_minute, 3);
    let flags = Overrides { listen: "127.0.0.1:3".parse().ok(), ..Overrides::default() };
    assert_eq!(parse(path, text, &vars, &flags).unwrap().agent.listen.port(), 3);

    for (name, v) in
        [("JOBWARDEN_ZOMBIES_AFTER", "5"), ("JOBWARDEN_AGENT_LISTNE", "x"), ("JOBWARDEN_SOCKET", "x")]
    {
        let e = parse(path, "", &env(&[(name, v)]), &Overrides::default()).unwrap_err();
        assert_eq!(e.problems()[0].place, Place::Environment(name.into()));
    }
    let flags = Overrides { listen: "0.0.0.0:3".parse().ok(), ..Overrides::default() };
    let e = parse(path, "", &BTreeMap::new(), &flags).unwrap_err();
    assert_eq!(e.problems()[0].place, Place::Flag("--listen"));
}

#[test]
fn files_that_cannot_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.toml");
    let load = || load(Some(&path), &BTreeMap::new(), &Overrides::default());
    assert!(matches!(load(), Err(ConfigError::Read { .. })));
    std::fs::write(&path, b"[agent]\n  \xff").unwrap();
    assert!(matches!(load(), Err(ConfigError::NotUtf8 { line: 2, column: 3, .. })));
    std::fs::write(&path, vec![b'#'; (4 << 20) + 1]).unwrap();
    assert!(matches!(load(), Err(ConfigError::TooLarge { .. })));
    std::fs::write(&path, "[zombies]\nafter = \"1s\"\n").unwrap();
    assert_eq!(load().unwrap().zombies.after, Duration::from_secs(1));
}

#[test]
fn durations() {
    for (text, ms) in
        [("30s", 30_000), ("1h30m", 5_400_000), ("500ms", 500), ("1.5s", 1500), ("1d2h", 93_600_000)]
    {
        assert_eq!(parse_duration(text), Ok(Duration::from_millis(ms)), "{text}");
    }
    for bad in
        ["", "30", "s", "1s1h", "1s1s", "-1s", "1 s", "1.s", "1..5s", ".5s", "1e3s", "9999999999d", "1y"]
    {
        assert!(parse_duration(bad).is_err(), "{bad}");
    }
}

#[test]
fn what_is_protected_by_default() {
    let all = Enforcement::default().protected();
    assert_eq!(all.len(), 9);
    let hit = |exe: &str| all.iter().any(|m| m.exe.as_ref().is_some_and(|r| r.is_match(exe)));
    for exe in [
        "/usr/lib/systemd/systemd",
        "/usr/lib/systemd/systemd-journald",
        "/usr/bin/dbus-daemon",
        "/usr/sbin/sshd (deleted)",
        "/usr/bin/containerd-shim-runc-v2",
        "/var/lib/rancher/k3s/data/abc/bin/kubelet",
    ] {
        assert!(hit(exe), "{exe}");
    }
    for exe in ["/usr/bin/sshd-x", "/home/systemd/worker", "sshd", "/usr/bin/xcrio"] {
        assert!(!hit(exe), "{exe}");
    }
    assert!(all.iter().all(|m| m.user.as_ref().is_some_and(|u| u.uid == 0)));
    assert!(Enforcement { protect_defaults: false, ..Enforcement::default() }.protected().is_empty());
}

#[test]
fn a_match_is_nested_only_so_deep() {
    let deep = |n: usize| {
        let inner = (0..n).fold("{ comm = \"x\" }".to_owned(), |m, _| format!("{{ parent = {m} }}"));
        format!("[[job]]\nname = \"a\"\nmatch = {inner}\n")
    };
    assert!(read(&deep(8)).is_ok());
    assert!(read(&deep(9)).is_err());
    assert!(read(&deep(5000)).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_text_reads_or_is_refused(text in "(?s).{0,200}") {
        if let Err(e) = read(&text) {
            let _ = e.to_string();
        }
    }

    #[test]
    fn toml_like_text_reads_or_is_refused(
        text in r#"(\[{0,2}(agent|job|receiver|x)\]{0,2}|name|match|[={}\[\],".'#]|\n|[0-9]{1,3}|é|"[a-z(]*"| ){0,60}"#
    ) {
        if let Err(e) = read(&text) {
            let _ = e.to_string();
        }
    }

    #[test]
    fn a_damaged_example_reads_or_is_refused(at in 0..EXAMPLE.len(), cut in 0usize..30, put in "(?s).{0,6}") {
        let mut bytes = EXAMPLE.as_bytes().to_vec();
        let end = (at + cut).min(bytes.len());
        bytes.splice(at..end, put.into_bytes());
        let text = String::from_utf8_lossy(&bytes);
        match read(&text) {
            Ok(c) => {
                let printed = c.to_toml();
                prop_assert_eq!(read(&printed).map(|c| c.to_toml()).unwrap_or_default(), printed);
            }
            Err(e) => prop_assert!(!e.to_string().is_empty()),
        }
    }

    #[test]
    fn a_duration_reads_back(ns in 0u64..=300_000_000_000_000_000) {
        let d = Duration::from_nanos(ns);
        prop_assert_eq!(parse_duration(&duration_text(d)), Ok(d));
    }

    #[test]
    fn any_string_is_a_duration_or_none(s in "[0-9.a-z ]{0,24}") {
        if let Ok(d) = parse_duration(&s) {
            prop_assert_eq!(parse_duration(&duration_text(d)), Ok(d));
        }
    }
}
