//! Warm reboots that systemd carries out: it stops every service, ends every
//! process and unmounts, and PID 1 alone holds the memory of the VMs meanwhile.

use anyhow::{Context, Result, ensure};
use lab::assets::KernelName;
use lab::scenario::{GuestSpec, Lab, LabOptions};
use lab::system::System;
use lab::trial::{self, Method};

use crate::demo::{self, Carrier};
use crate::test::Scene;

/// The first suite of Debian whose systemd hands stores over a kexec.
const SUITE: &str = "unstable";
/// What the package puts there.
const UNITS: [(&str, &str); 3] = [
    (
        "hebe-freeze.service",
        include_str!("../../../packaging/hebe-freeze.service"),
    ),
    (
        "hebe-resume.service",
        include_str!("../../../packaging/hebe-resume.service"),
    ),
    ("hebe.slice", include_str!("../../../packaging/hebe.slice")),
];
/// VMs join the bridge, which systemd-networkd makes.
const AFTER_BRIDGE: &str = "[Unit]\nAfter=systemd-networkd.service\n[Service]\nExecStartPre=/bin/sh -c 'until test -e /sys/class/net/br0; do sleep 0.1; done'\n";

/// First by `hebe reboot`, which asks systemd; then by `systemctl kexec`, into a
/// kernel that was staged: what was carried once is carried once more.
pub fn run(scene: &Scene) -> Result<()> {
    let [from, to] = Carrier::Luo.kernels();
    let guests = [GuestSpec {
        store: Carrier::Luo.kind(),
        ..GuestSpec::numbered(0, KernelName::V6_1Cloud)
    }];
    let options = LabOptions {
        host: from,
        others: vec![to],
        system: Some(System::of_suite(SUITE)),
        ..Carrier::Luo.options(1)
    };
    let mut lab = Lab::boot(scene.assets, options, scene.progress)?;
    scene.progress.step("installing the units");
    install(&lab)?;
    lab.start(&guests)?;
    let words = ["hebe", "reboot", "--method", "warm", "--dry-run"].map(str::to_owned);
    let check: Vec<String> = words.into_iter().chain(lab.reboot_arguments(to)).collect();
    let check: Vec<&str> = check.iter().map(String::as_str).collect();
    let told = lab.machine.exec_ok(&check)?;
    ensure!(
        told.contains("PID 1 holds the memory: PID 1 is systemd 26"),
        "another carrier: {told}"
    );
    by_hebe(&mut lab, &guests, to, scene)?;
    by_systemctl(&mut lab, &guests, to, scene)?;
    lab.machine.power_off()?;
    Ok(())
}

fn install(lab: &Lab) -> Result<()> {
    for (name, text) in UNITS {
        let path = format!("/usr/lib/systemd/system/{name}");
        lab.machine.agent.put(&path, 0o644, text.as_bytes())?;
    }
    let drop_in = "/etc/systemd/system/hebe-resume.service.d/lab.conf";
    let text = AFTER_BRIDGE.as_bytes();
    lab.machine.agent.put(drop_in, 0o644, text)?;
    for program in ["hebe", "hebe-vmm"] {
        let (from, to) = (
            format!("/data/bin/{program}"),
            format!("/usr/bin/{program}"),
        );
        lab.machine.exec_ok(&["ln", "-sf", &from, &to])?;
    }
    lab.machine.exec_ok(&["systemctl", "daemon-reload"])?;
    for unit in ["hebe-freeze.service", "hebe-resume.service"] {
        lab.machine
            .exec_ok(&["systemctl", "enable", "--now", unit])?;
    }
    Ok(())
}

/// Everything that a demo of the other carrier shows.
fn by_hebe(lab: &mut Lab, guests: &[GuestSpec], to: KernelName, scene: &Scene) -> Result<()> {
    let trial = trial::reboot(lab, guests, Method::Warm, to, &[], scene.progress)?;
    demo::check(&trial)?;
    for vm in &trial.vms {
        let seconds = vm.downtime_ms / 1000.0;
        println!("    {}: {seconds:.1} s by systemd (emulated)", vm.name);
    }
    let notes = trial.report["notes"].to_string();
    ensure!(notes.contains("service manager"), "not by systemd: {notes}");
    carried(lab)
}

/// What an administrator does who knows nothing of Hebe but how to stage it.
fn by_systemctl(lab: &mut Lab, guests: &[GuestSpec], to: KernelName, scene: &Scene) -> Result<()> {
    let before = lab.wait_for_guests(guests)?;
    scene.progress.step("systemctl kexec");
    let words = ["hebe", "reboot", "--method", "warm", "--load"].map(str::to_owned);
    let load: Vec<String> = words.into_iter().chain(lab.reboot_arguments(to)).collect();
    let load: Vec<&str> = load.iter().map(String::as_str).collect();
    lab.machine.exec_ok(&load)?;
    lab.machine
        .agent
        .spawn(&["systemctl", "kexec"], "/data/kexec.log")?;
    lab.wait_for_next_boot()?;
    let after = lab.wait_for_guests(guests)?;
    for (before, after) in before.iter().zip(&after) {
        ensure!(before.boot_id == after.boot_id, "a guest was booted again");
        let (was, is) = (&before.memory_check, &after.memory_check);
        ensure!(is.errors == 0, "{} wrong pages", is.errors);
        ensure!(is.passes >= was.passes, "its working set began anew");
    }
    carried(lab)
}

/// The VM came by the kernel, and PID 1 holds nothing of it any more.
fn carried(lab: &Lab) -> Result<()> {
    let (state, why) = super::state(lab, "vm1")?;
    ensure!(state == "running", "vm1 is {state}: {why}");
    let text = lab.machine.exec_ok(&[
        "systemctl",
        "show",
        "--property=NFileDescriptorStore",
        "hebe-freeze.service",
    ])?;
    ensure!(
        text.trim() == "NFileDescriptorStore=0",
        "PID 1 holds {text}"
    );
    let bytes = lab.machine.agent.get("/run/hebe/host/arrivals.json");
    let text = String::from_utf8(bytes.context("nothing arrived")?)?;
    ensure!(
        text.contains("vm1"),
        "it did not come by the kernel: {text}"
    );
    Ok(())
}
