//! NIC (virtio 1.2, 5.1) on a tap or a stream of frames.
//!
//! On a tap the driver may leave checksums and the cutting of TCP segments to
//! whoever needs them, if anybody does: its virtio-net header is checked and
//! passed on to the kernel, and the kernel's to it, as far as both agreed. What
//! was agreed is part of the saved state, as the features that the driver
//! accepted; a resume tells the new tap. A stream has no offloads, and headers
//! that are all zero.

use std::io;
use std::os::fd::RawFd;

use hebe_state::v1::devices::NetV1;
use hebe_state::v2::devices::DeviceV2;
use hebe_sys::tap::Offloads;
use hebe_types::{MacAddr, Stamp};

use super::device::{Counters, Device, Next, Queues, Served, Stop};
use super::queue::{Chain, QueueError, VirtQueue};
use super::shared::Shared;
use super::wire::{FRAME_MAX, HEADER_LEN, NetBackend, Received};
use crate::announce::{Neighbours, announcements};

const F_CSUM: u64 = 1;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_MAC: u64 = 1 << 5;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;
const F_CTRL_VQ: u64 = 1 << 17;
const F_GUEST_ANNOUNCE: u64 = 1 << 21;

/// What every kernel's tap can do.
const OFFLOADS: u64 =
    F_CSUM | F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_HOST_TSO4 | F_HOST_TSO6;

const S_LINK_UP: u16 = 1;
const S_ANNOUNCE: u16 = 2;

const CTRL_ANNOUNCE: u8 = 3;
const CTRL_ANNOUNCE_ACK: u8 = 0;
const CTRL_OK: u8 = 0;
const CTRL_ERR: u8 = 1;

const RX: usize = 0;
const TX: usize = 1;
const CTRL: usize = 2;

/// Where `num_buffers` is in the header.
const NUM_BUFFERS_AT: usize = 10;
/// Longest frame and its header.
const ROOM: usize = HEADER_LEN + FRAME_MAX;
/// Frames dropped in a row before anything else has its turn.
const DROPS_MAX: usize = 64;
/// A NIC has nothing behind it any more.
const LOST: &str = "its network is gone (passt ended, or the tap was removed): suspend and resume the VM to connect it again";
/// An Ethernet header.
const ETHERNET_LEN: usize = 14;

pub(crate) struct Net {
    wire: NetBackend,
    /// The wire failed: it is not asked again.
    wire_gone: bool,
    /// It failed, and nobody was told.
    loss_untold: bool,
    mac: MacAddr,
    status: u16,
    /// What the driver accepted; 0 before it did.
    features: u64,
    neighbours: Neighbours,
    /// The receive queue had a buffer when it was last looked at.
    has_room: bool,
    first_tx: Option<Stamp>,
    /// What is being sent.
    out: Vec<u8>,
    /// What came.
    come: Vec<u8>,
    /// Length of a frame in `come` that waits for buffers.
    waiting: Option<usize>,
    counters: Counters,
}

impl Net {
    pub(crate) fn new(wire: NetBackend, mac: MacAddr) -> Self {
        Self {
            wire,
            wire_gone: false,
            loss_untold: false,
            mac,
            status: S_LINK_UP,
            features: 0,
            neighbours: Neighbours::default(),
            has_room: false,
            first_tx: None,
            out: vec![0; ROOM],
            come: vec![0; ROOM],
            waiting: None,
            counters: Counters::default(),
        }
    }

    /// The address is the saved one: the guest knows it.
    pub(crate) fn restore(state: &NetV1, wire: NetBackend) -> Self {
        Self {
            status: state.status & (S_LINK_UP | S_ANNOUNCE),
            neighbours: Neighbours::restore(&state.ipv4),
            ..Self::new(wire, MacAddr(state.mac))
        }
    }

    fn accepted(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    fn transmit(&mut self, queue: &VirtQueue, chain: &Chain) -> Result<u32, Stop> {
        let broken = |error: QueueError| Stop::Queue { queue: TX, error };
        let refuse = |reason| Err(Stop::Request { queue: TX, reason });
        let mut from = chain.readable();
        if chain.writable().remaining() != 0 {
            return refuse("a frame to send has a writable segment");
        }
        let len = from.remaining() as usize;
        if !(HEADER_LEN + ETHERNET_LEN..=ROOM).contains(&len) {
            return refuse("a frame to send is too short or too long");
        }
        let frame = &mut self.out[..len];
        from.read(queue.ram(), frame).map_err(broken)?;
        let (header, ethernet) = frame.split_at_mut(HEADER_LEN);
        let sound = offload::check_sent(header, ethernet.len(), self.features);
        if self.first_tx.is_none() {
            self.first_tx = Some(hebe_sys::clock::stamp_now());
        }
        self.neighbours.learn(ethernet, self.mac);
        self.counters.requests += 1;
        // Dropping is what a wire does: the tap's queue is full, or it is down.
        if sound && self.wire.send(&self.out[..len]).is_ok() {
            self.counters.bytes_out += (len - HEADER_LEN) as u64;
        } else {
            self.counters.dropped += 1;
        }
        Ok(0)
    }

    fn receive(&mut self, queues: &mut Queues) -> Result<Next, Stop> {
        let mut starved = false;
        let next = queues.serve(RX, |queue, chain| {
            let room = check_buffer(chain)?;
            match self.next_frame(room) {
                Some(len) => self.deliver(queue, chain, len),
                None => {
                    starved = true;
                    Ok(Served::Later)
                }
            }
        })?;
        if std::mem::take(&mut self.loss_untold) {
            queues.shared().report(LOST);
        }
        // With a buffer left the tap brings us back; without one the driver's
        // kick does.
        self.has_room = starved || next == Next::Again;
        Ok(next)
    }

    /// Writes the frame in `self.come` into `first`, and into as many buffers
    /// more as it takes where that was agreed. Where there are too few it waits
    /// for them.
    fn deliver(
        &mut self,
        queue: &mut VirtQueue,
        first: &Chain,
        len: usize,
    ) -> Result<Served, Stop> {
        let broken = |error| Stop::Queue { queue: RX, error };
        let mut more = Vec::new();
        let mut room = first.writable().remaining();
        while room < len as u64 {
            let Some(chain) = queue.pop().map_err(broken)? else {
                // The kick for the next buffer brings us back, if none came yet.
                if queue.enable_kicks().map_err(broken)? {
                    continue;
                }
                more.iter().for_each(|_| queue.unpop());
                self.waiting = Some(len);
                return Ok(Served::Later);
            };
            room += check_buffer(&chain)?;
            more.push(chain);
        }
        let count = 1 + more.len() as u16;
        self.come[NUM_BUFFERS_AT..HEADER_LEN].copy_from_slice(&count.to_le_bytes());
        let mut rest = &self.come[..len];
        for chain in std::iter::once(first).chain(&more) {
            let written = chain.writable().write(queue.ram(), rest).map_err(broken)?;
            queue
                .push_used(chain.head, written as u32)
                .map_err(broken)?;
            rest = &rest[written..];
        }
        self.counters.requests += 1;
        self.counters.bytes_in += (len - HEADER_LEN) as u64;
        Ok(Served::All)
    }

    /// The next frame, in `self.come`; frames that the driver does not
    /// understand, or that do not fit into its one buffer of `room` bytes, are
    /// dropped.
    fn next_frame(&mut self, room: u64) -> Option<usize> {
        if let Some(len) = self.waiting.take() {
            return Some(len);
        }
        if self.wire_gone {
            return None;
        }
        // Bounded: a flood of frames that do not fit must not hold us here.
        for _ in 0..DROPS_MAX {
            let len = match self.wire.receive(&mut self.come) {
                Received::Frame(len) => len,
                Received::Unusable => continue,
                Received::Nothing => return None,
                Received::Gone => {
                    self.wire_gone = true;
                    self.loss_untold = !matches!(self.wire, NetBackend::Nothing);
                    return None;
                }
            };
            let (header, ethernet) = self.come.split_at_mut(HEADER_LEN);
            let frame_len = (len - HEADER_LEN).min(ethernet.len());
            let understood = offload::check_come(header, frame_len, self.features);
            let fits = len as u64 <= room || self.accepted(F_MRG_RXBUF);
            if understood && fits {
                return Some(len);
            }
            self.counters.dropped += 1;
        }
        None
    }

    /// Tells the tap what the driver takes. One that cannot be told delivers
    /// whole frames, which every driver takes.
    fn set_offloads(&self) {
        if let Some(tap) = self.wire.tap_fd() {
            let wanted = Offloads {
                checksum: self.accepted(F_GUEST_CSUM),
                tcp4: self.accepted(F_GUEST_TSO4),
                tcp6: self.accepted(F_GUEST_TSO6),
            };
            let _ = hebe_sys::tap::set_offloads(tap, wanted);
        }
    }

    /// A command of the control queue: class, command, data; answered by one
    /// byte (virtio 1.2, 5.1.6.5).
    fn control(&mut self, queue: &VirtQueue, chain: &Chain, shared: &Shared) -> Result<u32, Stop> {
        let broken = |error: QueueError| Stop::Queue { queue: CTRL, error };
        let mut command = [0; 2];
        let got = chain
            .readable()
            .read(queue.ram(), &mut command)
            .map_err(broken)?;
        if got < command.len() || chain.writable().remaining() == 0 {
            return Err(Stop::Request {
                queue: CTRL,
                reason: "a control command is too short or has no room for its answer",
            });
        }
        let answer = if command == [CTRL_ANNOUNCE, CTRL_ANNOUNCE_ACK] {
            // Before the answer: the driver may look at once.
            self.status &= !S_ANNOUNCE;
            shared.set_config(self.config());
            CTRL_OK
        } else {
            CTRL_ERR
        };
        chain
            .writable()
            .write(queue.ram(), &[answer])
            .map_err(broken)?;
        Ok(1)
    }
}

/// Room in a receive buffer.
fn check_buffer(chain: &Chain) -> Result<u64, Stop> {
    if chain.readable().remaining() != 0 {
        return Err(Stop::Request {
            queue: RX,
            reason: "a receive buffer has a readable segment",
        });
    }
    Ok(chain.writable().remaining())
}

impl Device for Net {
    fn features(&self) -> u64 {
        let own = F_MAC | F_STATUS | F_CTRL_VQ | F_GUEST_ANNOUNCE | F_MRG_RXBUF;
        match self.wire {
            NetBackend::Tap(_) => own | OFFLOADS,
            NetBackend::Stream(_) | NetBackend::Nothing => own,
        }
    }

    fn queues(&self) -> usize {
        3
    }

    /// `struct virtio_net_config`: MAC and status.
    fn config(&self) -> Vec<u8> {
        let mut config = self.mac.0.to_vec();
        config.extend_from_slice(&self.status.to_le_bytes());
        config
    }

    fn activate(&mut self, features: u64) {
        self.features = features;
        self.set_offloads();
    }

    fn reset(&mut self) {
        self.status = S_LINK_UP;
        self.features = 0;
        self.has_room = false;
        self.waiting = None;
        self.set_offloads();
    }

    fn kicked(&mut self, index: usize, queues: &mut Queues) -> Result<Next, Stop> {
        match index {
            RX => self.receive(queues),
            TX => queues.serve(TX, |queue, chain| {
                self.transmit(queue, chain).map(Served::Done)
            }),
            _ => {
                let shared = queues.shared();
                queues.serve(CTRL, |queue, chain| {
                    self.control(queue, chain, &shared).map(Served::Done)
                })
            }
        }
    }

    fn backend(&self) -> Option<RawFd> {
        let useful = self.has_room && !self.wire_gone;
        self.wire.raw_fd().filter(|_| useful)
    }

    fn backend_ready(&mut self, queues: &mut Queues) -> Result<Next, Stop> {
        self.receive(queues)
    }

    fn resumed(&mut self) {
        self.first_tx = None;
    }

    fn announce(&mut self) -> io::Result<bool> {
        for frame in announcements(self.mac, self.neighbours.addresses()) {
            let mut with_header = vec![0; HEADER_LEN];
            with_header.extend_from_slice(&frame);
            self.wire.send(&with_header)?;
        }
        let driver_does_too = self.accepted(F_GUEST_ANNOUNCE);
        if driver_does_too {
            self.status |= S_ANNOUNCE;
        }
        Ok(driver_does_too)
    }

    fn first_tx(&self) -> Option<Stamp> {
        self.first_tx
    }

    fn counters(&self) -> Counters {
        self.counters
    }

    fn save(&self) -> io::Result<DeviceV2> {
        Ok(DeviceV2::Net(NetV1 {
            mac: self.mac.0,
            status: self.status,
            ipv4: self.neighbours.addresses().to_vec(),
        }))
    }
}

/// The virtio-net header, both ways (virtio 1.2, 5.1.6): flags, type of what is
/// to be cut, length of its headers and of a piece, where the checksum begins and
/// where it goes.
mod offload {
    use super::{F_CSUM, F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, F_HOST_TSO4, F_HOST_TSO6};
    use super::{HEADER_LEN, NUM_BUFFERS_AT};

    const NEEDS_CSUM: u8 = 1;
    const DATA_VALID: u8 = 2;
    const NONE: u8 = 0;
    const TCP4: u8 = 1;
    const TCP6: u8 = 4;

    fn word(header: &[u8], at: usize) -> usize {
        usize::from(u16::from_le_bytes([header[at], header[at + 1]]))
    }

    /// Whether places in the header lie in the frame.
    fn places_fit(header: &[u8], len: usize) -> bool {
        let checksum = word(header, 6) + word(header, 8) + 2;
        let pieces = header[1] == NONE || (word(header, 4) > 0 && word(header, 2) <= len);
        (header[0] & NEEDS_CSUM == 0 || checksum <= len) && pieces
    }

    /// Makes the header of a frame of `len` bytes from the driver fit for the
    /// kernel; false if it asks for what was not agreed, or makes no sense. The
    /// header of a driver that accepted no offload counts for nothing.
    pub(super) fn check_sent(header: &mut [u8], len: usize, features: u64) -> bool {
        let has = |feature| features & feature != 0;
        if !has(F_CSUM) {
            header.fill(0);
            return true;
        }
        header[0] &= NEEDS_CSUM;
        header[NUM_BUFFERS_AT..HEADER_LEN].fill(0);
        let cut_ok = match header[1] {
            NONE => true,
            TCP4 => has(F_HOST_TSO4) && header[0] == NEEDS_CSUM,
            TCP6 => has(F_HOST_TSO6) && header[0] == NEEDS_CSUM,
            _ => false,
        };
        cut_ok && places_fit(header, len)
    }

    /// Whether the driver understands the header of a frame that came. A tap may
    /// still have some that were meant for the driver before.
    pub(super) fn check_come(header: &mut [u8], len: usize, features: u64) -> bool {
        let has = |feature| features & feature != 0;
        if !has(F_GUEST_CSUM) {
            let plain = header[0] & NEEDS_CSUM == 0 && header[1] == NONE;
            header.fill(0);
            return plain;
        }
        header[0] &= NEEDS_CSUM | DATA_VALID;
        let cut_ok = match header[1] {
            NONE => true,
            TCP4 => has(F_GUEST_TSO4),
            TCP6 => has(F_GUEST_TSO6),
            _ => false,
        };
        cut_ok && places_fit(header, len)
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        const ALL: u64 = super::super::OFFLOADS;

        fn header(flags: u8, cut: u8, piece: u16, start: u16, offset: u16) -> [u8; HEADER_LEN] {
            let mut header = [0; HEADER_LEN];
            (header[0], header[1]) = (flags, cut);
            header[2..4].copy_from_slice(&54_u16.to_le_bytes());
            header[4..6].copy_from_slice(&piece.to_le_bytes());
            header[6..8].copy_from_slice(&start.to_le_bytes());
            header[8..10].copy_from_slice(&offset.to_le_bytes());
            header[10] = 7;
            header
        }

        #[test]
        fn what_was_agreed_passes_and_nothing_else() {
            let tcp4 = header(NEEDS_CSUM, TCP4, 1448, 34, 16);
            for (header, features, sound) in [
                (tcp4, ALL, true),
                (tcp4, ALL & !F_HOST_TSO4, false),
                (header(NEEDS_CSUM, TCP6, 1428, 54, 16), ALL, true),
                (
                    header(NEEDS_CSUM, TCP6, 1428, 54, 16),
                    ALL & !F_HOST_TSO6,
                    false,
                ),
                (header(NEEDS_CSUM, NONE, 0, 34, 16), F_CSUM, true),
                // UDP, ECN, and types that are none.
                (header(NEEDS_CSUM, 3, 1448, 34, 16), ALL, false),
                (header(NEEDS_CSUM, 0x81, 1448, 34, 16), ALL, false),
                // To be cut without a checksum, or into pieces of nothing.
                (header(0, TCP4, 1448, 34, 16), ALL, false),
                (header(NEEDS_CSUM, TCP4, 0, 34, 16), ALL, false),
                // A checksum outside of the frame.
                (header(NEEDS_CSUM, NONE, 0, 65535, 65535), ALL, false),
                (header(NEEDS_CSUM, NONE, 0, 199, 0), ALL, false),
            ] {
                let mut sent = header;
                assert_eq!(check_sent(&mut sent, 200, features), sound, "{header:?}");
                assert!(!sound || sent[NUM_BUFFERS_AT] == 0);
            }
            let mut ignored = [0x5a; HEADER_LEN];
            assert!(check_sent(&mut ignored, 200, 0));
            assert_eq!(ignored, [0; HEADER_LEN]);
        }

        #[test]
        fn a_driver_gets_what_it_accepted_and_nothing_else() {
            let tcp4 = header(NEEDS_CSUM, TCP4, 1448, 34, 16);
            for (header, features, understood) in [
                (tcp4, ALL, true),
                (tcp4, 0, false),
                (tcp4, F_GUEST_CSUM | F_GUEST_TSO6, false),
                (header(NEEDS_CSUM, NONE, 0, 34, 16), F_GUEST_CSUM, true),
                (header(NEEDS_CSUM, NONE, 0, 34, 16), F_CSUM, false),
                (header(DATA_VALID, NONE, 0, 0, 0), 0, true),
                (header(0, NONE, 0, 0, 0), 0, true),
            ] {
                let mut come = header;
                assert_eq!(
                    check_come(&mut come, 200, features),
                    understood,
                    "{header:?}"
                );
            }
        }
    }
}
