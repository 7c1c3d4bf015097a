//! Why a request was not answered, in one shape from the agent's core to the client's exit status.

use axum::response::IntoResponse as _;
use serde::{Deserialize, Serialize};

use crate::model::schema::{ErrorBody, ErrorInfo};

/// What kind of failure: decides the HTTP status and the command's exit status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// Tried, and failed; or the answer is no. Exit 1.
    Failed,
    /// The request makes no sense. Exit 2.
    Usage,
    /// Not permitted. Exit 3.
    Denied,
    /// The agent is not there, or cannot answer now. Exit 3.
    Unavailable,
    /// No such process, job or alert. Exit 4.
    NotFound,
}

impl Class {
    pub const ALL: [Self; 5] = [Self::Failed, Self::Usage, Self::Denied, Self::Unavailable, Self::NotFound];

    #[must_use]
    pub const fn exit_status(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Denied | Self::Unavailable => 3,
            Self::NotFound => 4,
        }
    }

    #[must_use]
    pub const fn http_status(self) -> u16 {
        match self {
            Self::Failed => 409,
            Self::Usage => 400,
            Self::Denied => 403,
            Self::Unavailable => 503,
            Self::NotFound => 404,
        }
    }

    /// The class of an answer with this HTTP status; a client asks, so that the two tables cannot drift apart.
    #[must_use]
    pub fn of_http(status: u16) -> Self {
        Self::ALL.into_iter().find(|c| c.http_status() == status).unwrap_or(match status {
            // Size and form of the request.
            405 | 408 | 413..=415 | 431 => Self::Usage,
            429 => Self::Unavailable,
            _ => Self::Failed,
        })
    }
}

/// One of several that a target could mean.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Matched {
    /// To be given instead: an ID or a JOB.
    pub target: String,
    /// What it is, in words: name or argv, state, age.
    pub what: String,
}

/// `code` is a word for scripts (`no-such-process`), `message` says what was tried and why not, `hint` what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    pub class: Class,
    pub code: &'static str,
    pub message: String,
    pub hint: Option<String>,
    /// Where several matched and nothing was done.
    pub matches: Vec<Matched>,
}

impl ApiError {
    #[must_use]
    pub fn new(class: Class, code: &'static str, message: impl Into<String>) -> Self {
        Self { class, code, message: message.into(), hint: None, matches: Vec::new() }
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// `what` is "process", "job" or "alert"; `target` as it was given.
    #[must_use]
    pub fn not_found(what: &str, target: impl std::fmt::Display) -> Self {
        let (code, list) = match what {
            "job" => ("no-such-job", "jobwarden jobs"),
            "alert" => ("no-such-alert", "jobwarden alerts --all"),
            "receiver" => ("no-such-receiver", "jobwarden check --print"),
            _ => ("no-such-process", "jobwarden tree"),
        };
        Self::new(Class::NotFound, code, format!("no {what} {target}")).hint(format!("`{list}` lists them"))
    }

    /// Several match: they are listed, nothing was done.
    #[must_use]
    pub fn several(target: impl std::fmt::Display, matches: Vec<Matched>) -> Self {
        Self {
            matches,
            ..Self::new(Class::Failed, "several-match", format!("several match {target}; nothing was done"))
                .hint("name one of them, or give --all")
        }
    }

    #[must_use]
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Class::Usage, "bad-request", message)
    }

    #[must_use]
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(Class::Failed, "failed", message)
    }

    /// The agent's core gave no answer: it is stopping.
    #[must_use]
    pub fn stopping() -> Self {
        Self::new(Class::Unavailable, "stopping", "the agent is stopping")
    }

    #[must_use]
    pub fn body(&self) -> ErrorBody {
        ErrorBody {
            error: ErrorInfo {
                code: self.code.to_owned(),
                message: self.message.clone(),
                hint: self.hint.clone(),
                matches: self.matches.clone(),
            },
        }
    }
}

/// 429, for clients that ask faster than is allowed.
pub(super) fn too_often() -> axum::response::Response {
    let e = ApiError::new(Class::Unavailable, "too-many-requests", "too many requests within one second")
        .hint("ask less often; `jobwarden events` follows what happens");
    (axum::http::StatusCode::TOO_MANY_REQUESTS, axum::Json(e.body())).into_response()
}

/// 503, for a connection that found no place.
pub(super) fn no_place() -> ApiError {
    ApiError::new(
        Class::Unavailable,
        "too-many-connections",
        "too many requests of this user, or of all users, are under way at the agent",
    )
    .hint("try again in a moment; each `events` and `kill` under way counts")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_survives_http() {
        for c in Class::ALL {
            assert_eq!(Class::of_http(c.http_status()), c);
        }
        assert_eq!(Class::of_http(413), Class::Usage);
        assert_eq!(Class::of_http(500), Class::Failed);
    }
}
