//! How a command says that it failed.

use std::process::ExitCode;

use jobwarden::api::{ApiError, Class};
use jobwarden::client::ClientError;
use jobwarden::model::outside::escape_json;
use jobwarden::model::schema::{ErrorBody, ErrorInfo};
use jobwarden::output::error_line;
use jobwarden::render::escape;

use super::journal;

/// What is told, and the exit status.
#[derive(Debug)]
pub(crate) struct Failure {
    info: ErrorInfo,
    status: u8,
}

impl Failure {
    pub(crate) fn new(class: Class, code: &str, message: impl Into<String>) -> Self {
        let info = ErrorInfo { code: code.into(), message: message.into(), hint: None, matches: Vec::new() };
        Self { info, status: class.exit_status() }
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(Class::Usage, "usage", message)
    }

    pub(crate) fn failed(code: &str, message: impl Into<String>) -> Self {
        Self::new(Class::Failed, code, message)
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.info.hint = Some(hint.into());
        self
    }

    /// To stderr; stdout stays empty.
    pub(crate) fn tell(self, json: bool) -> ExitCode {
        let status = ExitCode::from(self.status);
        if json {
            let body = ErrorBody { error: self.info };
            error_line(escape_json(&serde_json::to_string(&body).unwrap_or_default()));
            return status;
        }
        let mark = if journal::reads_stderr() { journal::ERROR } else { "" };
        // What it is about may come from a process; the line breaks of a config's mistakes are ours.
        let lines: Vec<String> = self.info.message.lines().map(escape).collect();
        error_line(format_args!("{mark}jobwarden: {}", lines.join(&format!("\n{mark}"))));
        for m in &self.info.matches {
            error_line(format_args!("{mark}  {}  {}", escape(&m.target), escape(&m.what)));
        }
        if let Some(h) = &self.info.hint {
            error_line(format_args!("{mark}hint: {}", escape(h)));
        }
        status
    }
}

impl From<ClientError> for Failure {
    fn from(e: ClientError) -> Self {
        Self { status: e.class().exit_status(), info: e.info() }
    }
}

impl From<ApiError> for Failure {
    fn from(e: ApiError) -> Self {
        Self { status: e.class.exit_status(), info: e.body().error }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(e: anyhow::Error) -> Self {
        Self::failed("failed", format!("{e:#}"))
    }
}
