//! The control group in which the VMM is, as far as whoever started it says.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use hebe_api::{CagePart, CageReport};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::part;

/// Longest word, in bytes; it is written at once.
const WORD_MAX: usize = 4096;

/// How a VMM is confined, and what has yet to be said of that.
#[derive(Clone, Debug)]
pub struct Confined {
    report: CageReport,
    awaited: Option<Arc<Awaited>>,
}

impl Confined {
    /// As `report` says, with what is `awaited`.
    pub fn new(report: CageReport, awaited: Option<Awaited>) -> Self {
        let awaited = awaited.map(Arc::new);
        Self { report, awaited }
    }

    /// How it is now.
    pub fn report(&self) -> CageReport {
        let mut report = self.report.clone();
        // First, as where it was waited for.
        let group = self.awaited.as_ref().map(|awaited| awaited.look());
        report.parts.splice(0..0, group);
        report
    }
}

/// A word that nobody waits for.
#[derive(Debug)]
pub struct Awaited(Mutex<Word>);

#[derive(Debug)]
enum Word {
    /// It comes here.
    Open(File),
    Heard(CagePart),
}

impl Awaited {
    /// It comes by this pipe.
    ///
    /// # Errors
    /// The pipe cannot be looked at without waiting.
    pub fn by(pipe: OwnedFd) -> rustix::io::Result<Self> {
        fcntl_setfl(&pipe, fcntl_getfl(&pipe)? | OFlags::NONBLOCK)?;
        Ok(Self(Mutex::new(Word::Open(pipe.into()))))
    }

    fn look(&self) -> CagePart {
        let mut word = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let pipe = match &mut *word {
            Word::Heard(part) => return part.clone(),
            Word::Open(pipe) => pipe,
        };
        let mut room = [0; WORD_MAX];
        let len = match pipe.read(&mut room) {
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                return of(Err(
                    "whoever started this VMM has not told it yet".to_owned()
                ));
            }
            // What cannot be read is as good as nothing said.
            read => read.unwrap_or(0),
        };
        let part = of(heard(&room[..len]));
        *word = Word::Heard(part.clone());
        part
    }
}

/// The part of the cage that it is.
pub(super) fn of(outcome: Result<String, String>) -> CagePart {
    part("control group", outcome)
}

/// "on" or "off", and more about it.
pub(super) fn heard(mut word: impl Read) -> Result<String, String> {
    let mut text = String::new();
    // What cannot be read is as good as nothing said.
    let _ = word.read_to_string(&mut text);
    match text.split_once(' ') {
        Some(("on", more)) => Ok(more.to_owned()),
        Some(("off", why)) => Err(why.to_owned()),
        _ => Err("whoever started this VMM ended before that was known".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn limits_are_there_only_where_that_is_said() {
        assert_eq!(heard(&b"on 256 threads"[..]), Ok("256 threads".into()));
        assert_eq!(heard(&b"off no room"[..]), Err("no room".into()));
        for silence in [&b""[..], b"on", b"o", b"\xff\xff on x"] {
            assert!(heard(silence).is_err_and(|why| why.contains("ended")));
        }
    }

    #[test]
    fn a_word_that_nobody_waits_for_is_heard_when_it_comes_and_kept() {
        let cage = part("seccomp", Ok("all".into()));
        let report = CageReport {
            parts: vec![cage.clone()],
        };
        let told = |words: Option<&str>| {
            let (word, mut ours) = std::io::pipe().expect("pipe");
            let confined = Confined::new(
                report.clone(),
                Some(Awaited::by(word.into()).expect("a pipe")),
            );
            let before = confined.report();
            assert_eq!(before.parts.len(), 2);
            assert!(!before.parts[0].on && before.parts[0].detail.contains("yet"));
            if let Some(words) = words {
                ours.write_all(words.as_bytes()).expect("write");
            }
            drop(ours);
            let after = confined.report();
            // Kept by all who have it, over a reset of the guest.
            assert_eq!(confined.clone().report(), after);
            assert_eq!(after.parts[1], cage);
            after.parts[0].clone()
        };
        let on = told(Some("on 256 threads"));
        assert!(on.on && on.detail == "256 threads" && on.name == "control group");
        assert!(!told(Some("off no room")).on);
        let silent = told(None);
        assert!(!silent.on && silent.detail.contains("ended"), "{silent:?}");
        assert_eq!(Confined::new(report.clone(), None).report(), report);
    }
}
