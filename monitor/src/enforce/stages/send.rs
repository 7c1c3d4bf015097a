//! One signal to some members: by pidfds that are known to be theirs.

use std::collections::{HashMap, HashSet};
use std::io;

use super::{Run, Sent};
use crate::enforce::Member;
use crate::enforce::audit::{self, Entry};
use crate::enforce::pidfd::Pidfd;
use crate::model::key::Key;
use crate::model::schema::SignalledOutcome;
use crate::model::signal::{self, SIGCONT, SIGKILL};

/// What became of members for whom handles were wanted.
#[derive(Default)]
pub(super) struct Held {
    gone: HashSet<Key>,
    /// Valid, and not kept.
    brief: HashMap<Key, Pidfd>,
}

impl Run<'_> {
    /// Opens handles for those that have none and asks afterwards who of them still is who was meant: a key that is in a
    /// reading begun after the opening held its pid since its start, so also when the pidfd was opened. A stranger that got
    /// a member's pid in between is in no reading, or under another key.
    pub(super) fn hold(&mut self, to: &[Member]) -> io::Result<Held> {
        let mut opened = Vec::new();
        let mut held = Held::default();
        for m in to.iter().filter(|m| self.ends.get(m.key).is_none()) {
            match Pidfd::open(m.key.pid) {
                Ok(Some(fd)) => opened.push((m.key, fd)),
                Ok(None) => {
                    held.gone.insert(m.key);
                }
                // These get theirs in the next round, when others are closed.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => break,
                Err(e) => return Err(e),
            }
        }
        if opened.is_empty() {
            return Ok(held);
        }
        let now: HashSet<Key> = self.members()?.iter().map(|m| m.key).collect();
        for (key, fd) in opened {
            if !now.contains(&key) {
                held.gone.insert(key);
            } else if self.ends.len() < self.handles {
                self.ends.add(key, fd)?;
            } else {
                held.brief.insert(key, fd);
            }
        }
        Ok(held)
    }

    /// Sends `number` once to each of `to` that has not had it.
    pub(super) fn send(&mut self, to: &[Member], number: u8) -> io::Result<()> {
        let new: Vec<Member> = to.iter().filter(|m| !self.had.contains(&(m.key, number))).copied().collect();
        let held = self.hold(&new)?;
        for m in new {
            let reached = match self.ends.get(m.key).or_else(|| held.brief.get(&m.key)) {
                Some(fd) => signal_one(fd, number),
                None if held.gone.contains(&m.key) => Ok(false),
                None => continue,
            };
            let (gone, said) = match reached {
                Ok(true) => (false, "sent".to_owned()),
                Ok(false) => (true, SignalledOutcome::AlreadyGone.as_str().to_owned()),
                Err(e) => (false, format!("refused: {e}")),
            };
            // Who is gone is in no reading any more; should one be, it is signalled after all.
            if !gone {
                self.had.insert((m.key, number));
            }
            let line = Entry {
                process: Some(self.judge.reference(&m)),
                signal: Some(signal::name(number)),
                outcome: Some(said),
                detail: if number == SIGKILL || gone { String::new() } else { "SIGCONT after it".into() },
                ..self.entry(audit::What::Signal)
            };
            self.lines.push(line);
            self.sent.push(Sent { member: m, signal: number, gone });
        }
        Ok(())
    }

    /// To the audit, after a round's signals and not between them: each line costs more than a signal.
    pub(super) fn note(&mut self) {
        self.e.audit.write_all(&std::mem::take(&mut self.lines));
    }
}

fn signal_one(fd: &Pidfd, number: u8) -> io::Result<bool> {
    let reached = fd.signal(number)?;
    // A stopped process takes the stop signal when it goes on. SIGKILL needs no help.
    if reached && number != SIGKILL {
        fd.signal(SIGCONT)?;
    }
    Ok(reached)
}
