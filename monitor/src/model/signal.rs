//! Signal numbers and names (x86-64 and the other architectures that share asm-generic's numbers).

/// `NAMES[n - 1]` is signal n, up to 31.
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE",
    "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ",
    "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];

pub const SIGHUP: u8 = 1;
pub const SIGINT: u8 = 2;
pub const SIGKILL: u8 = 9;
pub const SIGPIPE: u8 = 13;
pub const SIGTERM: u8 = 15;
pub const SIGCONT: u8 = 18;

/// The highest signal number (`_NSIG`).
pub const MAX: u8 = 64;
/// The first real-time signal as the C library counts them (glibc keeps 32 and 33 for itself).
const RTMIN: u8 = 34;

/// `SIGTERM`; `SIGRTMIN+3`; a bare number for what has no name.
#[must_use]
pub fn name(n: u8) -> String {
    match n {
        1..=31 => format!("SIG{}", NAMES[usize::from(n) - 1]),
        RTMIN => "SIGRTMIN".into(),
        35..=MAX => format!("SIGRTMIN+{}", n - RTMIN),
        _ => n.to_string(),
    }
}

/// Not the name or number of a signal.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is no signal: expected a name (SIGTERM, TERM, SIGRTMIN+1) or a number from 1 to 64")]
pub struct SignalError(pub String);

/// A name with or without `SIG`, in any case, or a number from 1 to 64.
pub fn parse(s: &str) -> Result<u8, SignalError> {
    let bad = || SignalError(s.chars().take(32).collect());
    if let Ok(n) = s.parse::<u8>() {
        return if (1..=MAX).contains(&n) { Ok(n) } else { Err(bad()) };
    }
    let upper = s.to_ascii_uppercase();
    let short = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(i) = NAMES.iter().position(|n| *n == short) {
        return Ok(i as u8 + 1);
    }
    let offset = |v: &str| if v.is_empty() { Some(0) } else { v.get(1..)?.parse::<u8>().ok() };
    let n = match short {
        "IOT" => Some(6),
        "POLL" => Some(29),
        _ => match (short.strip_prefix("RTMIN"), short.strip_prefix("RTMAX")) {
            (Some(v), _) if v.is_empty() || v.starts_with('+') => {
                offset(v).and_then(|o| RTMIN.checked_add(o))
            }
            (_, Some(v)) if v.is_empty() || v.starts_with('-') => offset(v).and_then(|o| MAX.checked_sub(o)),
            _ => None,
        },
    };
    n.filter(|n| (RTMIN..=MAX).contains(n) || matches!(n, 6 | 29)).ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_round_trip() {
        for n in (1..=31).chain(RTMIN..=MAX) {
            assert_eq!(parse(&name(n)), Ok(n), "{n}");
        }
        assert_eq!(parse("term"), Ok(15));
        assert_eq!(parse("9"), Ok(9));
        assert_eq!(parse("RTMAX"), Ok(64));
        assert_eq!(name(15), "SIGTERM");
        assert_eq!(i32::from(parse("SIGPWR").unwrap()), libc::SIGPWR);
        for bad in ["", "0", "65", "SIG", "TERMX", "RTMIN+31", "RTMIN-1", "RTMAX-40", "-9", "RTMINé1"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
