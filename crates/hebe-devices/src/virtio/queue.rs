//! Split virtqueues that trust nothing the guest wrote.
//!
//! Ring indices are handled by `virtio-queue`; chains are walked here, because
//! a chain that breaks the rules must stop the device with a reason, and not
//! just end. Every segment is checked to lie in guest RAM before a device
//! sees it.

use std::sync::atomic::{Ordering, fence};

use hebe_state::v1::devices::QueueV1;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::ram::{Cursor, MeteredRam, Segment};

/// Most entries of a queue, and what a queue offers at first.
pub(crate) const QUEUE_SIZE_MAX: u16 = 256;

/// Most segments of one chain, direct or indirect.
pub(crate) const CHAIN_SEGMENTS_MAX: usize = QUEUE_SIZE_MAX as usize;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (virtio 1.2, 2.7.7).
const AVAIL_NO_INTERRUPT: u16 = 1;

/// Bytes of a descriptor.
const DESCRIPTOR_LEN: u64 = 16;

/// How a guest broke the rules of a queue. The device stops with this.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum QueueError {
    #[error("queue size {0} is not a power of two from 1 to {QUEUE_SIZE_MAX}")]
    Size(u16),
    #[error("the {what} at {addr:#x} is not aligned")]
    Unaligned { what: &'static str, addr: u64 },
    #[error("the {what} at {addr:#x} is not in guest RAM")]
    RingOutside { what: &'static str, addr: u64 },
    #[error("the available ring's index jumped by more than the queue size")]
    RingIndex,
    #[error("the ring names descriptor {0}, which the table does not have")]
    Index(u16),
    #[error("a descriptor chain loops")]
    Loop,
    #[error("a descriptor chain has more than {CHAIN_SEGMENTS_MAX} segments")]
    TooLong,
    #[error("an indirect descriptor breaks the rules: {0}")]
    Indirect(&'static str),
    #[error("a descriptor has length 0")]
    Empty,
    #[error("a descriptor chain has a readable segment after a writable one")]
    Order,
    #[error("a descriptor names {len} bytes at {addr:#x}, which is not guest RAM")]
    Outside { addr: u64, len: u32 },
    #[error("guest RAM at {0:#x} cannot be reached")]
    Access(u64),
    #[error("the ring cannot be reached")]
    Ring,
}

/// One request of the driver: a descriptor chain, walked and checked.
#[derive(Debug)]
pub(crate) struct Chain {
    pub(crate) head: u16,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
}

impl Chain {
    /// What the device reads.
    pub(crate) fn readable(&self) -> Cursor<'_> {
        Cursor::new(&self.readable)
    }

    /// What the device writes.
    pub(crate) fn writable(&self) -> Cursor<'_> {
        Cursor::new(&self.writable)
    }

    /// The places that the device may write, as the driver gave them.
    pub(crate) fn writable_segments(&self) -> &[Segment] {
        &self.writable
    }

    /// The chain itself, to be kept while its request is under way; what is left
    /// names nothing.
    pub(crate) fn take(&mut self) -> Self {
        Self {
            head: self.head,
            readable: std::mem::take(&mut self.readable),
            writable: std::mem::take(&mut self.writable),
        }
    }

    /// Takes the last writable byte off: where a block request's status goes.
    pub(crate) fn split_last_writable(&mut self) -> Option<GuestAddress> {
        let last = self.writable.last_mut()?;
        last.len -= 1;
        let addr = GuestAddress(last.addr.0 + u64::from(last.len));
        if last.len == 0 {
            self.writable.pop();
        }
        Some(addr)
    }
}

/// One queue in use.
pub(crate) struct VirtQueue {
    queue: Queue,
    ram: MeteredRam,
    indirect: bool,
    /// Something was put into the used ring since the driver was told.
    unsignalled: bool,
}

impl VirtQueue {
    /// Takes a queue into use as the driver, or a saved state, describes it.
    pub(crate) fn new(
        regs: &QueueV1,
        event_idx: bool,
        indirect: bool,
        ram: MeteredRam,
    ) -> Result<Self, QueueError> {
        check_rings(regs, &ram)?;
        let mut queue = Queue::new(QUEUE_SIZE_MAX).map_err(|_| QueueError::Ring)?;
        let (desc, avail, used) = (
            GuestAddress(regs.desc),
            GuestAddress(regs.avail),
            GuestAddress(regs.used),
        );
        queue
            .try_set_size(regs.size)
            .and_then(|()| queue.try_set_desc_table_address(desc))
            .and_then(|()| queue.try_set_avail_ring_address(avail))
            .and_then(|()| queue.try_set_used_ring_address(used))
            .map_err(|_| QueueError::Ring)?;
        queue.set_event_idx(event_idx);
        queue.set_next_avail(regs.next_avail);
        queue.set_next_used(regs.next_used);
        queue.set_ready(true);
        Ok(Self {
            queue,
            ram,
            indirect,
            unsignalled: false,
        })
    }

    pub(crate) fn ram(&self) -> &MeteredRam {
        &self.ram
    }

    pub(crate) fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The indices that a saved state keeps: next available, next used.
    pub(crate) fn indices(&self) -> (u16, u16) {
        (self.queue.next_avail(), self.queue.next_used())
    }

    /// Takes the next chain, walked and checked; `None` when the ring is empty.
    pub(crate) fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        self.ram.meter().ring(2);
        let head = {
            let mut heads = self
                .queue
                .iter(self.ram.raw())
                .map_err(|_| QueueError::RingIndex)?;
            match heads.next() {
                Some(chain) => chain.head_index(),
                None => return Ok(None),
            }
        };
        self.ram.meter().ring(2);
        if head >= self.queue.size() {
            return Err(QueueError::Index(head));
        }
        self.walk(head).map(Some)
    }

    /// Puts the chain taken last back, as if it had not been taken.
    pub(crate) fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a chain back to the driver, with `len` bytes written into it.
    pub(crate) fn push_used(&mut self, head: u16, len: u32) -> Result<(), QueueError> {
        self.ram.meter().ring(10);
        self.unsignalled = true;
        self.queue
            .add_used(self.ram.raw(), head, len)
            .map_err(|_| QueueError::Ring)
    }

    /// Asks the driver for kicks; true if the ring is not empty after all.
    pub(crate) fn enable_kicks(&mut self) -> Result<bool, QueueError> {
        self.ram.meter().ring(4);
        self.queue
            .enable_notification(self.ram.raw())
            .map_err(|_| QueueError::Ring)
    }

    /// Tells the driver that kicks are not needed for now.
    pub(crate) fn disable_kicks(&mut self) -> Result<(), QueueError> {
        self.ram.meter().ring(2);
        self.queue
            .disable_notification(self.ram.raw())
            .map_err(|_| QueueError::Ring)
    }

    /// True if the driver wants an interrupt for what was pushed since the
    /// last call (virtio 1.2, 2.7.7.2 and 2.7.10).
    pub(crate) fn wants_interrupt(&mut self) -> Result<bool, QueueError> {
        if !std::mem::take(&mut self.unsignalled) {
            return Ok(false);
        }
        self.ram.meter().ring(2);
        if !self.queue.event_idx_enabled() {
            fence(Ordering::SeqCst);
            let flags: u16 = self
                .ram
                .raw()
                .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
                .map_err(|_| QueueError::Ring)?;
            return Ok(u16::from_le(flags) & AVAIL_NO_INTERRUPT == 0);
        }
        self.queue
            .needs_notification(self.ram.raw())
            .map_err(|_| QueueError::Ring)
    }

    fn descriptor(&self, table: u64, index: u16) -> Result<Descriptor, QueueError> {
        self.ram.meter().ring(DESCRIPTOR_LEN);
        let addr = table
            .checked_add(u64::from(index) * DESCRIPTOR_LEN)
            .ok_or(QueueError::Ring)?;
        self.ram
            .raw()
            .read_obj(GuestAddress(addr))
            .map_err(|_| QueueError::Access(addr))
    }

    /// Walks a chain. Bounded: a table of n entries yields at most n steps.
    fn walk(&self, head: u16) -> Result<Chain, QueueError> {
        let mut chain = Chain {
            head,
            readable: Vec::new(),
            writable: Vec::new(),
        };
        let mut table = (self.queue.desc_table(), self.queue.size());
        let mut indirect = false;
        let mut index = head;
        let mut steps = 0;
        loop {
            if index >= table.1 {
                return Err(QueueError::Index(index));
            }
            steps += 1;
            if steps > table.1 {
                return Err(QueueError::Loop);
            }
            let descriptor = self.descriptor(table.0, index)?;
            if descriptor.refers_to_indirect_table() {
                table = self.indirect_table(&descriptor, indirect)?;
                (indirect, index, steps) = (true, 0, 0);
                continue;
            }
            self.take_segment(&mut chain, &descriptor)?;
            if !descriptor.has_next() {
                return Ok(chain);
            }
            index = descriptor.next();
        }
    }

    fn indirect_table(
        &self,
        descriptor: &Descriptor,
        nested: bool,
    ) -> Result<(u64, u16), QueueError> {
        let (addr, len) = (descriptor.addr(), descriptor.len());
        if !self.indirect {
            return Err(QueueError::Indirect("it was not negotiated"));
        }
        if nested {
            return Err(QueueError::Indirect("it is in an indirect table"));
        }
        if descriptor.has_next() {
            return Err(QueueError::Indirect("it has a successor"));
        }
        if len == 0 || u64::from(len) % DESCRIPTOR_LEN != 0 {
            return Err(QueueError::Indirect("its table is not whole descriptors"));
        }
        let entries = u64::from(len) / DESCRIPTOR_LEN;
        let entries = u16::try_from(entries).map_err(|_| QueueError::TooLong)?;
        if !self.ram.contains(addr, u64::from(len)) {
            return Err(QueueError::Outside { addr: addr.0, len });
        }
        Ok((addr.0, entries))
    }

    fn take_segment(&self, chain: &mut Chain, descriptor: &Descriptor) -> Result<(), QueueError> {
        let segment = Segment {
            addr: descriptor.addr(),
            len: descriptor.len(),
        };
        if segment.len == 0 {
            return Err(QueueError::Empty);
        }
        if !self.ram.contains(segment.addr, u64::from(segment.len)) {
            return Err(QueueError::Outside {
                addr: segment.addr.0,
                len: segment.len,
            });
        }
        if chain.readable.len() + chain.writable.len() == CHAIN_SEGMENTS_MAX {
            return Err(QueueError::TooLong);
        }
        if descriptor.is_write_only() {
            chain.writable.push(segment);
        } else if chain.writable.is_empty() {
            chain.readable.push(segment);
        } else {
            return Err(QueueError::Order);
        }
        Ok(())
    }
}

fn check_rings(regs: &QueueV1, ram: &MeteredRam) -> Result<(), QueueError> {
    let size = regs.size;
    if !size.is_power_of_two() || size > QUEUE_SIZE_MAX {
        return Err(QueueError::Size(size));
    }
    let entries = u64::from(size);
    // Sizes with the event index at the end (virtio 1.2, 2.7).
    let rings = [
        ("descriptor table", regs.desc, 16, DESCRIPTOR_LEN * entries),
        ("available ring", regs.avail, 2, 6 + 2 * entries),
        ("used ring", regs.used, 4, 6 + 8 * entries),
    ];
    for (what, addr, align, len) in rings {
        if !addr.is_multiple_of(align) {
            return Err(QueueError::Unaligned { what, addr });
        }
        // `virtio-queue` takes an available ring at 0 for an unset one.
        if addr == 0 || !ram.contains(GuestAddress(addr), len) {
            return Err(QueueError::RingOutside { what, addr });
        }
    }
    Ok(())
}
