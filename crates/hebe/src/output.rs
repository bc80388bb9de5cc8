//! What people and programs get to read.

use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::OnceLock;

use hebe_host::HostError;
use hebe_host::agent::AgentError;
use hebe_host::listing::with_cause;
use hebe_types::VmName;
use serde::Serialize;

use crate::plain::steers;

/// How a command ended. The numbers are part of the interface; `hebe --help`
/// lists them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Done,
    /// Failed.
    Failed,
    /// A check does not hold; nothing was touched.
    CheckFailed,
    /// A reboot was undone and every VM runs.
    Undone,
    /// Some VM needs attention.
    Attention,
    /// As a program in a guest did.
    Passed(u8),
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Done => 0,
            Exit::Failed => 1,
            Exit::CheckFailed => 3,
            Exit::Undone => 4,
            Exit::Attention => 5,
            Exit::Passed(status) => status,
        })
    }
}

/// One clear sentence.
#[derive(Debug)]
pub struct Failure(pub String);

impl From<HostError> for Failure {
    fn from(error: HostError) -> Self {
        Self(with_cause(&error))
    }
}

impl From<AgentError> for Failure {
    fn from(error: AgentError) -> Self {
        Self(error.to_string())
    }
}

impl From<String> for Failure {
    fn from(text: String) -> Self {
        Self(text)
    }
}

/// What a command gives back.
pub type Outcome = Result<Exit, Failure>;

/// Why an answer could not be written.
static UNWRITTEN: OnceLock<String> = OnceLock::new();

/// Why half an answer at most is in its file, if so.
pub fn unwritten() -> Option<&'static str> {
    UNWRITTEN.get().map(String::as_str)
}

/// What leaves half a file behind. That nobody reads any more, or a console that
/// hung up, is no failure of a command.
fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
    )
}

/// Writes answers as text or as JSON. Writing never stops a command half-way:
/// a reader that went away is no reason to leave VMs in between.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    json: bool,
}

impl Output {
    /// Text, or JSON.
    pub fn new(json: bool) -> Self {
        Self { json }
    }

    /// Whether answers are JSON.
    pub fn is_json(&self) -> bool {
        self.json
    }

    /// The one answer of a command: `value` as JSON, or `text`.
    pub fn answer(&self, value: &impl Serialize, text: impl FnOnce() -> String) {
        let mut answer = if self.json {
            escaped(serde_json::to_string_pretty(value).unwrap_or_default())
        } else {
            text()
        };
        if !answer.is_empty() && !answer.ends_with('\n') {
            answer.push('\n');
        }
        self.raw(answer.as_bytes());
    }

    /// Raw bytes to stdout.
    pub fn raw(&self, bytes: &[u8]) {
        let mut stdout = io::stdout().lock();
        let written = stdout.write_all(bytes).and_then(|()| stdout.flush());
        if let Err(error) = written
            && is_full(&error)
        {
            let _ = UNWRITTEN.set(error.to_string());
        }
    }

    /// Raw bytes to stderr.
    pub fn raw_aside(&self, bytes: &[u8]) {
        let _ = io::stderr().lock().write_all(bytes);
    }

    /// A step of something that takes long; to stderr, so that stdout holds
    /// the answer only.
    pub fn progress(&self, text: &str) {
        let _ = writeln!(io::stderr().lock(), "hebe: {text}");
    }

    /// Why a command failed.
    pub fn failure(&self, failure: &Failure) {
        self.error(None, &failure.0);
        self.progress(&failure.0);
    }

    /// Why an order for one of several VMs failed.
    pub fn failure_of(&self, name: &VmName, failure: &Failure) {
        self.error(Some(name), &failure.0);
        self.progress(&failure.0);
    }

    /// What is wrong with the command line; people get to read it elsewhere.
    pub fn wrong(&self, error: &clap::Error) {
        let text = error.to_string();
        // Behind the first empty line stands how the command is used.
        let lines = text.lines().take_while(|line| !line.trim().is_empty());
        let sentence = lines.map(str::trim).collect::<Vec<_>>().join(" ");
        self.error(None, sentence.strip_prefix("error: ").unwrap_or(&sentence));
    }

    fn error(&self, name: Option<&VmName>, error: &str) {
        #[derive(Serialize)]
        struct Error<'a> {
            #[serde(skip_serializing_if = "Option::is_none")]
            name: Option<&'a VmName>,
            error: &'a str,
        }
        if self.json {
            self.answer(&Error { name, error }, String::new);
        }
    }
}

/// JSON in which what would steer a terminal is escaped: a guest's words may stand
/// in it. Line feeds are between its values only, and stay.
fn escaped(json: String) -> String {
    if !json.contains(|c| c != '\n' && steers(c)) {
        return json;
    }
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            // All that steers has four digits at most.
            c if c != '\n' && steers(c) => text.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => text.push(c),
        }
    }
    text
}

/// A table with aligned columns and a heading.
pub fn table(heading: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = heading.iter().map(|h| h.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let heading: Vec<String> = heading.iter().map(|h| (*h).to_owned()).collect();
    for row in std::iter::once(&heading).chain(rows) {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, &width)| format!("{cell:width$}"))
            .collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_steers_a_terminal_is_escaped_in_json_and_means_the_same() {
        let said = serde_json::json!({"a": ["\u{9b}31m\u{202e}\u{7f}\u{1b}[m\n", "Grüße"]});
        let text = escaped(serde_json::to_string_pretty(&said).expect("JSON"));
        assert!(!text.contains(|c| c != '\n' && steers(c)), "{text:?}");
        let read: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(read, said);
    }

    #[test]
    fn columns_are_aligned() {
        let rows = [
            vec!["web".to_owned(), "running".to_owned()],
            vec!["database".to_owned(), "frozen".to_owned()],
        ];
        let text = table(&["NAME", "STATE"], &rows);
        assert_eq!(
            text,
            "NAME      STATE\nweb       running\ndatabase  frozen\n"
        );
    }
}
