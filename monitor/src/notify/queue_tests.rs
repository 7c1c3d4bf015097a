//! The queue's promises over random histories: what each receiver heard, against what happened.

use proptest::prelude::*;

use super::queue::*;
use super::testing::{alert, resolved};
use crate::model::schema::{Alert, Severity};

#[derive(Clone, Debug)]
enum Step {
    Fire(u64, usize),
    Resolve(u64),
    /// Receiver, how many, and how each fares.
    Deliver(usize, usize, u8),
    Later(i64),
    Reload,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..4u64, 1..4usize).prop_map(|(id, count)| Step::Fire(id, count)),
        (0..4u64).prop_map(Step::Resolve),
        (0..2usize, 1..4usize, any::<u8>()).prop_map(|(r, n, fate)| Step::Deliver(r, n, fate)),
        (1..100_000i64).prop_map(Step::Later),
        Just(Step::Reload),
    ]
}

fn filters() -> Vec<Filter> {
    let filter = |name: &str, send_resolved| Filter {
        name: name.into(),
        kinds: Vec::new(),
        min_severity: Severity::Info,
        send_resolved,
        resend: false,
    };
    vec![filter("all", true), filter("firing-only", false)]
}

/// What one receiver heard of one alert: (episode, version, whether it was its end).
type Heard = Vec<(u64, u32, bool)>;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn nothing_is_lost_and_nothing_is_overtaken(steps in prop::collection::vec(step(), 0..60)) {
        let mut q = Queue::default();
        q.init_filters(filters());
        let mut now = 1_000_000;
        let mut fired = 0u64;
        let mut open: [Option<Alert>; 4] = [const { None }; 4];
        let mut heard: [[Heard; 4]; 2] = Default::default();
        for s in steps {
            match s {
                Step::Fire(id, count) => {
                    let fresh = || {
                        fired += 1;
                        Alert { since: format!("2026-01-01T00:00:{:02}Z", fired % 60), ..alert(id) }
                    };
                    let a = Alert { count, ..open[id as usize].take().unwrap_or_else(fresh) };
                    q.submit(&a, now);
                    open[id as usize] = Some(a);
                }
                Step::Resolve(id) => {
                    if let Some(a) = open[id as usize].take() {
                        q.submit(&resolved(&a), now);
                    }
                }
                Step::Later(ms) => now += ms,
                Step::Reload => q.set_filters(filters(), |_| true),
                Step::Deliver(r, n, fate) => deliver(&mut q, r, n, fate, now, &mut heard),
            }
        }
        // The receivers are well again: all that is owed arrives.
        for _ in 0..100 {
            now += LONGEST_WAIT;
            for r in 0..2 {
                deliver(&mut q, r, 10, 0, now, &mut heard);
            }
        }
        let counts = q.counts();
        prop_assert!(counts.iter().all(|c| c.pending == 0), "{:?}", counts);
        for (r, by_alert) in heard.iter().enumerate() {
            for told in by_alert {
                prop_assert!(told.windows(2).all(|w| (w[0].0, w[0].1) < (w[1].0, w[1].1)), "{r} {told:?}");
                let mut ends: Vec<_> = told.iter().filter(|t| t.2).map(|t| t.0).collect();
                ends.dedup();
                prop_assert_eq!(ends.len(), told.iter().filter(|t| t.2).count());
            }
        }
        for (&seq, e) in &q.episodes {
            let id = usize::from_str_radix(&e.id, 16).unwrap();
            for (r, slot) in e.slots.iter().enumerate() {
                let told: Vec<_> = heard[r][id].iter().filter(|t| t.0 == seq).collect();
                if slot.parked > 0 {
                    continue;
                }
                prop_assert!(!told.is_empty(), "receiver {r} never heard of episode {seq}");
                if r == 0 {
                    let last = told[told.len() - 1];
                    prop_assert_eq!((last.1, last.2), (e.version, e.resolved.is_some()));
                }
            }
        }
    }
}

fn deliver(q: &mut Queue, r: usize, n: usize, fate: u8, now: i64, heard: &mut [[Heard; 4]; 2]) {
    let (picked, _) = q.pick(r, now, n);
    let mut ids: Vec<_> = picked.iter().map(|seq| q.episodes[seq].id.clone()).collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), picked.len(), "two episodes of one alert at once");
    for (i, seq) in picked.into_iter().enumerate() {
        let (version, end, id) = {
            let e = &q.episodes[&seq];
            (e.version, e.resolved.is_some(), usize::from_str_radix(&e.id, 16).unwrap())
        };
        let outcome = match fate.rotate_left(i as u32) % 4 {
            0 | 1 => {
                heard[r][id].push((seq, version, end));
                Outcome::Delivered
            }
            2 => Outcome::Later { not_before: now + 5000, error: "later".into() },
            _ => Outcome::Refused { error: "no".into() },
        };
        assert!(q.done(r, seq, version, outcome, now));
    }
}

#[test]
fn a_wait_beyond_all_bounds_comes_from_a_clock_that_was_set_back() {
    let mut q = Queue::default();
    q.init_filters(filters());
    q.submit(&alert(1), 10 * LONGEST_WAIT);
    let (picked, _) = q.pick(0, 10 * LONGEST_WAIT, 1);
    let not_before = 10 * LONGEST_WAIT + 60_000;
    q.done(0, picked[0], 1, Outcome::Later { not_before, error: String::new() }, 10 * LONGEST_WAIT);
    assert_eq!(q.pick(0, 10 * LONGEST_WAIT, 1), (Vec::new(), Some(not_before)));
    assert_eq!(q.pick(0, 5, 1).0, picked);
}

#[test]
fn history_ends_after_a_month_and_what_is_owed_after_a_week() {
    const DAY: i64 = 86_400_000;
    let mut q = Queue::default();
    q.init_filters(filters());
    for n in 1..=3 {
        q.submit(&alert(n), 0);
    }
    q.submit(&resolved(&alert(1)), 0);
    q.submit(&resolved(&alert(2)), 0);
    for r in 0..2 {
        // Number 2 is told to all.
        let (picked, _) = q.pick(r, 0, 10);
        for seq in picked {
            let outcome = if *q.episodes[&seq].id == *alert(2).id {
                Outcome::Delivered
            } else {
                Outcome::Later { not_before: 0, error: String::new() }
            };
            let version = q.episodes[&seq].version;
            q.done(r, seq, version, outcome, 0);
        }
    }
    assert_eq!(q.expire(6 * DAY), (vec![], vec![0, 0]));
    assert_eq!(q.expire(8 * DAY), (vec![1], vec![1, 1]));
    assert_eq!(q.expire(31 * DAY), (vec![2], vec![0, 0]));
    assert_eq!(q.episodes.len(), 1, "what fires is never forgotten for its age");
}

#[test]
fn what_is_held_waits_for_its_cause_or_for_its_time() {
    let mut q = Queue::default();
    q.init_filters(filters());
    let Submitted::Changed(seq) = q.submit(&alert(1), 0) else { panic!() };
    q.hold(seq, 1_000);
    assert_eq!(q.pick(0, 10, 9), (vec![], Some(1_000)), "asked again when its time is over");
    // The cause came: one message, with it.
    let with_cause = Alert { summary: "and why".into(), ..alert(1) };
    assert_eq!(q.submit(&with_cause, 20), Submitted::Changed(seq));
    assert_eq!(q.pick(0, 20, 9).0, [seq]);
    q.done(0, seq, 2, Outcome::Delivered, 21);
    assert_eq!(q.pick(0, 22, 9).0, [0_u64; 0], "it is told once");
    // No cause came, and then it is said that none will.
    let Submitted::Changed(seq) = q.submit(&alert(2), 30) else { panic!() };
    q.hold(seq, 1_030);
    assert_eq!(q.submit(&alert(2), 40), Submitted::Same(seq));
    assert_eq!(q.pick(0, 40, 9).0, [seq]);
    let Submitted::Changed(seq) = q.submit(&alert(3), 50) else { panic!() };
    q.hold(seq, 1_050);
    assert_eq!(q.pick(0, 1_050, 9).0, [seq], "nobody said anything more");
}
