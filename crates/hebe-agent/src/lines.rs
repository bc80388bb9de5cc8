//! Lines with a bound and a time limit, from somebody who is not trusted.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

const CHUNK: usize = 4096;

/// Why there is no line.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// It did not come in time.
    #[error("no line came in time")]
    Late,
    /// It has no end.
    #[error("a line is longer than {0} bytes")]
    TooLong(usize),
    /// It is no text.
    #[error("a line is not UTF-8")]
    NoText,
    /// The connection broke.
    #[error("the connection broke")]
    Io(#[from] io::Error),
}

/// A stream whose reads and writes can be limited in time.
pub trait Wire: Read + Write {
    /// How long one read or write may take.
    fn limit(&self, time: Duration) -> io::Result<()>;
}

impl Wire for UnixStream {
    fn limit(&self, time: Duration) -> io::Result<()> {
        // Zero would mean for ever.
        let time = Some(time.max(Duration::from_millis(1)));
        self.set_read_timeout(time)?;
        self.set_write_timeout(time)
    }
}

/// Lines of a stream.
#[derive(Debug)]
pub struct Lines<W> {
    wire: W,
    /// What came and is no whole line yet, or more than one.
    bytes: Vec<u8>,
    max: usize,
}

impl<W: Wire> Lines<W> {
    /// Lines of at most `max` bytes.
    pub fn new(wire: W, max: usize) -> Self {
        Self {
            wire,
            bytes: Vec::new(),
            max,
        }
    }

    /// The next line, without its end; `None` at the end of the stream. After
    /// [`LineError::Late`] it can be waited for again.
    ///
    /// # Errors
    /// See [`LineError`].
    pub fn next(&mut self, until: Instant) -> Result<Option<String>, LineError> {
        loop {
            if let Some(end) = self.bytes.iter().position(|b| *b == b'\n') {
                let mut line: Vec<u8> = self.bytes.drain(..=end).collect();
                line.pop();
                return match String::from_utf8(line) {
                    Ok(line) if line.len() <= self.max => Ok(Some(line)),
                    Ok(_) => Err(LineError::TooLong(self.max)),
                    Err(_) => Err(LineError::NoText),
                };
            }
            if self.bytes.len() > self.max {
                return Err(LineError::TooLong(self.max));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(LineError::Late);
            }
            self.wire.limit(left)?;
            let mut chunk = [0; CHUNK];
            match self.wire.read(&mut chunk) {
                Ok(0) => return Ok(None),
                Ok(count) => self.bytes.extend_from_slice(&chunk[..count]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if is_late(&e) => return Err(LineError::Late),
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Writes a line.
    ///
    /// # Errors
    /// If it is not taken within `time`, or the connection broke.
    pub fn say(&mut self, line: &str, time: Duration) -> Result<(), LineError> {
        self.wire.limit(time)?;
        let line = format!("{line}\n");
        match self.wire.write_all(line.as_bytes()) {
            Err(e) if is_late(&e) => Err(LineError::Late),
            written => Ok(written?),
        }
    }
}

fn is_late(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(max: usize) -> (UnixStream, Lines<UnixStream>) {
        let (other, own) = UnixStream::pair().expect("pair");
        (other, Lines::new(own, max))
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(50)
    }

    /// For what is there already, on a computer that may be busy.
    fn in_time() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn lines_come_whole_however_they_are_cut() {
        let (mut other, mut lines) = pair(8);
        other.write_all(b"one\ntw").expect("write");
        assert_eq!(lines.next(in_time()).expect("line").as_deref(), Some("one"));
        assert!(matches!(lines.next(soon()), Err(LineError::Late)));
        other.write_all(b"o\n\n12345678\n").expect("write");
        for want in ["two", "", "12345678"] {
            assert_eq!(lines.next(in_time()).expect("line").as_deref(), Some(want));
        }
        drop(other);
        assert!(matches!(lines.next(in_time()), Ok(None)));
    }

    #[test]
    fn endless_lines_and_bytes_that_are_no_text_are_refused() {
        for bytes in [&b"123456789"[..], b"123456789\n"] {
            let (mut other, mut lines) = pair(8);
            other.write_all(bytes).expect("write");
            let refused = lines.next(in_time());
            assert!(matches!(refused, Err(LineError::TooLong(8))), "{refused:?}");
        }
        let (mut other, mut lines) = pair(8);
        other.write_all(b"\xff\xfe\n").expect("write");
        assert!(matches!(lines.next(in_time()), Err(LineError::NoText)));
    }

    #[test]
    fn a_reader_that_takes_nothing_does_not_hold_the_writer() {
        let (_other, mut lines) = pair(8);
        let long = "x".repeat(1 << 20);
        let late = lines.say(&long, Duration::from_millis(50));
        assert!(matches!(late, Err(LineError::Late)), "{late:?}");
    }
}
