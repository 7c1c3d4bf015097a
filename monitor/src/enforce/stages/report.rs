//! What an order came to: who was signalled with which outcome, who survived and why, who was spared, which zombies stay.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::time::Duration;

use super::{Run, SIGKILL, Sent};
use crate::enforce::audit::{self, Entry};
use crate::enforce::outcome::Outcome;
use crate::enforce::stuck;
use crate::model::key::Key;
use crate::model::schema::{KillReport, Ref, Signalled, SignalledOutcome, Spared, Stuck};
use crate::model::signal::{self, SIGCONT};

impl Run<'_> {
    /// What would be done.
    pub(super) fn dry(mut self) -> Result<Outcome, io::Error> {
        let (alive, _) = self.look()?;
        let number = if self.order.grace == Duration::ZERO { SIGKILL } else { self.order.signal };
        for m in alive {
            self.sent.push(Sent { member: m, signal: number, gone: false });
        }
        let zombies = self.zombies()?;
        Ok(self.outcome(Vec::new(), zombies, &|_, _| SignalledOutcome::DryRun))
    }

    pub(super) fn zombies(&self) -> io::Result<Vec<Ref>> {
        let mut all = self.members()?;
        all.retain(|m| self.is_over(m));
        Ok(all.iter().map(|m| self.judge.reference(m)).collect())
    }

    pub(super) fn report(mut self) -> io::Result<Outcome> {
        let (alive, _) = self.look()?;
        let zombies = self.zombies()?;
        let left: HashSet<Key> = alive.iter().map(|m| m.key).collect();
        let last: HashMap<Key, usize> =
            self.sent.iter().enumerate().map(|(i, s)| (s.member.key, i)).collect();
        let survivors: Vec<Ref> = alive.iter().map(|m| self.judge.reference(m)).collect();
        let out = self.outcome(survivors, zombies, &|i, s| {
            if s.gone {
                SignalledOutcome::AlreadyGone
            } else if left.contains(&s.member.key) || last.get(&s.member.key) != Some(&i) {
                SignalledOutcome::Survived
            } else {
                SignalledOutcome::Ended
            }
        });
        let r = &out.report;
        for s in &r.stuck {
            self.e.audit.write(&Entry {
                process: Some(s.process.clone()),
                outcome: Some(SignalledOutcome::Survived.as_str().into()),
                detail: format!("state {}, wchan {}", s.state, s.wchan.as_deref().unwrap_or("unknown")),
                ..self.entry(audit::What::Signal)
            });
        }
        let (n, survivors, spared, zombies) =
            (r.signalled.len(), r.survivors.len(), r.spared.len(), r.zombies.len());
        self.say(
            audit::What::Done,
            &format!(
                ": {n} signals, {survivors} survivors, {spared} spared, {zombies} zombies, {:.3} s",
                r.took_s
            ),
        );
        Ok(out)
    }

    pub(super) fn outcome(
        &self,
        survivors: Vec<Ref>,
        zombies: Vec<Ref>,
        of: &dyn Fn(usize, &Sent) -> SignalledOutcome,
    ) -> Outcome {
        let mut signals = BTreeMap::new();
        let mut signalled = Vec::with_capacity(self.sent.len());
        for (i, s) in self.sent.iter().enumerate() {
            let outcome = of(i, s);
            if outcome != SignalledOutcome::DryRun {
                *signals.entry((s.signal, outcome)).or_insert(0) += 1;
                if s.signal != SIGKILL && !s.gone {
                    *signals.entry((SIGCONT, outcome)).or_insert(0) += 1;
                }
            }
            signalled.push(Signalled {
                process: self.judge.reference(&s.member),
                signal: signal::name(s.signal),
                outcome,
            });
        }
        let spared = self
            .spared
            .iter()
            .filter_map(|(k, why)| Some(Spared { process: self.judge.named(*k)?.clone(), why: why.clone() }));
        let stuck = survivors.iter().map(|r| self.stuck(r)).collect();
        Outcome {
            report: KillReport {
                target: self.order.target.clone(),
                signalled,
                stuck,
                survivors,
                spared: spared.collect(),
                zombies,
                took_s: self.started.elapsed().as_secs_f64(),
            },
            signals,
        }
    }

    fn stuck(&self, survivor: &Ref) -> Stuck {
        let mut s = stuck::look(&self.e.proc, &*self.e.lineage, survivor.clone());
        if let Some(tracer) = &mut s.tracer {
            self.e.redact.reference(tracer);
        }
        s
    }
}
