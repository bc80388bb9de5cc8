//! The balloon: what is given back, what is not, and what the guest is told.

mod common;
mod subjects;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use common::{Driver, DriverQueue, Machine, RAM_LEN, encode, new_ram, wait};
use hebe_devices::VirtioPci;
use subjects::{BalloonSubject, Taker, get};
use vm_memory::{Bytes, GuestAddress};

const SLOT: u8 = 3;
const STATS: u64 = 1 << 1;
const ON_OOM: u64 = 1 << 2;
const POISON: u64 = 1 << 4;
const REPORTING: u64 = 1 << 5;
const DEVICE: u64 = 0x2000;
const MIB: u64 = 1 << 20;

struct Rig {
    machine: Machine,
    device: Arc<VirtioPci>,
    taker: Arc<Taker>,
    queues: Vec<DriverQueue>,
    done: Vec<u16>,
}

impl Rig {
    fn start(features: u64) -> Self {
        let taker = Arc::<Taker>::default();
        let machine = Machine::new(&new_ram());
        let device = machine.add(SLOT, BalloonSubject::with(true, true, &taker));
        let queues = Driver::new(&machine, SLOT).start(features);
        Self {
            machine,
            device,
            taker,
            done: vec![0; queues.len()],
            queues,
        }
    }

    fn driver(&self) -> Driver<'_> {
        Driver::new(&self.machine, SLOT)
    }

    /// A request, and its end.
    fn request(&mut self, queue: usize, buffers: &[(u64, u32, bool)]) {
        self.queues[queue].add(&self.machine.ram, buffers);
        self.driver().kick(&self.queues[queue]);
        self.done[queue] += 1;
        self.queues[queue].wait_used(&self.machine.ram, self.done[queue]);
    }

    fn pages(&mut self, queue: usize, pages: &[u32]) -> (u64, u32, bool) {
        let bytes: Vec<u8> = pages.iter().flat_map(|p| p.to_le_bytes()).collect();
        let at = 0x40_0000 + queue as u64 * 0x1_0000;
        let ram = &self.machine.ram;
        ram.write_slice(&bytes, GuestAddress(at)).expect("write");
        (at, bytes.len() as u32, false)
    }

    fn figures(&self) -> hebe_devices::BalloonFigures {
        self.device.balloon().expect("a balloon")
    }
}

#[test]
fn what_the_guest_reports_is_given_back_through_whichever_queue_it_uses() {
    // Linux before and after it counted as the standard does; and a driver
    // without statistics.
    for (features, queue) in [
        // As Linux counts without hints, and as the standard does.
        (STATS | REPORTING, 3),
        (STATS | REPORTING, 4),
        // Without statistics, too: as Linux counts, and as the standard does.
        (REPORTING, 2),
        (REPORTING, 4),
    ] {
        let mut rig = Rig::start(features);
        let ranges = [
            (8 * MIB, 2 * MIB as u32, true),
            (12 * MIB, 4 * MIB as u32, true),
        ];
        rig.request(queue, &ranges);
        let taken = [(8 * MIB, 2 * MIB), (12 * MIB, 4 * MIB)];
        assert_eq!(rig.taker.ranges(), taken);
        assert_eq!(rig.figures().reported, 6 * MIB);
        assert!(rig.figures().reporting);
        assert_eq!(rig.device.stopped_reason(), None);
    }
}

#[test]
fn a_guest_that_fills_free_pages_keeps_what_it_reports() {
    for (poison, given) in [(0u32, 2 * MIB), (0xaaaa_aaaa, 0), (1 << 24, 0)] {
        let mut rig = Rig::start(STATS | REPORTING | POISON);
        rig.driver().write(DEVICE + 12, u64::from(poison), 4);
        rig.request(3, &[(8 * MIB, 2 * MIB as u32, true)]);
        let figures = rig.figures();
        assert_eq!((figures.reported, figures.kept), (given, 2 * MIB - given));
        assert_eq!(rig.taker.ranges().is_empty(), given == 0);
        // What its driver takes out of the balloon it fills itself.
        let pages = rig.pages(0, &[0x900]);
        rig.request(0, &[pages]);
        assert_eq!(rig.figures().inflated, 4096);
    }
    // Not accepted, it means nothing.
    let mut rig = Rig::start(STATS | REPORTING);
    rig.driver().write(DEVICE + 12, 0xaa, 4);
    rig.request(3, &[(8 * MIB, 2 * MIB as u32, true)]);
    assert_eq!(rig.figures().reported, 2 * MIB);
}

#[test]
fn memory_that_cannot_be_given_back_now_stays_and_the_guest_hears_nothing_of_it() {
    let mut rig = Rig::start(STATS | REPORTING);
    rig.taker.refuses.store(true, Ordering::SeqCst);
    let pages = rig.pages(0, &[0x900, 0x901]);
    rig.request(0, &[pages]);
    rig.request(3, &[(8 * MIB, 2 * MIB as u32, true)]);
    let figures = rig.figures();
    assert_eq!((figures.inflated, figures.reported), (0, 0));
    assert_eq!(figures.kept, 2 * MIB + 8192);
    assert_eq!(rig.device.stopped_reason(), None);
    rig.taker.refuses.store(false, Ordering::SeqCst);
    let pages = rig.pages(0, &[0x910]);
    rig.request(0, &[pages]);
    assert_eq!(rig.figures().inflated, 4096);
}

#[test]
fn pages_that_are_not_ram_and_requests_without_end_stop_the_device() {
    let ram_pages = (RAM_LEN / 4096) as u32;
    let bad: [(&str, Vec<u32>); 4] = [
        ("not one of guest RAM", vec![0x900, ram_pages]),
        ("not one of guest RAM", vec![u32::MAX]),
        ("not one of guest RAM", vec![ram_pages - 1, ram_pages]),
        ("more than 4096", vec![0x900; 4097]),
    ];
    for (reason, numbers) in bad {
        for queue in [0, 1] {
            let mut rig = Rig::start(STATS | REPORTING);
            let pages = rig.pages(queue, &numbers);
            let ram = rig.machine.ram.clone();
            rig.queues[queue].add(&ram, &[pages]);
            rig.driver().kick(&rig.queues[queue]);
            wait(reason, || rig.device.stopped_reason().is_some());
            let said = rig.device.stopped_reason().expect("reason");
            assert!(said.contains(reason), "{said}");
            let beyond = |(at, len): &(u64, u64)| at + len > RAM_LEN as u64;
            assert!(!rig.taker.ranges().iter().any(beyond));
        }
    }
    for (queue, buffer, reason) in [
        (0, (0x40_0000, 6, false), "not whole page numbers"),
        (0, (0x40_0000, 4, true), "writable segment"),
        (3, (0x40_0000, 4096, false), "readable segment"),
    ] {
        let mut rig = Rig::start(STATS | REPORTING);
        let ram = rig.machine.ram.clone();
        rig.queues[queue].add(&ram, &[buffer]);
        rig.driver().kick(&rig.queues[queue]);
        wait(reason, || rig.device.stopped_reason().is_some());
        let said = rig.device.stopped_reason().expect("reason");
        assert!(said.contains(reason), "{said}");
        assert_eq!(rig.taker.ranges(), []);
    }
}

#[test]
fn a_queue_that_nothing_was_negotiated_for_takes_nothing() {
    let mut rig = Rig::start(0);
    let ram = rig.machine.ram.clone();
    rig.queues[3].add(&ram, &[(8 * MIB, 2 * MIB as u32, true)]);
    rig.driver().kick(&rig.queues[3]);
    wait("stopped", || rig.device.stopped_reason().is_some());
    assert_eq!(rig.taker.ranges(), []);
    assert!(!rig.figures().reporting);
}

#[test]
fn the_target_reaches_the_guest_and_its_word_comes_back() {
    let rig = Rig::start(STATS | ON_OOM);
    let before = rig.machine.fired();
    rig.device.set_balloon(1024);
    assert!(rig.machine.fired() > before, "the driver is told");
    let driver = rig.driver();
    assert_eq!(driver.read(DEVICE, 4), 1024);
    driver.write(DEVICE + 4, 1000, 4);
    // What the host wants is not the guest's to write.
    driver.write(DEVICE, 5, 4);
    assert_eq!(driver.read(DEVICE, 8), 1024 | 1000 << 32);
    let figures = rig.figures();
    assert_eq!((figures.wanted_pages, figures.actual_pages), (1024, 1000));
    rig.device.set_balloon(u32::MAX);
    assert_eq!(rig.figures().wanted_pages, (RAM_LEN / 4096) as u32);
    // A write at the end of the configuration, and beyond it.
    driver.write(DEVICE + 14, u64::MAX, 8);
    driver.write(DEVICE + 0xff8, u64::MAX, 8);
    assert_eq!(driver.read(DEVICE + 12, 4), 0xffff_0000);
    // A driver that begins anew has nothing in its balloon.
    driver.set_status(0);
    let figures = rig.figures();
    assert_eq!(figures.wanted_pages, (RAM_LEN / 4096) as u32);
    assert_eq!(figures.actual_pages, 0);
}

#[test]
fn what_the_balloon_holds_is_known_after_a_resume() {
    let rig = Rig::start(STATS | REPORTING | POISON);
    rig.device.set_balloon(64);
    rig.driver().write(DEVICE + 4, 60, 4);
    rig.driver().write(DEVICE + 12, 0xaa, 4);
    rig.device.pause().expect("pause");
    let state = rig.device.save().expect("save");
    let machine = Machine::new(&rig.machine.ram);
    let kind = BalloonSubject::with(true, true, &rig.taker);
    let device = machine.restore(&state, kind);
    assert_eq!(
        encode(&state),
        encode(&device.save().expect("save")),
        "save, restore, save"
    );
    device.resume();
    let mut again = Rig {
        machine,
        device,
        ..rig
    };
    let figures = again.figures();
    assert_eq!((figures.wanted_pages, figures.actual_pages), (64, 60));
    // The poison is known, too.
    again.request(3, &[(8 * MIB, 2 * MIB as u32, true)]);
    assert_eq!(again.figures().reported, 0);
}

#[test]
fn a_definition_that_allows_less_is_not_resumed_with_what_the_guest_uses() {
    let rig = Rig::start(STATS | REPORTING | ON_OOM);
    rig.device.pause().expect("pause");
    let state = rig.device.save().expect("save");
    for (on_oom, reporting) in [(false, true), (true, false)] {
        let machine = Machine::new(&rig.machine.ram);
        let kind = BalloonSubject::with(on_oom, reporting, &rig.taker);
        let refused = VirtioPci::restore(&state, kind, &machine.platform);
        assert!(
            refused
                .err()
                .is_some_and(|e| e.to_string().contains("features"))
        );
    }
}

/// Puts statistics into the driver's buffer: numbers and values.
fn put_statistics(rig: &Rig, values: &[(u16, u64)]) -> (u64, u32, bool) {
    let at = 0x50_0000;
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()[..]].concat())
        .collect();
    let ram = &rig.machine.ram;
    ram.write_slice(&bytes, GuestAddress(at)).expect("write");
    (at, bytes.len() as u32, false)
}

#[test]
fn statistics_come_when_they_are_asked_for_and_after_a_resume() {
    for features in [STATS, STATS | common::F_EVENT_IDX] {
        let mut rig = Rig::start(features);
        let ram = rig.machine.ram.clone();
        let first = put_statistics(&rig, &[(4, 11), (5, 22), (99, 1), (6, u64::MAX)]);
        rig.queues[2].add(&ram, &[first]);
        rig.driver().kick(&rig.queues[2]);
        wait("the first", || rig.figures().answers == 1);
        assert_eq!(rig.queues[2].used_idx(&ram), 0, "the buffer is held");
        let statistics = rig.figures().statistics;
        assert_eq!(statistics[4..7], [Some(11), Some(22), None]);
        for round in 1..4u16 {
            rig.device.ask_statistics();
            rig.queues[2].wait_used(&ram, round);
            let next = put_statistics(&rig, &[(4, u64::from(round) * 1000)]);
            rig.queues[2].add(&ram, &[next]);
            rig.driver().kick(&rig.queues[2]);
            let wanted = Some(u64::from(round) * 1000);
            wait("the next", || rig.figures().statistics[4] == wanted);
        }
        rig.device.pause().expect("pause");
        let state = rig.device.save().expect("save");
        let machine = Machine::new(&ram);
        let device = machine.restore(&state, BalloonSubject::with(true, true, &rig.taker));
        device.resume();
        wait("read again", || {
            device
                .balloon()
                .is_some_and(|b| b.statistics[4] == Some(3000))
        });
        device.ask_statistics();
        rig.queues[2].wait_used(&ram, 4);
        assert_eq!(device.stopped_reason(), None);
        assert_eq!(get(&ram, 0x50_0000, 1), [4], "only read");
    }
}

#[test]
fn statistics_that_nobody_gives_are_asked_for_in_vain() {
    let rig = Rig::start(0);
    rig.device.ask_statistics();
    assert_eq!(rig.figures().answers, 0);
    // And what was asked for before there is a buffer is not forgotten.
    let mut rig = Rig::start(STATS);
    rig.device.ask_statistics();
    let ram = rig.machine.ram.clone();
    let buffer = put_statistics(&rig, &[(5, 7)]);
    rig.queues[2].add(&ram, &[buffer]);
    rig.driver().kick(&rig.queues[2]);
    wait("given", || rig.figures().statistics[5] == Some(7));
    assert_eq!(rig.device.stopped_reason(), None);
}
