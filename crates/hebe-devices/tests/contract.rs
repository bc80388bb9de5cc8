//! What every device promises, checked for each kind by the same tests.

mod common;
mod subjects;

use std::sync::Arc;

use common::{
    Driver, DriverQueue, F_EVENT_IDX, F_INDIRECT, Machine, NEEDS_RESET, encode, new_ram, wait,
};
use hebe_devices::{DeviceKind, Ram, VirtioPci};
use subjects::{
    BalloonSubject, BlockQueuesSubject, BlockReadSubject, BlockSubject, ConsoleSubject, NetSubject,
    OffloadSubject, RngSubject, StreamSubject, Subject, VsockSubject,
};
use vm_memory::{Bytes, GuestAddress};

const SLOT: u8 = 3;
const RNG_SLOT: u8 = 9;

/// Both ways of suppressing notifications, and neither.
const FEATURES: [u64; 3] = [0, F_EVENT_IDX, F_EVENT_IDX | F_INDIRECT];

struct Rig<S> {
    subject: S,
    machine: Machine,
    device: Arc<VirtioPci>,
    /// Those that take requests, by turns.
    queues: Vec<DriverQueue>,
    issued: u32,
    handed_over: u32,
}

/// The queues that requests go into.
fn taking<S: Subject>(queues: &[DriverQueue]) -> Vec<DriverQueue> {
    let last = usize::from(S::QUEUE);
    queues[last + 1 - usize::from(S::TURNS)..=last].to_vec()
}

impl<S: Subject> Rig<S> {
    fn start(features: u64) -> Self {
        let subject = S::new();
        let machine = Machine::new(&new_ram());
        let device = machine.add(SLOT, subject.kind());
        let queues = Driver::new(&machine, SLOT).start(features | S::EXTRA);
        Self {
            subject,
            machine,
            device,
            queues: taking::<S>(&queues),
            issued: 0,
            handed_over: 0,
        }
    }

    fn ram(&self) -> &Ram {
        &self.machine.ram
    }

    /// Puts requests into the ring, without a kick.
    fn issue(&mut self, count: u32) {
        for _ in 0..count {
            let buffers = self.subject.prepare(&self.machine.ram, self.issued);
            let turn = self.issued as usize % self.queues.len();
            self.queues[turn].add(&self.machine.ram, &buffers);
            self.issued += 1;
        }
    }

    fn kick(&self) {
        let driver = Driver::new(&self.machine, SLOT);
        self.queues.iter().for_each(|queue| driver.kick(queue));
    }

    /// Every request is done, once, with the right content.
    fn check_all(&self) {
        for queue in &self.queues {
            queue.wait_used(self.ram(), queue.avail_idx);
        }
        self.subject.check(self.ram(), self.issued);
        let used = self
            .queues
            .iter()
            .map(|q| u32::from(q.used_idx(self.ram())));
        assert_eq!(used.sum::<u32>(), self.issued);
        assert_eq!(self.device.stopped_reason(), None);
    }

    /// Another VMM takes over: same RAM, same driver, new everything else.
    fn hand_over(self) -> Self {
        // Every second time asked first, as one of many devices.
        if self.handed_over % 2 == 1 {
            self.device.ask_to_pause();
        }
        self.device.pause().expect("pause");
        let state = self.device.save().expect("save");
        let ram = self.machine.ram.clone();
        drop(self.device);
        drop(self.machine);
        let machine = Machine::new(&ram);
        let device = machine.restore(&state, self.subject.kind());
        let again = device.save().expect("save again");
        assert_eq!(encode(&state), encode(&again), "save, restore, save");
        Self {
            machine,
            device,
            handed_over: self.handed_over + 1,
            ..self
        }
    }
}

fn pausing_twice_is_pausing_once<S: Subject>() {
    let mut rig = Rig::<S>::start(0);
    rig.issue(3);
    rig.kick();
    rig.check_all();
    rig.device.pause().expect("pause");
    let first = rig.device.save().expect("save");
    rig.device.pause().expect("pause again");
    assert_eq!(encode(&first), encode(&rig.device.save().expect("save")));
    rig.device.resume();
    assert!(rig.device.save().is_err(), "a running device is not saved");
    rig.issue(3);
    rig.kick();
    rig.check_all();
}

/// Where another device could not be paused, or was slower.
fn who_is_asked_to_pause_is_paused_or_goes_on<S: Subject>() {
    let mut rig = Rig::<S>::start(0);
    for is_paused in [false, true, false] {
        rig.issue(3);
        rig.kick();
        rig.device.ask_to_pause();
        if is_paused {
            rig.device.pause().expect("pause");
            rig.device.save().expect("it is paused");
        }
        rig.device.resume();
        rig.check_all();
    }
}

fn a_device_that_was_never_started_is_saved_too<S: Subject>() {
    let subject = S::new();
    let ram = new_ram();
    let machine = Machine::new(&ram);
    let device = machine.add(SLOT, subject.kind());
    device.pause().expect("pause");
    let state = device.save().expect("save");
    drop((device, machine));
    let machine = Machine::new(&ram);
    let device = machine.restore(&state, subject.kind());
    assert_eq!(encode(&state), encode(&device.save().expect("save")));
    device.resume();
    let queues = Driver::new(&machine, SLOT).start(S::EXTRA);
    let mut rig = Rig {
        subject,
        machine,
        device,
        queues: taking::<S>(&queues),
        issued: 0,
        handed_over: 0,
    };
    rig.issue(2);
    rig.kick();
    rig.check_all();
}

fn a_restored_device_is_the_saved_one_and_not_the_changed_one<S: Subject>() {
    let mut rig = Rig::<S>::start(0);
    rig.issue(2);
    rig.kick();
    rig.check_all();
    rig.device.pause().expect("pause");
    let saved = rig.device.save().expect("save");
    rig.device.resume();
    let driver = Driver::new(&rig.machine, SLOT);
    driver.set_status(0);
    rig.machine.config_write(SLOT, 0x10, 0xd100_0000);
    rig.device.pause().expect("pause");
    assert_ne!(saved, rig.device.save().expect("save the changed one"));
    drop((rig.device, rig.machine));
    let machine = Machine::new(&new_ram());
    let device = machine.restore(&saved, rig.subject.kind());
    assert_eq!(saved, device.save().expect("save"));
}

fn requests_around_a_pause_are_done_exactly_once<S: Subject>() {
    for features in FEATURES {
        let mut rig = Rig::<S>::start(features);
        for round in 0..8 {
            rig.issue(4);
            rig.kick();
            // No waiting: the pause comes at another point each time.
            std::thread::sleep(std::time::Duration::from_micros(40 * round));
            rig = rig.hand_over();
            rig.device.resume();
            rig.check_all();
        }
    }
}

fn kicks_and_interrupts_lost_with_the_old_vmm_are_made_good<S: Subject>() {
    for features in FEATURES {
        let mut rig = Rig::<S>::start(features);
        rig.issue(2);
        rig.kick();
        rig.check_all();
        // These are in the ring, and nobody ever rings for them.
        rig.issue(3);
        let mut rig = rig.hand_over();
        assert_eq!(rig.machine.fired(), 0, "nothing fires before resume");
        rig.device.resume();
        let queues = u32::from(Driver::new(&rig.machine, SLOT).queues());
        rig.check_all();
        assert!(rig.machine.fired() >= queues, "an interrupt per queue");
        rig.issue(3);
        rig.kick();
        rig.check_all();
    }
}

fn a_paused_device_touches_no_guest_ram<S: Subject>() {
    let mut rig = Rig::<S>::start(0);
    rig.issue(2);
    rig.kick();
    rig.check_all();
    let (ring, data) = rig.device.meter();
    assert!(ring > 0 && data > 0, "the meter counts");
    rig.device.pause().expect("pause");
    rig.issue(2);
    let meter = rig.device.meter();
    let before = contents(rig.ram());
    rig.kick();
    std::thread::sleep(std::time::Duration::from_millis(20));
    rig.device.save().expect("save");
    assert!(contents(rig.ram()) == before, "RAM changed while paused");
    assert_eq!(rig.device.meter(), meter);
    rig.device.resume();
    rig.check_all();
}

fn contents(ram: &Ram) -> Vec<u8> {
    let mut bytes = vec![0; common::RAM_LEN];
    ram.read_slice(&mut bytes, GuestAddress(0)).expect("read");
    bytes
}

/// Breaks one rule of the ring.
type Attack = fn(&mut DriverQueue, &Ram);

const OUTSIDE: u64 = common::RAM_LEN as u64;

const ATTACKS: [(&str, Attack); 11] = [
    ("loops", |q, ram| {
        q.write_desc(ram, 0, (0x20_0000, 16), 1, 1);
        q.write_desc(ram, 1, (0x20_0000, 16), 1, 0);
        q.publish(ram, 0);
    }),
    ("not guest RAM", |q, ram| {
        q.add(ram, &[(OUTSIDE - 8, 16, false)]);
    }),
    ("not guest RAM", |q, ram| {
        q.add(ram, &[(u64::MAX - 3, 16, true)]);
    }),
    ("not guest RAM", |q, ram| {
        q.add(ram, &[(0x20_0000, u32::MAX, true)]);
    }),
    ("length 0", |q, ram| {
        q.add(ram, &[(0x20_0000, 0, true)]);
    }),
    ("readable segment after a writable", |q, ram| {
        q.add(ram, &[(0x20_0000, 16, true), (0x20_0000, 16, false)]);
    }),
    ("names descriptor", |q, ram| q.publish(ram, 64)),
    ("names descriptor", |q, ram| {
        q.write_desc(ram, 0, (0x20_0000, 16), 1, 0xffff);
        q.publish(ram, 0);
    }),
    ("jumped", |q, ram| {
        q.avail_idx = q.avail_idx.wrapping_add(1000);
        q.publish(ram, 0);
    }),
    ("in an indirect table", |q, ram| {
        common::put_desc(ram, 0x20_0000, (0x20_0000, 16), 4, 0);
        q.write_desc(ram, 0, (0x20_0000, 16), 4, 0);
        q.publish(ram, 0);
    }),
    ("more than 256 segments", |q, ram| {
        for i in 0..300u64 {
            let next = (i + 1) as u16;
            common::put_desc(ram, 0x20_0000 + 16 * i, (0x30_0000, 1), 1, next);
        }
        q.write_desc(ram, 0, (0x20_0000, 16 * 300), 4, 0);
        q.publish(ram, 0);
    }),
];

fn a_hostile_ring_stops_this_device_and_no_other<S: Subject>() {
    let mut rig = Rig::<S>::start(0);
    rig.machine.add(RNG_SLOT, DeviceKind::Rng);
    let other = Driver::new(&rig.machine, RNG_SLOT).start(0);
    let mut others = Rig {
        subject: RngSubject::new(),
        queues: taking::<RngSubject>(&other),
        issued: 0,
        handed_over: 0,
        device: Arc::clone(&rig.device),
        machine: rig.machine,
    };
    for (reason, attack) in ATTACKS {
        let driver = Driver::new(&others.machine, SLOT);
        let queues = driver.start(F_INDIRECT);
        let mut queue = queues[usize::from(S::QUEUE)].clone();
        let used = queue.used_idx(&others.machine.ram);
        attack(&mut queue, &others.machine.ram);
        driver.kick(&queue);
        wait(reason, || rig.device.stopped_reason().is_some());
        let said = rig.device.stopped_reason().expect("reason");
        assert!(said.contains(reason), "'{said}' says nothing of '{reason}'");
        assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET);
        assert_eq!(queue.used_idx(&others.machine.ram), used);
        // Stays stopped over a suspend, and the reason with it.
        rig.device.pause().expect("pause");
        let state = rig.device.save().expect("save");
        assert_eq!(state.transport.stopped.as_deref(), Some(&*said));
        rig.device.resume();
        others.issue(1);
        let queue = &others.queues[0];
        Driver::new(&others.machine, RNG_SLOT).kick(queue);
        queue.wait_used(&others.machine.ram, others.issued as u16);
    }
    let logged = others.machine.log.0.lock().expect("log").clone();
    assert!(logged.iter().all(|(slot, _)| *slot == SLOT));
    assert!(logged.iter().any(|(_, text)| text.contains("stopped")));
    // A reset makes it good as new.
    let driver = Driver::new(&others.machine, SLOT);
    rig.queues = taking::<S>(&driver.start(S::EXTRA));
    assert_eq!(rig.device.stopped_reason(), None);
    rig.machine = others.machine;
    rig.issue(3);
    rig.kick();
    rig.check_all();
}

fn queues_in_bad_places_stop_this_device<S: Subject>() {
    let rig = Rig::<S>::start(0);
    let driver = Driver::new(&rig.machine, SLOT);
    type Change = fn(&mut DriverQueue);
    let bad: [(&str, Change); 7] = [
        ("queue size 63", |q| q.size = 63),
        ("queue size 0", |q| q.size = 0),
        ("queue size 512", |q| q.size = 512),
        ("descriptor table", |q| q.desc += 8),
        ("available ring", |q| q.avail = 0),
        ("used ring", |q| q.used = OUTSIDE - 64),
        ("descriptor table", |q| q.desc = u64::MAX - 15),
    ];
    for (reason, change) in bad {
        driver.negotiate(common::F_VERSION_1);
        let mut queue = DriverQueue::at(SLOT, S::QUEUE, 64);
        change(&mut queue);
        driver.set_queue(&queue);
        driver.set_status(15);
        let said = rig.device.stopped_reason().expect("stopped");
        assert!(said.contains(reason), "'{said}' says nothing of '{reason}'");
        assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET);
        driver.set_status(0);
        assert_eq!(rig.device.stopped_reason(), None);
    }
}

macro_rules! device_contract {
    ($($name:ident: $subject:ty;)*) => {$(
        mod $name {
            use super::*;

            #[test]
            fn pausing_twice_is_pausing_once() {
                super::pausing_twice_is_pausing_once::<$subject>();
            }

            #[test]
            fn who_is_asked_to_pause_is_paused_or_goes_on() {
                super::who_is_asked_to_pause_is_paused_or_goes_on::<$subject>();
            }

            #[test]
            fn a_device_that_was_never_started_is_saved_too() {
                super::a_device_that_was_never_started_is_saved_too::<$subject>();
            }

            #[test]
            fn a_restored_device_is_the_saved_one_and_not_the_changed_one() {
                super::a_restored_device_is_the_saved_one_and_not_the_changed_one::<$subject>();
            }

            #[test]
            fn requests_around_a_pause_are_done_exactly_once() {
                super::requests_around_a_pause_are_done_exactly_once::<$subject>();
            }

            #[test]
            fn kicks_and_interrupts_lost_with_the_old_vmm_are_made_good() {
                super::kicks_and_interrupts_lost_with_the_old_vmm_are_made_good::<$subject>();
            }

            #[test]
            fn a_paused_device_touches_no_guest_ram() {
                super::a_paused_device_touches_no_guest_ram::<$subject>();
            }

            #[test]
            fn a_hostile_ring_stops_this_device_and_no_other() {
                super::a_hostile_ring_stops_this_device_and_no_other::<$subject>();
            }

            #[test]
            fn queues_in_bad_places_stop_this_device() {
                super::queues_in_bad_places_stop_this_device::<$subject>();
            }
        }
    )*};
}

device_contract! {
    block: BlockSubject;
    block_with_queues: BlockQueuesSubject;
    block_with_reads_under_way: BlockReadSubject;
    net: NetSubject;
    net_with_offloads: OffloadSubject;
    net_on_a_stream: StreamSubject;
    console: ConsoleSubject;
    rng: RngSubject;
    vsock: VsockSubject;
    balloon: BalloonSubject;
}
