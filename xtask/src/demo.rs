//! `cargo xtask demo`: a host full of VMs gets another kernel under them.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use hebe_types::StoreKind;
use lab::assets::{Assets, KernelName};
use lab::progress::Progress;
use lab::scenario::{GuestSpec, Lab, LabOptions};
use lab::trial::{self, Method, Trial};
use serde::Serialize;

use crate::ui::Spinner;

/// What the demo shows.
#[derive(Args)]
pub struct DemoArgs {
    /// VMs on the host.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=11))]
    vms: u8,
    /// Host kernel before: 6.1-cloud, or, with `--store luo`, lab.
    #[arg(long)]
    from: Option<KernelName>,
    /// Host kernel after: 7.3-cloud, or, with `--store luo`, lab.
    #[arg(long)]
    to: Option<KernelName>,
    /// Where the VMs' memory lives: a reserved range, or ordinary memory that
    /// Linux's Live Update Orchestrator carries. The second needs the lab's own
    /// kernel, which is built when it is used first.
    #[arg(long, default_value = "devdax")]
    store: Carrier,
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

/// Stores that outlive the host's kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Carrier {
    /// A reserved range.
    Devdax,
    /// Ordinary memory, carried by Linux.
    Luo,
}

impl Carrier {
    /// As on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Devdax => "devdax",
            Self::Luo => "luo",
        }
    }

    /// What a VM's definition says.
    pub fn kind(self) -> StoreKind {
        match self {
            Self::Devdax => StoreKind::Devdax,
            Self::Luo => StoreKind::Luo,
        }
    }

    /// The host's kernels before and after, where none is named.
    pub fn kernels(self) -> [KernelName; 2] {
        match self {
            Self::Devdax => [KernelName::V6_1Cloud, KernelName::V7_3Cloud],
            Self::Luo => [KernelName::Lab, KernelName::Lab],
        }
    }

    /// What a lab host needs for `vms` VMs of 256 MiB.
    pub fn options(self, vms: u8) -> LabOptions {
        let vms = u64::from(vms);
        match self {
            Self::Devdax => LabOptions {
                reserve_mib: 64 + vms * 260,
                memory_mib: 2048 + 64 + vms * 300,
                ..LabOptions::default()
            },
            Self::Luo => LabOptions {
                reserve_mib: 0,
                store_init: false,
                memory_mib: 2048 + vms * 300,
                append: "kho=on liveupdate=on".to_owned(),
                ..LabOptions::default()
            },
        }
    }
}

/// Runs the demo.
pub fn run(assets: &Assets, args: &DemoArgs, progress: &Spinner) -> Result<ExitCode> {
    let guests: Vec<GuestSpec> = (0..args.vms)
        .map(|index| GuestSpec {
            store: args.store.kind(),
            ..GuestSpec::numbered(index, KernelName::V6_1Cloud)
        })
        .collect();
    let [from, to] = args.store.kernels();
    let (from, to) = (args.from.unwrap_or(from), args.to.unwrap_or(to));
    let options = LabOptions {
        host: from,
        others: vec![to],
        guests: args.vms.max(4),
        ..args.store.options(args.vms)
    };
    let mut lab = Lab::boot(assets, options, progress)?;
    progress.note(&format!("host: {}, an emulated machine", lab.boot.kernel));
    progress.step(&format!("booting {} VMs with a stock kernel", args.vms));
    lab.start(&guests)?;
    lab.wait_for_guests(&guests)?;
    let trial = trial::reboot(&mut lab, &guests, args.method, to, &[], progress)?;
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
            drift_ms.abs() < WALL_CLOCK_DRIFT_MS_MAX + vm.wall_clock_unsure_ms,
            "{name}: its wall clock is {drift_ms:.0} ms off from where it was, {:.0} ms more or less",
            vm.wall_clock_unsure_ms
        );
    }
    Ok(())
}

/// A guest's clock may be off from its boot on, which is slow here; the reboot
/// must not move it. The promise is 100 ms; the emulated machine is slow, and how
/// long the clocks took to be read comes on top.
const WALL_CLOCK_DRIFT_MS_MAX: f64 = 500.0;
