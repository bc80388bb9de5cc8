//! A disk whose reads are under way beside each other.

mod common;
mod subjects;

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use common::{Driver, DriverQueue, F_EVENT_IDX, Machine, encode, new_ram};
use hebe_block::BlockBackend;
use hebe_devices::{DeviceKind, Ram, VirtioPci};
use subjects::{F_MQ, drop_from_cache, get, with_ring};
use vm_memory::{Bytes, GuestAddress};

const SLOT: u8 = 3;
const QUEUES: usize = 4;
const F_FLUSH: u64 = 1 << 9;
const DISK: usize = 4 << 20;
/// Three descriptors each, in queues of 64.
const BATCH: usize = 20;

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const ZEROES: u32 = 13;

/// How the disk's reads are carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    OneByOne,
    Ring,
    /// The kernel refuses each read in the ring.
    Refusing,
}

/// Xorshift: what it gives follows from the seed.
struct Dice(u64);

impl Dice {
    fn seeded() -> Self {
        let now = std::time::UNIX_EPOCH.elapsed().expect("a clock");
        let seed = now.as_nanos() as u64 | 1;
        println!("seed {seed}");
        Self(seed)
    }

    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % end as u64) as usize
    }
}

/// A request that was put into a queue.
#[derive(Debug)]
struct Request {
    kind: u32,
    offset: usize,
    len: usize,
    /// Where its header is, its status at 32, and its data at 4096.
    at: u64,
}

impl Request {
    fn status(&self, ram: &Ram) -> u8 {
        get(ram, self.at + 32, 1)[0]
    }

    fn data(&self, ram: &Ram) -> Vec<u8> {
        get(ram, self.at + 4096, self.len)
    }
}

struct Rig {
    file: tempfile::NamedTempFile,
    way: Way,
    machine: Machine,
    device: Arc<VirtioPci>,
    queues: Vec<DriverQueue>,
    model: Vec<u8>,
    /// Requests in this batch.
    issued: usize,
}

fn open(file: &tempfile::NamedTempFile, way: Way) -> DeviceKind {
    let mut backend = BlockBackend::open(file.path(), false).expect("open");
    match way {
        Way::OneByOne => {}
        Way::Ring => backend = with_ring(backend),
        Way::Refusing => {
            if let Err(why) = backend.open_refusing_ring() {
                println!("skipped: no ring: {why}");
            }
        }
    }
    DeviceKind::Block {
        backend,
        queues: QUEUES,
    }
}

const FEATURES: u64 = F_MQ | F_FLUSH | F_EVENT_IDX;

impl Rig {
    fn new(way: Way) -> Self {
        let file = tempfile::NamedTempFile::new().expect("file");
        let model: Vec<u8> = (0..DISK).map(|i| (i * 11 + i / 500 + 3) as u8).collect();
        file.as_file().write_all_at(&model, 0).expect("write");
        let machine = Machine::new(&new_ram());
        let device = machine.add(SLOT, open(&file, way));
        let queues = Driver::new(&machine, SLOT).start(FEATURES);
        Self {
            file,
            way,
            machine,
            device,
            queues,
            model,
            issued: 0,
        }
    }

    fn forget(&self) {
        drop_from_cache(self.file.as_file());
    }

    /// Puts a request into a queue, without a kick.
    fn add(&mut self, queue: usize, kind: u32, offset: usize, len: usize, fill: u8) -> Request {
        let at = 0x40_0000 + (self.issued as u64) * 0x1_0000;
        self.issued += 1;
        let ram = &self.machine.ram;
        let put = |at, bytes: &[u8]| ram.write_slice(bytes, GuestAddress(at)).expect("write");
        let sector = if kind == READ || kind == WRITE {
            offset / 512
        } else {
            0
        };
        put(at, &kind.to_le_bytes());
        put(at + 8, &(sector as u64).to_le_bytes());
        put(at + 32, &[0xff]);
        let data = (at + 4096, len as u32);
        let mut buffers = vec![(at, 16, false)];
        match kind {
            READ => {
                put(at + 4096, &vec![0xee; len]);
                buffers.push((data.0, data.1, true));
            }
            WRITE => {
                put(at + 4096, &vec![fill; len]);
                buffers.push((data.0, data.1, false));
            }
            ZEROES => {
                let mut range = (offset as u64 / 512).to_le_bytes().to_vec();
                range.extend((len as u32 / 512).to_le_bytes());
                range.extend([0; 4]);
                put(at + 4096, &range);
                buffers.push((data.0, 16, false));
            }
            _ => {}
        }
        buffers.push((at + 32, 1, true));
        self.queues[queue].add(ram, &buffers);
        Request {
            kind,
            offset,
            len,
            at,
        }
    }

    fn kick(&self) {
        let driver = Driver::new(&self.machine, SLOT);
        self.queues.iter().for_each(|queue| driver.kick(queue));
    }

    fn wait(&mut self) {
        for queue in &self.queues {
            queue.wait_used(&self.machine.ram, queue.avail_idx);
        }
        assert_eq!(self.device.stopped_reason(), None);
        self.issued = 0;
    }

    /// That each is done, with what is on the disk.
    fn check_reads(&self, reads: &[Request]) {
        for read in reads {
            assert_eq!(read.status(&self.machine.ram), 0);
            assert!(read.data(&self.machine.ram) == self.model[read.offset..][..read.len]);
        }
    }

    /// Requests that do not touch each other's part of the disk, whose order
    /// does not matter then.
    fn batch(&mut self, dice: &mut Dice) -> Vec<(Request, u8)> {
        let part = DISK / (BATCH * QUEUES);
        let mut requests = Vec::new();
        for n in 0..BATCH * QUEUES {
            let kind = [READ, READ, READ, READ, WRITE, FLUSH, ZEROES][dice.below(7)];
            let len = 512 * (1 + dice.below(90));
            let room = (part - len) / 512;
            let offset = n * part / 512 * 512 + 512 * dice.below(room - 1) + 512;
            let fill = dice.below(256) as u8;
            requests.push((self.add(n % QUEUES, kind, offset, len, fill), fill));
        }
        requests
    }

    fn check(&mut self, requests: &[(Request, u8)]) {
        for (request, fill) in requests {
            let ram = &self.machine.ram;
            assert_eq!(request.status(ram), 0, "{request:?}");
            let part = request.offset..request.offset + request.len;
            match request.kind {
                READ => assert!(request.data(ram) == self.model[part], "{request:?}"),
                WRITE => self.model[part].fill(*fill),
                ZEROES => self.model[part].fill(0),
                _ => {}
            }
        }
    }

    /// Another VMM takes over.
    fn hand_over(self) -> Self {
        self.device.pause().expect("pause");
        let state = self.device.save().expect("save");
        let ram = self.machine.ram.clone();
        drop(self.device);
        drop(self.machine);
        let machine = Machine::new(&ram);
        let device = machine.restore(&state, open(&self.file, self.way));
        let again = device.save().expect("save again");
        assert_eq!(encode(&state), encode(&again), "save, restore, save");
        device.resume();
        Self {
            machine,
            device,
            ..self
        }
    }
}

#[test]
fn whatever_is_asked_for_in_several_queues_is_as_a_model_says_over_pauses_too() {
    for way in [Way::OneByOne, Way::Ring, Way::Refusing] {
        let mut dice = Dice::seeded();
        let mut rig = Rig::new(way);
        for _ in 0..40 {
            if dice.below(4) > 0 {
                rig.forget();
            }
            let requests = rig.batch(&mut dice);
            rig.kick();
            let now = dice.below(6);
            std::thread::sleep(Duration::from_micros(dice.below(300) as u64));
            match now {
                0 => rig = rig.hand_over(),
                1 => {
                    rig.device.pause().expect("pause");
                    rig.device.resume();
                }
                _ => {}
            }
            rig.wait();
            rig.check(&requests);
        }
        let disk = std::fs::read(rig.file.path()).expect("read the disk");
        assert!(disk == rig.model, "{way:?}");
        let counters = rig.device.counters();
        assert_eq!(counters.dropped, 0, "{way:?}");
    }
}

/// Guest RAM without what the test itself writes.
fn contents(ram: &Ram) -> Vec<u8> {
    let mut bytes = vec![0; common::RAM_LEN];
    ram.read_slice(&mut bytes, GuestAddress(0)).expect("read");
    bytes
}

fn many_reads(rig: &mut Rig) -> Vec<Request> {
    rig.forget();
    (0..BATCH * QUEUES)
        .map(|n| rig.add(n % QUEUES, READ, n * 40_960, 4096, 0))
        .collect()
}

#[test]
fn a_pause_waits_for_what_is_under_way_and_then_nothing_arrives() {
    let mut rig = Rig::new(Way::Ring);
    for round in 0..20 {
        let reads = many_reads(&mut rig);
        rig.kick();
        std::thread::sleep(Duration::from_micros(20 * round));
        rig.device.pause().expect("pause");
        let (before, meter) = (contents(&rig.machine.ram), rig.device.meter());
        let state = encode(&rig.device.save().expect("save"));
        rig.kick();
        std::thread::sleep(Duration::from_millis(5));
        assert!(contents(&rig.machine.ram) == before, "RAM changed");
        assert_eq!(rig.device.meter(), meter);
        assert!(encode(&rig.device.save().expect("save")) == state);
        // Each read is done, with its content, or was not begun.
        for read in &reads {
            let (status, data) = (read.status(&rig.machine.ram), read.data(&rig.machine.ram));
            match status {
                0 => assert!(data == rig.model[read.offset..][..read.len]),
                0xff => assert!(data.iter().all(|b| *b == 0xee), "half a read"),
                other => panic!("status {other}"),
            }
        }
        rig.device.resume();
        rig.wait();
        rig.check_reads(&reads);
    }
}

#[test]
fn after_a_reset_nothing_arrives_and_the_next_driver_is_served() {
    let mut rig = Rig::new(Way::Ring);
    for round in 0..20 {
        many_reads(&mut rig);
        rig.kick();
        std::thread::sleep(Duration::from_micros(20 * round));
        Driver::new(&rig.machine, SLOT).set_status(0);
        let before = contents(&rig.machine.ram);
        std::thread::sleep(Duration::from_millis(5));
        assert!(contents(&rig.machine.ram) == before, "RAM changed");
        if round % 2 == 0 {
            // A pause waits for those of before the reset, too.
            rig.device.pause().expect("pause");
            rig.device.save().expect("save");
            rig.device.resume();
        }
        rig.queues = Driver::new(&rig.machine, SLOT).start(FEATURES);
        rig.issued = 0;
        let reads = many_reads(&mut rig);
        rig.kick();
        rig.wait();
        rig.check_reads(&reads);
    }
}

#[test]
fn a_queue_that_breaks_the_rules_gets_nothing_of_what_is_under_way() {
    let mut rig = Rig::new(Way::Ring);
    for _ in 0..10 {
        many_reads(&mut rig);
        let ram = rig.machine.ram.clone();
        // Behind reads in the same ring.
        rig.queues[0].publish(&ram, 999);
        Driver::new(&rig.machine, SLOT).kick(&rig.queues[0]);
        common::wait("a stop", || rig.device.stopped_reason().is_some());
        let before = contents(&ram);
        std::thread::sleep(Duration::from_millis(5));
        assert!(contents(&ram) == before, "RAM changed");
        rig.device.pause().expect("pause");
        rig.device.save().expect("save");
        rig.device.resume();
        rig.queues = Driver::new(&rig.machine, SLOT).start(FEATURES);
        rig.issued = 0;
        let reads = many_reads(&mut rig);
        rig.kick();
        rig.wait();
        assert!(reads.iter().all(|read| read.status(&ram) == 0));
    }
}

#[test]
fn reads_of_what_was_cut_off_fail_and_the_others_do_not() {
    let mut rig = Rig::new(Way::Ring);
    rig.file.as_file().set_len(DISK as u64 / 2).expect("cut");
    let reads = many_reads(&mut rig);
    rig.kick();
    rig.wait();
    let ram = &rig.machine.ram;
    let mut failed = 0;
    for read in &reads {
        let is_there = read.offset + read.len <= DISK / 2;
        assert_eq!(read.status(ram), u8::from(!is_there), "{read:?}");
        failed += u64::from(!is_there);
    }
    assert_eq!(rig.device.counters().dropped, failed);
    assert!(failed > 0);
}

#[test]
fn a_ring_that_breaks_costs_no_request() {
    let file = tempfile::NamedTempFile::new().expect("file");
    let model: Vec<u8> = (0..DISK).map(|i| (i * 5 + i / 300) as u8).collect();
    file.as_file().write_all_at(&model, 0).expect("write");
    let backend = BlockBackend::open(file.path(), false).expect("open");
    let backend = with_ring(backend);
    let Some(ring) = backend.reads_ended() else {
        return;
    };
    let machine = Machine::new(&new_ram());
    let kind = DeviceKind::Block {
        backend,
        queues: QUEUES,
    };
    let device = machine.add(SLOT, kind);
    let queues = Driver::new(&machine, SLOT).start(FEATURES);
    let mut rig = Rig {
        file,
        way: Way::OneByOne,
        machine,
        device,
        queues,
        model,
        issued: 0,
    };
    for round in 0..4 {
        if round == 2 {
            // Another file takes the place of the ring's descriptor.
            let other = vmm_sys_util::eventfd::EventFd::new(0).expect("eventfd");
            // SAFETY: both are open.
            assert!(unsafe { libc::dup2(other.as_raw_fd(), ring) } >= 0);
        }
        let reads = many_reads(&mut rig);
        rig.kick();
        rig.wait();
        rig.check_reads(&reads);
    }
    rig.device.pause().expect("pause");
    rig.device.save().expect("save");
}

/// A driver that is told of what has ended before a flush need not wait for it.
#[test]
fn what_has_ended_is_told_before_a_flush_begins() {
    let mut rig = Rig::new(Way::OneByOne);
    // What this driver is told of first.
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let ram = rig.machine.ram.clone();
    let queue = rig.queues[0].clone();
    let vectors = rig.machine.msix.0.lock().expect("vectors").clone();
    let told = Arc::clone(&seen);
    *vectors[1].look.lock().expect("look") = Some(Box::new(move || {
        told.lock().expect("seen").push(queue.used_idx(&ram));
    }));
    // Interrupts are wanted for each request.
    let event = rig.queues[0].avail + 4 + 2 * u64::from(rig.queues[0].size);
    let ram = rig.machine.ram.clone();
    ram.write_obj(0u16, GuestAddress(event))
        .expect("used event");
    rig.add(0, WRITE, 0, 512, 1);
    rig.add(0, FLUSH, 0, 0, 0);
    rig.kick();
    rig.wait();
    common::wait("an interrupt", || !seen.lock().expect("seen").is_empty());
    assert_eq!(seen.lock().expect("seen").first(), Some(&1));
}
