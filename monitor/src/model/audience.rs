//! For whom something is read and shown. The one rule for all answers: SECURITY.md has it as a table.

use serde_json::Value;

use super::schema::{Alert, Cause, EventLine, Process};

/// What a reader may see. All may see what /proc shows to every user of the host (names, argv, user ids, states, cgroups) and what the
/// probes saw of lives, exits and signals. What the kernel guards by `ptrace_may_access` (executable, descriptors, system
/// calls, stacks, memory, Python frames and source) is shown of processes of the reader's own user only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Audience {
    /// Not known: nothing that is guarded. The default, so that a request that was not told its audience shows too little.
    #[default]
    Nobody,
    /// A user other than root.
    Reader { uid: u32, gid: u32 },
    /// root, the receivers that the config names, and jobwarden itself.
    Full,
}

impl Audience {
    fn owns(self, uid: Option<u32>) -> bool {
        match self {
            Self::Full => true,
            Self::Reader { uid: own, .. } => uid == Some(own),
            Self::Nobody => false,
        }
    }

    /// Takes out what this audience may not see.
    pub fn process(self, p: &mut Process) {
        if !self.owns(p.uid) {
            p.exe = None;
        }
    }

    /// An alert's cause was found for receivers, who see all of it; a reader asks `why`, which looks with the reader's rights.
    pub fn alert(self, a: &mut Alert) {
        if self == Self::Full {
            return;
        }
        a.subject.iter_mut().for_each(|p| self.process(p));
        a.cause = None;
    }

    pub fn cause(self, c: &mut Cause) {
        self.process(&mut c.process);
    }

    pub fn event_line(self, e: &mut EventLine) {
        let uid = e.more.get("uid").and_then(Value::as_u64).and_then(|u| u32::try_from(u).ok());
        if !self.owns(uid)
            && let Some(path) = e.more.get_mut("filename")
        {
            *path = Value::Null;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_of_another_users_exec_is_left_out() {
        let line = |uid: u32| -> EventLine {
            serde_json::from_value(serde_json::json!({
                "at": "t", "kind": "exec", "process": null, "filename": "/home/a/x", "argv": ["x"], "uid": uid,
            }))
            .unwrap()
        };
        for (audience, uid, seen) in [
            (Audience::Full, 7, true),
            (Audience::Reader { uid: 7, gid: 0 }, 7, true),
            (Audience::Reader { uid: 8, gid: 7 }, 7, false),
            (Audience::Nobody, 0, false),
        ] {
            let mut e = line(uid);
            audience.event_line(&mut e);
            assert_eq!(e.more["filename"].is_string(), seen, "{audience:?}");
            assert_eq!(e.more["argv"], serde_json::json!(["x"]));
        }
    }
}
