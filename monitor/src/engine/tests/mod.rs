//! The engine against a small kernel. Each file is about one part of the design.
#![expect(clippy::many_single_char_names, reason = "processes are called a, b, c")]

mod cgroups;
mod jobs;
mod kills;
mod lifecycle;
mod orphans;
mod prefilter;
mod random;
mod restart;
mod rules;

mod sim;
mod zombies;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use sim::{S, Sim};

use super::*;
use crate::config::Overrides;
use crate::engine::forest::{Facts, Merge};
use crate::model::kill::KillSpec;
use crate::model::schema::{Alert, AlertState, JobId, Process, State};

fn config(text: &str) -> Config {
    crate::config::parse(Path::new("t.toml"), text, &BTreeMap::new(), &Overrides::default())
        .unwrap_or_else(|e| panic!("{e}"))
}

/// The engine, the kernel under it, and an edge that answers at once.
struct World {
    sim: Sim,
    e: Engine,
    /// All effects but looks, in order.
    out: Vec<Effect>,
    /// All changes, in order.
    changed: Vec<Change>,
    looks: usize,
    /// Whom the kernel was told of, and their jobs.
    entered: Vec<(Key, u64)>,
    /// Facts that /proc would give, by pid; none: nothing beside argv.
    facts: BTreeMap<u32, Facts>,
    /// Whose /proc does not answer for now.
    slow: Vec<u32>,
}

/// The record that a command about a job gives.
fn record(answer: Answer) -> Result<JobRecord, Refused> {
    match answer {
        Answer::Job(done) => done.map(|r| *r),
        other => panic!("{other:?}"),
    }
}

fn settings() -> Settings {
    Settings {
        host: "h".into(),
        machine_id: "m".into(),
        boot_id: "b".into(),
        agent: Key::new(900, 1),
        ..Settings::default()
    }
}

impl World {
    /// Synced, with PID 1 alone.
    fn new(text: &str) -> Self {
        let mut w = Self::unsynced(text);
        w.sync();
        w
    }

    fn unsynced(text: &str) -> Self {
        Self {
            sim: Sim::new(),
            e: Engine::new(settings(), &config(text)),
            out: Vec::new(),
            changed: Vec::new(),
            looks: 0,
            entered: Vec::new(),
            facts: BTreeMap::new(),
            slow: Vec::new(),
        }
    }

    fn sync(&mut self) {
        let s = self.sim.snapshot(false);
        self.merge(s);
        let mut fx = Output::default();
        self.e.handle(Input::Ready, self.sim.now, &mut fx);
        self.answer(fx);
    }

    /// A snapshot as the kernel gives it: nobody's argv has been read.
    fn merge_unread(&mut self) -> Merge {
        let mut s = self.sim.snapshot(true);
        s.rows.iter_mut().for_each(|r| r.argv = None);
        self.merge(s)
    }

    /// /proc of a slow one answers.
    fn at_last(&mut self, key: Key) {
        self.slow.retain(|&p| p != key.pid);
        self.answer(Output { effects: vec![Effect::ReadFacts(key)], ..Output::default() });
    }

    fn merge(&mut self, s: crate::engine::forest::Snapshot) -> Merge {
        let mut fx = Output::default();
        let answer = self.e.handle(Input::Snapshot(Cow::Owned(s)), self.sim.now, &mut fx);
        self.answer(fx);
        let Answer::Merged(merge) = answer else { panic!("{answer:?}") };
        merge
    }

    /// Hands over what is in the ring.
    fn drain(&mut self) {
        let mut fx = Output::default();
        for e in std::mem::take(&mut self.sim.ring) {
            self.e.handle(Input::Record { event: &e, bytes: &[] }, 0, &mut fx);
        }
        self.answer(fx);
    }

    fn answer(&mut self, mut fx: Output) {
        loop {
            self.changed.append(&mut fx.changes);
            if fx.effects.is_empty() {
                return;
            }
            let mut next = Output::default();
            for f in fx.effects {
                match f {
                    Effect::Look(key) => {
                        self.looks += 1;
                        let o = Observation::Look { key, at: self.sim.now, seen: self.sim.seen(key) };
                        self.e.handle(Input::Observation(Cow::Owned(o)), self.sim.now, &mut next);
                    }
                    Effect::ReadFacts(key) if self.slow.contains(&key.pid) => {}
                    Effect::ReadFacts(key) => {
                        let p = self.sim.procs.get(&key.pid).filter(|p| p.key == key);
                        let facts = p.map(|p| {
                            let f = self.facts.get(&key.pid).cloned().unwrap_or_default();
                            Facts { argv: f.argv.clone().or(Some(p.argv.clone())), ..f }
                        });
                        self.e.handle(
                            Input::Observation(Cow::Owned(Observation::Facts { key, facts })),
                            self.sim.now,
                            &mut next,
                        );
                    }
                    Effect::CountMembers(number) => {
                        let lives = |p: &&sim::P| matches!(p.state, State::Running | State::LeaderExited);
                        let alive = self.sim.procs.values().filter(lives).any(|p| p.job == number);
                        self.e.handle(Input::JobCounted { number, alive }, self.sim.now, &mut next);
                    }
                    Effect::EnterProcess { process, job, .. } => {
                        self.entered.push((process, job));
                        if let Some(p) = self.sim.procs.get_mut(&process.pid).filter(|p| p.key == process) {
                            p.job = job;
                        }
                    }
                    other => self.out.push(other),
                }
            }
            fx = next;
        }
    }

    /// Lets time pass, timer by timer.
    fn pass(&mut self, ns: u64) {
        self.drain();
        let end = self.sim.now + ns;
        while let Some(at) = self.e.next_wake().filter(|&at| at <= end) {
            self.sim.now = self.sim.now.max(at);
            let mut fx = Output::default();
            self.e.handle(Input::Tick, self.sim.now, &mut fx);
            self.answer(fx);
        }
        self.sim.now = end;
    }

    fn process(&self, key: Key) -> Option<Process> {
        self.e.process(key, self.sim.now)
    }

    fn state(&self, key: Key) -> Option<State> {
        self.process(key).map(|p| p.state)
    }

    /// Alerts that came out since the last call, by what happened.
    fn told(&mut self) -> Vec<(AlertChange, Alert)> {
        let mut told = Vec::new();
        self.changed.retain(|c| match c {
            Change::Alert { change, alert } => {
                told.push((*change, (**alert).clone()));
                false
            }
            _ => true,
        });
        told
    }

    fn changes(&mut self) -> Vec<(AlertChange, AlertKind)> {
        self.told().into_iter().map(|(c, a)| (c, a.kind)).collect()
    }

    fn kills(&mut self) -> Vec<KillSpec> {
        let mut kills = Vec::new();
        self.out.retain(|f| match f {
            Effect::Kill(k) => {
                kills.push((**k).clone());
                false
            }
            _ => true,
        });
        kills
    }

    /// How many jobs were to be written into the kernel.
    fn labelled(&self) -> usize {
        self.out.iter().filter(|f| matches!(f, Effect::LabelJob(_))).count()
    }

    fn firing(&self) -> Vec<AlertKind> {
        let firing = self.e.alerts(false);
        firing.into_iter().filter(|a| a.state == AlertState::Firing).map(|a| a.kind).collect()
    }
}
