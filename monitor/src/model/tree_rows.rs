//! A tree as far as its text shows it: the contract's keys, without those that no column has and those that say nothing
//! (null, false). Less than half as long, and read without copying: a tree may have a hundred thousand processes.

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::key::Key;
use super::outside::escape;
use super::schema::{Container, Exit, JobId, LineageKnown, Process, Ref, State, Tree, Unread};

/// `tree` ([`Tree`]).
#[derive(Debug, Serialize, Deserialize)]
pub struct TreeRows<'a> {
    #[serde(borrow)]
    pub at: Text<'a>,
    #[serde(borrow)]
    pub processes: Vec<Row<'a>>,
    #[serde(default, skip_serializing_if = "<[Unread]>::is_empty")]
    pub unread: Cow<'a, [Unread]>,
}

impl<'a> TreeRows<'a> {
    pub fn parse(json: &'a [u8]) -> serde_json::Result<Self> {
        // Once for all: each text would be looked at again.
        match std::str::from_utf8(json) {
            Ok(s) => serde_json::from_str(s),
            Err(_) => serde_json::from_slice(json),
        }
    }
}

impl<'a> From<&'a Tree> for TreeRows<'a> {
    fn from(t: &'a Tree) -> Self {
        Self {
            at: text(&t.at),
            processes: t.processes.iter().map(Row::from).collect(),
            unread: Cow::Borrowed(&t.unread),
        }
    }
}

/// PROCESS ([`Process`]).
#[derive(Debug, Serialize, Deserialize)]
pub struct Row<'a> {
    pub id: Key,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ppid: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lineage_parent: Option<Key>,
    pub lineage: LineageKnown,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adopter: Option<Cow<'a, Ref>>,
    pub state: State,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    pub kernel_state: Option<Text<'a>>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub orphan: bool,
    pub state_s: f64,
    #[serde(borrow)]
    pub started: Text<'a>,
    #[serde(borrow)]
    pub comm: Text<'a>,
    #[serde(borrow)]
    pub argv: Vec<Text<'a>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<JobId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<Cow<'a, Container>>,
    /// Of a process whose pid is another inside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid_ns: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ns_pid: Option<u32>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub kernel_thread: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<Cow<'a, Exit>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub elided: Option<u32>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub argv_cut: bool,
}

impl<'a> From<&'a Process> for Row<'a> {
    fn from(p: &'a Process) -> Self {
        let ns_pid = p.ns_pid.filter(|n| *n != p.pid);
        Self {
            id: p.id,
            ppid: p.ppid,
            lineage_parent: p.lineage_parent,
            lineage: p.lineage,
            adopter: p.adopter.as_ref().map(Cow::Borrowed),
            state: p.state,
            kernel_state: p.kernel_state.as_deref().map(text),
            orphan: p.orphan,
            state_s: p.state_s,
            started: text(&p.started),
            comm: text(p.comm.raw()),
            argv: p.argv.iter().map(|a| text(a.raw())).collect(),
            uid: p.uid,
            job: p.job,
            container: p.container.as_ref().map(Cow::Borrowed),
            pid_ns: p.pid_ns.filter(|_| ns_pid.is_some()),
            ns_pid,
            kernel_thread: p.kernel_thread,
            exit: p.exit.as_ref().map(Cow::Borrowed),
            elided: Some(p.elided).filter(|&n| n > 0),
            argv_cut: p.argv_cut,
        }
    }
}

/// A string of the JSON; copied only where it has an escape in it. As [`super::outside::OutsideText`], it is only shown escaped.
#[derive(Serialize, Deserialize)]
#[serde(transparent)]
pub struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

const fn text(s: &str) -> Text<'_> {
    Text(Cow::Borrowed(s))
}

impl Text<'_> {
    /// The text itself: to compare and parse it. Never to show it.
    #[must_use]
    pub fn raw(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&escape(&self.0))
    }
}

impl fmt::Debug for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}
