//! Names that the system gives numbers to: signals, users and groups.

use std::ffi::{CStr, CString};

/// Linux's standard signals, by number from 1 (signal(7), x86 and ARM).
const SIGNALS: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE",
    "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ",
    "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];
/// As the C library gives them out; the kernel's 32 and 33 belong to it.
const RT_MIN: u8 = 34;
const RT_MAX: u8 = 64;

/// The name of a signal: `SIGTERM`, `SIGRTMIN+3`, `SIG70` for what has none.
#[must_use]
pub fn signal_name(n: u8) -> String {
    match n {
        1..=31 => format!("SIG{}", SIGNALS[usize::from(n) - 1]),
        RT_MIN => "SIGRTMIN".into(),
        n if n > RT_MIN && n <= RT_MAX => format!("SIGRTMIN+{}", n - RT_MIN),
        n => format!("SIG{n}"),
    }
}

/// The number of a signal given as `SIGTERM`, `term`, `SIGRTMIN+3` or `15`. None if there is no such signal.
#[must_use]
pub fn signal_number(s: &str) -> Option<u8> {
    if let Ok(n) = s.parse::<u8>() {
        return (1..=RT_MAX).contains(&n).then_some(n);
    }
    let s = s.to_ascii_uppercase();
    let s = s.strip_prefix("SIG").unwrap_or(&s);
    match s {
        "IOT" => return Some(6),
        "CLD" => return Some(17),
        "POLL" => return Some(29),
        "RTMIN" => return Some(RT_MIN),
        "RTMAX" => return Some(RT_MAX),
        _ => {}
    }
    if let Some(n) = s.strip_prefix("RTMIN+") {
        return n.parse::<u8>().ok().filter(|&n| n <= RT_MAX - RT_MIN).map(|n| RT_MIN + n);
    }
    if let Some(n) = s.strip_prefix("RTMAX-") {
        return n.parse::<u8>().ok().filter(|&n| n <= RT_MAX - RT_MIN).map(|n| RT_MAX - n);
    }
    SIGNALS.iter().position(|&x| x == s).and_then(|i| u8::try_from(i + 1).ok())
}

/// Buffer for one entry of the user or group database; a group with more members than fit is tried with more.
const ENTRY: usize = 4096;
const ENTRY_MAX: usize = 1 << 20;

/// The uid of a user name, as the system's name service gives it. None if there is none.
#[must_use]
pub fn user_id(name: &str) -> Option<u32> {
    let name = CString::new(name).ok()?;
    with_entry(|buf| {
        // SAFETY: all-zero is a valid value of this plain C struct.
        let mut entry: libc::passwd = unsafe { std::mem::zeroed() };
        let mut found = std::ptr::null_mut();
        // SAFETY: `name` is NUL-terminated, `buf` is writable for its length, both outlive the call.
        let rc = unsafe {
            libc::getpwnam_r(name.as_ptr(), &raw mut entry, buf.as_mut_ptr(), buf.len(), &raw mut found)
        };
        (rc, (!found.is_null()).then_some(entry.pw_uid))
    })
}

/// The name of a uid. None if it has none.
#[must_use]
pub fn user_name(uid: u32) -> Option<String> {
    with_entry(|buf| {
        // SAFETY: all-zero is a valid value of this plain C struct.
        let mut entry: libc::passwd = unsafe { std::mem::zeroed() };
        let mut found = std::ptr::null_mut();
        // SAFETY: `buf` is writable for its length and outlives the call.
        let rc =
            unsafe { libc::getpwuid_r(uid, &raw mut entry, buf.as_mut_ptr(), buf.len(), &raw mut found) };
        // SAFETY: on success `pw_name` is a NUL-terminated string in `buf`.
        let name = (rc == 0 && !found.is_null() && !entry.pw_name.is_null())
            .then(|| unsafe { CStr::from_ptr(entry.pw_name) }.to_string_lossy().into_owned());
        (rc, name)
    })
}

/// The gid of a group name. None if there is none.
#[must_use]
pub fn group_id(name: &str) -> Option<u32> {
    let name = CString::new(name).ok()?;
    with_entry(|buf| {
        // SAFETY: all-zero is a valid value of this plain C struct.
        let mut entry: libc::group = unsafe { std::mem::zeroed() };
        let mut found = std::ptr::null_mut();
        // SAFETY: `name` is NUL-terminated, `buf` is writable for its length, both outlive the call.
        let rc = unsafe {
            libc::getgrnam_r(name.as_ptr(), &raw mut entry, buf.as_mut_ptr(), buf.len(), &raw mut found)
        };
        (rc, (!found.is_null()).then_some(entry.gr_gid))
    })
}

/// Calls `get` with a growing buffer for as long as it says ERANGE.
fn with_entry<T>(get: impl Fn(&mut [libc::c_char]) -> (libc::c_int, Option<T>)) -> Option<T> {
    let mut size = ENTRY;
    loop {
        let (rc, found) = get(&mut vec![0; size]);
        if rc != libc::ERANGE || size >= ENTRY_MAX {
            return found;
        }
        size *= 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_both_ways() {
        for n in 1..=64 {
            assert_eq!(signal_number(&signal_name(n)), (!matches!(n, 32 | 33)).then_some(n), "{n}");
        }
        assert_eq!(signal_number("term"), Some(15));
        assert_eq!(signal_number("SIGRTMAX-1"), Some(63));
        assert_eq!(signal_number("9"), Some(9));
        for bad in ["", "0", "65", "SIG", "SIGFOO", "RTMIN+31", "RTMIN+-1", "-9", "SIGRTMAX-99"] {
            assert_eq!(signal_number(bad), None, "{bad}");
        }
    }

    #[test]
    fn root_is_known_and_nobody_else_is_invented() {
        assert_eq!(user_id("root"), Some(0));
        assert_eq!(user_name(0).as_deref(), Some("root"));
        assert_eq!(group_id("root"), Some(0));
        assert_eq!(user_id("no-such-user-here"), None);
        assert_eq!(group_id("no-such-group-here"), None);
        assert_eq!(user_id("a\0b"), None);
    }
}
