//! Text to [`Config`]: each section of the contract, key by key.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::{Path, PathBuf};

use regex::Regex;
use toml::de::{DeTable, DeValue};

use super::error::{ConfigError, Place};
use super::section::{Doc, Section};
use super::value;
use super::{
    Action, Agent, Config, DEFAULT_AFTER, DEFAULT_GRACE, DEFAULT_PATH, DEFAULT_RECEIVER_TIMEOUT, Enforcement,
    Match, Overrides, PAGERDUTY_URL, Receiver, ReceiverKind, Rule, Zombies,
};
use crate::files;
use crate::model::schema::{AlertKind, Severity};

const MAX_BYTES: u64 = 4 << 20;
/// A recorded config may be larger: a file of [`MAX_BYTES`] with every default spelled out is at most this long.
const MAX_RECORDED_BYTES: u64 = 4 * MAX_BYTES;
/// `parent = { parent = { .. } }` goes no deeper.
const MAX_MATCH_DEPTH: usize = 8;
const MAX_RECEIVERS: usize = 64;
/// What the agent itself sets on every alert.
const OWN_LABELS: [&str; 10] = [
    "alertname",
    "alert_id",
    "instance",
    "kind",
    "severity",
    "job_name",
    "user",
    "container",
    "namespace",
    "pod",
];
/// Of the variables that override a section's scalars.
const SECTIONS: [&str; 3] = ["JOBWARDEN_AGENT_", "JOBWARDEN_ZOMBIES_", "JOBWARDEN_ENFORCEMENT_"];
/// What a receiver's program gets, and what Kubernetes sets for a service that is called `jobwarden`.
const OF_OTHERS: [&str; 4] =
    ["JOBWARDEN_ALERT_", "JOBWARDEN_NOTIFY_RUN", "JOBWARDEN_SERVICE_", "JOBWARDEN_PORT"];
/// Characters by which a name may differ from the one that was meant.
const NEAR: usize = 4;
const ACTIONS: [(&str, Action); 2] = [("alert", Action::Alert), ("kill", Action::Kill)];
const SEVERITIES: [(&str, Severity); 4] = [
    ("info", Severity::Info),
    ("warning", Severity::Warning),
    ("error", Severity::Error),
    ("critical", Severity::Critical),
];

/// The `JOBWARDEN_*` variables of this process. What is not UTF-8 reads as U+FFFD and is then refused by its reader.
#[must_use]
pub fn environment() -> BTreeMap<String, String> {
    std::env::vars_os()
        .map(|(k, v)| (k.to_string_lossy().into_owned(), v.to_string_lossy().into_owned()))
        .filter(|(k, _)| k.starts_with("JOBWARDEN_"))
        .collect()
}

/// A sentence for each variable of [`environment`] that nothing reads, with the names that are near it. One with the prefix of
/// a config section is no warning but an error of [`load`].
#[must_use]
pub fn unknown_environment(env: &BTreeMap<String, String>) -> Vec<String> {
    let none = BTreeMap::new();
    let doc = Doc::new(Path::new(DEFAULT_PATH), "", &none);
    // An empty config asks for every variable that there is.
    let empty = DeTable::new();
    config(&doc, &empty, &Overrides::default());
    let mut known = doc.asked_variables();
    known.insert("JOBWARDEN_SOCKET".to_owned());
    let unknown = env.keys().filter(|name| {
        let starts = |list: &[&str]| list.iter().any(|p| name.starts_with(p));
        !known.contains(*name) && !starts(&SECTIONS) && !starts(&OF_OTHERS)
    });
    let say = |name: &String| {
        let near: Vec<&str> = known
            .iter()
            .map(String::as_str)
            .filter(|k| strsim::damerau_levenshtein(k, name) <= NEAR)
            .collect();
        let hint =
            if near.is_empty() { String::new() } else { format!("; did you mean {}?", near.join(" or ")) };
        format!("the environment variable {} is not known and sets nothing{hint}", value::quoted(name))
    };
    unknown.map(say).collect()
}

/// The effective config: `overrides` over `env` over the file at `path`. Without a `path`, [`DEFAULT_PATH`] is read if it
/// is there, and no file at all is a valid config.
///
/// `env` holds names and values as [`environment`] gives them: `JOBWARDEN_<SECTION>_<KEY>` for each scalar of `[agent]`,
/// `[zombies]` and `[enforcement]` (`JOBWARDEN_AGENT_LISTEN`), and `JOBWARDEN_SOCKET` as a short form.
///
/// # Errors
/// The file cannot be read, or [`ConfigError::Invalid`] with everything that is wrong in file, environment and flags.
pub fn load(
    path: Option<&Path>,
    env: &BTreeMap<String, String>,
    overrides: &Overrides,
) -> Result<Config, ConfigError> {
    let given = path.unwrap_or(Path::new(DEFAULT_PATH));
    let text = match read(given) {
        Err(ConfigError::Read { source, .. })
            if path.is_none() && source.kind() == io::ErrorKind::NotFound =>
        {
            String::new()
        }
        other => other?,
    };
    parse(given, &text, env, overrides)
}

/// A config that a recording holds as text.
///
/// # Errors
/// As [`load`].
pub fn parse_recorded(text: &str) -> Result<Config, ConfigError> {
    let path = Path::new("recorded config");
    if text.len() as u64 > MAX_RECORDED_BYTES {
        return Err(ConfigError::TooLarge { path: path.into(), max: MAX_RECORDED_BYTES });
    }
    parse(path, text, &BTreeMap::new(), &Overrides::default())
}

fn read(path: &Path) -> Result<String, ConfigError> {
    let bytes = files::read_regular(path, MAX_BYTES).map_err(|source| match source.kind() {
        io::ErrorKind::FileTooLarge => ConfigError::TooLarge { path: path.into(), max: MAX_BYTES },
        _ => ConfigError::Read { path: path.into(), source },
    })?;
    String::from_utf8(bytes).map_err(|e| {
        let good = &e.as_bytes()[..e.utf8_error().valid_up_to()];
        let line = good.split(|&b| b == b'\n').count();
        let from = good.iter().rposition(|&b| b == b'\n').map_or(0, |i| i + 1);
        let column = String::from_utf8_lossy(&good[from..]).chars().count() + 1;
        ConfigError::NotUtf8 { path: path.into(), line, column }
    })
}

/// As [`load`], of a text that was read already; `path` is for the messages.
///
/// # Errors
/// [`ConfigError::Invalid`].
pub fn parse(
    path: &Path,
    text: &str,
    env: &BTreeMap<String, String>,
    overrides: &Overrides,
) -> Result<Config, ConfigError> {
    let doc = Doc::new(path, text, env);
    let (root, errors) = DeTable::parse_recoverable(text);
    for e in errors {
        doc.problem(e.span().unwrap_or(0..0), e.message().replace('\n', ", "));
    }
    let problems = doc.into_problems();
    if !problems.is_empty() {
        return Err(ConfigError::Invalid(problems));
    }
    let doc = Doc::new(path, text, env);
    let config = config(&doc, root.get_ref(), overrides);
    let problems = doc.into_problems();
    if problems.is_empty() { Ok(config) } else { Err(ConfigError::Invalid(problems)) }
}

fn config(doc: &Doc<'_>, root: &DeTable<'_>, overrides: &Overrides) -> Config {
    let mut top = Section::new(doc, "the config", root, 0..0);
    let agent = agent(top.top("agent"), overrides);
    let mut section = top.top("zombies");
    let zombies = Zombies { after: section.read("after", value::duration).unwrap_or(DEFAULT_AFTER) };
    section.finish();
    let enforcement = enforcement(top.top("enforcement"));
    let jobs = named(doc, "job", top.tables("job", "[[job]]"), rule);
    let receivers = named(doc, "receiver", top.tables("receiver", "[[receiver]]"), receiver);
    if receivers.len() > MAX_RECEIVERS {
        let span = top.get("receiver").map_or(0..0, toml::Spanned::span);
        doc.problem(span, format!("expected at most {MAX_RECEIVERS} receivers, found {}", receivers.len()));
    }
    top.finish();
    unknown_variables(doc);
    Config { agent, zombies, enforcement, jobs, receivers }
}

/// A variable with the prefix of a section that sets nothing is a mistake. Kubernetes sets some of its own for a service
/// that is called `jobwarden-agent`; those are let pass.
fn unknown_variables(doc: &Doc<'_>) {
    for name in doc.env.keys() {
        let kubernetes = ["JOBWARDEN_AGENT_SERVICE_", "JOBWARDEN_AGENT_PORT"];
        let starts = |list: &[&str]| list.iter().any(|p| name.starts_with(p));
        if starts(&SECTIONS) && !starts(&kubernetes) && !doc.used(name) {
            doc.report(Place::Environment(name.clone()), "no key of the config is overridden by this");
        }
    }
}

/// Reads each table; a name that was there before is a problem of the later one.
fn named<'d, 's, T>(
    doc: &'d Doc<'s>,
    what: &str,
    sections: Vec<Section<'d, 's>>,
    read: impl Fn(Section<'d, 's>) -> Option<T>,
) -> Vec<T> {
    let mut names: BTreeMap<String, Range<usize>> = BTreeMap::new();
    let mut all = Vec::new();
    for mut section in sections {
        if let Some(v) = section.get("name")
            && let Some(name) = v.get_ref().as_str()
        {
            if let Some(first) = names.get(name) {
                let line = doc.text[..first.start].matches('\n').count() + 1;
                let message = format!(
                    "`name`: expected a name of its own for each {what}, {} is that of line {line} already",
                    value::quoted(name)
                );
                doc.problem(v.span(), message);
            } else {
                names.insert(name.to_owned(), v.span());
            }
        }
        all.extend(read(section));
    }
    all
}

fn agent(mut s: Section<'_, '_>, overrides: &Overrides) -> Agent {
    let doc = s.doc;
    let default = Agent::default();
    let short = s.doc.env.get("JOBWARDEN_SOCKET").and_then(|p| {
        let read = value::path(&toml::de::DeValue::String(p.as_str().into()));
        read.map_err(|m| s.doc.report(Place::Environment("JOBWARDEN_SOCKET".into()), m)).ok()
    });
    // The long form is the more precise one, so it wins over the short one, and both over the file.
    let long = s.doc.env.contains_key("JOBWARDEN_AGENT_SOCKET");
    let socket = s.read("socket", value::path);
    let socket = if long { socket.or(short) } else { short.or(socket) };
    let formats = [("text", false), ("json", true)];
    let listen_in_file = s.get("listen").map(toml::Spanned::span);
    let agent = Agent {
        socket: overrides.socket.clone().or(socket).unwrap_or(default.socket),
        socket_group: s.read("socket_group", value::group).unwrap_or_default(),
        state_dir: given(overrides.state_dir.as_ref(), s.read("state_dir", value::path), default.state_dir),
        listen: overrides.listen.or(s.read("listen", value::address)).unwrap_or(default.listen),
        allow_plain: s.read("allow_plain", value::boolean).unwrap_or_default(),
        pin: !overrides.no_pin & s.read("pin", value::boolean).unwrap_or(default.pin),
        bpffs: given(overrides.bpffs.as_ref(), s.read("bpffs", value::path), default.bpffs),
        ring_bytes: s.read("ring_bytes", value::ring).unwrap_or(default.ring_bytes),
        lineage_entries: s.read("lineage_entries", value::entries).unwrap_or(default.lineage_entries),
        log: s.read("log", value::log_filter).unwrap_or(default.log),
        log_json: s.read("log_format", value::choice(&formats)).unwrap_or_default(),
        labels: s.table("labels", "labels").map(|t| labels(&t)).unwrap_or_default(),
        redact: s.list("redact", |v| redact(doc, v)).unwrap_or_default(),
    };
    plain(&s, agent.listen, agent.allow_plain, overrides, listen_in_file);
    s.finish();
    agent
}

/// Each is run on every argv that is shown, so it is compiled at once.
fn redact(doc: &Doc<'_>, v: &DeValue<'_>) -> Result<Regex, String> {
    Regex::new(doc.pattern(v)?.as_str()).map_err(|e| e.to_string())
}

fn given(flag: Option<&PathBuf>, read: Option<PathBuf>, default: PathBuf) -> PathBuf {
    flag.cloned().or(read).unwrap_or(default)
}

/// `/metrics` is not encrypted: on another address than loopback only if that is said.
fn plain(
    s: &Section<'_, '_>,
    listen: SocketAddr,
    allowed: bool,
    overrides: &Overrides,
    in_file: Option<Range<usize>>,
) {
    if allowed || listen.ip().is_loopback() {
        return;
    }
    let message = format!("{listen} is not loopback: expected `allow_plain = true` in [agent] beside it");
    if overrides.listen.is_some() {
        s.doc.report(Place::Flag("--listen"), message);
    } else if s.doc.env.contains_key("JOBWARDEN_AGENT_LISTEN") {
        s.doc.report(Place::Environment("JOBWARDEN_AGENT_LISTEN".into()), message);
    } else if let Some(span) = in_file {
        s.doc.problem(span, message);
    }
}

fn labels(s: &Section<'_, '_>) -> BTreeMap<String, String> {
    let fits = |name: &str| {
        let mut bytes = name.bytes();
        bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
            && bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_')
            && !name.starts_with("__")
            && name.len() <= 64
    };
    let mut all = BTreeMap::new();
    for (k, v) in s.entries() {
        let name = k.get_ref().as_ref();
        if OWN_LABELS.contains(&name) {
            s.doc.problem(k.span(), format!("the label `{name}` is set by jobwarden: expected another name"));
        } else if !fits(name) {
            let message =
                format!("expected a label name ([a-zA-Z_][a-zA-Z0-9_]*), found {}", value::quoted(name));
            s.doc.problem(k.span(), message);
        } else {
            match value::filled(v.get_ref()) {
                Ok(text) => {
                    all.insert(name.to_owned(), text);
                }
                Err(message) => s.doc.problem(v.span(), format!("label `{name}`: {message}")),
            }
        }
    }
    all
}

fn enforcement(mut s: Section<'_, '_>) -> Enforcement {
    let default = Enforcement::default();
    let protect = s.tables("protect", "a list of MATCH tables");
    let enforcement = Enforcement {
        enabled: s.read("enabled", value::boolean).unwrap_or(default.enabled),
        max_job_kills_per_minute: s
            .read("max_job_kills_per_minute", value::count)
            .unwrap_or(default.max_job_kills_per_minute),
        protect: protect.into_iter().map(|m| matches(m, MAX_MATCH_DEPTH)).collect(),
        protect_defaults: s.read("protect_defaults", value::boolean).unwrap_or(default.protect_defaults),
    };
    s.finish();
    enforcement
}

fn matches(mut s: Section<'_, '_>, depth: usize) -> Match {
    const KEYS: [&str; 7] = ["argv", "exe", "comm", "user", "cgroup", "container", "parent"];
    let doc = s.doc;
    let empty = !KEYS.iter().any(|k| s.has(k));
    let parent = s.table("parent", "parent");
    let parent = match parent {
        Some(p) if depth == 0 => {
            s.doc.problem(p.span, format!("expected at most {MAX_MATCH_DEPTH} nested `parent`s"));
            None
        }
        Some(p) => Some(matches(p, depth - 1)),
        None => None,
    };
    let m = Match {
        argv: s.read("argv", |v| doc.pattern(v)),
        exe: s.read("exe", |v| doc.pattern(v)),
        comm: s.read("comm", |v| doc.pattern(v)),
        user: s.read("user", value::user),
        cgroup: s.read("cgroup", |v| doc.pattern(v)),
        container: s.read("container", value::filled),
        parent: parent.map(Box::new),
    };
    if empty {
        let message = "a MATCH must not be empty: expected one or more of `argv`, `exe`, `comm`, `user`, `cgroup`, \
                       `container`, `parent`";
        s.doc.problem(s.span.clone(), message);
    }
    s.finish();
    m
}

fn rule(mut s: Section<'_, '_>) -> Option<Rule> {
    let name = s.must("name", value::name);
    if !s.has("match") {
        s.missing("match");
    }
    let m = s.table("match", "match").map(|t| matches(t, MAX_MATCH_DEPTH));
    let rule = Rule {
        name: name.clone().unwrap_or_default(),
        matches: m.clone().unwrap_or_default(),
        timeout: s.read("timeout", value::span),
        zombie_after: s.read("zombie_after", value::duration),
        orphan_after: s.read("orphan_after", value::duration).unwrap_or(DEFAULT_AFTER),
        on_timeout: s.read("on_timeout", value::choice(&ACTIONS)).unwrap_or(Action::Alert),
        on_orphan: s.read("on_orphan", value::choice(&ACTIONS)).unwrap_or(Action::Alert),
        kill_daemons: s.read("kill_daemons", value::boolean).unwrap_or_default(),
        enforce_existing: s.read("enforce_existing", value::boolean).unwrap_or_default(),
        stop_signal: s.read("stop_signal", value::signal_number).unwrap_or(crate::model::signal::SIGTERM),
        grace: s.read("grace", value::duration).unwrap_or(DEFAULT_GRACE),
        severity: s.read("severity", value::choice(&SEVERITIES)),
    };
    s.finish();
    (name.is_some() && m.is_some()).then_some(rule)
}

#[derive(Clone, Copy)]
enum Type {
    Alertmanager,
    Pagerduty,
    Webhook,
    Exec,
}

const TYPES: [(&str, Type); 4] = [
    ("alertmanager", Type::Alertmanager),
    ("pagerduty", Type::Pagerduty),
    ("webhook", Type::Webhook),
    ("exec", Type::Exec),
];

fn receiver(mut s: Section<'_, '_>) -> Option<Receiver> {
    let name = s.must("name", value::name);
    let kind = s.must("type", value::choice(&TYPES)).map(|t| receiver_kind(&mut s, t));
    let kinds = AlertKind::ALL.map(|k| (k.as_str(), k));
    let wanted = s.list("kinds", value::choice(&kinds));
    if wanted.as_ref().is_some_and(Vec::is_empty)
        && let Some(v) = s.get("kinds")
    {
        s.doc.problem(v.span(), "`kinds`: expected at least one kind; leave the key out for all");
    }
    let min_severity = s.read("min_severity", value::choice(&SEVERITIES)).unwrap_or(Severity::Info);
    let send_resolved = s.read("send_resolved", value::boolean).unwrap_or(true);
    let timeout = s.read("timeout", value::span).unwrap_or(DEFAULT_RECEIVER_TIMEOUT);
    // A section whose type is wrong would only have its keys called unknown.
    let kind = kind?;
    s.finish();
    Some(Receiver {
        name: name?,
        kind,
        kinds: wanted.unwrap_or_default(),
        min_severity,
        send_resolved,
        timeout,
    })
}

fn receiver_kind(s: &mut Section<'_, '_>, t: Type) -> ReceiverKind {
    match t {
        Type::Alertmanager => {
            let one = s.read("url", value::url);
            let many = s.list("urls", value::url);
            let urls: Vec<_> = one.into_iter().chain(many.unwrap_or_default()).collect();
            if s.has("url") == s.has("urls") {
                let message = "expected either `url` or `urls` in an alertmanager receiver";
                s.doc.problem(s.span.clone(), message);
            } else if urls.is_empty() && s.has("urls") {
                let span = s.get("urls").map_or(0..0, toml::Spanned::span);
                s.doc.problem(span, "`urls`: expected at least one URL");
            }
            ReceiverKind::Alertmanager {
                urls,
                bearer_token_file: s.read("bearer_token_file", value::path),
                ca_file: s.read("ca_file", value::path),
            }
        }
        Type::Pagerduty => ReceiverKind::Pagerduty {
            url: s.read("url", value::url).unwrap_or_else(|| PAGERDUTY_URL.into()),
            routing_key_file: s.must("routing_key_file", value::path).unwrap_or_default(),
            ca_file: s.read("ca_file", value::path),
        },
        Type::Webhook => ReceiverKind::Webhook {
            url: s.must("url", value::url).unwrap_or_default(),
            secret_file: s.read("secret_file", value::path),
            bearer_token_file: s.read("bearer_token_file", value::path),
            ca_file: s.read("ca_file", value::path),
        },
        Type::Exec => {
            if !s.has("command") {
                s.missing("command");
            }
            let command = s.list("command", value::filled);
            if let (Some(words), Some(v)) = (&command, s.get("command"))
                && !words.first().is_some_and(|w| w.starts_with('/'))
            {
                s.doc.problem(
                    v.span(),
                    "`command`: expected a program by its absolute path, then its arguments",
                );
            }
            ReceiverKind::Exec { command: command.unwrap_or_default() }
        }
    }
}
