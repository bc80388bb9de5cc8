//! What is read when a sample is taken: `/proc`, the VMMs that run, and the
//! state directory. What cannot be told is left out.
//!
//! A reading takes bounded time: VMMs are asked one after the other for at most
//! [`ASK_ALL`] in all, and no more than [`FILES_MAX`] files are counted.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use hebe_api::VmmState;
use hebe_policy::ageing::{Indicator, Reading, Sample};

use crate::host::Host;
use crate::listing::run_dirs;
use crate::vmm::{STATUS_WAIT, status};

/// How often a VMM is asked: the quickest answer counts, for the others met
/// something else.
const ASKED: usize = 3;
/// How long one VMM may take here, and all of them together.
const ASK_ONE: Duration = Duration::from_secs(1);
const ASK_ALL: Duration = Duration::from_secs(5);
/// A disk request that takes so long counts as hung: Linux's own default.
const DISK_LIMIT_S: f64 = 30.0;
/// Most files that are counted in the state directory.
const FILES_MAX: usize = 10_000;

/// Readings by indicator.
type Readings = [Option<Reading>; Indicator::ALL.len()];

/// Takes a sample of the host.
pub fn sample(host: &Host) -> io::Result<Sample> {
    sample_with(host, &vmms(host))
}

/// As [`sample`], with VMMs left alone: while they are being suspended or
/// resumed, their answers would tell of that.
pub fn sample_quietly(host: &Host) -> io::Result<Sample> {
    sample_with(host, &[])
}

fn sample_with(host: &Host, vmms: &[Answered]) -> io::Result<Sample> {
    let now = hebe_sys::clock::stamp_now();
    Ok(Sample {
        boot: hebe_sys::proc::boot_id()?,
        up_s: hebe_sys::proc::since_boot_ns() as f64 / 1e9,
        at_s: now.realtime_ns as f64 / 1e9,
        readings: readings(Path::new("/proc"), &host.layout.state, vmms),
    })
}

/// How a VMM answered.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Answered {
    /// How long it took.
    pub took: Duration,
    /// How long its guest's disk requests take, where it says so.
    pub disk_request_ns: Option<u64>,
}

/// Asks the VMMs whose VMs run. Those that are not reached in time are not in
/// it, except the one that did not answer: for its time is up, too.
fn vmms(host: &Host) -> Vec<Answered> {
    let (began, mut all) = (Instant::now(), Vec::new());
    for name in run_dirs(host).unwrap_or_default() {
        if began.elapsed() > ASK_ALL {
            break;
        }
        all.extend(ask(&host.layout.socket(&name)));
    }
    all
}

fn ask(socket: &Path) -> Option<Answered> {
    let mut best: Option<Answered> = None;
    for _ in 0..ASKED {
        let asked = Instant::now();
        let answer = status(socket, ASK_ONE);
        let took = asked.elapsed();
        let Ok(status) = answer else {
            // Nobody listens, or it is late: the latter is a finding.
            let late = Answered {
                took,
                disk_request_ns: None,
            };
            return best.or((took >= ASK_ONE).then_some(late));
        };
        if status.state != VmmState::Running {
            return None;
        }
        let answered = Answered {
            took,
            disk_request_ns: status.disk_request_ns,
        };
        if best.is_none_or(|best| took < best.took) {
            best = Some(answered);
        }
    }
    best
}

/// What a `/proc`, a state directory and the VMMs tell.
pub fn readings(proc: &Path, state: &Path, vmms: &[Answered]) -> Readings {
    let text = |file: &str| fs::read_to_string(proc.join(file)).unwrap_or_default();
    let memory = text("meminfo");
    let total = kib(&memory, "MemTotal:");
    let own = OwnMemory::of(proc);
    Indicator::ALL.map(|indicator| match indicator {
        Indicator::MemoryAvailable => reading(kib(&memory, "MemAvailable:")?, 0.0),
        Indicator::Slab => reading(kib(&memory, "SUnreclaim:")?, total?),
        Indicator::Fragmentation => reading(fragmentation(&text("buddyinfo"))?, 1.0),
        Indicator::OpenFiles => {
            let text = text("sys/fs/file-nr");
            let mut words = text.split_whitespace();
            reading(words.next()?.parse().ok()?, words.nth(1)?.parse().ok()?)
        }
        Indicator::Threads => {
            let text = text("loadavg");
            let threads = text.split_whitespace().nth(3)?.split('/').nth(1)?;
            let limit = fs::read_to_string(proc.join("sys/kernel/threads-max")).ok()?;
            reading(threads.parse().ok()?, number(&limit)?)
        }
        Indicator::Swap => {
            let limit = kib(&memory, "SwapTotal:").filter(|total| *total > 0.0)?;
            reading(limit - kib(&memory, "SwapFree:")?, limit)
        }
        Indicator::VmmMemory => reading(mean(&own.vmms)?, total? / own.vmms.len() as f64),
        Indicator::DaemonMemory => reading(own.daemon?, total?),
        Indicator::VmmResponse => {
            let took: Vec<f64> = vmms.iter().map(|v| v.took.as_secs_f64()).collect();
            reading(mean(&took)?, STATUS_WAIT.as_secs_f64())
        }
        Indicator::DiskRequest => {
            let ns = vmms.iter().filter_map(|v| v.disk_request_ns);
            let took: Vec<f64> = ns.map(|ns| ns as f64 / 1e9).collect();
            reading(mean(&took)?, DISK_LIMIT_S)
        }
        Indicator::StateFiles => state_files(state),
    })
}

fn reading(value: f64, limit: f64) -> Option<Reading> {
    Some(Reading { value, limit })
}

fn mean(values: &[f64]) -> Option<f64> {
    let count = values.len() as f64;
    (count > 0.0).then(|| values.iter().sum::<f64>() / count)
}

fn number(text: &str) -> Option<f64> {
    text.trim().parse().ok()
}

/// A field of meminfo or status, in bytes.
fn kib(text: &str, name: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    number(line.trim().strip_suffix("kB")?).map(|kib| kib * 1024.0)
}

/// The part of free memory in pieces below 2 MiB (order 9 of 4 KiB pages): of
/// it no huge page can be made, for guest RAM or for its page tables.
fn fragmentation(buddyinfo: &str) -> Option<f64> {
    let (mut small, mut all) = (0.0, 0.0);
    for line in buddyinfo.lines() {
        let counts = line.split_once("zone")?.1.split_whitespace().skip(1);
        for (order, count) in counts.enumerate() {
            let pages = number(count)? * 2f64.powi(order as i32);
            all += pages;
            if order < 9 {
                small += pages;
            }
        }
    }
    (all > 0.0).then(|| small / all)
}

/// What the product's processes have for themselves.
#[derive(Default)]
struct OwnMemory {
    vmms: Vec<f64>,
    daemon: Option<f64>,
}

impl OwnMemory {
    /// A process may end while it is read.
    fn of(proc: &Path) -> Self {
        let mut own = Self::default();
        for entry in fs::read_dir(proc).into_iter().flatten().flatten() {
            let is_process = entry.file_name().to_string_lossy().parse::<u32>().is_ok();
            if !is_process {
                continue;
            }
            let text = |file: &str| fs::read_to_string(entry.path().join(file));
            let name = text("comm").unwrap_or_default();
            let resident = || kib(&text("status").unwrap_or_default(), "RssAnon:");
            match name.trim() {
                "hebe-vmm" => own.vmms.extend(resident()),
                "hebed" => own.daemon = resident().or(own.daemon),
                _ => {}
            }
        }
        own
    }
}

/// What lies below the state directory, as the disk counts it; exhausted when
/// its file system is full. The samples themselves are left out: their file
/// grows to its size once. None where there is no such directory.
fn state_files(state: &Path) -> Option<Reading> {
    let room = rustix::fs::statvfs(state).ok()?;
    let mut folders = vec![state.to_owned()];
    let (mut bytes, mut seen) = (0, 0);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            seen += 1;
            if seen > FILES_MAX {
                return None;
            }
            // Does not follow links.
            let Ok(meta) = entry.metadata() else {
                continue;
            };
            if meta.is_dir() && entry.file_name() != "ageing" {
                folders.push(entry.path());
            } else if meta.is_file() {
                bytes += meta.blocks() * 512;
            }
        }
    }
    let free = room.f_bavail.saturating_mul(room.f_frsize);
    reading(bytes as f64, bytes as f64 + free as f64)
}
