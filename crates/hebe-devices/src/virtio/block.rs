//! Block device (virtio 1.2, 5.2) on a [`BlockBackend`].
//!
//! Write-back: a write is durable after the next flush that the guest asks
//! for, or at pause. A driver that did not accept the flush feature cannot
//! ask, so each of its writes is flushed.
//!
//! A driver may use several queues, so that its processors do not wait for
//! each other's ring and get their own interrupts. One worker serves them all.
//!
//! What is in the host's page cache is copied, and writes go there. A read that
//! must wait for the disk is put under way where the back end can
//! ([`BlockBackend::open_ring`]), into a buffer of the VMM's; it goes into the
//! guest's RAM when it has ended, by the worker, if its queue still wants it:
//! not after a reset, nor when the device stopped. Everything else is carried
//! out one by one. A pause waits for the request in hand and the reads that are
//! under way, whatever the number of queues.
//!
//! Requests may end in any order (virtio 1.2, 2.7.4). A flush makes durable what
//! was written before it (5.2.6.2): each write has ended by then.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Instant;

use hebe_block::{BlockBackend, READS_MAX, SECTOR_SIZE, disk_change};
use hebe_state::v2::devices::{BlockV2, DeviceV2};
use vm_memory::GuestAddress;

use super::device::{Counters, Device, Next, Queues, Served, Stop};
use super::error::DeviceError;
use super::queue::{CHAIN_SEGMENTS_MAX, Chain, QueueError, VirtQueue};
use super::ram::{Cursor, MeteredRam, Segment};
use super::shared::Shared;

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

const HEADER_LEN: usize = 16;
const ID_LEN: usize = 20;
/// Header and status take a segment each.
const SEG_MAX: u32 = CHAIN_SEGMENTS_MAX as u32 - 2;
/// Bytes copied at a time.
const CHUNK: usize = 256 << 10;
/// Most bytes of one request: bounds how long a pause waits for it.
const REQUEST_MAX: u64 = 64 << 20;
/// Most queues of one disk: more than a VM can have processors are of no use.
pub const BLOCK_QUEUES_MAX: usize = hebe_types::VCPUS_MAX as usize;
/// A range to discard or to zero: first sector, sectors, flags.
const RANGE_LEN: usize = 16;
/// Most of them in one request.
const RANGES_MAX: usize = 16;
/// Most sectors of one range.
const RANGE_SECTORS_MAX: u32 = (REQUEST_MAX / SECTOR_SIZE) as u32;
/// What discarded ranges are best aligned to, in sectors.
const DISCARD_ALIGN: u32 = 8;
/// The flag of a range: its room may be given back.
const UNMAP: u32 = 1;

pub(crate) struct Block {
    backend: Arc<BlockBackend>,
    queues: usize,
    id: [u8; ID_LEN],
    /// The driver cannot ask for a flush.
    write_through: bool,
    chunk: Vec<u8>,
    /// Reads that are under way, by the back end's numbers; `None` for those of
    /// which no queue is to hear.
    pending: Vec<Option<Pending>>,
    /// Queues in which a read waits for room: a bit for each.
    waiting: u64,
    requests: u64,
    failed: u64,
}

/// A read that is under way.
struct Pending {
    queue: usize,
    chain: Chain,
    status_at: GuestAddress,
    began: Instant,
}

/// What became of a read that was tried.
enum Tried {
    Done(Outcome),
    UnderWay(usize),
    /// There is no room, and there will be.
    Later,
    /// It is to be carried out by itself.
    Alone,
}

/// A request's outcome: a status, and data bytes written into the chain.
struct Outcome {
    status: u8,
    written: u32,
}

impl Outcome {
    fn status(status: u8) -> Self {
        Self { status, written: 0 }
    }
}

impl Block {
    /// With so many queues, as far as that is possible.
    pub(crate) fn new(backend: BlockBackend, queues: usize, slot: u8) -> Self {
        let mut id = [0; ID_LEN];
        let text = format!("hebe-disk-{slot}");
        id[..text.len()].copy_from_slice(text.as_bytes());
        Self {
            backend: Arc::new(backend),
            queues: queues.clamp(1, BLOCK_QUEUES_MAX),
            id,
            write_through: false,
            chunk: vec![0; CHUNK],
            pending: (0..READS_MAX).map(|_| None).collect(),
            waiting: 0,
            requests: 0,
            failed: 0,
        }
    }

    /// Refuses a disk that changed: the guest's view of it would be wrong, and
    /// its memory would destroy what is on it. One that has grown keeps the
    /// size that the guest knows until the guest boots again, and so does the
    /// number of `queues`, which is that of the state.
    pub(crate) fn restore(
        state: &BlockV2,
        backend: BlockBackend,
        queues: usize,
        slot: u8,
    ) -> Result<Self, DeviceError> {
        if !(1..=BLOCK_QUEUES_MAX).contains(&queues) {
            return Err(DeviceError::State {
                slot,
                reason: "its disk has a number of queues that none has",
            });
        }
        let found = backend.sectors();
        if found < state.sectors {
            return Err(DeviceError::Disk {
                slot,
                saved: state.sectors,
                found,
            });
        }
        if backend.readonly() != state.readonly {
            return Err(DeviceError::State {
                slot,
                reason: "the disk was writable and is read-only now, or the other way round",
            });
        }
        if let Some(saved) = &state.identity {
            let host = |source| DeviceError::Host { slot, source };
            let found = backend.identity().map_err(host)?;
            if let Some(how) = disk_change(saved, &found) {
                return Err(DeviceError::DiskChanged {
                    slot,
                    path: backend.path().to_owned(),
                    how,
                });
            }
        }
        Ok(Self::new(backend.as_known(state.sectors), queues, slot))
    }

    fn serve(
        &mut self,
        index: usize,
        queue: &mut VirtQueue,
        chain: &mut Chain,
        shared: &Shared,
    ) -> Result<Served, Stop> {
        let broken = |error| Stop::Queue {
            queue: index,
            error,
        };
        let Some(status_at) = chain.split_last_writable() else {
            return Err(Stop::Request {
                queue: index,
                reason: "a block request has no room for its status",
            });
        };
        let mut header = [0; HEADER_LEN];
        let mut readable = chain.readable();
        if readable.read(queue.ram(), &mut header).map_err(broken)? < HEADER_LEN {
            return Err(Stop::Request {
                queue: index,
                reason: "a block request is shorter than its header",
            });
        }
        let began = Instant::now();
        let tried = self.try_read(&header, chain, queue.ram());
        let outcome = match tried.map_err(broken)? {
            Tried::Done(outcome) => outcome,
            Tried::UnderWay(number) => {
                self.pending[number] = Some(Pending {
                    queue: index,
                    chain: chain.take(),
                    status_at,
                    began,
                });
                return Ok(Served::UnderWay);
            }
            Tried::Later => {
                self.waiting |= 1 << index;
                return Ok(Served::Later);
            }
            Tried::Alone => {
                if matches!(kind_of(&header), T_FLUSH | T_DISCARD | T_WRITE_ZEROES) {
                    self.make_way(queue, shared, index).map_err(broken)?;
                }
                self.execute(&header, readable, chain.writable(), queue.ram())
                    .map_err(broken)?
            }
        };
        let len = self.answer(&outcome, status_at, began, queue.ram());
        len.map(Served::Done).map_err(broken)
    }

    /// Before what may take long: what is prepared begins, and the driver hears
    /// of what has ended.
    fn make_way(
        &self,
        queue: &mut VirtQueue,
        shared: &Shared,
        index: usize,
    ) -> Result<(), QueueError> {
        // What could not be sent is seen to when the queue is through.
        let _ = self.backend.send_reads();
        if queue.wants_interrupt()? {
            shared.queue_interrupt(index);
        }
        Ok(())
    }

    /// Counts the request, writes its status and returns how many bytes of the
    /// chain were written.
    fn answer(
        &mut self,
        outcome: &Outcome,
        status_at: GuestAddress,
        began: Instant,
        ram: &MeteredRam,
    ) -> Result<u32, QueueError> {
        ram.meter().took(began.elapsed());
        self.requests += 1;
        self.failed += u64::from(outcome.status != S_OK);
        let status = [Segment {
            addr: status_at,
            len: 1,
        }];
        Cursor::new(&status).write(ram, &[outcome.status])?;
        Ok(outcome.written + 1)
    }

    /// Reads what need not be waited for, or puts it under way.
    fn try_read(
        &mut self,
        header: &[u8; HEADER_LEN],
        chain: &Chain,
        ram: &MeteredRam,
    ) -> Result<Tried, QueueError> {
        if kind_of(header) != T_IN || !self.backend.has_ring() {
            return Ok(Tried::Alone);
        }
        let mut to = chain.writable();
        let extent = self.extent(sector_of(header), to.remaining());
        let Some((offset, len)) = extent.filter(|(_, len)| (1..=CHUNK).contains(len)) else {
            return Ok(Tried::Alone);
        };
        let piece = &mut self.chunk[..len];
        if self.backend.read_cached(piece, offset) {
            to.write(ram, piece)?;
            return Ok(Tried::Done(Outcome {
                status: S_OK,
                written: len as u32,
            }));
        }
        Ok(match self.backend.begin_read(len, offset) {
            Some(number) => Tried::UnderWay(number),
            // One that ends has this queue looked at again.
            None if self.backend.reads_under_way() > 0 => Tried::Later,
            None => Tried::Alone,
        })
    }

    /// Answers the reads that have ended.
    fn take_ended(&mut self, queues: &mut Queues) -> Result<(), Stop> {
        while let Some((number, read)) = self.backend.ended_read() {
            let Some(pending) = self.pending[number].take() else {
                continue;
            };
            queues.give_back(pending.queue, |queue| {
                let outcome = match &read {
                    Ok(data) => Outcome {
                        status: S_OK,
                        written: pending.chain.writable().write(queue.ram(), data)? as u32,
                    },
                    Err(_) => Outcome::status(S_IOERR),
                };
                let (at, began) = (pending.status_at, pending.began);
                let len = self.answer(&outcome, at, began, queue.ram())?;
                Ok((pending.chain.head, len))
            })?;
        }
        for index in 0..self.queues {
            queues.tell(index)?;
            if self.waiting >> index & 1 != 0 {
                queues.look_again(index);
            }
        }
        self.waiting = 0;
        Ok(())
    }

    fn execute(
        &mut self,
        header: &[u8; HEADER_LEN],
        readable: Cursor<'_>,
        mut writable: Cursor<'_>,
        ram: &MeteredRam,
    ) -> Result<Outcome, QueueError> {
        let sector = sector_of(header);
        match kind_of(header) {
            T_IN => match self.extent(sector, writable.remaining()) {
                Some((offset, len)) => self.read(offset, len, writable, ram),
                None => Ok(Outcome::status(S_IOERR)),
            },
            T_OUT => match self.extent(sector, readable.remaining()) {
                Some((offset, len)) => self.write(offset, len, readable, ram),
                None => Ok(Outcome::status(S_IOERR)),
            },
            T_FLUSH => Ok(Outcome::status(status_of(self.backend.flush()))),
            kind @ (T_DISCARD | T_WRITE_ZEROES) => self.clear(kind, readable, ram),
            T_GET_ID => {
                let written = writable.write(ram, &self.id)? as u32;
                let status = if written == ID_LEN as u32 {
                    S_OK
                } else {
                    S_IOERR
                };
                Ok(Outcome { status, written })
            }
            _ => Ok(Outcome::status(S_UNSUPP)),
        }
    }

    /// Byte offset and length of a request that lies on the disk.
    fn extent(&self, sector: u64, len: u64) -> Option<(u64, usize)> {
        let offset = sector.checked_mul(SECTOR_SIZE)?;
        let end = offset.checked_add(len)?;
        let capacity = self.backend.sectors().checked_mul(SECTOR_SIZE)?;
        let sane = len.is_multiple_of(SECTOR_SIZE) && len <= REQUEST_MAX && end <= capacity;
        sane.then_some((offset, usize::try_from(len).ok()?))
    }

    /// Discards or zeroes the ranges that the request holds, one by one; the
    /// first that fails is the answer.
    fn clear(
        &mut self,
        kind: u32,
        mut readable: Cursor<'_>,
        ram: &MeteredRam,
    ) -> Result<Outcome, QueueError> {
        let mut bytes = [0; RANGE_LEN * RANGES_MAX];
        let len = readable.remaining() as usize;
        if len == 0 || len > bytes.len() || !len.is_multiple_of(RANGE_LEN) {
            return Ok(Outcome::status(S_IOERR));
        }
        readable.read(ram, &mut bytes[..len])?;
        for range in bytes[..len].as_chunks::<RANGE_LEN>().0 {
            let status = self.clear_range(kind, range);
            if status != S_OK {
                return Ok(Outcome::status(status));
            }
        }
        if self.write_through {
            return Ok(Outcome::status(status_of(self.backend.flush())));
        }
        Ok(Outcome::status(S_OK))
    }

    fn clear_range(&self, kind: u32, range: &[u8; RANGE_LEN]) -> u8 {
        let [a, b, c, d, e, f, g, h, i, j, k, l, flags @ ..] = *range;
        let sector = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        let sectors = u32::from_le_bytes([i, j, k, l]);
        let flags = u32::from_le_bytes(flags);
        // Virtio 1.2, 5.2.6.2: only zeroing knows a flag, and only this one.
        if flags & !UNMAP != 0 || (kind == T_DISCARD && flags != 0) {
            return S_UNSUPP;
        }
        let extent = self.extent(sector, u64::from(sectors) * SECTOR_SIZE);
        let Some((offset, len)) = extent.filter(|_| sectors <= RANGE_SECTORS_MAX) else {
            return S_IOERR;
        };
        let len = len as u64;
        let cleared = match kind {
            T_DISCARD => self.backend.discard(offset, len),
            _ => self.backend.write_zeroes(offset, len, flags & UNMAP != 0),
        };
        match cleared {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => S_UNSUPP,
            other => status_of(other),
        }
    }

    fn read(
        &mut self,
        offset: u64,
        len: usize,
        mut to: Cursor<'_>,
        ram: &MeteredRam,
    ) -> Result<Outcome, QueueError> {
        let mut done = 0;
        while done < len {
            let piece = &mut self.chunk[..CHUNK.min(len - done)];
            if self.backend.read_at(piece, offset + done as u64).is_err() {
                return Ok(Outcome {
                    status: S_IOERR,
                    written: done as u32,
                });
            }
            done += to.write(ram, piece)?;
        }
        Ok(Outcome {
            status: S_OK,
            written: len as u32,
        })
    }

    fn write(
        &mut self,
        offset: u64,
        len: usize,
        mut from: Cursor<'_>,
        ram: &MeteredRam,
    ) -> Result<Outcome, QueueError> {
        let mut done = 0;
        while done < len {
            let piece = &mut self.chunk[..CHUNK.min(len - done)];
            from.read(ram, piece)?;
            if self.backend.write_at(piece, offset + done as u64).is_err() {
                return Ok(Outcome::status(S_IOERR));
            }
            done += piece.len();
        }
        if self.write_through {
            return Ok(Outcome::status(status_of(self.backend.flush())));
        }
        Ok(Outcome::status(S_OK))
    }
}

/// The request's kind (virtio 1.2, 5.2.6).
fn kind_of(header: &[u8; HEADER_LEN]) -> u32 {
    let [a, b, c, d, ..] = *header;
    u32::from_le_bytes([a, b, c, d])
}

fn sector_of(header: &[u8; HEADER_LEN]) -> u64 {
    let [_, _, _, _, _, _, _, _, sector @ ..] = *header;
    u64::from_le_bytes(sector)
}

fn status_of(result: io::Result<()>) -> u8 {
    if result.is_ok() { S_OK } else { S_IOERR }
}

impl Device for Block {
    fn features(&self) -> u64 {
        let by_use = match self.backend.readonly() {
            true => F_RO,
            // Whatever the host can: a guest keeps what it was offered.
            false => F_DISCARD | F_WRITE_ZEROES,
        };
        let several = if self.queues > 1 { F_MQ } else { 0 };
        F_SEG_MAX | F_BLK_SIZE | F_FLUSH | by_use | several
    }

    fn queues(&self) -> usize {
        self.queues
    }

    /// `struct virtio_blk_config` up to `write_zeroes_may_unmap`.
    fn config(&self) -> Vec<u8> {
        let mut config = self.backend.sectors().to_le_bytes().to_vec();
        config.extend_from_slice(&0u32.to_le_bytes());
        config.extend_from_slice(&SEG_MAX.to_le_bytes());
        config.extend_from_slice(&[0; 4]);
        config.extend_from_slice(&(SECTOR_SIZE as u32).to_le_bytes());
        // Topology and write-back: not offered.
        config.extend_from_slice(&[0; 10]);
        let several = if self.queues > 1 {
            self.queues as u16
        } else {
            0
        };
        config.extend_from_slice(&several.to_le_bytes());
        let (ranges, sectors) = (RANGES_MAX as u32, RANGE_SECTORS_MAX);
        for word in [sectors, ranges, DISCARD_ALIGN, sectors, ranges] {
            config.extend_from_slice(&word.to_le_bytes());
        }
        config.extend_from_slice(&[1, 0, 0, 0]);
        config
    }

    fn activate(&mut self, features: u64) {
        self.write_through = features & F_FLUSH == 0;
    }

    fn reset(&mut self) {
        self.forget();
    }

    fn forget(&mut self) {
        self.pending.iter_mut().for_each(|pending| *pending = None);
        self.waiting = 0;
    }

    fn under_way(&self) -> usize {
        self.backend.reads_under_way()
    }

    fn end(&mut self) {
        self.forget();
        self.backend.await_reads();
    }

    fn kicked(&mut self, index: usize, queues: &mut Queues) -> Result<Next, Stop> {
        let shared = queues.shared();
        let next = queues.serve(index, |queue, chain| {
            self.serve(index, queue, chain, &shared)
        });
        // Also where the queue broke the rules: whoever pauses waits for them.
        if self.backend.send_reads().is_err() {
            self.take_ended(queues)?;
        }
        next
    }

    fn backend(&self) -> Option<RawFd> {
        self.backend.reads_ended()
    }

    fn backend_ready(&mut self, queues: &mut Queues) -> Result<Next, Stop> {
        self.take_ended(queues)?;
        Ok(Next::Wait)
    }

    fn disk(&self) -> Option<Arc<BlockBackend>> {
        Some(Arc::clone(&self.backend))
    }

    fn counters(&self) -> Counters {
        Counters {
            requests: self.requests,
            bytes_in: self.backend.bytes_read(),
            bytes_out: self.backend.bytes_written(),
            dropped: self.failed,
        }
    }

    fn save(&self) -> io::Result<DeviceV2> {
        Ok(DeviceV2::Block(BlockV2 {
            sectors: self.backend.sectors(),
            readonly: self.backend.readonly(),
            identity: Some(self.backend.identity()?),
        }))
    }
}
