//! Downtime seen from outside, for every method, number of VMs and service.
//!
//! The machine is the same for every number of VMs of a run: its memory costs
//! its kernel time at start-up, which is part of the downtime.

use std::collections::VecDeque;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use lab::assets::{Assets, KernelName};
use lab::peer;
use lab::probe::{ProbeRecord, UDP_INTERVAL, UdpRecord};
use lab::progress::Progress;
use lab::scenario::{GuestSpec, Lab, LabOptions};
use lab::trial::{self, Method, Trial, VmRow};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{Aim, Output, caveat, diagnosed, median, while_emulator_fails};
use crate::ui::Spinner;

/// How much work the slow-starting service does before it listens: a
/// stand-in for a heavy Java server.
const SLOW_WORK: &str = "lab.slow_work=400";
/// The kernel before and after.
const KERNEL: KernelName = KernelName::V6_1Cloud;
/// More VMs than this are small ones.
const LARGE_VMS_MAX: u8 = 4;
/// Pause of a memory checker that is one of many, in milliseconds.
const MANY_MEMCHECK_MS: u64 = 500;
/// Pause between two probes of one VM of many.
const MANY_PROBE_EVERY: Duration = Duration::from_millis(50);
/// The host's own memory, in MiB.
const HOST_MIB: u64 = 2560;
/// What the store needs beside the VMs' RAM, in MiB, and for each VM.
const STORE_MIB: [u64; 2] = [64, 8];
/// The largest machine that the lab makes, in MiB.
const MACHINE_MIB_MAX: u64 = 8192;

/// What to measure.
#[derive(Args)]
pub struct RebootArgs {
    /// Numbers of VMs.
    #[arg(long, value_delimiter = ',', default_value = "1,2,4")]
    vms: Vec<u8>,
    /// Methods; qemu-cpr is QEMU as the VMM, on the same range.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "warm,saved,cold,qemu-cpr"
    )]
    methods: Vec<Method>,
    /// RAM of each VM, in MiB; otherwise 256, and 128 where there are more than 4.
    #[arg(long)]
    memory: Option<u64>,
    /// Repeats of each.
    #[arg(long, default_value_t = 1)]
    repeats: u32,
    /// Eleven small VMs, too.
    #[arg(long)]
    full: bool,
    #[command(flatten)]
    output: Output,
}

impl RebootArgs {
    fn counts(&self) -> Vec<u8> {
        let mut counts = self.vms.clone();
        if self.full {
            counts.push(11);
        }
        counts.sort_unstable();
        counts.dedup();
        counts
    }

    fn memory_mib(&self, n: u8) -> u64 {
        let usual = if n > LARGE_VMS_MAX { 128 } else { 256 };
        self.memory.unwrap_or(usual)
    }

    /// What the reserved range must hold for every number of VMs.
    fn reserve_mib(&self) -> u64 {
        let [store, each] = STORE_MIB;
        let of = |n: u8| store + u64::from(n) * (self.memory_mib(n) + each);
        self.counts().into_iter().map(of).max().unwrap_or(store)
    }
}

#[derive(Serialize)]
struct Row {
    method: Method,
    n: u8,
    repeat: u32,
    vm: String,
    service: &'static str,
    downtime_ms: f64,
    /// Milliseconds since the order, by event; the host's events and this VM's.
    phases: Map<String, Value>,
    memory_mib: u64,
    /// Pause between two UDP probes: the light service's resolution.
    probe_ms: u64,
    same_boot: bool,
    memory_check_ok: bool,
    tcp_session_survived: bool,
    wall_clock_moved_ms: f64,
}

impl Row {
    /// The VM lost something that its method keeps.
    fn lost(&self) -> bool {
        self.method != Method::Cold
            && !(self.same_boot && self.memory_check_ok && self.tcp_session_survived)
    }
}

/// What a run collects.
#[derive(Default)]
struct Found {
    rows: Vec<Row>,
    raw: Vec<Value>,
    emulator_failures: u32,
}

/// Runs it; prints the medians.
pub fn run(assets: &Assets, args: &RebootArgs, progress: &Spinner) -> Result<()> {
    for n in args.counts() {
        ensure!(
            (1..=11).contains(&n),
            "1 to 11 VMs fit into the lab, not {n}"
        );
    }
    let machine_mib = HOST_MIB + args.reserve_mib();
    ensure!(
        machine_mib <= MACHINE_MIB_MAX,
        "these VMs need a machine of {machine_mib} MiB, and the lab makes none above {MACHINE_MIB_MAX}: use fewer or smaller ones"
    );
    let mut found = Found::default();
    let rounds = args
        .counts()
        .into_iter()
        .flat_map(|n| [(n, false), (n, true)]);
    // What was measured before a failure is kept.
    let result = rounds
        .into_iter()
        .try_for_each(|(n, peer)| measure(assets, args, n, peer, progress, &mut found));
    progress.clear();
    let rows = &found.rows;
    print(args, rows);
    let aims = aims(args, rows);
    Aim::print(&aims);
    let csv: Vec<String> = rows.iter().map(csv_line).collect();
    let all = json!({
        "repeats": args.repeats,
        "machine_mib": machine_mib,
        "emulator_failures": found.emulator_failures,
        "rows": rows,
        "raw": found.raw,
    });
    let header = "method,n,repeat,vm,service,downtime_ms,memory_mib,probe_ms,same_boot,memory_check_ok,tcp_session_survived,wall_clock_moved_ms";
    args.output.write(all, &aims, header, &csv)?;
    result?;
    let lost = rows
        .iter()
        .find(|r| r.method != Method::QemuCpr && r.lost());
    match lost {
        Some(r) => bail!(
            "{} did not get over a {} reboot unharmed: its figures count for nothing",
            r.vm,
            r.method.as_str()
        ),
        None => Ok(()),
    }
}

/// Measures the methods of Hebe, or QEMU's, with `n` VMs.
fn measure(
    assets: &Assets,
    args: &RebootArgs,
    n: u8,
    peer: bool,
    progress: &Spinner,
    found: &mut Found,
) -> Result<()> {
    let is_peers = |method: &&Method| (**method == Method::QemuCpr) == peer;
    let methods: Vec<Method> = args.methods.iter().filter(is_peers).copied().collect();
    let mut left: VecDeque<(u32, Method)> = (0..args.repeats)
        .flat_map(|repeat| methods.iter().map(move |method| (repeat, *method)))
        .collect();
    let mut failures = 0;
    let result = while_emulator_fails(progress, &mut failures, || {
        if left.is_empty() {
            return Ok(());
        }
        let mut host = Host::boot(assets, args, n, peer, progress)?;
        while let Some((repeat, method)) = left.front().copied() {
            host.measure(method, repeat, progress, found)?;
            left.pop_front();
        }
        host.lab.machine.power_off()
    });
    found.emulator_failures += failures;
    result
}

/// A host full of VMs.
struct Host {
    lab: Lab,
    guests: Vec<GuestSpec>,
}

impl Host {
    fn boot(
        assets: &Assets,
        args: &RebootArgs,
        n: u8,
        peer: bool,
        progress: &Spinner,
    ) -> Result<Self> {
        let guests: Vec<GuestSpec> = (0..n).map(|i| guest(i, n, args.memory_mib(n))).collect();
        let reserve_mib = args.reserve_mib();
        let options = LabOptions {
            guests: n.max(4),
            reserve_mib,
            memory_mib: HOST_MIB + reserve_mib,
            disk_mib: 4096 + 2 * reserve_mib,
            peer,
            store_init: !peer,
            // No VM is Hebe's where the range is QEMU's.
            append: if peer { "lab.noresume" } else { "" }.to_owned(),
            ..LabOptions::default()
        };
        let lab = Lab::boot(assets, options, progress)?;
        let vmm = if peer { "QEMU" } else { "hebe-vmm" };
        progress.step(&format!("booting {n} VMs of {vmm}"));
        match peer {
            true => peer::start(&lab, &guests)?,
            false => lab.start(&guests)?,
        }
        Ok(Self { lab, guests })
    }

    fn measure(
        &mut self,
        method: Method,
        repeat: u32,
        progress: &Spinner,
        found: &mut Found,
    ) -> Result<()> {
        let (n, word) = (self.guests.len() as u8, method.as_str());
        let trial = trial::reboot(&mut self.lab, &self.guests, method, KERNEL, &[], progress);
        let trial = diagnosed(&mut self.lab, &self.guests, trial);
        let trial = trial.with_context(|| format!("n = {n}, {word}"))?;
        progress.note(&format!("n = {n}, {word}: {}", summary(&trial)));
        for (guest, vm) in self.guests.iter().zip(&trial.vms) {
            add_rows(&trial, vm, guest, repeat, n, &mut found.rows)?;
        }
        let probes: Vec<Value> = trial.raw.iter().map(samples).collect();
        found.raw.push(json!({
            "method": word, "n": n, "repeat": repeat, "report": trial.report, "probes": probes,
        }));
        Ok(())
    }
}

/// The first VM runs the slow-starting service, too. Where there are many,
/// each works less and is probed less often: together they would keep the
/// emulated machine busy all the time, and it is their downtime that counts.
fn guest(index: u8, n: u8, memory_mib: u64) -> GuestSpec {
    let slow = if index == 0 { SLOW_WORK } else { "" };
    let many = n > LARGE_VMS_MAX;
    GuestSpec {
        memory_mib,
        memcheck_mib: if many { 8 } else { 32 },
        memcheck_ms: many.then_some(MANY_MEMCHECK_MS),
        probe_every: if many { MANY_PROBE_EVERY } else { UDP_INTERVAL },
        append: slow.to_owned(),
        ..GuestSpec::numbered(index, KERNEL)
    }
}

fn add_rows(
    trial: &Trial,
    vm: &VmRow,
    guest: &GuestSpec,
    repeat: u32,
    n: u8,
    rows: &mut Vec<Row>,
) -> Result<()> {
    let phases = phases(&trial.report, &vm.name)
        .with_context(|| format!("{}: the host has no report", trial.method.as_str()))?;
    let services = [
        ("light", Some(vm.downtime_ms)),
        ("slow-starting", vm.slow_service_downtime_ms),
    ];
    for (service, downtime) in services {
        let Some(downtime_ms) = downtime else {
            continue;
        };
        rows.push(Row {
            method: trial.method,
            n,
            repeat,
            vm: vm.name.clone(),
            service,
            downtime_ms,
            phases: phases.clone(),
            memory_mib: guest.memory_mib,
            probe_ms: guest.probe_every.as_millis() as u64,
            same_boot: vm.boot_id_before == vm.boot_id_after,
            memory_check_ok: vm.memory_check_ok,
            tcp_session_survived: vm.tcp_session_survived,
            wall_clock_moved_ms: vm.wall_clock_off_ms - vm.wall_clock_off_before_ms,
        });
    }
    Ok(())
}

/// When each event of the host and of one VM was, since the order.
fn phases(report: &Value, vm: &str) -> Option<Map<String, Value>> {
    let rows = report["rows"].as_array().filter(|rows| !rows.is_empty())?;
    let mine = rows
        .iter()
        .filter(|row| row["vm"].is_null() || row["vm"] == vm);
    let pair = |row: &Value| Some((row["kind"].as_str()?.to_owned(), row["at_ms"].clone()));
    Some(mine.filter_map(pair).collect())
}

/// Each probe as `[sent, reply]`, in microseconds; no reply is null.
fn samples(probe: &ProbeRecord) -> Value {
    let UdpRecord { samples, end_us } = &probe.udp;
    let udp: Vec<_> = samples.iter().map(|s| (s.sent_us, s.reply_us)).collect();
    json!({ "udp_us": udp, "end_us": end_us, "tcp": probe.tcp, "slow": probe.slow })
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
        "{},{},{},{},{},{:.1},{},{},{},{},{},{:.1}",
        row.method.as_str(),
        row.n,
        row.repeat,
        row.vm,
        row.service,
        row.downtime_ms,
        row.memory_mib,
        row.probe_ms,
        row.same_boot,
        row.memory_check_ok,
        row.tcp_session_survived,
        row.wall_clock_moved_ms,
    )
}

/// Median downtime in seconds.
fn downtime_s(rows: &[Row], method: Method, n: u8, service: &str) -> f64 {
    let fits = |r: &&Row| r.n == n && r.method == method && r.service == service;
    let of = rows.iter().filter(fits).map(|r| r.downtime_ms / 1000.0);
    median(of.collect())
}

/// Median seconds, over repeats, from the first `from` of a reboot's VMs to
/// the last event of the first kind in `to` that the method has.
fn span_s(rows: &[Row], method: Method, n: u8, from: &str, to: &[&str]) -> f64 {
    let repeats = rows.iter().map(|r| r.repeat + 1).max().unwrap_or(0);
    let spans = (0..repeats).filter_map(|repeat| {
        let fits = |r: &&Row| r.n == n && r.method == method && r.repeat == repeat;
        let at = |kind: &str| -> Vec<f64> {
            let of = rows.iter().filter(fits);
            of.filter_map(|r| r.phases.get(kind)?.as_f64()).collect()
        };
        let first = at(from).into_iter().reduce(f64::min)?;
        let ends = to.iter().map(|kind| at(kind)).find(|at| !at.is_empty())?;
        Some((ends.into_iter().reduce(f64::max)? - first) / 1000.0)
    });
    median(spans.collect())
}

fn print(args: &RebootArgs, rows: &[Row]) {
    println!(
        "seconds, median of {} repeats and all VMs ({}); before and after: from the first VM's order to the last one's end, from the first VMM's start to the last VM that runs",
        args.repeats,
        caveat()
    );
    println!(
        "{:<8} {:>3} {:>10} {:>14} {:>10} {:>10}",
        "method", "n", "light", "slow-starting", "before", "after"
    );
    for n in args.counts() {
        for method in &args.methods {
            let of = |service| downtime_s(rows, *method, n, service);
            let ends = ["saved", "committed", "powered-off"];
            let before = span_s(rows, *method, n, "suspend-asked", &ends);
            let after = span_s(rows, *method, n, "vmm-started", &["running", "booted"]);
            println!(
                "{:<8} {n:>3} {:>10.2} {:>14.2} {before:>10.2} {after:>10.2}",
                method.as_str(),
                of("light"),
                of("slow-starting"),
            );
        }
    }
    for r in rows.iter().filter(|r| r.lost() && r.service == "light") {
        println!(
            "LOST, {}, n = {}, {}: same boot {}, memory intact {}, TCP session survived {}",
            r.method.as_str(),
            r.n,
            r.vm,
            r.same_boot,
            r.memory_check_ok,
            r.tcp_session_survived
        );
    }
}

/// What the issue of this bench expects: warm flat in n and in the service,
/// and far below cold.
fn aims(args: &RebootArgs, rows: &[Row]) -> Vec<Aim> {
    let mut aims = Vec::new();
    let warm = |n, service| downtime_s(rows, Method::Warm, n, service);
    let counts = args.counts();
    let large: Vec<u8> = counts
        .iter()
        .copied()
        .filter(|n| *n <= LARGE_VMS_MAX)
        .collect();
    if !args.methods.contains(&Method::Warm) {
        return aims;
    }
    if let [first, .., last] = large[..] {
        let ratio = warm(last, "light") / warm(first, "light");
        let what = format!("warm downtime, n = {last} to n = {first}");
        aims.push(Aim::new(what, ratio, "<= 1.25", ratio <= 1.25));
    }
    for n in counts {
        let ratio = warm(n, "slow-starting") / warm(n, "light");
        let what = format!("warm downtime, slow-starting to light, n = {n}");
        aims.push(Aim::new(what, ratio, "<= 1.25", ratio <= 1.25));
        if args.methods.contains(&Method::Cold) && n >= LARGE_VMS_MAX {
            for service in ["light", "slow-starting"] {
                let ratio = warm(n, service) / downtime_s(rows, Method::Cold, n, service);
                let what = format!("warm downtime to cold, {service}, n = {n}");
                aims.push(Aim::new(what, ratio, "<= 0.20", ratio <= 0.20));
            }
        }
    }
    aims
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(method: Method, vm: &str, phases: Value) -> Row {
        let Value::Object(phases) = phases else {
            panic!("phases are an object");
        };
        Row {
            method,
            n: 2,
            repeat: 0,
            vm: vm.to_owned(),
            service: "light",
            downtime_ms: 1.0,
            phases,
            memory_mib: 256,
            probe_ms: 10,
            same_boot: true,
            memory_check_ok: true,
            tcp_session_survived: true,
            wall_clock_moved_ms: 0.0,
        }
    }

    #[test]
    fn a_vms_phases_are_the_hosts_and_its_own() {
        let report = json!({"rows": [
            {"kind": "asked", "vm": null, "at_ms": 0.0},
            {"kind": "running", "vm": "vm1", "at_ms": 5.0},
            {"kind": "running", "vm": "vm2", "at_ms": 7.0},
        ]});
        let of = phases(&report, "vm2").expect("phases");
        assert_eq!(Value::Object(of), json!({"asked": 0.0, "running": 7.0}));
        assert!(phases(&Value::Null, "vm1").is_none());
    }

    #[test]
    fn a_span_reaches_from_the_first_vm_to_the_last() {
        let rows = [
            row(
                Method::Warm,
                "vm1",
                json!({"suspend-asked": 1000.0, "committed": 1500.0}),
            ),
            row(
                Method::Warm,
                "vm2",
                json!({"suspend-asked": 1100.0, "committed": 3000.0}),
            ),
        ];
        let ends = ["saved", "committed"];
        let span = span_s(&rows, Method::Warm, 2, "suspend-asked", &ends);
        assert_eq!(span, 2.0);
        assert!(span_s(&rows, Method::Cold, 2, "suspend-asked", &ends).is_nan());
    }
}
