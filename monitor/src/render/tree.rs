//! `tree`: as `ps axf` draws it, by lineage, with the dead and with what `ps` cannot know.

use std::borrow::Cow;
use std::collections::HashMap;
use std::time::SystemTime;

use super::escape::{age, between, count, escape, exit, name, wall};
use super::style::{Paint, Style, cut, width};
use super::why::word;
use crate::model::key::Key;
use crate::model::outside::command_line_of;
use crate::model::schema::{Alert, AlertKind, AlertState, Alerts, JobId, Jobs, LineageKnown, State, Verdict};
use crate::model::tree_rows::{Row, Text, TreeRows};

/// What is drawn, and what is needed to know beside it.
pub struct TreeView<'a> {
    pub tree: &'a TreeRows<'a>,
    /// Names of jobs; one that is missing is shown by its id alone.
    pub jobs: &'a HashMap<JobId, String>,
    /// Names of users; one that is missing is shown by its number.
    pub users: &'a dyn Fn(u32) -> Option<String>,
    /// The subjects of firing alerts, with the verdict where there is one yet.
    pub causes: &'a HashMap<Key, Option<Verdict>>,
    pub kernel_threads: bool,
}

/// Of firing alerts that have a cause to be told: about whom, and the verdict.
fn causes(alerts: &[Alert]) -> HashMap<Key, Option<Verdict>> {
    let firing = alerts.iter().filter(|a| a.state == AlertState::Firing);
    let explained = firing.filter(|a| matches!(a.kind, AlertKind::Zombie | AlertKind::Orphan));
    explained.filter_map(|a| Some((a.subject.as_ref()?.id, a.cause.as_ref().map(|c| c.verdict)))).collect()
}

/// With what the agent's other answers say; those are a help only, and a tree without them is better than none.
#[must_use]
pub fn tree_with(
    tree: &TreeRows<'_>,
    jobs: Option<Jobs>,
    alerts: Option<Alerts>,
    users: &dyn Fn(u32) -> Option<String>,
    kernel_threads: bool,
    style: Style,
) -> String {
    let jobs = jobs.into_iter().flat_map(|j| j.jobs).map(|j| (j.id, j.name)).collect();
    let causes = causes(&alerts.map(|a| a.alerts).unwrap_or_default());
    self::tree(&TreeView { tree, jobs: &jobs, users, causes: &causes, kernel_threads }, style)
}

/// The least of a command that is shown before the notes behind it are cut too.
const COMMAND_MIN: usize = 24;

/// Columns of one level.
const EDGE: usize = 4;
/// Levels that are indented; what is deeper has its level as a number instead, or a long chain would be all indentation.
const LEVELS: usize = 40;

/// One line for each process, parents first.
#[must_use]
pub fn tree(view: &TreeView<'_>, style: Style) -> String {
    let shown: Vec<&Row<'_>> =
        view.tree.processes.iter().filter(|p| view.kernel_threads || !p.kernel_thread).collect();
    let forest = Forest::new(&shown);
    let columns = Columns::new(view, &shown);
    let levels = style
        .width
        .map_or(LEVELS, |w| (w.saturating_sub(width(&columns.head()) + COMMAND_MIN) / EDGE).clamp(2, LEVELS));
    let lines = Lines { view, forest: &forest, columns, levels, now: wall(view.tree.at.raw()) };
    let mut out = style.paint(Paint::Dim, &lines.columns.head());
    out.push('\n');
    // Not recursive: a chain may be longer than a stack. With each: what its line begins with, whether a sibling follows,
    // how deep it is.
    let mut stack: Vec<(usize, String, bool, usize)> =
        forest.roots.iter().rev().map(|&i| (i, String::new(), false, 0)).collect();
    while let Some((i, bars, sibling, depth)) = stack.pop() {
        lines.line(&mut out, i, &bars, depth, style);
        let children = &forest.children[i];
        if children.is_empty() {
            continue;
        }
        let below = match (depth, sibling) {
            (0, _) => String::new(),
            (d, _) if d >= levels => bars,
            (_, true) => bars + " |  ",
            (_, false) => bars + "    ",
        };
        for (n, &c) in children.iter().enumerate().rev() {
            stack.push((c, below.clone(), n + 1 < children.len(), depth + 1));
        }
    }
    for u in view.tree.unread.iter() {
        let line = format!("not read: {} of {}, blocked for {:.0} s", escape(&u.what), u.pid, u.blocked_s);
        out.push_str(&style.paint(Paint::Odd, &line));
        out.push('\n');
    }
    out
}

/// Who is drawn below whom: below its lineage parent; where that is not known, below the process that would reap it. A
/// process is its place in `shown`.
struct Forest<'a> {
    shown: &'a [&'a Row<'a>],
    by_pid: HashMap<u32, usize>,
    above: Vec<Option<usize>>,
    children: Vec<Vec<usize>>,
    roots: Vec<usize>,
}

impl<'a> Forest<'a> {
    fn new(shown: &'a [&'a Row<'a>]) -> Self {
        let by_key: HashMap<Key, usize> = shown.iter().enumerate().map(|(i, p)| (p.id, i)).collect();
        let alive = shown.iter().enumerate().filter(|(_, p)| p.state != State::Gone);
        let by_pid: HashMap<u32, usize> = alive.map(|(i, p)| (p.id.pid, i)).collect();
        let over = |(i, p): (usize, &&Row<'_>)| {
            let reaper = p.ppid.and_then(|pid| by_pid.get(&pid));
            let lineage = p.lineage_parent.and_then(|k| by_key.get(&k));
            lineage.or(reaper).copied().filter(|&above| above != i)
        };
        let mut above: Vec<Option<usize>> = shown.iter().enumerate().map(over).collect();
        break_loops(&mut above);
        let mut children = vec![Vec::new(); shown.len()];
        let mut roots = Vec::new();
        for (i, above) in above.iter().enumerate() {
            above.map_or(&mut roots, |a| &mut children[a]).push(i);
        }
        for list in children.iter_mut().chain([&mut roots]) {
            list.sort_by_key(|&i| (shown[i].id.start, shown[i].id.pid));
        }
        Self { shown, by_pid, above, children, roots }
    }

    fn above(&self, i: usize) -> Option<&'a Row<'a>> {
        self.above[i].map(|a| self.shown[a])
    }

    fn of_pid(&self, pid: u32) -> Option<&'a Row<'a>> {
        self.by_pid.get(&pid).map(|&i| self.shown[i])
    }
}

/// What is read from outside may hold a loop; each process must be drawn once all the same.
fn break_loops(above: &mut [Option<usize>]) {
    // The walk that has been here; 0: none.
    let mut walked = vec![0; above.len()];
    for first in 0..above.len() {
        let walk = first + 1;
        let mut at = first;
        while walked[at] == 0 {
            walked[at] = walk;
            let Some(next) = above[at] else { break };
            if walked[next] == walk {
                above[next] = None;
            }
            at = next;
        }
    }
}

/// The columns before the command.
struct Columns {
    pid: usize,
    user: usize,
    /// By uid: the name, padded.
    users: HashMap<Option<u32>, String>,
}

impl Columns {
    fn new(view: &TreeView<'_>, shown: &[&Row<'_>]) -> Self {
        let pid = shown.iter().map(|p| p.id.pid).max().unwrap_or(0).to_string().len().max(5);
        let mut users = HashMap::new();
        for p in shown {
            users.entry(p.uid).or_insert_with(|| user(view, p.uid));
        }
        let user = users.values().map(|u| width(u)).max().unwrap_or(0).max(4);
        for name in users.values_mut() {
            name.extend(std::iter::repeat_n(' ', user - width(name)));
        }
        Self { pid, user, users }
    }

    fn head(&self) -> String {
        format!("{:>pid$} S {:>6} {:user$} COMMAND", "PID", "AGE", "USER", pid = self.pid, user = self.user)
    }
}

fn user(view: &TreeView<'_>, uid: Option<u32>) -> String {
    uid.map_or_else(|| "?".into(), |u| (view.users)(u).map_or_else(|| u.to_string(), |n| escape(&n)))
}

struct Lines<'a> {
    view: &'a TreeView<'a>,
    forest: &'a Forest<'a>,
    columns: Columns,
    /// That are indented.
    levels: usize,
    now: Option<SystemTime>,
}

impl Lines<'_> {
    fn line(&self, out: &mut String, i: usize, bars: &str, depth: usize, style: Style) {
        let (p, c) = (self.forest.shown[i], &self.columns);
        let old = self.now.and_then(|n| between(p.started.raw(), n)).map_or_else(|| "?".into(), age);
        let front = format!("{:>pid$} {} {old:>6} {} ", p.id.pid, letter(p), c.users[&p.uid], pid = c.pid);
        let edge = match (depth, p.lineage) {
            (0, _) => "",
            (_, LineageKnown::Known) => " \\_ ",
            // Not the edge of lineage: who forked it was not seen.
            (_, LineageKnown::Unknown) => " \\? ",
        };
        let edge =
            if depth > self.levels { Cow::Owned(format!(" ({depth}){edge}")) } else { Cow::Borrowed(edge) };
        let mut command = command(p);
        let notes = self.notes(i);
        if let Some(columns) = style.width {
            let notes_width: usize = notes.iter().map(|(_, n)| width(n) + 1).sum();
            let room = columns.saturating_sub(width(&front) + width(bars) + width(&edge));
            command = cut(&command, room.saturating_sub(notes_width).max(COMMAND_MIN.min(room)));
        }
        let (letter_paint, text_paint) = paints(p);
        style.paint_to(out, letter_paint, &front);
        style.paint_to(out, Paint::Dim, &format!("{bars}{edge}"));
        style.paint_to(out, text_paint, &command);
        let mut used = width(&front) + width(bars) + width(&edge) + width(&command);
        for (paint, note) in notes {
            let note = style.width.map_or_else(|| note.clone(), |w| cut(&note, w.saturating_sub(used + 1)));
            if note.is_empty() {
                break;
            }
            used += width(&note) + 1;
            out.push(' ');
            style.paint_to(out, paint, &note);
        }
        out.push('\n');
    }

    fn notes(&self, i: usize) -> Vec<(Paint, String)> {
        let (p, above) = (self.forest.shown[i], self.forest.above(i));
        let mut notes = Vec::new();
        if p.job.is_some() && p.job != above.and_then(|a| a.job) {
            // A job that begins here; of one that is only passed through (the root is not shown) the id says whose it is.
            let id = p.job.map(|j| j.to_string()).unwrap_or_default();
            let name = p.job.and_then(|j| self.view.jobs.get(&j));
            notes.push((
                Paint::Job,
                name.map_or_else(|| format!("[{id}]"), |n| format!("[{} {id}]", escape(n))),
            ));
        }
        if let Some(c) = &p.container
            && above.and_then(|a| a.container.as_ref()) != Some(c)
        {
            let runtime = c.runtime.as_deref().unwrap_or("container");
            notes.push((Paint::Dim, format!("{{{} {:.12}}}", escape(runtime), c.id)));
        }
        if let Some(inside) = p.ns_pid.filter(|n| *n != p.id.pid) {
            notes.push((Paint::Dim, format!("(pid {inside} inside)")));
        }
        if let Some(elided) = p.elided {
            let dead = count(elided as usize, "dead ancestor", "dead ancestors");
            notes.push((Paint::Dim, format!("<{dead} more above it>")));
        }
        let for_ = if p.state == State::Running { String::new() } else { age(p.state_s) };
        let how = |before: &str| p.exit.as_ref().map_or_else(String::new, |e| format!("{before}{}", exit(e)));
        match p.state {
            State::Running => {}
            State::LeaderExited => {
                notes.push((Paint::Odd, format!("<main thread exited {for_} ago, others live>")));
            }
            State::Exiting => notes.push((Paint::Odd, format!("<exiting for {for_}{}>", how(": ")))),
            State::Zombie => {
                let reaper = p.ppid.map_or_else(String::new, |pid| {
                    let known = self.forest.of_pid(pid);
                    let who = known.map_or_else(
                        || pid.to_string(),
                        |q| format!("{}{}", name(q.id.pid, &q.comm), init(q)),
                    );
                    format!("; not reaped by {who}")
                });
                notes.push((Paint::Bad, format!("<zombie for {for_}{}{reaper}>", how(": "))));
            }
            State::Gone => notes.push((Paint::Dim, format!("<ended {for_} ago{}>", how(": ")))),
        }
        if p.orphan {
            let by = p.adopter.as_ref().map_or_else(String::new, |a| {
                let known = self.forest.of_pid(a.pid).filter(|q| q.id == a.id);
                let init = known.map_or_else(String::new, init);
                format!(", adopted by {}{init}", name(a.pid, &a.comm))
            });
            notes.push((Paint::Odd, format!("<orphan{by}>")));
        }
        if let Some(verdict) = self.view.causes.get(&p.id) {
            let verdict = verdict.map_or_else(String::new, |v| format!("{}, ", word(v)));
            notes.push((Paint::Bad, format!("<{verdict}see: jobwarden why {}>", p.id)));
        }
        notes
    }
}

/// Of a namespace's PID 1: what it is the init of.
fn init(p: &Row<'_>) -> String {
    if p.ns_pid == Some(1) && p.id.pid != 1 {
        format!(", {}", escape(&crate::model::container::init_of(p.container.as_deref(), p.pid_ns)))
    } else {
        String::new()
    }
}

/// As `ps` shows it; `-` for one that is reaped.
fn letter(p: &Row<'_>) -> String {
    let by_state = match p.state {
        State::Running => "?",
        State::LeaderExited | State::Zombie => "Z",
        State::Exiting => "X",
        State::Gone => "-",
    };
    let kernel = p.kernel_state.as_ref().map(Text::raw).filter(|_| p.state != State::Gone);
    escape(kernel.unwrap_or(by_state)).chars().take(1).collect()
}

/// Of the columns and of the command.
const fn paints(p: &Row<'_>) -> (Paint, Paint) {
    match p.state {
        State::Zombie => (Paint::Bad, Paint::Bad),
        State::Gone => (Paint::Dim, Paint::Dim),
        State::LeaderExited | State::Exiting => (Paint::Plain, Paint::Odd),
        State::Running if p.orphan => (Paint::Plain, Paint::Odd),
        State::Running => (Paint::Plain, Paint::Plain),
    }
}

fn command(p: &Row<'_>) -> String {
    let cut = if p.argv_cut { " …" } else { "" };
    if p.argv.is_empty() {
        format!("[{}]{cut}", p.comm)
    } else {
        command_line_of(p.argv.iter().map(Text::raw)) + cut
    }
}
