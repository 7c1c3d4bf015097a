//! What each rule matches on this host at this moment, as the agent would decide it: the first rule that matches. From /proc
//! alone, so it needs no agent; within a time limit, since a process can hold up whoever reads its files.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::kills;
use crate::config::{Config, Rule};
use crate::enforce::guards::{Own, with_parents};
use crate::engine::prefilter::{Known, Prefilter};
use crate::matcher::{self, Needs};
use crate::model::outside::OutsideText;
use crate::redact::Redactor;
use crate::sources::proc::{Proc, blocking};

/// Processes of a rule that are named.
const EXAMPLES: usize = 3;
/// A rule that matches more of all processes than this, in percent, is named for that alone.
const MOST: usize = 90;
/// For one process: its argv alone may take [`blocking::LIMIT`].
const OF_PROCESS: Duration = Duration::from_secs(1);
/// PF_KTHREAD, include/linux/sched.h.
const PF_KTHREAD: u32 = 0x0020_0000;

/// What the config does on this host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Survey {
    /// Processes that were looked at; kernel threads are none.
    pub processes: usize,
    /// Of these, those whose executable may not be read: rules with `exe` were not tried on them.
    pub unreadable: usize,
    /// Not all processes could be read in time.
    pub incomplete: bool,
    pub rules: Vec<Matched>,
    #[serde(skip)]
    pub warnings: Vec<String>,
}

/// What one rule matches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Matched {
    pub name: String,
    /// Processes of which it is the first rule that matches.
    pub matches: usize,
    /// These, and all that descend from them: what its jobs contain.
    pub members: usize,
    /// The first of them, lowest PID first.
    pub examples: Vec<Example>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Example {
    pub pid: u32,
    pub comm: OutsideText,
    pub argv: Vec<OutsideText>,
}

struct Process {
    pid: u32,
    ppid: u32,
    own: Own,
}

/// Reads all processes and tries the rules on them, within `limit`. `this`: whoever asks, whose ancestors are named.
#[must_use]
pub fn survey(c: &Config, proc: &Proc, this: (u32, &'static str), limit: Duration) -> Survey {
    let needs = c.jobs.iter().fold(Needs::default(), |n, r| n.and(r.matches.needs()));
    // Names and protected programs are shown, whatever the rules ask about.
    let needs = Needs { argv: true, exe: true, ..needs };
    let (processes, incomplete) = read(proc, needs, limit);
    let redact = Redactor::new(c.agent.redact.clone());
    let mut s = judge(c, &processes, this, needs.parents, &redact);
    s.incomplete = incomplete;
    s
}

/// All processes but kernel threads, by PID. True: some were not read, since the time was over or since they hold up their readers.
fn read(proc: &Proc, needs: Needs, limit: Duration) -> (Vec<Process>, bool) {
    let end = Instant::now() + limit;
    let (mut all, mut incomplete) = (Vec::new(), false);
    for pid in proc.pids().unwrap_or_default() {
        if Instant::now() >= end {
            incomplete = true;
            break;
        }
        let of = proc.clone();
        let read = move || Ok(one(&of, pid, needs));
        match blocking::run(pid, "facts", &proc.path(pid, ""), OF_PROCESS, read) {
            Ok(p) => all.extend(p),
            Err(_) => incomplete = true,
        }
    }
    all.sort_unstable_by_key(|p| p.pid);
    (all, incomplete)
}

fn one(proc: &Proc, pid: u32, needs: Needs) -> Option<Process> {
    let stat = proc.stat(pid).ok().filter(|s| s.flags & PF_KTHREAD == 0)?;
    let uid = proc.status(pid).ok()?.uid;
    let exe = proc.exe(pid).ok();
    let own = Own::read(proc, pid, uid, stat.comm.bytes(), exe, needs);
    Some(Process { pid, ppid: stat.ppid, own })
}

fn judge(c: &Config, all: &[Process], this: (u32, &str), parents: usize, redact: &Redactor) -> Survey {
    let by_pid: HashMap<u32, usize> = all.iter().enumerate().map(|(i, p)| (p.pid, i)).collect();
    let above = |i: usize| {
        let next = |&i: &usize| by_pid.get(&all[i].ppid).copied().filter(|&up| up != i);
        std::iter::successors(next(&i), next).take(all.len())
    };
    let prefilter = Prefilter::new(c.jobs.iter().map(|r| &r.matches));
    let first = |i: usize| {
        let line: Vec<&Own> = above(i).take(parents).map(|a| &all[a].own).collect();
        with_parents(&all[i].own, &line, &mut |f| {
            let known = Known {
                argv: f.argv,
                comm: f.comm,
                uid: f.uid,
                exe: Ok(f.exe.map(matcher::existing)),
                cgroup: Ok(f.cgroup),
            };
            prefilter.candidates(&known).iter().find(|&r| c.jobs[r].matches.matches(f))
        })
    };
    let ruled: Vec<Option<usize>> = (0..all.len()).map(first).collect();
    let mut s = Survey {
        processes: all.len(),
        unreadable: all.iter().filter(|p| p.own.exe.is_none()).count(),
        ..Survey::default()
    };
    let mut members: Vec<Vec<usize>> = vec![Vec::new(); c.jobs.len()];
    for i in 0..all.len() {
        for rule in std::iter::once(i).chain(above(i)).filter_map(|i| ruled[i]) {
            if members[rule].last() != Some(&i) {
                members[rule].push(i);
            }
        }
    }
    for ((n, rule), members) in c.jobs.iter().enumerate().zip(members) {
        let own = || members.iter().copied().filter(|&i| ruled[i] == Some(n));
        let matches = own().count();
        s.warnings.extend(danger(rule, matches, &members, all, this));
        let example = |i: usize| {
            let p = &all[i];
            let (mut argv, comm) = (p.own.argv.clone(), p.own.comm.clone().unwrap_or_default());
            redact.argv(&mut argv);
            Example { pid: p.pid, comm: redact.text(&comm).into_owned().into(), argv }
        };
        let examples = own().take(EXAMPLES).map(example).collect();
        s.rules.push(Matched { name: rule.name.clone(), matches, members: members.len(), examples });
    }
    s
}

/// What the jobs of this rule contain that no job may.
fn danger(
    rule: &Rule,
    matches: usize,
    members: &[usize],
    all: &[Process],
    this: (u32, &str),
) -> Option<String> {
    let consequence = kills(rule)?;
    let mut found: Vec<String> = Vec::new();
    let mut name = |what: &str, pid: u32| {
        let text = if what == "PID 1" { what.to_owned() } else { format!("{what} (PID {pid})") };
        if found.len() < EXAMPLES && !found.contains(&text) {
            found.push(text);
        }
    };
    for &i in members {
        let p = &all[i];
        let exe = p.own.exe.as_deref();
        let file = exe.and_then(|e| e.rsplit('/').next()).unwrap_or_default();
        if p.pid == 1 {
            name("PID 1", 1);
        } else if p.pid == this.0 {
            name(this.1, p.pid);
        } else if file == "jobwarden" && p.own.argv.iter().skip(1).any(|a| a == "agent") {
            name("the agent", p.pid);
        } else if matcher::protected_by_default(exe, p.own.uid) {
            name(&OutsideText::from_bytes(file.as_bytes()).to_string(), p.pid);
        }
    }
    let contained =
        (!found.is_empty()).then(|| format!("its jobs contain {} on this host", found.join(", ")));
    let most = (all.len() >= 10 && matches * 100 >= all.len() * MOST)
        .then(|| format!("it matches {matches} of the {} processes on this host", all.len()));
    let dangers: Vec<String> = contained.into_iter().chain(most).collect();
    (!dangers.is_empty()).then(|| format!("rule {}: {}, and {consequence}", rule.name, dangers.join("; ")))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use super::*;

    /// A reload right after the start compares its rules too.
    #[test]
    fn two_surveys_at_a_time_are_both_whole() {
        let text = "[[job]]\nname = 'all'\nmatch = { argv = '.*' }\non_orphan = 'kill'\n";
        let overrides = crate::config::Overrides::default();
        let c = crate::config::parse(Path::new("t"), text, &BTreeMap::new(), &overrides).unwrap();
        let this = (std::process::id(), "this test");
        let one = || survey(&c, &Proc::default(), this, Duration::from_mins(1));
        let found: Vec<Survey> = std::thread::scope(|s| {
            let both = [s.spawn(one), s.spawn(one)];
            both.into_iter().map(|t| t.join().unwrap()).collect()
        });
        for s in found {
            assert!(s.processes > 0 && s.rules[0].members == s.processes, "{s:?}");
            assert!(!s.warnings.is_empty(), "{s:?}");
        }
    }
}
