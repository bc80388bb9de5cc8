//! NIC (virtio 1.2, 5.1) on a tap. No offloads: the virtio-net header in
//! both directions is all zero but for `num_buffers`, whatever the other side
//! wrote into it.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use hebe_state::v1::devices::NetV1;
use hebe_state::v2::devices::DeviceV2;
use hebe_types::{MacAddr, Stamp};

use super::device::{Counters, Device, Next, Queues, Served, Stop};
use super::queue::{Chain, QueueError, VirtQueue};
use super::shared::Shared;
use crate::announce::{Neighbours, announcements};

const F_MAC: u64 = 1 << 5;
const F_STATUS: u64 = 1 << 16;
const F_CTRL_VQ: u64 = 1 << 17;
const F_GUEST_ANNOUNCE: u64 = 1 << 21;

const S_LINK_UP: u16 = 1;
const S_ANNOUNCE: u16 = 2;

const CTRL_ANNOUNCE: u8 = 3;
const CTRL_ANNOUNCE_ACK: u8 = 0;
const CTRL_OK: u8 = 0;
const CTRL_ERR: u8 = 1;

const RX: usize = 0;
const TX: usize = 1;
const CTRL: usize = 2;

/// `struct virtio_net_hdr_v1`.
const HEADER_LEN: usize = 12;
/// Where `num_buffers` is in it.
const NUM_BUFFERS_AT: usize = 10;
/// Longest frame that a tap carries, header before it.
const FRAME_MAX: usize = HEADER_LEN + 65536;
/// Frames dropped in a row before anything else has its turn.
const DROPS_MAX: usize = 64;
/// An Ethernet header.
const ETHERNET_LEN: usize = 14;

pub(crate) struct Net {
    tap: OwnedFd,
    /// The tap failed: it is not asked again.
    tap_gone: bool,
    mac: MacAddr,
    status: u16,
    guest_announces: bool,
    neighbours: Neighbours,
    /// The receive queue had a buffer when it was last looked at.
    has_room: bool,
    first_tx: Option<Stamp>,
    frame: Vec<u8>,
    counters: Counters,
}

impl Net {
    pub(crate) fn new(tap: OwnedFd, mac: MacAddr) -> Self {
        // A tap that cannot be made non-blocking shows at the first read.
        let _ = rustix::io::ioctl_fionbio(&tap, true);
        Self {
            tap,
            tap_gone: false,
            mac,
            status: S_LINK_UP,
            guest_announces: false,
            neighbours: Neighbours::default(),
            has_room: false,
            first_tx: None,
            frame: vec![0; FRAME_MAX],
            counters: Counters::default(),
        }
    }

    /// The address is the saved one: the guest knows it.
    pub(crate) fn restore(state: &NetV1, tap: OwnedFd) -> Self {
        Self {
            status: state.status & (S_LINK_UP | S_ANNOUNCE),
            neighbours: Neighbours::restore(&state.ipv4),
            ..Self::new(tap, MacAddr(state.mac))
        }
    }

    fn transmit(&mut self, queue: &VirtQueue, chain: &Chain) -> Result<u32, Stop> {
        let broken = |error: QueueError| Stop::Queue { queue: TX, error };
        let refuse = |reason| Err(Stop::Request { queue: TX, reason });
        let mut from = chain.readable();
        if chain.writable().remaining() != 0 {
            return refuse("a frame to send has a writable segment");
        }
        let len = from.remaining() as usize;
        if !(HEADER_LEN + ETHERNET_LEN..=FRAME_MAX).contains(&len) {
            return refuse("a frame to send is too short or too long");
        }
        let frame = &mut self.frame[..len];
        from.read(queue.ram(), frame).map_err(broken)?;
        frame[..HEADER_LEN].fill(0);
        if self.first_tx.is_none() {
            self.first_tx = Some(hebe_sys::clock::stamp_now());
        }
        self.neighbours.learn(&frame[HEADER_LEN..], self.mac);
        self.counters.requests += 1;
        // Dropping is what a wire does: the tap's queue is full, or it is down.
        match rustix::io::write(&self.tap, frame) {
            Ok(_) => self.counters.bytes_out += (len - HEADER_LEN) as u64,
            Err(_) => self.counters.dropped += 1,
        }
        Ok(0)
    }

    fn receive(&mut self, queues: &mut Queues) -> Result<Next, Stop> {
        let mut starved = false;
        let next = queues.serve(RX, |queue, chain| {
            if chain.readable().remaining() != 0 {
                return Err(Stop::Request {
                    queue: RX,
                    reason: "a receive buffer has a readable segment",
                });
            }
            match self.next_frame(chain.writable().remaining()) {
                Some(len) => {
                    let written = chain.writable().write(queue.ram(), &self.frame[..len]);
                    written.map_err(|error| Stop::Queue { queue: RX, error })?;
                    Ok(Served::Done(len as u32))
                }
                None => {
                    starved = true;
                    Ok(Served::Later)
                }
            }
        })?;
        // With a buffer left the tap brings us back; without one the driver's
        // kick does.
        self.has_room = starved || next == Next::Again;
        Ok(next)
    }

    /// The next frame that fits into a buffer of `room` bytes, in
    /// `self.frame`; frames that do not fit are dropped.
    fn next_frame(&mut self, room: u64) -> Option<usize> {
        if self.tap_gone {
            return None;
        }
        // Bounded: a flood of frames that do not fit must not hold us here.
        for _ in 0..DROPS_MAX {
            let len = match rustix::io::read(&self.tap, &mut self.frame[..]) {
                Ok(0) => {
                    self.tap_gone = true;
                    return None;
                }
                Ok(len) => len,
                Err(rustix::io::Errno::WOULDBLOCK) => return None,
                Err(rustix::io::Errno::INTR) => continue,
                Err(_) => {
                    self.tap_gone = true;
                    return None;
                }
            };
            if len < HEADER_LEN || len as u64 > room {
                self.counters.dropped += 1;
                continue;
            }
            self.frame[..HEADER_LEN].fill(0);
            self.frame[NUM_BUFFERS_AT] = 1;
            self.counters.requests += 1;
            self.counters.bytes_in += (len - HEADER_LEN) as u64;
            return Some(len);
        }
        None
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

impl Device for Net {
    fn features(&self) -> u64 {
        F_MAC | F_STATUS | F_CTRL_VQ | F_GUEST_ANNOUNCE
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
        self.guest_announces = features & F_GUEST_ANNOUNCE != 0;
    }

    fn reset(&mut self) {
        self.status = S_LINK_UP;
        self.guest_announces = false;
        self.has_room = false;
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
        (self.has_room && !self.tap_gone).then(|| self.tap.as_raw_fd())
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
            rustix::io::write(&self.tap, &with_header)?;
        }
        if self.guest_announces {
            self.status |= S_ANNOUNCE;
        }
        Ok(self.guest_announces)
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
