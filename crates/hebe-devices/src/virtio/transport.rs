//! A virtio device as a PCI function: life cycle, registers, BAR.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use hebe_block::BlockBackend;
use hebe_state::v1::devices::TransportV1;
use hebe_state::v2::devices::VirtioV2;
use hebe_types::Stamp;

use super::balloon::BalloonFigures;
use super::device::{Counters, Device, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};
use super::error::DeviceError;
use super::function::{
    BAR_SIZE, DEVICE_AT, ISR_AT, NOTIFY_AT, NOTIFY_MULTIPLIER, PBA_AT, TABLE_AT, WINDOW_DATA,
    checked_bar, config_space, doorbell, in_window, msix_control, restore_space, save_space,
    window_access,
};
use super::kind::{DeviceKind, KindInfo};
use super::queue::{QueueError, VirtQueue};
use super::ram::MeteredRam;
use super::registers::{Effect, Registers, STATUS_FEATURES_OK};
use super::shared::{Config, STATUS_DRIVER_OK, STATUS_NEEDS_RESET, Shared, lock};
use super::worker::{Engine, Worker};
use crate::msix::{Msix, NO_VECTOR};
use crate::pci::config::{BAR0, COMMAND, COMMAND_MEMORY, ConfigSpace};
use crate::{Platform, Ram};

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
    /// The driver may write into the device configuration.
    config_is_writable: bool,
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
        state: &VirtioV2,
        kind: DeviceKind,
        platform: &Platform,
    ) -> Result<Arc<Self>, DeviceError> {
        let (function, transport) = (&state.function, &state.transport);
        let slot = function.slot;
        let info = kind.info();
        let device = kind.rebuild(slot, &state.device, transport.queues.len())?;
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
        let config_is_writable = device.config_is_writable();
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
            config_is_writable,
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
        let (mut engine, _) = self.worker.pause();
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
    /// that there is little left to do in [`VirtioPci::pause`]. Fails if the
    /// disk is not what a resume would find: the VM must not be suspended.
    pub fn presync(&self) -> Result<(), DeviceError> {
        let disk = self.worker.engine().device.disk();
        if let Some(disk) = &disk {
            disk.check_found_again()
                .map_err(DeviceError::NotFoundAgain)?;
        }
        self.flush(disk)
    }

    /// Stops the device with nothing in flight and nothing that only the
    /// host's page cache knows: what the guest believes written survives the
    /// host, and so does what the disk is known by. Until [`VirtioPci::resume`] it does not touch guest RAM. Pausing
    /// twice is pausing once. After an error it is paused all the same, but
    /// must not be saved and given up.
    pub fn pause(&self) -> Result<(), DeviceError> {
        let (disk, settled) = {
            let (engine, settled) = self.worker.pause();
            (engine.device.disk(), settled)
        };
        settled.map_or_else(|| self.flush(disk), |done| self.synced(done))
    }

    /// Has the device begin with what [`VirtioPci::pause`] does, and does not wait:
    /// devices of which all are asked first pause side by side. It serves nothing
    /// from then on until [`VirtioPci::resume`]; the pause itself has to follow.
    pub fn ask_to_pause(&self) {
        self.worker.ask_to_pause();
    }

    fn flush(&self, disk: Option<Arc<BlockBackend>>) -> Result<(), DeviceError> {
        self.synced(disk.map_or(Ok(()), |disk| disk.settle()))
    }

    fn synced(&self, result: io::Result<()>) -> Result<(), DeviceError> {
        result.map_err(|source| DeviceError::Sync {
            slot: self.slot,
            source,
        })
    }

    /// The device's state. Only while it is paused and vCPUs stand still.
    pub fn save(&self) -> Result<VirtioV2, DeviceError> {
        let function = lock(&self.function);
        let engine = self.worker.engine();
        if engine.running || engine.device.under_way() > 0 {
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
        let device = engine.device.save().map_err(|source| DeviceError::Host {
            slot: self.slot,
            source,
        })?;
        Ok(VirtioV2 {
            function: save_space(self.slot, &function.space, shared.msix.save()),
            transport,
            device,
        })
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

    /// How long a request of the disk takes at present, in nanoseconds: a mean
    /// over about the last sixty. `None` for other devices, and before the first.
    pub fn request_ns(&self) -> Option<u64> {
        self.shared.meter.request_ns()
    }

    /// What the device did since it was made or restored.
    pub fn counters(&self) -> Counters {
        self.worker.engine().device.counters()
    }

    /// How the balloon stands; `None` for other devices. While the device is
    /// paused as it was then.
    pub fn balloon(&self) -> Option<BalloonFigures> {
        let mut engine = self.worker.engine();
        let active = engine.active;
        engine.device.balloon().map(|b| b.figures(active))
    }

    /// Wants so many pages of 4 KiB in the balloon, and tells the driver. Only
    /// while the VM runs. Other devices do nothing.
    pub fn set_balloon(&self, pages: u32) {
        let mut engine = self.worker.engine();
        if let Some(balloon) = engine.device.balloon() {
            balloon.want(pages);
            self.shared.change_config(engine.device.config());
        }
    }

    /// Asks the guest for its memory statistics, which come when its driver
    /// gives them. Only while the VM runs. Other devices do nothing.
    pub fn ask_statistics(&self) {
        let queue = self.worker.engine().device.balloon().and_then(|b| b.ask());
        if let Some(queue) = queue {
            self.worker.kick(queue);
        }
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
            if let Some((on, masked)) = msix_control(&function.space, at, data.len()) {
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
            DEVICE_AT..NOTIFY_AT if self.config_is_writable => {
                let mut engine = self.worker.engine();
                let at = usize::try_from(offset - DEVICE_AT).unwrap_or(usize::MAX);
                engine.device.config_written(at, data);
                lock(&self.shared.config).bytes = engine.device.config();
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

fn copy_from(source: &[u8], offset: u64, data: &mut [u8]) {
    let Ok(offset) = usize::try_from(offset) else {
        return;
    };
    for (byte, value) in data.iter_mut().zip(source.iter().skip(offset)) {
        *byte = *value;
    }
}

/// Untrusted numbers of a state, against the device that is to take it.
fn check_state(state: &VirtioV2, device: &dyn Device) -> Result<(), DeviceError> {
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
