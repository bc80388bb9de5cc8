//! Pausing devices one after the other, and all asked before any is waited for.
//!
//! `cargo bench -p hebe-devices --bench pause -- DIR [ROUNDS]`: a disk image for each
//! disk is made in DIR and removed again. Before each pause every disk has written
//! what a guest may write between the flush while it runs and its last instruction.
//! Milliseconds until all are paused; the two ways take turns.

#[path = "../tests/common/mod.rs"]
mod common;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use common::{Driver, DriverQueue, Machine, new_ram};
use hebe_block::BlockBackend;
use hebe_devices::{DeviceKind, VirtioPci};
use vm_memory::{Bytes, GuestAddress};

const DISK_LEN: u64 = 64 << 20;
/// Disks, and bytes that each has written, one request.
const CASES: [(u8, u32); 6] = [
    (1, 4096),
    (2, 4096),
    (4, 4096),
    (1, 1 << 20),
    (2, 1 << 20),
    (4, 1 << 20),
];
const REQUEST: u64 = 0x40_0000;

struct Disk {
    device: Arc<VirtioPci>,
    queue: DriverQueue,
    slot: u8,
    written: u16,
}

fn main() -> io::Result<()> {
    let mut words = std::env::args().skip(1).filter(|w| w != "--bench");
    let Some(dir) = words.next().map(PathBuf::from) else {
        // As `cargo test --benches` runs it.
        println!("skipped: say in which directory");
        return Ok(());
    };
    let rounds = match words.next() {
        Some(word) => word.parse().map_err(io::Error::other)?,
        None => 30,
    };
    println!("disks,bytes_each,way,rounds,median_ms,p90_ms,max_ms");
    for (disks, bytes) in CASES {
        measure(&dir, disks, bytes, rounds)?;
    }
    Ok(())
}

fn measure(dir: &Path, disks: u8, bytes: u32, rounds: usize) -> io::Result<()> {
    let machine = Machine::new(&new_ram());
    let path = |slot: u8| dir.join(format!("hebe-bench-pause-{slot}.img"));
    let mut all = Vec::new();
    for slot in 1..=disks {
        let file = File::create(path(slot))?;
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, DISK_LEN)?;
        file.sync_all()?;
        let backend = BlockBackend::open(&path(slot), false).map_err(io::Error::other)?;
        let device = machine.add(slot, DeviceKind::Block { backend, queues: 1 });
        let queue = Driver::new(&machine, slot).start(0).remove(0);
        all.push(Disk {
            device,
            queue,
            slot,
            written: 0,
        });
    }
    let mut took = [Vec::new(), Vec::new()];
    for round in 0..rounds * 2 {
        for disk in &mut all {
            disk.device.presync().map_err(io::Error::other)?;
        }
        for disk in &mut all {
            write(&machine, disk, bytes, round as u64);
        }
        let beside = round % 2 == 1;
        let began = Instant::now();
        if beside {
            all.iter().for_each(|disk| disk.device.ask_to_pause());
        }
        for disk in &all {
            disk.device.pause().map_err(io::Error::other)?;
        }
        took[usize::from(beside)].push(began.elapsed().as_secs_f64() * 1e3);
        all.iter().for_each(|disk| disk.device.resume());
    }
    for (way, mut ms) in ["one-by-one", "side-by-side"].into_iter().zip(took) {
        ms.sort_by(f64::total_cmp);
        let (median, p90, max) = (ms[ms.len() / 2], ms[ms.len() * 9 / 10], ms[ms.len() - 1]);
        println!("{disks},{bytes},{way},{rounds},{median:.3},{p90:.3},{max:.3}");
    }
    (1..=disks).try_for_each(|slot| std::fs::remove_file(path(slot)))
}

/// One request to its end.
fn write(machine: &Machine, disk: &mut Disk, bytes: u32, round: u64) {
    let ram = &machine.ram;
    let sector = round % (DISK_LEN / u64::from(bytes)) * u64::from(bytes / 512);
    let put = |at: u64, value: u64| ram.write_obj(value, GuestAddress(at)).expect("RAM");
    // VIRTIO_BLK_T_OUT.
    put(REQUEST, 1);
    put(REQUEST + 8, sector);
    put(REQUEST + 0x1000, round);
    let chain = [
        (REQUEST, 16, false),
        (REQUEST + 0x1000, bytes, false),
        (REQUEST + 32, 1, true),
    ];
    disk.queue.add(ram, &chain);
    Driver::new(machine, disk.slot).kick(&disk.queue);
    disk.written = disk.written.wrapping_add(1);
    disk.queue.wait_used(ram, disk.written);
    let mut status = [9];
    ram.read_slice(&mut status, GuestAddress(REQUEST + 32))
        .expect("RAM");
    assert_eq!(status, [0], "a write failed");
}
