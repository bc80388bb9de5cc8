//! Text out of what a guest says, on its console or as a program's output,
//! without what steers a terminal.
//!
//! A guest's bytes are untrusted, and a terminal that is sent them as they are
//! can be made to lie about what stands on it, or to type. So escape sequences
//! go as a whole (colours are most of them), a lone carriage return begins a
//! new line, and every other control character, and those that turn the
//! direction of writing, are shown as U+FFFD. What is left is printable, with
//! tabs and line feeds.

/// Longest sequence that is taken for one, in characters: what never ends must
/// not hide all that follows.
const SEQUENCE_LEN_MAX: u32 = 256;

/// Where in a sequence the bytes so far end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Place {
    #[default]
    Text,
    /// Behind ESC.
    Escape,
    /// Behind `ESC [`.
    Control,
    /// In a string, such as a title, up to BEL or `ESC \`.
    String,
}

/// The filter; bytes may come in pieces of any length.
#[derive(Debug, Default)]
pub struct Plain {
    place: Place,
    /// Characters of the sequence so far.
    len: u32,
    /// A carriage return came, and it is not known yet whether a line feed follows.
    returned: bool,
    /// Something stands on the line that was begun.
    in_line: bool,
    /// The begin of a character whose end has not come.
    cut: Vec<u8>,
}

impl Plain {
    /// What can be shown of `bytes`, behind what came before.
    pub fn feed(&mut self, bytes: &[u8]) -> String {
        let mut all = std::mem::take(&mut self.cut);
        all.extend_from_slice(bytes);
        let mut text = String::with_capacity(all.len());
        let mut rest = all.as_slice();
        while !rest.is_empty() {
            let (good, bad) = match std::str::from_utf8(rest) {
                Ok(good) => (good, None),
                Err(error) => {
                    let good = std::str::from_utf8(&rest[..error.valid_up_to()]);
                    (good.unwrap_or_default(), Some(error.error_len()))
                }
            };
            good.chars().for_each(|c| self.take(c, &mut text));
            rest = &rest[good.len()..];
            match bad {
                None => {}
                Some(Some(len)) => {
                    self.take('\u{fffd}', &mut text);
                    rest = &rest[len..];
                }
                Some(None) => {
                    self.cut = rest.to_vec();
                    break;
                }
            }
        }
        text
    }

    fn take(&mut self, c: char, text: &mut String) {
        self.len = self.len.saturating_add(1);
        match (self.place, c) {
            (Place::Text, _) => self.show(c, text),
            // A line's end ends everything, and so does too much.
            (_, '\n' | '\r') => self.back(c, text),
            _ if self.len > SEQUENCE_LEN_MAX => self.back(c, text),
            (Place::String, '\u{7}' | '\u{9c}') => self.place = Place::Text,
            (_, '\u{1b}') => self.begin(Place::Escape),
            (Place::String, _) => {}
            (Place::Escape, '[') => self.begin(Place::Control),
            (Place::Escape, ']' | 'P' | 'X' | '^' | '_') => self.begin(Place::String),
            (Place::Escape, ' '..='/') | (Place::Control, ' '..='?') => {}
            (Place::Escape, '0'..='~') | (Place::Control, '@'..='~') => self.place = Place::Text,
            // No sequence at all.
            (Place::Escape | Place::Control, _) => self.back(c, text),
        }
    }

    fn begin(&mut self, place: Place) {
        self.place = place;
        self.len = 0;
    }

    fn back(&mut self, c: char, text: &mut String) {
        self.place = Place::Text;
        self.show(c, text);
    }

    fn show(&mut self, c: char, text: &mut String) {
        match c {
            '\n' => {
                (self.returned, self.in_line) = (false, false);
                text.push('\n');
                return;
            }
            '\r' => {
                self.returned = true;
                return;
            }
            '\u{1b}' => return self.begin(Place::Escape),
            '\u{9b}' => return self.begin(Place::Control),
            '\u{90}' | '\u{98}' | '\u{9d}' | '\u{9e}' | '\u{9f}' => {
                return self.begin(Place::String);
            }
            // Neither is seen on a terminal.
            '\0' | '\u{7}' => return,
            _ => {}
        }
        if self.returned && self.in_line {
            text.push('\n');
        }
        (self.returned, self.in_line) = (false, true);
        let shown = c == '\t' || !steers(c);
        text.push(if shown { c } else { '\u{fffd}' });
    }
}

/// Control characters, and those that turn the direction of what follows.
pub fn steers(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plain(bytes: &[u8]) -> String {
        Plain::default().feed(bytes)
    }

    #[test]
    fn what_steers_a_terminal_goes_and_the_rest_stays() {
        for (given, wanted) in [
            (
                "[    0.1] Linux\r\nnext\tz\r\n",
                "[    0.1] Linux\nnext\tz\n",
            ),
            ("\u{1b}[1;32mok\u{1b}[0m", "ok"),
            ("\u{1b}]0;title\u{7}a\u{1b}]2;t\u{1b}\\b", "ab"),
            ("\u{1b}P$q\u{1b}\\a\u{1b}(Bb\u{1b}cc", "abc"),
            ("\u{9b}31ma\u{9d}x\u{9c}b", "ab"),
            ("10%\r20%\r\n", "10%\n20%\n"),
            ("\r\r\nx", "\nx"),
            ("a\u{8}b\u{202e}c\u{7f}", "a\u{fffd}b\u{fffd}c\u{fffd}"),
            ("\u{1b}[31\u{1b}[0mx", "x"),
            ("\u{1b}]never ends\nseen", "\nseen"),
            ("Grüße", "Grüße"),
        ] {
            assert_eq!(plain(given.as_bytes()), wanted, "{given:?}");
        }
        assert_eq!(plain(b"a\xff\xc3(b"), "a\u{fffd}\u{fffd}(b");
        let long = format!("\u{1b}]{}", "x".repeat(1000));
        assert!(plain(long.as_bytes()).len() > 700);
    }

    proptest! {
        /// Whatever a guest sends, and in whatever pieces it is read.
        #[test]
        fn nothing_that_steers_is_left(
            words in prop::collection::vec(prop_oneof![
                Just(b"\x1b[".to_vec()), Just(b"\x1b]0;".to_vec()), Just(b"\x1b\\".to_vec()),
                Just(vec![0xc2, 0x9b]), Just(b"\r".to_vec()), Just(b"31mx\n".to_vec()),
                prop::collection::vec(any::<u8>(), 0..5),
            ], 0..40),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
        ) {
            let bytes = words.concat();
            let mut places: Vec<usize> = cuts.iter().map(|c| c.index(bytes.len() + 1)).collect();
            places.extend([0, bytes.len()]);
            places.sort_unstable();
            let mut filter = Plain::default();
            let text: String = places.windows(2).map(|w| filter.feed(&bytes[w[0]..w[1]])).collect();
            prop_assert!(!text.chars().any(|c| c != '\n' && c != '\t' && steers(c)), "{text:?}");
            prop_assert_eq!(text, plain(&bytes));
        }
    }
}
