//! A virtio device as a PCI function: life cycle, registers, BAR.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use hebe_block::BlockBackend;
use hebe_state::v1::devices::{PciFunctionV1, TransportV1, VirtioV1};
use hebe_types::{MMIO_HOLE_START, Stamp};

use super::device::{Counters, Device, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};
use super::kind::{DeviceKind, KindInfo};
use super::queue::{QueueError, VirtQueue};
use super::ram::MeteredRam;
use super::registers::{COMMON_LEN, Effect, Registers, STATUS_FEATURES_OK};
use super::shared::{Config, STATUS_DRIVER_OK, STATUS_NEEDS_RESET, Shared, lock};
use super::worker::{Engine, Worker};
use crate::msix::{Msix, NO_VECTOR};
use crate::pci::config::{
    BAR0, CACHE_LINE_SIZE, COMMAND, COMMAND_MEMORY, ConfigSpace, INTERRUPT_LINE, Identity,
};
use crate::{Platform, Ram};

/// Bytes of BAR 0, which holds everything; addresses given to
/// [`VirtioPci::new`] are multiples of it.
pub const BAR_SIZE: u64 = 0x8000;
/// The MMIO window for BARs ends here; IOAPIC and LAPIC lie above.
const WINDOW_END: u64 = 0xfe00_0000;

const ISR_AT: u64 = 0x1000;
const DEVICE_AT: u64 = 0x2000;
const NOTIFY_AT: u64 = 0x3000;
const NOTIFY_MULTIPLIER: u64 = 4;
const TABLE_AT: u64 = 0x4000;
const PBA_AT: u64 = 0x5000;

const CAP_VENDOR: u8 = 0x09;
const CAP_MSIX: u8 = 0x11;
const MSIX_CAP: u8 = 0x40;
const WINDOW_CAP: u8 = 0xa0;
const MSIX_CONTROL: usize = MSIX_CAP as usize + 2;
const WINDOW_BAR: usize = WINDOW_CAP as usize + 4;
const WINDOW_OFFSET: usize = WINDOW_CAP as usize + 8;
const WINDOW_LENGTH: usize = WINDOW_CAP as usize + 12;
const WINDOW_DATA: usize = WINDOW_CAP as usize + 16;
const MSIX_ENABLE: u16 = 1 << 15;
const MSIX_MASK: u16 = 1 << 14;

/// Why a device cannot be made, saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Slot 0 is the host bridge; there are 32.
    #[error("PCI slot {0} cannot hold a device: use 1 to 31")]
    Slot(u8),
    /// Two devices in one slot.
    #[error("PCI slot {0} is taken: give the device another")]
    SlotTaken(u8),
    /// The BAR does not lie in the MMIO window.
    #[error("BAR address {0:#x} is not a multiple of {BAR_SIZE:#x} in the MMIO window")]
    Bar(u64),
    /// The host refused interrupts, a thread or a descriptor.
    #[error("the host refuses what the device in PCI slot {slot} needs")]
    Host {
        /// Which device.
        slot: u8,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Saved while it ran.
    #[error("the device in PCI slot {0} is not paused: pause it before it is saved")]
    NotPaused(u8),
    /// Writes could not be made durable.
    #[error("the disk in PCI slot {slot} cannot be flushed")]
    Sync {
        /// Which device.
        slot: u8,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// State and back end are of different kinds.
    #[error(
        "the saved device in PCI slot {slot} is of kind {saved}, and the VM is given {given}: resume it with the devices it had"
    )]
    Kind {
        /// Which device.
        slot: u8,
        /// What the state says.
        saved: &'static str,
        /// What the VM was given.
        given: &'static str,
    },
    /// The disk is not the one that was saved.
    #[error(
        "the disk in PCI slot {slot} had {saved} sectors and now has {found}: resume the VM with the disk it had, unchanged"
    )]
    Disk {
        /// Which device.
        slot: u8,
        /// Capacity in the state, sectors of 512 bytes.
        saved: u64,
        /// Capacity found.
        found: u64,
    },
    /// The guest accepted features that this back end does not have.
    #[error(
        "the guest uses features {missing:#x} of the device in PCI slot {slot} that it does not have here: resume it with the device as it was"
    )]
    Features {
        /// Which device.
        slot: u8,
        /// Bits that are missing.
        missing: u64,
    },
    /// The state contradicts itself.
    #[error("the saved device in PCI slot {slot} makes no sense: {reason}")]
    State {
        /// Which device.
        slot: u8,
        /// What is wrong.
        reason: &'static str,
    },
    /// A saved queue cannot be taken into use.
    #[error("a saved queue of the device in PCI slot {slot} makes no sense: {reason}")]
    Queue {
        /// Which device.
        slot: u8,
        /// What is wrong.
        reason: String,
    },
}

struct Function {
    space: ConfigSpace,
    registers: Registers,
    /// Where the doorbells hang now, and which of them do.
    doorbells: Option<(u64, Vec<bool>)>,
}

/// A virtio device in a PCI slot.
///
/// ```text
///   new ──► running ◄──── resume ──── paused ◄── restore
///              └─────── pause ───────►   │ save
/// ```
pub struct VirtioPci {
    slot: u8,
    name: &'static str,
    platform: Platform,
    shared: Arc<Shared>,
    worker: Worker,
    function: Mutex<Function>,
    /// Where BAR 0 answers; 0 while it does not.
    mapped_at: AtomicU64,
}

impl VirtioPci {
    /// A new device, running, with BAR 0 at `bar_addr` as firmware would
    /// place it. Memory decoding is off until the guest turns it on.
    pub fn new(
        slot: u8,
        bar_addr: u64,
        kind: DeviceKind,
        platform: &Platform,
    ) -> Result<Arc<Self>, DeviceError> {
        let bar = checked_bar(bar_addr)?;
        let info = kind.info();
        let device = kind.build(slot);
        let msix = Msix::new(device.queues() + 1, &*platform.msix);
        let this = Self::assemble(slot, &info, device, msix, platform, 0)?;
        lock(&this.function).space.set_bar0(BAR_SIZE as u32, bar);
        this.worker.resume();
        Ok(Arc::new(this))
    }

    /// The device as saved, paused, on a back end that fits it. Interrupt
    /// routes are set and doorbells attached; nothing touches guest RAM
    /// before [`VirtioPci::resume`].
    pub fn restore(
        state: &VirtioV1,
        kind: DeviceKind,
        platform: &Platform,
    ) -> Result<Arc<Self>, DeviceError> {
        let (function, transport) = (&state.function, &state.transport);
        let slot = function.slot;
        let info = kind.info();
        let device = kind.rebuild(slot, &state.device)?;
        check_state(state, &*device)?;
        let msix = Msix::restore(&function.msix, &*platform.msix);
        let generation = transport.config_generation;
        let this = Self::assemble(slot, &info, device, msix, platform, generation)?;
        this.restore_transport(transport)?;
        {
            let mut inner = lock(&this.function);
            restore_space(&mut inner.space, function);
            this.update_mapping(&mut inner);
        }
        Ok(Arc::new(this))
    }

    fn assemble(
        slot: u8,
        info: &KindInfo,
        device: Box<dyn Device>,
        msix: io::Result<Msix>,
        platform: &Platform,
        generation: u8,
    ) -> Result<Self, DeviceError> {
        if slot == 0 || slot > 31 {
            return Err(DeviceError::Slot(slot));
        }
        let host = |source| DeviceError::Host { slot, source };
        let msix = msix.map_err(host)?;
        let queues = device.queues();
        let offered = offered(&*device);
        let config = Config {
            bytes: device.config(),
            generation,
        };
        let log = Arc::clone(&platform.log);
        let shared = Arc::new(Shared::new(slot, queues, msix, config, log));
        let config_len = lock(&shared.config).bytes.len();
        let worker = Worker::start(device, Arc::clone(&shared)).map_err(host)?;
        Ok(Self {
            slot,
            name: info.name,
            platform: platform.clone(),
            shared,
            worker,
            function: Mutex::new(Function {
                space: config_space(info, queues, config_len),
                registers: Registers::new(offered, queues),
                doorbells: None,
            }),
            mapped_at: AtomicU64::new(0),
        })
    }

    fn restore_transport(&self, state: &TransportV1) -> Result<(), DeviceError> {
        let shared = &self.shared;
        shared.isr.store(state.isr, Ordering::Release);
        shared.status.store(state.status, Ordering::Release);
        let vector = state.config_vector;
        shared.config_vector.store(vector, Ordering::Release);
        for (slot, queue) in shared.queue_vectors.iter().zip(&state.queues) {
            slot.store(queue.vector, Ordering::Release);
        }
        (*lock(&shared.stopped)).clone_from(&state.stopped);
        let mut function = lock(&self.function);
        let registers = &mut function.registers;
        registers.device_feature_select = state.device_feature_select;
        registers.driver_feature_select = state.driver_feature_select;
        registers.driver_features = state.driver_features;
        registers.queue_select = state.queue_select;
        registers.queues.clone_from(&state.queues);
        let mut engine = self.worker.pause();
        if state.stopped.is_none() && state.status & STATUS_DRIVER_OK != 0 {
            self.activate(registers, &mut engine)
                .map_err(|(queue, error)| DeviceError::Queue {
                    slot: self.slot,
                    reason: format!("queue {queue}: {error}"),
                })?;
        }
        Ok(())
    }

    /// The PCI slot.
    pub fn slot(&self) -> u8 {
        self.slot
    }

    /// The kind of device, for reports.
    pub fn device_name(&self) -> &'static str {
        self.name
    }

    /// Makes the disk's writes durable while the guest and the device run, so
    /// that there is little left to do in [`VirtioPci::pause`].
    pub fn presync(&self) -> Result<(), DeviceError> {
        let disk = self.worker.engine().device.disk();
        self.flush(disk)
    }

    /// Stops the device with nothing in flight and nothing that only the
    /// host's page cache knows: what the guest believes written survives the
    /// host. Until [`VirtioPci::resume`] it does not touch guest RAM. Pausing
    /// twice is pausing once. After an error it is paused all the same, but
    /// must not be saved and given up.
    pub fn pause(&self) -> Result<(), DeviceError> {
        let disk = self.worker.pause().device.disk();
        self.flush(disk)
    }

    fn flush(&self, disk: Option<Arc<BlockBackend>>) -> Result<(), DeviceError> {
        disk.map_or(Ok(()), |disk| disk.flush())
            .map_err(|source| DeviceError::Sync {
                slot: self.slot,
                source,
            })
    }

    /// The device's state. Only while it is paused and vCPUs stand still.
    pub fn save(&self) -> Result<VirtioV1, DeviceError> {
        let function = lock(&self.function);
        let engine = self.worker.engine();
        if engine.running {
            return Err(DeviceError::NotPaused(self.slot));
        }
        let shared = &self.shared;
        let registers = &function.registers;
        let mut queues = registers.queues.clone();
        for (i, queue) in queues.iter_mut().enumerate() {
            queue.vector = shared.queue_vectors[i].load(Ordering::Acquire);
            if let Some(used) = &engine.queues.list[i] {
                (queue.next_avail, queue.next_used) = used.indices();
            }
        }
        let transport = TransportV1 {
            status: shared.status.load(Ordering::Acquire),
            isr: shared.isr.load(Ordering::Acquire),
            config_generation: lock(&shared.config).generation,
            config_vector: shared.config_vector.load(Ordering::Acquire),
            device_feature_select: registers.device_feature_select,
            driver_feature_select: registers.driver_feature_select,
            driver_features: registers.driver_features,
            queue_select: registers.queue_select,
            queues,
            stopped: lock(&shared.stopped).clone(),
        };
        Ok(VirtioV1 {
            function: self.save_function(&function.space),
            transport,
            device: engine.device.save(),
        })
    }

    fn save_function(&self, space: &ConfigSpace) -> PciFunctionV1 {
        PciFunctionV1 {
            slot: self.slot,
            command: space.u16(COMMAND),
            cache_line_size: space.u8(CACHE_LINE_SIZE),
            interrupt_line: space.u8(INTERRUPT_LINE),
            bar0: space.u32(BAR0),
            window_bar: space.u8(WINDOW_BAR),
            window_offset: space.u32(WINDOW_OFFSET),
            window_length: space.u32(WINDOW_LENGTH),
            msix: self.shared.msix.save(),
        }
    }

    /// Lets the device go on: looks at every queue, and raises every
    /// interrupt of an active device once. A kick or an interrupt that the
    /// old VMM had not delivered is made good by that; a spurious one is
    /// harmless.
    pub fn resume(&self) {
        let active = self.worker.engine().active;
        self.worker.resume();
        if active {
            for queue in 0..self.worker.kicks().len() {
                self.shared.queue_interrupt(queue);
            }
        }
        let changed = lock(&self.shared.config).generation != 0;
        if changed || self.stopped_reason().is_some() {
            self.shared.config_interrupt();
        }
    }

    /// Tells the network where the guest is now: a NIC sends a RARP frame and
    /// gratuitous ARP for the addresses that the guest used, and asks the
    /// driver to do the same where it can. Other devices do nothing.
    pub fn announce(&self) -> Result<(), DeviceError> {
        let host = |source| DeviceError::Host {
            slot: self.slot,
            source,
        };
        let mut engine = self.worker.engine();
        if engine.device.announce().map_err(host)? {
            let config = engine.device.config();
            drop(engine);
            self.shared.change_config(config);
        }
        Ok(())
    }

    /// When a NIC's first frame after start or resume left; `None` before,
    /// and for other devices.
    pub fn first_tx(&self) -> Option<Stamp> {
        self.worker.engine().device.first_tx()
    }

    /// Why the device stopped, if the guest made it.
    pub fn stopped_reason(&self) -> Option<String> {
        lock(&self.shared.stopped).clone()
    }

    /// Bytes of guest RAM that the device touched since it was made or
    /// restored: in rings, and in what descriptors point to.
    pub fn meter(&self) -> (u64, u64) {
        self.shared.meter.read()
    }

    /// What the device did since it was made or restored.
    pub fn counters(&self) -> Counters {
        self.worker.engine().device.counters()
    }

    /// Reads configuration space.
    pub(crate) fn config_read(&self, at: usize, data: &mut [u8]) {
        let window = {
            let function = lock(&self.function);
            function.space.read(at, data);
            window_access(&function.space, at, data.len())
        };
        if let Some((offset, len)) = window {
            let mut bytes = [0; 4];
            self.bar_read(offset, &mut bytes[..len]);
            for (i, byte) in data.iter_mut().enumerate() {
                *byte = bytes.get(at + i - WINDOW_DATA).copied().unwrap_or(0);
            }
        }
    }

    /// Writes configuration space.
    pub(crate) fn config_write(&self, at: usize, data: &[u8]) {
        let window = {
            let mut function = lock(&self.function);
            function.space.write(at, data);
            let control = function.space.u16(MSIX_CONTROL);
            let (on, masked) = (control & MSIX_ENABLE != 0, control & MSIX_MASK != 0);
            if (at..at + data.len()).contains(&(MSIX_CONTROL + 1)) {
                self.report_failure("MSI-X", self.shared.msix.set_control(on, masked));
            }
            self.update_mapping(&mut function);
            window_access(&function.space, at, data.len())
        };
        if let Some((offset, len)) = window {
            self.bar_write(offset, &data[..len.min(data.len())]);
        }
    }

    /// Offset into BAR 0, if it answers at this address now.
    pub(crate) fn bar_offset(&self, addr: u64) -> Option<u64> {
        let at = self.mapped_at.load(Ordering::Acquire);
        let offset = addr.checked_sub(at)?;
        (at != 0 && offset < BAR_SIZE).then_some(offset)
    }

    /// Reads BAR 0.
    pub(crate) fn bar_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            ..ISR_AT => {
                let image = lock(&self.function).registers.image(&self.shared);
                copy_from(&image, offset, data);
            }
            // Reading takes the bits away (virtio 1.2, 4.1.4.5).
            ISR_AT => {
                if let Some(byte) = data.first_mut() {
                    *byte = self.shared.isr.swap(0, Ordering::AcqRel);
                }
            }
            DEVICE_AT..NOTIFY_AT => {
                copy_from(&lock(&self.shared.config).bytes, offset - DEVICE_AT, data);
            }
            TABLE_AT..PBA_AT => self.shared.msix.table_read(offset - TABLE_AT, data),
            PBA_AT.. => self.shared.msix.pba_read(offset - PBA_AT, data),
            _ => {}
        }
    }

    /// Writes BAR 0.
    pub(crate) fn bar_write(&self, offset: u64, data: &[u8]) {
        match offset {
            ..ISR_AT => {
                let mut function = lock(&self.function);
                let registers = &mut function.registers;
                if let Effect::Status(status) = registers.write(offset, data, &self.shared) {
                    self.write_status(registers, status);
                }
            }
            NOTIFY_AT..TABLE_AT => {
                let queue = (offset - NOTIFY_AT) / NOTIFY_MULTIPLIER;
                if let Ok(queue) = usize::try_from(queue) {
                    self.worker.kick(queue);
                }
            }
            TABLE_AT..PBA_AT => {
                let result = self.shared.msix.table_write(offset - TABLE_AT, data);
                self.report_failure("MSI-X", result);
            }
            _ => {}
        }
    }

    /// The driver wrote the device status (virtio 1.2, 2.1 and 3.1.1).
    fn write_status(&self, registers: &mut Registers, written: u8) {
        if written == 0 {
            self.reset(registers);
            return;
        }
        let status = &self.shared.status;
        let before = status.load(Ordering::Acquire);
        // Bits are only added; what the device itself set is not the driver's.
        let mut added = written & !before & !STATUS_NEEDS_RESET;
        if added & STATUS_FEATURES_OK != 0 && !features_fit(registers) {
            added &= !STATUS_FEATURES_OK;
        }
        let now = status.fetch_or(added, Ordering::AcqRel) | added;
        if added & STATUS_DRIVER_OK == 0 || now & STATUS_NEEDS_RESET != 0 {
            return;
        }
        if now & STATUS_FEATURES_OK == 0 {
            self.shared.stop("the driver is ready without FEATURES_OK");
            return;
        }
        let mut engine = self.worker.engine();
        match self.activate(registers, &mut engine) {
            Ok(()) => {
                drop(engine);
                (0..registers.queues.len()).for_each(|queue| self.worker.kick(queue));
            }
            Err((queue, error)) => self.shared.stop(&format!("queue {queue}: {error}")),
        }
    }

    fn activate(
        &self,
        registers: &Registers,
        engine: &mut Engine,
    ) -> Result<(), (usize, QueueError)> {
        let features = registers.driver_features;
        let (event_idx, indirect) = (features & F_EVENT_IDX != 0, features & F_INDIRECT_DESC != 0);
        let mut list = Vec::with_capacity(registers.queues.len());
        for (i, queue) in registers.queues.iter().enumerate() {
            let ram = MeteredRam::new(self.ram(), Arc::clone(&self.shared.meter));
            list.push(if queue.enabled {
                Some(VirtQueue::new(queue, event_idx, indirect, ram).map_err(|e| (i, e))?)
            } else {
                None
            });
        }
        engine.queues.list = list;
        engine.device.activate(features);
        engine.active = true;
        Ok(())
    }

    fn ram(&self) -> Ram {
        self.platform.ram.clone()
    }

    fn reset(&self, registers: &mut Registers) {
        let mut engine = self.worker.engine();
        engine.active = false;
        engine.queues.list.iter_mut().for_each(|q| *q = None);
        engine.device.reset();
        registers.reset();
        let shared = &self.shared;
        *lock(&shared.stopped) = None;
        lock(&shared.config).bytes = engine.device.config();
        shared.isr.store(0, Ordering::Release);
        shared.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &shared.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
        shared.status.store(0, Ordering::Release);
    }

    /// Follows the command register and BAR 0: where the BAR answers, and
    /// where the doorbells hang. A doorbell that the kernel refuses (another
    /// hangs there already) is no loss: the write then comes as an exit.
    fn update_mapping(&self, function: &mut Function) {
        let bar = u64::from(function.space.u32(BAR0));
        let decoding = function.space.u16(COMMAND) & COMMAND_MEMORY != 0;
        let wanted = (decoding && in_window(bar)).then_some(bar);
        let current = function.doorbells.as_ref().map(|(at, _)| *at);
        if wanted == current {
            return;
        }
        self.detach_doorbells(function);
        self.mapped_at.store(wanted.unwrap_or(0), Ordering::Release);
        if let Some(bar) = wanted {
            let attach = |(i, kick)| {
                let attached = self.platform.doorbells.attach(doorbell(bar, i), kick);
                let attached_ok = attached.is_ok();
                self.report_failure("a doorbell", attached);
                attached_ok
            };
            let attached = self.worker.kicks().iter().enumerate().map(attach);
            function.doorbells = Some((bar, attached.collect()));
        }
    }

    fn detach_doorbells(&self, function: &mut Function) {
        let Some((bar, attached)) = function.doorbells.take() else {
            return;
        };
        for (i, kick) in self.worker.kicks().iter().enumerate() {
            if attached[i] {
                let detached = self.platform.doorbells.detach(doorbell(bar, i), kick);
                self.report_failure("a doorbell", detached);
            }
        }
    }

    fn report_failure(&self, what: &str, result: io::Result<()>) {
        if let Err(e) = result {
            self.shared.report(&format!("{what} cannot be set: {e}"));
        }
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        let mut function = lock(&self.function);
        self.detach_doorbells(&mut function);
    }
}

fn offered(device: &dyn Device) -> u64 {
    device.features() | F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC
}

fn features_fit(registers: &Registers) -> bool {
    let accepted = registers.driver_features;
    accepted & !registers.offered == 0 && accepted & F_VERSION_1 != 0
}

fn doorbell(bar: u64, queue: usize) -> u64 {
    bar + NOTIFY_AT + NOTIFY_MULTIPLIER * queue as u64
}

fn in_window(bar: u64) -> bool {
    (MMIO_HOLE_START..=WINDOW_END - BAR_SIZE).contains(&bar)
}

fn checked_bar(addr: u64) -> Result<u32, DeviceError> {
    if !in_window(addr) || !addr.is_multiple_of(BAR_SIZE) {
        return Err(DeviceError::Bar(addr));
    }
    u32::try_from(addr).map_err(|_| DeviceError::Bar(addr))
}

fn copy_from(source: &[u8], offset: u64, data: &mut [u8]) {
    let Ok(offset) = usize::try_from(offset) else {
        return;
    };
    for (byte, value) in data.iter_mut().zip(source.iter().skip(offset)) {
        *byte = *value;
    }
}

/// An access to the data of the configuration access capability (virtio 1.2,
/// 4.1.4.9): where in BAR 0, how many bytes.
fn window_access(space: &ConfigSpace, at: usize, len: usize) -> Option<(u64, usize)> {
    let inside = at >= WINDOW_DATA && at + len <= WINDOW_DATA + 4;
    let offset = u64::from(space.u32(WINDOW_OFFSET));
    let length = space.u32(WINDOW_LENGTH) as usize;
    let sane = space.u8(WINDOW_BAR) == 0
        && matches!(length, 1 | 2 | 4)
        && offset.is_multiple_of(length as u64)
        && offset + (length as u64) <= BAR_SIZE;
    (inside && sane).then_some((offset, length))
}

/// Capabilities: MSI-X, then the five of virtio (virtio 1.2, 4.1.4).
fn config_space(info: &KindInfo, queues: usize, config_len: usize) -> ConfigSpace {
    let mut space = ConfigSpace::new(&Identity {
        vendor: 0x1af4,
        device: 0x1040 + info.id,
        class: info.class,
        revision: 1,
        subsystem_vendor: 0x1af4,
        subsystem: 0x1100,
    });
    space.set_bar0(BAR_SIZE as u32, 0);
    // Table size is encoded as n - 1, and there are queues + 1 vectors.
    let mut msix = (queues as u16).to_le_bytes().to_vec();
    msix.extend_from_slice(&(TABLE_AT as u32).to_le_bytes());
    msix.extend_from_slice(&(PBA_AT as u32).to_le_bytes());
    space.add_capability(MSIX_CAP, CAP_MSIX, &msix);
    let control = (MSIX_ENABLE | MSIX_MASK).to_le_bytes();
    space.allow(MSIX_CONTROL, &control);

    let notify_len = NOTIFY_MULTIPLIER * queues as u64;
    let parts = [
        (0x50, 1, 0, COMMON_LEN as u64),
        (0x60, 3, ISR_AT, 1),
        (0x70, 4, DEVICE_AT, config_len.max(4) as u64),
        (0x80, 2, NOTIFY_AT, notify_len),
    ];
    for (at, part, offset, len) in parts {
        let mut body = virtio_cap(part, offset, len);
        if part == 2 {
            body[0] = 20;
            body.extend_from_slice(&(NOTIFY_MULTIPLIER as u32).to_le_bytes());
        }
        space.add_capability(at, CAP_VENDOR, &body);
    }
    let mut body = virtio_cap(5, 0, 0);
    body[0] = 20;
    body.extend_from_slice(&[0; 4]);
    space.add_capability(WINDOW_CAP, CAP_VENDOR, &body);
    space.allow(WINDOW_BAR, &[0xff]);
    space.allow(WINDOW_OFFSET, &[0xff; 8]);
    space
}

/// The body of a virtio capability after id and next pointer.
fn virtio_cap(part: u8, offset: u64, len: u64) -> Vec<u8> {
    let mut body = vec![16, part, 0, 0, 0, 0];
    body.extend_from_slice(&(offset as u32).to_le_bytes());
    body.extend_from_slice(&(len as u32).to_le_bytes());
    body
}

fn restore_space(space: &mut ConfigSpace, state: &PciFunctionV1) {
    // Through the guest's own masks: a state cannot set what a guest cannot.
    space.write(BAR0, &state.bar0.to_le_bytes());
    space.write(COMMAND, &state.command.to_le_bytes());
    space.write(CACHE_LINE_SIZE, &[state.cache_line_size]);
    space.write(INTERRUPT_LINE, &[state.interrupt_line]);
    space.write(WINDOW_BAR, &[state.window_bar]);
    space.write(WINDOW_OFFSET, &state.window_offset.to_le_bytes());
    space.write(WINDOW_LENGTH, &state.window_length.to_le_bytes());
    let mut control = space.u16(MSIX_CONTROL) & !(MSIX_ENABLE | MSIX_MASK);
    if state.msix.enabled {
        control |= MSIX_ENABLE;
    }
    if state.msix.masked {
        control |= MSIX_MASK;
    }
    space.put(MSIX_CONTROL, &control.to_le_bytes());
}

/// Untrusted numbers of a state, against the device that is to take it.
fn check_state(state: &VirtioV1, device: &dyn Device) -> Result<(), DeviceError> {
    let slot = state.function.slot;
    let refuse = |reason| Err(DeviceError::State { slot, reason });
    let (transport, queues) = (&state.transport, device.queues());
    if transport.queues.len() != queues {
        return refuse("it has another number of queues");
    }
    if state.function.msix.entries.len() != queues + 1 {
        return refuse("it has another number of interrupt vectors");
    }
    let vector_ok = |vector: u16| vector == NO_VECTOR || usize::from(vector) <= queues;
    let mut vectors = transport.queues.iter().map(|queue| queue.vector);
    if !vector_ok(transport.config_vector) || !vectors.all(vector_ok) {
        return refuse("it names an interrupt vector that it does not have");
    }
    let accepted = transport.driver_features;
    let missing = accepted & !offered(device);
    if transport.status & STATUS_FEATURES_OK != 0 && missing != 0 {
        return Err(DeviceError::Features { slot, missing });
    }
    Ok(())
}
