//! The kinds of device under test: how each is made, what a request is, and
//! how one tells that requests were done exactly once.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::cell::RefCell;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};

use hebe_block::BlockBackend;
use hebe_devices::{ConsoleHub, DeviceKind, NetBackend, Ram, Reclaim, VsockHost};
use hebe_types::MacAddr;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use vm_memory::{Bytes, GuestAddress};

use crate::common::Buffer;

pub const MAC: MacAddr = MacAddr([0x52, 0x54, 0, 0x11, 0x22, 0x33]);

pub trait Subject {
    /// The queue that requests go into.
    const QUEUE: u16;
    /// So many queues, up to that one, take the requests in turn.
    const TURNS: u16 = 1;
    /// Features of its own that the driver accepts.
    const EXTRA: u64 = 0;
    fn new() -> Self;
    /// A device of this kind on the subject's back end, opened anew.
    fn kind(&self) -> DeviceKind;
    /// Lays out request `n` in RAM.
    fn prepare(&self, ram: &Ram, n: u32) -> Vec<Buffer>;
    /// Requests 0 to `count` were done, each once.
    fn check(&self, ram: &Ram, count: u32);
}

fn area(n: u32) -> u64 {
    0x40_0000 + u64::from(n % 1024) * 0x2000
}

fn put(ram: &Ram, addr: u64, bytes: &[u8]) {
    ram.write_slice(bytes, GuestAddress(addr)).expect("write");
}

pub fn get(ram: &Ram, addr: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ram.read_slice(&mut bytes, GuestAddress(addr))
        .expect("read");
    bytes
}

/// Request `n` writes a pattern to sector `n`.
pub struct BlockSubject {
    pub file: tempfile::NamedTempFile,
}

fn sector(n: u32) -> Vec<u8> {
    (0..512u32).map(|i| (i * 31 + n * 7 + 1) as u8).collect()
}

impl BlockSubject {
    /// With so many queues.
    pub fn with(&self, queues: usize) -> DeviceKind {
        let backend = BlockBackend::open(self.file.path(), false).expect("open");
        DeviceKind::Block { backend, queues }
    }
}

/// `VIRTIO_BLK_F_MQ`.
pub const F_MQ: u64 = 1 << 12;

/// As [`BlockSubject`], its requests in four queues by turns.
pub struct BlockQueuesSubject(BlockSubject);

impl Subject for BlockQueuesSubject {
    const QUEUE: u16 = 3;
    const TURNS: u16 = 4;
    const EXTRA: u64 = F_MQ;

    fn new() -> Self {
        Self(BlockSubject::new())
    }

    fn kind(&self) -> DeviceKind {
        self.0.with(4)
    }

    fn prepare(&self, ram: &Ram, n: u32) -> Vec<Buffer> {
        self.0.prepare(ram, n)
    }

    fn check(&self, ram: &Ram, count: u32) {
        self.0.check(ram, count);
    }
}

impl Subject for BlockSubject {
    const QUEUE: u16 = 0;

    fn new() -> Self {
        let file = tempfile::NamedTempFile::new().expect("temporary file");
        file.as_file().set_len(1 << 20).expect("set length");
        Self { file }
    }

    fn kind(&self) -> DeviceKind {
        self.with(1)
    }

    fn prepare(&self, ram: &Ram, n: u32) -> Vec<Buffer> {
        let at = area(n);
        put(ram, at, &1u64.to_le_bytes());
        put(ram, at + 8, &u64::from(n).to_le_bytes());
        put(ram, at + 16, &sector(n));
        put(ram, at + 0x1000, &[0xff]);
        vec![
            (at, 16, false),
            (at + 16, 500, false),
            (at + 516, 12, false),
            (at + 0x1000, 1, true),
        ]
    }

    fn check(&self, ram: &Ram, count: u32) {
        let disk = std::fs::read(self.file.path()).expect("read the disk");
        for n in 0..count {
            assert_eq!(get(ram, area(n) + 0x1000, 1), [0], "status of {n}");
            let at = n as usize * 512;
            assert!(disk[at..at + 512] == sector(n), "sector {n}");
        }
    }
}

/// Request `n` reads page `n` of a disk that is not in the host's memory, as
/// far as its file system can let go of it.
pub struct BlockReadSubject {
    file: tempfile::NamedTempFile,
}

const PAGES: u32 = 1024;

fn page(n: u32) -> Vec<u8> {
    (0..4096u32)
        .map(|i| (i * 13 + i / 256 + (n % PAGES) * 29 + 1) as u8)
        .collect()
}

/// Lets the host forget what is in the file.
pub fn drop_from_cache(file: &std::fs::File) {
    file.sync_all().expect("sync");
    let advice = rustix::fs::Advice::DontNeed;
    rustix::fs::fadvise(file, 0, None, advice).expect("advice");
}

/// With a ring, or a word why it has none.
pub fn with_ring(mut backend: BlockBackend) -> BlockBackend {
    if let Err(why) = backend.open_ring() {
        println!("skipped: no reads are under way here: {why}");
    }
    backend
}

impl Subject for BlockReadSubject {
    const QUEUE: u16 = 1;
    const TURNS: u16 = 2;
    const EXTRA: u64 = F_MQ;

    fn new() -> Self {
        let mut file = tempfile::NamedTempFile::new().expect("temporary file");
        let pages: Vec<u8> = (0..PAGES).flat_map(page).collect();
        file.write_all(&pages).expect("write");
        Self { file }
    }

    fn kind(&self) -> DeviceKind {
        let backend = BlockBackend::open(self.file.path(), false).expect("open");
        DeviceKind::Block {
            backend: with_ring(backend),
            queues: 2,
        }
    }

    fn prepare(&self, ram: &Ram, n: u32) -> Vec<Buffer> {
        drop_from_cache(self.file.as_file());
        let at = area(n);
        put(ram, at, &0u64.to_le_bytes());
        put(ram, at + 8, &u64::from(n % PAGES * 8).to_le_bytes());
        put(ram, at + 0x200, &[0; 4096]);
        put(ram, at + 0x1800, &[0xff]);
        vec![
            (at, 16, false),
            (at + 0x200, 1000, true),
            (at + 0x200 + 1000, 3096, true),
            (at + 0x1800, 1, true),
        ]
    }

    fn check(&self, ram: &Ram, count: u32) {
        for n in count.saturating_sub(PAGES)..count {
            assert_eq!(get(ram, area(n) + 0x1800, 1), [0], "status of {n}");
            assert!(get(ram, area(n) + 0x200, 4096) == page(n), "page {n}");
        }
    }
}

/// Request `n` sends frame `n`; the other end of a socket pair sees each
/// frame, in order, once.
pub struct NetSubject {
    tap: OwnedFd,
    pub wire: OwnedFd,
    seen: RefCell<Vec<Vec<u8>>>,
}

fn frame(n: u32) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend_from_slice(&MAC.0);
    frame.extend_from_slice(&[0x88, 0xb5]);
    frame.extend_from_slice(&n.to_le_bytes());
    frame.resize(60 + n as usize % 900, n as u8);
    frame
}

impl NetSubject {
    pub fn receive(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 70_000];
        let len = rustix::io::read(&self.wire, &mut frame[..]).ok()?;
        frame.truncate(len);
        Some(frame)
    }
}

impl Subject for NetSubject {
    const QUEUE: u16 = 1;

    fn new() -> Self {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let pair = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
        let (tap, wire) = pair.expect("socket pair");
        Self {
            tap,
            wire,
            seen: RefCell::default(),
        }
    }

    fn kind(&self) -> DeviceKind {
        DeviceKind::Net {
            wire: NetBackend::tap(self.tap.try_clone().expect("duplicate")),
            mac: MAC,
        }
    }

    fn prepare(&self, ram: &Ram, n: u32) -> Vec<Buffer> {
        let (at, frame) = (area(n), frame(n));
        // A header that claims offloads nobody negotiated.
        put(ram, at, &[0x5a; 12]);
        put(ram, at + 12, &frame);
        vec![(at, 12, false), (at + 12, frame.len() as u32, false)]
    }

    fn check(&self, _ram: &Ram, count: u32) {
        let mut seen = self.seen.borrow_mut();
        while let Some(with_header) = self.receive() {
            let (header, frame) = with_header.split_at(12);
            assert_eq!(header, [0; 12], "the guest's header is not passed on");
            seen.push(frame.to_vec());
        }
        assert_eq!(seen.len(), count as usize);
        for (n, got) in (0..count).zip(seen.iter()) {
            assert!(*got == frame(n), "frame {n}");
        }
    }
}

/// Checksums and TCP both ways, and frames over several buffers.
pub const OFFLOADS: u64 = 1 | 1 << 1 | 1 << 7 | 1 << 8 | 1 << 11 | 1 << 12 | 1 << 15;

/// A frame whose checksum is left to the kernel, and which is to be cut.
pub const OFFLOADED: [u8; 12] = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];

/// As [`NetSubject`], with a driver that leaves work to the kernel.
pub struct OffloadSubject(NetSubject);

impl Subject for OffloadSubject {
    const QUEUE: u16 = 1;
    const EXTRA: u64 = OFFLOADS;

    fn new() -> Self {
        Self(NetSubject::new())
    }

    fn kind(&self) -> DeviceKind {
        self.0.kind()
    }

    fn prepare(&self, ram: &Ram, n: u32) -> Vec<Buffer> {
        let buffers = self.0.prepare(ram, n);
        put(ram, area(n), &OFFLOADED);
        buffers
    }

    fn check(&self, _ram: &Ram, count: u32) {
        let mut seen = self.0.seen.borrow_mut();
        while let Some(with_header) = self.0.receive() {
            let (header, frame) = with_header.split_at(12);
            assert_eq!(header, OFFLOADED, "the guest's header is passed on");
            seen.push(frame.to_vec());
        }
        assert_eq!(seen.len(), count as usize);
        for (n, got) in (0..count).zip(seen.iter()) {
            assert!(*got == frame(n), "frame {n}");
        }
    }
}

/// As [`NetSubject`], over a stream of frames.
pub struct StreamSubject {
    wire: NetBackend,
    far: RefCell<UnixStream>,
    seen: RefCell<Vec<Vec<u8>>>,
}

impl Subject for StreamSubject {
    const QUEUE: u16 = 1;

    fn new() -> Self {
        let (near, far) = UnixStream::pair().expect("pair");
        let wait = std::time::Duration::from_secs(120);
        far.set_read_timeout(Some(wait)).expect("timeout");
        Self {
            wire: NetBackend::stream(near),
            far: RefCell::new(far),
            seen: RefCell::default(),
        }
    }

    fn kind(&self) -> DeviceKind {
        DeviceKind::Net {
            wire: self.wire.clone(),
            mac: MAC,
        }
    }

    fn prepare(&self, ram: &Ram, n: u32) -> Vec<Buffer> {
        let (at, frame) = (area(n), frame(n));
        put(ram, at, &[0x5a; 12]);
        put(ram, at + 12, &frame);
        vec![(at, 12 + frame.len() as u32, false)]
    }

    fn check(&self, _ram: &Ram, count: u32) {
        let (mut seen, mut far) = (self.seen.borrow_mut(), self.far.borrow_mut());
        while seen.len() < count as usize {
            let mut len = [0; 4];
            far.read_exact(&mut len).expect("a length");
            let mut frame = vec![0; u32::from_be_bytes(len) as usize];
            far.read_exact(&mut frame).expect("a frame");
            seen.push(frame);
        }
        far.set_nonblocking(true).expect("non-blocking");
        assert!(far.read(&mut [0; 1]).is_err(), "a frame too many");
        far.set_nonblocking(false).expect("blocking");
        for (n, got) in (0..count).zip(seen.iter()) {
            assert!(*got == frame(n), "frame {n}");
        }
    }
}

/// Request `n` prints a line.
pub struct ConsoleSubject {
    folder: tempfile::TempDir,
    pub hub: Arc<ConsoleHub>,
}

impl Subject for ConsoleSubject {
    const QUEUE: u16 = 1;

    fn new() -> Self {
        let folder = tempfile::tempdir().expect("folder");
        let hub = ConsoleHub::new(Some(&folder.path().join("log"))).expect("hub");
        Self { folder, hub }
    }

    fn kind(&self) -> DeviceKind {
        DeviceKind::Console {
            hub: Arc::clone(&self.hub),
            takes_input: true,
        }
    }

    fn prepare(&self, ram: &Ram, n: u32) -> Vec<Buffer> {
        let line = format!("line {n}\n");
        put(ram, area(n), line.as_bytes());
        let half = line.len() as u32 / 2;
        vec![
            (area(n), half, false),
            (area(n) + u64::from(half), line.len() as u32 - half, false),
        ]
    }

    fn check(&self, _ram: &Ram, count: u32) {
        self.hub.flush();
        let log = std::fs::read_to_string(self.folder.path().join("log")).expect("log");
        let wanted: String = (0..count).map(|n| format!("line {n}\n")).collect();
        assert_eq!(log, wanted);
    }
}

/// Request `n` asks for 64 random bytes.
pub struct RngSubject;

impl Subject for RngSubject {
    const QUEUE: u16 = 0;

    fn new() -> Self {
        Self
    }

    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }

    fn prepare(&self, ram: &Ram, n: u32) -> Vec<Buffer> {
        put(ram, area(n), &[0; 64]);
        vec![(area(n), 32, true), (area(n) + 32, 32, true)]
    }

    fn check(&self, ram: &Ram, count: u32) {
        let mut all: Vec<_> = (0..count).map(|n| get(ram, area(n), 64)).collect();
        assert!(all.iter().all(|bytes| bytes[..32] != [0; 32]));
        assert!(all.iter().all(|bytes| bytes[32..] != [0; 32]));
        all.sort();
        all.dedup();
        assert_eq!(all.len(), count as usize, "no two alike");
    }
}

/// A packet's header: guest's port, host's port, operation, length.
pub fn vsock_header(guest: u32, host: u32, op: u16, len: u32) -> Vec<u8> {
    let mut header = VSOCK_CID.to_le_bytes().to_vec();
    header.extend(2u64.to_le_bytes());
    header.extend([guest, host, len].map(u32::to_le_bytes).concat());
    header.extend([1, op].map(u16::to_le_bytes).concat());
    // Flags, room, bytes taken.
    header.extend([0, 64 << 10, 0].map(u32::to_le_bytes).concat());
    header
}

pub const VSOCK_CID: u64 = 5;
const VSOCK_PORT: u32 = 1024;

/// Request `n` connects from the guest's port `n` to a program that waits for
/// it on the host; each of these sees one connection at most.
pub struct VsockSubject {
    folder: tempfile::TempDir,
    listener: UnixListener,
    waiting: RefCell<Vec<UnixStream>>,
    seen: RefCell<Vec<u32>>,
}

impl VsockSubject {
    pub fn program(&self, line: &str) -> UnixStream {
        let mut program = UnixStream::connect(self.folder.path().join("s")).expect("connect");
        program.write_all(line.as_bytes()).expect("say");
        program
    }
}

/// The number of an `OK` line, if it has come.
fn granted(program: &mut UnixStream) -> Option<u32> {
    program.set_nonblocking(true).expect("non-blocking");
    let mut line = [0; 32];
    let len = program.read(&mut line).ok().filter(|len| *len > 0)?;
    let line = std::str::from_utf8(&line[..len]).expect("text");
    let number = line.strip_prefix("OK ").and_then(|l| l.strip_suffix('\n'));
    Some(number.expect("an OK line").parse().expect("a port"))
}

impl Subject for VsockSubject {
    const QUEUE: u16 = 1;

    fn new() -> Self {
        let folder = tempfile::tempdir().expect("folder");
        let listener = UnixListener::bind(folder.path().join("s")).expect("listen");
        Self {
            folder,
            listener,
            waiting: RefCell::default(),
            seen: RefCell::default(),
        }
    }

    /// With programs that wait: those of a former VMM are gone.
    fn kind(&self) -> DeviceKind {
        let host = self.listener.try_clone().and_then(VsockHost::new);
        let host = host.expect("host's side");
        let mut waiting = self.waiting.borrow_mut();
        waiting.extend((0..20).map(|_| self.program(&format!("LISTEN {VSOCK_PORT}\n"))));
        DeviceKind::Vsock {
            host,
            cid: VSOCK_CID,
        }
    }

    fn prepare(&self, ram: &Ram, n: u32) -> Vec<Buffer> {
        put(ram, area(n), &vsock_header(n, VSOCK_PORT, 1, 0));
        vec![(area(n), 16, false), (area(n) + 16, 28, false)]
    }

    fn check(&self, _ram: &Ram, count: u32) {
        let mut seen = self.seen.borrow_mut();
        let mut waiting = self.waiting.borrow_mut();
        // Kept when they were seen: a program that hangs up ends its connection.
        seen.extend(waiting.iter_mut().filter_map(granted));
        seen.sort_unstable();
        assert_eq!(*seen, (0..count).collect::<Vec<_>>());
    }
}

/// Notes what it is given, and gives what it is told to.
#[derive(Default)]
pub struct Taker {
    pub taken: Mutex<Vec<(u64, u64)>>,
    /// Refuses, as a kernel that is about to carry this memory.
    pub refuses: std::sync::atomic::AtomicBool,
}

impl Taker {
    pub fn ranges(&self) -> Vec<(u64, u64)> {
        self.taken.lock().expect("ranges").clone()
    }
}

impl Reclaim for Taker {
    fn give_back(&self, addr: u64, len: u64) -> std::io::Result<u64> {
        if self.refuses.load(std::sync::atomic::Ordering::SeqCst) {
            return Err(std::io::ErrorKind::PermissionDenied.into());
        }
        self.taken.lock().expect("ranges").push((addr, len));
        Ok(len)
    }
}

/// Request `n` puts two neighbouring pages and a lone one into the balloon.
pub struct BalloonSubject {
    pub taker: Arc<Taker>,
}

impl BalloonSubject {
    fn first_page(n: u32) -> u32 {
        0xc00 + n % 64 * 8
    }

    pub fn with(deflate_on_oom: bool, reporting: bool, taker: &Arc<Taker>) -> DeviceKind {
        DeviceKind::Balloon {
            reclaim: taker.clone(),
            ram: crate::common::RAM_LEN as u64,
            deflate_on_oom,
            reporting,
        }
    }
}

impl Subject for BalloonSubject {
    const QUEUE: u16 = 0;

    fn new() -> Self {
        let taker = Arc::default();
        Self { taker }
    }

    fn kind(&self) -> DeviceKind {
        Self::with(true, true, &self.taker)
    }

    fn prepare(&self, ram: &Ram, n: u32) -> Vec<Buffer> {
        let first = Self::first_page(n);
        let pages = [first + 4, first + 1, first];
        put(ram, area(n), &pages.map(u32::to_le_bytes).concat());
        vec![(area(n), 4, false), (area(n) + 4, 8, false)]
    }

    fn check(&self, _ram: &Ram, count: u32) {
        let each = |n| {
            let at = u64::from(Self::first_page(n)) * 4096;
            [(at, 8192), (at + 4 * 4096, 4096)]
        };
        let wanted: Vec<_> = (0..count).flat_map(each).collect();
        assert_eq!(self.taker.ranges(), wanted);
    }
}
