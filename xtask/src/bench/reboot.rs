//! Downtime seen from outside, for every method, number of VMs and service.
//!
//! The machine is the same for every number of VMs of a run: its memory costs
//! its kernel time at start-up, which is part of the downtime.

use std::collections::VecDeque;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use hebe_types::ByteSize;
use lab::assets::{Assets, KernelName};
use lab::peer;
use lab::probe::{ProbeRecord, UDP_INTERVAL, UdpRecord};
use lab::progress::Progress;
use lab::scenario::{GuestSpec, Lab, LabOptions};
use lab::trial::{self, Method, Trial, VmRow};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{Aim, Output, caveat, diagnosed, median, while_emulator_fails};
use crate::demo::Carrier;
use crate::ui::Spinner;

/// How much work the slow-starting service does before it listens: a
/// stand-in for a heavy Java server.
const SLOW_WORK: &str = "lab.slow_work=400";
/// The kernel of the guests, and of the host where it need not carry memory.
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
/// What `hebe host setup --store luo` writes into sysfs, as a word of the command
/// line.
const LARGE_PAGES: &str = "transparent_hugepage_shmem=advise";
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
    /// Where VMs that are kept in memory lie; several are compared. With luo the
    /// host runs the lab's own kernel for all of them.
    #[arg(long, value_delimiter = ',', default_value = "devdax")]
    store: Vec<Carrier>,
    /// RAM of each VM, in MiB; otherwise 256, and 128 where there are more than 4.
    #[arg(long)]
    memory: Option<u64>,
    /// Repeats of each.
    #[arg(long, default_value_t = 1)]
    repeats: u32,
    /// Eleven small VMs, too.
    #[arg(long)]
    full: bool,
    /// Emulate the host's processors in turn, as everywhere else in the lab: it
    /// takes longer, and fails less often.
    #[arg(long)]
    in_turn: bool,
    /// Leave the memory of luo in pages of 4 KiB, as Linux does by itself,
    /// instead of those of 2 MiB that `hebe host setup` switches on.
    #[arg(long)]
    small_pages: bool,
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

    /// The host's kernel, before and after: one for all that is compared.
    fn kernel(&self) -> KernelName {
        let [kernel, _] = Carrier::Luo.kernels();
        let luo = self.store.contains(&Carrier::Luo);
        if luo { kernel } else { KERNEL }
    }

    /// Every method with every store; QEMU's has its own.
    fn kinds(&self) -> Vec<Kind> {
        let stores = |method: &Method| match method {
            Method::QemuCpr => vec![(Method::QemuCpr, Carrier::Devdax)],
            other => self.store.iter().map(|store| (*other, *store)).collect(),
        };
        self.methods.iter().flat_map(stores).collect()
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
    store: Carrier,
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
    /// From the last instruction before to the first one after, as the host
    /// tells it.
    stopped_ms: Option<f64>,
    /// What the kernel carried; none where nothing was carried by it.
    carried: Option<Carried>,
}

/// A VM's memory that the kernel carried, from the host's report.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Carried {
    preserve_ms: f64,
    retrieve_ms: f64,
    preserved_mib: f64,
    /// Of that, unused memory that preserving filled.
    filled_mib: f64,
    late_parts: u64,
}

/// A size as the report writes it, such as `160MiB`.
fn mib(size: &Value) -> Option<f64> {
    let size: ByteSize = size.as_str()?.parse().ok()?;
    Some(size.bytes() as f64 / f64::from(1u32 << 20))
}

impl Carried {
    fn of(report: &Value, phases: &Map<String, Value>, vm: &str) -> Option<Self> {
        let rows = report["carried"].as_array()?;
        let row = rows.iter().find(|row| row["vm"] == vm)?;
        let at = |kind: &str| phases.get(kind)?.as_f64();
        Some(Self {
            preserve_ms: at("preserved")? - at("preserve-began")?,
            retrieve_ms: at("arrived")? - at("retrieving")?,
            preserved_mib: mib(&row["preserved"])?,
            filled_mib: mib(&row["filled"])?,
            late_parts: row["late_parts"].as_u64()?,
        })
    }

    /// Seconds for each GiB that was preserved.
    fn s_per_gib(&self, ms: f64) -> f64 {
        ms / 1000.0 / (self.preserved_mib / 1024.0)
    }
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
    let hosts: Vec<(Carrier, bool)> = args
        .store
        .iter()
        .map(|store| (*store, false))
        .chain([(Carrier::Devdax, true)])
        .collect();
    let rounds = args
        .counts()
        .into_iter()
        .flat_map(|n| hosts.iter().map(move |host| (n, *host)));
    // What was measured before a failure is kept.
    let result = rounds
        .into_iter()
        .try_for_each(|(n, host)| measure(assets, args, n, host, progress, &mut found));
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
        "processors_in_turn": args.in_turn,
        "small_pages": args.small_pages,
        "rows": rows,
        "raw": found.raw,
    });
    let header = "method,store,n,repeat,vm,service,downtime_ms,memory_mib,probe_ms,same_boot,memory_check_ok,tcp_session_survived,wall_clock_moved_ms,stopped_ms,preserve_ms,retrieve_ms,preserved_mib,filled_mib";
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
    (store, peer): (Carrier, bool),
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
        let mut host = Host::boot(assets, args, n, (store, peer), progress)?;
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
    store: Carrier,
    kernel: KernelName,
    lab: Lab,
    guests: Vec<GuestSpec>,
}

impl Host {
    fn boot(
        assets: &Assets,
        args: &RebootArgs,
        n: u8,
        (store, peer): (Carrier, bool),
        progress: &Spinner,
    ) -> Result<Self> {
        let mut guests: Vec<GuestSpec> = (0..n).map(|i| guest(i, n, args.memory_mib(n))).collect();
        let reserve_mib = args.reserve_mib();
        let luo = store == Carrier::Luo && !peer;
        let kernel = args.kernel();
        if luo {
            guests
                .iter_mut()
                .for_each(|guest| guest.store = store.kind());
        }
        let options = LabOptions {
            host: kernel,
            guests: n.max(4),
            // Several VMs resume at once, as on a host with several processors.
            parallel: !args.in_turn,
            // The same machine for each store: what one reserves is ordinary
            // memory for the other.
            reserve_mib: if luo { 0 } else { reserve_mib },
            memory_mib: HOST_MIB + reserve_mib,
            disk_mib: 4096 + 2 * reserve_mib,
            peer,
            store_init: !peer && !luo,
            append: match (peer, luo) {
                // No VM is Hebe's where the range is QEMU's.
                (true, _) => "lab.noresume".to_owned(),
                (false, true) if args.small_pages => store.options(n).append,
                (false, true) => format!("{} {LARGE_PAGES}", store.options(n).append),
                (false, false) => String::new(),
            },
            ..LabOptions::default()
        };
        let mut lab = Lab::boot(assets, options, progress)?;
        let vmm = if peer { "QEMU" } else { "hebe-vmm" };
        progress.step(&format!("booting {n} VMs of {vmm}"));
        match peer {
            true => peer::start(&lab, &guests)?,
            false => lab.start(&guests)?,
        }
        Ok(Self {
            store,
            kernel,
            lab,
            guests,
        })
    }

    fn measure(
        &mut self,
        method: Method,
        repeat: u32,
        progress: &Spinner,
        found: &mut Found,
    ) -> Result<()> {
        let (n, word) = (self.guests.len() as u8, method.as_str());
        let trial = trial::reboot(
            &mut self.lab,
            &self.guests,
            method,
            self.kernel,
            &[],
            progress,
        );
        let trial = diagnosed(&mut self.lab, &self.guests, trial);
        let trial = trial.with_context(|| format!("n = {n}, {word}"))?;
        progress.note(&format!("n = {n}, {word}: {}", summary(&trial)));
        for (guest, vm) in self.guests.iter().zip(&trial.vms) {
            let place = (self.store, n, repeat);
            add_rows(&trial, vm, guest, place, &mut found.rows)?;
        }
        let probes: Vec<Value> = trial.raw.iter().map(samples).collect();
        found.raw.push(json!({
            "method": word, "store": self.store, "n": n, "repeat": repeat, "report": trial.report, "probes": probes,
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
    (store, n, repeat): (Carrier, u8, u32),
    rows: &mut Vec<Row>,
) -> Result<()> {
    let phases = phases(&trial.report, &vm.name)
        .with_context(|| format!("{}: the host has no report", trial.method.as_str()))?;
    let carried = Carried::of(&trial.report, &phases, &vm.name);
    let downtimes = trial.report["downtime"].as_array();
    let own = downtimes.and_then(|all| all.iter().find(|d| d["vm"] == vm.name.as_str()));
    let stopped_ms = own.and_then(|d| d["stopped_ms"].as_f64());
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
            store,
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
            stopped_ms,
            carried: carried.clone(),
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
    let optional = |value: Option<f64>| value.map_or(String::new(), |v| format!("{v:.1}"));
    let carried = |of: fn(&Carried) -> f64| optional(row.carried.as_ref().map(of));
    format!(
        "{},{},{},{},{},{},{:.1},{},{},{},{},{},{:.1},{},{},{},{},{}",
        row.method.as_str(),
        row.store.as_str(),
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
        optional(row.stopped_ms),
        carried(|c| c.preserve_ms),
        carried(|c| c.retrieve_ms),
        carried(|c| c.preserved_mib),
        carried(|c| c.filled_mib),
    )
}

/// How VMs get over the reboot, and where their memory lies.
type Kind = (Method, Carrier);

/// Median downtime in seconds.
fn downtime_s(rows: &[Row], (method, store): Kind, n: u8, service: &str) -> f64 {
    let fits = |r: &&Row| (r.n, r.method, r.store, r.service) == (n, method, store, service);
    let of = rows.iter().filter(fits).map(|r| r.downtime_ms / 1000.0);
    median(of.collect())
}

/// Median seconds, over repeats, from the first `from` of a reboot's VMs to
/// the last event of the first kind in `to` that the method has.
fn span_s(rows: &[Row], (method, store): Kind, n: u8, from: &str, to: &[&str]) -> f64 {
    let repeats = rows.iter().map(|r| r.repeat + 1).max().unwrap_or(0);
    let spans = (0..repeats).filter_map(|repeat| {
        let fits = |r: &&Row| (r.n, r.method, r.store, r.repeat) == (n, method, store, repeat);
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
        "{:<8} {:<6} {:>3} {:>10} {:>14} {:>10} {:>10}",
        "method", "store", "n", "light", "slow-starting", "before", "after"
    );
    for n in args.counts() {
        for kind @ (method, store) in args.kinds() {
            let of = |service| downtime_s(rows, kind, n, service);
            let ends = ["saved", "committed", "powered-off"];
            let before = span_s(rows, kind, n, "suspend-asked", &ends);
            let after = span_s(rows, kind, n, "vmm-started", &["running", "booted"]);
            println!(
                "{:<8} {:<6} {n:>3} {:>10.2} {:>14.2} {before:>10.2} {after:>10.2}",
                method.as_str(),
                store.as_str(),
                of("light"),
                of("slow-starting"),
            );
        }
    }
    print_carried(args, rows);
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

/// What carrying memory takes, per VM; and the pause beside that of a reserved
/// range.
fn print_carried(args: &RebootArgs, rows: &[Row]) {
    if !args.store.contains(&Carrier::Luo) {
        return;
    }
    println!(
        "carried by Linux, medians over VMs and repeats: seconds that the VMs stand still, preserve and retrieve in seconds per GiB, MiB per VM that are preserved and, of these, unused memory that is filled"
    );
    println!(
        "{:>3} {:>8} {:>14} {:>10} {:>10} {:>10} {:>8}",
        "n", "stopped", "stopped devdax", "preserve", "retrieve", "preserved", "filled"
    );
    for n in args.counts() {
        let of = |value: &dyn Fn(&Carried) -> f64| {
            let own = rows.iter().filter(|r| r.n == n && r.service == "light");
            median(own.filter_map(|r| r.carried.as_ref()).map(value).collect())
        };
        println!(
            "{n:>3} {:>8.2} {:>14.2} {:>10.3} {:>10.3} {:>10.0} {:>8.0}",
            stopped_s(rows, Carrier::Luo, n),
            stopped_s(rows, Carrier::Devdax, n),
            of(&|c| c.s_per_gib(c.preserve_ms)),
            of(&|c| c.s_per_gib(c.retrieve_ms)),
            of(&|c| c.preserved_mib),
            of(&|c| c.filled_mib),
        );
    }
}

/// Median seconds that VMs stood still in a warm reboot.
fn stopped_s(rows: &[Row], store: Carrier, n: u8) -> f64 {
    let fits = |r: &&Row| (r.n, r.method, r.store, r.service) == (n, Method::Warm, store, "light");
    let of = rows.iter().filter(fits);
    median(of.filter_map(|r| Some(r.stopped_ms? / 1000.0)).collect())
}

/// What the issue of this bench expects: warm flat in n and in the service,
/// and far below cold.
fn aims(args: &RebootArgs, rows: &[Row]) -> Vec<Aim> {
    let mut aims = Vec::new();
    // The first store is the one that the papers' expectations are for.
    let Some(first) = args.store.first().copied() else {
        return aims;
    };
    let warm = |n, service| downtime_s(rows, (Method::Warm, first), n, service);
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
    if args.store.contains(&Carrier::Luo) && args.store.contains(&Carrier::Devdax) {
        for n in &counts {
            let of = |store| stopped_s(rows, store, *n);
            let ratio = of(Carrier::Luo) / of(Carrier::Devdax);
            let what = format!("pause, luo to devdax, n = {n}");
            aims.push(Aim::new(what, ratio, "<= 1.20", ratio <= 1.20));
        }
    }
    for n in counts {
        let ratio = warm(n, "slow-starting") / warm(n, "light");
        let what = format!("warm downtime, slow-starting to light, n = {n}");
        aims.push(Aim::new(what, ratio, "<= 1.25", ratio <= 1.25));
        if args.methods.contains(&Method::Cold) && n >= LARGE_VMS_MAX {
            for service in ["light", "slow-starting"] {
                let ratio = warm(n, service) / downtime_s(rows, (Method::Cold, first), n, service);
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
            store: Carrier::Devdax,
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
            stopped_ms: None,
            carried: None,
        }
    }

    #[test]
    fn what_the_kernel_carried_is_told_per_gib() {
        let report = json!({"carried": [
            {"vm": "vm1", "memory": "256MiB", "preserved": "128MiB", "filled": "1024KiB", "late_parts": 1},
        ]});
        let phases = json!({
            "preserve-began": 100.0, "preserved": 350.0, "retrieving": 5000.0, "arrived": 5125.0,
        });
        let Value::Object(phases) = phases else {
            panic!("phases are an object");
        };
        let found = Carried::of(&report, &phases, "vm1").expect("carried");
        assert_eq!((found.preserved_mib, found.filled_mib), (128.0, 1.0));
        assert_eq!(found.s_per_gib(found.preserve_ms), 2.0);
        assert_eq!(found.s_per_gib(found.retrieve_ms), 1.0);
        assert_eq!(Carried::of(&report, &phases, "vm2"), None);
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
        let kind = |method| (method, Carrier::Devdax);
        let span = span_s(&rows, kind(Method::Warm), 2, "suspend-asked", &ends);
        assert_eq!(span, 2.0);
        assert!(span_s(&rows, kind(Method::Cold), 2, "suspend-asked", &ends).is_nan());
    }
}
