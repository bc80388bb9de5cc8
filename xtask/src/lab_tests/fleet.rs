//! A host in its group, with a real etcd on this computer: it takes its turn in
//! a roll by itself, and its new kernel gives the slot back only after every VM
//! answers. While one does not, the next host is held.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hebe_fleet::order::Order;
use hebe_fleet::rolls::Rolls;
use hebe_fleet::{FleetConfig, Member};
use hebe_policy::fleet::forecast::Inventory;
use hebe_policy::fleet::holder::Stop;
use hebe_policy::fleet::slots::{FleetName, Found, Phase, Slot};
use hebe_policy::fleet::turns::{MarkState, Turn};
use hebe_policy::span::Span;
use lab::assets::KernelName;
use lab::binaries::{HEBE, HEBE_VMM, HEBED};
use lab::scenario::{GuestSpec, Lab, LabOptions, host_files};

use super::{json, state};
use crate::test::Scene;

const OLD: KernelName = KernelName::V6_1Cloud;
const NEW: KernelName = KernelName::V7_3Cloud;
/// The computer outside, as the host sees it.
const OUTSIDE: &str = "10.0.2.2";
/// Longest wait for etcd, and for what the host does by itself.
const ETCD_LIMIT: Duration = Duration::from_secs(180);
const TURN_LIMIT: Duration = Duration::from_secs(900);
/// How often etcd is started, for whom a port that was free may be taken.
const ETCD_STARTS: u32 = 5;
/// How long a host asks for a slot that it must not get, and for one that it must.
const HELD: Span = Span::seconds(2);
const FREE: Span = Span::seconds(120);
/// Leases and requests last longer than a busy computer ever stands still.
const TIMES: &str = "lease = \"60s\"\nrequest_timeout = \"20s\"\n";
const DAEMON_LOG: &str = "/data/hebed.log";

/// One boot of the host, and two reboots under its VM.
pub fn run(scene: &Scene) -> Result<()> {
    let dir = tempfile::tempdir().context("no folder for etcd")?;
    let etcd = Etcd::start(&scene.assets.etcd(scene.progress)?, dir.path())?;
    let next = etcd.member("next", "127.0.0.1", dir.path())?;
    let guest = GuestSpec::numbered(0, OLD);
    let options = LabOptions {
        host: OLD,
        others: vec![NEW],
        guest_kernels: vec![OLD],
        product: vec![HEBE, HEBE_VMM, HEBED],
        ..LabOptions::default()
    };
    let mut lab = Lab::boot(scene.assets, options, scene.progress)?;
    lab.start(std::slice::from_ref(&guest))?;
    let fleet = etcd.config("node1", OUTSIDE);
    lab.machine
        .agent
        .put("/etc/hebe/fleet.toml", 0o644, fleet.as_bytes())?;
    scene
        .progress
        .step("a roll, in which the host takes its turn by itself");
    roll(&mut lab, &guest, &next)?;
    scene
        .progress
        .step("a reboot after which a VM does not come back by itself");
    held(&mut lab, &guest, &next)?;
    lab.machine.check()?;
    lab.machine.power_off()
}

/// The host's daemon sees the roll, and reboots the host into what it says; the
/// new kernel gives the slot back, and the next host has its turn.
fn roll(lab: &mut Lab, guest: &GuestSpec, next: &Member) -> Result<()> {
    let before = lab.wait_for_guests(std::slice::from_ref(guest))?.remove(0);
    let rolls = next.rolls()?;
    let (kernel, initrd) = host_files(NEW);
    let inventory: Inventory = toml::from_str(&format!(
        "group = \"lab\"\nexpected = \"2min\"\n\
         [reboot]\nkernel = \"{kernel}\"\ninitrd = \"{initrd}\"\nmethod = \"warm\"\n\
         [[host]]\nname = \"node1\"\n[[host]]\nname = \"next\"\n"
    ))?;
    let rollout = inventory.rollout("lab-roll", "test@outside", 0)?;
    ensure!(rolls.begin(&rollout)?.is_none(), "a roll was there already");
    ensure!(
        turn(&rolls, next)? != Turn::Go,
        "the next host comes second"
    );
    let policy = format!(
        "reboot = [\"--cmdline\", {:?}]\n[[rule]]\nwhen = \"roll\"\n",
        lab.host_cmdline()
    );
    lab.machine
        .agent
        .put("/etc/hebe/policy.toml", 0o644, policy.as_bytes())?;
    lab.machine.agent.spawn(&["hebed"], DAEMON_LOG)?;
    let log = |lab: &Lab| {
        let bytes = lab.machine.agent.get(DAEMON_LOG).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let end = Instant::now() + TURN_LIMIT;
    let slot = loop {
        if let Some(slot) = slot_of(next, "node1")?.filter(|slot| slot.phase == Phase::Rebooting) {
            break slot;
        }
        ensure!(Instant::now() < end, "it never went: {}", log(lab));
        lab.machine.check()?;
        thread::sleep(Duration::from_millis(200));
    };
    ensure!(
        slot.vms.iter().eq([&guest.name]),
        "its VM is not written down: {:?}",
        slot.vms
    );
    ensure!(
        mark(&rolls, "node1")? == Some(MarkState::Away),
        "it is not marked as away"
    );
    ensure!(turn(&rolls, next)? != Turn::Go, "the next host must wait");
    lab.wait_for_next_boot()?;
    ensure!(
        lab.boot.kernel.starts_with("7.3"),
        "it runs {}",
        lab.boot.kernel
    );
    // Nothing but `hebe fleet release` gives the slot back, however well all is.
    let after = lab.wait_for_guests(std::slice::from_ref(guest))?.remove(0);
    ensure!(
        after.boot_id == before.boot_id,
        "the guest is not what it was"
    );
    ensure!(slot_of(next, "node1")?.is_some(), "the slot went by itself");
    lab.machine.exec_ok(&["hebe", "fleet", "release"])?;
    ensure!(slot_of(next, "node1")?.is_none(), "the slot is still there");
    ensure!(
        mark(&rolls, "node1")? == Some(MarkState::Done { why: None }),
        "the roll says {:?}",
        mark(&rolls, "node1")?
    );
    ensure!(turn(&rolls, next)? == Turn::Go, "the next host has no turn");
    let status = json(lab, &["hebe", "--json", "fleet", "roll", "status"])?;
    ensure!(status["hosts"][0]["state"] == "done", "it says: {status}");
    Ok(())
}

/// A kernel that does not resume its VMs: the slot stays and the next host is
/// held, until the VM answers.
fn held(lab: &mut Lab, guest: &GuestSpec, next: &Member) -> Result<()> {
    let before = lab.wait_for_guests(std::slice::from_ref(guest))?.remove(0);
    let (kernel, initrd) = host_files(OLD);
    let cmdline = format!("{} lab.noresume", lab.host_cmdline());
    let order = [
        "hebe",
        "reboot",
        "--fleet",
        "--wait",
        "30s",
        "--kernel",
        &kernel,
        "--initrd",
        &initrd,
        "--cmdline",
        &cmdline,
    ];
    lab.machine.agent.spawn(&order, "/data/reboot.log")?;
    lab.wait_for_next_boot().with_context(|| {
        let bytes = lab
            .machine
            .agent
            .get("/data/reboot.log")
            .unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    })?;
    ensure!(state(lab, &guest.name)?.0 == "frozen", "it was resumed");
    let kept = lab
        .machine
        .exec(&["hebe", "fleet", "release", "--wait", "1s"])?;
    let text = kept.all_text();
    ensure!(kept.code == Some(5), "the slot was not kept: {text}");
    ensure!(text.contains("'vm1' is frozen"), "it says: {text}");
    let slot = slot_of(next, "node1")?.context("the slot is gone")?;
    ensure!(
        slot.phase == Phase::Verifying,
        "the slot is {:?}",
        slot.phase
    );
    match wants(next, HELD) {
        Err(Stop::NoSlot(why)) => ensure!(why.contains("node1"), "it says: {why}"),
        Err(other) => bail!("the next host was held otherwise: {other}"),
        Ok(()) => bail!("the next host began beside a VM that does not answer"),
    }
    lab.machine.exec_ok(&["hebe", "resume", "--all"])?;
    lab.machine.exec_ok(&["hebe", "fleet", "release"])?;
    let after = lab.wait_for_guests(std::slice::from_ref(guest))?.remove(0);
    ensure!(
        after.boot_id == before.boot_id,
        "the guest is not what it was"
    );
    if let Err(stop) = wants(next, FREE) {
        bail!("the next host does not go on: {stop}");
    }
    Ok(())
}

/// Asks for a slot so long; its lease ends by itself.
fn wants(next: &Member, patience: Span) -> Result<(), Stop> {
    let slot = next.new_slot().map_err(|e| Stop::NoSlot(e.to_string()))?;
    let times = next.config.times(patience);
    Order::take(&next.slots, slot, times, &|_| {}).map(drop)
}

fn turn(rolls: &Rolls, member: &Member) -> Result<Turn> {
    let read = rolls.read()?.context("there is no roll")?;
    Ok(read.turn(&member.host))
}

fn mark(rolls: &Rolls, host: &str) -> Result<Option<MarkState>> {
    let read = rolls.read()?.context("there is no roll")?;
    let host: FleetName = host.parse()?;
    Ok(read.view.state(&host).cloned())
}

fn slot_of(member: &Member, host: &str) -> Result<Option<Slot>> {
    match member.slots.own(&host.parse()?)? {
        None => Ok(None),
        Some(Found::Slot(slot)) => Ok(Some(slot)),
        Some(Found::Unreadable { why, .. }) => bail!("{host}'s slot cannot be read: {why}"),
    }
}

/// etcd on this computer's loopback, which QEMU's user network leads to.
struct Etcd {
    child: Child,
    port: u16,
}

impl Etcd {
    fn start(program: &Path, dir: &Path) -> Result<Self> {
        for _ in 1..ETCD_STARTS {
            if let Ok(etcd) = Self::start_once(program, dir) {
                return Ok(etcd);
            }
        }
        Self::start_once(program, dir)
    }

    fn start_once(program: &Path, dir: &Path) -> Result<Self> {
        let port = || TcpListener::bind("127.0.0.1:0").context("no port");
        // Both are held until both are known, so that they are two.
        let held = [port()?, port()?];
        let (clients, peers) = (held[0].local_addr()?.port(), held[1].local_addr()?.port());
        drop(held);
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        let child = Command::new(program)
            .arg(format!(
                "--data-dir={}",
                dir.join(format!("etcd-{clients}")).display()
            ))
            .arg(format!("--listen-client-urls={}", url(clients)))
            .arg(format!("--advertise-client-urls={}", url(clients)))
            .arg(format!("--listen-peer-urls={}", url(peers)))
            .arg(format!("--initial-advertise-peer-urls={}", url(peers)))
            .arg(format!("--initial-cluster=default={}", url(peers)))
            // What is written here need not outlive this computer, whose disk is busy.
            .env("ETCD_UNSAFE_NO_FSYNC", "true")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("etcd does not start")?;
        let mut etcd = Self {
            child,
            port: clients,
        };
        let member = etcd.member("next", "127.0.0.1", dir)?;
        let end = Instant::now() + ETCD_LIMIT;
        while let Err(error) = member.slots.all() {
            ensure!(etcd.child.try_wait()?.is_none(), "etcd ended");
            ensure!(Instant::now() < end, "etcd does not answer: {error}");
            thread::sleep(Duration::from_millis(100));
        }
        Ok(etcd)
    }

    /// `fleet.toml` of a host that reaches it under this address.
    fn config(&self, host: &str, address: &str) -> String {
        format!(
            "group = \"lab\"\nhost = \"{host}\"\n{TIMES}[etcd]\nendpoints = [\"http://{address}:{}\"]\n",
            self.port
        )
    }

    fn member(&self, host: &str, address: &str, dir: &Path) -> Result<Member> {
        let config: FleetConfig = toml::from_str(&self.config(host, address))?;
        Ok(Member::new(config, "outside".to_owned(), dir)?)
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
