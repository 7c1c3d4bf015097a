//! What journald needs of a line on stderr: its level in front (sd-daemon(3)), and no time, since it has its own.

use std::fmt;

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// The mark of an error.
pub(super) const ERROR: &str = "<3>";

/// Whether journald reads stderr: systemd tells the stream's device and inode (systemd.exec(5), `$JOURNAL_STREAM`).
pub(super) fn reads_stderr() -> bool {
    let Some(stream) = std::env::var_os("JOURNAL_STREAM") else { return false };
    rustix::fs::fstat(std::io::stderr())
        .is_ok_and(|s| stream.to_str() == Some(&format!("{}:{}", s.st_dev, s.st_ino)))
}

/// Each line of an event with its level in front.
pub(super) struct Levelled<F>(pub(super) F);

impl<S, N, F> FormatEvent<S, N> for Levelled<F>
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
        let mark = match *event.metadata().level() {
            Level::ERROR => ERROR,
            Level::WARN => "<4>",
            Level::INFO => "<6>",
            _ => "<7>",
        };
        let mut text = String::new();
        self.0.format_event(context, Writer::new(&mut text), event)?;
        text.lines().try_for_each(|line| writeln!(to, "{mark}{line}"))
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use super::*;

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
        let log = log.with_writer(move || to.clone()).map_event_format(Levelled).finish();
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
