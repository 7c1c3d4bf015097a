//! Single values: each reader says what it expected and what it found.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use toml::de::DeValue;

use super::names;
use super::{Pattern, User};
use crate::model::schema::is_job_name;
use crate::model::signal;

/// Longer than any job; keeps sums of times far from overflow.
const MAX_DURATION: Duration = Duration::from_hours(10 * 365 * 24);
const UNITS: [(&str, u64); 7] = [
    ("d", 86_400_000_000_000),
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
];
const WANT_DURATION: &str = "a duration such as \"30s\", \"1h30m\" or \"500ms\"";

/// A value that was read, or what was expected and found instead.
pub(super) type Value<T> = Result<T, String>;

/// Reads `1h30m`, `500ms`, `1.5s`: numbers with units (d, h, m, s, ms, us, ns) from the largest to the smallest, each once.
/// A bare number is none, whatever it is.
///
/// # Errors
/// In words, what was expected.
pub fn parse_duration(s: &str) -> Result<Duration, String> {
    let want = || format!("expected {WANT_DURATION}, found {}", quoted(s));
    let mut rest = s;
    let mut sum: u128 = 0;
    let mut units = UNITS.iter();
    if rest.is_empty() {
        return Err(want());
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(want)?;
        let (number, tail) = rest.split_at(digits);
        let letters = tail.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(letters);
        let &(_, ns) = units.find(|(name, _)| *name == unit).ok_or_else(want)?;
        let (whole, part) = number.split_once('.').unwrap_or((number, "0"));
        if part.len() > 9 || part.is_empty() {
            return Err(want());
        }
        let whole: u64 = whole.parse().map_err(|_| want())?;
        let fraction: u64 = part.parse().map_err(|_| want())?;
        let scale = 10u128.pow(part.len() as u32);
        sum += u128::from(whole) * u128::from(ns) + u128::from(fraction) * u128::from(ns) / scale;
        rest = tail;
    }
    match u64::try_from(sum).map(Duration::from_nanos) {
        Ok(d) if d <= MAX_DURATION => Ok(d),
        _ => Err(format!("expected a duration of at most ten years, found {}", quoted(s))),
    }
}

/// As [`parse_duration`] reads it: `1h30m`, `500ms`, `0s`.
#[must_use]
pub fn duration_text(d: Duration) -> String {
    let mut rest = d.as_nanos();
    let mut out = String::new();
    for (unit, ns) in UNITS {
        let n = rest / u128::from(ns);
        if n > 0 {
            // Writing to a String cannot fail.
            let _ = write!(out, "{n}{unit}");
        }
        rest %= u128::from(ns);
    }
    if out.is_empty() { "0s".into() } else { out }
}

/// A string as it is shown in a message: escaped and short.
pub(super) fn quoted(s: &str) -> String {
    const LONGEST: usize = 60;
    if s.chars().count() > LONGEST {
        format!("{:?}..", s.chars().take(LONGEST).collect::<String>())
    } else {
        format!("{s:?}")
    }
}

/// What stands there, in words.
pub(super) fn found(v: &DeValue<'_>) -> String {
    match v {
        DeValue::String(s) => quoted(s),
        DeValue::Integer(i) => format!("the number {}", clip(&i.to_string())),
        DeValue::Float(f) => format!("the number {}", clip(&f.to_string())),
        DeValue::Boolean(b) => format!("{b}"),
        DeValue::Datetime(d) => format!("the date {d}"),
        DeValue::Array(_) => "a list".into(),
        DeValue::Table(_) => "a table".into(),
    }
}

fn clip(s: &str) -> String {
    s.chars().take(40).collect()
}

fn wrong<T>(want: &str, v: &DeValue<'_>) -> Value<T> {
    Err(format!("expected {want}, found {}", found(v)))
}

pub(super) fn filled(v: &DeValue<'_>) -> Value<String> {
    match v.as_str() {
        Some(s) if !s.is_empty() && !s.contains('\0') => Ok(s.to_owned()),
        _ => wrong("a string that is not empty", v),
    }
}

pub(super) fn boolean(v: &DeValue<'_>) -> Value<bool> {
    v.as_bool().map_or_else(|| wrong("true or false", v), Ok)
}

/// A number of 1 to a million.
pub(super) fn count(v: &DeValue<'_>) -> Value<u32> {
    let n = v.as_integer().and_then(|i| u32::from_str_radix(i.as_str(), i.radix()).ok());
    match n {
        Some(n @ 1..=1_000_000) => Ok(n),
        _ => wrong("a whole number from 1 to 1000000", v),
    }
}

/// A ring's size: the kernel takes powers of two, whole pages.
pub(super) fn ring(v: &DeValue<'_>) -> Value<u32> {
    let n = v.as_integer().and_then(|i| u32::from_str_radix(i.as_str(), i.radix()).ok());
    match n {
        Some(n) if n.is_power_of_two() && (4096..=1 << 30).contains(&n) => Ok(n),
        _ => wrong("a power of two from 4096 to 1073741824", v),
    }
}

/// Entries of a preallocated map; 0: as many as the host may need.
pub(super) fn entries(v: &DeValue<'_>) -> Value<u32> {
    let n = v.as_integer().and_then(|i| u32::from_str_radix(i.as_str(), i.radix()).ok());
    match n {
        Some(n) if n == 0 || (16..=1 << 22).contains(&n) => Ok(n),
        _ => wrong("0 or a number from 16 to 4194304", v),
    }
}

pub(super) fn duration(v: &DeValue<'_>) -> Value<Duration> {
    match v {
        DeValue::String(s) => parse_duration(s),
        other => wrong(WANT_DURATION, other),
    }
}

/// A duration that is not zero.
pub(super) fn span(v: &DeValue<'_>) -> Value<Duration> {
    match duration(v)? {
        Duration::ZERO => wrong("a duration longer than zero", v),
        d => Ok(d),
    }
}

pub(super) fn path(v: &DeValue<'_>) -> Value<PathBuf> {
    match v.as_str() {
        Some(s) if s.starts_with('/') && !s.contains('\0') => Ok(s.into()),
        _ => wrong("an absolute path", v),
    }
}

pub(super) fn address(v: &DeValue<'_>) -> Value<SocketAddr> {
    match v.as_str().map(str::parse) {
        Some(Ok(a)) => Ok(a),
        _ => wrong("an address and port such as \"127.0.0.1:19750\" or \"[::1]:19750\"", v),
    }
}

pub(super) fn pattern(v: &DeValue<'_>) -> Value<Pattern> {
    let Some(s) = v.as_str() else { return wrong("a regular expression as a string", v) };
    if s.is_empty() {
        return Err("expected a regular expression, found an empty one, which matches everything".into());
    }
    Pattern::new(s).map_err(|why| {
        format!("expected a regular expression of the regex crate, found {}: {why}", quoted(s))
    })
}

pub(super) fn user(v: &DeValue<'_>) -> Value<User> {
    let numeric = match v {
        DeValue::Integer(i) => Some(i.as_str().parse::<u32>().map_err(|_| ())),
        DeValue::String(s) if !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit()) => {
            Some(s.parse().map_err(|_| ()))
        }
        _ => None,
    };
    match (numeric, v) {
        (Some(Ok(uid)), _) => Ok(User { given: uid.to_string(), uid }),
        (None, DeValue::String(s)) => names::user_id(s)
            .map(|uid| User { given: s.to_string(), uid })
            .ok_or_else(|| format!("expected a user of this machine or a uid, found {}", quoted(s))),
        _ => wrong("a user name or a uid", v),
    }
}

pub(super) fn group(v: &DeValue<'_>) -> Value<String> {
    match v.as_str() {
        Some("") => Ok(String::new()),
        Some(s) if names::group_id(s).is_some() => Ok(s.to_owned()),
        _ => wrong("a group of this machine", v),
    }
}

pub(super) fn signal_number(v: &DeValue<'_>) -> Value<u8> {
    let name = v.as_str().filter(|s| s.starts_with("SIG"));
    match name.and_then(|s| signal::parse(s).ok()) {
        Some(n) => Ok(n),
        None => wrong("the name of a signal such as \"SIGTERM\"", v),
    }
}

/// `[A-Za-z0-9_.-]{1,64}`.
pub(super) fn name(v: &DeValue<'_>) -> Value<String> {
    match v.as_str() {
        Some(s) if is_job_name(s) => Ok(s.to_owned()),
        _ => wrong("a name of 1 to 64 letters, digits, '_', '.' and '-'", v),
    }
}

/// An http or https URL. One that carries a password is refused: URLs are shown in logs.
pub(super) fn url(v: &DeValue<'_>) -> Value<String> {
    let want = "an http:// or https:// URL";
    let Some(s) = v.as_str() else { return wrong(want, v) };
    let Ok(u) = s.parse::<hyper::Uri>() else { return wrong(want, v) };
    if !matches!(u.scheme_str(), Some("http" | "https")) || u.host().is_none_or(str::is_empty) {
        return wrong(want, v);
    }
    if u.authority().is_some_and(|a| a.as_str().contains('@')) {
        return Err(
            "expected a URL without user and password: give a secret by its file (bearer_token_file)".into(),
        );
    }
    Ok(s.to_owned())
}

/// A directive of tracing-subscriber's filter: `info`, `warn,jobwarden::alert=debug`.
pub(super) fn log_filter(v: &DeValue<'_>) -> Value<String> {
    let want = "a log filter such as \"info\" or \"warn,jobwarden=debug\"";
    match v.as_str() {
        Some(s) if !s.is_empty() && tracing_subscriber::EnvFilter::builder().parse(s).is_ok() => Ok(s.into()),
        _ => wrong(want, v),
    }
}

/// One of a list of words.
pub(super) fn choice<T: Copy>(options: &[(&'static str, T)]) -> impl Fn(&DeValue<'_>) -> Value<T> {
    move |v| {
        let hit = v.as_str().and_then(|s| options.iter().find(|(word, _)| *word == s));
        hit.map(|&(_, t)| t).ok_or_else(|| {
            let words: Vec<_> = options.iter().map(|(word, _)| format!("\"{word}\"")).collect();
            format!("expected one of {}, found {}", words.join(", "), found(v))
        })
    }
}
