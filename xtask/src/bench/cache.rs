//! What a guest's file cache is worth: file reads and web throughput just
//! before and just after a reboot, warm and cold.
//!
//! Before the passes that follow a reboot, this computer forgets what it
//! holds of the host's disk: otherwise a cold guest's misses would be reads of
//! this computer's memory. The host's own memory of it ended with its kernel.

use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
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

use super::{Aim, Output, caveat, diagnosed, median, while_emulator_fails};
use crate::ui::Spinner;

const KERNEL: KernelName = KernelName::V6_1Cloud;
const METHODS: [Method; 2] = [Method::Warm, Method::Cold];
/// What the guest needs beside its cached files, in MiB.
const GUEST_MIB: u64 = 256;
/// How long one answer of the guest may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(300);

/// What to measure.
#[derive(Args)]
pub struct CacheArgs {
    /// Size of the file that is read inside the guest, in MiB.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u64).range(1..=512))]
    file_mib: u64,
    /// Web objects of 512 KiB.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=2048))]
    objects: u32,
    /// Web clients that fetch at the same time.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=64))]
    clients: u32,
    /// Passes over everything, before a reboot and after it.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    passes: u32,
    /// Reboots by each method.
    #[arg(long, default_value_t = 1)]
    repeats: u32,
    #[command(flatten)]
    output: Output,
}

#[derive(Serialize)]
struct Row {
    method: Method,
    repeat: u32,
    when: &'static str,
    pass: u32,
    file_mib_s: f64,
    web_mib_s: f64,
    /// Blocks of 512 bytes that the guest read from its disk meanwhile.
    block_reads: u64,
}

/// Runs it; prints the rates and their ratios.
pub fn run(assets: &Assets, args: &CacheArgs, progress: &Spinner) -> Result<()> {
    let (mut rows, mut failures) = (Vec::new(), 0);
    let result = while_emulator_fails(progress, &mut failures, || {
        rows.clear();
        measure(assets, args, progress, &mut rows)
    });
    progress.clear();
    let aims = print(args, &rows);
    let line = |r: &Row| {
        format!(
            "{},{},{},{},{:.2},{:.2},{}",
            r.method.as_str(),
            r.repeat,
            r.when,
            r.pass,
            r.file_mib_s,
            r.web_mib_s,
            r.block_reads
        )
    };
    let csv: Vec<String> = rows.iter().map(line).collect();
    let all = json!({
        "repeats": args.repeats, "emulator_failures": failures, "file_mib": args.file_mib,
        "objects": args.objects, "clients": args.clients, "rows": rows,
    });
    let header = "method,repeat,when,pass,file_mib_s,web_mib_s,block_reads";
    args.output.write(all, &aims, header, &csv)?;
    result
}

/// Boots a host with one guest, and reboots it by each method.
fn measure(
    assets: &Assets,
    args: &CacheArgs,
    progress: &Spinner,
    rows: &mut Vec<Row>,
) -> Result<()> {
    let content_mib = args.file_mib + u64::from(args.objects).div_ceil(2);
    let guest = GuestSpec {
        disk: true,
        memory_mib: (GUEST_MIB + content_mib).next_multiple_of(2),
        ..GuestSpec::numbered(0, KERNEL)
    };
    let options = LabOptions {
        guest_disks: vec![("vm1".to_owned(), 128 + content_mib * 5 / 4)],
        reserve_mib: guest.memory_mib + 64,
        memory_mib: 2560 + guest.memory_mib,
        disk_mib: 4096 + 2 * content_mib,
        ..LabOptions::default()
    };
    let mut lab = Lab::boot(assets, options, progress)?;
    let guests = [guest];
    lab.start(&guests)?;
    lab.wait_for_guests(&guests)?;
    for repeat in 0..args.repeats {
        for method in METHODS {
            let result = around_a_reboot(&mut lab, &guests, args, (method, repeat), progress);
            rows.extend(diagnosed(&mut lab, &guests, result)?);
        }
    }
    lab.machine.power_off()
}

/// Passes over the guest's files before a reboot and after it.
fn around_a_reboot(
    lab: &mut Lab,
    guests: &[GuestSpec],
    args: &CacheArgs,
    (method, repeat): (Method, u32),
    progress: &Spinner,
) -> Result<Vec<Row>> {
    let ports = lab.ports(&guests[0])?;
    let mut rows = Vec::new();
    let mut passes = |when| -> Result<()> {
        for pass in 0..args.passes {
            progress.step(&format!("{} {when}: pass {}", method.as_str(), pass + 1));
            let (file_mib_s, web_mib_s, block_reads) = read_all(&ports, args)?;
            rows.push(Row {
                method,
                repeat,
                when,
                pass,
                file_mib_s,
                web_mib_s,
                block_reads,
            });
        }
        Ok(())
    };
    // The first pass makes the files or fills the cache: no figure.
    progress.step("the guest makes or reads its files");
    read_all(&ports, args)?;
    passes("before")?;
    let trial = trial::reboot(lab, guests, method, KERNEL, &[], progress)?;
    let vm = &trial.vms[0];
    ensure!(
        (vm.boot_id_before == vm.boot_id_after) == (method == Method::Warm),
        "the guest's boot does not fit a {} reboot",
        method.as_str()
    );
    lab.drop_disk_cache()?;
    passes("after")?;
    Ok(rows)
}

/// Reads the file inside the guest, and every web object from outside: MiB in
/// a second of each, and the blocks that were read from the disk for both.
fn read_all(ports: &GuestPorts, args: &CacheArgs) -> Result<(f64, f64, u64)> {
    let page = format!("/file?mib={}", args.file_mib);
    let body = fetch(ports, &page)?;
    let file: FileRead = serde_json::from_slice(&body).context("no answer about the file")?;
    let before = probe::guest_status(ports, ANSWER_LIMIT)?.block_reads;
    let start = Instant::now();
    fetch_objects(ports, args)?;
    let web_s = start.elapsed().as_secs_f64();
    let after = probe::guest_status(ports, ANSWER_LIMIT)?.block_reads;
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    let file_rate = mib(file.bytes as f64) / (file.elapsed_ns as f64 / 1e9);
    let web_rate = mib(f64::from(args.objects) * WEB_OBJECT_LEN as f64) / web_s;
    Ok((file_rate, web_rate, file.block_reads + (after - before)))
}

/// Every client takes the next object that no other has.
fn fetch_objects(ports: &GuestPorts, args: &CacheArgs) -> Result<()> {
    let next = AtomicU32::new(0);
    let client = || -> Result<()> {
        loop {
            let object = next.fetch_add(1, Ordering::Relaxed);
            if object >= args.objects {
                return Ok(());
            }
            let body = fetch(ports, &format!("/web/{object}"))?;
            ensure!(
                body.len() == WEB_OBJECT_LEN,
                "web object {object} has {} bytes",
                body.len()
            );
        }
    };
    thread::scope(|scope| {
        let clients: Vec<_> = (0..args.clients).map(|_| scope.spawn(client)).collect();
        clients
            .into_iter()
            .try_for_each(|client| match client.join() {
                Ok(result) => result,
                Err(_) => bail!("a web client panicked"),
            })
    })
}

/// Fetches a page; asks again where QEMU's user network lost the connection,
/// which is part of the time that is measured.
fn fetch(ports: &GuestPorts, page: &str) -> Result<Vec<u8>> {
    const TRIES: u32 = 3;
    let ask = || probe::http_get(ports.http, page, ANSWER_LIMIT).with_context(|| page.to_owned());
    for _ in 1..TRIES {
        if let Ok(body) = ask() {
            return Ok(body);
        }
        thread::sleep(Duration::from_millis(50));
    }
    ask()
}

/// A figure of the first pass after each reboot in the median of those before
/// it; the median over repeats.
fn kept(rows: &[Row], method: Method, field: fn(&Row) -> f64) -> f64 {
    let repeats = rows.iter().map(|r| r.repeat + 1).max().unwrap_or(0);
    let ratios = (0..repeats).filter_map(|repeat| {
        let of = |when| {
            let fits = move |r: &&Row| r.method == method && r.repeat == repeat && r.when == when;
            rows.iter().filter(fits)
        };
        Some(field(of("after").next()?) / median(of("before").map(field).collect()))
    });
    median(ratios.collect())
}

fn print(args: &CacheArgs, rows: &[Row]) -> Vec<Aim> {
    println!(
        "MiB/s, one line a pass, {} reboots by each method ({})",
        args.repeats,
        caveat()
    );
    println!(
        "{:<6} {:<7} {:>4} {:>10} {:>10} {:>12}",
        "method", "when", "pass", "file", "web", "block reads"
    );
    for r in rows {
        println!(
            "{:<6} {:<7} {:>4} {:>10.1} {:>10.1} {:>12}",
            r.method.as_str(),
            r.when,
            r.pass,
            r.file_mib_s,
            r.web_mib_s,
            r.block_reads
        );
    }
    for method in METHODS {
        println!(
            "{}: just after it, {:.0} % of the file throughput and {:.0} % of the web throughput",
            method.as_str(),
            kept(rows, method, |r| r.file_mib_s) * 100.0,
            kept(rows, method, |r| r.web_mib_s) * 100.0
        );
    }
    let aims = aims(rows);
    Aim::print(&aims);
    aims
}

fn aims(rows: &[Row]) -> Vec<Aim> {
    let rate = |what: &str, field| {
        let kept = kept(rows, Method::Warm, field);
        let what = format!("warm, {what} throughput after to before");
        Aim::new(what, kept, ">= 0.95", kept >= 0.95)
    };
    let after = rows
        .iter()
        .filter(|r| r.method == Method::Warm && r.when == "after");
    let reads: Option<u64> = after.map(|r| r.block_reads).reduce(|a, b| a + b);
    let reads = reads.map_or(f64::NAN, |n| n as f64);
    let what = "warm, blocks read from the guest's disk after it".to_owned();
    vec![
        rate("file", |r| r.file_mib_s),
        rate("web", |r| r.web_mib_s),
        Aim::new(what, reads, "0", reads == 0.0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(when: &'static str, pass: u32, file_mib_s: f64, block_reads: u64) -> Row {
        Row {
            method: Method::Warm,
            repeat: 0,
            when,
            pass,
            file_mib_s,
            web_mib_s: 1.0,
            block_reads,
        }
    }

    #[test]
    fn the_pass_just_after_is_set_against_those_before() {
        let rows = [
            row("before", 0, 50.0, 9),
            row("before", 1, 150.0, 0),
            row("after", 0, 90.0, 0),
            row("after", 1, 100.0, 0),
        ];
        assert_eq!(kept(&rows, Method::Warm, |r| r.file_mib_s), 0.9);
        assert!(kept(&rows, Method::Cold, |r| r.file_mib_s).is_nan());
        let met: Vec<bool> = aims(&rows).iter().map(|aim| aim.met).collect();
        assert_eq!(met, [false, true, true]);
    }

    #[test]
    fn a_block_read_after_a_warm_reboot_is_told() {
        let rows = [row("before", 0, 1.0, 0), row("after", 0, 1.0, 8)];
        assert!(!aims(&rows)[2].met);
    }
}
