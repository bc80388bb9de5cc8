//! A Debian 12 host with systemd as PID 1 and the package installed: what
//! becomes of a VM, whatever is done to the host.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::assets::KernelName;
use lab::binaries::{Program, workspace_root};
use lab::probe;
use lab::scenario::{GuestSpec, Lab, LabOptions};
use lab::system::System;
use lab::trial::{self, Method, Trial};

use super::state;
use crate::test::Scene;
use crate::{deb, demo};

const OLD: KernelName = KernelName::V6_1Cloud;
const NEW: KernelName = KernelName::V7_3Cloud;
const HEBED: Program = Program {
    package: "hebed",
    name: "hebed",
};
/// Where the lab's programs are built.
const BUILT: &str = "target/lab/x86_64-unknown-linux-gnu/lab";

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

/// One VM goes through a stop by hand, two kexecs and a reset.
pub fn run(scene: &Scene) -> Result<()> {
    let guests = [GuestSpec {
        disk: true,
        append: "lab.disk_ms=200".to_owned(),
        ..GuestSpec::numbered(0, OLD)
    }];
    let options = LabOptions {
        host: OLD,
        others: vec![NEW],
        system: Some(System::debian12()),
        guest_disks: vec![("vm1".to_owned(), 64)],
        product: vec![lab::binaries::HEBE, lab::binaries::HEBE_VMM, HEBED],
        ..LabOptions::default()
    };
    let mut lab = Lab::boot(scene.assets, options, scene.progress)?;
    scene.progress.step("installing the package");
    install(&lab)?;
    scene.progress.step("starting a VM from a unit that ends");
    start(&mut lab, &guests)?;
    let first = lab.wait_for_guests(&guests)?.remove(0).boot_id;
    stop_by_hand(&lab, &guests[0], &first)?;

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
    ensure!(
        trial.vms[0].boot_id_after == first,
        "it is still the first boot"
    );
    lab.machine.check()?;
    lab.machine.power_off()
}

fn order(words: &[&str], more: Vec<String>) -> Vec<String> {
    words.iter().map(|w| (*w).to_owned()).chain(more).collect()
}

fn install(lab: &Lab) -> Result<()> {
    let root = workspace_root();
    let package = deb::pack(&root.join(BUILT), &root.join("target/lab/deb"))?;
    let bytes = fs::read(&package).context("no package")?;
    let agent = &lab.machine.agent;
    agent.put("/data/hebe.deb", 0o644, &bytes)?;
    agent.put(
        "/etc/systemd/system/ordinary.service",
        0o644,
        SERVICE.as_bytes(),
    )?;
    lab.machine.exec_ok(&[
        "mkdir",
        "-p",
        "/etc/systemd/system/hebe-resume.service.d",
        "/etc/systemd/system/hebe-freeze.service.d",
    ])?;
    agent.put(
        "/etc/systemd/system/hebe-resume.service.d/bridge.conf",
        0o644,
        BRIDGE.as_bytes(),
    )?;
    lab.machine.exec_ok(&["dpkg", "-i", "/data/hebe.deb"])?;
    let active = lab.machine.exec_ok(&[
        "systemctl",
        "is-active",
        "hebe-freeze.service",
        "hebed.service",
    ])?;
    ensure!(active.split_whitespace().all(|w| w == "active"), "{active}");
    let enabled = lab.machine.exec_ok(&[
        "systemctl",
        "is-enabled",
        "hebe-freeze.service",
        "hebe-resume.service",
    ])?;
    ensure!(
        enabled.split_whitespace().all(|w| w == "enabled"),
        "{enabled}"
    );
    // Once more changes nothing, as an upgrade.
    lab.machine.exec_ok(&["dpkg", "-i", "/data/hebe.deb"])?;
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
        lab.machine.exec_ok(&argv)?;
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
    Ok(())
}

fn stop_by_hand(lab: &Lab, guest: &GuestSpec, boot_id: &str) -> Result<()> {
    lab.machine
        .exec_ok(&["systemctl", "stop", "hebe-freeze.service"])?;
    let status = probe::guest_status(&lab.ports(guest)?, Duration::from_secs(30))?;
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
