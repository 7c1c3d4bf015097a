//! Lines of a file and of each function.

use super::text;

/// Lines from `fn` to its closing brace, by name, where they are more than `most`.
pub(super) fn long_functions(code: &[u8], most: usize) -> Vec<(String, usize)> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(n) = code[at..].windows(3).position(|w| w == b"fn ") {
        let begin = at + n;
        at = begin + 3;
        if begin > 0 && text::is_word(code[begin - 1]) {
            continue;
        }
        let name: String =
            code[at..].iter().take_while(|b| text::is_word(**b)).map(|b| char::from(*b)).collect();
        let lines = body(code, at).map_or(0, |end| count(&code[begin..end]) + 1);
        // `fn (` is a type.
        if !name.is_empty() && lines > most {
            found.push((name, lines));
        }
    }
    found
}

/// The end of the body; `None` where a trait only declares the function.
fn body(code: &[u8], from: usize) -> Option<usize> {
    // `[u8; 4]` in a signature has a semicolon too.
    let mut depth = 0_i32;
    for (i, byte) in code.iter().enumerate().skip(from) {
        match byte {
            b'(' | b'[' => depth += 1,
            b')' | b']' => depth -= 1,
            b';' if depth == 0 => return None,
            b'{' if depth == 0 => return Some(text::block_end(code, i)),
            _ => {}
        }
    }
    None
}

pub(super) fn count(bytes: &[u8]) -> usize {
    bytes.split(|&b| b == b'\n').count() - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_is_as_long_as_its_lines() {
        let source = "trait T { fn declared(x: [u8; 2]); }\nfn long(\n    x: [u8; 4],\n) -> u8 {\n    match x { _ => 1 }\n}\n\
                      fn short() {}\ntype F = fn (u8) -> u8;\n";
        let code = text::code(source);
        assert_eq!(long_functions(&code, 4), [("long".to_owned(), 5)]);
        assert_eq!(long_functions(&code, 5), []);
    }
}
