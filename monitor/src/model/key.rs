//! The identity of a process: pid and start. A bare pid is never a key.

use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;

use serde::de::Visitor;
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
        f.write_str(Name::default().key(*self).as_str())
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
        s.serialize_str(Name::default().key(*self).as_str())
    }
}

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        parsed(d)
    }
}

/// The text of an ID or a JOB, without the heap and the formatting machinery: a tree has several in each process.
pub(crate) struct Name {
    bytes: [u8; NAME_MAX],
    len: usize,
}

/// `j-PID:START-N`, each number at its longest.
const NAME_MAX: usize = 2 + 10 + 1 + 20 + 1 + 10;

impl Default for Name {
    fn default() -> Self {
        Self { bytes: [0; NAME_MAX], len: 0 }
    }
}

impl Name {
    pub(crate) fn key(self, k: Key) -> Self {
        self.number(k.pid).text(":").number(k.start)
    }

    pub(crate) fn number(self, n: impl itoa::Integer) -> Self {
        let mut digits = itoa::Buffer::new();
        self.text(digits.format(n))
    }

    pub(crate) fn text(mut self, s: &str) -> Self {
        self.bytes[self.len..][..s.len()].copy_from_slice(s.as_bytes());
        self.len += s.len();
        self
    }

    pub(crate) fn as_str(&self) -> &str {
        // Whole texts were put together.
        std::str::from_utf8(&self.bytes[..self.len]).unwrap_or_default()
    }
}

/// What stands as its text in JSON.
pub(crate) fn parsed<'de, D: Deserializer<'de>, T: FromStr<Err: fmt::Display>>(d: D) -> Result<T, D::Error> {
    struct Text<T>(PhantomData<T>);
    impl<T: FromStr<Err: fmt::Display>> Visitor<'_> for Text<T> {
        type Value = T;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a string")
        }
        fn visit_str<E: serde::de::Error>(self, s: &str) -> Result<T, E> {
            s.parse().map_err(E::custom)
        }
    }
    d.deserialize_str(Text(PhantomData))
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
