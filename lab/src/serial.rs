//! The machine's serial line: kept in a file, watched for kernel failures.

use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// What a kernel in trouble prints.
const ALARMS: [&str; 8] = [
    "BUG:",
    "Oops",
    "Kernel panic",
    "soft lockup",
    "general protection fault",
    "Call Trace:",
    "LAB: PANIC",
    "rcu_sched detected stalls",
];

/// The serial log of one machine.
#[derive(Clone, Debug)]
pub struct Serial {
    path: PathBuf,
}

impl Serial {
    /// The log in `path`.
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
    }

    /// The log's file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Everything printed so far.
    pub fn text(&self) -> Result<String> {
        let bytes = std::fs::read(&self.path)
            .with_context(|| format!("cannot read {}", self.path.display()))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// How much was printed so far, in bytes.
    pub fn len(&self) -> u64 {
        std::fs::metadata(&self.path).map_or(0, |m| m.len())
    }

    /// Nothing was printed yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Waits until `word` is printed after the first `from` bytes, and says
    /// when that was seen; it is looked for every few milliseconds.
    pub fn wait_for(&self, word: &str, from: u64, limit: Duration) -> Result<Instant> {
        let end = Instant::now() + limit;
        loop {
            let mut file = std::fs::File::open(&self.path)
                .with_context(|| format!("cannot read {}", self.path.display()))?;
            let mut bytes = Vec::new();
            file.seek(SeekFrom::Start(from))?;
            file.read_to_end(&mut bytes)?;
            let now = Instant::now();
            if String::from_utf8_lossy(&bytes).contains(word) {
                return Ok(now);
            }
            if now > end {
                bail!("the serial line did not show '{word}'");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Lines that tell of a kernel failure.
    pub fn alarms(&self) -> Result<Vec<String>> {
        Ok(alarms_in(&self.text()?))
    }

    /// The TSC stamps that init left: `LAB: <label> <tsc>`.
    pub fn stamps(&self) -> Result<Vec<(String, u64)>> {
        Ok(stamps_in(&self.text()?))
    }

    /// The last `count` lines.
    pub fn tail(&self, count: usize) -> String {
        let text = self.text().unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(count)..].join("\n")
    }
}

/// Lines of a kernel's output that tell of a failure.
pub fn alarms_in(text: &str) -> Vec<String> {
    text.lines()
        .filter(|line| ALARMS.iter().any(|alarm| line.contains(alarm)))
        .map(str::to_owned)
        .collect()
}

fn stamps_in(text: &str) -> Vec<(String, u64)> {
    text.lines()
        .filter_map(|line| {
            let (label, tsc) = line.trim().strip_prefix("LAB: ")?.rsplit_once(' ')?;
            Some((label.to_owned(), tsc.parse().ok()?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alarms_and_stamps_are_found() {
        let text = "LAB: userspace 123\r\n[ 1.0] BUG: unable to handle page fault\nLAB: hebe resume: exit status: 0\nfine\n";
        assert_eq!(alarms_in(text).len(), 1);
        assert_eq!(stamps_in(text)[0], ("userspace".to_owned(), 123));
    }
}
