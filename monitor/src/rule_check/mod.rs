//! Rules that are valid and dangerous all the same: what they would end beside the job that was meant. [`warnings`] judges the
//! config alone; [`host`] compares it with the processes of this host. Nothing here changes what a rule does.

pub mod host;

use crate::config::{Action, Config, Match, Pattern, Rule};
use crate::matcher::Facts;

/// Texts with nothing in common. A pattern that matches each of them leaves nothing out.
const UNRELATED: [&str; 6] = ["a", "0", "Z", "/ ", "_-", "\u{e9}"];

/// A program of root's, as it usually looks.
const fn root(
    argv: &'static str,
    exe: &'static str,
    comm: &'static str,
    cgroup: &'static str,
    parent: Option<&'static Facts<'static>>,
) -> Facts<'static> {
    Facts {
        argv: Some(argv),
        exe: Some(exe),
        comm: Some(comm),
        uid: Some(0),
        cgroup: Some(cgroup),
        container_id: None,
        container_name: None,
        parent,
    }
}

static SYSTEMD: Facts<'static> =
    root("/sbin/init", "/usr/lib/systemd/systemd", "systemd", "/init.scope", None);

/// What a healthy host has and no job may contain.
static ESSENTIAL: [(&str, Facts<'static>); 4] = [
    ("PID 1", SYSTEMD),
    ("PID 1", root("/sbin/init", "/sbin/init", "init", "/", None)),
    (
        "sshd",
        root(
            "sshd: /usr/sbin/sshd -D [listener] 0 of 10-100 startups",
            "/usr/sbin/sshd",
            "sshd",
            "/system.slice/ssh.service",
            Some(&SYSTEMD),
        ),
    ),
    (
        "the agent",
        root(
            "/usr/bin/jobwarden agent",
            "/usr/bin/jobwarden",
            "jobwarden",
            "/system.slice/jobwarden.service",
            Some(&SYSTEMD),
        ),
    ),
];

/// One sentence for each rule that is dangerous on any host.
#[must_use]
pub fn warnings(c: &Config) -> Vec<String> {
    let last = c.jobs.len().saturating_sub(1);
    let one = |(i, r): (usize, &Rule)| {
        let what = reach(&r.matches)?;
        // A rule that only alerts is dangerous where it takes the processes from the rules after it.
        let hides = what == EVERY && i < last;
        let consequence = match (kills(r), hides) {
            (Some(kills), true) => format!("{kills}; no rule after it is ever reached"),
            (Some(kills), false) => kills.to_owned(),
            (None, true) => "no rule after it is ever reached".to_owned(),
            (None, false) => return None,
        };
        Some(format!("rule {}: it matches {what}, and {consequence}", r.name))
    };
    c.jobs.iter().enumerate().filter_map(one).collect()
}

const EVERY: &str = "every process";

/// The most that a MATCH is known to match.
fn reach(m: &Match) -> Option<String> {
    if everything(m) {
        return Some(EVERY.to_owned());
    }
    if m.user.as_ref().is_some_and(|u| u.uid == 0) && everything(&Match { user: None, ..m.clone() }) {
        return Some("every process of root".to_owned());
    }
    let mut names: Vec<&str> =
        ESSENTIAL.iter().filter(|(_, f)| m.matches(f)).map(|(name, _)| *name).collect();
    names.dedup();
    (!names.is_empty()).then(|| format!("{} as it usually runs", names.join(" and ")))
}

/// Whether the conditions other than on a container leave nobody out. No condition at all leaves nobody out either.
fn everything(m: &Match) -> bool {
    let open = |p: &Option<Pattern>| p.as_ref().is_none_or(|p| UNRELATED.iter().all(|t| p.is_match(t)));
    let patterns = [&m.argv, &m.exe, &m.comm, &m.cgroup];
    patterns.into_iter().all(open)
        && m.user.is_none()
        && m.container.is_none()
        && m.parent.as_deref().is_none_or(everything)
}

/// Whether any rule ends its jobs.
#[must_use]
pub fn any_kills(c: &Config) -> bool {
    c.jobs.iter().any(|r| kills(r).is_some())
}

/// What the rule does to its jobs.
fn kills(r: &Rule) -> Option<&'static str> {
    match (r.on_timeout, r.on_orphan) {
        // Without a timeout there is nothing to act on.
        (Action::Kill, Action::Kill) if r.timeout.is_some() => Some("on_timeout and on_orphan are \"kill\""),
        (Action::Kill, Action::Alert) if r.timeout.is_some() => Some("on_timeout is \"kill\""),
        (_, Action::Kill) => Some("on_orphan is \"kill\""),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use super::*;

    fn config(text: &str) -> Config {
        crate::config::parse(Path::new("t"), text, &BTreeMap::new(), &crate::config::Overrides::default())
            .unwrap_or_else(|e| panic!("{e}"))
    }

    fn of(matches: &str, more: &str) -> Vec<String> {
        warnings(&config(&format!("[[job]]\nname = \"r\"\nmatch = {{ {matches} }}\n{more}\n")))
    }

    #[test]
    fn what_is_dangerous_is_named() {
        let kill = "on_orphan = \"kill\"";
        for (matches, what) in [
            ("argv = '.*'", "every process,"),
            ("argv = '.'", "every process,"),
            ("comm = 'a*'", "every process,"),
            ("argv = '^', exe = '$'", "every process,"),
            ("parent = { comm = '.?' }", "every process,"),
            ("user = 'root'", "every process of root,"),
            ("user = 0, argv = 'x*'", "every process of root,"),
            ("exe = '/sshd$'", "sshd as it usually runs"),
            ("exe = '^/usr/s?bin/'", "sshd and the agent as it usually runs"),
            ("comm = 'init|systemd'", "PID 1 as it usually runs"),
            ("cgroup = '^/system.slice/'", "sshd and the agent"),
            ("argv = 'jobwarden'", "the agent"),
            ("parent = { comm = '^systemd$' }", "sshd and the agent"),
        ] {
            let w = of(matches, kill);
            assert!(w.len() == 1 && w[0].contains(what) && w[0].starts_with("rule r: "), "{matches}: {w:?}");
        }
    }

    #[test]
    fn what_is_meant_is_not() {
        let kill = "on_orphan = \"kill\"";
        for matches in [
            "argv = '^/usr/bin/backup '",
            "user = 1000",
            "user = 'root', argv = 'backup'",
            "container = 'abc'",
            "cgroup = '^/kubepods'",
            "parent = { comm = 'runner' }",
        ] {
            assert_eq!(of(matches, kill), Vec::<String>::new(), "{matches}");
        }
        assert_eq!(of("argv = '.*'", ""), Vec::<String>::new(), "it only alerts");
        assert_eq!(of("argv = '.*'", "on_timeout = \"kill\""), Vec::<String>::new(), "it has no deadline");
        assert!(
            of("argv = '.*'", "timeout = \"1s\"\non_timeout = \"kill\"")[0]
                .ends_with("on_timeout is \"kill\"")
        );
        let hidden = of("argv = '.*'", "[[job]]\nname = \"after\"\nmatch = { argv = 'x' }");
        assert!(hidden[0].ends_with("no rule after it is ever reached"), "{hidden:?}");
    }
}
