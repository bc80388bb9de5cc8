//! QEMU as the VMM of a lab host, and its cpr-reboot: the peer that Hebe is
//! measured beside.
//!
//! Debian's QEMU is copied into the host, with its
//! libraries and firmware, and runs the same guests there: same kernel, same
//! initramfs, same command line, same kinds of devices, RAM in the same
//! reserved range. Its VMs are defined by `define` and started by [`start`];
//! the host's init program freezes them and brings them back.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use hebe_types::StoreKind;
use lab_guest::peer::{PEER_FOLDER, PEER_REPORT, PEER_VMS, PeerVm};
use serde_json::{Value, json};

use crate::assets::Qemu;
use crate::bundle;
use crate::scenario::{GuestSpec, Lab};
use crate::serial::Serial;

/// The folder of [`PEER_FOLDER`] in the tree that becomes the host's disk.
pub const TREE: &str = "peer";
const PROGRAM: &str = "qemu";
/// What [`MACHINE`] asks for with a kernel of its own.
const FIRMWARE: [&str; 3] = ["bios-microvm.bin", "kvmvapic.bin", "linuxboot_dma.bin"];
/// QEMU's own answer to small VMMs, with PCI for the guests' devices and with
/// the clock that stock kernels look for. In a lab host it starts in half of
/// the time that `q35` takes, and has half of its state.
const MACHINE: &str = "microvm,memory-backend=ram,acpi=on,pcie=on,pic=off,pit=off,rtc=on,usb=off";

/// Copies QEMU, its libraries and its firmware below `tree`.
pub fn place(qemu: &Qemu, tree: &Path) -> Result<()> {
    let root = tree.join(TREE);
    let firmware = root.join("firmware");
    fs::create_dir_all(&firmware)
        .with_context(|| format!("cannot create {}", firmware.display()))?;
    bundle::place(&qemu.program, qemu.libraries.as_deref(), &root, PROGRAM)?;
    for name in FIRMWARE {
        bundle::copy(&firmware_file(qemu, name)?, &firmware.join(name))?;
    }
    Ok(())
}

fn firmware_file(qemu: &Qemu, name: &str) -> Result<PathBuf> {
    let own = qemu.program.parent().and_then(Path::parent);
    let shares = own
        .into_iter()
        .chain([Path::new("/usr"), Path::new("/usr/local")])
        .flat_map(|root| ["share/qemu", "share/seabios"].map(|f| root.join(f)));
    let found = qemu.firmware.iter().cloned().chain(shares);
    match found.map(|dir| dir.join(name)).find(|file| file.is_file()) {
        Some(file) => Ok(file),
        None => bail!("QEMU's firmware {name} is not found"),
    }
}

/// A guest to be run by QEMU.
#[derive(Clone, Copy, Debug)]
pub struct PeerGuest<'a> {
    /// Its definition. Its store says where its RAM lies: `Memfd`, or the
    /// reserved range.
    pub spec: &'a GuestSpec,
    /// The host's kernel serves its network card (vhost-net).
    pub vhost: bool,
}

/// The VM that QEMU makes of a guest, its RAM at `offset_mib` of the range if
/// it lies there.
fn vm(guest: PeerGuest<'_>, offset_mib: u64) -> Result<PeerVm> {
    let PeerGuest { spec, vhost } = guest;
    let config = spec.config()?;
    let net = config.nets.first().context("a guest without a network")?;
    let mac = net.mac.context("a guest's network card has no address")?;
    // Where the product keeps a VM's console and log, so that the lab finds them.
    let folder = format!("/run/hebe/vms/{}", spec.name);
    let mib = spec.memory_mib;
    let mut argv = bundle::argv(PEER_FOLDER, PROGRAM);
    let mut add = |words: &[&str]| argv.extend(words.iter().map(|w| (*w).to_owned()));
    add(&["-L", &format!("{PEER_FOLDER}/firmware")]);
    add(&["-nodefaults", "-no-user-config", "-display", "none"]);
    // A guest that faults is to be missed, not to be booted again.
    add(&["-no-reboot"]);
    // As Hebe's guests, these have no virtualization of their own.
    add(&["-accel", "kvm", "-cpu", "host,svm=off,vmx=off"]);
    add(&["-machine", MACHINE, "-smp", &config.vcpus.to_string()]);
    add(&["-m", &format!("{mib}M"), "-object"]);
    add(&[&match spec.store {
        StoreKind::Memfd => format!("memory-backend-memfd,id=ram,size={mib}M,share=on"),
        _ => format!(
            "memory-backend-file,id=ram,size={mib}M,mem-path=/dev/dax0.0,offset={offset_mib}M,align=2M,share=on"
        ),
    }]);
    if let Some(kernel) = &config.kernel {
        add(&["-kernel", &kernel.to_string_lossy()]);
    }
    if let Some(initrd) = &config.initrd {
        add(&["-initrd", &initrd.to_string_lossy()]);
    }
    add(&["-append", &config.cmdline]);
    add(&["-serial", &format!("file:{folder}/console.log")]);
    let tap = &net.tap;
    let vhost = if vhost { ",vhost=on" } else { "" };
    add(&["-netdev"]);
    add(&[&format!(
        "tap,id=net0,ifname={tap},script=no,downscript=no{vhost}"
    )]);
    add(&["-device"]);
    add(&[&format!("virtio-net-pci,netdev=net0,mac={mac},romfile=")]);
    for (i, disk) in config.disks.iter().enumerate() {
        let path = disk.path.display();
        let readonly = if disk.readonly { ",readonly=on" } else { "" };
        add(&["-drive"]);
        add(&[&format!(
            "if=none,id=disk{i},format=raw,file={path}{readonly}"
        )]);
        add(&["-device", &format!("virtio-blk-pci,drive=disk{i}")]);
    }
    add(&["-device", "virtio-rng-pci"]);
    Ok(PeerVm {
        name: spec.name.clone(),
        tap: tap.clone(),
        bridge: net.bridge.clone().unwrap_or_else(|| "br0".to_owned()),
        folder,
        argv,
    })
}

/// Makes the reserved range a devdax device and boots guests on it, one
/// behind the other.
pub fn start(lab: &Lab, guests: &[GuestSpec]) -> Result<()> {
    lab.machine.agent.make_devdax()?;
    let guests: Vec<PeerGuest<'_>> = guests
        .iter()
        .map(|spec| PeerGuest { spec, vhost: false })
        .collect();
    define(lab, &guests)?;
    lab.machine.exec_ok(&START).map(drop)
}

/// What boots the VMs that were defined last. It says a line for each, its name
/// and the process id of its QEMU.
pub const START: [&str; 3] = ["/init", "peer", "start"];

/// Says which VMs the next orders are about; those before them are forgotten,
/// not ended.
pub fn define(lab: &Lab, guests: &[PeerGuest<'_>]) -> Result<()> {
    let mut offset_mib = 0;
    let mut all = Vec::new();
    for guest in guests {
        all.push(vm(*guest, offset_mib)?);
        offset_mib += guest.spec.memory_mib;
    }
    let agent = &lab.machine.agent;
    agent.put(PEER_VMS, 0o644, &serde_json::to_vec(&all)?)
}

/// Ends the VMs that were defined last, whatever their guests do.
pub fn stop(lab: &Lab) -> Result<()> {
    lab.machine.exec_ok(&["/init", "peer", "stop"]).map(drop)
}

/// What reboots such a host, with the next kernel's files and command line.
pub fn order(kernel: &str, initrd: &str, cmdline: &str) -> Vec<String> {
    let words = ["/init", "peer", "reboot", kernel, initrd, cmdline];
    words.map(str::to_owned).into()
}

/// The last reboot's report, in the form of the product's.
pub fn report(lab: &Lab) -> Result<Value> {
    let bytes = lab.machine.agent.get(PEER_REPORT)?;
    let mut report: Value = serde_json::from_slice(&bytes).context("the report is no JSON")?;
    add_jump(&mut report, &lab.machine.serial)?;
    Ok(report)
}

/// The jump's stamp is on the serial line alone: nothing is written after it.
fn add_jump(report: &mut Value, serial: &Serial) -> Result<()> {
    let stamps = serial.stamps()?;
    let jump = stamps.iter().rev().find(|(label, _)| label == "jump");
    let (_, tsc) = jump.context("the serial line shows no jump")?;
    let first = report["events"][0]["tsc"].as_u64();
    let (Some(first), Some(hz)) = (first, report["tsc_hz"].as_f64()) else {
        bail!("the report has no first event");
    };
    let at_ms = tsc.saturating_sub(first) as f64 * 1000.0 / hz;
    let row = json!({"kind": "jump", "vm": null, "side": "before", "at_ms": at_ms});
    let rows = report["rows"].as_array_mut();
    let rows = rows.context("the report has no rows")?;
    let later = |row: &Value| row["at_ms"].as_f64().is_some_and(|at| at > at_ms);
    let place = rows.iter().position(later).unwrap_or(rows.len());
    rows.insert(place, row);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::assets::KernelName;

    #[test]
    fn a_vm_of_the_peer_has_what_the_guest_has() {
        let mut guest = GuestSpec::numbered(1, KernelName::V6_1Cloud);
        guest.disk = true;
        let of = |spec: &GuestSpec, vhost| vm(PeerGuest { spec, vhost }, 512).expect("vm");
        let vm = of(&guest, false);
        let line = vm.argv.join(" ");
        for word in [
            "offset=512M",
            "size=256M",
            "ifname=tap102",
            "mac=52:54:00:6c:61:66",
            "file=/data/guest/disks/vm2.img",
            "lab.ip=10.0.2.102/24",
        ] {
            assert!(line.contains(word), "{word} is missing in {line}");
        }
        assert!(!line.contains("vhost"), "{line}");
        assert_eq!(vm.state(), "/data/peer/vm2.state");
        guest.store = StoreKind::Memfd;
        guest.tools = true;
        let line = of(&guest, true).argv.join(" ");
        for word in [
            "memory-backend-memfd,id=ram,size=256M,share=on",
            "id=disk0,format=raw,file=/data/guest/disks/tools.img,readonly=on",
            "id=disk1,format=raw,file=/data/guest/disks/vm2.img",
            "vhost=on",
        ] {
            assert!(line.contains(word), "{word} is missing in {line}");
        }
    }
}
