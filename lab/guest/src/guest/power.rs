//! The ACPI power button: the guest shuts down in order.

use std::fs::{self, File};
use std::io::Read;
use std::thread;

use crate::sys;

/// linux/input-event-codes.h
const EV_KEY: u16 = 1;
/// linux/input-event-codes.h
const KEY_POWER: u16 = 116;
/// `struct input_event` on 64-bit machines.
const EVENT_LEN: usize = 24;

/// Listens on every input device that the kernel offers.
pub fn start() {
    let Ok(devices) = fs::read_dir("/dev/input") else {
        return;
    };
    for device in devices.flatten() {
        if !device.file_name().to_string_lossy().starts_with("event") {
            continue;
        }
        let Ok(file) = File::open(device.path()) else {
            continue;
        };
        thread::spawn(move || listen(file));
    }
}

fn listen(mut file: File) {
    let mut event = [0; EVENT_LEN];
    while file.read_exact(&mut event).is_ok() {
        let kind = u16::from_le_bytes([event[16], event[17]]);
        let code = u16::from_le_bytes([event[18], event[19]]);
        if kind == EV_KEY && code == KEY_POWER && event[20] == 1 {
            println!("LAB: power button");
            rustix::fs::sync();
            // The disk is left as a clean file system.
            let _ = rustix::mount::unmount(super::DISK, rustix::mount::UnmountFlags::DETACH);
            rustix::fs::sync();
            println!("LAB: power off: {}", sys::reboot(sys::Reboot::PowerOff));
        }
    }
}
