//! `logs`: what a VM's VMM noted, or what its guest wrote to its console.
//!
//! Only files are looked at, so that a VM that is gone can still be asked what
//! came last. Both are untrusted: a console is a guest's, and a guest may have
//! taken its VMM over. Neither gets a terminal to steer, unless `--raw` is said.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use hebe_host::Host;
use jiff::Timestamp;
use rustix::fs::OFlags;
use serde_json::{Value, json};

use crate::cli::LogsArgs;
use crate::output::{Exit, Failure, Outcome, Output};
use crate::plain::{Plain, steers};

/// How often it is looked for more.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Longest line of a VMM's log that is taken as one, in bytes.
const LINE_LEN_MAX: usize = 16 << 10;

/// `hebe logs`.
pub fn logs(host: &Host, args: &LogsArgs, out: &Output) -> Outcome {
    let name = &args.name;
    let (file, what) = match args.console {
        true => ("console.log", "console"),
        false => ("log", "log"),
    };
    let path = host.layout.vm_dir(name).join(file);
    let show = match (args.console, args.raw) {
        (true, true) => Show::Bytes,
        (true, false) => Show::Console(Plain::default()),
        (false, _) => Show::Lines {
            json: out.is_json(),
            begun: Vec::new(),
        },
    };
    let failed = |e: io::Error| match e.kind() {
        io::ErrorKind::NotFound => Failure(format!(
            "there is no {what} of '{name}': {} is not there, because the VM was never started since the host booted, or was dropped; `hebe list` shows the VMs there are",
            path.display()
        )),
        _ => Failure(format!(
            "the {what} of '{name}' cannot be read: see to {} ({e})",
            path.display()
        )),
    };
    let mut log = Log::open(&path, show).map_err(failed)?;
    let mut stdout = io::stdout().lock();
    let written = match args.lines {
        None => log.earlier(&mut stdout),
        Some(lines) => {
            let mut last = Last::new(usize::try_from(lines).unwrap_or(usize::MAX));
            log.earlier(&mut last)
                .and_then(|()| last.print(&mut stdout))
        }
    };
    let written = match args.follow {
        true => written.and_then(|()| log.follow(&mut stdout)),
        false => written.and_then(|()| log.end(&mut stdout)),
    };
    match written {
        Ok(()) => Ok(Exit::Done),
        // Whoever reads has read enough.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(Exit::Done),
        Err(e) => Err(failed(e)),
    }
}

/// A log of two files: what was in the newer one goes to the older one when it
/// is too long, and the newer one begins anew.
struct Log {
    path: PathBuf,
    file: File,
    /// How far the newer one is read.
    at: u64,
    show: Show,
}

/// Neither waits for a FIFO's writer nor goes where a link leads.
fn open(path: &Path) -> io::Result<File> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let mut options = File::options();
    options.read(true).custom_flags(flags.bits() as i32);
    let file = options.open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("it is no file")),
    }
}

impl Log {
    fn open(path: &Path, show: Show) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            file: open(path)?,
            at: 0,
            show,
        })
    }

    fn old(&self) -> Option<File> {
        let mut path = self.path.as_os_str().to_owned();
        path.push(".1");
        open(Path::new(&path)).ok()
    }

    /// Everything there is.
    fn earlier(&mut self, to: &mut impl Write) -> io::Result<()> {
        if let Some(old) = self.old() {
            self.copy(&old, 0, to)?;
        }
        self.more(to)
    }

    /// What was added since.
    fn more(&mut self, to: &mut impl Write) -> io::Result<()> {
        if self.file.metadata()?.len() < self.at {
            // It began anew: what was not read yet went to the old one first.
            if let Some(old) = self.old() {
                self.copy(&old, self.at, to)?;
            }
            self.at = 0;
        }
        let file = self.file.try_clone()?;
        self.at = self.copy(&file, self.at, to)?;
        Ok(())
    }

    /// Shows `file` from `at` to its end; where that was.
    fn copy(&mut self, mut file: &File, at: u64, to: &mut impl Write) -> io::Result<u64> {
        file.seek(SeekFrom::Start(at))?;
        let mut at = at;
        let mut chunk = vec![0; 64 << 10];
        loop {
            match file.read(&mut chunk) {
                Ok(0) => return Ok(at),
                Ok(count) => {
                    at += count as u64;
                    self.show.feed(&chunk[..count], to)?;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Goes on until the log is gone.
    fn follow(&mut self, to: &mut impl Write) -> io::Result<()> {
        loop {
            self.more(to)?;
            to.flush()?;
            match fs::symlink_metadata(&self.path) {
                Ok(found) if found.ino() != self.file.metadata()?.ino() => {
                    self.file = open(&self.path)?;
                    self.at = 0;
                    continue;
                }
                Ok(_) => {}
                // The VM was dropped.
                Err(e) if e.kind() == io::ErrorKind::NotFound => return self.end(to),
                Err(e) => return Err(e),
            }
            thread::sleep(LOOK_EVERY);
        }
    }

    fn end(&mut self, to: &mut impl Write) -> io::Result<()> {
        self.show.end(to)?;
        to.flush()
    }
}

/// How a log is shown.
enum Show {
    /// As it is.
    Bytes,
    /// A console.
    Console(Plain),
    /// A VMM's log.
    Lines {
        /// As JSON.
        json: bool,
        /// The line that has not ended.
        begun: Vec<u8>,
    },
}

impl Show {
    fn feed(&mut self, bytes: &[u8], to: &mut impl Write) -> io::Result<()> {
        match self {
            Self::Bytes => to.write_all(bytes),
            Self::Console(filter) => to.write_all(filter.feed(bytes).as_bytes()),
            Self::Lines { json, begun } => {
                for &byte in bytes {
                    match byte {
                        b'\n' => to.write_all(line(&std::mem::take(begun), *json).as_bytes())?,
                        // Nobody's line: its begin has to do.
                        _ if begun.len() >= LINE_LEN_MAX => {}
                        _ => begun.push(byte),
                    }
                }
                Ok(())
            }
        }
    }

    fn end(&mut self, to: &mut impl Write) -> io::Result<()> {
        match self {
            Self::Lines { json, begun } if !begun.is_empty() => {
                to.write_all(line(&std::mem::take(begun), *json).as_bytes())
            }
            _ => Ok(()),
        }
    }
}

/// One line of a VMM's log, with its line feed. What is no JSON is what a
/// library or the kernel wrote to standard error.
fn line(bytes: &[u8], json: bool) -> String {
    let text = String::from_utf8_lossy(bytes);
    let value: Option<Value> = serde_json::from_str(&text).ok().filter(Value::is_object);
    if json {
        // Inside of JSON such a character can only stand in a string.
        return match value {
            Some(_) => escaped(&text) + "\n",
            None => {
                let line = json!({ "realtime_ns": null, "level": "stderr", "text": text });
                escaped(&line.to_string()) + "\n"
            }
        };
    }
    let word = |key| value.as_ref().and_then(|v| v[key].as_str());
    let Some(said) = word("text") else {
        return hebe_api::plain(&text) + "\n";
    };
    let when = value.as_ref().and_then(|v| v["realtime_ns"].as_u64());
    format!(
        "{}  {:5}  {}\n",
        when.and_then(time).unwrap_or_else(|| "-".into()),
        hebe_api::plain(word("level").unwrap_or("-")),
        hebe_api::plain(said)
    )
}

fn escaped(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            '\t' => text.push(c),
            c if steers(c) => text.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => text.push(c),
        }
    }
    text
}

/// An instant, as UTC.
fn time(realtime_ns: u64) -> Option<String> {
    let time = Timestamp::from_nanosecond(i128::from(realtime_ns)).ok()?;
    Some(time.strftime("%Y-%m-%d %H:%M:%S%.3fZ").to_string())
}

/// Keeps the last lines of what is written to it.
struct Last {
    lines: VecDeque<Vec<u8>>,
    begun: Vec<u8>,
    max: usize,
}

impl Last {
    fn new(max: usize) -> Self {
        Self {
            lines: VecDeque::new(),
            begun: Vec::new(),
            max,
        }
    }

    fn print(&mut self, to: &mut impl Write) -> io::Result<()> {
        for line in &self.lines {
            to.write_all(line)?;
        }
        // A prompt is a line, too, though it does not end.
        match self.max {
            0 => Ok(()),
            _ => to.write_all(&self.begun),
        }
    }
}

impl Write for Last {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for part in bytes.split_inclusive(|&b| b == b'\n') {
            self.begun.extend_from_slice(part);
            if part.ends_with(b"\n") {
                self.lines.push_back(std::mem::take(&mut self.begun));
            }
            let begun = usize::from(!self.begun.is_empty());
            while self.lines.len() + begun > self.max && self.lines.pop_front().is_some() {}
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn console(path: &Path) -> Log {
        Log::open(path, Show::Console(Plain::default())).expect("open")
    }

    #[test]
    fn a_line_of_the_vmm_has_its_time_its_level_and_its_text() {
        let given = br#"{"realtime_ns":1700000000123456789,"level":"info","text":"up"}"#;
        assert_eq!(line(given, false), "2023-11-14 22:13:20.123Z  info   up\n");
        let given = String::from_utf8_lossy(given).into_owned();
        assert_eq!(line(given.as_bytes(), true), given + "\n");
        assert_eq!(line(b"thread panicked", false), "thread panicked\n");
        let wrapped: Value = serde_json::from_str(&line(b"a\x1b[31m\xff", true)).expect("JSON");
        assert_eq!(wrapped["text"], "a\u{1b}[31m\u{fffd}");
    }

    /// A guest may have taken its VMM over.
    #[test]
    fn no_line_of_the_vmm_steers_a_terminal() {
        let bad = "\u{1b}]0;x\u{7}\u{9b}2J\u{202e}\u{7f}";
        let sound = json!({ "realtime_ns": 1, "level": bad, "text": bad }).to_string();
        let raw = format!("{{\"level\":\"{bad}\",\"text\":\"{bad}\"}}");
        for given in [bad, &sound, &raw] {
            for json in [false, true] {
                let shown = line(given.as_bytes(), json);
                let text = shown.strip_suffix('\n').expect("a line");
                assert!(!text.chars().any(steers), "{shown:?}");
                if json {
                    serde_json::from_str::<Value>(text).expect("JSON");
                }
            }
        }
    }

    #[test]
    fn the_old_part_comes_first_and_the_last_lines_are_counted_over_both() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("console.log");
        fs::write(dir.path().join("console.log.1"), "1\n2\n3").expect("write");
        fs::write(&path, "x\n4\nlogin: ").expect("write");
        let mut all = Vec::new();
        console(&path).earlier(&mut all).expect("read");
        assert_eq!(String::from_utf8_lossy(&all), "1\n2\n3x\n4\nlogin: ");
        for (lines, wanted) in [(0, ""), (1, "login: "), (3, "3x\n4\nlogin: ")] {
            let (mut last, mut shown) = (Last::new(lines), Vec::new());
            console(&path).earlier(&mut last).expect("read");
            last.print(&mut shown).expect("print");
            assert_eq!(String::from_utf8_lossy(&shown), wanted);
        }
    }

    #[test]
    fn nothing_is_missed_when_the_log_begins_anew() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("console.log");
        fs::write(&path, "1\n").expect("write");
        let (mut log, mut shown) = (console(&path), Vec::new());
        log.earlier(&mut shown).expect("read");
        // Written before and after the turn, and none of it seen in between.
        fs::write(dir.path().join("console.log.1"), "1\n2\n").expect("write");
        fs::write(&path, "3").expect("write");
        log.more(&mut shown).expect("read");
        fs::write(&path, "3\n4\n").expect("write");
        log.more(&mut shown).expect("read");
        assert_eq!(String::from_utf8_lossy(&shown), "1\n2\n3\n4\n");
    }

    #[test]
    fn links_and_fifos_are_no_logs() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("log");
        std::os::unix::fs::symlink("/etc/passwd", &path).expect("link");
        assert!(open(&path).is_err());
        let fifo = dir.path().join("fifo");
        let mode = rustix::fs::Mode::RUSR;
        let made = rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0);
        made.expect("fifo");
        assert!(open(&fifo).is_err());
    }
}
