//! The peer's way over a host reboot: QEMU's own cpr-reboot.
//!
//! Guest RAM is a shared mapping of the reserved range; QEMU's migration to a
//! file then holds devices alone (`mode=cpr-reboot` and `x-ignore-shared`).
//! The order is Hebe's own, so that the two differ in the VMM layer only: the
//! next kernel is loaded and dirty pages are flushed while the VMs run, all
//! VMs stop at once, the rest is flushed, the jump; in the next kernel all VMs
//! come back at once from early user space.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use lab_guest::peer::{PEER_FOLDER, PEER_REPORT, PEER_VMS, PeerVm};
use lab_guest::qmp::Qmp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{dax, sys};

/// How long QEMU may take until its control socket answers.
const START_LIMIT: Duration = Duration::from_secs(60);

/// One instant on both clocks of a host: the time-stamp counter goes on
/// across the jump, the wall clock does not.
#[derive(Clone, Copy)]
struct Instant {
    tsc: u64,
    realtime_ns: u64,
}

impl Instant {
    fn now() -> Self {
        Self {
            tsc: sys::tsc(),
            realtime_ns: sys::realtime_ns(),
        }
    }

    /// Ticks in a second, measured from `self` to now.
    fn rate(self) -> f64 {
        let now = Self::now();
        let ns = now.realtime_ns.saturating_sub(self.realtime_ns).max(1);
        (now.tsc - self.tsc) as f64 * 1e9 / ns as f64
    }
}

/// One event of the report.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Event {
    kind: String,
    vm: Option<String>,
    side: String,
    realtime_ns: u64,
    tsc: u64,
}

/// What a reboot leaves behind, in the form of the product's own report.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Report {
    method: String,
    events: Vec<Event>,
    /// Milliseconds since the order, in the order of time.
    rows: Vec<Value>,
    tsc_hz: f64,
    /// Size of each VM's state file, in bytes.
    state_len: Vec<(String, u64)>,
}

/// Events of one kernel.
struct Log {
    side: &'static str,
    began: Instant,
    events: Vec<Event>,
}

impl Log {
    fn new(side: &'static str, began: Instant) -> Self {
        Self {
            side,
            began,
            events: Vec::new(),
        }
    }

    fn note_at(&mut self, kind: &str, vm: Option<&str>, at: Instant) {
        self.events.push(Event {
            kind: kind.to_owned(),
            vm: vm.map(str::to_owned),
            side: self.side.to_owned(),
            realtime_ns: at.realtime_ns,
            tsc: at.tsc,
        });
    }

    fn note(&mut self, kind: &str, vm: Option<&str>) {
        self.note_at(kind, vm, Instant::now());
    }

    /// An event that QEMU stamped itself, by the wall clock.
    fn note_qemu(&mut self, kind: &str, vm: &str, event: &Value) {
        let part = |name: &str| event["timestamp"][name].as_u64().unwrap_or(0);
        let realtime_ns = part("seconds") * 1_000_000_000 + part("microseconds") * 1000;
        let now = Instant::now();
        let ago_ns = now.realtime_ns.saturating_sub(realtime_ns);
        let ticks = ago_ns as f64 * self.began.rate() / 1e9;
        let tsc = now.tsc.saturating_sub(ticks as u64);
        self.note_at(kind, Some(vm), Instant { tsc, realtime_ns });
    }
}

/// `lab-init peer …`.
pub fn tool(words: &[&str]) -> Result<()> {
    match words {
        ["start"] => start(),
        ["stop"] => stop(),
        ["reboot", kernel, initrd, cmdline] => reboot(kernel, initrd, cmdline),
        _ => bail!("usage: lab-init peer start | stop | reboot KERNEL INITRD CMDLINE"),
    }
}

fn vms() -> Result<Vec<PeerVm>> {
    let text = fs::read(PEER_VMS).with_context(|| format!("cannot read {PEER_VMS}"))?;
    serde_json::from_slice(&text).with_context(|| format!("{PEER_VMS} is no list of VMs"))
}

/// Boots every VM, and says the process id of each; QEMU stays behind when this
/// ends.
fn start() -> Result<()> {
    for vm in &vms()? {
        let pid = spawn(vm, &[])?;
        println!("{} {pid}", vm.name);
        Qmp::connect(vm.socket().as_ref(), START_LIMIT).with_context(|| output(vm))?;
    }
    Ok(())
}

/// Ends every VM at once, whatever its guest does.
fn stop() -> Result<()> {
    for vm in &vms()? {
        let mut qmp = Qmp::connect(vm.socket().as_ref(), START_LIMIT)?;
        qmp.execute("quit", json!({}))?;
        qmp.wait_for_end()?;
    }
    Ok(())
}

fn spawn(vm: &PeerVm, more: &[&str]) -> Result<u32> {
    let control = sys::NetControl::open()?;
    control.tap(&vm.tap, &vm.bridge)?;
    fs::create_dir_all(&vm.folder).with_context(|| format!("cannot create {}", vm.folder))?;
    let log = File::create(format!("{}/log", vm.folder))?;
    let (program, arguments) = vm.argv.split_first().context("nothing to run")?;
    let socket = format!("unix:{},server=on,wait=off", vm.socket());
    let mut command = Command::new(program);
    command
        .args(arguments)
        .args(["-qmp", &socket])
        .args(more)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let child = command.spawn();
    let child = child.with_context(|| format!("cannot run {program}"))?;
    Ok(child.id())
}

fn output(vm: &PeerVm) -> String {
    let said = fs::read_to_string(format!("{}/log", vm.folder)).unwrap_or_default();
    format!("QEMU of {} does not answer: {}", vm.name, said.trim())
}

/// Loads the next kernel, freezes every VM and jumps; returns on failure alone.
fn reboot(kernel: &str, initrd: &str, cmdline: &str) -> Result<()> {
    let began = Instant::now();
    let mut log = Log::new("before", began);
    log.note_at("asked", None, began);
    let vms = vms()?;
    sys::kexec_load(kernel, initrd, cmdline)?;
    log.note("image-loaded", None);
    rustix::fs::sync();
    log.note("prepared", None);
    let logs = for_each(&vms, |vm| suspend(vm, began))?;
    log.events.extend(logs.into_iter().flatten());
    log.note("all-suspended", None);
    let state_len = vms
        .iter()
        .map(|vm| Ok((vm.name.clone(), fs::metadata(vm.state())?.len())))
        .collect::<Result<_>>()?;
    let report = Report {
        method: "qemu-cpr".to_owned(),
        events: log.events.clone(),
        tsc_hz: began.rate(),
        state_len,
        ..Report::default()
    };
    put(&report)?;
    rustix::fs::sync();
    // The jump's own stamp is too late for the file; the serial line has it.
    let mut console = File::options().write(true).open("/dev/console")?;
    writeln!(console, "LAB: jump {}", sys::tsc())?;
    Err(sys::reboot(sys::Reboot::Kexec)).context("the jump failed")
}

fn put(report: &Report) -> Result<()> {
    fs::write(PEER_REPORT, serde_json::to_vec(report)?).context("cannot write the report")
}

/// Runs `work` for every VM, all at once; the first error is the result.
fn for_each<T: Send>(vms: &[PeerVm], work: impl Fn(&PeerVm) -> Result<T> + Sync) -> Result<Vec<T>> {
    thread::scope(|scope| {
        let threads: Vec<_> = vms
            .iter()
            .map(|vm| {
                let work = &work;
                scope.spawn(move || work(vm).with_context(|| format!("peer {}: failed", vm.name)))
            })
            .collect();
        let join = |thread: thread::ScopedJoinHandle<'_, Result<T>>| match thread.join() {
            Ok(result) => result,
            Err(_) => bail!("a thread panicked"),
        };
        threads.into_iter().map(join).collect()
    })
}

/// Both ends of a cpr-reboot are told the same.
fn prepare(qmp: &mut Qmp) -> Result<()> {
    let on = |name: &str| json!({"capability": name, "state": true});
    let capabilities = json!({"capabilities": [on("x-ignore-shared"), on("events")]});
    qmp.execute("migrate-set-capabilities", capabilities)?;
    qmp.execute("migrate-set-parameters", json!({"mode": "cpr-reboot"}))?;
    Ok(())
}

/// Waits for the migration's end; `other` sees the events before it.
fn migrated(qmp: &mut Qmp, mut other: impl FnMut(&Value)) -> Result<()> {
    let end = qmp.wait_for(|event| {
        other(event);
        let status = &event["data"]["status"];
        event["event"] == "MIGRATION" && (status == "completed" || status == "failed")
    })?;
    if end["data"]["status"] == "failed" {
        let why = qmp.execute("query-migrate", json!({}))?;
        bail!("QEMU's migration failed: {}", why["error-desc"]);
    }
    Ok(())
}

/// Stops one VM, writes its devices to a file and ends its QEMU.
fn suspend(vm: &PeerVm, began: Instant) -> Result<Vec<Event>> {
    let name = vm.name.as_str();
    let mut log = Log::new("before", began);
    log.note("suspend-asked", Some(name));
    let mut qmp = Qmp::connect(vm.socket().as_ref(), START_LIMIT)?;
    prepare(&mut qmp)?;
    let uri = format!("file:{}", vm.state());
    qmp.execute("migrate", json!({"uri": uri}))?;
    migrated(&mut qmp, |event| {
        if event["event"] == "STOP" {
            log.note_qemu("vcpus-stopped", name, event);
        }
    })?;
    qmp.execute("quit", json!({}))?;
    qmp.wait_for_end()?;
    File::open(vm.state())?.sync_all()?;
    log.note("committed", Some(name));
    Ok(log.events)
}

/// In the next kernel: brings back what the last one froze, if it did.
pub fn resume_all(userspace_tsc: u64) -> Result<()> {
    let Ok(text) = fs::read(PEER_REPORT) else {
        return Ok(());
    };
    let mut report: Report = serde_json::from_slice(&text).context("the report is damaged")?;
    let began = Instant::now();
    let mut log = Log::new("after", began);
    let since_ns = (began.tsc - userspace_tsc) as f64 * 1e9 / report.tsc_hz;
    let entered = Instant {
        tsc: userspace_tsc,
        realtime_ns: began.realtime_ns - since_ns as u64,
    };
    log.note_at("user-space", None, entered);
    dax::wait_for("/dev/dax0.0".as_ref(), Duration::from_secs(10));
    log.note("store-found", None);
    read_programs()?;
    log.note("programs-read", None);
    let vms = vms()?;
    let logs = for_each(&vms, |vm| resume(vm, began))?;
    log.events.extend(logs.into_iter().flatten());
    log.note("all-resumed", None);
    report.events.extend(log.events);
    report.rows = rows(&report);
    put(&report)?;
    // A reset after this must not bring back what is older than the disks.
    for vm in &vms {
        fs::remove_file(vm.state())?;
    }
    Ok(())
}

/// Reads QEMU and its libraries into this kernel's memory in one go. Hebe's
/// programs come with the initramfs; so the report tells the disk's part of
/// QEMU's start from QEMU's own.
fn read_programs() -> Result<()> {
    let mut folders = vec![PathBuf::from(PEER_FOLDER)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            match entry.file_type()?.is_dir() {
                true => folders.push(entry.path()),
                false => drop(io::copy(&mut File::open(entry.path())?, &mut io::sink())?),
            }
        }
    }
    Ok(())
}

fn resume(vm: &PeerVm, began: Instant) -> Result<Vec<Event>> {
    let name = vm.name.as_str();
    let mut log = Log::new("after", began);
    log.note("vmm-started", Some(name));
    spawn(vm, &["-incoming", "defer"])?;
    let mut qmp = Qmp::connect(vm.socket().as_ref(), START_LIMIT).with_context(|| output(vm))?;
    log.note("state-read", Some(name));
    prepare(&mut qmp)?;
    let uri = format!("file:{}", vm.state());
    qmp.execute("migrate-incoming", json!({"uri": uri}))?;
    let mut resumed = false;
    migrated(&mut qmp, |event| {
        if event["event"] == "RESUME" {
            resumed = true;
            log.note_qemu("running", name, event);
        }
    })
    .with_context(|| output(vm))?;
    if !resumed {
        let event = qmp.wait_for(|event| event["event"] == "RESUME")?;
        log.note_qemu("running", name, &event);
    }
    Ok(log.events)
}

fn rows(report: &Report) -> Vec<Value> {
    let mut events: Vec<&Event> = report.events.iter().collect();
    events.sort_by_key(|e| e.tsc);
    let first = events.first().map_or(0, |e| e.tsc);
    let row = |e: &&Event| {
        let at_ms = (e.tsc - first) as f64 * 1000.0 / report.tsc_hz;
        json!({"kind": e.kind, "vm": e.vm, "side": e.side, "at_ms": at_ms})
    };
    events.iter().map(row).collect()
}
