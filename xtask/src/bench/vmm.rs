//! What a VMM costs: the memory of each one's process without guest RAM, and
//! the time from the order to the guest's first instruction and to its first
//! program; beside QEMU, in the same host, with the same guest.
//!
//! A VMM's memory is its share of what is mapped (`Pss`), guest RAM left out
//! ([`lab::smaps`] says how). It is read once the guest answers, and again
//! after the guest wrote to its disk and sent web objects.

use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use hebe_types::StoreKind;
use lab::assets::{Assets, KernelName};
use lab::probe;
use lab::progress::Progress;
use lab::scenario::{GuestSpec, Lab, LabOptions};
use lab::smaps::Share;
use lab_guest::{Timed, USER_SPACE};
use serde::Serialize;
use serde_json::{Value, json};

use super::beside::Vmm;
use super::{Aim, Output, caveat, diagnosed, median, while_emulator_fails};
use crate::ui::Spinner;

const KERNEL: KernelName = KernelName::V6_1Cloud;
/// Most VMs at once.
const VMS_MAX: i64 = 11;
/// The host's memory beside what is its VMs', in MiB.
const HOST_MIB: u64 = 2560;
/// A VM's, with that of its VMM.
const MEMORY_MIB: u64 = 128;
const VMM_MIB: u64 = 64;
const DISK_MIB: u64 = 64;
/// What a guest writes, and what it sends.
const FILE_MIB: u64 = 8;
const OBJECTS: u32 = 4;
/// How long one answer of a guest may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(120);
/// What the issue of this bench expects of a VMM, in KiB.
const OVERHEAD_MAX_KIB: u64 = 8 << 10;
/// Pause of the guests' memory checkers, in milliseconds: quiet guests.
const MEMCHECK_MS: u64 = 2000;

const MEMORY_OF: [Vmm; 2] = [Vmm::Hebe, Vmm::Qemu];
const STARTS_OF: [Vmm; 3] = [Vmm::HebeDevdax, Vmm::Hebe, Vmm::Qemu];

/// What to measure.
#[derive(Args)]
pub struct VmmArgs {
    /// Numbers of VMs that run at once while memory is read.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 4, 11], value_parser = clap::value_parser!(u8).range(1..=VMS_MAX))]
    vms: Vec<u8>,
    /// Starts of one VM by each VMM; 0 leaves them out.
    #[arg(long, default_value_t = 5)]
    repeats: u32,
    /// Leave the memory out.
    #[arg(long)]
    starts_only: bool,
    #[command(flatten)]
    output: Output,
}

#[derive(Serialize)]
struct Memory {
    vmm: Vmm,
    /// VMs of this VMM that run.
    n: u8,
    vm: String,
    /// `booted`, or `worked`: it used its disk and its network, too.
    when: &'static str,
    overhead_kib: u64,
    share: Share,
}

#[derive(Serialize)]
struct Start {
    vmm: Vmm,
    repeat: u32,
    /// From the order to the vCPUs let go, where the VMM tells.
    first_instruction_ms: Option<f64>,
    /// To the guest's first program.
    user_space_ms: f64,
    /// To the end of the program that ordered it.
    order_ms: f64,
}

#[derive(Default)]
struct Found {
    memory: Vec<Memory>,
    starts: Vec<Start>,
}

/// Runs it; prints medians and whether they are as expected.
pub fn run(assets: &Assets, args: &VmmArgs, progress: &Spinner) -> Result<()> {
    let (mut found, mut failures) = (Found::default(), 0);
    let mut result = Ok(());
    if !args.starts_only {
        result = while_emulator_fails(progress, &mut failures, || {
            found.memory.clear();
            measure_memory(assets, args, progress, &mut found.memory)
        });
    }
    if result.is_ok() && args.repeats > 0 {
        result = while_emulator_fails(progress, &mut failures, || {
            found.starts.clear();
            measure_starts(assets, args, progress, &mut found.starts)
        });
    }
    progress.clear();
    let aims = print(args, &found);
    let all = json!({
        "repeats": args.repeats, "emulator_failures": failures, "kernel": KERNEL.as_str(),
        "memory": found.memory, "starts": found.starts,
    });
    let header = "vmm,n,vm,when,overhead_kib,guest_kib,files_kib,heap_kib,stack_kib,anonymous_kib,repeat,first_instruction_ms,user_space_ms,order_ms";
    args.output.write(all, &aims, header, &csv(&found))?;
    result
}

/// Guests number `from` and up, called by their VMM.
fn guests(vmm: Vmm, from: u8, count: u8, memory_mib: u64) -> Vec<GuestSpec> {
    let store = match vmm {
        Vmm::HebeDevdax => StoreKind::Devdax,
        _ => StoreKind::Memfd,
    };
    let guest = |i| GuestSpec {
        name: format!("{}-{}", vmm.as_str(), i + 1),
        memory_mib,
        store,
        disk: true,
        autostart: false,
        memcheck_mib: 8,
        memcheck_ms: Some(MEMCHECK_MS),
        append: "lab.say".to_owned(),
        ..GuestSpec::numbered(from + i, KERNEL)
    };
    (0..count).map(guest).collect()
}

fn disks(guests: &[Vec<GuestSpec>]) -> Vec<(String, u64)> {
    let names = guests.iter().flatten().map(|guest| guest.name.clone());
    names.map(|name| (name, DISK_MIB)).collect()
}

fn measure_memory(
    assets: &Assets,
    args: &VmmArgs,
    progress: &Spinner,
    rows: &mut Vec<Memory>,
) -> Result<()> {
    let mut counts = args.vms.clone();
    counts.sort_unstable();
    counts.dedup();
    let most = counts.last().copied().context("--vms names no number")?;
    let all: Vec<Vec<GuestSpec>> = MEMORY_OF
        .iter()
        .zip(0..)
        .map(|(vmm, i)| guests(*vmm, i * most, most, MEMORY_MIB))
        .collect();
    let vms_mib = u64::from(most) * (MEMORY_MIB + VMM_MIB);
    let options = LabOptions {
        guests: most * MEMORY_OF.len() as u8,
        guest_disks: disks(&all),
        reserve_mib: 0,
        store_init: false,
        memory_mib: HOST_MIB + vms_mib.next_multiple_of(2),
        peer: true,
        ..LabOptions::default()
    };
    let mut lab = Lab::boot(assets, options, progress)?;
    for (vmm, guests) in MEMORY_OF.iter().zip(&all) {
        let done = memory_of(&mut lab, *vmm, guests, &counts, progress, rows);
        diagnosed(&mut lab, guests, done).with_context(|| vmm.as_str())?;
    }
    lab.machine.power_off()
}

/// Starts one VM after another, and reads the memory at each number of them.
fn memory_of(
    lab: &mut Lab,
    vmm: Vmm,
    guests: &[GuestSpec],
    counts: &[u8],
    progress: &Spinner,
    rows: &mut Vec<Memory>,
) -> Result<()> {
    let mut pids = Vec::new();
    for n in counts {
        let (up, wanted) = (pids.len(), usize::from(*n));
        progress.step(&format!("{}: {n} VMs", vmm.as_str()));
        pids.extend(vmm.start(lab, &guests[up..wanted])?);
        lab.wait_for_guests(&guests[..wanted])?;
        let row = |lab: &Lab, i: usize, when| -> Result<Memory> {
            let share = lab.share(pids[i])?;
            Ok(Memory {
                vmm,
                n: *n,
                vm: guests[i].name.clone(),
                when,
                overhead_kib: share.overhead_kib(),
                share,
            })
        };
        for i in up..wanted {
            rows.push(row(lab, i, "booted")?);
        }
        // Each once: those that were there before have done it.
        for guest in &guests[up..wanted] {
            work(lab, guest)?;
        }
        for i in 0..wanted {
            rows.push(row(lab, i, "worked")?);
        }
    }
    vmm.stop(lab, guests)
}

/// Has a guest write to its disk and send what it wrote.
fn work(lab: &Lab, guest: &GuestSpec) -> Result<()> {
    let ports = lab.ports(guest)?;
    probe::http_get(ports.http, &format!("/file?mib={FILE_MIB}"), ANSWER_LIMIT)?;
    for object in 0..OBJECTS {
        probe::http_get(ports.http, &format!("/web/{object}"), ANSWER_LIMIT)?;
    }
    Ok(())
}

fn measure_starts(
    assets: &Assets,
    args: &VmmArgs,
    progress: &Spinner,
    rows: &mut Vec<Start>,
) -> Result<()> {
    let memory_mib = 256;
    let all: Vec<Vec<GuestSpec>> = STARTS_OF
        .iter()
        .zip(0..)
        .map(|(vmm, i)| guests(*vmm, i, 1, memory_mib))
        .collect();
    let options = LabOptions {
        guests: STARTS_OF.len() as u8,
        guest_disks: disks(&all),
        reserve_mib: 512,
        memory_mib: HOST_MIB + 512,
        peer: true,
        ..LabOptions::default()
    };
    let mut lab = Lab::boot(assets, options, progress)?;
    for repeat in 0..args.repeats {
        for (vmm, guests) in STARTS_OF.iter().zip(&all) {
            progress.step(&format!("{}: start {}", vmm.as_str(), repeat + 1));
            let row = start(&mut lab, *vmm, guests, repeat);
            rows.push(diagnosed(&mut lab, guests, row).with_context(|| vmm.as_str())?);
        }
    }
    lab.machine.power_off()
}

/// Starts a VM, and ends it once its guest answers.
fn start(lab: &mut Lab, vmm: Vmm, guests: &[GuestSpec], repeat: u32) -> Result<Start> {
    vmm.define(lab, guests)?;
    let folder = format!("/run/hebe/vms/{}", guests[0].name);
    let console = format!("{folder}/console.log");
    let order = vmm.order(guests);
    let mut words = vec!["/init", "timed", &console, USER_SPACE];
    words.extend(order.iter().map(String::as_str));
    let said = lab.machine.exec_ok(&words)?;
    let timed: Timed = serde_json::from_str(&said).context("no times")?;
    let since_ms = |ns: u64| ns.saturating_sub(timed.began_ns) as f64 / 1e6;
    let first_instruction_ms = match vmm.is_hebe() {
        true => Some(since_ms(let_go_ns(lab, &folder)?)),
        false => None,
    };
    lab.wait_for_guests(guests)?;
    vmm.stop(lab, guests)?;
    Ok(Start {
        vmm,
        repeat,
        first_instruction_ms,
        user_space_ms: since_ms(timed.seen_ns),
        order_ms: since_ms(timed.ended_ns),
    })
}

/// When a VMM of Hebe's says that it let its vCPUs go: the last one of its log.
fn let_go_ns(lab: &Lab, folder: &str) -> Result<u64> {
    let log = lab.machine.agent.get(&format!("{folder}/log"))?;
    let log = String::from_utf8_lossy(&log).into_owned();
    let noted = log.lines().rev().find_map(|line| {
        let line: Value = serde_json::from_str(line).ok()?;
        (line["text"] == "running").then(|| line["realtime_ns"].as_u64())?
    });
    noted.with_context(|| format!("the VMM does not say that it runs: {log}"))
}

fn csv(found: &Found) -> Vec<String> {
    let memory = found.memory.iter().map(|m| {
        let s = m.share;
        format!(
            "{},{},{},{},{},{},{},{},{},{},,,,",
            m.vmm.as_str(),
            m.n,
            m.vm,
            m.when,
            m.overhead_kib,
            s.guest_kib,
            s.files_kib,
            s.heap_kib,
            s.stack_kib,
            s.anonymous_kib
        )
    });
    let starts = found.starts.iter().map(|s| {
        let first = s.first_instruction_ms;
        format!(
            "{},1,,started,,,,,,,{},{},{:.1},{:.1}",
            s.vmm.as_str(),
            s.repeat,
            first.map_or(String::new(), |ms| format!("{ms:.1}")),
            s.user_space_ms,
            s.order_ms
        )
    });
    memory.chain(starts).collect()
}

/// One figure of every row that fits.
fn memory_kib(found: &Found, vmm: Vmm, n: u8, when: &str, part: fn(&Memory) -> u64) -> Vec<f64> {
    let fits = |m: &&Memory| (m.vmm, m.n, m.when) == (vmm, n, when);
    let of = found.memory.iter().filter(fits);
    of.map(|m| part(m) as f64).collect()
}

fn start_ms(found: &Found, vmm: Vmm, part: fn(&Start) -> Option<f64>) -> f64 {
    let of = found.starts.iter().filter(|s| s.vmm == vmm);
    median(of.filter_map(part).collect())
}

fn print(args: &VmmArgs, found: &Found) -> Vec<Aim> {
    let mut aims = Vec::new();
    if !found.memory.is_empty() {
        print_memory(args, found, &mut aims);
    }
    if !found.starts.is_empty() {
        print_starts(args, found);
    }
    Aim::print(&aims);
    aims
}

fn print_memory(args: &VmmArgs, found: &Found, aims: &mut Vec<Aim>) {
    println!("a VMM's memory without guest RAM (Pss), KiB, median and most over VMs");
    println!(
        "{:<6} {:>3} {:<7} {:>8} {:>8} {:>8} {:>8} {:>10}",
        "vmm", "n", "when", "median", "most", "files", "heap", "anonymous"
    );
    for vmm in MEMORY_OF {
        for n in &args.vms {
            for when in ["booted", "worked"] {
                let of = |part| memory_kib(found, vmm, *n, when, part);
                let most = of(|m| m.overhead_kib).into_iter().fold(f64::NAN, f64::max);
                println!(
                    "{:<6} {n:>3} {when:<7} {:>8.0} {most:>8.0} {:>8.0} {:>8.0} {:>10.0}",
                    vmm.as_str(),
                    median(of(|m| m.overhead_kib)),
                    median(of(|m| m.share.files_kib)),
                    median(of(|m| m.share.heap_kib)),
                    median(of(|m| m.share.anonymous_kib)),
                );
                if vmm == Vmm::Hebe {
                    let what = format!("most of a hebe-vmm, n = {n}, {when}, KiB");
                    let met = most <= OVERHEAD_MAX_KIB as f64;
                    aims.push(Aim::new(what, most, "<= 8192", met));
                }
            }
        }
    }
}

fn print_starts(args: &VmmArgs, found: &Found) {
    println!(
        "milliseconds from the order, median of {} starts ({}); {KERNEL}",
        args.repeats,
        caveat()
    );
    println!(
        "{:<12} {:>18} {:>12} {:>12}",
        "vmm", "first instruction", "user space", "order ended"
    );
    for vmm in STARTS_OF {
        let of = |part| start_ms(found, vmm, part);
        println!(
            "{:<12} {:>18.0} {:>12.0} {:>12.0}",
            vmm.as_str(),
            of(|s| s.first_instruction_ms),
            of(|s| Some(s.user_space_ms)),
            of(|s| Some(s.order_ms)),
        );
    }
    let user_space = |vmm| start_ms(found, vmm, |s| Some(s.user_space_ms));
    println!(
        "start to user space, hebe to qemu: {:.2}",
        user_space(Vmm::Hebe) / user_space(Vmm::Qemu)
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(vmm: Vmm, n: u8, when: &'static str, kib: u64) -> Memory {
        let share = Share {
            files_kib: kib,
            ..Share::default()
        };
        Memory {
            vmm,
            n,
            vm: "vm1".to_owned(),
            when,
            overhead_kib: share.overhead_kib(),
            share,
        }
    }

    #[test]
    fn the_largest_vmm_decides_whether_the_expectation_is_met() {
        let args = VmmArgs {
            vms: vec![2],
            repeats: 0,
            starts_only: false,
            output: Output {
                json: None,
                csv: None,
            },
        };
        let found = Found {
            memory: vec![
                memory(Vmm::Hebe, 2, "booted", 4000),
                memory(Vmm::Hebe, 2, "booted", 8192),
                memory(Vmm::Hebe, 2, "worked", 8193),
                memory(Vmm::Qemu, 2, "worked", 90_000),
            ],
            starts: Vec::new(),
        };
        let aims = print(&args, &found);
        let met: Vec<bool> = aims.iter().map(|aim| aim.met).collect();
        assert_eq!(met, [true, false]);
        assert_eq!(aims[0].value, Some(8192.0));
        let line = &csv(&found)[0];
        assert!(line.starts_with("hebe,2,vm1,booted,4000,0,4000,"), "{line}");
    }

    #[test]
    fn guests_of_both_vmms_have_names_and_addresses_of_their_own() {
        let hebe = guests(Vmm::Hebe, 0, 2, 128);
        let qemu = guests(Vmm::Qemu, 2, 2, 128);
        assert_eq!((hebe[1].name.as_str(), hebe[1].index), ("hebe-2", 1));
        assert_eq!((qemu[0].name.as_str(), qemu[0].index), ("qemu-1", 2));
        assert!(hebe.iter().all(|guest| guest.config().is_ok()));
    }
}
