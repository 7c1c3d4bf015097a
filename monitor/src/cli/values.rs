//! Readers of option values: what they refuse is a mistake of usage (exit status 2).

use std::time::Duration;

use jobwarden::api::{Target, WhyQuery};
use jobwarden::config;
use jobwarden::model::signal;

/// `90s`, `1h30m`, `500ms`; a bare 0 is clear too.
pub(super) fn duration(s: &str) -> Result<Duration, String> {
    if s == "0" { Ok(Duration::ZERO) } else { config::parse_duration(s) }
}

/// PID, ID, JOB or `name:NAME`.
pub(super) fn target(s: &str) -> Result<Target, String> {
    match s.parse() {
        Ok(Target::Alert(_)) => Err(format!("{s:?} is an alert: expected PID, ID, JOB or name:NAME")),
        r => r.map_err(|e: jobwarden::api::TargetError| e.to_string()),
    }
}

/// A JOB, or `name:NAME`.
pub(super) fn job(s: &str) -> Result<Target, String> {
    match target(s)? {
        t @ (Target::Job(_) | Target::Name(_)) => Ok(t),
        _ => Err(format!(
            "{s:?} is no job: expected j-PID:START-N, as `jobwarden jobs` prints it, or name:NAME"
        )),
    }
}

/// What `why` can be asked about.
pub(super) fn question(s: &str) -> Result<WhyQuery, String> {
    let target = Some(s.parse().map_err(|e: jobwarden::api::TargetError| e.to_string())?);
    Ok(WhyQuery { target, ..WhyQuery::default() })
}

/// A user's name or number.
pub(super) fn user(s: &str) -> Result<u32, String> {
    s.parse().ok().or_else(|| config::user_id(s)).ok_or_else(|| format!("no user {s:?} on this host"))
}

/// A signal's name, with or without SIG, or its number.
pub(super) fn signal(s: &str) -> Result<u8, String> {
    signal::parse(s).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_number_is_no_duration() {
        assert_eq!(duration("0"), Ok(Duration::ZERO));
        assert_eq!(duration("1m30s"), Ok(Duration::from_secs(90)));
        for bad in ["10", "", "-1s", "1 bananas"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn jobs_are_named_as_jobs() {
        assert!(job("name:x").is_ok() && job("j-1:2-3").is_ok());
        assert!(job("7").is_err() && job("7:8").is_err() && target("0123456789abcdef").is_err());
    }
}
