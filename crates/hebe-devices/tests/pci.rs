//! The bus: enumeration, BARs that move, MSI-X, and a guest that writes at
//! random.

mod common;
mod subjects;

use std::sync::atomic::Ordering;

use common::{Driver, Machine, bar_of, encode, new_ram, wait};
use hebe_block::DiskChange;
use hebe_devices::{BAR_SIZE, DeviceError, DeviceKind, PciRoot, VirtioPci};
use proptest::prelude::*;
use subjects::{BlockSubject, NetSubject, Subject};
use vm_memory::{Bytes, GuestAddress};

const SLOT: u8 = 4;
const COMMAND: u8 = 0x04;
const BAR0: u8 = 0x10;
const MSIX: u8 = 0x40;
const WINDOW: u8 = 0xa0;

fn rng_machine() -> Machine {
    let machine = Machine::new(&new_ram());
    machine.add(SLOT, DeviceKind::Rng);
    machine
}

#[test]
fn the_bus_shows_the_bridge_the_device_and_nothing_else() {
    let machine = rng_machine();
    for slot in 0..32 {
        let id = machine.config_read(slot, 0);
        match slot {
            0 => {
                assert_ne!(id, u32::MAX);
                assert_eq!(machine.config_read(0, 8) >> 8, 0x06_00_00);
            }
            SLOT => assert_eq!(id, 0x1044_1af4),
            _ => assert_eq!(id, u32::MAX),
        }
    }
    // Another bus, another function, the latch without its enable bit.
    for address in [
        1 << 31 | 1 << 16 | 4 << 11,
        1 << 31 | 4 << 11 | 1 << 8,
        4 << 11,
    ] {
        machine.root.pio_write(0xcf8, &u32::to_le_bytes(address));
        let mut data = [0; 4];
        machine.root.pio_read(0xcfc, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
    // No INTx.
    assert_eq!(machine.config_read(SLOT, 0x3c) >> 8 & 0xff, 0);
}

#[test]
fn the_latch_is_saved_and_restored() {
    let machine = rng_machine();
    machine.config_read(SLOT, 0x10);
    machine.config_write(0, COMMAND, 2);
    machine.config_read(SLOT, 0x34);
    let state = machine.root.save();
    assert_eq!(PciRoot::restore(&state).save(), state);
    assert_eq!(state.address, 1 << 31 | u32::from(SLOT) << 11 | 0x34);
    // A byte at 0xcf9 is the chipset's reset register, not the latch.
    machine.root.pio_write(0xcf9, &[6]);
    assert_eq!(machine.root.save(), state);
}

#[test]
fn slots_and_bars_that_cannot_be_are_refused() {
    let machine = rng_machine();
    let new = |slot, bar| VirtioPci::new(slot, bar, DeviceKind::Rng, &machine.platform);
    for slot in [0, 32, 255] {
        assert!(matches!(new(slot, bar_of(1)), Err(DeviceError::Slot(_))));
    }
    for bar in [0, 0x1000, bar_of(1) + 0x1000, 0xfec0_0000, u64::MAX] {
        assert!(matches!(new(5, bar), Err(DeviceError::Bar(_))));
    }
    let second = new(SLOT, bar_of(5)).expect("device");
    assert!(matches!(
        machine.root.add(second),
        Err(DeviceError::SlotTaken(SLOT))
    ));
}

#[test]
fn a_bar_is_sized_and_moved_and_its_doorbells_go_with_it() {
    let machine = rng_machine();
    let bells = || -> Vec<u64> {
        let bells = machine.doorbells.0.lock().expect("doorbells");
        bells.keys().copied().collect()
    };
    let here = bar_of(SLOT);
    assert!(
        !machine.root.mmio_read(here, &mut [0; 4]),
        "decoding is off"
    );
    assert!(bells().is_empty());
    machine.config_write(SLOT, BAR0, u32::MAX);
    assert_eq!(machine.config_read(SLOT, BAR0), !(BAR_SIZE as u32 - 1));
    machine.config_write(SLOT, BAR0, here as u32);
    machine.config_write(SLOT, COMMAND, 2);
    assert!(machine.root.mmio_read(here, &mut [0; 4]));
    assert!(!machine.root.mmio_read(here + BAR_SIZE, &mut [0; 4]));
    assert!(!machine.root.mmio_read(here - 1, &mut [0; 4]));
    assert_eq!(bells(), [here + 0x3000]);
    let there = 0xe000_0000;
    machine.config_write(SLOT, BAR0, there);
    assert!(!machine.root.mmio_read(here, &mut [0; 4]));
    assert!(machine.root.mmio_read(u64::from(there), &mut [0; 4]));
    assert_eq!(bells(), [u64::from(there) + 0x3000]);
    // Into guest RAM, and over the interrupt controllers: it answers nowhere.
    for elsewhere in [0, 0x10_0000, 0xfec0_0000, 0xfee0_0000] {
        machine.config_write(SLOT, BAR0, elsewhere);
        assert!(!machine.root.mmio_read(u64::from(elsewhere), &mut [0; 4]));
        assert!(bells().is_empty());
    }
}

#[test]
fn two_bars_in_one_place_harm_nobody() {
    let machine = rng_machine();
    machine.add(SLOT + 1, DeviceKind::Rng);
    let first = Driver::new(&machine, SLOT);
    let queue = first.start(0)[0].clone();
    Driver::new(&machine, SLOT + 1).start(0);
    machine.config_write(SLOT + 1, BAR0, first.bar as u32);
    assert_eq!(first.status(), 15, "the lower slot answers");
    // Apart again, both work.
    machine.config_write(SLOT + 1, BAR0, bar_of(SLOT + 1) as u32);
    for slot in [SLOT, SLOT + 1] {
        assert_eq!(Driver::new(&machine, slot).status(), 15);
    }
    let mut queue = queue;
    queue.add(&machine.ram, &[(0x40_0000, 16, true)]);
    first.kick(&queue);
    queue.wait_used(&machine.ram, 1);
}

#[test]
fn the_bar_can_be_reached_through_configuration_space() {
    let machine = rng_machine();
    machine.config_write(SLOT, WINDOW + 4, 0);
    // Device status, one byte; it works with memory decoding off.
    machine.config_write(SLOT, WINDOW + 8, 20);
    machine.config_write(SLOT, WINDOW + 12, 1);
    machine.config_write(SLOT, WINDOW + 16, 3);
    assert_eq!(machine.config_read(SLOT, WINDOW + 16) & 0xff, 3);
    // A length that is none, an offset beyond the BAR: nothing happens.
    for (offset, length) in [(20, 3), (0x8000, 4), (u32::MAX, 1), (21, 4)] {
        machine.config_write(SLOT, WINDOW + 8, offset);
        machine.config_write(SLOT, WINDOW + 12, length);
        machine.config_write(SLOT, WINDOW + 16, 0);
    }
    machine.config_write(SLOT, COMMAND, 2);
    assert_eq!(Driver::new(&machine, SLOT).status(), 3);
}

#[test]
fn masked_interrupts_are_remembered_and_fire_when_unmasked() {
    let machine = rng_machine();
    let driver = Driver::new(&machine, SLOT);
    let mut queue = driver.start(0)[0].clone();
    let vector = machine.msix.0.lock().expect("vectors")[1].clone();
    let fired = || vector.fired.load(Ordering::SeqCst);
    let pending = || driver.read(0x5000, 8);
    let mut request = |count| {
        queue.add(&machine.ram, &[(0x40_0000, 16, true)]);
        driver.kick(&queue);
        queue.wait_used(&machine.ram, count);
    };
    let settle = |what: &str, done: &dyn Fn() -> bool| wait(what, done);
    request(1);
    settle("interrupt", &|| fired() == 1);
    let control = machine.config_read(SLOT, MSIX) & !(1 << 30);

    // Entry masked; its message changes meanwhile.
    driver.write(0x4000 + 16 + 12, 1, 4);
    request(2);
    settle("pending bit", &|| pending() == 2);
    assert_eq!(fired(), 1);
    driver.write(0x4000 + 16 + 8, 0x77, 4);
    driver.write(0x4000 + 16 + 12, 0, 4);
    assert_eq!((fired(), pending()), (2, 0));
    assert_eq!(
        vector.message.lock().expect("message").map(|m| m.data),
        Some(0x77)
    );

    // Function masked.
    machine.config_write(SLOT, MSIX, control | 1 << 30);
    request(3);
    settle("pending bit", &|| pending() == 2);
    assert_eq!(fired(), 2);
    machine.config_write(SLOT, MSIX, control);
    assert_eq!((fired(), pending()), (3, 0));

    // MSI-X off: no route, no interrupt, no panic.
    machine.config_write(SLOT, MSIX, control & !(1 << 31));
    request(4);
    assert_eq!(*vector.message.lock().expect("message"), None);
    assert_eq!(fired(), 3);
}

#[test]
fn pending_interrupts_survive_a_suspend() {
    let machine = rng_machine();
    let driver = Driver::new(&machine, SLOT);
    let mut queue = driver.start(0)[0].clone();
    driver.write(0x4000 + 16 + 12, 1, 4);
    queue.add(&machine.ram, &[(0x40_0000, 16, true)]);
    driver.kick(&queue);
    wait("pending bit", || driver.read(0x5000, 8) == 2);
    let device = machine.root.function(SLOT).expect("device");
    device.pause().expect("pause");
    let state = device.save().expect("save");

    let next = Machine::new(&machine.ram);
    next.restore(&state, DeviceKind::Rng).resume();
    assert_eq!(next.fired(), 0, "still masked");
    let driver = Driver::new(&next, SLOT);
    driver.write(0x4000 + 16 + 12, 0, 4);
    assert_eq!(next.fired(), 1);
}

#[test]
fn features_are_negotiated_and_strangers_refused() {
    let machine = rng_machine();
    let driver = Driver::new(&machine, SLOT);
    driver.enable();
    let offered = driver.features();
    assert_eq!(offered, 1 << 32 | 1 << 29 | 1 << 28);
    for accepted in [0, 1 << 28, 1 << 32 | 1, 1 << 32 | 1 << 40] {
        driver.set_status(0);
        driver.set_status(3);
        for half in 0..2u64 {
            driver.write(8, half, 4);
            driver.write(12, accepted >> (32 * half) & 0xffff_ffff, 4);
        }
        driver.set_status(11);
        assert_eq!(driver.status(), 3, "{accepted:#x} must be refused");
    }
    // Ready without FEATURES_OK: stopped.
    driver.set_status(7);
    assert_eq!(driver.status() & common::NEEDS_RESET, common::NEEDS_RESET);
}

#[test]
fn a_state_that_does_not_fit_is_refused_by_name() {
    let disk = BlockSubject::new();
    let machine = Machine::new(&new_ram());
    let device = machine.add(SLOT, disk.kind());
    let _queues = Driver::new(&machine, SLOT).start(0);
    device.pause().expect("pause");
    let good = device.save().expect("save");
    drop((device, machine));

    let ram = new_ram();
    let refuse = |state: &_, kind| {
        VirtioPci::restore(state, kind, &Machine::new(&ram).platform)
            .err()
            .expect("must be refused")
    };
    let said = refuse(&good, DeviceKind::Rng).to_string();
    assert!(said.contains("block") && said.contains("rng"), "{said}");

    disk.file.as_file().set_len(1 << 19).expect("shrink");
    assert!(matches!(
        refuse(&good, disk.kind()),
        DeviceError::Disk {
            saved: 2048,
            found: 1024,
            ..
        }
    ));
    disk.file.as_file().set_len(1 << 20).expect("grow");
    let time = std::time::SystemTime::now() + std::time::Duration::from_secs(1);
    disk.file.as_file().set_modified(time).expect("time");
    match refuse(&good, disk.kind()) {
        DeviceError::DiskChanged { path, how, .. } => {
            assert_eq!(
                (path.as_path(), how),
                (disk.file.path(), DiskChange::Written)
            );
        }
        other => panic!("{other}"),
    }
    let mut good = good;
    good.accept_any_disk();
    VirtioPci::restore(&good, disk.kind(), &Machine::new(&ram).platform)
        .expect("a state that names no disk takes any that is large enough");

    let mut bad = good.clone();
    bad.transport.driver_features |= 1 << 50;
    assert!(matches!(
        refuse(&bad, disk.kind()),
        DeviceError::Features { missing, .. } if missing == 1 << 50
    ));
    let mut bad = good.clone();
    bad.transport.queues[0].used = u64::MAX - 3;
    assert!(matches!(
        refuse(&bad, disk.kind()),
        DeviceError::Queue { .. }
    ));
    let mut bad = good.clone();
    bad.transport.queues.clear();
    assert!(matches!(
        refuse(&bad, disk.kind()),
        DeviceError::State { .. }
    ));
    for queues in [2, 9, 60_000] {
        let mut bad = good.clone();
        let queue = bad.transport.queues[0];
        bad.transport.queues.resize(queues, queue);
        assert!(matches!(
            refuse(&bad, disk.kind()),
            DeviceError::State { .. }
        ));
    }
    let mut bad = good.clone();
    bad.function.msix.entries.clear();
    assert!(matches!(
        refuse(&bad, disk.kind()),
        DeviceError::State { .. }
    ));
    let mut bad = good.clone();
    bad.transport.config_vector = 7;
    assert!(matches!(
        refuse(&bad, disk.kind()),
        DeviceError::State { .. }
    ));
    let mut bad = good;
    bad.function.slot = 77;
    assert!(matches!(refuse(&bad, disk.kind()), DeviceError::Slot(77)));
}

/// One access of a guest that writes at random.
#[derive(Clone, Debug)]
enum Access {
    Config { slot: u8, at: u8, value: u32 },
    Port { port: u16, data: Vec<u8> },
    Mmio { slot: u8, at: u64, data: Vec<u8> },
    Read { slot: u8, at: u64, len: usize },
    Ram { at: u64, data: Vec<u8> },
}

fn accesses() -> impl Strategy<Value = Vec<Access>> {
    let slot = 0..6u8;
    let bytes = |most| proptest::collection::vec(any::<u8>(), 1..=most);
    // Often at registers that do something.
    let at = prop_oneof![
        0..64u64,
        0x3000..0x3010u64,
        0x4000..0x4040u64,
        0x5000..0x5010u64,
        0..BAR_SIZE + 8
    ];
    let access =
        prop_oneof![
            (slot.clone(), any::<u8>(), any::<u32>())
                .prop_map(|(slot, at, value)| Access::Config { slot, at, value }),
            (0xcf8..=0xcffu16, bytes(4)).prop_map(|(port, data)| Access::Port { port, data }),
            (slot.clone(), at.clone(), bytes(8)).prop_map(|(slot, at, data)| Access::Mmio {
                slot,
                at,
                data
            }),
            (slot, at, 1..=8usize).prop_map(|(slot, at, len)| Access::Read { slot, at, len }),
            (0..0x6_0000u64, bytes(16)).prop_map(|(at, data)| Access::Ram { at, data }),
        ];
    proptest::collection::vec(access, 0..200)
}

fn perform(machine: &Machine, access: &Access) {
    // Where the BAR is now, wherever the guest put it.
    let bar = |slot| u64::from(machine.config_read(slot, BAR0));
    match access {
        Access::Config { slot, at, value } => machine.config_write(*slot, *at, *value),
        Access::Port { port, data } => {
            machine.root.pio_write(*port, data);
            machine.root.pio_read(*port, &mut vec![0; data.len()]);
        }
        Access::Mmio { slot, at, data } => {
            machine.root.mmio_write(bar(*slot) + at, data);
        }
        Access::Read { slot, at, len } => {
            machine.root.mmio_read(bar(*slot) + at, &mut vec![0; *len]);
        }
        Access::Ram { at, data } => {
            machine
                .ram
                .write_slice(data, GuestAddress(*at))
                .expect("RAM");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_guest_that_writes_at_random_harms_only_itself(
        accesses in accesses(),
        started in any::<bool>(),
    ) {
        let (disk, nic) = (BlockSubject::new(), NetSubject::new());
        let machine = Machine::new(&new_ram());
        let kinds = [disk.kind(), nic.kind(), DeviceKind::Rng];
        let devices: Vec<_> = (1u8..).zip(kinds).map(|(slot, kind)| machine.add(slot, kind)).collect();
        if started {
            for slot in 1..=3 {
                Driver::new(&machine, slot).start(0);
            }
        }
        for access in &accesses {
            perform(&machine, access);
        }
        let states: Vec<_> = devices
            .iter()
            .map(|device| {
                device.pause().expect("pause");
                device.save().expect("save")
            })
            .collect();
        let ram = machine.ram.clone();
        drop((devices, machine));
        let next = Machine::new(&ram);
        let kinds = [disk.kind(), nic.kind(), DeviceKind::Rng];
        for (state, kind) in states.iter().zip(kinds) {
            let device = next.restore(state, kind);
            prop_assert_eq!(encode(state), encode(&device.save().expect("save")));
            device.resume();
        }
    }
}
