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
    if !wait_for(device, Duration::from_secs(60)) {
        bail!("the kernel made no /dev/dax0.0");
    }
    Ok(())
}

/// Waits until the kernel has probed its pmem ranges.
pub fn settle() {
    // Reading this attribute blocks until asynchronous probing is over.
    let _ = fs::read("/sys/bus/nd/devices/ndbus0/wait_probe");
}

/// Waits for a path; says whether it appeared in time.
pub fn wait_for(path: &Path, limit: Duration) -> bool {
    let end = Instant::now() + limit;
    while !path.exists() {
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

/// Fills a devdax device with a pattern, or checks it; returns bad pages.
///
/// A test aid: shows whether the reserved range outlives a kernel.
pub fn pattern(device: &str, fill: bool) -> Result<u64> {
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(device)
        .with_context(|| format!("cannot open {device}"))?;
    let name = device.rsplit('/').next().unwrap_or(device);
    let size = fs::read_to_string(format!("/sys/bus/dax/devices/{name}/size"))?;
    let len: usize = size.trim().parse()?;
    // SAFETY: a fresh shared mapping of the device, as long as the device;
    // nothing else in this process refers to it.
    let start = unsafe {
        rustix::mm::mmap(
            std::ptr::null_mut(),
            len,
            rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE,
            rustix::mm::MapFlags::SHARED,
            &file,
            0,
        )
    }
    .with_context(|| format!("cannot map {device}"))?;
    let mut bad = 0;
    for page in 0..len / 4096 {
        // SAFETY: `page` lies inside the mapping made above, which stays for
        // the rest of the process's life.
        let words =
            unsafe { std::slice::from_raw_parts_mut(start.cast::<u64>().add(page * 512), 512) };
        let word = |i: usize| (page as u64 * 512 + i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        if fill {
            for (i, to) in words.iter_mut().enumerate() {
                *to = word(i);
            }
        } else if words.iter().enumerate().any(|(i, have)| *have != word(i)) {
            bad += 1;
        }
    }
    Ok(bad)
}

/// Turns one bit of a devdax device over: what a stray write would do.
pub fn flip(device: &str, offset: &str) -> Result<u64> {
    let offset: u64 = offset.parse().context("the offset is not a number")?;
    let file = fs::File::options().read(true).write(true).open(device)?;
    let granule = offset & !((2 << 20) - 1);
    let flags = rustix::mm::MapFlags::SHARED;
    let access = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE;
    // SAFETY: a fresh shared mapping of one granule, at an address that the
    // kernel chooses; it is used below alone and unmapped by the exit.
    let map =
        unsafe { rustix::mm::mmap(std::ptr::null_mut(), 2 << 20, access, flags, &file, granule)? };
    // SAFETY: `offset - granule` is less than the mapping's length.
    unsafe {
        let byte = map.cast::<u8>().add((offset - granule) as usize);
        byte.write_volatile(byte.read_volatile() ^ 1);
    }
    Ok(0)
}
