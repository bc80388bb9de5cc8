//! One stream between a program on the host and one in the guest.
//!
//! ```text
//!  host connects ──► requested ──(guest accepts)──► open ──► over: dropped
//!  guest connects ─────────────────────────────────►
//! ```
//! What the guest sends is kept until the host's program takes it, at most
//! [`BUFFER_LEN`] bytes: a guest that sends more than it was told there is
//! room for is reset. What the host's program sends stays in its socket until
//! the guest says that it has room, and costs nothing here.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use rustix::event::epoll::EventFlags;

use super::packet::{
    CID_HOST, Header, Op, SHUTDOWN_SENDS_NO_MORE, SHUTDOWN_TAKES_NO_MORE, TYPE_STREAM,
};

/// Room for what the guest sends, per connection.
pub(super) const BUFFER_LEN: usize = 64 << 10;
/// The guest is told of room again when so much became free.
const TELL_AT: u32 = BUFFER_LEN as u32 / 2;
const BOTH: u32 = SHUTDOWN_SENDS_NO_MORE | SHUTDOWN_TAKES_NO_MORE;

/// Control packets that are to be sent, each at most once at a time.
#[derive(Clone, Copy, Debug, Default)]
struct Owes {
    request: bool,
    response: bool,
    credit: bool,
}

impl Owes {
    fn take(&mut self) -> Option<Op> {
        let Self {
            request,
            response,
            credit,
        } = self;
        if std::mem::take(request) {
            Some(Op::Request)
        } else if std::mem::take(response) {
            Some(Op::Response)
        } else {
            std::mem::take(credit).then_some(Op::CreditUpdate)
        }
    }
}

/// A connection. Dropping it closes the host's end.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
    stream: UnixStream,
    /// Both ends have agreed.
    open: bool,
    owes: Owes,
    /// From the guest, not yet taken by the host's program.
    waiting: VecDeque<u8>,
    /// Bytes that went on to the host's program, modulo 2^32, and how many of
    /// them the guest knows of.
    forwarded: u32,
    told: u32,
    /// Bytes sent to the guest, modulo 2^32.
    sent: u32,
    /// What the guest says of its own room. Believed as far as it harms the
    /// guest alone.
    guest_room: u32,
    guest_took: u32,
    /// The guest was asked for room and has had none since.
    asked: bool,
    /// The host's program may have sent something.
    readable: bool,
    /// It sends no more.
    host_ended: bool,
    /// It is gone.
    host_gone: bool,
    /// `SHUTDOWN_*` that the guest was told, and that it told us.
    ends_told: u32,
    guest_ends: u32,
}

/// What [`Connection::next`] has to send.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outgoing {
    /// A packet.
    Packet(Header),
    /// The last packet: the connection is over.
    Last(Header),
}

impl Connection {
    fn new(stream: UnixStream, host_port: u32, guest_port: u32) -> Self {
        Self {
            host_port,
            guest_port,
            stream,
            open: false,
            owes: Owes::default(),
            waiting: VecDeque::new(),
            forwarded: 0,
            told: 0,
            sent: 0,
            guest_room: 0,
            guest_took: 0,
            asked: false,
            // It may have sent more behind its first line.
            readable: true,
            host_ended: false,
            host_gone: false,
            ends_told: 0,
            guest_ends: 0,
        }
    }

    /// A program on the host wants to reach a port of the guest.
    pub(super) fn requested(stream: UnixStream, host_port: u32, guest_port: u32) -> Self {
        let mut this = Self::new(stream, host_port, guest_port);
        this.owes.request = true;
        this
    }

    /// The guest, by `request`, reached a program on the host that waits for it.
    pub(super) fn accepted(stream: UnixStream, request: &Header) -> Self {
        let mut this = Self::new(stream, request.dst_port, request.src_port);
        this.hear(request);
        this.owes.response = true;
        this.begin(request.src_port);
        this
    }

    /// The guest accepts.
    pub(super) fn establish(&mut self) -> bool {
        if self.open {
            return false;
        }
        self.begin(self.host_port);
        true
    }

    fn begin(&mut self, port: u32) {
        self.open = true;
        // A socket that takes not even this line belongs to nobody any more.
        let line = format!("OK {port}\n");
        self.host_gone |= (&self.stream).write_all(line.as_bytes()).is_err();
    }

    /// Takes what every packet says of the guest's room.
    pub(super) fn hear(&mut self, header: &Header) {
        self.guest_room = header.buf_alloc;
        self.guest_took = header.fwd_cnt;
        // A guest without room answers too, and tells of room when it has some:
        // asked again for such an answer, it would answer without end.
        if self.credit() > 0 {
            self.asked = false;
        }
    }

    /// Bytes that the guest has room for, by its own word.
    fn credit(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.guest_took);
        self.guest_room.saturating_sub(under_way)
    }

    /// The guest asks how much room there is.
    pub(super) fn owe_credit(&mut self) {
        self.owes.credit = true;
    }

    /// What happened to the host's socket.
    pub(super) fn notice(&mut self, flags: EventFlags) {
        let over = EventFlags::HUP | EventFlags::ERR;
        if flags.intersects(over) {
            self.host_gone = true;
        }
        if flags.intersects(over | EventFlags::IN | EventFlags::RDHUP) {
            self.readable = true;
        }
        if flags.contains(EventFlags::OUT) {
            self.flush();
        }
    }

    /// Whether the guest may send `len` bytes now.
    pub(super) fn admits(&self, len: usize) -> bool {
        self.open
            && self.guest_ends & SHUTDOWN_SENDS_NO_MORE == 0
            && len <= BUFFER_LEN - self.waiting.len()
    }

    /// Takes data of the guest, which [`Connection::admits`] let through.
    pub(super) fn take(&mut self, data: &[u8]) {
        self.waiting.extend(data);
        self.flush();
    }

    /// Hands on what the host's program takes.
    fn flush(&mut self) {
        while !self.waiting.is_empty() && !self.host_gone {
            let (first, _) = self.waiting.as_slices();
            match (&self.stream).write(first) {
                Ok(count) => self.forward(count),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => self.host_gone = true,
            }
        }
        if self.host_gone {
            // Nobody takes it. The guest learns that by a shutdown.
            self.forward(self.waiting.len());
        }
        if self.waiting.is_empty() && self.guest_ends & SHUTDOWN_SENDS_NO_MORE != 0 {
            // Fails where the other end is gone, which shows elsewhere.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    fn forward(&mut self, count: usize) {
        self.waiting.drain(..count);
        // At most a buffer's length.
        self.forwarded = self.forwarded.wrapping_add(count as u32);
        if self.forwarded.wrapping_sub(self.told) >= TELL_AT {
            self.owes.credit = true;
        }
    }

    /// The guest sends or takes no more.
    pub(super) fn guest_shuts(&mut self, flags: u32) {
        self.guest_ends |= flags & BOTH;
        self.flush();
    }

    /// Nothing is left to do but to tell the guest.
    fn is_over(&self) -> bool {
        (self.guest_ends == BOTH && self.waiting.is_empty()) || (self.host_gone && !self.open)
    }

    /// The next packet for the guest, with data in `data`, of which it fills
    /// no more than there is; `None` if there is nothing to say now.
    pub(super) fn next(&mut self, cid: u64, data: &mut [u8]) -> Option<Outgoing> {
        if self.is_over() {
            return Some(Outgoing::Last(self.header(cid, Op::Reset)));
        }
        if let Some(op) = self.owes.take() {
            return Some(Outgoing::Packet(self.header(cid, op)));
        }
        if !self.open {
            return None;
        }
        if self.must_ask(data.len()) {
            return Some(Outgoing::Packet(self.header(cid, Op::CreditRequest)));
        }
        let len = self.read(data);
        if len > 0 {
            let mut header = self.header(cid, Op::Data);
            // No longer than the guest's room, which is 32 bits wide.
            header.len = len as u32;
            self.sent = self.sent.wrapping_add(header.len);
            return Some(Outgoing::Packet(header));
        }
        self.tell_ends(cid)
    }

    /// Whether the guest must say that it has room before anything can go on.
    /// It is asked once for each time that it has none.
    fn must_ask(&mut self, room: usize) -> bool {
        let wanted = self.readable && !self.host_ended && self.guest_takes();
        let ask = wanted && room > 0 && self.credit() == 0 && !self.asked;
        self.asked |= ask;
        ask
    }

    fn guest_takes(&self) -> bool {
        self.guest_ends & SHUTDOWN_TAKES_NO_MORE == 0
    }

    /// Reads what the host's program sent, as far as the guest has room.
    fn read(&mut self, data: &mut [u8]) -> usize {
        if !self.guest_takes() {
            self.host_ended |= self.host_gone;
            return 0;
        }
        if !self.readable || self.host_ended {
            return 0;
        }
        let room = data.len().min(self.credit() as usize);
        if room == 0 {
            return 0;
        }
        loop {
            match (&self.stream).read(&mut data[..room]) {
                Ok(0) => self.host_ended = true,
                Ok(count) => return count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Err(_) => (self.host_ended, self.host_gone) = (true, true),
            }
            return 0;
        }
    }

    /// Tells the guest what the host's program does no more.
    fn tell_ends(&mut self, cid: u64) -> Option<Outgoing> {
        let ends = match (self.host_ended, self.host_gone) {
            (true, true) => BOTH,
            (true, false) => SHUTDOWN_SENDS_NO_MORE,
            (false, _) => return None,
        };
        if ends == self.ends_told {
            return None;
        }
        self.ends_told = ends;
        let mut header = self.header(cid, Op::Shutdown);
        header.flags = ends;
        Some(match ends {
            BOTH => Outgoing::Last(header),
            _ => Outgoing::Packet(header),
        })
    }

    /// A packet of this connection. The guest knows our room after it.
    fn header(&mut self, cid: u64, op: Op) -> Header {
        self.told = self.forwarded;
        self.owes.credit = false;
        Header {
            src_cid: CID_HOST,
            dst_cid: cid,
            src_port: self.host_port,
            dst_port: self.guest_port,
            kind: TYPE_STREAM,
            op: op as u16,
            buf_alloc: BUFFER_LEN as u32,
            fwd_cnt: self.forwarded,
            ..Header::default()
        }
    }
}
