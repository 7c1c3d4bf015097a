//! Ring bytes to [`Event`]: bounds-checked, no allocation, no aya. Any bytes give an event or a typed error.

use monitor_abi as abi;

use crate::model::key::Key;

/// A wait status as `waitpid` gives it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WaitStatus(pub i32);

impl WaitStatus {
    /// The exit code, if it exited.
    #[must_use]
    pub const fn code(self) -> Option<i32> {
        if self.0 & 0x7f == 0 { Some((self.0 >> 8) & 0xff) } else { None }
    }
    /// The signal that killed it, if one did.
    #[must_use]
    pub const fn signal(self) -> Option<u8> {
        if self.0 & 0x7f == 0 { None } else { Some((self.0 & 0x7f) as u8) }
    }
    /// Whether a core was dumped.
    #[must_use]
    pub const fn core(self) -> bool {
        self.0 & 0x80 != 0
    }
}

/// A task's `comm`: up to 15 bytes and NULs. (Before 5.17 or so the kernel leaves the end of a longer name behind the first NUL of a
/// shorter one; here that is gone, so two that read the same are equal.)
#[derive(Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Comm([u8; abi::COMM_LEN]);

impl Comm {
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        let end = self.0.iter().position(|&b| b == 0).unwrap_or(self.0.len());
        &self.0[..end]
    }
    /// What stands before the first NUL.
    #[must_use]
    pub fn from_bytes(b: &[u8]) -> Self {
        let mut c = [0; abi::COMM_LEN];
        let n = b.iter().position(|&c| c == 0).unwrap_or(b.len()).min(abi::COMM_LEN - 1);
        c[..n].copy_from_slice(&b[..n]);
        Self(c)
    }
}

impl std::fmt::Debug for Comm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", String::from_utf8_lossy(self.bytes()))
    }
}

/// Who sent a signal, by the rules in the table of signal senders (`info` kind, `si_code`, `current`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    Process(Key),
    /// PR_SET_PDEATHSIG: the dying parent.
    ParentDeath(Key),
    Timer,
    Kernel,
}

/// What became of a signal when it was generated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SignalResult {
    Delivered,
    Ignored,
    AlreadyPending,
    Overflow,
    LostInfo,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body<'a> {
    Fork {
        lineage_parent: Key,
        parent: Key,
        job: u64,
        uid: u32,
        comm: Comm,
        kernel_thread: bool,
        /// The kernel's lineage map was full: the agent must mend it.
        no_entry: bool,
    },
    Exec {
        old_tid: u32,
        uid: u32,
        cgroup: u64,
        comm: Comm,
        filename: &'a [u8],
        argv: &'a [u8],
        argv_cut: bool,
    },
    Exit {
        status: WaitStatus,
        comm: Comm,
    },
    LeaderExit {
        status: WaitStatus,
        comm: Comm,
    },
    Reap {
        status: WaitStatus,
    },
    Signal {
        sender: Sender,
        sender_uid: u32,
        target_tid: u32,
        signal: u8,
        code: i32,
        result: SignalResult,
    },
    Kill {
        job: u64,
        result: i32,
    },
}

/// One thing that happened, at `at` nanoseconds of boot time, to `process`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event<'a> {
    pub at: u64,
    pub cpu: u32,
    pub process: Key,
    pub body: Body<'a>,
}

impl Event<'_> {
    /// The record's kind, an index into `monitor_abi::KIND_NAMES`.
    #[must_use]
    pub const fn kind(&self) -> u16 {
        match self.body {
            Body::Fork { .. } => abi::KIND_FORK,
            Body::Exec { .. } => abi::KIND_EXEC,
            Body::Exit { .. } => abi::KIND_EXIT,
            Body::LeaderExit { .. } => abi::KIND_LEADER_EXIT,
            Body::Reap { .. } => abi::KIND_REAP,
            Body::Signal { .. } => abi::KIND_SIGNAL,
            Body::Kill { .. } => abi::KIND_KILL,
        }
    }
}

/// A record that is none of ours.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DecodeError {
    #[error("record of kind {kind} has {got} bytes, {want} are needed")]
    Short { kind: u16, got: usize, want: usize },
    #[error("record kind {0} is unknown: agent and probe object do not belong together")]
    Kind(u16),
    #[error("record of kind {kind}: {field} has the value {value}, which means nothing")]
    Value { kind: u16, field: &'static str, value: u64 },
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    // Out-of-range reads cannot happen after `decode` has compared the length; 0 is returned instead of a panic.
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0.get(at..at + N).and_then(|s| s.try_into().ok()).unwrap_or([0; N])
    }
    fn u16(&self, at: usize) -> u16 {
        u16::from_ne_bytes(self.bytes(at))
    }
    fn u32(&self, at: usize) -> u32 {
        u32::from_ne_bytes(self.bytes(at))
    }
    fn i32(&self, at: usize) -> i32 {
        i32::from_ne_bytes(self.bytes(at))
    }
    fn u64(&self, at: usize) -> u64 {
        u64::from_ne_bytes(self.bytes(at))
    }
    fn key(&self, at: usize) -> Key {
        Key { start: self.u64(at), pid: self.u32(at + 8) }
    }
    fn comm(&self, at: usize) -> Comm {
        Comm::from_bytes(&self.bytes::<{ abi::COMM_LEN }>(at))
    }
}

/// Who forked, if it is a fork's record. Of one that [`decode`] refuses it means nothing.
#[must_use]
pub fn forker(b: &[u8]) -> Option<Key> {
    let r = Reader(b);
    let is_fork = b.len() >= size_of::<abi::Fork>()
        && r.u16(core::mem::offset_of!(abi::Header, kind)) == abi::KIND_FORK;
    is_fork.then(|| r.key(core::mem::offset_of!(abi::Fork, lineage_parent)))
}

/// Decodes one ring record.
pub fn decode(b: &[u8]) -> Result<Event<'_>, DecodeError> {
    use core::mem::offset_of;
    let r = Reader(b);
    if b.len() < size_of::<abi::Header>() {
        return Err(DecodeError::Short { kind: u16::MAX, got: b.len(), want: size_of::<abi::Header>() });
    }
    let kind = r.u16(offset_of!(abi::Header, kind));
    let flags = r.u16(offset_of!(abi::Header, flags));
    let want = match kind {
        abi::KIND_FORK => size_of::<abi::Fork>(),
        abi::KIND_EXEC => size_of::<abi::ExecHead>(),
        abi::KIND_EXIT | abi::KIND_LEADER_EXIT => size_of::<abi::Exit>(),
        abi::KIND_REAP => size_of::<abi::Reap>(),
        abi::KIND_SIGNAL => size_of::<abi::Signal>(),
        abi::KIND_KILL => size_of::<abi::Kill>(),
        k => return Err(DecodeError::Kind(k)),
    };
    if b.len() < want {
        return Err(DecodeError::Short { kind, got: b.len(), want });
    }
    let body = match kind {
        abi::KIND_FORK => Body::Fork {
            lineage_parent: r.key(offset_of!(abi::Fork, lineage_parent)),
            parent: r.key(offset_of!(abi::Fork, parent)),
            job: r.u64(offset_of!(abi::Fork, job)),
            uid: r.u32(offset_of!(abi::Fork, uid)),
            comm: r.comm(offset_of!(abi::Fork, comm)),
            kernel_thread: flags & abi::KERNEL_THREAD != 0,
            no_entry: flags & abi::FORK_NO_ENTRY != 0,
        },
        abi::KIND_EXEC => {
            let filename = r.u16(offset_of!(abi::ExecHead, filename_len)) as usize;
            let argv = r.u16(offset_of!(abi::ExecHead, argv_len)) as usize;
            let rest = &b[want..];
            if rest.len() < filename + argv {
                return Err(DecodeError::Short { kind, got: b.len(), want: want + filename + argv });
            }
            Body::Exec {
                old_tid: r.u32(offset_of!(abi::ExecHead, old_tid)),
                uid: r.u32(offset_of!(abi::ExecHead, uid)),
                cgroup: r.u64(offset_of!(abi::ExecHead, cgroup)),
                comm: r.comm(offset_of!(abi::ExecHead, comm)),
                filename: &rest[..filename],
                argv: &rest[filename..filename + argv],
                argv_cut: flags & abi::EXEC_ARGV_CUT != 0,
            }
        }
        abi::KIND_EXIT | abi::KIND_LEADER_EXIT => {
            let status = WaitStatus(r.i32(offset_of!(abi::Exit, status)));
            let comm = r.comm(offset_of!(abi::Exit, comm));
            if kind == abi::KIND_EXIT {
                Body::Exit { status, comm }
            } else {
                Body::LeaderExit { status, comm }
            }
        }
        abi::KIND_REAP => Body::Reap { status: WaitStatus(r.i32(offset_of!(abi::Reap, status))) },
        abi::KIND_SIGNAL => signal(&r, flags)?,
        _ => Body::Kill {
            job: r.u64(offset_of!(abi::Kill, job)),
            result: r.i32(offset_of!(abi::Kill, result)),
        },
    };
    Ok(Event {
        at: r.u64(offset_of!(abi::Header, at)),
        cpu: r.u32(offset_of!(abi::Header, cpu)),
        process: r.key(offset_of!(abi::Header, key)),
        body,
    })
}

// include/uapi/asm-generic/siginfo.h
const SI_USER: i32 = 0;
const SI_QUEUE: i32 = -1;
const SI_TIMER: i32 = -2;
const SI_TKILL: i32 = -6;

fn signal(r: &Reader<'_>, flags: u16) -> Result<Body<'static>, DecodeError> {
    use core::mem::offset_of;
    let bad = |field, value| DecodeError::Value { kind: abi::KIND_SIGNAL, field, value };
    let number = r.u16(offset_of!(abi::Signal, signal));
    let code = r.i32(offset_of!(abi::Signal, code));
    let [info, result] = r.bytes(offset_of!(abi::Signal, info));
    let current = r.key(offset_of!(abi::Signal, sender));
    let sender = match (info, code) {
        (abi::INFO_NOINFO, _) if flags & abi::SIGNAL_SENDER_EXITING != 0 => Sender::ParentDeath(current),
        (abi::INFO_NOINFO, _) | (abi::INFO_SIGINFO, SI_USER | SI_QUEUE | SI_TKILL) => {
            Sender::Process(current)
        }
        (abi::INFO_SIGINFO, SI_TIMER) => Sender::Timer,
        // `info` 1 is the kernel, and `current` means nothing then.
        (abi::INFO_KERNEL | abi::INFO_SIGINFO, _) => Sender::Kernel,
        (i, _) => return Err(bad("info", i.into())),
    };
    Ok(Body::Signal {
        sender,
        sender_uid: r.u32(offset_of!(abi::Signal, sender_uid)),
        target_tid: r.u32(offset_of!(abi::Signal, target_tid)),
        signal: u8::try_from(number).map_err(|_| bad("signal", number.into()))?,
        code,
        result: match result {
            0 => SignalResult::Delivered,
            1 => SignalResult::Ignored,
            2 => SignalResult::AlreadyPending,
            3 => SignalResult::Overflow,
            4 => SignalResult::LostInfo,
            v => return Err(bad("result", v.into())),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_longer_name_left_behind_is_no_part_of_the_name() {
        let left = Comm::from_bytes(b"sleep\0ing-b");
        assert_eq!((left, left.bytes()), (Comm::from_bytes(b"sleep"), &b"sleep"[..]));
        assert_eq!(Comm::from_bytes(b"sixteen-letters!").bytes(), b"sixteen-letters");
        assert_eq!(Comm::from_bytes(b"\0x").bytes(), b"");
    }
}
