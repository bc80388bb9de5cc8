//! The agent in guests of two stock kernels: over virtio sockets, across a
//! suspend and a warm reboot; and a panic that the host is told of.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::assets::KernelName;
use lab::binaries::HEBE_AGENT;
use lab::probe;
use lab::scenario::{GuestSpec, Lab, LabOptions};
use lab::trial::{self, Method};
use serde_json::Value;

use crate::demo;
use crate::test::Scene;

const OLD: KernelName = KernelName::V6_1Cloud;
const NEW: KernelName = KernelName::V7_3Cloud;

/// How long something of the guest's own may take in an emulated machine.
const PATIENCE: Duration = Duration::from_secs(240);
/// How long the disk writer is watched while its file system is frozen.
const FROZEN: Duration = Duration::from_secs(3);
/// In what time it must have been looked at, before the freeze ends by itself; and
/// how many are tried.
const FREEZE_SEEN: Duration = Duration::from_secs(50);
const FREEZES: u32 = 5;

pub fn run(scene: &Scene) -> Result<()> {
    let first = GuestSpec {
        disk: true,
        append: "lab.disk_ms=200 lab.exec=1".to_owned(),
        agent: true,
        ..GuestSpec::numbered(0, OLD)
    };
    let second = GuestSpec {
        agent: true,
        ..GuestSpec::numbered(1, NEW)
    };
    let guests = [first, second];
    let options = LabOptions {
        host: OLD,
        others: vec![NEW],
        guest_kernels: vec![OLD, NEW],
        guest_disks: vec![("vm1".to_owned(), 64)],
        guest_programs: vec![HEBE_AGENT],
        ..LabOptions::default()
    };
    let mut lab = Lab::boot(scene.assets, options, scene.progress)?;
    lab.start(&guests)?;
    // Its guest may not have come to start its agent yet.
    let wait = ["wait", "up", "--timeout", "600"];
    let waited = order(&lab, "vm1", &wait)?;
    ensure!(
        waited["facts"]["phase"] == "up",
        "no phase was waited for: {waited}"
    );
    let boots = ping_all(&mut lab, &guests).context("after the start")?;

    scene.progress.note("  suspend and resume");
    for order in ["suspend", "resume"] {
        lab.machine.exec_ok(&["hebe", order, "vm1", "vm2"])?;
    }
    ensure!(
        ping_all(&mut lab, &guests).context("after a resume")? == boots,
        "other boots answer after a resume"
    );
    let trial = trial::reboot(&mut lab, &guests, Method::Warm, NEW, &[], scene.progress)?;
    demo::check(&trial)?;
    ensure!(
        ping_all(&mut lab, &guests).context("after a warm reboot")? == boots,
        "other boots answer after a warm reboot"
    );

    scene
        .progress
        .note("  a program, frozen file systems, the clock, a panic");
    programs(&lab)?;
    frozen_file_systems(&lab, &guests[0])?;
    let begun = Instant::now();
    let ahead = order(&lab, "vm1", &["time"])?;
    let ns = ahead["was-ahead"]["ns"].as_i64();
    // A warm reboot leaves the clock right; the emulated machine is slow, and what
    // the order took on its way is part of the figure.
    let most = Duration::from_secs(5) + begun.elapsed();
    ensure!(
        ns.is_some_and(|ns| u128::from(ns.unsigned_abs()) < most.as_nanos()),
        "the guest's clock was off: {ahead}"
    );
    panic(&lab, &guests[1])?;
    lab.machine.check()?;
    lab.machine.power_off()
}

/// What an agent answers to an order.
fn order(lab: &Lab, name: &str, words: &[&str]) -> Result<Value> {
    let argv = [&["hebe", "agent", name], words, &["--json"]].concat();
    super::json(lab, &argv)
}

/// A guest that serves may not have come to start its agent yet.
fn ping(lab: &Lab, name: &str) -> Result<Value> {
    let end = Instant::now() + PATIENCE;
    loop {
        match order(lab, name, &["ping"]) {
            Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(500)),
            done => return done,
        }
    }
}

/// The boots that the agents tell of, which are those that the guests tell of.
fn ping_all(lab: &mut Lab, guests: &[GuestSpec]) -> Result<Vec<String>> {
    let statuses = lab.wait_for_guests(guests)?;
    let pairs = guests.iter().zip(statuses);
    pairs
        .map(|(guest, status)| {
            let done = ping(lab, &guest.name)?;
            let boot = done["facts"]["boot_id"].as_str().unwrap_or_default();
            ensure!(
                boot == status.boot_id,
                "{}: the agent tells of boot '{boot}', the guest of '{}': {done}",
                guest.name,
                status.boot_id
            );
            Ok(boot.to_owned())
        })
        .collect()
}

/// A program runs in the guest that allows it; its outputs and its end are passed on.
fn programs(lab: &Lab) -> Result<()> {
    let program = "/bin/hebe-agent";
    let order = ["hebe", "agent", "vm1", "exec", "--", program, "--version"];
    let text = lab.machine.exec_ok(&order)?;
    ensure!(text.starts_with("hebe-agent "), "it wrote: {text}");
    let order = ["hebe", "agent", "vm1", "exec", "--", program, "--no-such"];
    let output = lab.machine.exec(&order)?;
    ensure!(
        output.code == Some(2) && output.all_text().contains("Usage"),
        "a program that fails ended with {:?}: {}",
        output.code,
        output.all_text()
    );
    let order = ["hebe", "agent", "vm2", "exec", "--", program, "--version"];
    super::refused(lab, &order, &["--allow-exec"])
}

/// The disk writer stands still while its file system is frozen, and only then.
fn frozen_file_systems(lab: &Lab, guest: &GuestSpec) -> Result<()> {
    let ports = lab.ports(guest)?;
    let fsyncs = || -> Result<u64> {
        let status = probe::wait_for_guest(&ports, PATIENCE, || Ok(()))?;
        let disk = status.disk.context("no disk writer runs")?;
        ensure!(disk.errors == 0, "{} disk errors", disk.errors);
        Ok(disk.fsyncs)
    };
    let mut seen = None;
    for _ in 0..FREEZES {
        let begun = Instant::now();
        let frozen = order(lab, &guest.name, &["freeze", "--for", "60"])?;
        ensure!(
            frozen["file-systems"]["count"] == 1,
            "not one file system was frozen: {frozen}"
        );
        // One write may have been under way, and is counted when the guest comes to it.
        let mut before = fsyncs()?;
        loop {
            std::thread::sleep(Duration::from_secs(1));
            let now = fsyncs()?;
            if now == before || begun.elapsed() > FREEZE_SEEN {
                break;
            }
            before = now;
        }
        std::thread::sleep(FROZEN);
        let after = fsyncs()?;
        if begun.elapsed() > FREEZE_SEEN {
            // It may have ended while this was looked at.
            let _ = order(lab, &guest.name, &["thaw"]);
            continue;
        }
        ensure!(
            before == after,
            "{before} fsyncs, then {after}, while frozen"
        );
        seen = Some(after);
        break;
    }
    let after = seen.context("no freeze was seen in time, or fsyncs go on in every one")?;
    order(lab, &guest.name, &["thaw"])?;
    let end = Instant::now() + PATIENCE;
    while fsyncs()? == after {
        ensure!(Instant::now() < end, "nothing is written after the thaw");
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// A guest whose kernel panics runs on, and the list says so.
fn panic(lab: &Lab, guest: &GuestSpec) -> Result<()> {
    let (state, told) = super::state(lab, &guest.name)?;
    ensure!(
        state == "running" && !told.contains("panicked"),
        "{state}, {told} before it panicked"
    );
    let end = Instant::now() + PATIENCE;
    loop {
        // The answer never comes; a request may be lost on its way.
        let _ = probe::http_get(lab.ports(guest)?.http, "/panic", Duration::from_secs(5));
        let (state, told) = super::state(lab, &guest.name)?;
        if told.contains("panicked") {
            ensure!(state == "running", "{state}, {told}");
            return Ok(());
        }
        ensure!(
            Instant::now() < end,
            "nothing tells of the panic: {state}, {told}"
        );
        std::thread::sleep(Duration::from_millis(200));
    }
}
