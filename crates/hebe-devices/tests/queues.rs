//! Several queues of one disk.

mod common;
mod subjects;

use std::sync::atomic::Ordering;

use common::{Driver, DriverQueue, Machine, encode, new_ram};
use hebe_devices::{BLOCK_QUEUES_MAX, VirtioPci};
use subjects::{BlockQueuesSubject, BlockSubject, F_MQ, Subject};

const SLOT: u8 = 3;
/// `num_queues` of the disk's configuration.
const NUM_QUEUES: u64 = 0x2000 + 34;

/// How often each of the device's vectors fired: that of the configuration, then
/// those of the queues.
fn fired(machine: &Machine) -> Vec<u32> {
    let vectors = machine.msix.0.lock().expect("vectors");
    let count = |v: &std::sync::Arc<common::FakeVector>| v.fired.load(Ordering::SeqCst);
    vectors.iter().map(count).collect()
}

#[test]
fn a_disk_offers_as_many_queues_as_it_has_and_no_more_than_there_may_be() {
    for (wanted, has) in [(0, 1), (1, 1), (2, 2), (8, 8), (9, BLOCK_QUEUES_MAX)] {
        let subject = BlockSubject::new();
        let machine = Machine::new(&new_ram());
        machine.add(SLOT, subject.with(wanted));
        let driver = Driver::new(&machine, SLOT);
        driver.enable();
        assert_eq!(usize::from(driver.queues()), has);
        let several = has > 1;
        assert_eq!(driver.features() & F_MQ != 0, several, "{wanted}");
        let told = driver.read(NUM_QUEUES, 2) as usize;
        assert_eq!(told, if several { has } else { 0 }, "{wanted}");
        assert_eq!(machine.msix.0.lock().expect("vectors").len(), has + 1);
    }
}

#[test]
fn each_queue_has_its_own_vector_and_takes_requests_for_itself() {
    let subject = BlockQueuesSubject::new();
    let machine = Machine::new(&new_ram());
    let _device = machine.add(SLOT, subject.kind());
    let driver = Driver::new(&machine, SLOT);
    let mut queues = driver.start(F_MQ);
    let mut wanted = fired(&machine);
    for (n, index) in [(0, 2), (1, 0), (2, 3), (3, 3), (4, 1)] {
        let queue: &mut DriverQueue = &mut queues[index];
        let buffers = subject.prepare(&machine.ram, n);
        queue.add(&machine.ram, &buffers);
        let done = queue.avail_idx;
        driver.kick(queue);
        queue.wait_used(&machine.ram, done);
        subject.check(&machine.ram, n + 1);
        wanted[index + 1] += 1;
        common::wait("its vector", || fired(&machine) == wanted);
    }
}

/// A driver with fewer processors than the disk has queues leaves some alone.
#[test]
fn queues_that_the_driver_leaves_alone_are_no_hindrance_over_a_suspend() {
    let subject = BlockQueuesSubject::new();
    let ram = new_ram();
    let machine = Machine::new(&ram);
    let device = machine.add(SLOT, subject.kind());
    let driver = Driver::new(&machine, SLOT);
    driver.enable();
    driver.negotiate(common::F_VERSION_1 | F_MQ);
    let mut queue = DriverQueue::at(SLOT, 1, 64);
    driver.set_queue(&queue);
    driver.set_status(15);
    let mut request = |machine: &Machine, n| {
        queue.add(&machine.ram, &subject.prepare(&machine.ram, n));
        Driver::new(machine, SLOT).kick(&queue);
        queue.wait_used(&machine.ram, queue.avail_idx);
        subject.check(&machine.ram, n + 1);
    };
    request(&machine, 0);
    device.pause().expect("pause");
    let state = device.save().expect("save");
    let enabled: Vec<bool> = state.transport.queues.iter().map(|q| q.enabled).collect();
    assert_eq!(enabled, [false, true, false, false]);
    drop((device, machine));
    let machine = Machine::new(&ram);
    let device = machine.restore(&state, subject.kind());
    assert_eq!(encode(&state), encode(&device.save().expect("again")));
    device.resume();
    request(&machine, 1);
    assert_eq!(device.stopped_reason(), None);
}

/// Nobody looks at the rings of a queue that comes after the driver is ready: in
/// a saved state they would refuse the resume.
#[test]
fn a_queue_that_comes_too_late_is_none_and_keeps_no_vm_from_its_resume() {
    let subject = BlockQueuesSubject::new();
    let ram = new_ram();
    let machine = Machine::new(&ram);
    let device = machine.add(SLOT, subject.kind());
    let driver = Driver::new(&machine, SLOT);
    driver.enable();
    driver.negotiate(common::F_VERSION_1 | F_MQ);
    driver.set_queue(&DriverQueue::at(SLOT, 1, 64));
    driver.set_status(15);
    driver.set_queue(&DriverQueue {
        desc: 0,
        ..DriverQueue::at(SLOT, 2, 64)
    });
    device.pause().expect("pause");
    let state = device.save().expect("save");
    let enabled: Vec<bool> = state.transport.queues.iter().map(|q| q.enabled).collect();
    assert_eq!(enabled, [false, true, false, false]);
    drop((device, machine));
    let machine = Machine::new(&ram);
    let device = machine.restore(&state, subject.kind());
    assert_eq!(device.stopped_reason(), None);
}

/// What a guest was offered it keeps until it boots again, whatever the
/// definition or the release says by now.
#[test]
fn a_restored_disk_has_the_queues_of_its_state() {
    for (before, now) in [(1, 4), (4, 1)] {
        let subject = BlockSubject::new();
        let ram = new_ram();
        let machine = Machine::new(&ram);
        let device = machine.add(SLOT, subject.with(before));
        let features = if before > 1 { F_MQ } else { 0 };
        let mut queues = Driver::new(&machine, SLOT).start(features);
        device.pause().expect("pause");
        let state = device.save().expect("save");
        assert_eq!(state.transport.queues.len(), before);
        drop((device, machine));
        let machine = Machine::new(&ram);
        let device = machine.restore(&state, subject.with(now));
        assert_eq!(encode(&state), encode(&device.save().expect("again")));
        device.resume();
        let driver = Driver::new(&machine, SLOT);
        assert_eq!(usize::from(driver.queues()), before);
        assert_eq!(driver.features() & F_MQ != 0, before > 1);
        let last = queues.last_mut().expect("a queue");
        last.add(&machine.ram, &subject.prepare(&machine.ram, 0));
        driver.kick(last);
        last.wait_used(&machine.ram, 1);
        subject.check(&machine.ram, 1);
        // A state of other interrupts than queues is none.
        device.pause().expect("pause");
        let mut bad = device.save().expect("save");
        bad.function.msix.entries.pop();
        drop((device, machine));
        let machine = Machine::new(&ram);
        assert!(VirtioPci::restore(&bad, subject.with(now), &machine.platform).is_err());
    }
}
