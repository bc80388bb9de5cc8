//! Sockets between host and guest: what a guest's driver and programs of the
//! host see, and what a hostile one of either cannot do.

mod common;
mod subjects;

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{Driver, DriverQueue, Machine, new_ram, wait};
use hebe_devices::{Ram, VirtioPci};
use subjects::{Subject, VSOCK_CID, VsockSubject, get, vsock_header};
use vm_memory::{Bytes, GuestAddress};

const SLOT: u8 = 4;
const HEADER: usize = 44;
const BUFFER: u32 = 4096;
const ROOM: usize = 64 << 10;

const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const DATA: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

/// A packet as the guest reads it.
#[derive(Debug)]
struct Packet {
    bytes: Vec<u8>,
}

impl Packet {
    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes[at..at + 4].try_into().expect("4 bytes"))
    }

    fn op(&self) -> u16 {
        (self.u32(28) >> 16) as u16
    }

    /// Host's port and guest's port.
    fn ports(&self) -> (u32, u32) {
        (self.u32(16), self.u32(20))
    }

    fn data(&self) -> &[u8] {
        &self.bytes[HEADER..]
    }
}

struct Rig {
    subject: VsockSubject,
    machine: Machine,
    device: Arc<VirtioPci>,
    rx: DriverQueue,
    tx: DriverQueue,
    event: DriverQueue,
    /// Receive buffers that were read.
    read: u16,
    sent: u64,
}

impl Rig {
    fn start() -> Self {
        let subject = VsockSubject::new();
        let machine = Machine::new(&new_ram());
        let device = machine.add(SLOT, subject.kind());
        Self::on(subject, machine, device)
    }

    fn on(subject: VsockSubject, machine: Machine, device: Arc<VirtioPci>) -> Self {
        let mut queues = Driver::new(&machine, SLOT).start(0).into_iter();
        let mut queue = || queues.next().expect("three queues");
        Self {
            subject,
            rx: queue(),
            tx: queue(),
            event: queue(),
            machine,
            device,
            read: 0,
            sent: 0,
        }
    }

    /// Goes on in another VMM; not resumed yet.
    fn in_another_vmm(self) -> Self {
        self.device.pause().expect("pause");
        let state = self.device.save().expect("save");
        let Self {
            subject,
            machine,
            device,
            ..
        } = self;
        let ram = machine.ram.clone();
        drop((device, machine));
        let machine = Machine::new(&ram);
        let device = machine.restore(&state, subject.kind());
        Self {
            subject,
            machine,
            device,
            ..self
        }
    }

    fn ram(&self) -> &Ram {
        &self.machine.ram
    }

    fn kick(&self, queue: &DriverQueue) {
        Driver::new(&self.machine, SLOT).kick(queue);
    }

    /// Gives the device room for packets.
    fn give(&mut self, count: u16) {
        for _ in 0..count {
            let at = buffer(self.rx.avail_idx);
            self.rx.add(&self.machine.ram, &[(at, BUFFER, true)]);
        }
        self.kick(&self.rx.clone());
    }

    /// The next packet for the guest.
    fn next(&mut self) -> Packet {
        let used = self.rx.clone();
        wait("a packet", || used.used_idx(&self.machine.ram) != self.read);
        let (_, len) = used.used_entry(&self.machine.ram, self.read);
        let bytes = get(&self.machine.ram, buffer(self.read), len as usize);
        self.read = self.read.wrapping_add(1);
        let packet = Packet { bytes };
        assert_eq!(packet.u32(24) as usize, packet.data().len(), "length");
        assert_eq!((packet.u32(0), packet.u32(8)), (2, VSOCK_CID as u32));
        packet
    }

    fn expect(&mut self, op: u16) -> Packet {
        let packet = self.next();
        assert_eq!(packet.op(), op, "{packet:?}");
        packet
    }

    fn has_news(&self) -> bool {
        std::thread::sleep(Duration::from_millis(30));
        self.rx.used_idx(self.ram()) != self.read
    }

    /// Puts a packet into the ring, with a kick.
    fn send(&mut self, header: &[u8], data: &[u8]) {
        let at = 0x80_0000 + self.sent % 64 * 0x2_0000;
        self.sent += 1;
        let ram = &self.machine.ram;
        ram.write_slice(header, GuestAddress(at)).expect("write");
        ram.write_slice(data, GuestAddress(at + 0x100))
            .expect("write");
        let mut buffers = vec![(at, header.len() as u32, false)];
        if !data.is_empty() {
            buffers.push((at + 0x100, data.len() as u32, false));
        }
        self.tx.add(ram, &buffers);
        let tx = self.tx.clone();
        self.kick(&tx);
        if self.device.stopped_reason().is_none() && self.rx.avail_idx != self.read {
            wait("taken", || {
                tx.used_idx(&self.machine.ram) == tx.avail_idx
                    || self.device.stopped_reason().is_some()
            });
        }
    }

    fn say(&mut self, (host, guest): (u32, u32), op: u16) {
        self.send(&vsock_header(guest, host, op, 0), &[]);
    }

    fn data(&mut self, (host, guest): (u32, u32), data: &[u8]) {
        self.send(&vsock_header(guest, host, DATA, data.len() as u32), data);
    }

    /// A connection that a program of the host asked for.
    fn connected(&mut self) -> (UnixStream, (u32, u32)) {
        let mut program = self.subject.program("CONNECT 7\n");
        let request = self.expect(REQUEST);
        let ports = request.ports();
        assert_eq!(ports.1, 7);
        self.say(ports, RESPONSE);
        assert_eq!(line(&mut program), format!("OK {}", ports.0));
        (program, ports)
    }
}

fn buffer(n: u16) -> u64 {
    0x40_0000 + u64::from(n % 64) * u64::from(BUFFER)
}

fn line(program: &mut UnixStream) -> String {
    let limit = Some(Duration::from_secs(120));
    program.set_read_timeout(limit).expect("time limit");
    let mut line = Vec::new();
    let mut byte = [0];
    while program.read(&mut byte).expect("a line") == 1 && byte != *b"\n" {
        line.push(byte[0]);
    }
    String::from_utf8(line).expect("text")
}

fn hung_up(program: &mut UnixStream) -> bool {
    let limit = Some(Duration::from_secs(120));
    program.set_read_timeout(limit).expect("time limit");
    let mut rest = Vec::new();
    match program.read_to_end(&mut rest) {
        Ok(_) => true,
        Err(e) => e.kind() == ErrorKind::ConnectionReset,
    }
}

#[test]
fn a_program_of_the_host_reaches_one_in_the_guest_and_back() {
    let mut rig = Rig::start();
    rig.give(32);
    let (mut program, ports) = rig.connected();
    program.write_all(b"question").expect("write");
    assert_eq!(rig.expect(DATA).data(), b"question");
    rig.data(ports, b"answer\n");
    assert_eq!(line(&mut program), "answer");
    // The host's program ends; the guest is told, and the port is free.
    drop(program);
    let end = rig.expect(SHUTDOWN);
    assert_eq!((end.ports(), end.u32(32)), (ports, 3));
    rig.data(ports, b"late");
    assert_eq!(rig.expect(RESET).ports(), ports);
}

#[test]
fn the_guest_reaches_a_program_that_waits_and_no_other() {
    let mut rig = Rig::start();
    rig.give(32);
    let mut program = rig.subject.program("LISTEN 99\n");
    rig.say((98, 5), REQUEST);
    assert_eq!(rig.expect(RESET).ports(), (98, 5));
    rig.say((99, 5), REQUEST);
    assert_eq!(rig.expect(RESPONSE).ports(), (99, 5));
    assert_eq!(line(&mut program), "OK 5");
    rig.data((99, 5), b"hello\n");
    assert_eq!(line(&mut program), "hello");
    // It waited for one connection.
    rig.say((99, 6), REQUEST);
    assert_eq!(rig.expect(RESET).ports(), (99, 6));
    // The guest ends it, and what it sent before still arrives.
    rig.data((99, 5), b"last\n");
    let mut end = vsock_header(5, 99, SHUTDOWN, 0);
    end[32] = 3;
    rig.send(&end, &[]);
    assert_eq!(rig.expect(RESET).ports(), (99, 5));
    assert_eq!(line(&mut program), "last");
    assert!(hung_up(&mut program));
}

#[test]
fn one_end_may_stop_sending_and_still_listen() {
    let mut rig = Rig::start();
    rig.give(32);
    let (mut program, ports) = rig.connected();
    program.write_all(b"all").expect("write");
    program.shutdown(std::net::Shutdown::Write).expect("shut");
    assert_eq!(rig.expect(DATA).data(), b"all");
    assert_eq!(rig.expect(SHUTDOWN).u32(32), 2);
    rig.data(ports, b"got it\n");
    assert_eq!(line(&mut program), "got it");
    let mut end = vsock_header(ports.1, ports.0, SHUTDOWN, 0);
    end[32] = 2;
    rig.send(&end, &[]);
    assert!(hung_up(&mut program));
    let packet = rig.expect(SHUTDOWN);
    assert!(
        packet.u32(32) & 1 == 1 || hung_up(&mut program),
        "{packet:?}"
    );
}

#[test]
fn the_guests_word_on_its_room_is_kept_to_and_it_is_asked_once() {
    let mut rig = Rig::start();
    rig.give(32);
    let mut program = rig.subject.program("CONNECT 7\n");
    let ports = rig.expect(REQUEST).ports();
    let with_room = |op, room: u32, took: u32| {
        let mut header = vsock_header(ports.1, ports.0, op, 0);
        header[36..40].copy_from_slice(&room.to_le_bytes());
        header[40..44].copy_from_slice(&took.to_le_bytes());
        header
    };
    rig.send(&with_room(RESPONSE, 10, 0), &[]);
    line(&mut program);
    program.write_all(&[7; 25]).expect("write");
    assert_eq!(rig.expect(DATA).data(), [7; 10]);
    rig.expect(CREDIT_REQUEST);
    assert!(!rig.has_news(), "asked once, and nothing is sent");
    // Linux answers at once, also that it has no more room than before.
    rig.send(&with_room(CREDIT_UPDATE, 10, 0), &[]);
    assert!(!rig.has_news(), "not asked again for that");
    rig.send(&with_room(CREDIT_UPDATE, 10, 4), &[]);
    assert_eq!(rig.expect(DATA).data(), [7; 4]);
    rig.expect(CREDIT_REQUEST);
    // It says that it took more than was sent, and that it has no end of room.
    rig.send(&with_room(CREDIT_UPDATE, 10, 4000), &[]);
    assert!(!rig.has_news() || rig.next().op() == CREDIT_REQUEST);
    rig.send(&with_room(CREDIT_UPDATE, u32::MAX, 14), &[]);
    let data = loop {
        let packet = rig.next();
        if packet.op() == DATA {
            break packet;
        }
    };
    assert_eq!(data.data(), [7; 11]);
    assert_eq!(rig.device.stopped_reason(), None);
}

#[test]
fn a_guest_that_sends_more_than_there_is_room_for_is_reset() {
    let mut rig = Rig::start();
    rig.give(48);
    let (mut program, ports) = rig.connected();
    // Nobody reads: first the socket fills, then our room.
    let chunk = vec![1; 32 << 10];
    let mut sent = 0;
    let packet = loop {
        rig.data(ports, &chunk);
        sent += chunk.len();
        assert!(sent < 16 << 20, "no end of room");
        if rig.has_news() {
            let packet = rig.next();
            if packet.op() != CREDIT_UPDATE {
                break packet;
            }
        }
    };
    assert_eq!((packet.op(), packet.ports()), (RESET, ports));
    let mut got = Vec::new();
    let _ = program.read_to_end(&mut got);
    assert!(got.len() <= sent && got.iter().all(|b| *b == 1));
    assert_eq!(rig.device.stopped_reason(), None, "the others go on");
    let (mut other, ports) = rig.connected();
    rig.data(ports, b"still here\n");
    assert_eq!(line(&mut other), "still here");
}

#[test]
fn room_is_told_again_as_the_host_takes_what_the_guest_sent() {
    let mut rig = Rig::start();
    rig.give(48);
    let (mut program, ports) = rig.connected();
    let chunk: Vec<u8> = (0..=255).cycle().take(24 << 10).collect();
    let (mut sent, mut taken) = (0u32, 0u32);
    for _ in 0..20 {
        // Only as much as there is room for.
        while sent.wrapping_sub(taken) as usize + chunk.len() > ROOM {
            rig.give(1);
            taken = rig.expect(CREDIT_UPDATE).u32(40);
        }
        rig.data(ports, &chunk);
        sent += chunk.len() as u32;
        let mut got = vec![0; chunk.len()];
        program.read_exact(&mut got).expect("all of it");
        assert!(got == chunk);
    }
}

#[test]
fn bad_lengths_stop_the_device() {
    type Change = fn(&mut Rig);
    let bad: [(&str, Change); 4] = [
        ("shorter than its header", |rig| {
            let header = vsock_header(1, 2, REQUEST, 0);
            rig.send(&header[..43], &[]);
        }),
        ("longer than it is", |rig| {
            rig.send(&vsock_header(1, 2, DATA, 4), &[0; 3]);
        }),
        ("longer than it is", |rig| {
            rig.send(&vsock_header(1, 2, DATA, u32::MAX), &[0; 3]);
        }),
        ("shorter than a packet's header", |rig| {
            let ram = rig.machine.ram.clone();
            rig.rx.add(&ram, &[(0x40_0000, 43, true)]);
            rig.say((2, 1), REQUEST);
        }),
    ];
    for (reason, change) in bad {
        let mut rig = Rig::start();
        change(&mut rig);
        wait(reason, || rig.device.stopped_reason().is_some());
        let said = rig.device.stopped_reason().expect("reason");
        assert!(said.contains(reason), "'{said}' says nothing of '{reason}'");
    }
}

#[test]
fn foreign_unknown_and_senseless_packets_harm_their_own_connection_alone() {
    let mut rig = Rig::start();
    rig.give(32);
    let (mut bystander, theirs) = rig.connected();
    // Another's address, either way: dropped without a word.
    for at in [0, 8] {
        let mut foreign = vsock_header(1, 2, REQUEST, 0);
        foreign[at] = 9;
        rig.send(&foreign, &[]);
    }
    rig.say((2, 1), RESET);
    assert!(!rig.has_news());
    // No operation, no kind, answers that nobody asked for.
    for op in [
        0,
        8,
        77,
        RESPONSE,
        SHUTDOWN,
        DATA,
        CREDIT_UPDATE,
        CREDIT_REQUEST,
    ] {
        rig.say((2, 1), op);
        assert_eq!(rig.expect(RESET).ports(), (2, 1), "operation {op}");
    }
    let mut other_kind = vsock_header(1, 2, REQUEST, 0);
    other_kind[28] = 2;
    rig.send(&other_kind, &[]);
    assert_eq!(rig.expect(RESET).ports(), (2, 1));
    for op in [REQUEST, RESPONSE, 0] {
        let (mut program, ports) = rig.connected();
        rig.say(ports, op);
        assert_eq!(rig.expect(RESET).ports(), ports);
        assert!(hung_up(&mut program));
        rig.give(4);
    }
    rig.data(theirs, b"untouched\n");
    assert_eq!(line(&mut bystander), "untouched");
}

#[test]
fn a_flood_without_receive_buffers_waits_and_is_answered_in_full() {
    let mut rig = Rig::start();
    let flood: u16 = 200;
    let mut answered = 0;
    let mut asked = 0;
    while answered < flood {
        while asked < flood && asked - answered < 150 && ring_has_room(&rig) {
            rig.say((2, u32::from(asked)), REQUEST);
            asked += 1;
        }
        std::thread::sleep(Duration::from_millis(5));
        // At most 64 answers are kept: the rest waits in the guest's ring.
        assert!(rig.tx.used_idx(rig.ram()) <= answered + 64);
        rig.give(16);
        for _ in 0..16.min(flood - answered) {
            assert_eq!(rig.expect(RESET).ports(), (2, u32::from(answered)));
            answered += 1;
        }
    }
    assert_eq!(rig.device.stopped_reason(), None);
}

fn ring_has_room(rig: &Rig) -> bool {
    let used = rig.tx.used_idx(rig.ram());
    rig.tx.avail_idx.wrapping_sub(used) < rig.tx.size
}

#[test]
fn connections_and_waiting_programs_are_bounded() {
    let mut rig = Rig::start();
    // Silent programs: the oldest make way.
    let silent: Vec<_> = (0..40).map(|_| rig.subject.program("CONN")).collect();
    rig.give(60);
    let mut programs: Vec<_> = (0..50).map(|_| rig.connected()).collect();
    rig.give(14);
    programs.extend((0..14).map(|_| rig.connected()));
    let mut refused = rig.subject.program("CONNECT 7\n");
    assert!(hung_up(&mut refused), "one too many");
    rig.give(2);
    rig.say((1024, 1), REQUEST);
    rig.expect(RESET);
    // One ends, another has its place.
    let (_, ports) = programs[0];
    rig.say(ports, RESET);
    assert!(hung_up(&mut programs[0].0));
    rig.connected();
    drop(silent);
}

#[test]
fn senseless_lines_are_hung_up_on() {
    let mut rig = Rig::start();
    rig.give(4);
    for line in [
        "GET / HTTP/1.1\r\n",
        "CONNECT\n",
        "CONNECT 4294967296\n",
        "\n",
    ] {
        let mut program = rig.subject.program(line);
        assert!(hung_up(&mut program), "{line:?}");
    }
    let mut endless = rig.subject.program(&"CONNECT ".repeat(1000));
    assert!(hung_up(&mut endless));
    rig.connected();
}

#[test]
fn a_resume_in_another_vmm_tells_the_driver_once_and_connections_start_anew() {
    let mut rig = Rig::start();
    rig.give(32);
    let (mut program, ports) = rig.connected();
    let event = 0x30_0000;
    let ram = rig.machine.ram.clone();
    ram.write_slice(&[0xff; 4], GuestAddress(event))
        .expect("write");
    rig.event.add(&ram, &[(event, 4, true)]);
    rig.kick(&rig.event.clone());
    // A pause in the same VMM keeps the connection.
    rig.device.pause().expect("pause");
    rig.device.resume();
    rig.data(ports, b"kept\n");
    assert_eq!(line(&mut program), "kept");
    assert_eq!(rig.event.used_idx(&ram), 0);

    let mut rig = rig.in_another_vmm();
    assert!(hung_up(&mut program), "the old VMM is gone");
    assert_eq!(rig.event.used_idx(&ram), 0, "nothing before the resume");
    rig.device.resume();
    rig.event.wait_used(&ram, 1);
    assert_eq!(rig.event.used_entry(&ram, 0).1, 4);
    assert_eq!(get(&ram, event, 4), [0; 4], "TRANSPORT_RESET");
    rig.event.add(&ram, &[(event, 4, true)]);
    rig.kick(&rig.event.clone());
    rig.data(ports, b"of old");
    assert_eq!(rig.expect(RESET).ports(), ports);
    // The guest may hold the old ones still, and would not answer for them.
    let (_program, anew) = rig.connected();
    assert_ne!(anew.0, ports.0);
    assert!(anew.0 >= 1 << 30);
    assert_eq!(rig.event.used_idx(&ram), 1, "told once");
}

#[test]
fn the_driver_learns_that_connections_are_gone_before_it_gets_a_new_one() {
    let mut rig = Rig::start();
    rig.give(4);
    let ram = rig.machine.ram.clone();
    rig.event.add(&ram, &[(0x30_0000, 4, true)]);
    rig.kick(&rig.event.clone());
    let mut rig = rig.in_another_vmm();
    let (rx, event, read) = (rig.rx.clone(), rig.event.clone(), rig.read);
    let early = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&early);
    let vectors = rig.machine.msix.0.lock().expect("vectors").clone();
    // The first vector is of the configuration, the second of received packets.
    *vectors[1].look.lock().expect("look") = Some(Box::new(move || {
        if rx.used_idx(&ram) != read && event.used_idx(&ram) == 0 {
            seen.store(true, Ordering::SeqCst);
        }
    }));
    let _waits = rig.subject.program("CONNECT 7\n");
    rig.device.resume();
    rig.expect(REQUEST);
    wait("the event", || rig.event.used_idx(rig.ram()) == 1);
    assert!(!early.load(Ordering::SeqCst), "the packet came first");
}

#[test]
fn a_driver_that_starts_anew_owes_and_is_owed_nothing() {
    let mut rig = Rig::start();
    rig.give(8);
    let (mut program, ports) = rig.connected();
    let Rig {
        subject,
        machine,
        device,
        ..
    } = rig;
    let mut rig = Rig::on(subject, machine, device);
    assert!(hung_up(&mut program), "the guest forgot it");
    rig.give(8);
    rig.data(ports, b"?");
    assert_eq!(rig.expect(RESET).ports(), ports);
    rig.connected();
}

/// Numbers in an order that only looks random (xorshift64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as u32
    }

    fn of<T: Copy>(&mut self, choice: &[T]) -> T {
        choice[self.next() as usize % choice.len()]
    }
}

#[test]
fn packets_at_random_harm_nobody_but_the_guest() {
    for seed in 1..=8u64 {
        let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15 ^ seed << 40);
        let mut rig = Rig::start();
        rig.give(60);
        let mut programs: Vec<_> = (0..4).map(|_| rig.connected()).collect();
        let mut ports: Vec<_> = programs.iter().map(|(_, ports)| *ports).collect();
        ports.extend([(1024, 1), (1024, 2), (0, 0), (u32::MAX, u32::MAX)]);
        for _ in 0..300 {
            let len = numbers.of(&[0u32, 0, 1, 1000, 60_000]);
            let (host, guest) = numbers.of(&ports);
            let op = (numbers.next() % 9) as u16;
            let mut header = vsock_header(guest, host, op, len);
            header[32] = (numbers.next() % 5) as u8;
            let edges = [0, 1, 1 << 16, 1 << 31, u32::MAX, numbers.next()];
            header[36..40].copy_from_slice(&numbers.of(&edges).to_le_bytes());
            header[40..44].copy_from_slice(&numbers.of(&edges).to_le_bytes());
            rig.send(&header, &vec![9; len as usize]);
            // Everything that the device says is read, and its room given back.
            while rig.rx.used_idx(rig.ram()) != rig.read {
                rig.next();
                rig.give(1);
            }
            let (program, _) = &mut programs[numbers.next() as usize % 4];
            let _ = program.set_nonblocking(true);
            let _ = program.write(&[1; 5000]);
            let _ = program.read(&mut [0; 20_000]);
        }
        // No rule of a queue was broken, and the worker lives.
        assert_eq!(rig.device.stopped_reason(), None, "seed {seed}");
        rig.device.pause().expect("pause");
        let state = rig.device.save().expect("save");
        assert_eq!(state.transport.stopped, None);
    }
}
