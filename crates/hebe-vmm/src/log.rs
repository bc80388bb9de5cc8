//! The VMM's log: one JSON object a line on standard error, which `hebe`
//! sends to a file. Nothing on the pause path logs.

use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hebe_devices::EventLog;
use serde_json::json;

/// Lines that a guest may bring about at once: a device stops with a reason, a
/// reset is noted. A guest can do that without end, and the log lies in memory
/// that the whole host shares.
const GUEST_LINES_MAX: u32 = 256;
/// And one more after so long.
const GUEST_LINE_EVERY: Duration = Duration::from_secs(60);

static GUEST: Mutex<Guest> = Mutex::new(Guest {
    lines_left: GUEST_LINES_MAX,
    counted: None,
    dropped: 0,
});

/// How much its guest may still say.
struct Guest {
    lines_left: u32,
    /// Up to when `lines_left` has grown.
    counted: Option<Instant>,
    /// Lines that were not written since one was.
    dropped: u64,
}

impl Guest {
    /// Whether a line is written `now`, and how many were not before it.
    fn say(&mut self, now: Instant) -> Option<u64> {
        let counted = *self.counted.get_or_insert(now);
        let periods = now.saturating_duration_since(counted).as_secs() / GUEST_LINE_EVERY.as_secs();
        let grown = u32::try_from(periods).unwrap_or(u32::MAX);
        if grown > 0 {
            self.lines_left = self.lines_left.saturating_add(grown).min(GUEST_LINES_MAX);
            self.counted = Some(now);
        }
        match self.lines_left.checked_sub(1) {
            Some(left) => {
                self.lines_left = left;
                Some(std::mem::take(&mut self.dropped))
            }
            None => {
                self.dropped += 1;
                None
            }
        }
    }
}

/// Notes something that an operator may want to know.
pub(crate) fn note(text: &str) {
    write_line("info", text);
}

/// Notes what the guest brought about, as long as that is not too much.
pub(crate) fn note_of_guest(text: &str) {
    let mut guest = GUEST.lock().unwrap_or_else(PoisonError::into_inner);
    match guest.say(Instant::now()) {
        None => {}
        Some(0) => note(text),
        Some(dropped) => note(&format!(
            "{text} (before this, {dropped} lines on the guest's doings were left out)"
        )),
    }
}

/// Notes something that went wrong.
pub fn log_error(text: &str) {
    write_line("error", text);
}

fn write_line(level: &str, text: &str) {
    let realtime_ns = hebe_sys::clock::stamp_now().realtime_ns;
    let line = json!({ "realtime_ns": realtime_ns, "level": level, "text": text });
    // A log that cannot be written must not harm the VM.
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// Where devices report.
#[derive(Debug)]
struct DeviceLog;

impl EventLog for DeviceLog {
    fn event(&self, slot: u8, text: &str) {
        note_of_guest(&format!("PCI slot {slot}: {text}"));
    }
}

pub(crate) fn device_log() -> Arc<dyn EventLog> {
    Arc::new(DeviceLog)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_says_so_much_at_once_and_little_afterwards() {
        let mut guest = Guest {
            lines_left: GUEST_LINES_MAX,
            counted: None,
            dropped: 0,
        };
        let begun = Instant::now();
        let lines = |guest: &mut Guest, now| (0..10_000).filter_map(|_| guest.say(now)).count();
        assert_eq!(lines(&mut guest, begun), GUEST_LINES_MAX as usize);
        // What was left out is told of.
        let minute = begun + GUEST_LINE_EVERY;
        let left_out = 10_000 - u64::from(GUEST_LINES_MAX);
        assert_eq!(guest.say(minute), Some(left_out));
        let seconds = 1..=24 * 3600;
        let later = seconds.filter(|s| guest.say(minute + Duration::from_secs(*s)).is_some());
        assert_eq!(later.count(), 24 * 60);
        // A quiet guest has its lines again, and no more.
        let later = minute + Duration::from_secs(1 << 40);
        assert_eq!(lines(&mut guest, later), GUEST_LINES_MAX as usize);
    }
}
