//! Prometheus' two text formats from one description: text format 0.0.4 and OpenMetrics 1.0.
//!
//! No crate writes both (`prometheus` knows only the first, `prometheus-client` only the second), and they differ in
//! where `_total` stands. Pure: a string is built, nothing is read.

use std::fmt::Write as _;

use crate::model::stats::Histogram;

/// Which of the two text formats is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// `text/plain; version=0.0.4`
    Text,
    /// `application/openmetrics-text; version=1.0.0`
    OpenMetrics,
}

impl Format {
    /// By an Accept header: OpenMetrics where it is named, else text.
    #[must_use]
    pub fn from_accept(accept: Option<&str>) -> Self {
        match accept {
            Some(a) if a.contains("application/openmetrics-text") => Self::OpenMetrics,
            _ => Self::Text,
        }
    }

    #[must_use]
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// A label: name and value.
pub type Label<'a> = (&'a str, &'a str);

/// Builds one exposition. Families are written whole, one after the other.
#[derive(Debug)]
pub struct Encoder {
    out: String,
    format: Format,
    /// The family under way: its samples' name.
    name: String,
}

impl Encoder {
    #[must_use]
    pub fn new(format: Format) -> Self {
        Self { out: String::with_capacity(16 * 1024), format, name: String::new() }
    }

    /// Starts a gauge.
    pub fn gauge(&mut self, name: &str, help: &str) -> &mut Self {
        self.head(name, name, "gauge", help)
    }

    /// Starts a counter; `name` ends with `_total`.
    pub fn counter(&mut self, name: &str, help: &str) -> &mut Self {
        let family = match self.format {
            Format::Text => name,
            Format::OpenMetrics => name.strip_suffix("_total").unwrap_or(name),
        };
        self.head(family, name, "counter", help)
    }

    /// Starts a histogram.
    pub fn histogram(&mut self, name: &str, help: &str) -> &mut Self {
        self.head(name, name, "histogram", help)
    }

    fn head(&mut self, family: &str, sample: &str, kind: &str, help: &str) -> &mut Self {
        // OpenMetrics wants TYPE before HELP's text to be escaped the same way; the order of the two is free in both.
        let _ = write!(self.out, "# HELP {family} ");
        escape(&mut self.out, help, false);
        let _ = writeln!(self.out, "\n# TYPE {family} {kind}");
        sample.clone_into(&mut self.name);
        self
    }

    /// One sample of the family under way.
    pub fn sample(&mut self, labels: &[Label<'_>], value: f64) -> &mut Self {
        self.line("", labels, None, value);
        self
    }

    /// A histogram's buckets, sum and count.
    pub fn buckets(&mut self, labels: &[Label<'_>], h: &Histogram) -> &mut Self {
        let mut sum = 0;
        for (i, n) in h.counts.iter().enumerate() {
            sum += n;
            let le = h.bounds.get(i).copied().unwrap_or(f64::INFINITY);
            self.line("_bucket", labels, Some(le), sum as f64);
        }
        self.line("_sum", labels, None, h.sum);
        self.line("_count", labels, None, sum as f64);
        self
    }

    fn line(&mut self, suffix: &str, labels: &[Label<'_>], le: Option<f64>, value: f64) {
        self.out.push_str(&self.name);
        self.out.push_str(suffix);
        if !labels.is_empty() || le.is_some() {
            self.out.push('{');
            let mut first = true;
            for (k, v) in labels {
                if !std::mem::take(&mut first) {
                    self.out.push(',');
                }
                let _ = write!(self.out, "{k}=\"");
                escape(&mut self.out, v, true);
                self.out.push('"');
            }
            if let Some(le) = le {
                if !first {
                    self.out.push(',');
                }
                self.out.push_str("le=\"");
                // OpenMetrics wants canonical floats here ("1.0"), Prometheus takes them too.
                number(&mut self.out, le, true);
                self.out.push('"');
            }
            self.out.push('}');
        }
        self.out.push(' ');
        number(&mut self.out, value, false);
        self.out.push('\n');
    }

    /// The finished exposition.
    #[must_use]
    pub fn finish(mut self) -> String {
        if self.format == Format::OpenMetrics {
            self.out.push_str("# EOF\n");
        }
        self.out
    }
}

fn number(out: &mut String, v: f64, point: bool) {
    if v == f64::INFINITY {
        out.push_str("+Inf");
    } else if v == f64::NEG_INFINITY {
        out.push_str("-Inf");
    } else if v.is_nan() {
        out.push_str("NaN");
    } else if point {
        let _ = write!(out, "{v:?}");
    } else {
        let _ = write!(out, "{v}");
    }
}

fn escape(out: &mut String, s: &str, quotes: bool) {
    for c in s.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '"' if quotes => out.push_str("\\\""),
            c => out.push(c),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn both(f: impl Fn(&mut Encoder)) -> (String, String) {
        let make = |format| {
            let mut e = Encoder::new(format);
            f(&mut e);
            e.finish()
        };
        (make(Format::Text), make(Format::OpenMetrics))
    }

    #[test]
    fn total_stands_where_each_format_wants_it() {
        let (text, open) = both(|e| {
            e.counter("a_total", "help").sample(&[("kind", "x\"\\\n")], 3.0);
        });
        assert_eq!(text, "# HELP a_total help\n# TYPE a_total counter\na_total{kind=\"x\\\"\\\\\\n\"} 3\n");
        assert_eq!(open, "# HELP a help\n# TYPE a counter\na_total{kind=\"x\\\"\\\\\\n\"} 3\n# EOF\n");
    }

    #[test]
    fn buckets_are_cumulative() {
        let mut h = Histogram::new(&[0.1, 1.0]);
        for v in [0.1, 0.5, 2.0, 3.0] {
            h.observe(v);
        }
        let (text, _) = both(|e| {
            e.histogram("h", "help").buckets(&[], &h);
        });
        assert!(text.contains("h_bucket{le=\"0.1\"} 1\nh_bucket{le=\"1.0\"} 2\nh_bucket{le=\"+Inf\"} 4\n"));
        assert!(text.ends_with("h_sum 5.6\nh_count 4\n"));
    }
}
