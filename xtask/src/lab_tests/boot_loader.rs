//! A Debian 12 machine that starts as a real one does: firmware, GRUB, Debian's
//! kernel, and the initramfs that `update-initramfs` made with the package's hook.
//! `hebe host setup` tells GRUB what the kernel is to be told; every kernel of this
//! machine is started from that, or by kexec from what runs.

use anyhow::{Context, Result, ensure};
use lab::assets::KernelName;
use lab::loader::{INITRAMFS_DEVICES, INITRAMFS_MODULES};
use lab::scenario::{GuestSpec, Lab, LabOptions};
use lab::trial::{self, Method, Trial};
use serde_json::Value;

use super::{package, state, systemd};
use crate::demo;
use crate::test::Scene;

/// The kernel of the VM; the host has Debian's own.
const GUEST: KernelName = KernelName::V6_1Cloud;
/// What `hebe host setup --size 1GiB` tells the kernel of a machine of 4 GiB, half
/// of it above the first 4 GiB.
const RESERVED: &str = "memmap=1G!5G";
const LIVE_UPDATE: [&str; 2] = ["kho=on", "liveupdate=on"];
/// What the hook has the initramfs load.
const LOADED: [&str; 4] = ["nd_e820", "nd_pmem", "device_dax", "dax_pmem"];
/// GRUB's configuration before Hebe came.
const BEFORE: &str = "/root/grub.before";
const GRUB_CFG: &str = "/boot/grub/grub.cfg";
/// What GRUB says of a kernel that it loads.
const BY_GRUB: &str = "Loading Linux 6.1.";
/// VMs join a bridge that systemd-networkd makes.
const BRIDGE: &str = "[Unit]
Wants=sys-subsystem-net-devices-br0.device
After=sys-subsystem-net-devices-br0.device
";

/// One machine, from the first start without Hebe to the last without its words.
pub fn run(scene: &Scene) -> Result<()> {
    let guests = [GuestSpec {
        disk: true,
        append: "lab.disk_ms=200".to_owned(),
        ..GuestSpec::numbered(0, GUEST)
    }];
    let options = LabOptions {
        system: Some(package::system().with_boot_loader()),
        guest_kernels: vec![GUEST],
        guest_disks: vec![("vm1".to_owned(), 64)],
        product: package::PROGRAMS.to_vec(),
        ..LabOptions::default()
    };
    let mut lab = Lab::boot(scene.assets, options, scene.progress)?;
    let mut starts = Starts::default();
    starts.by_grub(&lab)?;
    tell(&lab, "started by GRUB")?;
    scene.progress.step("installing the package");
    let bridge = "/etc/systemd/system/hebe-resume.service.d/bridge.conf";
    lab.machine.agent.put(bridge, 0o644, BRIDGE.as_bytes())?;
    let before = initramfs(&lab)?;
    package::put(&lab)?;
    let after = initramfs(&lab)?;
    println!("    the initramfs has {after} bytes, and had {before}");
    ensure!(before < after, "no initramfs with the hook was made");
    scene.progress.step("hebe host setup");
    set_up(&lab)?;
    scene.progress.step("systemctl reboot: the words arrive");
    reboot(&mut lab)?;
    starts.by_grub(&lab)?;
    reserved(&lab)?;
    lab.machine.exec_ok(&["hebe", "store", "init"])?;
    ready(&lab)?;
    scene.progress.step("starting a VM");
    lab.start(&guests)?;
    let words = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();

    scene.progress.step("hebe reboot");
    let argv = words(&["hebe", "reboot"]);
    let trial = trial::reboot_by(&mut lab, &guests, Method::Warm, &argv, scene.progress)?;
    check(&trial, "hebe reboot")?;
    starts.by_kexec(&lab)?;
    reserved(&lab)?;
    found_in_the_initramfs(&lab)?;

    scene
        .progress
        .step("systemctl reboot: the VM is saved and restored");
    let argv = words(&["sh", "-c", "systemctl reboot && exec sleep 10000"]);
    let trial = trial::reboot_by(&mut lab, &guests, Method::Saved, &argv, scene.progress)?;
    check(&trial, "systemctl reboot")?;
    starts.by_grub(&lab)?;
    reserved(&lab)?;
    found_in_the_initramfs(&lab)?;

    if scene.full {
        scene.progress.step("hebe host setup --store luo");
        set_up_live_update(&lab)?;
        let trial = trial::reboot_by(&mut lab, &guests, Method::Saved, &argv, scene.progress)?;
        check(&trial, "systemctl reboot into a kernel without the range")?;
        starts.by_grub(&lab)?;
        live_update(&lab)?;
    }
    undo(&lab)?;
    let (state, why) = state(&lab, "vm1")?;
    ensure!(
        state == "running",
        "{state}: {why}\n{}",
        what_is_there(&lab)
    );
    lab.machine.check()?;
    lab.machine.power_off()
}

/// For whoever looks for the reason of a failure.
fn what_is_there(lab: &Lab) -> String {
    let script = "cat /proc/cmdline; hebe list; ls -l /var/lib/hebe/*; \
        journalctl -b -u hebe-resume.service -n 30 --no-pager; \
        journalctl -b -1 -u hebe-freeze.service -n 30 --no-pager";
    let told = lab.machine.exec(&["sh", "-c", script]);
    told.map_or_else(|e| e.to_string(), |output| output.all_text())
}

/// How often GRUB had loaded a kernel when it was last looked.
#[derive(Default)]
struct Starts(usize);

impl Starts {
    /// The running kernel was loaded by GRUB, since it was last looked.
    fn by_grub(&mut self, lab: &Lab) -> Result<()> {
        let line = cmdline(lab)?;
        ensure!(line.starts_with("BOOT_IMAGE=/boot/vmlinuz-6.1."), "{line}");
        ensure!(self.look(lab)? == 1, "GRUB did not load this kernel");
        Ok(())
    }

    /// It was not.
    fn by_kexec(&mut self, lab: &Lab) -> Result<()> {
        let line = cmdline(lab)?;
        ensure!(!line.contains("BOOT_IMAGE="), "{line}");
        ensure!(self.look(lab)? == 0, "GRUB loaded this kernel");
        Ok(())
    }

    /// How many kernels since the last look.
    fn look(&mut self, lab: &Lab) -> Result<usize> {
        let all = lab.machine.serial.text()?.matches(BY_GRUB).count();
        let new = all - self.0;
        self.0 = all;
        Ok(new)
    }
}

/// Bytes of the one initramfs.
fn initramfs(lab: &Lab) -> Result<u64> {
    let size = ["sh", "-c", "stat --format=%s /boot/initrd.img-*"];
    let text = lab.machine.exec_ok(&size)?;
    text.trim().parse().with_context(|| text.clone())
}

fn cmdline(lab: &Lab) -> Result<String> {
    lab.machine.exec_ok(&["cat", "/proc/cmdline"])
}

fn count(line: &str, word: &str) -> usize {
    line.split_whitespace().filter(|w| *w == word).count()
}

fn reboot(lab: &mut Lab) -> Result<()> {
    let log = "/data/reboot.log";
    lab.machine.agent.spawn(&["systemctl", "reboot"], log)?;
    lab.wait_for_next_boot()?;
    tell(lab, "after a reboot")
}

/// What a start took, for docs/operating.md.
fn tell(lab: &Lab, what: &str) -> Result<()> {
    let text = lab.machine.exec_ok(&["systemd-analyze", "time"])?;
    let first = text.lines().next().unwrap_or_default();
    println!("    {what} (emulated): {first}");
    Ok(())
}

/// The change is shown, then made, by Debian's own `update-grub`.
fn set_up(lab: &Lab) -> Result<()> {
    let before = checks(lab)?;
    let (level, text) = said(&before, "reservation")?;
    ensure!(
        level == "warn" && text.contains("hebe host setup"),
        "{level}: {text}"
    );
    lab.machine.exec_ok(&["cp", GRUB_CFG, BEFORE])?;
    let order = ["hebe", "host", "setup", "--size", "1GiB"];
    let dry = lab.machine.exec(&[&order[..], &["--dry-run"]].concat())?;
    ensure!(
        dry.ok() && dry.all_text().contains(RESERVED) && dry.all_text().contains("update-grub"),
        "{}",
        dry.all_text()
    );
    lab.machine.exec_ok(&["cmp", GRUB_CFG, BEFORE])?;
    let done = super::json(lab, &[&order[..], &["--yes", "--json"]].concat())?;
    ensure!(
        done["changed"] == true && done["words"][0] == RESERVED,
        "{done}"
    );
    let again = super::json(lab, &["hebe", "host", "setup", "--yes", "--json"])?;
    ensure!(again["changed"] == false, "done twice: {again}");
    let (_, text) = said(&checks(lab)?, "reservation")?;
    ensure!(
        text.contains("reboot once") && text.contains(RESERVED),
        "{text}"
    );
    Ok(())
}

/// The running kernel has the words once, and made a device of the range before
/// systemd ran.
fn reserved(lab: &Lab) -> Result<()> {
    let line = cmdline(lab)?;
    ensure!(count(&line, RESERVED) == 1, "{line}");
    ensure!(line.matches("memmap=").count() == 1, "{line}");
    let modules = lab.machine.exec_ok(&["cat", INITRAMFS_MODULES])?;
    for name in LOADED {
        let loaded = modules
            .lines()
            .any(|line| line.split(' ').next() == Some(name));
        ensure!(loaded, "{name} was not loaded in the initramfs: {modules}");
    }
    // Also by the memory map of this start, however it came about.
    let order = ["hebe", "host", "setup", "--size", "1GiB", "--yes", "--json"];
    let again = super::json(lab, &order)?;
    ensure!(again["changed"] == false, "set up once more: {again}");
    Ok(())
}

/// The devdax device of the store was there before the root's init ran.
fn found_in_the_initramfs(lab: &Lab) -> Result<()> {
    let devices = lab.machine.exec_ok(&["cat", INITRAMFS_DEVICES])?;
    ensure!(
        devices.lines().any(|name| name == "dax0.0"),
        "no device of the range in the initramfs: {devices}"
    );
    systemd::tell_start(lab)
}

fn checks(lab: &Lab) -> Result<Value> {
    let output = lab.machine.exec(&["hebe", "host", "check", "--json"])?;
    serde_json::from_str(&output.text()).with_context(|| output.all_text())
}

/// The level of a check, and what it says with its remedy.
fn said(answer: &Value, id: &str) -> Result<(String, String)> {
    let rows = answer["checks"].as_array();
    let row = rows.into_iter().flatten().find(|row| row["id"] == id);
    let row = row.with_context(|| format!("no check '{id}' in {answer}"))?;
    let text = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
    Ok((
        text("level"),
        format!("{} {}", text("sentence"), text("remedy")),
    ))
}

/// Nothing is left to be done.
fn ready(lab: &Lab) -> Result<()> {
    let answer = checks(lab)?;
    let rows = answer["checks"].as_array().cloned().unwrap_or_default();
    let bad: Vec<&Value> = rows.iter().filter(|row| row["level"] != "ok").collect();
    ensure!(answer["ready"] == true && bad.is_empty(), "{bad:?}");
    Ok(())
}

fn check(trial: &Trial, what: &str) -> Result<()> {
    demo::check(trial).context(what.to_owned())?;
    println!(
        "    {what}: without answer for {:.1} s (emulated)",
        trial.vms[0].downtime_ms / 1000.0
    );
    Ok(())
}

/// The other way to keep memory, which Debian's kernel does not have: that is said
/// when it is chosen.
fn set_up_live_update(lab: &Lab) -> Result<()> {
    let order = ["hebe", "host", "setup", "--store", "luo"];
    let dry = lab.machine.exec(&[&order[..], &["--dry-run"]].concat())?;
    let text = dry.all_text();
    ensure!(dry.ok(), "{text}");
    for word in [
        LIVE_UPDATE[0],
        LIVE_UPDATE[1],
        "CONFIG_KEXEC_HANDOVER",
        RESERVED,
    ] {
        ensure!(text.contains(word), "no word of {word} in: {text}");
    }
    let done = super::json(lab, &[&order[..], &["--yes", "--json"]].concat())?;
    ensure!(
        done["changed"] == true && done["words"] == serde_json::json!(LIVE_UPDATE),
        "{done}"
    );
    Ok(())
}

/// The words are there and do nothing, as one check says.
fn live_update(lab: &Lab) -> Result<()> {
    let line = cmdline(lab)?;
    ensure!(!line.contains("memmap="), "{line}");
    for word in LIVE_UPDATE {
        ensure!(count(&line, word) == 1, "{line}");
    }
    let (level, text) = said(&checks(lab)?, "live-update")?;
    println!("    live update on Debian's kernel: {level}: {text}");
    ensure!(
        level == "warn" && text.contains("6.19") && text.contains("hebe host setup"),
        "{level}: {text}"
    );
    Ok(())
}

/// GRUB's configuration is what it was, byte for byte, and nothing of ours is left.
fn undo(lab: &Lab) -> Result<()> {
    lab.machine
        .exec_ok(&["hebe", "host", "setup", "--undo", "--yes"])?;
    lab.machine.exec_ok(&["cmp", GRUB_CFG, BEFORE])?;
    let script = "ls /etc/default/grub.d /etc/tmpfiles.d";
    let left = lab.machine.exec(&["sh", "-c", script])?.text();
    ensure!(!left.contains("hebe"), "left behind: {left}");
    Ok(())
}
