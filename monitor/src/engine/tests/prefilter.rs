use proptest::prelude::*;
use proptest::sample::select;

use super::*;
use crate::engine::forest::{Flags, Str};

type Maybe<T> = Option<T>;

/// A MATCH as TOML, from few words, so that some of them match.
fn matching(depth: u32) -> BoxedStrategy<String> {
    let one = |key: &'static str, values: &'static [&'static str]| {
        prop::option::weighted(0.4, select(values)).prop_map(move |v| v.map(|v| format!("{key} = '{v}'")))
    };
    let own = (
        one("argv", &["aa", "^ab", "b+c", "(a|c)d", r"\d", "c$", "(?i)AB", "a.*c", "(ab|b )+c?", "."]),
        one("exe", &["/bin/a$", "/opt/", "b", "[ab]$", "^/(bin|opt)/c"]),
        one("comm", &["^a", "b", "(c|d)", "[ab]", "x?"]),
        one("cgroup", &["/a", "/b$", "^/$", "[ab]"]),
        prop::option::weighted(0.2, 0..2_u32),
        prop::option::weighted(0.1, select(&["abc", "def"][..])),
    );
    let parent = if depth == 0 {
        Just(None).boxed()
    } else {
        prop::option::weighted(0.3, matching(depth - 1)).boxed()
    };
    (own, parent)
        .prop_map(|((argv, exe, comm, cgroup, user, container), parent)| {
            let user = user.map(|u| format!("user = {u}"));
            let container = container.map(|c| format!("container = '{c}'"));
            let parent = parent.map(|p| format!("parent = {p}"));
            let mut all: Vec<String> =
                [argv, exe, comm, cgroup, user, container, parent].into_iter().flatten().collect();
            if all.is_empty() {
                all.push("comm = 'a'".to_owned());
            }
            format!("{{ {} }}", all.join(", "))
        })
        .boxed()
}

/// What is known of a process, and what was read of it.
#[derive(Clone, Debug)]
struct Of {
    argv: Maybe<&'static str>,
    exe: Maybe<&'static str>,
    comm: &'static str,
    cgroup: Maybe<&'static str>,
    uid: u32,
    flags: Vec<bool>,
    alive: bool,
}

fn process() -> impl Strategy<Value = Of> {
    let argv = select(&["aa", "ab\0c", "bbc", "x\0cd", "a\0b\0c", "7", "Ab", "", "\u{e9}a", "b\0c"][..]);
    let exe = select(&["/bin/a", "/opt/b", "/bin/a (deleted)", "/opt/c (deleted)", "x"][..]);
    let cgroup = select(&["/a", "/x/b", "/", "/docker/abcabcabc"][..]);
    (
        prop::option::weighted(0.8, argv),
        prop::option::weighted(0.8, exe),
        select(&["a", "b", "cd", "xb", ""][..]),
        prop::option::weighted(0.6, cgroup),
        select(&[0_u32, 1, u32::MAX][..]),
        prop::collection::vec(prop::bool::weighted(0.3), 4),
        prop::bool::weighted(0.9),
    )
        .prop_map(|(argv, exe, comm, cgroup, uid, flags, alive)| Of {
            argv,
            exe,
            comm,
            cgroup,
            uid,
            flags,
            alive,
        })
}

fn enter(w: &mut World, key: Key, of: &Of) {
    let Some(i) = w.e.forest.find(key) else { return };
    let mut intern = |s: Maybe<&str>| s.map_or(Str::NONE, |s| w.e.forest.strings.intern(s.as_bytes()));
    let (argv, exe, cgroup) = (intern(of.argv), intern(of.exe), intern(of.cgroup));
    let n = w.e.forest.node_mut(i);
    (n.argv, n.exe, n.cgroup) = (argv, exe, cgroup);
    (n.comm, n.uid) = (sim::comm(of.comm), of.uid);
    for (f, on) in [Flags::CUT, Flags::DOUBTED, Flags::READ, Flags::KERNEL].into_iter().zip(&of.flags) {
        if *on { n.flags.set(f) } else { n.flags.clear(f) }
    }
    if !of.alive {
        n.state = State::Zombie;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2_000) })]

    /// The search over all rules at once finds the rule that trying them one by one finds, and asks for the same facts.
    #[test]
    fn the_same_rule_as_one_by_one(
        rules in prop::collection::vec(matching(2), 1..12),
        processes in prop::collection::vec(process(), 3),
    ) {
        let rule = |(n, m): (usize, &String)| format!("[[job]]\nname = \"r{n}\"\nmatch = {m}\n");
        let text: String = rules.iter().enumerate().map(rule).collect();
        let mut w = World::new("");
        let a = w.sim.fork(1);
        let b = w.sim.fork(a);
        let c = w.sim.fork(b);
        w.drain();
        for (pid, of) in [a, b, c].into_iter().zip(&processes) {
            let key = w.sim.key(pid);
            enter(&mut w, key, of);
        }
        w.e.rules.set(&config(&text).jobs);
        for pid in [a, b, c] {
            let Some(i) = w.e.forest.find(w.sim.key(pid)) else { continue };
            for ask in [false, true] {
                let (rules, forest) = (&w.e.rules, &w.e.forest);
                let one_by_one = rules.verdict_one_by_one(i, ask, forest);
                prop_assert_eq!(rules.verdict(i, ask, forest), one_by_one, "{} {:?}", text, processes);
            }
        }
    }
}
