//! A VMM and a guest's driver, as far as a device can tell. The driver goes
//! through the same doors as a guest: configuration ports, BAR, guest RAM.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hebe_devices::{
    DeviceKind, Doorbells, EventLog, MsiMessage, MsiVector, MsixBackend, PciRoot, Platform, Ram,
    VirtioPci,
};
use hebe_state::StateWriter;
use hebe_state::v2::devices::VirtioV2;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

pub const RAM_LEN: usize = 16 << 20;
pub const BAR: u64 = 0xd000_0000;
const COMMON: u64 = 0;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;

pub const F_INDIRECT: u64 = 1 << 28;
pub const F_EVENT_IDX: u64 = 1 << 29;
pub const F_VERSION_1: u64 = 1 << 32;
pub const NEEDS_RESET: u8 = 0x40;

#[derive(Default)]
pub struct FakeVector {
    pub fired: AtomicU32,
    pub message: Mutex<Option<MsiMessage>>,
    /// What a guest looks at when it is interrupted.
    pub look: Mutex<Option<Box<dyn Fn() + Send>>>,
}

impl MsiVector for FakeVector {
    fn trigger(&self) -> io::Result<()> {
        assert!(self.message.lock().expect("message").is_some(), "no route");
        self.fired.fetch_add(1, Ordering::SeqCst);
        if let Some(look) = &*self.look.lock().expect("look") {
            look();
        }
        Ok(())
    }

    fn route(&self, message: Option<MsiMessage>) -> io::Result<()> {
        *self.message.lock().expect("message") = message;
        Ok(())
    }
}

#[derive(Default)]
pub struct FakeMsix(pub Mutex<Vec<Arc<FakeVector>>>);

impl MsixBackend for FakeMsix {
    fn new_vector(&self) -> io::Result<Arc<dyn MsiVector>> {
        let vector = Arc::new(FakeVector::default());
        self.0.lock().expect("vectors").push(Arc::clone(&vector));
        Ok(vector)
    }
}

/// Like KVM: one eventfd per address, a second is refused.
#[derive(Default)]
pub struct FakeDoorbells(pub Mutex<BTreeMap<u64, EventFd>>);

impl Doorbells for FakeDoorbells {
    fn attach(&self, addr: u64, evt: &EventFd) -> io::Result<()> {
        let mut bells = self.0.lock().expect("doorbells");
        if bells.contains_key(&addr) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        bells.insert(addr, evt.try_clone()?);
        Ok(())
    }

    fn detach(&self, addr: u64, _evt: &EventFd) -> io::Result<()> {
        let removed = self.0.lock().expect("doorbells").remove(&addr);
        removed.map(drop).ok_or(io::ErrorKind::NotFound.into())
    }
}

#[derive(Default)]
pub struct FakeLog(pub Mutex<Vec<(u8, String)>>);

impl EventLog for FakeLog {
    fn event(&self, slot: u8, text: &str) {
        self.0.lock().expect("log").push((slot, text.to_owned()));
    }
}

/// A VMM with a PCI root and no vCPUs.
pub struct Machine {
    pub ram: Ram,
    pub root: PciRoot,
    pub platform: Platform,
    pub msix: Arc<FakeMsix>,
    pub doorbells: Arc<FakeDoorbells>,
    pub log: Arc<FakeLog>,
}

pub fn new_ram() -> Ram {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM_LEN)]).expect("guest RAM")
}

impl Machine {
    pub fn new(ram: &Ram) -> Self {
        let (msix, doorbells, log) = (
            Arc::new(FakeMsix::default()),
            Arc::new(FakeDoorbells::default()),
            Arc::new(FakeLog::default()),
        );
        Self {
            ram: ram.clone(),
            root: PciRoot::new(),
            platform: Platform {
                ram: ram.clone(),
                msix: msix.clone(),
                doorbells: doorbells.clone(),
                log: log.clone(),
            },
            msix,
            doorbells,
            log,
        }
    }

    pub fn add(&self, slot: u8, kind: DeviceKind) -> Arc<VirtioPci> {
        let device = VirtioPci::new(slot, bar_of(slot), kind, &self.platform).expect("new device");
        self.root.add(Arc::clone(&device)).expect("free slot");
        device
    }

    pub fn restore(&self, state: &VirtioV2, kind: DeviceKind) -> Arc<VirtioPci> {
        let device = VirtioPci::restore(state, kind, &self.platform).expect("restored device");
        self.root.add(Arc::clone(&device)).expect("free slot");
        device
    }

    pub fn fired(&self) -> u32 {
        let vectors = self.msix.0.lock().expect("vectors");
        vectors.iter().map(|v| v.fired.load(Ordering::SeqCst)).sum()
    }

    pub fn config_read(&self, slot: u8, at: u8) -> u32 {
        self.select(slot, at);
        let mut data = [0; 4];
        self.root.pio_read(0xcfc, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn config_write(&self, slot: u8, at: u8, value: u32) {
        self.select(slot, at);
        self.root.pio_write(0xcfc, &value.to_le_bytes());
    }

    fn select(&self, slot: u8, at: u8) {
        let address = 1 << 31 | u32::from(slot) << 11 | u32::from(at);
        self.root.pio_write(0xcf8, &address.to_le_bytes());
    }
}

pub fn bar_of(slot: u8) -> u64 {
    BAR + u64::from(slot) * 0x1_0000
}

/// Waits for `done`, ten seconds at most.
pub fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(120);
    while !done() {
        assert!(Instant::now() < until, "{what}: not within 120 s");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The encoded section, as it is stored.
pub fn encode(state: &VirtioV2) -> Vec<u8> {
    let mut writer = StateWriter::new();
    writer.add(u32::from(state.function.slot), state);
    writer.finish()
}

/// A segment of a request: address, length, writable by the device.
pub type Buffer = (u64, u32, bool);

/// The driver's side of a queue. Lives in the guest, so it outlives a VMM.
#[derive(Clone)]
pub struct DriverQueue {
    pub index: u16,
    pub size: u16,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    pub next_desc: u16,
    pub avail_idx: u16,
}

impl DriverQueue {
    pub fn at(slot: u8, index: u16, size: u16) -> Self {
        let base = 0x1_0000 + u64::from(slot) * 0x1_0000 + u64::from(index) * 0x4000;
        Self {
            index,
            size,
            desc: base,
            avail: base + 0x1000,
            used: base + 0x2000,
            next_desc: 0,
            avail_idx: 0,
        }
    }

    pub fn write_desc(&self, ram: &Ram, at: u16, buffer: (u64, u32), flags: u16, next: u16) {
        let addr = self.desc + u64::from(at % self.size) * 16;
        put_desc(ram, addr, buffer, flags, next);
    }

    /// Puts a chain into the ring, without a kick.
    pub fn add(&mut self, ram: &Ram, buffers: &[Buffer]) -> u16 {
        let head = self.next_desc % self.size;
        for (i, &(addr, len, writable)) in buffers.iter().enumerate() {
            let at = self.next_desc;
            self.next_desc = self.next_desc.wrapping_add(1);
            let more = i + 1 < buffers.len();
            let flags = u16::from(more) | u16::from(writable) << 1;
            let next = self.next_desc % self.size;
            self.write_desc(ram, at, (addr, len), flags, next);
        }
        self.publish(ram, head);
        head
    }

    pub fn publish(&mut self, ram: &Ram, head: u16) {
        let entry = self.avail + 4 + 2 * u64::from(self.avail_idx % self.size);
        ram.write_obj(head, GuestAddress(entry)).expect("entry");
        self.avail_idx = self.avail_idx.wrapping_add(1);
        ram.store(
            self.avail_idx,
            GuestAddress(self.avail + 2),
            Ordering::SeqCst,
        )
        .expect("index");
    }

    pub fn used_idx(&self, ram: &Ram) -> u16 {
        ram.load(GuestAddress(self.used + 2), Ordering::SeqCst)
            .expect("used index")
    }

    /// Entry `n` of the used ring: head and length.
    pub fn used_entry(&self, ram: &Ram, n: u16) -> (u32, u32) {
        let at = self.used + 4 + 8 * u64::from(n % self.size);
        let id = ram.read_obj(GuestAddress(at)).expect("id");
        let len = ram.read_obj(GuestAddress(at + 4)).expect("length");
        (id, len)
    }

    pub fn wait_used(&self, ram: &Ram, count: u16) {
        wait("used buffers", || self.used_idx(ram) == count);
    }
}

pub fn put_desc(ram: &Ram, at: u64, (addr, len): (u64, u32), flags: u16, next: u16) {
    ram.write_obj(addr, GuestAddress(at)).expect("addr");
    ram.write_obj(len, GuestAddress(at + 8)).expect("len");
    ram.write_obj(flags, GuestAddress(at + 12)).expect("flags");
    ram.write_obj(next, GuestAddress(at + 14)).expect("next");
}

/// A guest's driver of the device in a slot.
pub struct Driver<'a> {
    pub machine: &'a Machine,
    pub slot: u8,
    pub bar: u64,
}

impl<'a> Driver<'a> {
    pub fn new(machine: &'a Machine, slot: u8) -> Self {
        let bar = u64::from(machine.config_read(slot, 0x10) & !0xf);
        Self { machine, slot, bar }
    }

    pub fn read(&self, at: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        assert!(self.machine.root.mmio_read(self.bar + at, &mut data[..len]));
        u64::from_le_bytes(data)
    }

    pub fn write(&self, at: u64, value: u64, len: usize) {
        let data = value.to_le_bytes();
        assert!(self.machine.root.mmio_write(self.bar + at, &data[..len]));
    }

    pub fn status(&self) -> u8 {
        self.read(COMMON + 20, 1) as u8
    }

    pub fn set_status(&self, status: u8) {
        self.write(COMMON + 20, u64::from(status), 1);
    }

    pub fn features(&self) -> u64 {
        self.write(COMMON, 0, 4);
        let low = self.read(COMMON + 4, 4);
        self.write(COMMON, 1, 4);
        low | self.read(COMMON + 4, 4) << 32
    }

    /// Memory decoding and bus mastering on; MSI-X on, every vector unmasked.
    pub fn enable(&self) {
        self.machine.config_write(self.slot, 0x04, 6);
        for vector in 0..=self.queues() {
            let entry = TABLE + u64::from(vector) * 16;
            self.write(entry, 0xfee0_0000, 4);
            self.write(entry + 4, 0, 4);
            self.write(entry + 8, 0x40 + u64::from(vector), 4);
            self.write(entry + 12, 0, 4);
        }
        let control = self.machine.config_read(self.slot, 0x40);
        self.machine
            .config_write(self.slot, 0x40, control | 1 << 31);
    }

    pub fn queues(&self) -> u16 {
        self.read(COMMON + 18, 2) as u16
    }

    /// Up to FEATURES_OK.
    pub fn negotiate(&self, features: u64) {
        self.set_status(0);
        self.set_status(1);
        self.set_status(3);
        for half in 0..2 {
            self.write(COMMON + 8, half, 4);
            self.write(COMMON + 12, features >> (32 * half) & 0xffff_ffff, 4);
        }
        self.set_status(11);
        assert_eq!(self.status() & 8, 8, "features refused");
    }

    pub fn set_queue(&self, queue: &DriverQueue) {
        self.write(COMMON + 22, u64::from(queue.index), 2);
        self.write(COMMON + 24, u64::from(queue.size), 2);
        self.write(COMMON + 26, u64::from(queue.index) + 1, 2);
        self.write(COMMON + 32, queue.desc, 8);
        self.write(COMMON + 40, queue.avail, 8);
        self.write(COMMON + 48, queue.used, 8);
        self.write(COMMON + 28, 1, 2);
    }

    /// The whole start: returns the queues, of 64 entries each.
    pub fn start(&self, features: u64) -> Vec<DriverQueue> {
        self.enable();
        self.negotiate(features | F_VERSION_1);
        self.write(COMMON + 16, 0, 2);
        let queues: Vec<_> = (0..self.queues())
            .map(|index| DriverQueue::at(self.slot, index, 64))
            .collect();
        for queue in &queues {
            for at in [queue.avail, queue.used] {
                let zero = [0u8; 0x400];
                let ram = &self.machine.ram;
                ram.write_slice(&zero, GuestAddress(at)).expect("clear");
            }
            self.set_queue(queue);
        }
        self.set_status(15);
        queues
    }

    /// Rings the doorbell as a guest does: through the kernel's doorbell if
    /// one hangs there, by an exit otherwise.
    pub fn kick(&self, queue: &DriverQueue) {
        let at = NOTIFY + 4 * u64::from(queue.index);
        let bells = self.machine.doorbells.0.lock().expect("doorbells");
        match bells.get(&(self.bar + at)) {
            Some(bell) => bell.write(1).expect("ring"),
            None => {
                drop(bells);
                self.write(at, u64::from(queue.index), 2);
            }
        }
    }
}
