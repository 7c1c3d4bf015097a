//! The last guard of the log: whatever a field or a message holds, an event is one line of text, or one JSON object, without a
//! control character of its own.

use std::fmt;

use jobwarden::model::outside::{escape, escape_json};
use tracing::field::Field;
use tracing::{Event, Subscriber};
use tracing_subscriber::field::MakeExt as _;
use tracing_subscriber::fmt::format::{Writer, debug_fn};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// Fields of the text log, as `tracing_subscriber` writes them but escaped.
pub(super) fn escaped_fields() -> impl for<'a> FormatFields<'a> + 'static {
    debug_fn(|to: &mut Writer<'_>, field: &Field, value: &dyn fmt::Debug| {
        let text = format!("{value:?}");
        match field.name() {
            "message" => write!(to, "{}", escape(&text)),
            name => write!(to, "{name}={}", escape(&text)),
        }
    })
    .delimited(" ")
}

/// JSON with the characters escaped that serde_json leaves as they are.
pub(super) struct EscapedJson<F>(pub(super) F);

impl<S, N, F> FormatEvent<S, N> for EscapedJson<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut to: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut json = String::new();
        self.0.format_event(context, Writer::new(&mut json), event)?;
        to.write_str(&escape_json(&json))
    }
}

#[cfg(test)]
mod tests {
    use jobwarden::logging::Log;
    use tracing::Dispatch;

    use super::*;

    const EVIL: &str = "a\nERROR forged\x1b[2J\u{202e}\u{9b}m\u{7f}";

    fn logged(subscriber: impl Into<Dispatch>, log: &Log, file: &tempfile::NamedTempFile) -> String {
        tracing::dispatcher::with_default(&subscriber.into(), || {
            tracing::warn!(shown = %EVIL, debug = ?EVIL, text = EVIL, number = 7, "message: {EVIL}");
        });
        log.start_to(file.reopen().unwrap()).unwrap();
        assert!(log.flush(std::time::Duration::from_secs(20)));
        let text = std::fs::read_to_string(file.path()).unwrap();
        let line = text.strip_suffix('\n').unwrap().to_owned();
        assert!(escape(&line) == line, "{line:?}");
        line
    }

    #[test]
    fn an_event_is_one_line_whatever_it_holds() {
        let file = || tempfile::NamedTempFile::new().unwrap();
        let log = Log::default();
        let text = tracing_subscriber::fmt().with_ansi(false).with_writer(log.clone());
        let line = logged(text.fmt_fields(escaped_fields()).finish(), &log, &file());
        let safe = r"a\nERROR forged\x1b[2J\u{202e}\u{9b}m\x7f";
        let all = format!("message: {safe} shown={safe} debug=");
        assert!(line.contains(&all) && line.ends_with("number=7"), "{line}");
        let log = Log::default();
        let json = tracing_subscriber::fmt().json().with_writer(log.clone());
        let line = logged(json.map_event_format(EscapedJson).finish(), &log, &file());
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["fields"]["shown"], EVIL);
    }
}
