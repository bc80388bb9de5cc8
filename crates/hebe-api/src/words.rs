//! What a VMM says, as far as it can be shown: its guest may have taken it
//! over, and its words end up on an operator's terminal.

use crate::{CageReport, Response, VmStatus};

/// Longest text that is taken over, in characters.
const TEXT_LEN_MAX: usize = 4096;
/// Most devices and parts of a cage that are listed.
const LIST_LEN_MAX: usize = 256;

/// `text` without what steers a terminal, and no longer than a long sentence.
pub fn plain(text: &str) -> String {
    let shown = |c: char| if steers(c) { '\u{fffd}' } else { c };
    let mut chars = text.chars();
    let mut text: String = chars.by_ref().take(TEXT_LEN_MAX).map(shown).collect();
    if chars.next().is_some() {
        text.push('…');
    }
    text
}

/// Control characters, and those that turn the direction of what follows.
fn steers(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

impl Response {
    /// The answer with [`plain`] texts.
    pub(crate) fn made_plain(self) -> Self {
        match self {
            Self::Failed { message } => Self::Failed {
                message: plain(&message),
            },
            Self::Status(status) => Self::Status(status.made_plain()),
            other => other,
        }
    }
}

impl VmStatus {
    fn made_plain(mut self) -> Self {
        self.version = plain(&self.version);
        self.failed = self.failed.as_deref().map(plain);
        self.stopped_devices.truncate(LIST_LEN_MAX);
        for device in &mut self.stopped_devices {
            *device = plain(device);
        }
        if let Some(CageReport { parts }) = &mut self.cage {
            parts.truncate(LIST_LEN_MAX);
            for part in parts {
                part.name = plain(&part.name);
                part.detail = plain(&part.detail);
            }
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_steers_a_terminal_is_left_and_length_is_bounded() {
        let text = "a\x1b]0;owned\x07b\r\n\u{9b}31mü\u{202e}c";
        let shown = plain(text);
        assert!(!shown.chars().any(steers), "{shown:?}");
        assert!(shown.starts_with('a') && shown.contains('ü') && shown.ends_with('c'));
        assert_eq!(plain("web stands still: why?"), "web stands still: why?");
        let long = plain(&"ä".repeat(1 << 20));
        assert_eq!(long.chars().count(), TEXT_LEN_MAX + 1);
    }
}
