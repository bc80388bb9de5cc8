//! Warm, saved and cold, from 6.1 to 7.3 and back, under real guests.

use anyhow::{Context, Result, ensure};
use lab::assets::KernelName;
use lab::scenario::{GuestSpec, Lab, LabOptions, guest_disk_path};
use lab::trial::{self, GuestStatus, Method, Trial};

use crate::demo;
use crate::test::Scene;

const OLD: KernelName = KernelName::V6_1Cloud;
const NEW: KernelName = KernelName::V7_3Cloud;
/// Most memory of a VMM besides its guest's RAM, as a share (Pss).
const OVERHEAD_MAX_KIB: u64 = 8 << 10;

/// One machine goes through all six; the guests go through them with it.
pub fn run(scene: &Scene) -> Result<()> {
    let guests = guests();
    let options = LabOptions {
        host: OLD,
        others: vec![NEW],
        guest_kernels: vec![OLD, NEW],
        guest_disks: vec![("vm1".to_owned(), 64), ("vm2".to_owned(), 64)],
        tools: true,
        ..LabOptions::default()
    };
    let mut lab = Lab::boot(scene.assets, options, scene.progress)?;
    let base = checksum(&lab, "vm2")?;
    lab.start(&guests)?;
    vmm_memory(&lab, &guests).context("after the start")?;
    for (method, kernel) in [
        (Method::Warm, NEW),
        (Method::Warm, OLD),
        (Method::Saved, NEW),
        (Method::Saved, OLD),
        (Method::Cold, NEW),
        (Method::Cold, OLD),
    ] {
        let extra: &[&str] = if method == Method::Cold {
            &["--kexec"]
        } else {
            &[]
        };
        let trial = trial::reboot(&mut lab, &guests, method, kernel, extra, scene.progress)
            .with_context(|| format!("{} into {kernel}", method.as_str()))?;
        check(&trial, kernel).with_context(|| format!("{} into {kernel}", method.as_str()))?;
        vmm_memory(&lab, &guests)
            .with_context(|| format!("after {} into {kernel}", method.as_str()))?;
        println!(
            "    {} into {kernel}: {}",
            method.as_str(),
            downtimes(&trial)
        );
    }
    ensure!(
        checksum(&lab, "vm2")? == base,
        "a disk with snapshot = true was written to"
    );
    lab.machine.check()?;
    lab.machine.power_off()
}

/// What a VMM needs besides its guest's RAM: a promise that no time is in.
fn vmm_memory(lab: &Lab, guests: &[GuestSpec]) -> Result<()> {
    for (guest, pid) in guests.iter().zip(lab.vmm_pids(guests)?) {
        let share = lab.share(pid)?;
        ensure!(
            share.overhead_kib() <= OVERHEAD_MAX_KIB,
            "the VMM of {} needs {} KiB besides its guest's RAM: {share:?}",
            guest.name,
            share.overhead_kib()
        );
        // Else what was read is no VMM's.
        ensure!(
            share.files_kib > 0 && share.guest_kib + share.anonymous_kib > 0,
            "the VMM of {} has no memory: {share:?}",
            guest.name
        );
    }
    Ok(())
}

/// Of what is on a guest's disk.
fn checksum(lab: &Lab, vm: &str) -> Result<String> {
    let path = guest_disk_path(vm);
    lab.machine.exec_ok(&["/bin/busybox", "sha256sum", &path])
}

/// One with two vCPUs and a disk, one with the other kernel and a disk that
/// keeps nothing.
fn guests() -> Vec<GuestSpec> {
    let first = GuestSpec {
        vcpus: 2,
        disk: true,
        append: "lab.disk_ms=200".to_owned(),
        ..GuestSpec::numbered(0, OLD)
    };
    let second = GuestSpec {
        disk: true,
        snapshot: true,
        append: "lab.disk_ms=200".to_owned(),
        ..GuestSpec::numbered(1, NEW)
    };
    vec![first, second]
}

fn check(trial: &Trial, kernel: KernelName) -> Result<()> {
    demo::check(trial)?;
    let version = kernel
        .as_str()
        .split('-')
        .next()
        .unwrap_or_default()
        .to_owned();
    ensure!(
        trial.host.kernel_after.starts_with(&version),
        "the host runs {} after it",
        trial.host.kernel_after
    );
    let pairs = trial.before.iter().zip(&trial.after);
    for (spec, (before, after)) in guests().iter().zip(pairs) {
        if spec.disk {
            let cold = trial.method == Method::Cold;
            disk(before, after, cold).with_context(|| spec.name.clone())?;
        }
    }
    Ok(())
}

/// What the guest's disk writer says: it went on, and read back what it had
/// written.
fn disk(before: &GuestStatus, after: &GuestStatus, cold: bool) -> Result<()> {
    let writer = |status: &GuestStatus| status.disk.clone().context("no disk writer runs");
    let (before, after) = (writer(before)?, writer(after)?);
    ensure!(after.errors == 0, "{} disk errors", after.errors);
    // A guest that booted anew counts anew.
    let earlier = if cold { 0 } else { before.fsyncs };
    ensure!(
        after.fsyncs > earlier,
        "the disk writer stands still: {} fsyncs, {} before",
        after.fsyncs,
        before.fsyncs
    );
    Ok(())
}

fn downtimes(trial: &Trial) -> String {
    let each = trial
        .vms
        .iter()
        .map(|vm| format!("{} {:.1} s", vm.name, vm.downtime_ms / 1000.0));
    format!("{} (emulated)", each.collect::<Vec<_>>().join(", "))
}
