//! What a command is aimed at: PID, ID, JOB, `name:NAME`, and for `why` also the id of an alert.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::model::key::Key;
use crate::model::schema::{JobId, is_job_name};

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// A bare pid: whoever has it at this moment.
    Pid(u32),
    Id(Key),
    Job(JobId),
    /// `name:NAME`: jobs of that name.
    Name(String),
    /// 16 hex digits.
    Alert(String),
}

/// Hex digits of an alert's id.
const ALERT_DIGITS: usize = 16;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{0:?} is neither a PID (7), an ID (7:123456789), a JOB (j-7:123456789-1), name:NAME nor the 16 hex digits of an alert"
)]
pub struct TargetError(pub String);

impl FromStr for Target {
    type Err = TargetError;
    fn from_str(s: &str) -> Result<Self, TargetError> {
        let bad = || TargetError(s.chars().take(96).collect());
        if let Some(name) = s.strip_prefix("name:") {
            return if is_job_name(name) { Ok(Self::Name(name.into())) } else { Err(bad()) };
        }
        if s.starts_with("j-") {
            return s.parse().map(Self::Job).map_err(|_| bad());
        }
        if s.contains(':') {
            return s.parse().map(Self::Id).map_err(|_| bad());
        }
        if s.len() == ALERT_DIGITS && s.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Ok(Self::Alert(s.to_ascii_lowercase()));
        }
        // `parse` would take "+7".
        let digits = !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
        s.parse().ok().filter(|&p| digits && p != 0).map(Self::Pid).ok_or_else(bad)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pid(p) => p.fmt(f),
            Self::Id(k) => k.fmt(f),
            Self::Job(j) => j.fmt(f),
            Self::Name(n) => write!(f, "name:{n}"),
            Self::Alert(a) => a.fmt(f),
        }
    }
}

impl Serialize for Target {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Target {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        crate::model::key::parsed(d)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_is_told_apart_and_round_trips() {
        for (s, t) in [
            ("7", Target::Pid(7)),
            ("7:8", Target::Id(Key::new(7, 8))),
            ("j-7:8-1", Target::Job(JobId { root: Key::new(7, 8), ordinal: 1 })),
            ("name:a-b", Target::Name("a-b".into())),
            ("0123456789abcdef", Target::Alert("0123456789abcdef".into())),
            ("1234567890123456", Target::Alert("1234567890123456".into())),
        ] {
            assert_eq!(s.parse(), Ok(t.clone()));
            assert_eq!(t.to_string(), s);
        }
        for bad in [
            "",
            "0",
            "-7",
            "+7",
            "7:",
            "j-7-1",
            "name:",
            "name:a b",
            "name:a\n",
            "x",
            "4294967296",
            "é",
            "7:8:9",
        ] {
            assert!(bad.parse::<Target>().is_err(), "{bad}");
        }
    }
}
