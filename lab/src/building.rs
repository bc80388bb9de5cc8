//! Builds that take minutes: their output goes to a file, and they say how far
//! they are.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::progress::Progress;

/// How often a build says how far it is.
const REPORT_EVERY: Duration = Duration::from_secs(15);
/// Lines of the output that a failure shows.
const SHOWN_LINES: usize = 20;

/// Runs make or ninja with its output in `log`, a line for each step.
pub fn run_logged(
    command: &mut Command,
    log: &Path,
    what: &str,
    progress: &dyn Progress,
) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let file = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
    let copy = file.try_clone().context("cannot share the log")?;
    let mut child = command
        .stdout(file)
        .stderr(copy)
        .spawn()
        .with_context(|| format!("cannot run {program}"))?;
    let begin = Instant::now();
    let mut said = begin;
    let status = loop {
        if let Some(status) = child
            .try_wait()
            .with_context(|| format!("cannot wait for {program}"))?
        {
            break status;
        }
        std::thread::sleep(Duration::from_millis(500));
        if said.elapsed() >= REPORT_EVERY {
            said = Instant::now();
            let steps = fs::read_to_string(log).map_or(0, |text| text.lines().count());
            progress.step(&format!(
                "{what}: {} s, {steps} files",
                begin.elapsed().as_secs()
            ));
        }
    };
    if !status.success() {
        let text = fs::read(log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        bail!(
            "{program} ended with {status} (all of it in {}): {}",
            log.display(),
            lines[lines.len().saturating_sub(SHOWN_LINES)..].join("\n")
        );
    }
    Ok(())
}
