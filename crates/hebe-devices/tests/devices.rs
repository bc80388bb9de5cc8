//! What belongs to one kind of device.

mod common;
mod subjects;

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use common::{Buffer, Driver, DriverQueue, Machine, new_ram, wait};
use hebe_block::BlockBackend;
use hebe_devices::{DeviceKind, NetBackend, Ram, VirtioPci};
use hebe_state::v2::devices::DeviceV2;
use hebe_sys::tap::{Tap, TapError};
use subjects::{BlockSubject, ConsoleSubject, MAC, NetSubject, OFFLOADED, OFFLOADS, Subject, get};
use vm_memory::{Bytes, GuestAddress};

const SLOT: u8 = 2;
const DEVICE_CONFIG: u64 = 0x2000;
const HEADER: u64 = 0x40_0000;
const DATA: u64 = 0x50_0000;
const STATUS: u64 = 0x40_1000;

const F_RO: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_ZEROES: u64 = 1 << 14;
const F_ANNOUNCE: u64 = 1 << 21 | 1 << 17 | 1 << 16;

fn put(ram: &Ram, addr: u64, bytes: &[u8]) {
    ram.write_slice(bytes, GuestAddress(addr)).expect("write");
}

struct Disk {
    machine: Machine,
    device: Arc<VirtioPci>,
    queue: DriverQueue,
    done: u16,
}

impl Disk {
    fn start(backend: BlockBackend, features: u64) -> Self {
        let machine = Machine::new(&new_ram());
        let device = machine.add(SLOT, DeviceKind::Block { backend, queues: 1 });
        let queue = Driver::new(&machine, SLOT).start(features)[0].clone();
        Self {
            machine,
            device,
            queue,
            done: 0,
        }
    }

    /// Runs a request; returns its status and the length that was reported.
    fn request(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
        let ram = &self.machine.ram;
        put(ram, HEADER, &kind.to_le_bytes());
        put(ram, HEADER + 8, &sector.to_le_bytes());
        put(ram, STATUS, &[0xee]);
        let mut chain = vec![(HEADER, 16, false)];
        chain.extend_from_slice(data);
        chain.push((STATUS, 1, true));
        self.queue.add(ram, &chain);
        Driver::new(&self.machine, SLOT).kick(&self.queue);
        self.done += 1;
        self.queue.wait_used(ram, self.done);
        let (_, len) = self.queue.used_entry(ram, self.done - 1);
        (get(ram, STATUS, 1)[0], len)
    }
}

#[test]
fn a_disk_reads_what_it_wrote_in_any_split() {
    let subject = BlockSubject::new();
    let backend = BlockBackend::open(subject.file.path(), false).expect("open");
    let mut disk = Disk::start(backend, F_FLUSH);
    let pattern: Vec<u8> = (0..512 * 1024u32).map(|i| (i % 251) as u8).collect();
    put(&disk.machine.ram, DATA, &pattern);
    let written = disk.request(1, 8, &[(DATA, 512 * 1024, false)]);
    assert_eq!(written, (0, 1));
    let back = 0x80_0000;
    let split = [
        (back, 1, true),
        (back + 1, 300_000, true),
        (back + 300_001, 512 * 1024 - 300_001, true),
    ];
    assert_eq!(disk.request(0, 8, &split), (0, 512 * 1024 + 1));
    assert!(get(&disk.machine.ram, back, pattern.len()) == pattern);
    assert_eq!(disk.request(4, 0, &[]), (0, 1), "flush");
    let counters = disk.device.counters();
    assert_eq!(counters.requests, 3);
    assert!(disk.device.request_ns().is_some_and(|ns| ns > 0));
    assert_eq!(
        (counters.bytes_in, counters.bytes_out),
        (512 << 10, 512 << 10)
    );
}

#[test]
fn a_disk_refuses_what_is_not_on_it() {
    let subject = BlockSubject::new();
    let backend = BlockBackend::open(subject.file.path(), false).expect("open");
    let mut disk = Disk::start(backend, F_FLUSH);
    let sectors = 2048;
    for (sector, len) in [
        (sectors, 512),
        (sectors - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (0, 511),
        (0, 513),
    ] {
        for kind in [0, 1] {
            let data = [(DATA, len, kind == 0)];
            assert_eq!(disk.request(kind, sector, &data).0, 1, "{sector} {len}");
        }
    }
    assert_eq!(disk.request(77, 0, &[]).0, 2, "unknown");
    assert_eq!(disk.request(0, sectors - 1, &[(DATA, 512, true)]).0, 0);
    assert_eq!(disk.device.stopped_reason(), None);
    assert_eq!(disk.device.counters().dropped, 13);
}

/// A range to discard or to zero.
fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend([sectors, flags].map(u32::to_le_bytes).concat());
    bytes
}

const DISCARD: u32 = 11;
const ZEROES: u32 = 13;

#[test]
fn ranges_are_discarded_or_zeroed_and_the_rest_of_the_disk_stays() {
    for (kind, flags) in [(DISCARD, 0), (ZEROES, 0), (ZEROES, 1)] {
        let subject = BlockSubject::new();
        std::fs::write(subject.file.path(), vec![7; 1 << 20]).expect("fill");
        let blocks = |s: &BlockSubject| {
            use std::os::unix::fs::MetadataExt;
            s.file.as_file().metadata().expect("metadata").blocks()
        };
        let full = blocks(&subject);
        let backend = BlockBackend::open(subject.file.path(), false).expect("open");
        let mut disk = Disk::start(backend, F_FLUSH | F_DISCARD | F_ZEROES);
        let ranges = [range(8, 512, flags), range(1024, 8, flags)].concat();
        put(&disk.machine.ram, DATA, &ranges);
        let done = disk.request(kind, 0, &[(DATA, ranges.len() as u32, false)]);
        assert_eq!(done, (0, 1), "{kind} {flags}");
        assert_eq!(disk.request(4, 0, &[]), (0, 1), "flush");
        let bytes = std::fs::read(subject.file.path()).expect("read");
        assert_eq!(bytes.len(), 1 << 20);
        for (sector, bytes) in bytes.chunks(512).enumerate() {
            let cleared = (8..520).contains(&sector) || (1024..1032).contains(&sector);
            let wanted = if cleared { 0 } else { 7 };
            assert!(bytes.iter().all(|b| *b == wanted), "sector {sector}");
        }
        if kind == DISCARD || flags == 1 {
            assert!(blocks(&subject) < full, "room is given back");
        }
    }
}

#[test]
fn ranges_that_are_not_on_the_disk_or_have_unknown_flags_are_refused() {
    let subject = BlockSubject::new();
    std::fs::write(subject.file.path(), vec![7; 1 << 20]).expect("fill");
    let backend = BlockBackend::open(subject.file.path(), false).expect("open");
    let mut disk = Disk::start(backend, F_FLUSH);
    let sectors = 2048;
    for (kind, bytes, status) in [
        (DISCARD, range(sectors, 1, 0), 1),
        (DISCARD, range(sectors - 1, 2, 0), 1),
        (ZEROES, range(u64::MAX, 1, 0), 1),
        (ZEROES, range(0, u32::MAX, 0), 1),
        (DISCARD, range(0, 1, 1), 2),
        (ZEROES, range(0, 1, 2), 2),
        (ZEROES, range(0, 1, u32::MAX), 2),
        (DISCARD, range(0, 1, 0)[..15].to_vec(), 1),
        (DISCARD, range(0, 1, 0).repeat(17), 1),
        // The first is good and done, the second is not.
        (ZEROES, [range(0, 1, 0), range(sectors, 1, 0)].concat(), 1),
    ] {
        put(&disk.machine.ram, DATA, &bytes);
        let data = [(DATA, bytes.len() as u32, false)];
        assert_eq!(disk.request(kind, 0, &data).0, status, "{kind} {bytes:?}");
    }
    assert_eq!(disk.request(DISCARD, 0, &[]).0, 1, "no range");
    assert_eq!(disk.device.stopped_reason(), None);
    let bytes = std::fs::read(subject.file.path()).expect("read");
    assert!(bytes[..512].iter().all(|b| *b == 0) && bytes[512..].iter().all(|b| *b == 7));
    // What cannot be written is offered neither.
    let backend = BlockBackend::open(BlockSubject::new().file.path(), true).expect("open");
    let read_only = Disk::start(backend, 0);
    let offered = Driver::new(&read_only.machine, SLOT).features();
    assert_eq!(offered & (F_DISCARD | F_ZEROES), 0);
}

#[test]
fn a_request_without_header_or_status_stops_the_disk() {
    for chain in [
        vec![(HEADER, 15, false), (STATUS, 1, true)],
        vec![(HEADER, 16, false)],
        vec![(STATUS, 1, true)],
    ] {
        let subject = BlockSubject::new();
        let backend = BlockBackend::open(subject.file.path(), false).expect("open");
        let mut disk = Disk::start(backend, F_FLUSH);
        disk.queue.add(&disk.machine.ram, &chain);
        Driver::new(&disk.machine, SLOT).kick(&disk.queue);
        wait("stop", || disk.device.stopped_reason().is_some());
    }
}

#[test]
fn a_read_only_disk_says_so_and_is_not_written() {
    let subject = BlockSubject::new();
    let backend = BlockBackend::open(subject.file.path(), true).expect("open");
    let mut disk = Disk::start(backend, F_FLUSH | F_RO);
    assert_ne!(Driver::new(&disk.machine, SLOT).features() & F_RO, 0);
    put(&disk.machine.ram, DATA, &[7; 512]);
    assert_eq!(disk.request(1, 0, &[(DATA, 512, false)]).0, 1);
    assert_eq!(disk.request(0, 0, &[(DATA, 512, true)]).0, 0);
    assert_eq!(get(&disk.machine.ram, DATA, 512), [0; 512]);
}

#[test]
fn a_disk_tells_its_size_limits_and_id() {
    let subject = BlockSubject::new();
    let backend = BlockBackend::open(subject.file.path(), false).expect("open");
    let mut disk = Disk::start(backend, F_FLUSH);
    let driver = Driver::new(&disk.machine, SLOT);
    assert_eq!(driver.read(DEVICE_CONFIG, 8), 2048);
    assert_eq!(driver.read(DEVICE_CONFIG + 12, 4), 254, "seg_max");
    assert_eq!(driver.read(DEVICE_CONFIG + 20, 4), 512, "blk_size");
    assert_eq!(driver.read(DEVICE_CONFIG + 24, 4), 0);
    assert_eq!(disk.request(8, 0, &[(DATA, 20, true)]), (0, 21));
    assert!(get(&disk.machine.ram, DATA, 20).starts_with(b"hebe-disk-2\0"));
}

struct Nic {
    subject: NetSubject,
    machine: Machine,
    device: Arc<VirtioPci>,
    queues: Vec<DriverQueue>,
}

impl Nic {
    fn start(features: u64) -> Self {
        let subject = NetSubject::new();
        let machine = Machine::new(&new_ram());
        let device = machine.add(SLOT, subject.kind());
        let queues = Driver::new(&machine, SLOT).start(features);
        Self {
            subject,
            machine,
            device,
            queues,
        }
    }

    fn offer(&mut self, count: u64, len: u32) {
        for i in 0..count {
            let buffer = [(DATA + i * 0x1000, len, true)];
            self.queues[0].add(&self.machine.ram, &buffer);
        }
        Driver::new(&self.machine, SLOT).kick(&self.queues[0]);
    }

    fn arrive(&self, payload: &[u8]) {
        self.arrive_with(&[0; 12], payload);
    }

    fn arrive_with(&self, header: &[u8; 12], payload: &[u8]) {
        let mut frame = header.to_vec();
        frame.extend_from_slice(payload);
        rustix::io::write(&self.subject.wire, &frame).expect("send");
    }

    fn send(&mut self, frame: &[u8]) {
        let ram = &self.machine.ram;
        let sent = self.queues[1].used_idx(ram);
        put(ram, HEADER, &[0; 12]);
        put(ram, HEADER + 12, frame);
        self.queues[1].add(ram, &[(HEADER, 12 + frame.len() as u32, false)]);
        Driver::new(&self.machine, SLOT).kick(&self.queues[1]);
        self.queues[1].wait_used(ram, sent + 1);
    }
}

/// An ARP request of the guest's for another address than its own.
fn arp(ip: [u8; 4]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend_from_slice(&MAC.0);
    frame.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend_from_slice(&MAC.0);
    frame.extend_from_slice(&ip);
    frame.extend_from_slice(&[0; 6]);
    frame.extend_from_slice(&[10, 0, 0, 1]);
    frame
}

#[test]
fn frames_reach_the_guest_whole_and_in_order() {
    let mut nic = Nic::start(0);
    nic.arrive(b"early: no buffer is there yet");
    nic.offer(2, 1600);
    nic.arrive(&[0xab; 1514]);
    nic.queues[0].wait_used(&nic.machine.ram, 2);
    // Both buffers are used: this one waits for the next.
    nic.arrive(b"late");
    nic.offer(1, 1600);
    nic.queues[0].wait_used(&nic.machine.ram, 3);
    let ram = &nic.machine.ram;
    assert_eq!(nic.queues[0].used_entry(ram, 0).1, 12 + 29);
    assert_eq!(nic.queues[0].used_entry(ram, 1).1, 12 + 1514);
    let header = get(ram, DATA + 0x1000, 12);
    assert_eq!(header, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(get(ram, DATA + 0x1000 + 12, 1514), [0xab; 1514]);
    assert_eq!(get(ram, DATA + 12, 4), b"late");
}

#[test]
fn a_frame_that_fits_no_buffer_is_dropped_and_the_next_one_comes() {
    let mut nic = Nic::start(0);
    nic.offer(2, 100);
    nic.arrive(&[1; 500]);
    nic.arrive(b"short");
    nic.queues[0].wait_used(&nic.machine.ram, 1);
    assert_eq!(get(&nic.machine.ram, DATA + 12, 5), b"short");
    assert_eq!(nic.device.counters().dropped, 1);
    assert_eq!(nic.device.request_ns(), None);
}

#[test]
fn frames_that_wait_over_a_suspend_arrive_after_it() {
    let mut nic = Nic::start(0);
    nic.offer(4, 1600);
    nic.arrive(b"one");
    nic.queues[0].wait_used(&nic.machine.ram, 1);
    nic.device.pause().expect("pause");
    nic.arrive(b"two");
    let state = nic.device.save().expect("save");
    let machine = Machine::new(&nic.machine.ram);
    let device = machine.restore(&state, nic.subject.kind());
    std::thread::sleep(std::time::Duration::from_millis(10));
    assert_eq!(nic.queues[0].used_idx(&machine.ram), 1);
    device.resume();
    nic.queues[0].wait_used(&machine.ram, 2);
    assert_eq!(get(&machine.ram, DATA + 0x1000 + 12, 3), b"two");
}

/// A driver that did not ask for it gets no frame that is not whole, and no
/// header but the number of buffers.
#[test]
fn what_was_not_agreed_does_not_come() {
    let mut nic = Nic::start(0);
    nic.offer(2, 1600);
    nic.arrive_with(&OFFLOADED, &[1; 500]);
    // The checksum was found good.
    nic.arrive_with(&[2, 0, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9], b"short");
    nic.queues[0].wait_used(&nic.machine.ram, 1);
    let got = get(&nic.machine.ram, DATA, 17);
    assert_eq!(got[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(got[12..], *b"short");
    assert_eq!(nic.device.counters().dropped, 1);
}

/// A long frame takes as many buffers as it needs, in order, and waits until
/// there are enough, also over a suspend of the driver's patience.
#[test]
fn a_long_frame_lies_in_several_buffers() {
    let mut nic = Nic::start(OFFLOADS);
    nic.offer(1, 600);
    let frame: Vec<u8> = (0..1500_u32).map(|i| (i % 251) as u8).collect();
    nic.arrive_with(&OFFLOADED, &frame);
    nic.arrive(b"behind it");
    std::thread::sleep(std::time::Duration::from_millis(10));
    assert_eq!(
        nic.queues[0].used_idx(&nic.machine.ram),
        0,
        "too few buffers"
    );
    for n in 1..5 {
        let buffer = [(DATA + n * 0x1000, 600, true)];
        nic.queues[0].add(&nic.machine.ram, &buffer);
        Driver::new(&nic.machine, SLOT).kick(&nic.queues[0]);
    }
    nic.queues[0].wait_used(&nic.machine.ram, 4);
    let ram = &nic.machine.ram;
    let lens: Vec<u32> = (0..4).map(|n| nic.queues[0].used_entry(ram, n).1).collect();
    assert_eq!(lens, [600, 600, 312, 12 + 9]);
    let header = get(ram, DATA, 12);
    assert_eq!(
        header[..10],
        OFFLOADED[..10],
        "the kernel's header is passed on"
    );
    assert_eq!(header[10..], [3, 0], "so many buffers");
    let mut all = get(ram, DATA + 12, 588);
    all.extend(get(ram, DATA + 0x1000, 600));
    all.extend(get(ram, DATA + 0x2000, 312));
    assert!(all == frame);
    assert_eq!(get(ram, DATA + 0x3000 + 12, 9), b"behind it");
    assert_eq!(nic.device.counters().dropped, 0);
}

/// What was agreed goes on with the new VMM's tap; where the new back end lacks
/// it the state is refused by name.
#[test]
fn agreed_offloads_go_on_or_the_state_is_refused() {
    let mut nic = Nic::start(OFFLOADS);
    nic.offer(2, 1600);
    nic.device.pause().expect("pause");
    let state = nic.device.save().expect("save");
    let machine = Machine::new(&nic.machine.ram);
    let device = machine.restore(&state, nic.subject.kind());
    device.resume();
    nic.arrive_with(&OFFLOADED, &[7; 1000]);
    nic.queues[0].wait_used(&machine.ram, 1);
    assert_eq!(get(&machine.ram, DATA, 10), OFFLOADED[..10]);
    let other = Machine::new(&nic.machine.ram);
    let kind = DeviceKind::Net {
        wire: NetBackend::Nothing,
        mac: MAC,
    };
    let refused = VirtioPci::restore(&state, kind, &other.platform);
    let refused = refused.err().expect("refused").to_string();
    assert!(refused.contains("feature"), "{refused}");
}

/// The kernel does what a driver leaves to it: through one tap goes a frame that
/// is to be cut, and out comes what was agreed with it.
#[test]
fn a_real_tap_takes_what_the_driver_leaves_to_it() {
    let name = format!("hbo{}", std::process::id() % 100_000);
    let tap = match Tap::open(&name) {
        Ok(tap) => tap,
        Err(e @ (TapError::Permission(_) | TapError::Device(_))) => {
            eprintln!("skipped: a real tap's offloads: {e}");
            return;
        }
        Err(e) => panic!("{e}"),
    };
    tap.set_up().expect("up");
    let wire = packet_socket(&name);
    let machine = Machine::new(&new_ram());
    let wire_of_nic = NetBackend::tap(tap);
    let kind = DeviceKind::Net {
        wire: wire_of_nic.clone(),
        mac: MAC,
    };
    let device = machine.add(SLOT, kind);
    let mut queues = Driver::new(&machine, SLOT).start(OFFLOADS);
    let segment = tcp_segment(4000);
    put(&machine.ram, HEADER, &OFFLOADED);
    put(&machine.ram, HEADER + 12, &segment);
    queues[1].add(&machine.ram, &[(HEADER, 12 + segment.len() as u32, false)]);
    Driver::new(&machine, SLOT).kick(&queues[1]);
    wait("the segment on the host, whole", || {
        let mut frame = [0; 8192];
        matches!(rustix::io::read(&wire, &mut frame[..]), Ok(len) if len == segment.len())
    });
    assert_eq!(device.counters().dropped, 0, "the kernel took it");
    // One that makes no sense to anybody is dropped here.
    put(&machine.ram, HEADER, &[1, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    queues[1].add(&machine.ram, &[(HEADER, 12 + segment.len() as u32, false)]);
    Driver::new(&machine, SLOT).kick(&queues[1]);
    queues[1].wait_used(&machine.ram, 2);
    assert_eq!(device.counters().dropped, 1);
}

/// A segment of TCP over IPv4 with so many bytes, its checksum only begun.
fn tcp_segment(len: u16) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend_from_slice(&MAC.0);
    frame.extend_from_slice(&[8, 0, 0x45, 0]);
    frame.extend_from_slice(&(40 + len).to_be_bytes());
    frame.extend_from_slice(&[0, 0, 0x40, 0, 64, 6, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2]);
    // Ports, numbers, a header of five words, ACK.
    frame.extend_from_slice(&[0x30, 0x39, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0]);
    frame.extend_from_slice(&[0; 4]);
    frame.resize(frame.len() + usize::from(len), 0x2a);
    frame
}

#[test]
fn frames_too_short_or_too_long_stop_the_nic() {
    for len in [4, 12, 25, 70_000] {
        let mut nic = Nic::start(0);
        nic.queues[1].add(&nic.machine.ram, &[(HEADER, len, false)]);
        Driver::new(&nic.machine, SLOT).kick(&nic.queues[1]);
        wait("stop", || nic.device.stopped_reason().is_some());
        assert_eq!(nic.subject.receive(), None);
    }
}

#[test]
fn the_nic_announces_the_guest_after_a_suspend() {
    let mut nic = Nic::start(F_ANNOUNCE);
    assert_eq!(nic.device.first_tx(), None);
    nic.send(&arp([10, 0, 0, 7]));
    nic.send(&arp([10, 0, 0, 8]));
    assert!(nic.device.first_tx().is_some());
    while nic.subject.receive().is_some() {}
    nic.device.pause().expect("pause");
    let state = nic.device.save().expect("save");
    let DeviceV2::Net(saved) = &state.device else {
        panic!("not a NIC's state");
    };
    assert_eq!(saved.ipv4, [[10, 0, 0, 7], [10, 0, 0, 8]]);

    let machine = Machine::new(&nic.machine.ram);
    let device = machine.restore(&state, nic.subject.kind());
    device.resume();
    assert_eq!(device.first_tx(), None, "nothing was sent yet");
    let fired = machine.fired();
    device.announce().expect("announce");
    let frames: Vec<_> = std::iter::from_fn(|| nic.subject.receive()).collect();
    assert_eq!(frames.len(), 3);
    assert_eq!(frames[0][12 + 12..12 + 14], [0x80, 0x35], "RARP first");
    for (frame, ip) in frames[1..].iter().zip([7, 8]) {
        assert_eq!(frame[12..12 + 6], [0xff; 6]);
        assert_eq!(frame[12 + 6..12 + 14], [&MAC.0[..], &[8, 6]].concat());
        let (sender, target) = (12 + 28, 12 + 38);
        assert_eq!(frame[sender..sender + 4], [10, 0, 0, ip]);
        assert_eq!(frame[target..target + 4], [10, 0, 0, ip]);
    }
    assert_eq!(device.first_tx(), None, "that was not the guest");

    // The driver is asked to announce too, and acknowledges.
    assert_eq!(machine.fired(), fired + 1);
    let driver = Driver::new(&machine, SLOT);
    assert_eq!(driver.read(DEVICE_CONFIG + 6, 2), 3);
    put(&machine.ram, HEADER, &[3, 0, 0xee]);
    let command = [(HEADER, 2, false), (HEADER + 2, 1, true)];
    nic.queues[2].add(&machine.ram, &command);
    driver.kick(&nic.queues[2]);
    nic.queues[2].wait_used(&machine.ram, 1);
    assert_eq!(get(&machine.ram, HEADER + 2, 1), [0]);
    assert_eq!(driver.read(DEVICE_CONFIG + 6, 2), 1, "link up, no announce");
}

#[test]
fn a_wire_that_is_gone_leaves_the_nic_alive() {
    let subject = NetSubject::new();
    let machine = Machine::new(&new_ram());
    let device = machine.add(SLOT, subject.kind());
    let queues = Driver::new(&machine, SLOT).start(0);
    drop(subject);
    let mut nic = queues[1].clone();
    put(&machine.ram, HEADER, &[0; 100]);
    nic.add(&machine.ram, &[(HEADER, 100, false)]);
    Driver::new(&machine, SLOT).kick(&nic);
    nic.wait_used(&machine.ram, 1);
    assert_eq!(device.counters().dropped, 1);
    assert_eq!(device.stopped_reason(), None);
}

/// The same over a real tap, where this user may make one; says so where not.
#[test]
fn frames_pass_through_a_real_tap() {
    let name = format!("hbn{}", std::process::id() % 100_000);
    let tap = match Tap::open(&name) {
        Ok(tap) => tap,
        Err(e @ (TapError::Permission(_) | TapError::Device(_))) => {
            eprintln!("the real tap is not tested, the socket pair is: {e}");
            return;
        }
        Err(e) => panic!("{e}"),
    };
    tap.set_up().expect("up");
    let wire = packet_socket(&name);
    let machine = Machine::new(&new_ram());
    let kind = DeviceKind::Net {
        wire: NetBackend::tap(tap),
        mac: MAC,
    };
    let device = machine.add(SLOT, kind);
    let mut queues = Driver::new(&machine, SLOT).start(0);

    let mut out = vec![0xff; 6];
    out.extend_from_slice(&MAC.0);
    out.extend_from_slice(&[0x88, 0xb5]);
    out.resize(100, 0x3c);
    put(&machine.ram, HEADER, &[0; 12]);
    put(&machine.ram, HEADER + 12, &out);
    queues[1].add(&machine.ram, &[(HEADER, 112, false)]);
    Driver::new(&machine, SLOT).kick(&queues[1]);
    wait("the guest's frame on the host", || {
        let mut frame = [0; 2048];
        // The host's own chatter on a new interface comes in between.
        matches!(rustix::io::read(&wire, &mut frame[..]), Ok(100) if frame[..100] == out[..])
    });

    for i in 0..16 {
        queues[0].add(&machine.ram, &[(DATA + i * 0x1000, 2048, true)]);
    }
    Driver::new(&machine, SLOT).kick(&queues[0]);
    let mut back = MAC.0.to_vec();
    back.extend_from_slice(&[2, 0, 0, 0, 0, 9, 0x88, 0xb5]);
    back.resize(200, 0x5d);
    rustix::io::write(&wire, &back).expect("send");
    wait("the host's frame in the guest", || {
        let used = queues[0].used_idx(&machine.ram);
        (0..used).any(|n| get(&machine.ram, DATA + u64::from(n) * 0x1000 + 12, 200) == back)
    });
    device.announce().expect("announce");
}

/// A raw socket on an interface.
fn packet_socket(name: &str) -> OwnedFd {
    use std::os::fd::FromRawFd;
    let all = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: no pointers; the result is checked.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, i32::from(all)) };
    assert!(fd >= 0, "packet socket");
    // SAFETY: a fresh descriptor that nobody else has.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let name = std::ffi::CString::new(name).expect("name");
    // SAFETY: `sockaddr_ll` is plain data; all zero is a valid value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = all;
    // SAFETY: a NUL-terminated string that outlives the call.
    address.sll_ifindex = unsafe { libc::if_nametoindex(name.as_ptr()) } as i32;
    let len = std::mem::size_of_val(&address) as u32;
    // SAFETY: a valid address of the given length that outlives the call.
    let rc = unsafe { libc::bind(fd, (&raw const address).cast(), len) };
    assert_eq!(rc, 0, "bind");
    rustix::io::ioctl_fionbio(&socket, true).expect("non-blocking");
    socket
}

/// A passt that ends is told of, once; the NIC goes on without.
#[test]
fn a_network_that_ends_is_told_of_once() {
    let (near, far) = UnixStream::pair().expect("pair");
    let machine = Machine::new(&new_ram());
    let kind = DeviceKind::Net {
        wire: NetBackend::stream(near),
        mac: MAC,
    };
    let device = machine.add(SLOT, kind);
    let mut queues = Driver::new(&machine, SLOT).start(0);
    queues[0].add(&machine.ram, &[(DATA, 2048, true)]);
    Driver::new(&machine, SLOT).kick(&queues[0]);
    drop(far);
    let told = || machine.log.0.lock().expect("log").clone();
    wait("a word about it", || !told().is_empty());
    for n in 1..=3 {
        put(&machine.ram, HEADER, &[0; 112]);
        queues[1].add(&machine.ram, &[(HEADER, 112, false)]);
        queues[0].add(&machine.ram, &[(DATA, 2048, true)]);
        Driver::new(&machine, SLOT).kick(&queues[0]);
        Driver::new(&machine, SLOT).kick(&queues[1]);
        queues[1].wait_used(&machine.ram, n);
    }
    let told = told();
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].1.contains("passt ended"), "{told:?}");
    assert_eq!(device.stopped_reason(), None);
    assert_eq!(device.counters().dropped, 3);
}

#[test]
fn what_a_client_types_reaches_the_guest_and_no_byte_is_lost() {
    let subject = ConsoleSubject::new();
    let machine = Machine::new(&new_ram());
    let device = machine.add(SLOT, subject.kind());
    let mut queues = Driver::new(&machine, SLOT).start(0);
    let (mut client, theirs) = UnixStream::pair().expect("pair");
    subject.hub.attach(theirs).expect("attach");
    let typed: Vec<u8> = (0..12_000u32).map(|i| (i % 253) as u8).collect();
    let copy = typed.clone();
    let typist = std::thread::spawn(move || client.write_all(&copy).map(|()| client));
    let mut got = Vec::new();
    while got.len() < typed.len() {
        let used = queues[0].used_idx(&machine.ram);
        queues[0].add(&machine.ram, &[(DATA, 100, true)]);
        Driver::new(&machine, SLOT).kick(&queues[0]);
        queues[0].wait_used(&machine.ram, used + 1);
        let (_, len) = queues[0].used_entry(&machine.ram, used);
        got.extend(get(&machine.ram, DATA, len as usize));
    }
    assert!(got == typed);
    assert_eq!(device.counters().bytes_in, typed.len() as u64);
    typist.join().expect("typist").expect("typed");
}

#[test]
fn a_console_with_nobody_listening_goes_on() {
    let subject = ConsoleSubject::new();
    let machine = Machine::new(&new_ram());
    machine.add(SLOT, subject.kind());
    let mut queues = Driver::new(&machine, SLOT).start(0);
    let (mut lazy, theirs) = UnixStream::pair().expect("pair");
    subject.hub.attach(theirs).expect("attach");
    put(&machine.ram, DATA, &vec![b'z'; 1 << 19]);
    // Attached for good, before the flood.
    queues[1].add(&machine.ram, &[(DATA, 1, false)]);
    Driver::new(&machine, SLOT).kick(&queues[1]);
    lazy.read_exact(&mut [0]).expect("first byte");
    for n in 2..=40 {
        queues[1].add(&machine.ram, &[(DATA, 1 << 19, false)]);
        Driver::new(&machine, SLOT).kick(&queues[1]);
        queues[1].wait_used(&machine.ram, n);
    }
    // The client that never read was let go.
    lazy.set_read_timeout(Some(std::time::Duration::from_secs(120)))
        .expect("timeout");
    let mut all = Vec::new();
    lazy.read_to_end(&mut all).expect("hung up");
    assert!(all.len() < 20 << 20);
}
