//! The live forest: every process by *who started whom*, the dead ancestors that somebody alive descends from, and how
//! far each has come. Pure: it reads no clock, opens no file and knows nothing of jobs' rules, alerts or the kernel side.

pub mod row;

pub use row::{Facts, Look, Merge, Row, RowLineage, RowState, Seen, Snapshot};
