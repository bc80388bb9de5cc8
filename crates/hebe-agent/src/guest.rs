//! What the agent does to its guest.

use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use crate::freeze::{Freezer, mounts, table};
use crate::protocol::{Facts, is_phase};

/// Where the phase stands, in a directory that is empty after a boot.
pub const PHASE_FILE: &str = "/run/hebe-agent/phase";
/// The phase of a guest that says nothing of it.
const PHASE_UP: &str = "up";

/// A guest, as the agent needs it.
pub trait Guest: Send + Sync {
    /// How it is; protocol and release are filled in elsewhere.
    fn facts(&self) -> Facts;
    /// Sets the wall clock; says how far it was ahead, in nanoseconds.
    ///
    /// # Errors
    /// What the system says.
    fn set_time(&self, realtime_ns: u64) -> io::Result<i64>;
    /// Freezes file systems for at most `time` from now on; says how many.
    ///
    /// # Errors
    /// Why none is frozen, or no longer: also where they were thawed, or time
    /// was over, before all were frozen.
    fn freeze(&self, time: Duration) -> Result<u32, String>;
    /// Thaws them, also while a freeze is under way, which ends by it; says
    /// how many.
    ///
    /// # Errors
    /// Why they are as they were.
    fn thaw(&self) -> Result<u32, String>;
    /// Begins to shut down.
    ///
    /// # Errors
    /// What the system says.
    fn shut_down(&self, reboot: bool) -> io::Result<()>;
}

/// The Linux that the agent runs in.
#[derive(Default)]
pub struct Linux {
    freezer: Arc<Freezer>,
}

impl Guest for Linux {
    fn facts(&self) -> Facts {
        let text = |path| fs::read_to_string(path).unwrap_or_default();
        let boot_id = text("/proc/sys/kernel/random/boot_id").trim().to_owned();
        let uptime = text("/proc/uptime");
        let uptime_s = uptime.split('.').next().and_then(|s| s.parse().ok());
        Facts {
            phase: phase(Path::new(PHASE_FILE)),
            boot_id,
            uptime_s: uptime_s.unwrap_or(0),
            frozen: self.freezer.is_frozen(),
            ..Facts::default()
        }
    }

    fn set_time(&self, realtime_ns: u64) -> io::Result<i64> {
        let mut now = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // Ten digits of seconds: no overflow.
        let wanted = libc::timespec {
            tv_sec: (realtime_ns / 1_000_000_000).cast_signed(),
            tv_nsec: (realtime_ns % 1_000_000_000).cast_signed(),
        };
        // SAFETY: both calls get a pointer to a live timespec.
        let set = unsafe {
            libc::clock_gettime(libc::CLOCK_REALTIME, &raw mut now);
            libc::clock_settime(libc::CLOCK_REALTIME, &raw const wanted)
        };
        if set != 0 {
            return Err(io::Error::last_os_error());
        }
        let was = i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec);
        let ahead = was - i128::from(realtime_ns);
        Ok(i64::try_from(ahead).unwrap_or(if ahead < 0 { i64::MIN } else { i64::MAX }))
    }

    fn freeze(&self, time: Duration) -> Result<u32, String> {
        self.freezer.freeze(&mounts(&table()?), time)
    }

    fn thaw(&self) -> Result<u32, String> {
        self.freezer.thaw()
    }

    fn shut_down(&self, reboot: bool) -> io::Result<()> {
        let systemd = Path::new("/run/systemd/system").exists();
        let word = if reboot { "reboot" } else { "poweroff" };
        let mut command = if systemd {
            let mut command = Command::new("systemctl");
            command.arg(word);
            command
        } else {
            Command::new(word)
        };
        let quiet = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let status = quiet.status()?;
        if !status.success() {
            return Err(io::Error::other(format!("`{word}` ended with {status}")));
        }
        Ok(())
    }
}

/// The phase that stands in a file.
fn phase(file: &Path) -> String {
    let text = fs::read_to_string(file).unwrap_or_default();
    let text = text.trim();
    let text = if is_phase(text) { text } else { PHASE_UP };
    text.to_owned()
}

/// Notes the guest's phase, for `hebe-agent phase NAME`.
///
/// # Errors
/// If it is no phase, or cannot be noted.
pub fn set_phase(file: &Path, phase: &str) -> io::Result<()> {
    if !is_phase(phase) {
        let why = format!("'{phase}' is no phase: 1 to 64 of a-z, 0-9 and '-'");
        return Err(io::Error::other(why));
    }
    if let Some(dir) = file.parent() {
        fs::create_dir_all(dir)?;
    }
    // Whole or not at all: the agent may read it now.
    let part = file.with_extension("part");
    fs::write(&part, phase)?;
    fs::rename(part, file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phase_is_what_the_guest_says_if_it_is_one() {
        let dir = tempfile::tempdir().expect("dir");
        let file = dir.path().join("run/phase");
        assert_eq!(phase(&file), "up");
        set_phase(&file, "ready").expect("set");
        assert_eq!(phase(&file), "ready");
        assert!(set_phase(&file, "no good").is_err());
        assert_eq!(phase(&file), "ready");
        fs::write(&file, "\x1b[31m").expect("write");
        assert_eq!(phase(&file), "up");
    }

    #[test]
    fn thawing_what_is_not_frozen_is_refused() {
        let guest = Linux::default();
        assert!(
            guest
                .thaw()
                .is_err_and(|why| why.contains("no file system"))
        );
        let facts = guest.facts();
        assert!(!facts.frozen && !facts.boot_id.is_empty());
    }
}
