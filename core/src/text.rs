//! Text that others wrote, and sizes, shown to a user.

use std::ffi::OsStr;
use std::fmt::Write;

/// A name or path as it can be printed on one line: what would move the cursor, change colours, begin a line or turn the
/// direction of writing is escaped (`\n`, `\x1b`, `\u{202e}`), and so are bytes that are no UTF-8 (`\xe9`).
///
/// ```
/// assert_eq!(dinolab_core::text::printable("two\nlines \u{1b}[31mred.jpg"), r"two\nlines \x1b[31mred.jpg");
/// assert_eq!(dinolab_core::text::printable("grün.jpg"), "grün.jpg");
/// ```
pub fn printable(text: impl AsRef<OsStr>) -> String {
    let bytes = text.as_ref().as_encoded_bytes();
    let mut shown = String::with_capacity(bytes.len());
    for part in bytes.utf8_chunks() {
        for c in part.valid().chars() {
            match c {
                '\n' | '\r' | '\t' => shown.extend(c.escape_default()),
                c if c.is_control() => write!(shown, "\\x{:02x}", c as u32).expect("memory takes any text"),
                c if turns(c) => shown.extend(c.escape_unicode()),
                c => shown.push(c),
            }
        }
        for byte in part.invalid() {
            write!(shown, "\\x{byte:02x}").expect("memory takes any text");
        }
    }
    shown
}

/// A number of bytes: `1.50 GiB`.
pub fn bytes(x: f64) -> String {
    humansize::format_size(x as u64, humansize::BINARY)
}

/// Whether a character begins a line or changes the direction of what follows (Unicode TR 9), so that a name looks like
/// another.
fn turns(c: char) -> bool {
    matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    #[cfg(unix)]
    fn names_that_are_no_text_are_told_apart() {
        use std::os::unix::ffi::OsStrExt;
        let name = |bytes| printable(OsStr::from_bytes(bytes));
        assert_eq!(
            (name(b"latin1_\xe9.jpg"), name(b"latin1_\xe8.jpg")),
            (r"latin1_\xe9.jpg".into(), r"latin1_\xe8.jpg".into())
        );
    }

    proptest! {
        #[test]
        fn whatever_is_shown_is_one_line_without_commands(text in any::<String>()) {
            let shown = printable(&text);
            prop_assert!(!shown.chars().any(|c| c.is_control() || turns(c)), "{shown:?}");
            if !text.chars().any(|c| c.is_control() || turns(c)) {
                prop_assert_eq!(shown, text);
            }
        }
    }
}
