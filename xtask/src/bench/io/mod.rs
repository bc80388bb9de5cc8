//! A guest's disk and network under Hebe, as a ratio to the same work of the
//! same guest under QEMU in the same host.
//!
//! All guests run side by side and rest but for the one whose turn it is; the
//! turns alternate, so that whatever changes meanwhile meets both. Disks are raw
//! files of the host's ext4, written once from end to end before anything is
//! measured; both VMMs go through the host's page cache (QEMU's `writeback`,
//! which is its default, as is its thread pool). Under emulation those files
//! fit the host's memory: what is measured is the VMM's way, not the disk's.

mod fio;
mod iperf;

use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use hebe_types::StoreKind;
use lab::assets::{Assets, KernelName};
use lab::progress::Progress;
use lab::scenario::{GuestSpec, Lab, LabOptions};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::beside::Vmm;
use super::{Output, caveat, diagnosed, median, while_emulator_fails};
use crate::ui::Spinner;

const KERNEL: KernelName = KernelName::V6_1Cloud;
const MEMORY_MIB: u64 = 384;
/// The host's memory beside its VMs' and their disks', in MiB.
const HOST_MIB: u64 = 3072;
/// How long a program may take to start and end, beside what it measures.
const PROGRAM_LIMIT: Duration = Duration::from_secs(120);

const BLOCK_OF: [Vmm; 2] = [Vmm::Hebe, Vmm::Qemu];
const NET_OF: [Vmm; 4] = [Vmm::Hebe, Vmm::HebePlain, Vmm::Qemu, Vmm::QemuVhost];

/// What to measure.
#[derive(Args)]
pub struct IoArgs {
    /// Turns of each VMM.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repeats: u32,
    /// How long each case is measured, in seconds.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// Requests at a time on the disk.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 16], value_parser = clap::value_parser!(u32).range(1..=128))]
    depth: Vec<u32>,
    /// Size of each disk, in MiB.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u64).range(16..=4096))]
    disk_mib: u64,
    /// Disk or network alone.
    #[arg(long)]
    only: Option<Part>,
    /// Emulated processors run at the same time instead of in turn: VMM and
    /// guest then overlap as on hardware, and the emulator fails more often
    /// (docs/lab.md, limits).
    #[arg(long)]
    parallel: bool,
    #[command(flatten)]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
enum Part {
    Block,
    Net,
}

#[derive(Clone, Debug, Serialize)]
struct Row {
    part: Part,
    /// Such as `randread-4k-qd1`, or `to-host`.
    case: String,
    vmm: Vmm,
    repeat: u32,
    /// Requests or megabits a second.
    value: f64,
    unit: &'static str,
    /// Mean time of a request, in microseconds.
    latency_us: Option<f64>,
    /// What KVM counted in the host meanwhile, for the VM.
    kvm: Map<String, Value>,
}

/// A guest and who runs it.
struct Runner {
    vmm: Vmm,
    guest: GuestSpec,
    pid: u32,
}

/// Runs it; prints medians and ratios.
pub fn run(assets: &Assets, args: &IoArgs, progress: &Spinner) -> Result<()> {
    let (mut rows, mut failures) = (Vec::new(), 0);
    let result = while_emulator_fails(progress, &mut failures, || {
        rows.clear();
        measure(assets, args, progress, &mut rows)
    });
    progress.clear();
    print(args, &rows);
    let line = |r: &Row| {
        format!(
            "{:?},{},{},{},{:.2},{},{}",
            r.part,
            r.case,
            r.vmm.as_str(),
            r.repeat,
            r.value,
            r.unit,
            r.latency_us.map_or(String::new(), |us| format!("{us:.1}"))
        )
    };
    let csv: Vec<String> = rows.iter().map(line).collect();
    let all = json!({
        "repeats": args.repeats, "seconds": args.seconds, "disk_mib": args.disk_mib,
        "parallel": args.parallel, "emulator_failures": failures, "kernel": KERNEL.as_str(),
        "rows": rows,
    });
    let header = "part,case,vmm,repeat,value,unit,latency_us";
    args.output.write(all, &[], header, &csv)?;
    result
}

impl IoArgs {
    fn has(&self, part: Part) -> bool {
        self.only.is_none_or(|only| only == part)
    }

    fn vmms(&self) -> &'static [Vmm] {
        match self.only {
            Some(Part::Block) => &BLOCK_OF,
            _ => &NET_OF,
        }
    }
}

fn guest(vmm: Vmm, index: u8) -> GuestSpec {
    let plain = match vmm {
        Vmm::HebePlain => "virtio_net.csum=0 virtio_net.gso=0",
        _ => "",
    };
    GuestSpec {
        name: vmm.as_str().to_owned(),
        memory_mib: MEMORY_MIB,
        store: StoreKind::Memfd,
        tools: true,
        disk: BLOCK_OF.contains(&vmm),
        autostart: false,
        // Quiet guests.
        memcheck_mib: 1,
        memcheck_ms: Some(60_000),
        append: plain.to_owned(),
        ..GuestSpec::numbered(index, KERNEL)
    }
}

fn measure(assets: &Assets, args: &IoArgs, progress: &Spinner, rows: &mut Vec<Row>) -> Result<()> {
    let vmms = args.vmms();
    let guests: Vec<GuestSpec> = vmms.iter().zip(0..).map(|(v, i)| guest(*v, i)).collect();
    let own = guests.iter().filter(|guest| guest.disk);
    let disks: Vec<(String, u64)> = own.map(|g| (g.name.clone(), args.disk_mib)).collect();
    let disks_mib = args.disk_mib * disks.len() as u64;
    let options = LabOptions {
        guests: vmms.len() as u8,
        guest_disks: disks,
        reserve_mib: 0,
        store_init: false,
        memory_mib: HOST_MIB + MEMORY_MIB * vmms.len() as u64 + disks_mib.next_multiple_of(2),
        disk_mib: 4096 + 2 * disks_mib,
        peer: true,
        tools: true,
        bench_tools: true,
        parallel: args.parallel,
        ..LabOptions::default()
    };
    let mut lab = Lab::boot(assets, options, progress)?;
    let mut runners = Vec::new();
    for (vmm, guest) in vmms.iter().zip(&guests) {
        progress.step(&format!("booting the guest of {}", vmm.as_str()));
        let pids = vmm.start(&lab, std::slice::from_ref(guest))?;
        runners.push(Runner {
            vmm: *vmm,
            guest: guest.clone(),
            pid: pids[0],
        });
        let up = lab.wait_for_guests(std::slice::from_ref(guest));
        diagnosed(&mut lab, &guests, up)?;
    }
    let done = take_turns(&lab, args, &runners, progress, rows);
    diagnosed(&mut lab, &guests, done)?;
    lab.machine.power_off()
}

fn take_turns(
    lab: &Lab,
    args: &IoArgs,
    runners: &[Runner],
    progress: &Spinner,
    rows: &mut Vec<Row>,
) -> Result<()> {
    let of = |vmms: &'static [Vmm]| runners.iter().filter(|r| vmms.contains(&r.vmm));
    if args.has(Part::Block) {
        for runner in of(&BLOCK_OF) {
            progress.step(&format!("{}: filling the disk", runner.vmm.as_str()));
            fio::fill(lab, runner).with_context(|| runner.vmm.as_str())?;
        }
    }
    if args.has(Part::Net) {
        iperf::serve(lab)?;
    }
    for repeat in 0..args.repeats {
        if args.has(Part::Block) {
            for case in fio::Case::all(&args.depth) {
                for runner in of(&BLOCK_OF) {
                    let name = case.name();
                    progress.step(&format!("{} {name}, {}", runner.vmm.as_str(), repeat + 1));
                    let row = fio::run(lab, runner, case, args.seconds, repeat);
                    rows.push(row.with_context(|| format!("{} {name}", runner.vmm.as_str()))?);
                }
            }
        }
        if args.has(Part::Net) {
            for direction in iperf::Direction::ALL {
                for runner in of(&NET_OF) {
                    let name = direction.as_str();
                    progress.step(&format!("{} {name}, {}", runner.vmm.as_str(), repeat + 1));
                    let row = iperf::run(lab, runner, direction, args.seconds, repeat);
                    rows.push(row.with_context(|| format!("{} {name}", runner.vmm.as_str()))?);
                }
            }
        }
    }
    Ok(())
}

/// Runs a program in a guest to its end; its standard output.
fn in_guest(lab: &Lab, guest: &GuestSpec, words: &[String], seconds: u32) -> Result<String> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let limit = PROGRAM_LIMIT + Duration::from_secs(u64::from(seconds) * 4);
    let output = lab.guest_agent(guest)?.exec(&words, b"", limit)?;
    anyhow::ensure!(
        output.ok(),
        "`{}` ended with {:?}: {}",
        words.join(" "),
        output.code,
        output.all_text().trim()
    );
    Ok(output.text())
}

/// What KVM counted for a VM so far (debugfs); nothing where it does not say.
fn kvm_counters(lab: &Lab, pid: u32) -> Map<String, Value> {
    const WANTED: &str =
        "exits mmio_exits io_exits irq_exits halt_exits irq_injections signal_exits";
    let script = format!(
        "cd /sys/kernel/debug/kvm/{pid}-* && for f in {WANTED}; do echo $f $(cat $f); done"
    );
    let output = lab.machine.exec(&["/bin/busybox", "sh", "-c", &script]);
    let text = output.map(|o| o.text()).unwrap_or_default();
    let pair = |line: &str| {
        let (name, count) = line.split_once(' ')?;
        Some((name.to_owned(), Value::from(count.parse::<u64>().ok()?)))
    };
    text.lines().filter_map(pair).collect()
}

/// What was counted between two readings.
fn since(before: &Map<String, Value>, after: Map<String, Value>) -> Map<String, Value> {
    let difference = |(name, now): (String, Value)| {
        let then = before.get(&name)?.as_u64()?;
        Some((name, Value::from(now.as_u64()?.saturating_sub(then))))
    };
    after.into_iter().filter_map(difference).collect()
}

fn values(rows: &[Row], case: &str, vmm: Vmm) -> Vec<f64> {
    let of = rows.iter().filter(|r| r.vmm == vmm && r.case == case);
    of.map(|r| r.value).collect()
}

/// The middle, the least and the most of the ratios of turns that followed each
/// other.
fn ratio(rows: &[Row], case: &str, vmm: Vmm, to: Vmm) -> [f64; 3] {
    let (of, to) = (values(rows, case, vmm), values(rows, case, to));
    let ratios: Vec<f64> = of.iter().zip(&to).map(|(of, to)| of / to).collect();
    let least = ratios.iter().copied().fold(f64::NAN, f64::min);
    let most = ratios.iter().copied().fold(f64::NAN, f64::max);
    [median(ratios), least, most]
}

fn print(args: &IoArgs, rows: &[Row]) {
    println!(
        "median of {} turns of {} s; ratio to QEMU turn by turn: median, least, most ({})",
        args.repeats,
        args.seconds,
        caveat()
    );
    println!(
        "{:<18} {:<11} {:>10} {:<7} {:>10} {:>6} {:>6} {:>6} {:>10}",
        "case", "vmm", "median", "", "latency us", "ratio", "least", "most", "exits each"
    );
    let mut seen: Vec<(&str, Vmm)> = Vec::new();
    for row in rows {
        let (case, vmm) = (row.case.as_str(), row.vmm);
        if seen.contains(&(case, vmm)) {
            continue;
        }
        seen.push((case, vmm));
        let mine = || rows.iter().filter(|r| r.case == case && r.vmm == vmm);
        let latency = median(mine().filter_map(|r| r.latency_us).collect());
        let exits = |r: &Row| Some(r.kvm.get("exits")?.as_f64()? / units(r, args.seconds));
        let exits = median(mine().filter_map(exits).collect());
        let [middle, least, most] = ratio(rows, case, vmm, Vmm::Qemu);
        println!(
            "{case:<18} {:<11} {:>10.0} {:<7} {latency:>10.0} {middle:>6.2} {least:>6.2} {most:>6.2} {exits:>10.2}",
            vmm.as_str(),
            median(values(rows, case, vmm)),
            row.unit,
        );
    }
}

/// How many requests, or KiB, a turn moved.
fn units(row: &Row, seconds: u32) -> f64 {
    let all = row.value * f64::from(seconds);
    match row.part {
        Part::Block => all,
        Part::Net => all * 1e6 / 8.0 / 1024.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(vmm: Vmm, repeat: u32, value: f64) -> Row {
        Row {
            part: Part::Block,
            case: "x".to_owned(),
            vmm,
            repeat,
            value,
            unit: "IO/s",
            latency_us: None,
            kvm: Map::new(),
        }
    }

    #[test]
    fn ratios_are_those_of_turns_that_followed_each_other() {
        let rows = [
            row(Vmm::Hebe, 0, 100.0),
            row(Vmm::Qemu, 0, 200.0),
            row(Vmm::Hebe, 1, 300.0),
            row(Vmm::Qemu, 1, 300.0),
            row(Vmm::Hebe, 2, 90.0),
            row(Vmm::Qemu, 2, 100.0),
        ];
        assert_eq!(ratio(&rows, "x", Vmm::Hebe, Vmm::Qemu), [0.9, 0.5, 1.0]);
        let none = ratio(&rows, "y", Vmm::Hebe, Vmm::Qemu);
        assert!(none.iter().all(|r| r.is_nan()));
    }

    #[test]
    fn counters_are_differences() {
        let map = |exits: u64| Map::from_iter([("exits".to_owned(), Value::from(exits))]);
        assert_eq!(since(&map(10), map(25)), map(15));
        assert!(since(&Map::new(), map(25)).is_empty());
    }

    #[test]
    fn guests_are_such_as_the_product_accepts() {
        for (vmm, index) in NET_OF.into_iter().zip(0..) {
            let config = guest(vmm, index).config().expect("a definition");
            let disks = if BLOCK_OF.contains(&vmm) { 2 } else { 1 };
            assert_eq!(config.disks.len(), disks);
            assert!(config.disks[0].readonly);
        }
    }
}
