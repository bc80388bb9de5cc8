//! What the fuzz targets call, and the tests over their corpora. Not part of
//! the API.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use hebe_block::BlockBackend;
use hebe_state::v1::devices::QueueV1;
use hebe_state::v2::devices::{DeviceV2, VirtioV2};
use hebe_types::MacAddr;
use rustix::fs::MemfdFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::msix::Msix;
use crate::virtio::fuzzed::{Config, Device, Meter, MeteredRam, Queues, Shared, VirtQueue};
use crate::{
    ConsoleHub, DeviceKind, Doorbells, MsiMessage, MsiVector, MsixBackend, NetBackend, Platform,
    Ram, Reclaim, VirtioPci, VsockHost,
};

const RAM_LEN: usize = 256 << 10;
/// Where the input's tail goes.
const TAIL_AT: u64 = 0x100;
const HEADER_LEN: usize = 16;
const DISK_LEN: u64 = 64 << 10;
/// Kicks per input: a guest may change the ring between two, and the device
/// must not rely on what it saw.
const KICKS: usize = 3;

struct Silent;

impl MsiVector for Silent {
    fn trigger(&self) -> io::Result<()> {
        Ok(())
    }

    fn route(&self, _message: Option<MsiMessage>) -> io::Result<()> {
        Ok(())
    }
}

impl MsixBackend for Silent {
    fn new_vector(&self) -> io::Result<Arc<dyn MsiVector>> {
        Ok(Arc::new(Silent))
    }
}

/// Takes what is RAM.
struct Nobody;

impl Reclaim for Nobody {
    fn give_back(&self, addr: u64, len: u64) -> io::Result<u64> {
        assert!(
            addr.checked_add(len)
                .is_some_and(|end| end <= RAM_LEN as u64)
        );
        Ok(len)
    }
}

impl Doorbells for Silent {
    fn attach(&self, _addr: u64, _evt: &EventFd) -> io::Result<()> {
        Ok(())
    }

    fn detach(&self, _addr: u64, _evt: &EventFd) -> io::Result<()> {
        Ok(())
    }
}

/// Lets a device serve a queue whose memory is the input. Header: kind,
/// features, queue, log2 of the size, then the low 16 bits of the three ring
/// addresses in units of 2 bytes, next available and next used index, two
/// spare bytes; the rest is guest RAM from 0x100 on.
///
/// # Panics
/// If a promise is broken: the device takes more work than a ring holds.
pub fn drive_queue(input: &[u8]) {
    let Some((header, tail)) = input.split_at_checked(HEADER_LEN) else {
        return;
    };
    let word = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let ram = new_ram();
    let tail = &tail[..tail.len().min(RAM_LEN - TAIL_AT as usize)];
    let _ = ram.write_slice(tail, GuestAddress(TAIL_AT));
    let regs = QueueV1 {
        size: 1 << (header[3] % 10),
        enabled: true,
        vector: 0,
        desc: u64::from(word(4)) * 2,
        avail: u64::from(word(6)) * 2,
        used: u64::from(word(8)) * 2,
        next_avail: word(10),
        next_used: word(12),
    };
    let (kind, _other_end) = kind(header[0]);
    let mut device = kind.build(1);
    let meter = Arc::<Meter>::default();
    let metered = MeteredRam::new(ram.clone(), Arc::clone(&meter));
    let (event_idx, indirect) = (header[1] & 1 != 0, header[1] & 2 != 0);
    let Ok(queue) = VirtQueue::new(&regs, event_idx, indirect, metered) else {
        return;
    };
    let Ok(msix) = Msix::new(device.queues() + 1, &Silent) else {
        return;
    };
    let config = Config {
        bytes: device.config(),
        generation: 0,
    };
    let shared = Arc::new(Shared::new(1, device.queues(), msix, config, Arc::new(())));
    let index = usize::from(header[2]) % device.queues();
    let mut queues = Queues::new(device.queues(), shared, Arc::new(AtomicUsize::new(0)));
    queues.list[index] = Some(queue);
    // Event index and indirect descriptors are the queue's; the rest is the
    // device's, whose own bits lie from 0 on as well as higher.
    device.activate(u64::from(header[1]) << 8 | u64::from(header[1] >> 2));
    for _ in 0..KICKS {
        if !serve(&mut *device, index, &mut queues) {
            break;
        }
    }
    // A ring of n entries holds n chains; each costs at most two tables and a
    // few words, and a kick serves each entry once.
    let entries = u64::from(regs.size);
    let chain = 16 * (entries + u64::from(u16::MAX) + 2) + 32;
    let (ring, _) = meter.read();
    assert!(
        ring <= KICKS as u64 * 2 * (entries * chain + 64),
        "{ring} ring bytes"
    );
}

fn serve(device: &mut dyn Device, index: usize, queues: &mut Queues) -> bool {
    let kicked = device.kicked(index, queues);
    kicked.is_ok() && device.backend_ready(queues).is_ok()
}

/// Constructs the devices of a state, saves them again and lets them run;
/// returns how many could be constructed.
///
/// # Panics
/// If a promise is broken: what was restored is saved as something else.
pub fn restore_devices(functions: &[VirtioV2]) -> usize {
    let platform = Platform {
        ram: new_ram(),
        msix: Arc::new(Silent),
        doorbells: Arc::new(Silent),
        log: Arc::new(()),
    };
    let mut constructed = 0;
    for state in functions.iter().take(4) {
        let state = forget_disk(state.clone());
        let (kind, _other_end) = kind(number_of(&state.device));
        if let Ok(device) = VirtioPci::restore(&state, kind, &platform) {
            // The next one has a disk of its own.
            let saved = device.save().map(forget_disk);
            let again = saved.as_ref().ok().map(|saved| {
                let (kind, _other_end) = self::kind(number_of(&saved.device));
                VirtioPci::restore(saved, kind, &platform).map(|d| d.save().map(forget_disk).ok())
            });
            assert!(
                matches!(again, Some(Ok(again)) if again == saved.ok()),
                "save, restore, save differ"
            );
            device.resume();
            constructed += 1;
        }
    }
    constructed
}

fn forget_disk(mut state: VirtioV2) -> VirtioV2 {
    state.accept_any_disk();
    state
}

fn number_of(state: &DeviceV2) -> u8 {
    match state {
        DeviceV2::Block(_) => 0,
        DeviceV2::Net(_) => 1,
        DeviceV2::Console(_) => 2,
        DeviceV2::Rng(_) => 3,
        DeviceV2::Vsock(_) => 4,
        DeviceV2::Balloon(_) => 5,
    }
}

fn new_ram() -> Ram {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM_LEN)]).expect("guest RAM")
}

/// A device on a back end of its own; the other end of a NIC's wire is kept.
fn kind(number: u8) -> (DeviceKind, Option<OwnedFd>) {
    match number % 6 {
        0 => {
            let kind = DeviceKind::Block {
                backend: disk(),
                queues: 2,
            };
            (kind, None)
        }
        1 => {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let pair =
                rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
            let (tap, wire) = pair.expect("socket pair");
            let _ = rustix::io::write(&wire, &[0x11; 100]);
            let mac = MacAddr([0x52, 0x54, 0, 0, 0, 1]);
            let tap = NetBackend::tap(tap);
            (DeviceKind::Net { wire: tap, mac }, Some(wire))
        }
        2 => {
            let kind = DeviceKind::Console {
                hub: ConsoleHub::new(None).expect("hub"),
                takes_input: true,
            };
            (kind, None)
        }
        3 => (DeviceKind::Rng, None),
        5 => {
            let kind = DeviceKind::Balloon {
                reclaim: Arc::new(Nobody),
                ram: RAM_LEN as u64,
                deflate_on_oom: true,
                reporting: true,
            };
            (kind, None)
        }
        _ => {
            let host = VsockHost::new(listener()).expect("host's side");
            (DeviceKind::Vsock { host, cid: 3 }, None)
        }
    }
}

/// A socket that nobody knows.
fn listener() -> UnixListener {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let name = format!("hebe-fuzzed-{}-{count}", std::process::id());
    let address = SocketAddr::from_abstract_name(name).expect("name");
    UnixListener::bind_addr(&address).expect("listener")
}

fn disk() -> BlockBackend {
    let memory = rustix::fs::memfd_create("disk", MemfdFlags::CLOEXEC).expect("memfd");
    let file = File::from(memory);
    file.set_len(DISK_LEN).expect("length");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    BlockBackend::open(Path::new(&path), false).expect("open")
}
