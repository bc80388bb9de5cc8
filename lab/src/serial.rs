//! The machine's serial line: kept in a file, watched for kernel failures.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

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
