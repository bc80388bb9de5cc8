//! Reads through the virtio disk, one by one and by io_uring, from a file that the
//! host has in memory and from one that it has not.
//!
//! `cargo bench -p hebe-devices --bench disk -- FILE [MIB] [ROUNDS]`: the file is
//! made, or taken as it is, and read alone. No guest and no KVM: a driver on a
//! thread of its own, which sleeps until it is interrupted.

#[path = "../tests/common/mod.rs"]
mod common;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use common::{Driver, DriverQueue, Machine, new_ram};
use hebe_block::BlockBackend;
use hebe_devices::{DeviceKind, Ram};
use vm_memory::{Bytes, GuestAddress};

const SLOT: u8 = 3;
const QUEUES: usize = 2;
const F_MQ: u64 = 1 << 12;
const TIME: Duration = Duration::from_millis(1500);
/// What is read again and again from memory.
const WARM: u64 = 64 << 20;
/// Descriptors of a request.
const CHAIN: u16 = 3;

struct Case {
    cached: bool,
    /// One behind the other, instead of anywhere.
    in_order: bool,
    depth: usize,
    len: u32,
}

const CASES: [Case; 8] = [
    case(true, 1, 4096),
    case(true, 32, 4096),
    case(false, 1, 4096),
    case(false, 4, 4096),
    case(false, 16, 4096),
    case(false, 32, 4096),
    case(false, 16, 128 << 10),
    Case {
        in_order: true,
        ..case(false, 4, 128 << 10)
    },
];

const fn case(cached: bool, depth: usize, len: u32) -> Case {
    Case {
        cached,
        in_order: false,
        depth,
        len,
    }
}

fn main() -> io::Result<()> {
    let words: Vec<String> = std::env::args()
        .skip(1)
        .filter(|w| w != "--bench")
        .collect();
    let number = |at: usize, otherwise: u64| match words.get(at) {
        Some(word) => word.parse().map_err(io::Error::other),
        None => Ok(otherwise),
    };
    let Some(path) = words.first().map(Path::new) else {
        // As `cargo test --benches` runs it.
        println!("skipped: say which file");
        return Ok(());
    };
    make(path, number(1, 1024_u64)? << 20)?;
    println!("cached,in_order,depth,bytes,way,round,requests_per_s,us_each,cpu_us_each");
    for round in 0..number(2, 3_u64)? {
        for case in &CASES {
            for ring in [false, true] {
                measure(path, case, ring, round)?;
            }
        }
    }
    Ok(())
}

fn make(path: &Path, len: u64) -> io::Result<()> {
    if std::fs::metadata(path).is_ok_and(|m| m.len() >= len) {
        return Ok(());
    }
    let file = File::create(path)?;
    let chunk: Vec<u8> = (0..1 << 20).map(|i| (i * 7 + i / 300) as u8).collect();
    for at in (0..len).step_by(chunk.len()) {
        file.write_all_at(&chunk, at)?;
    }
    file.sync_all()
}

fn forget(path: &Path) -> io::Result<()> {
    let advice = rustix::fs::Advice::DontNeed;
    Ok(rustix::fs::fadvise(File::open(path)?, 0, None, advice)?)
}

fn warm(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    let mut chunk = vec![0; 1 << 20];
    (0..WARM)
        .step_by(chunk.len())
        .try_for_each(|at| file.read_exact_at(&mut chunk, at))
}

/// Processor time of this process, in microseconds.
fn cpu_us() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 * 1e6 + time.tv_nsec as f64 / 1e3
}

struct Guest<'a> {
    machine: &'a Machine,
    queues: Vec<DriverQueue>,
    taken: [u16; QUEUES],
    sectors: u64,
    len: u32,
    in_order: bool,
    dice: u64,
    next: u64,
}

impl Guest<'_> {
    fn ram(&self) -> &Ram {
        &self.machine.ram
    }

    /// Puts read `n` of a queue into it again.
    fn put(&mut self, queue: usize, n: u16) {
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 7;
        self.dice ^= self.dice << 17;
        let blocks = self.sectors / u64::from(self.len / 512);
        self.next += 1;
        let block = if self.in_order { self.next } else { self.dice };
        let sector = block % blocks * u64::from(self.len / 512);
        let at = 0x40_0000 + (queue as u64 * 16 + u64::from(n)) * 0x2_1000;
        let ram = &self.machine.ram;
        let write = |at, value: u64| ram.write_obj(value, GuestAddress(at)).expect("RAM");
        write(at, 0);
        write(at + 8, sector);
        let queue = &mut self.queues[queue];
        let head = n * CHAIN;
        queue.write_desc(ram, head, (at, 16), 1, head + 1);
        queue.write_desc(ram, head + 1, (at + 0x1000, self.len), 3, head + 2);
        queue.write_desc(ram, head + 2, (at + 32, 1), 2, 0);
        queue.publish(ram, head);
    }

    /// Takes what has ended, and asks for as much.
    fn turn(&mut self, again: bool) -> u64 {
        let mut ended = 0;
        for queue in 0..QUEUES {
            let used = self.queues[queue].used_idx(self.ram());
            let mut kick = false;
            while self.taken[queue] != used {
                let (head, len) = self.queues[queue].used_entry(self.ram(), self.taken[queue]);
                assert_eq!(len, self.len + 1, "a read failed");
                self.taken[queue] = self.taken[queue].wrapping_add(1);
                ended += 1;
                if again {
                    self.put(queue, head as u16 / CHAIN);
                    kick = true;
                }
            }
            if kick {
                Driver::new(self.machine, SLOT).kick(&self.queues[queue]);
            }
        }
        ended
    }
}

/// Has each interrupt of the queues wake the driver.
fn listen(machine: &Machine) -> Receiver<()> {
    let (told, interrupts): (SyncSender<()>, _) = sync_channel(1);
    for vector in machine.msix.0.lock().expect("vectors").iter().skip(1) {
        let told = told.clone();
        let look = move || {
            let _ = told.try_send(());
        };
        *vector.look.lock().expect("look") = Some(Box::new(look));
    }
    interrupts
}

fn measure(path: &Path, case: &Case, ring: bool, round: u64) -> io::Result<()> {
    let mut backend = BlockBackend::open(path, true).map_err(io::Error::other)?;
    if ring {
        backend.open_ring().map_err(io::Error::other)?;
    }
    let sectors = if case.cached {
        WARM / 512
    } else {
        backend.sectors()
    };
    forget(path)?;
    if case.cached {
        warm(path)?;
    }
    let machine = Machine::new(&new_ram());
    let kind = DeviceKind::Block {
        backend,
        queues: QUEUES,
    };
    let device = machine.add(SLOT, kind);
    let queues = Driver::new(&machine, SLOT).start(F_MQ);
    let interrupts = listen(&machine);
    let mut guest = Guest {
        machine: &machine,
        queues,
        taken: [0; QUEUES],
        sectors,
        len: case.len,
        in_order: case.in_order,
        next: 0,
        dice: 0x9e37_79b9_7f4a_7c15 ^ round << 8,
    };
    let (begun, cpu) = (Instant::now(), cpu_us());
    for n in 0..case.depth {
        guest.put(n % QUEUES, (n / QUEUES) as u16);
    }
    for queue in &guest.queues {
        Driver::new(&machine, SLOT).kick(queue);
    }
    let (mut ended, mut left) = (0, case.depth as u64);
    while left > 0 {
        interrupts.recv().map_err(io::Error::other)?;
        let again = begun.elapsed() < TIME;
        let now = guest.turn(again);
        ended += now;
        if !again {
            left -= now;
        }
    }
    let (us, cpu) = (begun.elapsed().as_secs_f64() * 1e6, cpu_us() - cpu);
    let ended = ended as f64;
    println!(
        "{},{},{},{},{},{round},{:.0},{:.2},{:.2}",
        case.cached,
        case.in_order,
        case.depth,
        case.len,
        if ring { "io_uring" } else { "one-by-one" },
        ended / us * 1e6,
        us * case.depth as f64 / ended,
        cpu / ended
    );
    device.pause().map_err(io::Error::other)
}
