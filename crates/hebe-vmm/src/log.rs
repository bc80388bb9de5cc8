//! The VMM's log: one JSON object a line on standard error, which `hebe`
//! sends to a file. Nothing on the pause path logs.

use std::io::Write;
use std::sync::Arc;

use hebe_devices::EventLog;
use serde_json::json;

/// Notes something that an operator may want to know.
pub(crate) fn note(text: &str) {
    write_line("info", text);
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
        note(&format!("PCI slot {slot}: {text}"));
    }
}

pub(crate) fn device_log() -> Arc<dyn EventLog> {
    Arc::new(DeviceLog)
}
