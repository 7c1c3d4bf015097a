//! Users and groups by name, as the system's name service gives them.

use std::ffi::{CStr, CString};

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
    fn root_is_known_and_nobody_else_is_invented() {
        assert_eq!(user_id("root"), Some(0));
        assert_eq!(user_name(0).as_deref(), Some("root"));
        assert_eq!(group_id("root"), Some(0));
        assert_eq!(user_id("no-such-user-here"), None);
        assert_eq!(group_id("no-such-group-here"), None);
        assert_eq!(user_id("a\0b"), None);
    }
}
