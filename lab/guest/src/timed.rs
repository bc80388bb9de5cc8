//! How long an order takes until its guest says certain words on its console.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lab_guest::Timed;

use crate::sys;

/// How often the console is looked at: what was seen is at most so late, and
/// later where the processor has others to run.
const EVERY: Duration = Duration::from_millis(2);
/// Longest wait.
const LIMIT: Duration = Duration::from_secs(120);

/// `lab-init timed CONSOLE WORDS PROGRAM ARGUMENT…`: runs the program, watches
/// the console's file, which is removed before, and prints a [`Timed`]. The
/// program's own words go to standard error.
pub fn run(console: &Path, words: &str, program: &[&str]) -> Result<()> {
    let (name, arguments) = program.split_first().context("no program to run")?;
    let _ = fs::remove_file(console);
    let end = Instant::now() + LIMIT;
    let began_ns = sys::realtime_ns();
    let mut child = Command::new(name)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(std::io::stderr())
        .spawn()
        .with_context(|| format!("cannot run {name}"))?;
    let (mut ended_ns, mut seen_ns) = (None, None);
    loop {
        if seen_ns.is_none() && contains(console, words) {
            seen_ns = Some(sys::realtime_ns());
        }
        if ended_ns.is_none()
            && let Some(status) = child.try_wait()?
        {
            ensure!(status.success(), "{name} ended with {status}");
            ended_ns = Some(sys::realtime_ns());
        }
        if let (Some(ended_ns), Some(seen_ns)) = (ended_ns, seen_ns) {
            let timed = Timed {
                began_ns,
                ended_ns,
                seen_ns,
            };
            println!("{}", serde_json::to_string(&timed)?);
            return Ok(());
        }
        if Instant::now() > end {
            bail!("'{words}' did not appear in {}", console.display());
        }
        thread::sleep(EVERY);
    }
}

fn contains(console: &Path, words: &str) -> bool {
    fs::read(console).is_ok_and(|text| String::from_utf8_lossy(&text).contains(words))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_seen_wherever_they_are_and_not_before() {
        let folder = tempfile::tempdir().expect("a folder");
        let console = folder.path().join("console.log");
        assert!(!contains(&console, "up"));
        fs::write(&console, b"\xff boot\r\nu").expect("written");
        assert!(!contains(&console, "up"));
        fs::write(&console, b"\xff boot\r\nup\r\n").expect("written");
        assert!(contains(&console, "up"));
    }
}
