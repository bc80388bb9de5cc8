//! Suspend and resume of one VM, on memory and on disk, by RAM size.
//!
//! The guest's RAM is made to hold data first: an empty one would let the
//! disk method skip zeros and look better than it is.

use anyhow::{Context, Result};
use clap::Args;
use lab::assets::{Assets, KernelName};
use lab::progress::Progress;
use lab::scenario::{GuestSpec, Lab, LabOptions};
use lab::trial::{self, Method};
use serde::Serialize;
use serde_json::{Value, json};

use super::{Output, median};
use crate::ui::Spinner;

/// What to measure.
#[derive(Args)]
pub struct SuspendArgs {
    /// RAM sizes, in MiB.
    #[arg(long, value_delimiter = ',', default_value = "256,1024,4096")]
    memory: Vec<u64>,
    /// Suspends and resumes on memory, each size.
    #[arg(long, default_value_t = 10)]
    repeats: u32,
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

/// Runs it; prints the medians.
pub fn run(assets: &Assets, args: &SuspendArgs, progress: &Spinner) -> Result<()> {
    let mut rows = Vec::new();
    for memory_mib in &args.memory {
        measure(assets, args, *memory_mib, progress, &mut rows)?;
    }
    progress.clear();
    println!("median milliseconds (emulated machine: compare, do not quote)");
    println!(
        "{:>10} {:<8} {:>12} {:>12}",
        "RAM (MiB)", "method", "suspend", "resume"
    );
    for memory_mib in &args.memory {
        for method in ["memory", "disk"] {
            let of = |field: fn(&Row) -> f64| {
                let fits = |r: &&Row| r.memory_mib == *memory_mib && r.method == method;
                median(rows.iter().filter(fits).map(field).collect())
            };
            let (suspend, resume) = (of(|r| r.suspend_ms), of(|r| r.resume_ms));
            println!("{memory_mib:>10} {method:<8} {suspend:>12.1} {resume:>12.1}");
        }
    }
    let line = |r: &Row| {
        format!(
            "{},{},{},{:.3},{:.3}",
            r.memory_mib, r.method, r.repeat, r.suspend_ms, r.resume_ms
        )
    };
    let csv: Vec<String> = rows.iter().map(line).collect();
    let all = json!({ "emulated": true, "rows": rows });
    args.output
        .write(&all, "memory_mib,method,repeat,suspend_ms,resume_ms", &csv)
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
        reserve_mib: memory_mib + 64,
        memory_mib: memory_mib + 2560,
        disk_mib: 2 * memory_mib + 2048,
        ..LabOptions::default()
    };
    let mut lab = Lab::boot(assets, options, progress)?;
    let guests = [guest];
    lab.start(&guests)?;
    lab.wait_for_guests(&guests)?;
    for repeat in 0..args.repeats {
        progress.step(&format!(
            "{memory_mib} MiB: suspend and resume {}",
            repeat + 1
        ));
        let text = lab.machine.exec_ok(&["hebe", "suspend", "vm1", "--json"])?;
        let suspend: Value = serde_json::from_str(&text).context("hebe suspend printed no JSON")?;
        lab.machine.exec_ok(&["hebe", "resume", "vm1"])?;
        let text = lab.machine.exec_ok(&["hebe", "show", "vm1", "--json"])?;
        let show: Value = serde_json::from_str(&text).context("hebe show printed no JSON")?;
        let suspend_ms = span(&suspend, "asked", "committed")?;
        let resume_ms = span(&show, "process_started", "running")?;
        rows.push(Row {
            memory_mib,
            method: "memory",
            repeat,
            suspend_ms,
            resume_ms,
        });
    }
    progress.step(&format!("{memory_mib} MiB: to disk and back"));
    let trial = trial::reboot(
        &mut lab,
        &guests,
        Method::Saved,
        KernelName::V6_1Cloud,
        &[],
        progress,
    )?;
    let at_ms = |kind: &str| event_ms(&trial.report, kind);
    let suspend_ms = at_ms("saved")? - at_ms("suspend-asked")?;
    let resume_ms = at_ms("running")? - at_ms("vmm-started")?;
    rows.push(Row {
        memory_mib,
        method: "disk",
        repeat: 0,
        suspend_ms,
        resume_ms,
    });
    lab.machine.power_off()
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
pub(super) fn event_ms(report: &Value, kind: &str) -> Result<f64> {
    let events = report["events"]
        .as_array()
        .context("the report has no events")?;
    let found = events.iter().find(|event| event["kind"] == kind);
    found
        .and_then(|event| event["realtime_ns"].as_f64())
        .map(|ns| ns / 1e6)
        .with_context(|| format!("no event '{kind}' in the report"))
}
