//! Frames from the host through the virtio NIC to a driver that copies each, with as
//! many under way as a TCP connection lets be: who sends waits for who reads.
//!
//! `cargo bench -p hebe-devices --bench nic -- run [ROUNDS]`. No guest, no KVM and no
//! tap: a socket that keeps frames apart, and a driver on a thread of its own that
//! does as Linux does (interrupted once, it takes what there is until there is no
//! more, with interrupts off).

#[path = "../tests/common/mod.rs"]
mod common;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use common::{Driver, DriverQueue, F_EVENT_IDX, Machine, new_ram};
use hebe_devices::{DeviceKind, NetBackend, Ram};
use hebe_types::MacAddr;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vm_memory::{Bytes, GuestAddress};

const SLOT: u8 = 3;
const MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
const TIME: Duration = Duration::from_millis(1500);
const BUFFERS: u16 = 64;
const BUFFER_LEN: u64 = 0x1_1000;
const DATA: u64 = 0x20_0000;
const HEADER: usize = 12;

/// Bytes of a frame, and how many are under way at most.
const CASES: [(usize, u64); 5] = [
    (1514, 16),
    (1514, 256),
    (16_000, 16),
    (60_000, 16),
    (60_000, 48),
];

fn main() -> io::Result<()> {
    let words: Vec<String> = std::env::args()
        .skip(1)
        .filter(|w| w != "--bench")
        .collect();
    if words.first().is_none_or(|word| word != "run") {
        println!("skipped: say run");
        return Ok(());
    }
    let rounds = match words.get(1) {
        Some(word) => word.parse().map_err(io::Error::other)?,
        None => 5,
    };
    println!("bytes,under_way,round,frames_per_s,mbit_per_s,interrupts_per_frame");
    for round in 0..rounds {
        for (len, window) in CASES {
            measure(len, window, round)?;
        }
    }
    Ok(())
}

struct Guest<'a> {
    machine: &'a Machine,
    queue: DriverQueue,
    taken: u16,
    room: Vec<u8>,
}

impl Guest<'_> {
    fn ram(&self) -> &Ram {
        &self.machine.ram
    }

    fn put(&mut self, n: u16) {
        let at = DATA + u64::from(n) * BUFFER_LEN;
        self.queue
            .write_desc(&self.machine.ram, n, (at, BUFFER_LEN as u32), 2, 0);
        self.queue.publish(&self.machine.ram, n);
    }

    /// From which entry on it wants to be interrupted.
    fn wants(&self, entry: u16) {
        let at = self.queue.avail + 4 + 2 * u64::from(self.queue.size);
        self.ram()
            .store(entry, GuestAddress(at), Ordering::SeqCst)
            .expect("RAM");
        fence(Ordering::SeqCst);
    }

    /// Takes what there is, as often as there is some.
    fn turn(&mut self, seen: &AtomicU64, feeder: &thread::Thread) {
        loop {
            let used = self.queue.used_idx(self.ram());
            if used == self.taken {
                self.wants(self.taken);
                if self.queue.used_idx(self.ram()) == self.taken {
                    return;
                }
                continue;
            }
            let mut count = 0;
            while self.taken != used {
                let (head, len) = self.queue.used_entry(self.ram(), self.taken);
                let at = GuestAddress(DATA + u64::from(head) * BUFFER_LEN);
                let mut room = std::mem::take(&mut self.room);
                let frame = &mut room[..len as usize];
                self.ram().read_slice(frame, at).expect("RAM");
                std::hint::black_box(frame.iter().fold(0_u64, |a, b| a + u64::from(*b)));
                self.room = room;
                self.taken = self.taken.wrapping_add(1);
                self.put(head as u16);
                count += 1;
            }
            seen.fetch_add(count, Ordering::Release);
            feeder.unpark();
            Driver::new(self.machine, SLOT).kick(&self.queue);
        }
    }
}

fn listen(machine: &Machine, count: &Arc<AtomicU32>) -> Receiver<()> {
    let (told, interrupts): (SyncSender<()>, _) = sync_channel(1);
    for vector in machine.msix.0.lock().expect("vectors").iter().skip(1) {
        let (told, count) = (told.clone(), Arc::clone(count));
        let look = move || {
            count.fetch_add(1, Ordering::Relaxed);
            let _ = told.try_send(());
        };
        *vector.look.lock().expect("look") = Some(Box::new(look));
    }
    interrupts
}

fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (near, far) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    rustix::net::sockopt::set_socket_send_buffer_size_force(&far, 16 << 20)?;
    Ok((near, far))
}

fn measure(len: usize, window: u64, round: u32) -> io::Result<()> {
    let machine = Machine::new(&new_ram());
    let (near, far) = pair()?;
    let kind = DeviceKind::Net {
        wire: NetBackend::tap(near),
        mac: MAC,
    };
    let device = machine.add(SLOT, kind);
    let queue = Driver::new(&machine, SLOT).start(F_EVENT_IDX).remove(0);
    let interrupted = Arc::new(AtomicU32::new(0));
    let interrupts = listen(&machine, &interrupted);
    let mut guest = Guest {
        machine: &machine,
        queue,
        taken: 0,
        room: vec![0; BUFFER_LEN as usize],
    };
    (0..BUFFERS).for_each(|n| guest.put(n));
    guest.wants(0);
    Driver::new(&machine, SLOT).kick(&guest.queue);
    let seen = AtomicU64::new(0);
    let (sent, time) = thread::scope(|scope| -> io::Result<(u64, f64)> {
        let feeder = scope.spawn(|| feed(&far, &seen, len, window));
        while !feeder.is_finished() {
            if interrupts.recv_timeout(Duration::from_millis(20)).is_ok() {
                guest.turn(&seen, feeder.thread());
            }
        }
        feeder.join().map_err(|_| io::Error::other("panicked"))?
    })?;
    let per_s = sent as f64 / time;
    println!(
        "{len},{window},{round},{per_s:.0},{:.0},{:.3}",
        per_s * len as f64 * 8.0 / 1e6,
        f64::from(interrupted.load(Ordering::Relaxed)) / sent as f64
    );
    device.pause().map_err(io::Error::other)
}

/// Sends as long as fewer than `window` are under way.
fn feed(far: &OwnedFd, seen: &AtomicU64, len: usize, window: u64) -> io::Result<(u64, f64)> {
    let mut frame = vec![0x5a; HEADER + len];
    frame[..HEADER].fill(0);
    let (mut sent, began) = (0, Instant::now());
    loop {
        let left = TIME.saturating_sub(began.elapsed());
        if sent - seen.load(Ordering::Acquire) < window {
            if left.is_zero() {
                break;
            }
            rustix::io::write(far, &frame)?;
            sent += 1;
        } else {
            thread::park_timeout(Duration::from_millis(1));
        }
    }
    while seen.load(Ordering::Acquire) < sent {
        if began.elapsed() > TIME * 4 {
            return Err(io::Error::other("frames were lost"));
        }
        thread::park_timeout(Duration::from_millis(1));
    }
    Ok((sent, began.elapsed().as_secs_f64()))
}
