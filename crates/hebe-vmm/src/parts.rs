//! Builds a VM's RAM map, board and devices, fresh or from a state.
//!
//! PCI slots follow from the definition alone, so that a resume finds every
//! device where it was: console in 1, entropy in 2, then disks, then NICs;
//! sockets in 28, the balloon in 29.

use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock};

use hebe_boot::layout;
use hebe_devices::{
    ConsoleHub, DeviceKind, PciRoot, Platform, Pvpanic, Ram, Rtc, SerialPort, VirtioPci, VsockHost,
};
use hebe_kvm::Machine;
use hebe_state::v1::devices::{PciRootV1, SerialV1};
use hebe_state::v1::machine::RtcV1;
use hebe_state::v2::devices::VirtioV2;
use hebe_state::{SectionKind, StateReader};
use hebe_store::Segment;
use hebe_types::{DEVICES_MAX, VmConfig};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestRegionMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::acpi::Acpi;
use crate::balloon::Giver;
use crate::board::Board;
use crate::held::Held;
use crate::interrupts::{KvmDoorbells, Vectors};
use crate::log;
use crate::vm::{Event, Identity, VmError};

const SLOT_CONSOLE: u8 = 1;
const SLOT_ENTROPY: u8 = 2;
const SLOT_FIRST_DISK: u8 = 3;
/// Behind the last that disks and NICs can have.
const SLOT_VSOCK: u8 = 28;
const SLOT_BALLOON: u8 = 29;
const _: () = assert!(SLOT_FIRST_DISK as usize + DEVICES_MAX <= SLOT_VSOCK as usize);
/// Distance of two devices' BARs in the PCI window.
const BAR_STRIDE: u64 = 0x1_0000;

/// Which disks a VM may be resumed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disks {
    /// Those that it had, as they were left.
    Same,
    /// Any that are large enough: whoever orders that knows better than their
    /// inode numbers and times.
    Any,
}

/// Where a VM is put together, and of what.
pub(crate) struct Site<'a> {
    pub(crate) identity: &'a Identity,
    pub(crate) held: &'a Held,
    pub(crate) machine: &'a Arc<Machine>,
    pub(crate) segment: &'a Arc<Segment>,
    pub(crate) events: &'a Sender<Event>,
}

pub(crate) struct Parts {
    pub(crate) board: Board,
    pub(crate) devices: Vec<Arc<VirtioPci>>,
    pub(crate) console: Arc<ConsoleHub>,
}

/// Maps the segment into the guest, and gives devices their view of it.
pub(crate) fn map_ram(machine: &Machine, segment: &Arc<Segment>) -> Result<Ram, VmError> {
    let mut regions = Vec::new();
    for (slot, mapped) in segment.ram().iter().enumerate() {
        // SAFETY: the segment's mapping lives as long as the `Vm`, which
        // drops KVM's machine before it (see the order of its fields).
        unsafe { machine.map_ram(slot as u32, mapped.gpa, mapped.host, mapped.len) }?;
        let len = usize::try_from(mapped.len).map_err(|_| too_large())?;
        let builder = MmapRegionBuilder::new(len)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE);
        // SAFETY: address and length are a live shared mapping of the
        // segment; a region built from a raw pointer does not unmap it.
        let region = unsafe { builder.with_raw_mmap_pointer(mapped.host.as_ptr()) }
            .build()
            .map_err(|e| VmError::Mismatch(e.to_string()))?;
        regions
            .push(GuestRegionMmap::new(region, GuestAddress(mapped.gpa.0)).ok_or_else(too_large)?);
    }
    regions.sort_by_key(|r| vm_memory::GuestMemoryRegion::start_addr(r).0);
    Ram::from_regions(regions).map_err(|e| VmError::Mismatch(e.to_string()))
}

fn too_large() -> VmError {
    VmError::Mismatch("guest RAM is larger than the address space".into())
}

/// Fresh devices.
pub(crate) fn build(site: &Site<'_>, ram: Ram) -> Result<Parts, VmError> {
    let &Site {
        identity,
        held,
        machine,
        events,
        ..
    } = site;
    let hub = console_hub(held)?;
    let platform = platform(machine, ram);
    let pci = PciRoot::new();
    let mut devices = Vec::new();
    for (slot, kind) in kinds(site, &hub)? {
        let bar = layout::PCI_WINDOW_START + u64::from(slot) * BAR_STRIDE;
        let device = VirtioPci::new(slot, bar, kind, &platform)?;
        pci.add(device.clone())?;
        devices.push(device);
    }
    let serial = if identity.config.console.serial {
        Some(SerialPort::new(
            hub.clone(),
            pin(machine, layout::IRQ_SERIAL)?,
        ))
    } else {
        None
    };
    let acpi = Acpi::new(pin(machine, layout::IRQ_EVENTS)?, events.clone(), None);
    Ok(Parts {
        board: Board::new(
            pci,
            serial,
            acpi,
            identity.config.pvpanic.then(Pvpanic::default),
            identity.config.rtc.then(|| Rtc::new(wall_clock)),
        ),
        devices,
        console: hub,
    })
}

/// Devices as the state describes them, paused.
pub(crate) fn restore(
    site: &Site<'_>,
    ram: Ram,
    reader: &mut StateReader,
    disks: Disks,
) -> Result<Parts, VmError> {
    let &Site {
        identity,
        held,
        machine,
        events,
        ..
    } = site;
    let hub = console_hub(held)?;
    let platform = platform(machine, ram);
    let pci = PciRoot::restore(&reader.take::<PciRootV1>(0)?);
    let mut devices = Vec::new();
    for (slot, kind) in kinds(site, &hub)? {
        let mut state: VirtioV2 = reader.take(u32::from(slot))?;
        if disks == Disks::Any {
            state.accept_any_disk();
        }
        let device = VirtioPci::restore(&state, kind, &platform)?;
        if device.slot() != slot {
            return Err(VmError::Mismatch(format!(
                "the device in slot {slot} says it is elsewhere"
            )));
        }
        pci.add(device.clone())?;
        devices.push(device);
    }
    let serial = if reader.instances(SectionKind::Serial).is_empty() {
        None
    } else {
        let state: SerialV1 = reader.take(0)?;
        Some(SerialPort::restore(
            &state,
            hub.clone(),
            pin(machine, layout::IRQ_SERIAL)?,
        )?)
    };
    let pvpanic = if identity.config.pvpanic {
        Some(Pvpanic::restore(reader.take(0)?))
    } else {
        None
    };
    let rtc = if identity.config.rtc {
        let saved: RtcV1 = reader.take(0)?;
        Some(Rtc::restore(&saved, wall_clock))
    } else {
        None
    };
    if identity.config.generation_id {
        held.generation.restore(reader.take(0)?);
    }
    let saved = crate::vm::take_acpi(reader)?;
    let acpi = Acpi::new(
        pin(machine, layout::IRQ_EVENTS)?,
        events.clone(),
        Some(saved),
    );
    Ok(Parts {
        board: Board::new(pci, serial, acpi, pvpanic, rtc),
        devices,
        console: hub,
    })
}

/// The host's, in nanoseconds since 1970.
fn wall_clock() -> u64 {
    hebe_sys::clock::stamp_now().realtime_ns
}

fn platform(machine: &Arc<Machine>, ram: Ram) -> Platform {
    Platform {
        ram,
        msix: Arc::new(Vectors(machine.router())),
        doorbells: Arc::new(KvmDoorbells(machine.clone())),
        log: log::device_log(),
    }
}

fn console_hub(held: &Held) -> Result<Arc<ConsoleHub>, VmError> {
    ConsoleHub::with_log(Some(&held.console)).map_err(|source| VmError::Io {
        what: "the console's thread cannot be started",
        source,
    })
}

/// An interrupt line into the IOAPIC.
fn pin(machine: &Machine, number: u32) -> Result<EventFd, VmError> {
    let line = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
    line.and_then(|line| machine.router().add_pin(&line, number).map(|()| line))
        .map_err(|source| VmError::Io {
            what: "an interrupt line cannot be made",
            source,
        })
}

/// What is in which slot.
fn kinds(site: &Site<'_>, hub: &Arc<ConsoleHub>) -> Result<Vec<(u8, DeviceKind)>, VmError> {
    let held = site.held;
    let config: &VmConfig = &site.identity.config;
    let mut kinds = Vec::new();
    if config.console.virtio {
        let takes_input = !config.console.serial;
        kinds.push((
            SLOT_CONSOLE,
            DeviceKind::Console {
                hub: hub.clone(),
                takes_input,
            },
        ));
    }
    kinds.push((SLOT_ENTROPY, DeviceKind::Rng));
    let mut slot = SLOT_FIRST_DISK;
    for (disk, defined) in held.disks.iter().zip(&config.disks) {
        let kind = DeviceKind::Block {
            backend: disk.again()?,
            queues: usize::from(defined.queues.unwrap_or(config.vcpus)),
        };
        kinds.push((slot, kind));
        slot += 1;
    }
    for (wire, mac) in &held.nets {
        let (wire, mac) = (wire.clone(), *mac);
        kinds.push((slot, DeviceKind::Net { wire, mac }));
        slot += 1;
    }
    if let (Some(vsock), Some(listener)) = (&config.vsock, &held.vsock) {
        let host = listener.try_clone().and_then(VsockHost::new);
        let host = host.map_err(|source| VmError::Io {
            what: "the socket for vsock cannot be used once more",
            source,
        })?;
        let cid = u64::from(vsock.cid);
        kinds.push((SLOT_VSOCK, DeviceKind::Vsock { host, cid }));
    }
    if let Some(balloon) = &config.balloon {
        let kind = DeviceKind::Balloon {
            reclaim: Arc::new(Giver(site.segment.clone())),
            ram: config.memory.bytes(),
            deflate_on_oom: balloon.deflate_on_oom,
            reporting: balloon.reporting,
        };
        kinds.push((SLOT_BALLOON, kind));
    }
    Ok(kinds)
}

/// A mapped range, as the snapshot file reads it.
pub(crate) fn ram_view(mapped: &hebe_store::MappedRam) -> hebe_snapshot::RamView<'_> {
    // SAFETY: the segment outlives every use of the view, which does not
    // leave `Vm`; vCPUs and devices are stopped, so that nobody writes.
    unsafe { hebe_snapshot::RamView::new(mapped.gpa, mapped.host, mapped.len) }
}

/// The host kernel's boot id: tells a VMM of this boot from one of an
/// earlier kernel. Read once: the cage leaves no way to it.
pub(crate) fn host_boot_id() -> Result<[u8; 16], VmError> {
    static KNOWN: OnceLock<[u8; 16]> = OnceLock::new();
    if let Some(id) = KNOWN.get() {
        return Ok(*id);
    }
    let id = hebe_sys::proc::boot_id().map_err(|source| VmError::Io {
        what: "the host's boot id cannot be read: is /proc mounted?",
        source,
    })?;
    Ok(*KNOWN.get_or_init(|| id))
}
