//! Downtime seen from outside, for every method, number of VMs and service.

use anyhow::{Result, ensure};
use clap::Args;
use lab::assets::{Assets, KernelName};
use lab::progress::Progress;
use lab::scenario::{GuestSpec, Lab, LabOptions};
use lab::trial::{self, Method, Trial};
use serde::Serialize;
use serde_json::{Value, json};

use super::{Output, median};
use crate::ui::Spinner;

/// How much work the slow-starting service does before it listens: a
/// stand-in for a heavy Java server.
const SLOW_WORK: &str = "lab.slow_work=400";

/// What to measure.
#[derive(Args)]
pub struct RebootArgs {
    /// Numbers of VMs.
    #[arg(long, value_delimiter = ',', default_value = "1,2,4")]
    vms: Vec<u8>,
    /// Methods.
    #[arg(long, value_delimiter = ',', default_value = "warm,saved,cold")]
    methods: Vec<Method>,
    /// Repeats of each.
    #[arg(long, default_value_t = 1)]
    repeats: u32,
    /// Eleven small VMs, too.
    #[arg(long)]
    full: bool,
    #[command(flatten)]
    output: Output,
}

#[derive(Serialize)]
struct Row {
    method: Method,
    n: u8,
    repeat: u32,
    vm: String,
    service: &'static str,
    downtime_ms: f64,
    phases: Value,
}

/// Runs it; prints the medians.
pub fn run(assets: &Assets, args: &RebootArgs, progress: &Spinner) -> Result<()> {
    let mut rows = Vec::new();
    let mut raw = Vec::new();
    let eleven = args.full.then_some(11);
    for n in args.vms.iter().copied().chain(eleven) {
        ensure!(
            (1..=11).contains(&n),
            "1 to 11 VMs fit into the lab, not {n}"
        );
        measure(assets, args, n, progress, &mut rows, &mut raw)?;
    }
    progress.clear();
    print(args, &rows);
    let csv: Vec<String> = rows.iter().map(csv_line).collect();
    let all = json!({ "emulated": true, "rows": rows, "raw": raw });
    args.output
        .write(&all, "method,n,repeat,vm,service,downtime_ms", &csv)
}

fn measure(
    assets: &Assets,
    args: &RebootArgs,
    n: u8,
    progress: &Spinner,
    rows: &mut Vec<Row>,
    raw: &mut Vec<Value>,
) -> Result<()> {
    let guests: Vec<GuestSpec> = (0..n).map(|index| guest(index, n)).collect();
    let guest_mib: u64 = guests.iter().map(|g| g.memory_mib + 8).sum();
    let options = LabOptions {
        guests: n.max(4),
        reserve_mib: 64 + guest_mib,
        memory_mib: 2560 + guest_mib,
        disk_mib: 4096 + 2 * guest_mib,
        ..LabOptions::default()
    };
    let mut lab = Lab::boot(assets, options, progress)?;
    progress.step(&format!("booting {n} VMs"));
    lab.start(&guests)?;
    for repeat in 0..args.repeats {
        for method in &args.methods {
            let kernel = KernelName::V6_1Cloud;
            let trial = trial::reboot(&mut lab, &guests, *method, kernel, &[], progress)?;
            progress.note(&format!(
                "n = {n}, {}: {}",
                method.as_str(),
                summary(&trial)
            ));
            for vm in &trial.vms {
                let phases = trial.report.clone();
                let services = [
                    ("light", Some(vm.downtime_ms)),
                    ("slow-starting", vm.slow_service_downtime_ms),
                ];
                for (service, downtime) in services {
                    let Some(downtime_ms) = downtime else {
                        continue;
                    };
                    let vm = vm.name.clone();
                    let phases = phases.clone();
                    rows.push(Row {
                        method: *method,
                        n,
                        repeat,
                        vm,
                        service,
                        downtime_ms,
                        phases,
                    });
                }
            }
            raw.push(json!({
                "method": method.as_str(), "n": n, "repeat": repeat, "probes": trial.raw,
            }));
        }
    }
    lab.machine.power_off()
}

/// The first VM runs the slow-starting service, too. Many VMs are small ones.
fn guest(index: u8, n: u8) -> GuestSpec {
    GuestSpec {
        memory_mib: if n > 4 { 128 } else { 256 },
        memcheck_mib: if n > 4 { 8 } else { 32 },
        append: if index == 0 {
            SLOW_WORK.to_owned()
        } else {
            String::new()
        },
        ..GuestSpec::numbered(index, KernelName::V6_1Cloud)
    }
}

fn summary(trial: &Trial) -> String {
    let each = trial
        .vms
        .iter()
        .map(|vm| format!("{:.1} s", vm.downtime_ms / 1000.0));
    each.collect::<Vec<_>>().join(", ")
}

fn csv_line(row: &Row) -> String {
    format!(
        "{},{},{},{},{},{:.1}",
        row.method.as_str(),
        row.n,
        row.repeat,
        row.vm,
        row.service,
        row.downtime_ms
    )
}

fn print(args: &RebootArgs, rows: &[Row]) {
    println!("median downtime in seconds (emulated machine: compare, do not quote)");
    println!(
        "{:<8} {:>3} {:>10} {:>14}",
        "method", "n", "light", "slow-starting"
    );
    let mut counts: Vec<u8> = rows.iter().map(|row| row.n).collect();
    counts.dedup();
    for n in counts {
        for method in &args.methods {
            let of = |service: &str| {
                let fits = |r: &&Row| r.n == n && r.method == *method && r.service == service;
                median(
                    rows.iter()
                        .filter(fits)
                        .map(|r| r.downtime_ms / 1000.0)
                        .collect(),
                )
            };
            println!(
                "{:<8} {n:>3} {:>10.2} {:>14.2}",
                method.as_str(),
                of("light"),
                of("slow-starting")
            );
        }
    }
}
