//! The identity of a process: pid and start. A bare pid is never a key.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A process: thread group id and the group leader's `start_boottime` in nanoseconds since boot.
///
/// Printed and parsed as the contract's ID, `PID:START`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    pub pid: u32,
    pub start: u64,
}

impl Key {
    #[must_use]
    pub const fn new(pid: u32, start: u64) -> Self {
        Self { pid, start }
    }
}

impl From<monitor_abi::ProcKey> for Key {
    fn from(k: monitor_abi::ProcKey) -> Self {
        Self { pid: k.tgid, start: k.start }
    }
}

impl From<Key> for monitor_abi::ProcKey {
    fn from(k: Key) -> Self {
        Self { start: k.start, tgid: k.pid, pad: 0 }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.pid, self.start)
    }
}

/// Not of the form `PID:START`.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is no process ID: expected PID:START, two decimal numbers")]
pub struct KeyError(pub String);

impl FromStr for Key {
    type Err = KeyError;
    fn from_str(s: &str) -> Result<Self, KeyError> {
        let bad = || KeyError(s.chars().take(64).collect());
        let (pid, start) = s.split_once(':').ok_or_else(bad)?;
        Ok(Self { pid: pid.parse().map_err(|_| bad())?, start: start.parse().map_err(|_| bad())? })
    }
}

impl Serialize for Key {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let s = std::borrow::Cow::<'de, str>::deserialize(d)?;
        s.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_round_trip() {
        let k = Key::new(4_194_304, u64::MAX);
        assert_eq!(k.to_string().parse(), Ok(k));
        for bad in ["", "1", "1:", ":1", "a:1", "1:2:3", "-1:2", "4294967296:1"] {
            assert!(bad.parse::<Key>().is_err(), "{bad}");
        }
    }
}
