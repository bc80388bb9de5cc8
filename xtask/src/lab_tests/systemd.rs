//! A Debian 12 host with systemd as PID 1 and the package installed: what
//! becomes of a VM, whatever is done to the host.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::assets::KernelName;
use lab::probe;
use lab::scenario::{GUEST_LIMIT, GuestSpec, Lab, LabOptions};
use lab::trial::{self, Method, Trial};
use lab_guest::status::GenerationCheck;

use super::{package, state};
use crate::demo;
use crate::test::Scene;

const OLD: KernelName = KernelName::V6_1Cloud;
/// Its guests look at the VM generation ID; Debian's 6.1 for clouds has no
/// driver for it.
const NEW: KernelName = KernelName::V7_3Cloud;

/// An ordinary service, whose stop takes a moment and notes when it was, and
/// how the VM was then.
const SERVICE: &str = "[Unit]
Description=An ordinary service of the host

[Service]
ExecStart=/bin/sleep infinity
ExecStop=/bin/sh -c 'sleep 1; hebe list --json > /data/service.vms; date +%%s%%N > /data/service.down'
";
/// VMs join a bridge that systemd-networkd makes.
const BRIDGE: &str = "[Unit]
Wants=sys-subsystem-net-devices-br0.device
After=sys-subsystem-net-devices-br0.device
";
/// The event is killed as soon as it has begun.
const KILLED: &str = "[Service]
ExecStop=
ExecStop=/bin/sh -c '/usr/bin/hebe host stopping & sleep 0.3; kill -9 $! && echo yes > /data/event.killed; exit 9'
";

/// How often a VM is started from a unit: what keeps such a unit from its end is a
/// matter of moments.
const STARTS: u32 = 5;

/// One VM goes through a stop by hand, two kexecs and a reset.
pub fn run(scene: &Scene) -> Result<()> {
    let guests = [GuestSpec {
        disk: true,
        append: "lab.disk_ms=200".to_owned(),
        generation_id: true,
        ..GuestSpec::numbered(0, NEW)
    }];
    let options = LabOptions {
        host: OLD,
        others: vec![NEW],
        system: Some(package::system()),
        guest_kernels: vec![NEW],
        guest_disks: vec![("vm1".to_owned(), 64)],
        product: package::PROGRAMS.to_vec(),
        ..LabOptions::default()
    };
    let mut lab = Lab::boot(scene.assets, options, scene.progress)?;
    scene.progress.step("installing the package");
    install(&lab)?;
    scene.progress.step("starting a VM from a unit that ends");
    start(&mut lab, &guests)?;
    let first = lab.wait_for_guests(&guests)?.remove(0).boot_id;
    stop_by_hand(&lab, &guests[0], &first)?;
    generation(&lab, &guests[0], 0).context("before a reboot")?;

    scene.progress.step("systemctl kexec into 7.3");
    let load = order(&["hebe", "reboot", "--load"], lab.reboot_arguments(NEW));
    let words: Vec<&str> = load.iter().map(String::as_str).collect();
    lab.machine.exec_ok(&words)?;
    let argv = ["sh", "-c", "systemctl kexec && exec sleep 10000"];
    let trial = trial::reboot_by(
        &mut lab,
        &guests,
        Method::Warm,
        &order(&argv, vec![]),
        scene.progress,
    )?;
    check(&lab, &trial, "7.3", "systemctl kexec")?;
    // Its new VMM has the same.
    limited(&lab, &guests[0])?;

    scene
        .progress
        .step("hebe reboot into 6.1, with the event killed as it begins");
    lab.machine.agent.put(
        "/etc/systemd/system/hebe-freeze.service.d/kill.conf",
        0o644,
        KILLED.as_bytes(),
    )?;
    lab.machine.exec_ok(&["systemctl", "daemon-reload"])?;
    let argv = order(&["hebe", "reboot"], lab.reboot_arguments(OLD));
    let trial = trial::reboot_by(&mut lab, &guests, Method::Warm, &argv, scene.progress)?;
    check(&lab, &trial, "6.1", "hebe reboot")?;
    generation(&lab, &guests[0], 0).context("after two warm reboots")?;
    let killed = lab.machine.agent.get("/data/event.killed");
    killed.context("the event came to its end before it was killed")?;
    lab.machine
        .exec_ok(&["rm", "/etc/systemd/system/hebe-freeze.service.d/kill.conf"])?;
    lab.machine.exec_ok(&["systemctl", "daemon-reload"])?;

    scene
        .progress
        .step("systemctl reboot: the VM is saved and restored");
    let argv = ["sh", "-c", "systemctl reboot && exec sleep 10000"];
    let trial = trial::reboot_by(
        &mut lab,
        &guests,
        Method::Saved,
        &order(&argv, vec![]),
        scene.progress,
    )?;
    check(&lab, &trial, "6.1", "systemctl reboot")?;
    limited(&lab, &guests[0])?;
    ensure!(
        trial.vms[0].boot_id_after == first,
        "it is still the first boot"
    );
    generation(&lab, &guests[0], 1).context("after a restore from a file")?;
    lab.machine.check()?;
    lab.machine.power_off()
}

fn order(words: &[&str], more: Vec<String>) -> Vec<String> {
    words.iter().map(|w| (*w).to_owned()).chain(more).collect()
}

fn install(lab: &Lab) -> Result<()> {
    let agent = &lab.machine.agent;
    for (path, text) in [
        ("ordinary.service", SERVICE),
        ("hebe-resume.service.d/bridge.conf", BRIDGE),
    ] {
        let path = format!("/etc/systemd/system/{path}");
        agent.put(&path, 0o644, text.as_bytes())?;
    }
    package::install(lab)?;
    lab.machine
        .exec_ok(&["systemctl", "start", "ordinary.service"])
        .map(drop)
}

/// Whoever starts it is stopped with all its processes; the VMM is not one.
fn start(lab: &mut Lab, guests: &[GuestSpec]) -> Result<()> {
    for guest in guests {
        lab.define(guest)?;
        let argv = [
            "systemd-run",
            "--wait",
            "--collect",
            "--quiet",
            "/usr/bin/hebe",
            "start",
            &guest.name,
        ];
        lab.machine
            .exec_ok(&argv)
            .with_context(|| what_is_there(lab))?;
        // The unit ends each time, whoever of VMM and PID 1 is the faster.
        for _ in 1..STARTS {
            let stop = ["hebe", "stop", &guest.name, "--force", "--timeout", "0"];
            lab.machine.exec_ok(&stop)?;
            let started = lab.machine.exec_ok(&argv);
            started.with_context(|| what_is_there(lab))?;
        }
    }
    let groups = lab.machine.exec_ok(&[
        "systemctl",
        "--no-pager",
        "--plain",
        "list-units",
        "hebe-vm-*",
    ])?;
    ensure!(
        groups.contains("hebe-vm-vm1-"),
        "no scope of its own: {groups}"
    );
    guests.iter().try_for_each(|guest| limited(lab, guest))
}

/// For whoever looks for the reason: who runs, who waits for what, and what the
/// journal says.
fn what_is_there(lab: &Lab) -> String {
    let script = "ps -eo pid,ppid,stat,wchan:24,etimes,args --sort=pid | grep -v '\\]$'; \
        systemctl list-jobs; systemctl --plain list-units 'hebe*' 'run-*'; \
        tail -n 20 /run/hebe/vms/*/log; journalctl -b -n 60 --no-pager";
    let told = lab.machine.exec(&["sh", "-c", script]);
    told.map_or_else(|e| e.to_string(), |output| output.all_text())
}

/// Its VMM can exhaust neither memory nor tasks: systemd did as it was told, and the
/// kernel says so.
fn limited(lab: &Lab, guest: &GuestSpec) -> Result<()> {
    let shown = in_its_scope(lab, &guest.name)?;
    let limits = &shown["limits"];
    let scope = limits["path"].as_str().context("no group")?;
    let read = |file: &str| -> Result<u64> {
        let path = format!("/sys/fs/cgroup{scope}/{file}");
        let text = lab.machine.exec_ok(&["cat", &path])?;
        text.trim()
            .parse()
            .with_context(|| format!("{file} is {text}"))
    };
    let (high, max, swap) = (
        read("memory.high")?,
        read("memory.max")?,
        read("memory.swap.max")?,
    );
    let now = read("memory.current")?;
    ensure!(
        now < high && high < max && max == swap,
        "{now} {high} {max} {swap}"
    );
    ensure!(max > 1 << 30, "{max} is no generous room");
    ensure!(limits["memory_max"] == max, "{limits}");
    ensure!(read("pids.max")? == 256 && limits["tasks_max"] == 256);
    println!(
        "    {}: {} MiB and {} threads in use, of {} MiB and 256",
        guest.name,
        now >> 20,
        read("pids.current")?,
        max >> 20
    );
    Ok(())
}

/// What `hebe show` says of a VM in its scope. Whoever starts it waits for systemd for
/// a moment alone, and an emulated one may take longer.
pub(super) fn in_its_scope(lab: &Lab, name: &str) -> Result<serde_json::Value> {
    let scope = format!("/hebe.slice/hebe-vm-{name}-");
    let end = Instant::now() + GUEST_LIMIT;
    loop {
        let shown = super::json(lab, &["/usr/bin/hebe", "show", name, "--json"])?;
        let path = shown["limits"]["path"].as_str();
        if path.is_some_and(|path| path.starts_with(&scope)) {
            return Ok(shown);
        }
        ensure!(Instant::now() < end, "it is not in its scope: {shown}");
        std::thread::sleep(Duration::from_millis(500));
    }
}

fn stop_by_hand(lab: &Lab, guest: &GuestSpec, boot_id: &str) -> Result<()> {
    lab.machine
        .exec_ok(&["systemctl", "stop", "hebe-freeze.service"])?;
    let status = probe::wait_for_guest(&lab.ports(guest)?, GUEST_LIMIT, || Ok(()))?;
    ensure!(status.boot_id == boot_id, "the guest was touched");
    let (state, why) = state(lab, &guest.name)?;
    ensure!(state == "running", "{state}: {why}");
    lab.machine
        .exec_ok(&["systemctl", "start", "hebe-freeze.service"])?;
    let failed = lab.machine.exec_ok(&[
        "systemctl",
        "list-units",
        "--failed",
        "--plain",
        "--no-legend",
        "hebe*",
    ])?;
    ensure!(failed.trim().is_empty(), "{failed}");
    Ok(())
}

/// The guest's kernel looks at the ID, and was told this often that it changed.
fn generation(lab: &Lab, guest: &GuestSpec, changes: u64) -> Result<()> {
    let end = Instant::now() + GUEST_LIMIT;
    loop {
        let ports = lab.ports(guest)?;
        let body = match probe::http_get(ports.http, "/generation", Duration::from_secs(30)) {
            Ok(body) => body,
            // A connection may be lost on its way.
            Err(_) if Instant::now() < end => continue,
            Err(error) => return Err(error),
        };
        let found: GenerationCheck = serde_json::from_slice(&body)?;
        ensure!(found.bound, "no driver is bound to the generation ID");
        if found.changes == changes {
            return Ok(());
        }
        ensure!(
            found.changes < changes && Instant::now() < end,
            "the kernel was told {} times that its generation changed, not {changes} times",
            found.changes
        );
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// The guest lived on, and ran until the host's services were down.
fn check(lab: &Lab, trial: &Trial, version: &str, what: &str) -> Result<()> {
    demo::check(trial).context(what.to_owned())?;
    ensure!(
        trial.host.kernel_after.starts_with(version),
        "{what}: the host runs {}",
        trial.host.kernel_after
    );
    let text = |path: &str| -> Result<String> {
        let bytes = lab
            .machine
            .agent
            .get(path)
            .with_context(|| format!("{what}: no {path}"))?;
        Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
    };
    let down_ns: u64 = text("/data/service.down")?.parse().context("no time")?;
    let vms = text("/data/service.vms")?;
    ensure!(
        vms.contains("\"running\""),
        "{what}: no VM ran while a service was stopped: {vms}"
    );
    let events = trial.report["events"]
        .as_array()
        .with_context(|| format!("{what}: no report: {}", trial.report))?;
    let stopped = events
        .iter()
        .find(|e| e["vm"] == "vm1" && e["kind"] == "suspend-asked")
        .and_then(|e| e["realtime_ns"].as_u64())
        .with_context(|| format!("{what}: no suspend in {}", trial.report))?;
    ensure!(
        down_ns < stopped,
        "{what}: the VM was suspended at {stopped}, and a service stopped at {down_ns}"
    );
    println!(
        "    {what}: suspended {:.1} s after the last service was down; without answer for {:.1} s (emulated)",
        (stopped - down_ns) as f64 / 1e9,
        trial.vms[0].downtime_ms / 1000.0
    );
    // For the next round.
    lab.machine
        .exec_ok(&["rm", "/data/service.down", "/data/service.vms"])?;
    lab.machine
        .exec_ok(&["systemctl", "start", "ordinary.service"])
        .map(drop)
}

/// What lies between the new kernel's entry and the resume, for
/// docs/operating.md ("No VM is resumed in the initramfs").
pub(super) fn tell_start(lab: &Lab) -> Result<()> {
    let of = |words: &[&str], property: &str| -> Result<f64> {
        let property = format!("--property={property}");
        let argv = [&["systemctl", "show", "--value", &property], words].concat();
        let us: f64 = lab.machine.exec_ok(&argv)?.trim().parse()?;
        Ok(us / 1e6)
    };
    let unit = ["hebe-resume.service"];
    println!(
        "    after the kernel's entry: systemd at {:.1} s, the resume from {:.1} s to {:.1} s (emulated)",
        of(&[], "UserspaceTimestampMonotonic")?,
        of(&unit, "ExecMainStartTimestampMonotonic")?,
        of(&unit, "ExecMainExitTimestampMonotonic")?,
    );
    Ok(())
}
