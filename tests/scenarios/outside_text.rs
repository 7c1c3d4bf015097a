//! A process whose name, arguments, executable and open file hold line breaks, escape sequences and characters that turn the
//! direction of writing: none of them gets out as it is, neither into the log and a receiver's environment nor through any command.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context as _, Result, bail, ensure};
use jobwarden::api::{Class, ExecRegistered, ExecRequest};
use jobwarden::client::Client;
use jobwarden::model::schema::AlertState;
use jobwarden_tests::agent::Options;
use jobwarden_tests::{Agent, Fixture, Shape, eventually, fixture, ms};

/// A file's name, so a comm too: 15 bytes at most.
const NAME: &str = "\nFORGED\x1b[2J\u{202e}";
const ARGUMENT: &str = "\nFORGED\r\x1b]0;t\x07\u{9b}31m\u{202e}\u{2066}\u{200f}\u{2028}\u{200b}\u{7f}";

/// Nothing of them is there raw, and something of them is there.
fn escaped(what: &str, text: &str) -> Result<()> {
    let raw = |c: char| {
        c != '\n'
            && (c.is_control()
                || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'))
    };
    let found: Vec<char> = text.chars().filter(|&c| raw(c)).collect();
    ensure!(found.is_empty(), "{what}: raw {found:?} in {text:?}");
    let forged = text.lines().find(|l| l.starts_with("FORGED"));
    ensure!(forged.is_none(), "{what}: a process began a line: {text}");
    ensure!(text.contains("FORGED"), "{what}: the process is not in it: {text}");
    Ok(())
}

/// A program under that name, in a folder of that name.
fn program(fixture: &Fixture, of: &Path) -> Result<PathBuf> {
    let name = of.file_name().context("no file")?;
    let dir = fixture.path("bin").join(name).join(NAME);
    std::fs::create_dir_all(&dir)?;
    let path = dir.join(NAME);
    if !path.exists() {
        std::fs::copy(of, &path)?;
    }
    Ok(path)
}

/// A FIFO that somebody holds open for writing.
fn fifo(at: &Path) -> Result<std::fs::File> {
    let path = CString::new(at.as_os_str().as_bytes())?;
    // SAFETY: the path is NUL-terminated and outlives the call.
    let made = unsafe { libc::mkfifo(path.as_ptr(), 0o600) };
    ensure!(made == 0, "mkfifo: {}", std::io::Error::last_os_error());
    Ok(std::fs::File::options().read(true).write(true).open(at)?)
}

/// What `events` says of the past.
fn events(agent: &Agent<'_>, args: &[&str]) -> Result<String> {
    let mut all = vec!["events", "--since", "1m"];
    all.extend(args);
    let mut child = agent.command(&all)?.stdout(Stdio::piped()).spawn()?;
    std::thread::sleep(ms(1000));
    child.kill()?;
    Ok(String::from_utf8(child.wait_with_output()?.stdout)?)
}

/// Every command that shows processes, as text and as JSON.
fn commands(agent: &Agent<'_>, pid: &str) -> Result<()> {
    let each: [&[&str]; 5] = [&["tree"], &["tree", pid], &["why", pid], &["alerts"], &["alerts", "--all"]];
    for command in each {
        let said = agent.cli(command)?;
        ensure!(said.code() == Some(0) && said.err().is_empty(), "{command:?}: {said:?}");
        escaped(&format!("{command:?}"), &said.out())?;
        let mut json = vec!["--json"];
        json.extend(command);
        let said = agent.cli(&json)?;
        escaped(&format!("{json:?}"), &said.out())?;
        said.json::<serde_json::Value>()?;
    }
    escaped("events", &events(agent, &[])?)?;
    escaped("events --json", &events(agent, &["--json"])?)?;
    for command in [["kill", "--dry-run", pid], ["kill", "--grace=0", pid]] {
        let said = agent.cli(&command)?;
        ensure!(said.code() == Some(0), "{said:?}");
        escaped(&format!("{command:?}"), &said.out())?;
    }
    escaped("audit", &agent.cli(&["audit"])?.out())?;
    escaped("audit --json", &agent.cli(&["audit", "--json"])?.out())
}

/// What `exec` says of what it leaves.
fn exec(agent: &Agent<'_>, fixture: &Fixture) -> Result<()> {
    let sleep = program(fixture, Path::new("/bin/sleep"))?;
    let mut c = agent.command(&["exec", "-v", "--keep-orphans", "--", "/bin/sh", "-c", "\"$0\" 60 & :"])?;
    c.arg(&sleep);
    // Its output may not be that of what is left behind: `run` reads it to its end.
    let file = fixture.path("exec.err");
    let status =
        c.stdin(Stdio::null()).stdout(Stdio::null()).stderr(std::fs::File::create(&file)?).status()?;
    let said = std::fs::read_to_string(&file)?;
    ensure!(status.success(), "{status}: {said}");
    let id = regex::Regex::new(r"kept, as asked: (\d+:\d+) ")?;
    let left = id.captures(&said).with_context(|| said.clone())?[1].to_owned();
    let killed = agent.cli(&["kill", "--grace=0", &left])?;
    ensure!(killed.code() == Some(0), "{killed:?}");
    escaped("exec -v --keep-orphans", &said)
}

/// Over the API, past the check of the command line.
fn names_of_jobs(agent: &Agent<'_>) -> Result<()> {
    let client = Client::new(&agent.socket)?;
    for name in ["", "a b", "a\nERROR forged", "\x1b[2J", &"x".repeat(65)] {
        let exec = ExecRequest {
            pid: std::process::id(),
            name: name.into(),
            timeout_s: None,
            grace_s: 1.0,
            signal: 15,
            orphan_after_s: None,
            keep_orphans: false,
            cgroup: None,
            number: None,
            asked_at: None,
        };
        match client.post::<ExecRegistered>("/v1/exec", &exec) {
            Err(e) if e.class() == Class::Usage => {}
            other => bail!("{name:?}: {other:?}"),
        }
    }
    Ok(())
}

fn in_format(fixture: &Fixture, format: &str) -> Result<()> {
    let (environment, input) =
        (fixture.path(&format!("{format}.env")), fixture.path(&format!("{format}.in")));
    let command = format!("env -0 >>{}; cat >>{}", environment.display(), input.display());
    let config = format!(
        "[agent]\nlog = \"debug\"\nlog_format = \"{format}\"\n[zombies]\nafter = \"300ms\"\n\
         [[job]]\nname = \"outside\"\nmatch = {{ argv = \"{}\" }}\nzombie_after = \"300ms\"\n\
         [[receiver]]\nname = \"program\"\ntype = \"exec\"\ncommand = [\"/bin/sh\", \"-c\", '{command}']\n",
        fixture.tag
    );
    let agent = Agent::with(fixture, &Options { config: &config, name: format, ..Options::default() })?;
    let at = fixture.path(&format!("{format}{NAME}"));
    let _writer = fifo(&at)?;
    let mut c = fixture.command("/bin/sh");
    c.args(["-c", "exec \"$0\" 1 \"$1\" \"$2\" <\"$3\""]);
    c.arg(program(fixture, &jobwarden_tests::fixture::program("shape-zombie")?)?);
    c.arg(ARGUMENT).arg(&fixture.tag).arg(&at);
    let mut parent = Shape::spawn("zombie", c)?;
    parent.fact::<u32>("dead")?;
    eventually("the alert with its cause", ms(10_000), || {
        let alerts = agent.alerts(&[])?;
        ensure!(alerts.iter().any(|a| a.state == AlertState::Firing && a.cause.is_some()), "{alerts:?}");
        let told = std::fs::read(&environment)?;
        ensure!(told.windows(22).any(|w| w == b"JOBWARDEN_ALERT_CAUSE="), "no cause yet");
        Ok(())
    })?;
    let why = agent.cli(&["why", &parent.pid().to_string()])?;
    ensure!(why.out().contains(r"/text\nFORGED") || why.out().contains(r"/json\nFORGED"), "no path: {why:?}");
    commands(&agent, &parent.pid().to_string())?;
    parent.wait(ms(5000))?;
    exec(&agent, fixture)?;
    names_of_jobs(&agent)?;
    let log = agent.log.clone();
    agent.stop()?;
    escaped("the log", &std::fs::read_to_string(log)?)?;
    let told = String::from_utf8(std::fs::read(&environment)?)?;
    ensure!(told.contains("JOBWARDEN_ALERT_SUMMARY="), "{told:?}");
    escaped("the environment", &told.replace('\0', "\n"))?;
    let input = std::fs::read_to_string(&input)?;
    ensure!(input.contains("FORGED") && !input.contains('\n'), "{input:?}");
    escaped("the input", &input)
}

#[test]
fn text_from_outside_gets_out_escaped() -> Result<()> {
    let fixture = fixture!("text_from_outside_gets_out_escaped");
    ["text", "json"].iter().try_for_each(|format| in_format(&fixture, format).context(*format))
}
