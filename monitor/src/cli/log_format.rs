//! How events are written to the log. Whatever a field or a message holds, an event is one line of text, or one JSON object, without
//! a control character of its own.

use std::fmt;

use jobwarden::model::outside::{escape, escape_json};
use tracing::field::Field;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::field::MakeExt as _;
use tracing_subscriber::fmt::format::{Writer, debug_fn};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use super::journal;

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

/// An event as another format writes it, written again.
pub(super) struct Rewritten<F> {
    format: F,
    write: fn(&Level, &str, &mut Writer<'_>) -> fmt::Result,
}

/// JSON with the characters escaped that serde_json leaves as they are.
pub(super) fn escaped_json<F>(format: F) -> Rewritten<F> {
    Rewritten { format, write: |_, json, to| to.write_str(&escape_json(json)) }
}

/// Each line of an event with the mark of its level in front, for journald.
pub(super) fn levelled<F>(format: F) -> Rewritten<F> {
    let write = |level: &Level, text: &str, to: &mut Writer<'_>| {
        let mark = journal::mark(*level);
        text.lines().try_for_each(|line| writeln!(to, "{mark}{line}"))
    };
    Rewritten { format, write }
}

impl<S, N, F> FormatEvent<S, N> for Rewritten<F>
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
        let mut text = String::new();
        self.format.format_event(context, Writer::new(&mut text), event)?;
        (self.write)(event.metadata().level(), &text, &mut to)
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

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
        let line = logged(json.map_event_format(escaped_json).finish(), &log, &file());
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["fields"]["shown"], EVIL);
    }

    #[derive(Clone, Default)]
    struct Said(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Said {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn every_line_has_its_level() {
        let said = Said::default();
        let to = said.clone();
        let log = tracing_subscriber::fmt().with_ansi(false).without_time();
        let log = log.with_writer(move || to.clone()).map_event_format(levelled).finish();
        tracing::subscriber::with_default(log, || {
            tracing::error!("two\nlines");
            tracing::warn!(n = 1, "odd");
            tracing::info!("usual");
        });
        let text = String::from_utf8(said.0.lock().unwrap().clone()).unwrap();
        let starts: Vec<&str> = text.lines().map(|l| l.split(' ').next().unwrap()).collect();
        assert_eq!(starts, ["<3>ERROR", "<3>lines", "<4>", "<6>"], "{text}");
    }
}
