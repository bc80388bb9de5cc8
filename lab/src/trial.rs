//! One reboot of a lab host, watched from outside.

use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use lab_guest::proto::HostStatus;
pub use lab_guest::status::GuestStatus;
use serde::Serialize;

use crate::agent::patience;
use crate::assets::KernelName;
use crate::peer;
use crate::probe::{self, Probe, ProbeRecord};
use crate::progress::Progress;
use crate::scenario::{GuestSpec, Lab, host_files};

/// Longest time from the order to the next kernel's settled user space.
const REBOOT_LIMIT: Duration = Duration::from_secs(1200);
/// The same where systemd goes down before it and comes up after it.
const SYSTEM_REBOOT_LIMIT: Duration = Duration::from_secs(1800);
/// How long guests are watched before the order and after the last of them
/// answers again.
const WATCH: Duration = Duration::from_secs(3);
/// How long a guest's checkers may take to go on: what they do is small, and the
/// guest runs on an emulated machine.
const WORK_LIMIT: Duration = Duration::from_secs(300);
/// How close a guest's clock is looked at, and how often at most.
const UNSURE_MS: f64 = 100.0;
const CLOCK_LOOKS: u32 = 10;
/// Where the order's output goes in the lab host; outlives the kernel.
const LOG: &str = "/data/reboot.log";

/// How VMs get over the reboot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Frozen in memory.
    Warm,
    /// Saved to disk.
    Saved,
    /// Shut down and booted again.
    Cold,
    /// Frozen in memory by QEMU's cpr-reboot, the peer ([`crate::peer`]).
    QemuCpr,
}

impl Method {
    /// Every method.
    pub const ALL: [Self; 4] = [Self::Warm, Self::Saved, Self::Cold, Self::QemuCpr];

    /// The word on `hebe`'s command line, and in the benches.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Warm => "warm",
            Self::Saved => "saved",
            Self::Cold => "cold",
            Self::QemuCpr => "qemu-cpr",
        }
    }
}

impl FromStr for Method {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match Self::ALL.into_iter().find(|m| m.as_str() == text) {
            Some(method) => Ok(method),
            None => bail!(
                "'{text}' is no method: use warm, saved or cold, or, in `bench reboot`, qemu-cpr"
            ),
        }
    }
}

/// The host before and after.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HostRow {
    /// `uname -r` before.
    pub kernel_before: String,
    /// `uname -r` after.
    pub kernel_after: String,
    /// Boot id before.
    pub boot_id_before: String,
    /// Boot id after.
    pub boot_id_after: String,
}

/// One VM before and after.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct VmRow {
    /// Its name.
    pub name: String,
    /// The guest kernel's boot id before.
    pub boot_id_before: String,
    /// And after: the same if the guest lived on.
    pub boot_id_after: String,
    /// The guest's uptime before, in seconds.
    pub uptime_before_s: f64,
    /// And after.
    pub uptime_after_s: f64,
    /// The TCP session held all the time is the same one, and every byte of
    /// it came back in order.
    pub tcp_session_survived: bool,
    /// The guest's checker went on over the same working set and found no
    /// wrong page.
    pub memory_check_ok: bool,
    /// Longest time without a reply to a UDP probe, seen from outside, in milliseconds.
    pub downtime_ms: f64,
    /// Times the guest's monotonic clock went backwards.
    pub monotonic_backwards: u64,
    /// How far the guest's wall clock was behind its host's before, in
    /// milliseconds; the answer's way is part of the figure.
    pub wall_clock_off_before_ms: f64,
    /// And after, behind the new host kernel's.
    pub wall_clock_off_ms: f64,
    /// How far off both of these together may be, because an answer's way through a
    /// busy machine takes its time.
    pub wall_clock_unsure_ms: f64,
    /// Longest time without an answer of the slow-starting service, asked
    /// twice a second; only where the guest has one.
    pub slow_service_downtime_ms: Option<f64>,
}

/// What a reboot did to the host and to each VM.
#[derive(Clone, Debug, Serialize)]
pub struct Trial {
    /// How VMs got over it.
    pub method: Method,
    /// The host.
    pub host: HostRow,
    /// Each VM.
    pub vms: Vec<VmRow>,
    /// The product's own report (`hebe reboot --report --json`).
    pub report: serde_json::Value,
    /// Raw probe samples of each VM, in the same order.
    #[serde(skip)]
    pub raw: Vec<ProbeRecord>,
    /// What the guests said before it.
    #[serde(skip)]
    pub before: Vec<GuestStatus>,
    /// What the guests said after it.
    #[serde(skip)]
    pub after: Vec<GuestStatus>,
}

/// Reboots the host under its guests, watching them from outside. The guests
/// are QEMU's ([`peer::start`]) where the method is its, and Hebe's otherwise.
///
/// # Errors
/// An [`EmulatorFailure`](crate::machine::EmulatorFailure) where there is
/// evidence of one, whatever it led to.
pub fn reboot(
    lab: &mut Lab,
    guests: &[GuestSpec],
    method: Method,
    kernel: KernelName,
    extra: &[&str],
    progress: &dyn Progress,
) -> Result<Trial> {
    let argv = arguments(lab, method, kernel, extra)?;
    progress.step(&format!("{} reboot into {kernel}", method.as_str()));
    reboot_by(lab, guests, method, &argv, progress)
}

/// [`reboot`], by a command that is left running as long as the old kernel.
///
/// # Errors
/// The same.
pub fn reboot_by(
    lab: &mut Lab,
    guests: &[GuestSpec],
    method: Method,
    argv: &[String],
    progress: &dyn Progress,
) -> Result<Trial> {
    let result = watched(lab, guests, method, argv, progress);
    result.map_err(|error| {
        // A VMM that ends takes a moment to say why.
        std::thread::sleep(WATCH);
        lab.blame(guests, error)
    })
}

fn watched(
    lab: &mut Lab,
    guests: &[GuestSpec],
    method: Method,
    argv: &[String],
    progress: &dyn Progress,
) -> Result<Trial> {
    let up = lab.wait_for_guests(guests)?;
    let before = at_work(lab, guests, &up)?;
    wait_for_slow(lab, guests)?;
    let behind_before = clocks_behind(lab, guests)?;
    let host_before = lab.boot.clone();
    let mut probes = Vec::new();
    for guest in guests {
        let (ports, slow) = (lab.ports(guest)?, guest.has_slow_service());
        probes.push(Probe::start_every(guest.probe_every, &ports, slow)?);
    }
    std::thread::sleep(WATCH);
    if method != Method::QemuCpr {
        lab.all_running(guests)?;
    }
    let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
    let host_after = order(lab, &argv)?;
    check_resumes(lab, guests)?;
    progress.step("waiting for the guests");
    let first = lab.wait_for_guests(guests)?;
    wait_for_slow(lab, guests)?;
    std::thread::sleep(WATCH);
    lab.machine.check()?;
    let after = at_work(lab, guests, &first)?;
    let behind_after = clocks_behind(lab, guests)?;
    for guest in guests {
        if let Some(alarm) = lab.guest_alarms(guest).first() {
            bail!("the kernel of {} is in trouble: {alarm}", guest.name);
        }
    }
    let raw = probes
        .into_iter()
        .map(Probe::finish)
        .collect::<Result<Vec<_>>>()?;
    let report = report(lab, method)?;
    let vms = (0..guests.len())
        .map(|i| {
            row(
                &guests[i],
                [&before[i], &first[i], &after[i]],
                &raw[i],
                [behind_before[i], behind_after[i]],
            )
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(Trial {
        method,
        host: host_row(&host_before, &host_after),
        vms,
        report,
        raw,
        before,
        after,
    })
}

/// The order, as the host is given it.
fn arguments(lab: &Lab, method: Method, kernel: KernelName, extra: &[&str]) -> Result<Vec<String>> {
    if method == Method::QemuCpr {
        if !lab.options.peer {
            bail!("this host has no VMs of QEMU: qemu-cpr is for `cargo xtask bench reboot`");
        }
        let (image, initrd) = host_files(kernel);
        return Ok(peer::order(&image, &initrd, &lab.host_cmdline()));
    }
    let words = ["hebe", "reboot", "--method", method.as_str()];
    let mut argv: Vec<String> = words.map(str::to_owned).into();
    argv.extend(lab.reboot_arguments(kernel));
    argv.extend(extra.iter().map(|word| (*word).to_owned()));
    Ok(argv)
}

/// Gives the order and waits for the next kernel; an order that ends while
/// the old kernel goes on has failed.
fn order(lab: &mut Lab, argv: &[&str]) -> Result<HostStatus> {
    let old = lab.boot.boot_id.clone();
    let pid = lab.machine.agent.spawn(argv, LOG)?;
    let limit = match lab.options.system {
        Some(_) => SYSTEM_REBOOT_LIMIT,
        None => REBOOT_LIMIT,
    };
    let begun = Instant::now();
    let end = begun + limit;
    let agent = lab.machine.agent;
    let same_kernel = || agent.status(patience(begun)).map(|s| s.boot_id == old);
    loop {
        match same_kernel() {
            Ok(false) => break,
            Ok(true) => {
                // Its last act may be under way, so the kernel is asked after it.
                let ended = agent.alive(pid).is_ok_and(|alive| !alive);
                std::thread::sleep(Duration::from_millis(200));
                if ended && same_kernel().is_ok_and(|same| same) {
                    bail!("`{}` came back: {}", argv.join(" "), log_text(lab));
                }
            }
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
        lab.machine.check()?;
        if Instant::now() > end {
            bail!(
                "`{}` did not reboot the host: {}",
                argv.join(" "),
                log_text(lab)
            );
        }
    }
    lab.wait_for_next_boot()
}

/// Fails at once when the host said that a guest did not come back.
fn check_resumes(lab: &Lab, guests: &[GuestSpec]) -> Result<()> {
    let text = lab.machine.serial.text()?;
    for guest in guests {
        let by = |vmm: &str| format!("{vmm} {}: failed", guest.name);
        let (ours, peer) = (by("LAB: hebe"), by("peer"));
        let failed = |line: &&str| line.contains(&ours) || line.contains(&peer);
        if let Some(line) = text.lines().find(failed) {
            bail!("{line}");
        }
    }
    Ok(())
}

fn log_text(lab: &Lab) -> String {
    let bytes = lab.machine.agent.get(LOG).unwrap_or_default();
    String::from_utf8_lossy(&bytes).trim().to_owned()
}

/// The order's own report; none where the product cannot tell.
fn report(lab: &Lab, method: Method) -> Result<serde_json::Value> {
    if method == Method::QemuCpr {
        return peer::report(lab);
    }
    let output = lab.machine.exec(&["hebe", "reboot", "--report", "--json"]);
    let text = output.map(|o| o.stdout).unwrap_or_default();
    Ok(serde_json::from_slice(&text).unwrap_or(serde_json::Value::Null))
}

fn host_row(before: &HostStatus, after: &HostStatus) -> HostRow {
    HostRow {
        kernel_before: before.kernel.clone(),
        kernel_after: after.kernel.clone(),
        boot_id_before: before.boot_id.clone(),
        boot_id_after: after.boot_id.clone(),
    }
}

/// Waits until the slow services that guests were given answer.
fn wait_for_slow(lab: &Lab, guests: &[GuestSpec]) -> Result<()> {
    for guest in guests.iter().filter(|g| g.has_slow_service()) {
        let port = lab.ports(guest)?.slow;
        let end = Instant::now() + REBOOT_LIMIT;
        while let Err(e) = probe::http_get(port, "/", Duration::from_secs(2)) {
            if Instant::now() > end {
                return Err(e)
                    .with_context(|| format!("the slow service of {} is silent", guest.name));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    Ok(())
}

fn row(
    guest: &GuestSpec,
    [before, first, after]: [&GuestStatus; 3],
    raw: &ProbeRecord,
    behind: [Behind; 2],
) -> Result<VmRow> {
    let gap = raw.udp.longest_gap();
    let gap = gap.with_context(|| format!("{} never answered a probe", guest.name))?;
    if !gap.ended {
        bail!(
            "{} stopped answering probes and did not begin again",
            guest.name
        );
    }
    let checked = &after.memory_check;
    Ok(VmRow {
        name: guest.name.clone(),
        boot_id_before: before.boot_id.clone(),
        boot_id_after: after.boot_id.clone(),
        uptime_before_s: before.uptime_s,
        uptime_after_s: after.uptime_s,
        tcp_session_survived: raw.tcp.survived(),
        memory_check_ok: before.boot_id == after.boot_id
            && checked.errors == 0
            && checked.pages > 0
            && checked.verified > first.memory_check.verified
            && first.memory_check.verified >= before.memory_check.verified,
        downtime_ms: gap.ms(),
        monotonic_backwards: after.monotonic_backwards,
        wall_clock_off_before_ms: behind[0].ms,
        wall_clock_off_ms: behind[1].ms,
        wall_clock_unsure_ms: behind[0].unsure_ms + behind[1].unsure_ms,
        slow_service_downtime_ms: raw
            .slow
            .as_ref()
            .and_then(|s| s.longest_gap())
            .map(|g| g.ms()),
    })
}

/// Waits until the memory checkers, and the disk writers of guests that have one,
/// have gone on since they told `since`; as they are when they do not, for whoever
/// judges them.
fn at_work(lab: &mut Lab, guests: &[GuestSpec], since: &[GuestStatus]) -> Result<Vec<GuestStatus>> {
    let end = Instant::now() + WORK_LIMIT;
    loop {
        let now = lab.wait_for_guests(guests)?;
        let mut rows = guests.iter().zip(since.iter().zip(&now));
        let all = rows.all(|(guest, (since, now))| has_worked(guest, since, now));
        if all || Instant::now() > end {
            return Ok(now);
        }
        std::thread::sleep(Duration::from_millis(500));
    }
}

fn has_worked(guest: &GuestSpec, since: &GuestStatus, now: &GuestStatus) -> bool {
    let written = |status: &GuestStatus| status.disk.as_ref().map_or(0, |disk| disk.fsyncs);
    let checked =
        guest.memcheck_mib == 0 || now.memory_check.verified > since.memory_check.verified;
    let wrote = !guest.has_disk_writer() || written(now) > written(since);
    since.boot_id != now.boot_id || (checked && wrote)
}

/// A guest's wall clock beside its host's.
#[derive(Clone, Copy, Debug)]
struct Behind {
    /// How far it is behind it.
    ms: f64,
    /// And how far off that may be.
    unsure_ms: f64,
}

/// How far each guest's wall clock is behind the host's. The host's own clock
/// starts from a hardware clock with whole seconds, so it is no measure of
/// the time here. It is read before the guest's and after it: the guest's was read
/// in between, however long that took.
fn clocks_behind(lab: &Lab, guests: &[GuestSpec]) -> Result<Vec<Behind>> {
    let limit = Duration::from_secs(20);
    let host_ns = || -> Result<i128> { Ok(lab.machine.agent.status(limit)?.realtime_ns.into()) };
    let look = |guest: &GuestSpec| -> Result<Behind> {
        let earliest = host_ns()?;
        let status = probe::guest_status(&lab.ports(guest)?, limit);
        let status = status.with_context(|| format!("{} does not tell the time", guest.name))?;
        let latest = host_ns()?;
        let twice = earliest + latest - 2 * i128::from(status.realtime_ns);
        Ok(Behind {
            ms: twice as f64 / 2e6,
            unsure_ms: (latest - earliest).max(0) as f64 / 2e6,
        })
    };
    let closest = |guest: &GuestSpec| -> Result<Behind> {
        let mut best = again(|| look(guest))?;
        for _ in 1..CLOCK_LOOKS {
            if best.unsure_ms <= UNSURE_MS {
                break;
            }
            let next = again(|| look(guest))?;
            best = if next.unsure_ms < best.unsure_ms {
                next
            } else {
                best
            };
        }
        Ok(best)
    };
    guests.iter().map(closest).collect()
}

/// Asks again a few times: QEMU's user network may lose a connection while
/// the machine is busy with itself.
fn again<T>(ask: impl Fn() -> Result<T>) -> Result<T> {
    const TRIES: u32 = 6;
    for _ in 1..TRIES {
        match ask() {
            Ok(answer) => return Ok(answer),
            Err(_) => std::thread::sleep(Duration::from_millis(500)),
        }
    }
    ask()
}
