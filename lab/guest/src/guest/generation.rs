//! What the guest's kernel makes of the VM generation ID (drivers/virt/vmgenid.c).

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use lab_guest::status::GenerationCheck;

/// The driver, as a driver of ACPI devices and, in newer kernels, of platform
/// devices.
const DRIVERS: [&str; 2] = [
    "/sys/bus/acpi/drivers/vmgenid",
    "/sys/bus/platform/drivers/vmgenid",
];
/// What the kernel says when the ID has changed (drivers/char/random.c).
const RESEEDED: &str = "crng reseeded due to virtual machine fork";
/// Longest record of the kernel's log (`PRINTK_MESSAGE_MAX` and its prefix).
const RECORD_MAX: usize = 8 << 10;

pub fn look() -> Result<GenerationCheck> {
    Ok(GenerationCheck {
        bound: DRIVERS.iter().any(|driver| is_bound(Path::new(driver))),
        changes: reseeds().context("the kernel's log cannot be read")?,
    })
}

/// A driver's folder has a link for each of its devices, and one for its module.
fn is_bound(driver: &Path) -> bool {
    let entries = fs::read_dir(driver).into_iter().flatten().flatten();
    let mut devices = entries.filter(|entry| entry.file_name() != "module");
    devices.any(|entry| entry.path().is_symlink())
}

fn reseeds() -> io::Result<u64> {
    let mut log = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/kmsg")?;
    let mut record = vec![0; RECORD_MAX];
    let mut found = 0;
    loop {
        match log.read(&mut record) {
            Ok(0) => return Ok(found),
            Ok(len) if String::from_utf8_lossy(&record[..len]).contains(RESEEDED) => found += 1,
            Ok(_) => {}
            // Records were overwritten before they were read.
            Err(e) if e.raw_os_error() == Some(libc::EPIPE) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(found),
            Err(e) => return Err(e),
        }
    }
}
