//! Columns under headings.

use super::style::{Paint, Style, cut, width};

/// A table of escaped cells. On a terminal the last column is cut at its edge; in a pipe nothing is.
#[derive(Debug)]
pub struct Table {
    heads: &'static [&'static str],
    /// By column: to the right.
    right: &'static [usize],
    rows: Vec<Vec<(Paint, String)>>,
}

impl Table {
    #[must_use]
    pub const fn new(heads: &'static [&'static str], right: &'static [usize]) -> Self {
        Self { heads, right, rows: Vec::new() }
    }

    /// One cell for each heading.
    pub fn row(&mut self, cells: Vec<(Paint, String)>) {
        self.rows.push(cells);
    }

    #[must_use]
    pub fn render(&self, style: Style) -> String {
        let columns = self.heads.len();
        let widest = |i: usize| {
            let cells = self.rows.iter().filter_map(|r| r.get(i)).map(|(_, t)| width(t));
            cells.chain([self.heads[i].len()]).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(widest).collect();
        let heads: Vec<_> = self.heads.iter().map(|h| (Paint::Dim, (*h).to_owned())).collect();
        let mut out = String::new();
        for row in std::iter::once(&heads).chain(&self.rows) {
            let mut used = 0;
            for (i, (paint, text)) in row.iter().enumerate() {
                let last = i + 1 == row.len();
                let text = match style.width {
                    Some(w) if last => cut(text, w.saturating_sub(used).max(8)),
                    _ => text.clone(),
                };
                let pad = " ".repeat(widths[i].saturating_sub(width(&text)));
                let painted = style.paint(*paint, &text);
                if self.right.contains(&i) {
                    out.push_str(&pad);
                    out.push_str(&painted);
                } else {
                    out.push_str(&painted);
                    if !last {
                        out.push_str(&pad);
                    }
                }
                if !last {
                    out.push_str("  ");
                    used += widths[i] + 2;
                }
            }
            out.push('\n');
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_only_a_terminal_cuts() {
        let mut t = Table::new(&["N", "WHAT"], &[0]);
        t.row(vec![(Paint::Plain, "7".into()), (Paint::Plain, "a long text indeed".into())]);
        t.row(vec![(Paint::Plain, "100".into()), (Paint::Bad, "b".into())]);
        assert_eq!(t.render(Style::default()), "  N  WHAT\n  7  a long text indeed\n100  b\n");
        let narrow = t.render(Style { color: false, width: Some(14) });
        assert!(narrow.lines().all(|l| width(l) <= 14), "{narrow}");
        assert!(t.render(Style { color: true, width: None }).contains("\x1b[1;31mb\x1b[0m"));
    }
}
