//! The guest role: a small server whose state tells whether it was disturbed.
//!
//! It is quiet when idle: under emulation every wake-up of a nested guest
//! costs several exits, so checkers work in slices with sleep in between.

mod clock;
mod disk;
mod echo;
mod generation;
mod http;
mod memory;
mod power;
mod slow;

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use lab_guest::USER_SPACE;
use lab_guest::status::{DiskCheck, GuestStatus, MemoryCheck};

use crate::{agent, modules, sys};

/// Where the guest's disk is mounted, if it has one.
pub const DISK: &str = "/disk";

/// What the checkers have found, shared with the HTTP server.
#[derive(Default)]
pub struct Findings {
    /// The memory checker's.
    pub memory: Mutex<MemoryCheck>,
    /// The disk writer's.
    pub disk: Mutex<Option<DiskCheck>>,
    /// Times the monotonic clock went backwards.
    pub backwards: AtomicU64,
    /// When the slow service began to listen; 0 before.
    pub slow_ready_ns: AtomicU64,
}

/// Runs the guest until it is powered off.
pub fn run(userspace_tsc: u64) -> Result<()> {
    // Each byte to the console costs exits: only where somebody waits for it.
    if sys::cmdline_has("lab.say") {
        println!("{USER_SPACE}");
    }
    modules::load("early");
    sys::mount_pseudo("tmpfs", "/run", "mode=755")?;
    if let Err(e) = network() {
        println!("LAB: network: {e:#}");
    }
    let findings = Arc::new(Findings::default());
    echo::start_udp()?;
    echo::start_tcp()?;
    if sys::cmdline_value("lab.tools").is_some() {
        if let Err(e) = sys::mount_disk("/dev/vda", DISK, "ext4", sys::Access::Read) {
            println!("LAB: tools: {e:#}");
        }
        agent::start(userspace_tsc)?;
    } else if Path::new("/dev/vda").exists() {
        match sys::mount_disk("/dev/vda", DISK, "ext4", sys::Access::Write) {
            Ok(()) => disk::start(findings.clone()),
            Err(e) => println!("LAB: disk: {e:#}"),
        }
    }
    http::start(findings.clone())?;
    let pause = Duration::from_millis(number("lab.memcheck_ms", memory::PAUSE_MS));
    memory::start(findings.clone(), number("lab.memcheck_mib", 32), pause);
    clock::start(&findings);
    power::start();
    slow::start(&findings, number("lab.slow_work", 0));
    if sys::cmdline_value("lab.agent").is_some() {
        modules::load("agent");
        let exec = sys::cmdline_value("lab.exec").map(|_| "--allow-exec");
        if let Err(e) = Command::new("/bin/hebe-agent").args(exec).spawn() {
            println!("LAB: agent: {e}");
        }
    }
    println!("LAB: guest ready");
    loop {
        thread::park();
    }
}

/// A number from the kernel command line.
fn number(name: &str, default: u64) -> u64 {
    sys::cmdline_value(name)
        .and_then(|v| v.parse().ok())
        .unwrap_or(default)
}

fn network() -> Result<()> {
    let control = sys::NetControl::open()?;
    control.up("lo")?;
    let Some(ip) = sys::cmdline_value("lab.ip") else {
        return Ok(());
    };
    let (address, prefix) = ip.split_once('/').context("lab.ip has no prefix length")?;
    let address: Ipv4Addr = address.parse().context("lab.ip is no address")?;
    control.address(
        "eth0",
        address,
        prefix.parse().context("lab.ip has a bad prefix length")?,
    )?;
    control.up("eth0")?;
    match sys::cmdline_value("lab.gw") {
        Some(gateway) => control.gateway(gateway.parse().context("lab.gw is no address")?),
        None => Ok(()),
    }
}

/// Now, on the monotonic clock, in nanoseconds.
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// The status page's content.
pub fn status(findings: &Findings) -> GuestStatus {
    let uptime = sys::read_line("/proc/uptime");
    let slow = findings.slow_ready_ns.load(Ordering::Acquire);
    GuestStatus {
        boot_id: sys::read_line("/proc/sys/kernel/random/boot_id"),
        kernel: sys::read_line("/proc/sys/kernel/osrelease"),
        uptime_s: uptime
            .split(' ')
            .next()
            .and_then(|s| s.parse().ok())
            .unwrap_or(0.0),
        realtime_ns: sys::realtime_ns(),
        monotonic_ns: monotonic_ns(),
        memory_check: findings
            .memory
            .lock()
            .map(|m| m.clone())
            .unwrap_or_default(),
        monotonic_backwards: findings.backwards.load(Ordering::Relaxed),
        cpus: cpus() as u32,
        disk: findings.disk.lock().ok().and_then(|d| d.clone()),
        block_reads: block_reads(),
        slow_service_ready_ns: (slow != 0).then_some(slow),
    }
}

/// CPUs online.
pub fn cpus() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Blocks of 512 bytes read from the first disk (block/stat.rst, field 3).
pub fn block_reads() -> u64 {
    let stat = sys::read_line("/sys/block/vda/stat");
    stat.split_whitespace()
        .nth(2)
        .and_then(|v| v.parse().ok())
        .unwrap_or(0)
}
