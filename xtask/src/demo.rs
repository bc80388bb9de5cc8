//! `cargo xtask demo`: a host full of VMs gets another kernel under them.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Args;
use lab::assets::{Assets, KernelName};
use lab::progress::Progress;
use lab::scenario::{GuestSpec, Lab, LabOptions};
use lab::trial::{self, Method, Trial};

use crate::ui::Spinner;

/// What the demo shows.
#[derive(Args)]
pub struct DemoArgs {
    /// VMs on the host.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=11))]
    vms: u8,
    /// Host kernel before.
    #[arg(long, default_value_t = KernelName::V6_1Cloud)]
    from: KernelName,
    /// Host kernel after.
    #[arg(long, default_value_t = KernelName::V7_3Cloud)]
    to: KernelName,
    /// How VMs get over the reboot.
    #[arg(long, default_value = "warm")]
    method: Method,
    /// Write host and VMs, before and after, into this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw the timeline as a Gantt chart into this file.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// Runs the demo.
pub fn run(assets: &Assets, args: &DemoArgs, progress: &Spinner) -> Result<ExitCode> {
    let guests: Vec<GuestSpec> = (0..args.vms)
        .map(|index| GuestSpec::numbered(index, KernelName::V6_1Cloud))
        .collect();
    let options = LabOptions {
        host: args.from,
        others: vec![args.to],
        guests: args.vms.max(4),
        reserve_mib: 64 + u64::from(args.vms) * 260,
        memory_mib: 2048 + 64 + u64::from(args.vms) * 300,
        ..LabOptions::default()
    };
    let mut lab = Lab::boot(assets, options, progress)?;
    progress.note(&format!("host: {}, an emulated machine", lab.boot.kernel));
    progress.step(&format!("booting {} VMs with a stock kernel", args.vms));
    lab.start(&guests)?;
    lab.wait_for_guests(&guests)?;
    let trial = trial::reboot(&mut lab, &guests, args.method, args.to, &[], progress)?;
    let timeline = lab.machine.exec_ok(&["hebe", "reboot", "--report"])?;
    let svg = match &args.svg {
        Some(_) => {
            lab.machine
                .exec_ok(&["hebe", "reboot", "--report", "--svg", "/tmp/report.svg"])?;
            Some(lab.machine.agent.get("/tmp/report.svg")?)
        }
        None => None,
    };
    lab.machine.power_off()?;
    progress.clear();
    println!("{}\n{}", timeline.trim_end(), table(&trial));
    if let (Some(path), Some(svg)) = (&args.svg, svg) {
        fs::write(path, svg).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&trial)?;
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    check(&trial)?;
    Ok(ExitCode::SUCCESS)
}

/// What a person reads.
fn table(trial: &Trial) -> String {
    let host = &trial.host;
    let mut text = format!(
        "\nhost kernel  {} -> {}\nhost boot id {} -> {}\n\n{:<8} {:>13} {:>20} {:>12} {:>8} {:>12}\n",
        host.kernel_before,
        host.kernel_after,
        &host.boot_id_before[..8.min(host.boot_id_before.len())],
        &host.boot_id_after[..8.min(host.boot_id_after.len())],
        "VM",
        "same boot id",
        "uptime before/after",
        "TCP session",
        "memory",
        "downtime",
    );
    for vm in &trial.vms {
        let yes = |good: bool, yes: &'static str, no: &'static str| if good { yes } else { no };
        text += &format!(
            "{:<8} {:>13} {:>20} {:>12} {:>8} {:>9.0} ms\n",
            vm.name,
            yes(vm.boot_id_before == vm.boot_id_after, "yes", "no"),
            format!("{:.0} s / {:.0} s", vm.uptime_before_s, vm.uptime_after_s),
            yes(vm.tcp_session_survived, "survived", "broken"),
            yes(vm.memory_check_ok, "intact", "lost"),
            vm.downtime_ms,
        );
    }
    text + "\nThe machine is emulated: ratios mean something, seconds do not.\n"
}

/// A warm reboot that lost anything is a failed demo.
pub fn check(trial: &Trial) -> Result<()> {
    let host = &trial.host;
    ensure!(
        host.boot_id_before != host.boot_id_after,
        "the host did not reboot"
    );
    for vm in &trial.vms {
        let name = &vm.name;
        ensure!(
            vm.monotonic_backwards == 0,
            "{name}: its monotonic clock went backwards {} times",
            vm.monotonic_backwards
        );
        if trial.method == Method::Cold {
            ensure!(
                vm.boot_id_before != vm.boot_id_after,
                "{name} did not boot again"
            );
            continue;
        }
        ensure!(
            vm.boot_id_before == vm.boot_id_after,
            "{name} was booted again"
        );
        ensure!(
            vm.uptime_after_s > vm.uptime_before_s,
            "{name}: its uptime went back"
        );
        ensure!(
            vm.memory_check_ok,
            "{name}: its working set is not what it was"
        );
        ensure!(vm.tcp_session_survived, "{name}: its TCP session broke");
        let drift_ms = vm.wall_clock_off_ms - vm.wall_clock_off_before_ms;
        ensure!(
            drift_ms.abs() < WALL_CLOCK_DRIFT_MS_MAX,
            "{name}: its wall clock is {drift_ms:.0} ms off from where it was"
        );
    }
    Ok(())
}

/// A guest's clock may be off from its boot on, which is slow here; the reboot
/// must not move it. The promise is 100 ms; the status page's way through an
/// emulated machine is part of what is measured.
const WALL_CLOCK_DRIFT_MS_MAX: f64 = 500.0;
