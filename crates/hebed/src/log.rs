//! The log: lines on standard error, as the journal reads them.
//!
//! A line begins with its priority, `<6>`, where standard error is no
//! terminal (sd-daemon(3)); people get to read it without.

use std::fmt;
use std::io::{IsTerminal, Write};

/// How much a line matters, as syslog(3) numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    /// Something failed, and somebody should look.
    Error,
    /// Something is not as it should be.
    Warning,
    /// What happened.
    Info,
}

impl Priority {
    fn number(self) -> u8 {
        match self {
            Self::Error => 3,
            Self::Warning => 4,
            Self::Info => 6,
        }
    }
}

/// Writes one line. Nobody waits for it to be read, and a reader that went
/// away changes nothing.
pub fn line(priority: Priority, text: &dyn fmt::Display) {
    let mut stderr = std::io::stderr().lock();
    let marked = !stderr.is_terminal();
    let _ = stderr.write_all(format(priority, marked, &text.to_string()).as_bytes());
}

/// Something that happened.
pub fn info(text: impl fmt::Display) {
    line(Priority::Info, &text);
}

/// Something that is not as it should be.
pub fn warning(text: impl fmt::Display) {
    line(Priority::Warning, &text);
}

/// Something that failed.
pub fn error(text: impl fmt::Display) {
    line(Priority::Error, &text);
}

/// One line each, whatever is in `text`: part of it may come from outside.
fn format(priority: Priority, marked: bool, text: &str) -> String {
    let safe: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if marked {
        format!("<{}>{safe}\n", priority.number())
    } else {
        format!("hebed: {safe}\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_its_priority_and_stays_one_line() {
        let line = format(Priority::Warning, true, "web: off\n<0>forged\x1b[2J");
        assert_eq!(line, "<4>web: off <0>forged [2J\n");
        assert_eq!(format(Priority::Info, false, "up"), "hebed: up\n");
        assert!(format(Priority::Error, true, "x").starts_with("<3>"));
    }
}
