//! Sockets between host and guest (virtio 1.2, 5.10), streams alone.
//!
//! ```text
//! programs of the host ── unix socket ── VsockHost ── connections ── RX, TX ── guest
//! ```
//! Connections do not outlive their VMM. A restored device tells its driver
//! once that all of them are gone (`VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`), and
//! programs on both sides connect again: the driver is told before it gets a
//! packet, and ports of the host begin anywhere, because a driver takes no
//! connection with the ports of one that it still has. A guest that is paused
//! and goes on in the same VMM keeps them.
//!
//! Everything that a guest can make us keep is bounded: connections, bytes per
//! connection, and resets that it is owed, beyond which its packets wait.

mod connection;
mod host;
mod packet;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::RawFd;

use hebe_state::v2::devices::{DeviceV2, VsockV2};
use rustix::rand::{GetRandomFlags, getrandom};

pub use host::VsockHost;

use self::connection::{BUFFER_LEN, Connection, Outgoing};
use self::host::Caller;
use self::packet::{CID_HOST, HEADER_LEN, Header, Op, TYPE_STREAM};
use super::device::{Counters, Device, Next, Queues, Served, Stop};
use super::queue::{Chain, QueueError, VirtQueue};

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`, as `struct virtio_vsock_event`.
const EVENT_TRANSPORT_RESET: [u8; 4] = [0; 4];
/// Most connections at a time.
const CONNECTIONS_MAX: usize = 64;
/// Most resets that wait for a receive buffer.
const RESETS_MAX: usize = 64;
/// Most data of one packet to the guest.
const DATA_MAX: usize = 16 << 10;
/// Lowest port that a program on the host gets when it connects.
const FIRST_PORT: u32 = 1 << 30;

/// A port that no connection of an earlier VMM is likely to have.
fn any_port() -> u32 {
    let mut random = [0; 4];
    // So few bytes come whole, or not at all (getrandom(2)), and then the
    // lowest port is as good as another.
    let _ = getrandom(&mut random[..], GetRandomFlags::empty());
    FIRST_PORT | u32::from_ne_bytes(random) & (FIRST_PORT - 1)
}

/// The device.
pub(crate) struct Vsock {
    cid: u64,
    host: VsockHost,
    /// By the id that the host's side gave them.
    connections: BTreeMap<u64, Connection>,
    /// Who sent last: the next one after it has its turn.
    turn: u64,
    resets: VecDeque<Header>,
    next_port: u32,
    /// The driver does not know yet that all connections are gone.
    owes_event: bool,
    data: Vec<u8>,
    counters: Counters,
}

impl Vsock {
    pub(crate) fn new(host: VsockHost, cid: u64) -> Self {
        Self {
            cid,
            host,
            connections: BTreeMap::new(),
            turn: 0,
            resets: VecDeque::new(),
            next_port: any_port(),
            owes_event: false,
            data: vec![0; BUFFER_LEN],
            counters: Counters::default(),
        }
    }

    /// The context id is the saved one: the guest knows it.
    pub(crate) fn restore(state: &VsockV2, host: VsockHost) -> Self {
        Self {
            owes_event: true,
            ..Self::new(host, state.cid)
        }
    }

    /// Everything that can be done now, in both directions.
    fn work(&mut self, queues: &mut Queues) -> Result<Next, Stop> {
        // A connection that the driver got before this event ends by it.
        if self.events(queues)? == Next::Again {
            return Ok(Next::Again);
        }
        let more = self.look();
        let taken = self.take(queues)?;
        let full = self.resets.len() >= RESETS_MAX;
        let given = self.deliver(queues)?;
        let unblocked = full && self.resets.len() < RESETS_MAX;
        let again = more || unblocked || [taken, given].contains(&Next::Again);
        Ok(if again { Next::Again } else { Next::Wait })
    }

    /// Looks at the host's side; true if there is more to look at.
    fn look(&mut self) -> bool {
        let news = self.host.poll();
        for (id, flags) in news.events {
            if let Some(connection) = self.connections.get_mut(&id) {
                connection.notice(flags);
            }
        }
        for caller in news.callers {
            self.call(caller);
        }
        news.more
    }

    /// A program of the host wants to reach the guest.
    fn call(&mut self, caller: Caller) {
        if self.connections.len() >= CONNECTIONS_MAX {
            return;
        }
        // There are fewer connections than ports.
        while self.find(self.next_port, caller.port).is_some() {
            self.next_port = self.port_after();
        }
        let port = self.next_port;
        self.next_port = self.port_after();
        let connection = Connection::requested(caller.stream, port, caller.port);
        self.connections.insert(caller.id, connection);
    }

    fn port_after(&self) -> u32 {
        self.next_port.checked_add(1).unwrap_or(FIRST_PORT)
    }

    fn find(&self, host_port: u32, guest_port: u32) -> Option<u64> {
        self.connections
            .iter()
            .find(|(_, c)| (c.host_port, c.guest_port) == (host_port, guest_port))
            .map(|(id, _)| *id)
    }

    /// Takes the guest's packets, as long as there is room for the resets
    /// that they may call for.
    fn take(&mut self, queues: &mut Queues) -> Result<Next, Stop> {
        queues.serve(TX, |queue, chain| {
            if self.resets.len() >= RESETS_MAX {
                return Ok(Served::Later);
            }
            self.packet(queue, chain).map(|()| Served::Done(0))
        })
    }

    fn packet(&mut self, queue: &VirtQueue, chain: &Chain) -> Result<(), Stop> {
        let broken = |error: QueueError| Stop::Queue { queue: TX, error };
        let refuse = |reason| Err(Stop::Request { queue: TX, reason });
        if chain.writable().remaining() != 0 {
            return refuse("a packet to send has a writable segment");
        }
        let mut from = chain.readable();
        let mut bytes = [0; HEADER_LEN];
        if from.read(queue.ram(), &mut bytes).map_err(broken)? < HEADER_LEN {
            return refuse("a packet to send is shorter than its header");
        }
        let header = Header::parse(&bytes);
        if u64::from(header.len) > from.remaining() {
            return refuse("a packet to send says that it is longer than it is");
        }
        self.counters.requests += 1;
        if (header.dst_cid, header.src_cid) != (CID_HOST, self.cid) {
            self.counters.dropped += 1;
            return Ok(());
        }
        let op = Op::of(header.op).filter(|_| header.kind == TYPE_STREAM);
        let Some(id) = self.find(header.dst_port, header.src_port) else {
            self.stranger(op, &header);
            return Ok(());
        };
        let Some(connection) = self.connections.get_mut(&id) else {
            return Ok(());
        };
        connection.hear(&header);
        let len = header.len as usize;
        let good = match op {
            Some(Op::Data) if connection.admits(len) => {
                let data = &mut self.data[..len];
                from.read(queue.ram(), data).map_err(broken)?;
                connection.take(data);
                self.counters.bytes_out += u64::from(header.len);
                true
            }
            Some(Op::Response) => connection.establish(),
            Some(Op::Shutdown) => {
                connection.guest_shuts(header.flags);
                true
            }
            Some(Op::CreditUpdate) => true,
            Some(Op::CreditRequest) => {
                connection.owe_credit();
                true
            }
            Some(Op::Reset) => {
                self.connections.remove(&id);
                true
            }
            Some(Op::Data | Op::Request) | None => false,
        };
        if !good {
            self.connections.remove(&id);
            self.refuse(&header);
        }
        Ok(())
    }

    /// A packet of no connection.
    fn stranger(&mut self, op: Option<Op>, header: &Header) {
        match op {
            Some(Op::Reset) => {}
            Some(Op::Request) if self.connections.len() < CONNECTIONS_MAX => {
                match self.host.unpark(header.dst_port) {
                    Some((id, stream)) => {
                        let connection = Connection::accepted(stream, header);
                        self.connections.insert(id, connection);
                    }
                    None => self.refuse(header),
                }
            }
            _ => self.refuse(header),
        }
    }

    fn refuse(&mut self, header: &Header) {
        self.counters.dropped += 1;
        self.resets.push_back(header.reset());
    }

    /// Gives the guest what there is for it, as long as it has buffers.
    fn deliver(&mut self, queues: &mut Queues) -> Result<Next, Stop> {
        queues.serve(RX, |queue, chain| {
            let refuse = |reason| Err(Stop::Request { queue: RX, reason });
            if chain.readable().remaining() != 0 {
                return refuse("a receive buffer has a readable segment");
            }
            let mut to = chain.writable();
            let Some(room) = to.remaining().checked_sub(HEADER_LEN as u64) else {
                return refuse("a receive buffer is shorter than a packet's header");
            };
            let Some(header) = self.next(room.min(DATA_MAX as u64) as usize) else {
                return Ok(Served::Later);
            };
            let broken = |error| Stop::Queue { queue: RX, error };
            to.write(queue.ram(), &header.to_bytes()).map_err(broken)?;
            let data = &self.data[..header.len as usize];
            to.write(queue.ram(), data).map_err(broken)?;
            self.counters.requests += 1;
            self.counters.bytes_in += u64::from(header.len);
            Ok(Served::Done(HEADER_LEN as u32 + header.len))
        })
    }

    /// The next packet for the guest; its data, at most `room` bytes, is in
    /// `self.data`. Connections have their turns one after the other.
    fn next(&mut self, room: usize) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        let after = self.turn.saturating_add(1)..;
        let later = self.connections.range(after).map(|(id, _)| *id);
        let mut ids: Vec<u64> = later.collect();
        ids.extend(self.connections.range(..=self.turn).map(|(id, _)| *id));
        for id in ids {
            let Some(connection) = self.connections.get_mut(&id) else {
                continue;
            };
            match connection.next(self.cid, &mut self.data[..room]) {
                Some(Outgoing::Packet(header)) => {
                    self.turn = id;
                    return Some(header);
                }
                Some(Outgoing::Last(header)) => {
                    self.connections.remove(&id);
                    return Some(header);
                }
                None => {}
            }
        }
        None
    }

    /// Tells the driver once that its connections are gone.
    fn events(&mut self, queues: &mut Queues) -> Result<Next, Stop> {
        if !self.owes_event {
            return Ok(Next::Wait);
        }
        queues.serve(EVENT, |queue, chain| {
            if !self.owes_event {
                return Ok(Served::Later);
            }
            let mut to = chain.writable();
            if to.remaining() < EVENT_TRANSPORT_RESET.len() as u64 {
                return Err(Stop::Request {
                    queue: EVENT,
                    reason: "an event buffer is shorter than an event",
                });
            }
            let written = to.write(queue.ram(), &EVENT_TRANSPORT_RESET);
            written.map_err(|error| Stop::Queue {
                queue: EVENT,
                error,
            })?;
            self.owes_event = false;
            Ok(Served::Done(EVENT_TRANSPORT_RESET.len() as u32))
        })
    }
}

impl Device for Vsock {
    /// Without a bit there are streams alone (virtio 1.2, 5.10.3).
    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> usize {
        3
    }

    /// `struct virtio_vsock_config`.
    fn config(&self) -> Vec<u8> {
        self.cid.to_le_bytes().to_vec()
    }

    fn reset(&mut self) {
        self.connections.clear();
        self.resets.clear();
        self.owes_event = false;
    }

    fn kicked(&mut self, index: usize, queues: &mut Queues) -> Result<Next, Stop> {
        match index {
            EVENT => self.events(queues),
            _ => self.work(queues),
        }
    }

    fn backend(&self) -> Option<RawFd> {
        Some(self.host.fd())
    }

    fn backend_ready(&mut self, queues: &mut Queues) -> Result<Next, Stop> {
        self.work(queues)
    }

    fn counters(&self) -> Counters {
        self.counters
    }

    fn save(&self) -> io::Result<DeviceV2> {
        Ok(DeviceV2::Vsock(VsockV2 { cid: self.cid }))
    }
}
