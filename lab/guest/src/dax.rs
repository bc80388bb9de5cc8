//! Turns the legacy pmem namespace (`memmap=nn!ss`) into a devdax device
//! through sysfs, as ndctl would.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Alignment of the mappings: 2 MiB pages.
const ALIGN: &str = "2097152";

fn write(path: &str, value: &str) -> Result<()> {
    fs::write(path, value).with_context(|| format!("cannot write '{value}' to {path}"))
}

/// Makes `/dev/dax0.0` unless it is there.
pub fn make_devdax() -> Result<()> {
    let device = Path::new("/dev/dax0.0");
    if device.exists() {
        return Ok(());
    }
    let nd = "/sys/bus/nd";
    if Path::new(&format!("{nd}/drivers/nd_pmem/namespace0.0")).exists() {
        write(&format!("{nd}/drivers/nd_pmem/unbind"), "namespace0.0")?;
    }
    let dax = format!("{nd}/devices/dax0.0");
    write(&format!("{dax}/mode"), "pmem")?;
    write(&format!("{dax}/align"), ALIGN)?;
    write(
        &format!("{dax}/uuid"),
        fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim(),
    )?;
    write(&format!("{dax}/namespace"), "namespace0.0")?;
    write(&format!("{nd}/drivers/dax_pmem/bind"), "dax0.0")?;
    if !wait_for(device, Duration::from_secs(5)) {
        bail!("the kernel made no /dev/dax0.0");
    }
    Ok(())
}

/// Waits until the kernel has probed its pmem ranges.
pub fn settle() {
    // Reading this attribute blocks until asynchronous probing is over.
    let _ = fs::read("/sys/bus/nd/devices/ndbus0/wait_probe");
}

fn wait_for(path: &Path, limit: Duration) -> bool {
    let end = Instant::now() + limit;
    while !path.exists() {
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}
