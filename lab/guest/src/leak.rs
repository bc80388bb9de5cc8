//! A daemon that leaks: it asks for memory, uses it, and forgets it, so much a
//! second as it is told. What it holds shows in its own resident memory and in
//! what the host has left.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// Between two bites.
const EVERY: Duration = Duration::from_millis(100);
/// Bites between two lines that say how much it is.
const SAID_EVERY: u32 = 50;

/// Leaks `kib_per_s` KiB of memory a second until it is killed. What a busy
/// host keeps it from leaking in time, it leaks later.
pub fn run(kib_per_s: &str) -> Result<u64> {
    let kib_per_s: u64 = kib_per_s.parse().context("KiB a second: a number")?;
    name_it(c"leaky-daemon")?;
    let began = Instant::now();
    let mut bites: Vec<Vec<u8>> = Vec::new();
    let mut leaked = 0;
    for turn in 0u32.. {
        let due = began.elapsed().as_millis() as u64 * kib_per_s * 1024 / 1000;
        let bite = due.saturating_sub(leaked) as usize;
        // Every page is written to: memory that is only promised costs nobody.
        bites.push(vec![0x5a; bite]);
        leaked += bite as u64;
        if turn.is_multiple_of(SAID_EVERY) {
            println!("leaky-daemon: {leaked} bytes in {} bites", bites.len());
        }
        thread::sleep(EVERY);
    }
    Ok(0)
}

/// What the process is called in `/proc`.
fn name_it(name: &std::ffi::CStr) -> Result<()> {
    // SAFETY: PR_SET_NAME reads a string that ends with 0, and keeps none.
    match unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()).context("the process cannot be named"),
    }
}
