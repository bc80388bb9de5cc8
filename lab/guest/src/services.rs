//! Programs that a host starts by itself at each boot, as its distribution
//! would: one command a line in a file on the data disk.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result};
use lab_guest::{SERVICES, SERVICES_LOG};

/// Starts them all; their words go to a file that outlives the kernel.
pub fn start() -> Result<()> {
    let Ok(text) = fs::read_to_string(SERVICES) else {
        return Ok(());
    };
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let Some(program) = words.next() else {
            continue;
        };
        let log = File::options()
            .create(true)
            .append(true)
            .open(SERVICES_LOG)?;
        let mut child = Command::new(program)
            .args(words)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot run {program}"))?;
        println!("LAB: service {line}");
        thread::spawn(move || child.wait());
    }
    Ok(())
}
