//! Suspend and resume of one VM, on memory and on disk, by RAM size.
//!
//! The guest's RAM is made to hold data first: an empty one would let the
//! disk method skip zeros and look better than it is.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use lab::assets::{Assets, KernelName};
use lab::machine::GuestPorts;
use lab::probe;
use lab::progress::Progress;
use lab::scenario::{GuestSpec, Lab, LabOptions};
use lab::trial::{self, Method};
use serde::Serialize;
use serde_json::{Value, json};

use super::{Aim, Output, caveat, diagnosed, emulated, median, while_emulator_fails};
use crate::ui::Spinner;

/// How long the guest may take to fill half of its RAM; 2 GiB take minutes
/// where the machine is emulated.
const FILL_LIMIT: Duration = Duration::from_secs(420);
/// How long the guest may take to answer after a resume.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// What to measure.
#[derive(Args)]
pub struct SuspendArgs {
    /// RAM sizes, in MiB.
    #[arg(long, value_delimiter = ',', default_value = "256,1024,4096")]
    memory: Vec<u64>,
    /// Suspends and resumes on memory, each size.
    #[arg(long, default_value_t = 10)]
    repeats: u32,
    /// Suspends and resumes on disk, each size; every one is a host reboot.
    #[arg(long, default_value_t = 1)]
    disk_repeats: u32,
    #[command(flatten)]
    output: Output,
}

#[derive(Serialize)]
struct Row {
    memory_mib: u64,
    method: &'static str,
    repeat: u32,
    suspend_ms: f64,
    resume_ms: f64,
}

/// Which figure of a row.
type Field = fn(&Row) -> f64;

/// Runs it; prints the medians and how they grow with RAM.
pub fn run(assets: &Assets, args: &SuspendArgs, progress: &Spinner) -> Result<()> {
    for memory_mib in &args.memory {
        ensure!(
            (128..=4096).contains(memory_mib) && memory_mib % 2 == 0,
            "{memory_mib} MiB: use an even number from 128 to 4096"
        );
    }
    let (mut rows, mut failures) = (Vec::new(), 0);
    let result = args.memory.iter().try_for_each(|mib| {
        while_emulator_fails(progress, &mut failures, || {
            rows.retain(|row: &Row| row.memory_mib != *mib);
            measure(assets, args, *mib, progress, &mut rows)
        })
    });
    progress.clear();
    print(args, &rows);
    let aims = aims(args, &rows);
    Aim::print(&aims);
    let line = |r: &Row| {
        format!(
            "{},{},{},{:.3},{:.3}",
            r.memory_mib, r.method, r.repeat, r.suspend_ms, r.resume_ms
        )
    };
    let csv: Vec<String> = rows.iter().map(line).collect();
    let all = json!({
        "repeats": args.repeats, "disk_repeats": args.disk_repeats,
        "emulator_failures": failures, "rows": rows,
    });
    let header = "memory_mib,method,repeat,suspend_ms,resume_ms";
    args.output.write(all, &aims, header, &csv)?;
    result
}

fn of(rows: &[Row], memory_mib: u64, method: &str, field: Field) -> f64 {
    let fits = |r: &&Row| r.memory_mib == memory_mib && r.method == method;
    median(rows.iter().filter(fits).map(field).collect())
}

/// The figure of the largest RAM size in those of the smallest.
fn growth(args: &SuspendArgs, rows: &[Row], method: &str, field: Field) -> f64 {
    let (Some(small), Some(large)) = (args.memory.iter().min(), args.memory.iter().max()) else {
        return f64::NAN;
    };
    of(rows, *large, method, field) / of(rows, *small, method, field)
}

fn print(args: &SuspendArgs, rows: &[Row]) {
    println!(
        "milliseconds, median of {} on memory and {} on disk ({})",
        args.repeats,
        args.disk_repeats,
        caveat()
    );
    println!(
        "{:>10} {:<8} {:>12} {:>12}",
        "RAM (MiB)", "method", "suspend", "resume"
    );
    for memory_mib in &args.memory {
        for method in ["memory", "disk"] {
            let suspend = of(rows, *memory_mib, method, |r| r.suspend_ms);
            let resume = of(rows, *memory_mib, method, |r| r.resume_ms);
            println!("{memory_mib:>10} {method:<8} {suspend:>12.1} {resume:>12.1}");
        }
        let share = |field: Field| {
            of(rows, *memory_mib, "memory", field) / of(rows, *memory_mib, "disk", field) * 100.0
        };
        println!(
            "{memory_mib:>10} memory / disk: suspend {:.2} %, resume {:.2} %",
            share(|r| r.suspend_ms),
            share(|r| r.resume_ms)
        );
    }
    for method in ["memory", "disk"] {
        println!(
            "largest / smallest RAM, {method}: suspend {:.2}, resume {:.2}",
            growth(args, rows, method, |r| r.suspend_ms),
            growth(args, rows, method, |r| r.resume_ms)
        );
    }
}

/// On memory nothing may grow with RAM; milliseconds count only where
/// KVM has hardware behind it.
fn aims(args: &SuspendArgs, rows: &[Row]) -> Vec<Aim> {
    let fields: [(&str, Field, f64, &'static str); 2] = [
        ("suspend", |r| r.suspend_ms, 10.0, "< 10 ms"),
        ("resume", |r| r.resume_ms, 50.0, "< 50 ms"),
    ];
    let mut aims = Vec::new();
    for (name, field, limit_ms, words) in fields {
        if args.memory.len() > 1 {
            let ratio = growth(args, rows, "memory", field);
            let what = format!("{name} on memory, largest to smallest RAM");
            aims.push(Aim::new(what, ratio, "<= 1.25", ratio <= 1.25));
        }
        if !emulated() {
            for memory_mib in &args.memory {
                let ms = of(rows, *memory_mib, "memory", field);
                let what = format!("{name} on memory, {memory_mib} MiB, ms");
                aims.push(Aim::new(what, ms, words, ms < limit_ms));
            }
        }
    }
    aims
}

fn measure(
    assets: &Assets,
    args: &SuspendArgs,
    memory_mib: u64,
    progress: &Spinner,
    rows: &mut Vec<Row>,
) -> Result<()> {
    let guest = GuestSpec {
        memory_mib,
        memcheck_mib: memory_mib / 2,
        ..GuestSpec::numbered(0, KernelName::V6_1Cloud)
    };
    let options = LabOptions {
        reserve_mib: memory_mib + 128,
        memory_mib: memory_mib + 2560,
        disk_mib: 2 * memory_mib + 2048,
        ..LabOptions::default()
    };
    let mut lab = Lab::boot(assets, options, progress)?;
    let guests = [guest];
    let result = measure_guest(&mut lab, &guests, args, progress, rows);
    diagnosed(&mut lab, &guests, result)?;
    lab.machine.power_off()
}

fn measure_guest(
    lab: &mut Lab,
    guests: &[GuestSpec],
    args: &SuspendArgs,
    progress: &Spinner,
    rows: &mut Vec<Row>,
) -> Result<()> {
    let memory_mib = guests[0].memory_mib;
    lab.start(guests)?;
    lab.wait_for_guests(guests)?;
    let ports = lab.ports(&guests[0])?;
    progress.step(&format!(
        "{memory_mib} MiB: the guest fills half of its RAM"
    ));
    wait_for_fill(lab, &ports)?;
    for repeat in 0..args.repeats {
        let number = repeat + 1;
        progress.step(&format!("{memory_mib} MiB: suspend and resume {number}"));
        rows.push(on_memory(lab, memory_mib, repeat)?);
        // Only a guest that lives on makes the figures true.
        probe::wait_for_guest(&ports, ANSWER_LIMIT, || Ok(()))?;
    }
    for repeat in 0..args.disk_repeats {
        progress.step(&format!("{memory_mib} MiB: to disk and back"));
        rows.push(on_disk(lab, guests, repeat, progress)?);
    }
    Ok(())
}

/// The checker tells its pages when it has written all of them once.
fn wait_for_fill(lab: &mut Lab, ports: &GuestPorts) -> Result<()> {
    let end = Instant::now() + FILL_LIMIT;
    loop {
        let status = probe::wait_for_guest(ports, ANSWER_LIMIT, || Ok(()))?;
        if status.memory_check.pages > 0 {
            return Ok(());
        }
        lab.machine.check()?;
        if Instant::now() > end {
            bail!(
                "the guest did not fill its RAM in {} s",
                FILL_LIMIT.as_secs()
            );
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn on_memory(lab: &Lab, memory_mib: u64, repeat: u32) -> Result<Row> {
    let text = lab.machine.exec_ok(&["hebe", "suspend", "vm1", "--json"])?;
    let suspend: Value = serde_json::from_str(&text).context("hebe suspend printed no JSON")?;
    lab.machine.exec_ok(&["hebe", "resume", "vm1"])?;
    let text = lab.machine.exec_ok(&["hebe", "show", "vm1", "--json"])?;
    let show: Value = serde_json::from_str(&text).context("hebe show printed no JSON")?;
    Ok(Row {
        memory_mib,
        method: "memory",
        repeat,
        suspend_ms: span(&suspend, "asked", "committed")?,
        resume_ms: span(&show, "process_started", "running")?,
    })
}

fn on_disk(lab: &mut Lab, guests: &[GuestSpec], repeat: u32, progress: &Spinner) -> Result<Row> {
    let kernel = KernelName::V6_1Cloud;
    let trial = trial::reboot(lab, guests, Method::Saved, kernel, &[], progress)?;
    let vm = &trial.vms[0];
    ensure!(
        vm.boot_id_before == vm.boot_id_after && vm.memory_check_ok,
        "the guest did not come back from the disk as it was"
    );
    let at_ms = |kind: &str| event_ms(&trial.report, kind);
    Ok(Row {
        memory_mib: guests[0].memory_mib,
        method: "disk",
        repeat,
        suspend_ms: at_ms("saved")? - at_ms("suspend-asked")?,
        resume_ms: at_ms("running")? - at_ms("vmm-started")?,
    })
}

/// Milliseconds between two stamps of one kernel, wherever they are in `value`.
fn span(value: &Value, from: &str, to: &str) -> Result<f64> {
    let ns = |name: &str| {
        find(value, name)
            .and_then(|stamp| stamp["realtime_ns"].as_f64())
            .with_context(|| format!("no stamp '{name}' in {value}"))
    };
    Ok((ns(to)? - ns(from)?) / 1e6)
}

fn find<'a>(value: &'a Value, name: &str) -> Option<&'a Value> {
    match value {
        Value::Object(map) => map
            .get(name)
            .filter(|found| found.get("realtime_ns").is_some())
            .or_else(|| map.values().find_map(|inner| find(inner, name))),
        Value::Array(list) => list.iter().find_map(|inner| find(inner, name)),
        _ => None,
    }
}

/// Wall-clock milliseconds of the first event of a kind in a report; to be
/// compared with events of the same kernel alone.
fn event_ms(report: &Value, kind: &str) -> Result<f64> {
    let events = report["events"]
        .as_array()
        .context("the report has no events")?;
    let found = events.iter().find(|event| event["kind"] == kind);
    found
        .and_then(|event| event["realtime_ns"].as_f64())
        .map(|ns| ns / 1e6)
        .with_context(|| format!("no event '{kind}' in the report"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_size_is_set_against_the_smallest() {
        let row = |memory_mib, suspend_ms| Row {
            memory_mib,
            method: "memory",
            repeat: 0,
            suspend_ms,
            resume_ms: 1.0,
        };
        let args = SuspendArgs {
            memory: vec![1024, 256],
            repeats: 1,
            disk_repeats: 0,
            output: Output {
                json: None,
                csv: None,
            },
        };
        let rows = [row(256, 2.0), row(1024, 5.0)];
        assert_eq!(growth(&args, &rows, "memory", |r| r.suspend_ms), 2.5);
        assert!(growth(&args, &rows, "disk", |r| r.suspend_ms).is_nan());
        let aims = aims(&args, &rows);
        assert!(!aims[0].met);
    }
}
