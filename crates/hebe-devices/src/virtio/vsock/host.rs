//! The host's side: a unix socket on which programs say what they want.
//!
//! | Line | Means | Answer, when the connection is there |
//! |---|---|---|
//! | `CONNECT PORT\n` | reach a program in the guest | `OK HOST_PORT\n` |
//! | `LISTEN PORT\n` | wait for one connection of the guest to that port of the host | `OK GUEST_PORT\n` |
//!
//! Whoever is not served is hung up on. The socket is open before the cage is
//! entered, and nothing is opened afterwards: a VMM that could connect to
//! sockets by name could reach every service of the host, so it is the
//! programs of the host that come, in both directions.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};

/// Programs that have not said what they want; the oldest goes first.
const GREETING_MAX: usize = 16;
/// Programs that wait for the guest.
const PARKED_MAX: usize = 64;
/// Longest line of a program, its end included: `CONNECT 4294967295\n`.
const LINE_MAX: usize = 19;
/// Programs let in at a time, and rounds of events: then the guest has its turn.
const TURN_MAX: usize = 32;
const EVENTS_MAX: usize = 32;
const TOKEN_LISTENER: u64 = 0;
/// Edge-triggered: whoever is not served now must not keep the worker busy.
const WATCHED: EventFlags = EventFlags::IN
    .union(EventFlags::OUT)
    .union(EventFlags::RDHUP)
    .union(EventFlags::ET);

/// The host's side of a socket device: a listening unix socket.
#[derive(Debug)]
pub struct VsockHost {
    listener: UnixListener,
    epoll: OwnedFd,
    /// Of the next program. Never used twice.
    next_id: u64,
    /// Somebody may be waiting at the listener.
    accepting: bool,
    greeting: BTreeMap<u64, Greeting>,
    parked: BTreeMap<u64, Parked>,
}

#[derive(Debug)]
struct Greeting {
    stream: UnixStream,
    line: Vec<u8>,
}

#[derive(Debug)]
struct Parked {
    stream: UnixStream,
    port: u32,
}

/// What a program wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Connect(u32),
    Listen(u32),
}

/// A program that wants to reach a port of the guest.
#[derive(Debug)]
pub(super) struct Caller {
    pub(super) id: u64,
    pub(super) stream: UnixStream,
    pub(super) port: u32,
}

/// What happened since the last look.
#[derive(Debug, Default)]
pub(super) struct News {
    pub(super) callers: Vec<Caller>,
    /// Of connections, by id.
    pub(super) events: Vec<(u64, EventFlags)>,
    /// There is more.
    pub(super) more: bool,
}

impl VsockHost {
    /// Serves `listener`.
    ///
    /// # Errors
    /// If the host refuses a descriptor.
    pub fn new(listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let flags = EventFlags::IN | EventFlags::ET;
        let token = EventData::new_u64(TOKEN_LISTENER);
        epoll::add(&epoll, listener.as_fd(), token, flags)?;
        Ok(Self {
            listener,
            epoll,
            next_id: TOKEN_LISTENER + 1,
            accepting: true,
            greeting: BTreeMap::new(),
            parked: BTreeMap::new(),
        })
    }

    /// Readable when [`VsockHost::poll`] has news.
    pub(super) fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Looks at all sockets, without waiting.
    pub(super) fn poll(&mut self) -> News {
        let mut news = News::default();
        let mut events = [MaybeUninit::<Event>::uninit(); EVENTS_MAX];
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // What is left stays in the kernel's list, which makes `fd` readable.
        let ready = match epoll::wait(&self.epoll, &mut events, Some(&at_once)) {
            Ok((ready, _)) => &*ready,
            Err(_) => &[],
        };
        for event in ready {
            let (id, flags) = (event.data.u64(), event.flags);
            if id == TOKEN_LISTENER {
                self.accepting = true;
            } else if self.greeting.contains_key(&id) {
                self.greet(id, &mut news);
            } else if self.parked.contains_key(&id) {
                if flags.intersects(EventFlags::HUP | EventFlags::ERR | EventFlags::RDHUP) {
                    self.parked.remove(&id);
                }
            } else {
                news.events.push((id, flags));
            }
        }
        self.accept(&mut news);
        news
    }

    fn accept(&mut self, news: &mut News) {
        for _ in 0..TURN_MAX {
            if !self.accepting {
                return;
            }
            match self.listener.accept() {
                Ok((stream, _)) => self.welcome(stream, news),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // Also where descriptors are short: the next program that
                // comes brings us back.
                Err(_) => self.accepting = false,
            }
        }
        news.more |= self.accepting;
    }

    fn welcome(&mut self, stream: UnixStream, news: &mut News) {
        let id = self.next_id;
        self.next_id += 1;
        let watched = stream.set_nonblocking(true).and_then(|()| {
            let token = EventData::new_u64(id);
            Ok(epoll::add(&self.epoll, stream.as_fd(), token, WATCHED)?)
        });
        if watched.is_err() {
            return;
        }
        if self.greeting.len() == GREETING_MAX {
            self.greeting.pop_first();
        }
        let line = Vec::with_capacity(LINE_MAX);
        self.greeting.insert(id, Greeting { stream, line });
        self.greet(id, news);
    }

    /// Reads a program's line, and not a byte more.
    fn greet(&mut self, id: u64, news: &mut News) {
        let Some(mut greeting) = self.greeting.remove(&id) else {
            return;
        };
        let mut byte = [0];
        while greeting.line.len() < LINE_MAX {
            match greeting.stream.read(&mut byte) {
                Ok(1) if byte == *b"\n" => return self.grant(id, greeting, news),
                Ok(1) => greeting.line.push(byte[0]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.greeting.insert(id, greeting);
                    return;
                }
                _ => return,
            }
        }
    }

    fn grant(&mut self, id: u64, greeting: Greeting, news: &mut News) {
        let Greeting { stream, line } = greeting;
        match wish(&line) {
            Some(Wish::Connect(port)) => {
                self.rearm(id, &stream);
                news.callers.push(Caller { id, stream, port });
            }
            Some(Wish::Listen(port)) if self.parked.len() < PARKED_MAX => {
                // It may be gone already, by the event that told of its line.
                self.rearm(id, &stream);
                self.parked.insert(id, Parked { stream, port });
            }
            _ => {}
        }
    }

    /// The program that has waited longest for the guest to reach `port`.
    pub(super) fn unpark(&mut self, port: u32) -> Option<(u64, UnixStream)> {
        let mut waiting = self.parked.iter();
        let id = waiting.find_map(|(id, parked)| (parked.port == port).then_some(*id))?;
        let stream = self.parked.remove(&id)?.stream;
        self.rearm(id, &stream);
        Some((id, stream))
    }

    /// What happened to a program's socket so far is told once more, to
    /// whoever it belongs to now.
    fn rearm(&self, id: u64, stream: &UnixStream) {
        // Fails for want of memory alone; then the next byte tells.
        let _ = epoll::modify(&self.epoll, stream.as_fd(), EventData::new_u64(id), WATCHED);
    }
}

fn wish(line: &[u8]) -> Option<Wish> {
    let (word, port) = std::str::from_utf8(line).ok()?.split_once(' ')?;
    let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
    let port = port.parse().ok().filter(|_| digits)?;
    match word {
        "CONNECT" => Some(Wish::Connect(port)),
        "LISTEN" => Some(Wish::Listen(port)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn lines_are_two_words_and_nothing_else() {
        assert_eq!(wish(b"CONNECT 1024"), Some(Wish::Connect(1024)));
        assert_eq!(wish(b"LISTEN 4294967295"), Some(Wish::Listen(u32::MAX)));
        for line in [
            "",
            "CONNECT",
            "CONNECT ",
            "connect 1",
            "CONNECT -1",
            "CONNECT +1",
            "CONNECT 1 ",
            "CONNECT 4294967296",
            "LISTEN 0x1",
            "HELLO 1",
            "CONNECT  1",
            "CONNECT 1\r",
        ] {
            assert_eq!(wish(line.as_bytes()), None, "{line:?}");
        }
        assert_eq!(wish(b"CONNECT \xff"), None);
        assert_eq!("CONNECT 4294967295\n".len(), LINE_MAX);
    }

    #[test]
    fn a_program_that_ends_as_it_begins_to_wait_is_let_go() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).expect("listen");
        let mut host = VsockHost::new(listener).expect("host's side");
        for _ in 0..=PARKED_MAX {
            let mut program = UnixStream::connect(&path).expect("connect");
            // Let in, and what it did so far is known.
            host.poll();
            host.poll();
            assert_eq!((host.greeting.len(), host.parked.len()), (1, 0));
            program.write_all(b"LISTEN 5\n").expect("write");
            drop(program);
            host.poll();
            assert_eq!((host.greeting.len(), host.parked.len()), (0, 1));
            host.poll();
            assert_eq!(host.parked.len(), 0, "nobody waits any more");
        }
    }
}
