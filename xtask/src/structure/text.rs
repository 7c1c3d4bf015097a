//! A Rust source without what only people read: comments, the contents of strings and of characters become spaces. Lines and
//! offsets stay.

/// Bytes, since what is looked for is ASCII.
pub(super) fn code(source: &str) -> Vec<u8> {
    let source = source.as_bytes();
    let mut out = source.to_vec();
    let mut at = 0;
    while at < source.len() {
        let end = match source[at] {
            b'/' if source[at..].starts_with(b"//") => line_end(source, at),
            b'/' if source[at..].starts_with(b"/*") => block_comment_end(source, at),
            b'"' => string_end(source, at + 1),
            b'r' if !is_word(previous(source, at)) || previous(source, at) == b'b' => {
                raw_string_end(source, at).unwrap_or(at)
            }
            b'\'' => character_end(source, at).unwrap_or(at),
            _ => at,
        };
        for byte in &mut out[at..end] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        at = end.max(at + 1);
    }
    out
}

/// A letter of a name.
pub(super) fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

/// The end of the block that opens at `open`.
pub(super) fn block_end(code: &[u8], open: usize) -> usize {
    let mut depth = 0_usize;
    for (i, byte) in code.iter().enumerate().skip(open) {
        match byte {
            b'{' => depth += 1,
            b'}' if depth <= 1 => return i + 1,
            b'}' => depth -= 1,
            _ => {}
        }
    }
    code.len()
}

/// Blanks what is compiled for tests only: the item behind each `#[cfg(test)]`.
pub(super) fn without_tests(code: &mut [u8]) {
    const MARK: &[u8] = b"#[cfg(test)]";
    let mut at = 0;
    while let Some(found) = code[at..].windows(MARK.len()).position(|w| w == MARK) {
        let begin = at + found;
        let end = item_end(code, begin + MARK.len());
        for byte in &mut code[begin..end] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        at = end;
    }
}

/// An item ends with its block, or with a semicolon before one opens.
fn item_end(code: &[u8], from: usize) -> usize {
    // A use of several names has braces, and ends behind them.
    let head = code[from..].iter().position(|b| b";{".contains(b)).map_or(code.len(), |n| from + n);
    let text = String::from_utf8_lossy(&code[from..head]);
    if code.get(head) == Some(&b'{') && text.split_whitespace().any(|w| w == "use") {
        return code[head..].iter().position(|b| *b == b';').map_or(code.len(), |n| head + n + 1);
    }
    if code.get(head) == Some(&b'{') { block_end(code, head) } else { (head + 1).min(code.len()) }
}

fn previous(source: &[u8], at: usize) -> u8 {
    at.checked_sub(1).map_or(b' ', |i| source[i])
}

fn line_end(source: &[u8], at: usize) -> usize {
    source[at..].iter().position(|b| *b == b'\n').map_or(source.len(), |n| at + n)
}

fn block_comment_end(source: &[u8], mut at: usize) -> usize {
    let mut depth = 0_usize;
    while at < source.len() {
        if source[at..].starts_with(b"/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if source[at..].starts_with(b"*/") {
            (depth, at) = (depth - 1, at + 2);
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    at
}

fn string_end(source: &[u8], mut at: usize) -> usize {
    while at < source.len() && source[at] != b'"' {
        at += if source[at] == b'\\' { 2 } else { 1 };
    }
    (at + 1).min(source.len())
}

/// Of `r"…"` and `r#"…"#`; `None` for any other word with an r.
fn raw_string_end(source: &[u8], at: usize) -> Option<usize> {
    let hashes = source[at + 1..].iter().take_while(|b| **b == b'#').count();
    let open = at + 1 + hashes;
    if source.get(open) != Some(&b'"') {
        return None;
    }
    let mut close = vec![b'"'];
    close.resize(1 + hashes, b'#');
    let body = open + 1;
    let end = source[body..].windows(close.len()).position(|w| w == close);
    Some(end.map_or(source.len(), |n| body + n + close.len()))
}

/// Of `'x'` and `'\n'`; `None` for a lifetime.
fn character_end(source: &[u8], at: usize) -> Option<usize> {
    let rest = &source[at + 1..];
    if rest.first() == Some(&b'\\') {
        return rest.iter().skip(2).position(|b| *b == b'\'').map(|n| at + n + 4);
    }
    let width =
        std::str::from_utf8(&rest[..rest.len().min(4)]).map_or_else(|e| e.valid_up_to(), str::len).max(1);
    let one = (1..=width).find(|n| std::str::from_utf8(&rest[..*n]).is_ok())?;
    (rest.get(one) == Some(&b'\'')).then_some(at + one + 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blanked(source: &str) -> String {
        String::from_utf8(code(source)).expect("what is not blanked is as it was")
    }

    #[test]
    fn braces_that_are_no_code_go_and_lines_stay() {
        for (source, rest) in [
            ("a // {\nb", "a     \nb"),
            ("a /* { /* } */ */ b", "a                 b"),
            ("x(\"{\\\"\", '{', '\\'', '\\u{7b}', b\"{\")", "x(     ,    ,     ,         , b   )"),
            ("r#\"{\"\n\"#; for<'a> fn f(x: &'a str) {}", "     \n  ; for<'a> fn f(x: &'a str) {}"),
            ("br\"{\" ; four\"{\"", "b     ; four   "),
            ("'é' }", "     }"),
        ] {
            assert_eq!(blanked(source), rest, "{source}");
        }
    }

    #[test]
    fn what_only_tests_have_goes() {
        let mut text =
            b"a; #[cfg(test)] mod t { fn f() {} } #[cfg(test)] use a::{b}; #[cfg(test)] mod u; z".to_vec();
        without_tests(&mut text);
        let left: Vec<&str> = std::str::from_utf8(&text).expect("ASCII").split_whitespace().collect();
        assert_eq!(left, ["a;", "z"]);
    }
}
