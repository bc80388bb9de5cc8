//! What a guest's file cache is worth: file reads and web throughput just
//! before and just after a reboot, warm and cold.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use lab::assets::{Assets, KernelName};
use lab::machine::GuestPorts;
use lab::probe;
use lab::progress::Progress;
use lab::scenario::{GuestSpec, Lab, LabOptions};
use lab::trial::{self, Method};
use lab_guest::status::{FileRead, WEB_OBJECT_LEN};
use serde::Serialize;
use serde_json::json;

use super::Output;
use crate::ui::Spinner;

/// What to measure.
#[derive(Args)]
pub struct CacheArgs {
    /// Web objects of 512 KiB.
    #[arg(long, default_value_t = 64)]
    objects: u32,
    #[command(flatten)]
    output: Output,
}

#[derive(Serialize)]
struct Row {
    method: &'static str,
    when: &'static str,
    pass: u32,
    file_mib_s: f64,
    web_mib_s: f64,
    block_reads: u64,
}

/// Runs it; prints the rates and their ratios.
pub fn run(assets: &Assets, args: &CacheArgs, progress: &Spinner) -> Result<()> {
    let guest = GuestSpec {
        disk: true,
        memory_mib: 384,
        ..GuestSpec::numbered(0, KernelName::V6_1Cloud)
    };
    let options = LabOptions {
        guest_disks: vec![("vm1".to_owned(), 256)],
        ..LabOptions::default()
    };
    let mut lab = Lab::boot(assets, options, progress)?;
    let guests = [guest];
    lab.start(&guests)?;
    lab.wait_for_guests(&guests)?;
    let ports = lab.ports(&guests[0])?;
    let mut rows = Vec::new();
    for method in [Method::Warm, Method::Cold] {
        // The first pass fills the cache and is thrown away.
        read_all(&ports, args.objects, progress)?;
        for pass in 0..2 {
            rows.push(row(&ports, args.objects, method, "before", pass, progress)?);
        }
        let kernel = KernelName::V6_1Cloud;
        trial::reboot(&mut lab, &guests, method, kernel, &[], progress)?;
        for pass in 0..2 {
            rows.push(row(&ports, args.objects, method, "after", pass, progress)?);
        }
    }
    lab.machine.power_off()?;
    progress.clear();
    print(&rows);
    let line = |r: &Row| {
        format!(
            "{},{},{},{:.2},{:.2},{}",
            r.method, r.when, r.pass, r.file_mib_s, r.web_mib_s, r.block_reads
        )
    };
    let csv: Vec<String> = rows.iter().map(line).collect();
    let all = json!({ "emulated": true, "rows": rows });
    args.output.write(
        &all,
        "method,when,pass,file_mib_s,web_mib_s,block_reads",
        &csv,
    )
}

fn row(
    ports: &GuestPorts,
    objects: u32,
    method: Method,
    when: &'static str,
    pass: u32,
    progress: &Spinner,
) -> Result<Row> {
    let (file_mib_s, web_mib_s, block_reads) = read_all(ports, objects, progress)?;
    Ok(Row {
        method: method.as_str(),
        when,
        pass,
        file_mib_s,
        web_mib_s,
        block_reads,
    })
}

/// Reads the file inside the guest, and every web object from outside.
fn read_all(ports: &GuestPorts, objects: u32, progress: &Spinner) -> Result<(f64, f64, u64)> {
    progress.step("reading the guest's files");
    let limit = Duration::from_secs(240);
    let body = probe::http_get(ports.http, "/file", limit)?;
    let file: FileRead = serde_json::from_slice(&body).context("no answer about the file")?;
    let before = probe::guest_status(ports, limit)?.block_reads;
    let start = Instant::now();
    for object in 0..objects {
        let body = probe::http_get(ports.http, &format!("/web/{object}"), limit)?;
        anyhow::ensure!(
            body.len() == WEB_OBJECT_LEN,
            "web object {object} has {} bytes",
            body.len()
        );
    }
    let web_s = start.elapsed().as_secs_f64();
    let after = probe::guest_status(ports, limit)?.block_reads;
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    let file_rate = mib(file.bytes as f64) / (file.elapsed_ns as f64 / 1e9);
    let web_rate = mib(f64::from(objects) * WEB_OBJECT_LEN as f64) / web_s;
    Ok((file_rate, web_rate, file.block_reads + (after - before)))
}

fn print(rows: &[Row]) {
    println!("MiB/s inside an emulated machine: compare, do not quote");
    println!(
        "{:<6} {:<7} {:>4} {:>10} {:>10} {:>12}",
        "method", "when", "pass", "file", "web", "block reads"
    );
    for r in rows {
        println!(
            "{:<6} {:<7} {:>4} {:>10.1} {:>10.1} {:>12}",
            r.method, r.when, r.pass, r.file_mib_s, r.web_mib_s, r.block_reads
        );
    }
    for method in ["warm", "cold"] {
        let first = |when: &str, field: fn(&Row) -> f64| {
            rows.iter()
                .filter(|r| r.method == method && r.when == when)
                .map(field)
                .next_back_or_first(when == "before")
        };
        let ratio = |field: fn(&Row) -> f64| first("after", field) / first("before", field) * 100.0;
        println!(
            "{method}: just after it, {:.0} % of the file throughput and {:.0} % of the web throughput",
            ratio(|r| r.file_mib_s),
            ratio(|r| r.web_mib_s)
        );
    }
}

/// The last figure before a reboot, the first one after it.
trait Edge: Iterator<Item = f64> + Sized {
    fn next_back_or_first(mut self, last: bool) -> f64 {
        let found = if last { self.last() } else { self.next() };
        found.unwrap_or(f64::NAN)
    }
}

impl<I: Iterator<Item = f64>> Edge for I {}
