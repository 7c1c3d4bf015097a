//! Facts about this host and its clocks, read once or on demand. No state.

use std::io;
use std::sync::LazyLock;

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds since boot, suspend included (`CLOCK_BOOTTIME` of the initial time namespace): the time base of every
/// event and timer here.
#[must_use]
pub fn boot_now() -> u64 {
    nanoseconds(ClockId::Boottime).saturating_add_signed(-time_offset())
}

/// What this time namespace adds to boot time, in nanoseconds (`time_namespaces(7)`); 0 where there is none. /proc and the
/// clock show it, the probes' records are without.
#[must_use]
pub fn time_offset() -> i64 {
    // A process cannot change the offsets of a namespace that it is in already.
    static OFFSET: LazyLock<i64> = LazyLock::new(|| {
        parse_time_offset(&std::fs::read_to_string("/proc/self/timens_offsets").unwrap_or_default())
    });
    *OFFSET
}

/// Gives memory that was needed for a while only back to the system: what loading the probes and a snapshot take is several times
/// what the agent has on a quiet host, and most of the program's code has run for the last time then.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointer; any thread may call it at any time.
    unsafe {
        libc::malloc_trim(0);
    }
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    if let Some(code) = mapping_of(&maps, trim as *const () as usize) {
        // SAFETY: the program's code is mapped from its file and never written: what runs next is read from there again.
        // Refused, it is as if it had not been asked for.
        let _ = unsafe {
            rustix::mm::madvise(code.start as *mut _, code.len(), rustix::mm::Advice::LinuxDontNeed)
        };
    }
}

/// The mapping of code that an address lies in, from `/proc/PID/maps`.
fn mapping_of(maps: &str, at: usize) -> Option<std::ops::Range<usize>> {
    maps.lines().find_map(|line| {
        let mut words = line.split(' ');
        let (from, to) = words.next()?.split_once('-')?;
        let range = usize::from_str_radix(from, 16).ok()?..usize::from_str_radix(to, 16).ok()?;
        (words.next()? == "r-xp" && range.contains(&at)).then_some(range)
    })
}

fn parse_time_offset(text: &str) -> i64 {
    let line = |l: &str| {
        let mut f = l.split_ascii_whitespace();
        let boot = matches!(f.next()?, "boottime" | "7");
        let (s, ns) = (f.next()?.parse::<i64>().ok()?, f.next()?.parse::<i64>().ok()?);
        boot.then(|| s.saturating_mul(1_000_000_000).saturating_add(ns))
    };
    text.lines().find_map(line).unwrap_or(0)
}

/// What to add to boot-time nanoseconds to get nanoseconds since the epoch, at this moment. It changes when the wall
/// clock is set.
#[must_use]
pub fn boot_to_wall() -> u64 {
    // Of some readings, the one in which the least time passed between the two clocks.
    let read = || {
        let before = boot_now();
        let wall = nanoseconds(ClockId::Realtime);
        let passed = boot_now().saturating_sub(before);
        (passed, wall.saturating_sub(before + passed / 2))
    };
    let [a, b, c] = [read(), read(), read()];
    a.min(b).min(c).1
}

/// CLOCK_MONOTONIC in microseconds: the service manager's time base.
#[must_use]
pub fn monotonic_us() -> u64 {
    nanoseconds(ClockId::Monotonic) / 1_000
}

fn nanoseconds(clock: ClockId) -> u64 {
    let t = clock_gettime(clock);
    (t.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(t.tv_nsec as u64)
}

/// The kernel's random id of this boot.
pub fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// /etc/machine-id, or the host's name where there is none (containers' images often have none).
#[must_use]
pub fn machine_id() -> String {
    std::fs::read_to_string("/etc/machine-id")
        .map(|s| s.trim().to_owned())
        .ok()
        .filter(|s| !s.is_empty())
        .unwrap_or_else(hostname)
}

/// The release of the running kernel, as `uname -r` has it.
#[must_use]
pub fn kernel_release() -> String {
    String::from_utf8_lossy(rustix::system::uname().release().to_bytes()).into_owned()
}

#[must_use]
pub fn hostname() -> String {
    String::from_utf8_lossy(rustix::system::uname().nodename().to_bytes()).into_owned()
}

/// Inode of this process's pid namespace: the host's, since the agent refuses to start in another.
pub fn pid_ns() -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt as _;
    Ok(std::fs::metadata("/proc/self/ns/pid")?.ino())
}

/// Names of the users in /etc/passwd; users that only a directory service knows are shown by number. The first of
/// several names for one uid counts, as for getpwuid(3).
#[must_use]
pub fn users() -> std::collections::BTreeMap<u32, String> {
    let mut users = std::collections::BTreeMap::new();
    for line in std::fs::read_to_string("/etc/passwd").unwrap_or_default().lines() {
        let mut f = line.split(':');
        if let (Some(name), _, Some(Ok(uid))) = (f.next(), f.next(), f.next().map(str::parse)) {
            users.entry(uid).or_insert_with(|| name.to_owned());
        }
    }
    users
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::time::rfc3339;

    #[test]
    fn clocks_agree_with_std() {
        let std = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos();
        let ours = u128::from(boot_to_wall() + boot_now());
        assert!(ours.abs_diff(std) < 1_000_000_000, "{ours} {std}");
        assert_eq!(rfc3339(1_500_000_000), "1970-01-01T00:00:01.500Z");
        assert_eq!(parse_time_offset("monotonic 0 0\nboottime 1000 5\n"), 1_000_000_000_005);
        assert_eq!(parse_time_offset("boottime x"), 0);
        assert_eq!(boot_id().unwrap().len(), 36);
        assert_eq!(users().get(&0).map(String::as_str), Some("root"));
        assert!(pid_ns().unwrap() > 0);
    }

    #[test]
    fn code_is_read_again_after_it_was_given_back() {
        let maps = || std::fs::read_to_string("/proc/self/maps").unwrap();
        let code = mapping_of(&maps(), trim as *const () as usize).unwrap();
        assert!(mapping_of(&maps(), code.end).is_none_or(|m| m != code));
        let heap = Box::new(0_u8);
        assert_eq!(mapping_of(&maps(), std::ptr::from_ref(&*heap) as usize), None, "no code");
        assert_eq!(mapping_of("1000-zz r-xp\n1000", 0x1000), None);
        let resident = || {
            let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let from = smaps.find(&format!("{:x}-", code.start)).unwrap();
            let rss = smaps[from..].lines().find_map(|l| l.strip_prefix("Rss:")).unwrap().trim();
            rss.trim_end_matches(" kB").parse::<u64>().unwrap()
        };
        // SAFETY: within a mapping that may be read.
        let byte = |at: usize| u64::from(unsafe { *(at as *const u8) });
        assert!(code.clone().step_by(4096).map(byte).sum::<u64>() > 0, "all of it is touched");
        let before = resident();
        trim();
        let after = resident();
        assert!(after < before / 2, "{before} kB, then {after} kB");
    }
}
