//! The console hub: a VM's console output to a log file and to whoever is
//! attached, and their input to the VM.
//!
//! ```text
//! guest ─ write_output ─► ring (64 KiB) ─ hub thread ─► log file, clients
//! guest ◄─ take_input ── input (4 KiB) ◄─ hub thread ── clients
//! ```
//! Readers of the ring have a position each. Nobody who writes waits for
//! them: a client that falls behind by more than the ring is dropped, and the
//! log says how many bytes it missed. Input has back-pressure: with the
//! buffer full, clients are not read.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Bytes of output that an attaching client sees, and that a slow one may
/// fall behind.
pub const SCROLLBACK_LEN: usize = 64 << 10;
/// Bytes of input that wait for the guest.
const INPUT_MAX: usize = 4 << 10;
/// The log begins anew at this size; what was in it goes to `*.1`.
const LOG_MAX: u64 = 1 << 20;
/// Most clients at a time.
const CLIENTS_MAX: usize = 16;
const TOKEN_WAKE: u64 = 0;
const CHUNK: usize = 4096;
/// How long [`ConsoleHub::flush`] waits for the log.
const FLUSH_MAX: Duration = Duration::from_secs(1);

/// A device that takes a hub's input.
pub(crate) trait InputTaker: Send + Sync {
    /// There is input to take. Called from the hub's thread.
    fn input_ready(&self);
}

/// Output with positions: byte `n` of all output is here if
/// `end - SCROLLBACK_LEN <= n < end`.
struct Ring {
    bytes: VecDeque<u8>,
    end: u64,
}

impl Ring {
    fn push(&mut self, data: &[u8]) {
        self.end += data.len() as u64;
        let tail = &data[data.len().saturating_sub(SCROLLBACK_LEN)..];
        let surplus = (self.bytes.len() + tail.len()).saturating_sub(SCROLLBACK_LEN);
        self.bytes.drain(..surplus);
        self.bytes.extend(tail);
    }

    fn start(&self) -> u64 {
        self.end - self.bytes.len() as u64
    }

    /// Copies from a position on; returns the number of bytes.
    fn read(&self, from: u64, data: &mut [u8]) -> usize {
        let skip = from.saturating_sub(self.start()) as usize;
        let mut count = 0;
        for (to, byte) in data.iter_mut().zip(self.bytes.iter().skip(skip)) {
            *to = *byte;
            count += 1;
        }
        count
    }
}

struct State {
    ring: Ring,
    /// Position up to which the log is written.
    logged: u64,
    input: VecDeque<u8>,
    arrivals: Vec<UnixStream>,
    clients: usize,
    exit: bool,
}

struct Inner {
    state: Mutex<State>,
    logged: Condvar,
    taker: Mutex<Option<Weak<dyn InputTaker>>>,
    wake: EventFd,
    /// The wake event is set already: spares a system call per byte.
    woken: AtomicBool,
    input_event: EventFd,
}

/// See the module's documentation. Dropping it writes the rest of the log and
/// ends the thread.
pub struct ConsoleHub {
    inner: Arc<Inner>,
    thread: Option<JoinHandle<()>>,
}

impl ConsoleHub {
    /// A hub that appends to `log`, if given.
    pub fn new(log: Option<&Path>) -> io::Result<Arc<Self>> {
        let files = log.map(ConsoleLog::open).transpose()?;
        Self::with_log(files.as_ref())
    }

    /// A hub that appends to files that are open.
    pub fn with_log(files: Option<&ConsoleLog>) -> io::Result<Arc<Self>> {
        let log = files.map(Log::new).transpose()?;
        let inner = Arc::new(Inner {
            state: Mutex::new(State {
                ring: Ring {
                    bytes: VecDeque::with_capacity(SCROLLBACK_LEN),
                    end: 0,
                },
                logged: 0,
                input: VecDeque::with_capacity(INPUT_MAX),
                arrivals: Vec::new(),
                clients: 0,
                exit: false,
            }),
            logged: Condvar::new(),
            taker: Mutex::default(),
            wake: EventFd::new(EFD_NONBLOCK)?,
            woken: AtomicBool::new(false),
            input_event: EventFd::new(EFD_NONBLOCK)?,
        });
        let pump = Pump::new(Arc::clone(&inner), log)?;
        let thread = hebe_sys::thread::named("console").spawn(move || pump.run())?;
        Ok(Arc::new(Self {
            inner,
            thread: Some(thread),
        }))
    }

    /// Attaches a client: it gets the scrollback, then what the guest writes;
    /// what it sends goes to the guest. It is let go when it hangs up, or
    /// falls behind by more than [`SCROLLBACK_LEN`].
    pub fn attach(&self, client: UnixStream) -> io::Result<()> {
        client.set_nonblocking(true)?;
        let mut state = self.inner.state();
        if state.clients == CLIENTS_MAX {
            return Err(io::Error::new(
                io::ErrorKind::QuotaExceeded,
                format!("{CLIENTS_MAX} clients are attached: detach one first"),
            ));
        }
        state.clients += 1;
        state.arrivals.push(client);
        drop(state);
        self.inner.wake();
        Ok(())
    }

    /// Takes output of the guest. Never waits for a reader.
    pub fn write_output(&self, data: &[u8]) {
        self.inner.state().ring.push(data);
        self.inner.wake();
    }

    /// Waits until the log has everything written so far; a second at most.
    pub fn flush(&self) {
        let until = Instant::now() + FLUSH_MAX;
        let mut state = self.inner.state();
        let target = state.ring.end;
        self.inner.wake();
        while state.logged < target {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self
                .inner
                .logged
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    pub(crate) fn set_taker(&self, taker: Weak<dyn InputTaker>) {
        *self
            .inner
            .taker
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(taker);
    }

    /// Takes input for the guest; returns the number of bytes.
    pub(crate) fn take_input(&self, data: &mut [u8]) -> usize {
        let mut state = self.inner.state();
        let was_full = state.input.len() == INPUT_MAX;
        let count = data.len().min(state.input.len());
        for (to, byte) in data.iter_mut().zip(state.input.drain(..count)) {
            *to = byte;
        }
        drop(state);
        if was_full && count > 0 {
            self.inner.wake();
        }
        count
    }

    /// Readable while there may be input.
    pub(crate) fn input_fd(&self) -> RawFd {
        self.inner.input_event.as_raw_fd()
    }

    /// To be called before [`ConsoleHub::take_input`].
    pub(crate) fn clear_input_event(&self) {
        let _ = self.inner.input_event.read();
    }
}

impl Drop for ConsoleHub {
    fn drop(&mut self) {
        self.inner.state().exit = true;
        let _ = self.inner.wake.write(1);
        // The last owner may be the hub's own thread, which had input for a
        // port that everybody else let go of: it cannot wait for itself.
        let thread = self.thread.take();
        let own = std::thread::current().id();
        if let Some(thread) = thread.filter(|t| t.thread().id() != own) {
            let _ = thread.join();
        }
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        if !self.woken.swap(true, Ordering::AcqRel) {
            // Fails only when the counter is full: it is readable anyway.
            let _ = self.wake.write(1);
        }
    }
}

struct Client {
    stream: UnixStream,
    /// Position of the next byte that it gets.
    at: u64,
    readable: bool,
    writable: bool,
    gone: bool,
}

/// The hub's thread.
struct Pump {
    inner: Arc<Inner>,
    log: Option<Log>,
    clients: Vec<(u64, Client)>,
    next_token: u64,
    epoll: OwnedFd,
}

impl Pump {
    fn new(inner: Arc<Inner>, log: Option<Log>) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        // SAFETY: the eventfd lives in `inner`, and `inner` in the result.
        let wake = unsafe { BorrowedFd::borrow_raw(inner.wake.as_raw_fd()) };
        epoll::add(&epoll, wake, EventData::new_u64(TOKEN_WAKE), EventFlags::IN)?;
        Ok(Self {
            inner,
            log,
            clients: Vec::new(),
            next_token: TOKEN_WAKE + 1,
            epoll,
        })
    }

    fn run(mut self) {
        loop {
            let exit = self.inner.state().exit;
            self.write_log();
            if exit {
                return;
            }
            self.welcome();
            self.write_clients();
            self.read_clients();
            self.dismiss();
            if self.wait().is_err() {
                return;
            }
        }
    }

    fn wait(&mut self) -> io::Result<()> {
        let mut events = [MaybeUninit::<Event>::uninit(); CLIENTS_MAX + 1];
        let ready = match epoll::wait(&self.epoll, &mut events, None) {
            Ok((ready, _)) => ready,
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        for event in ready {
            let (token, flags) = (event.data.u64(), event.flags);
            if token == TOKEN_WAKE {
                // In this order: output that comes now wakes us once more.
                let _ = self.inner.wake.read();
                self.inner.woken.store(false, Ordering::Release);
            }
            for (known, client) in &mut self.clients {
                if *known == token {
                    let ended = EventFlags::HUP | EventFlags::ERR | EventFlags::RDHUP;
                    client.readable |= flags.intersects(EventFlags::IN | ended);
                    client.writable |= flags.contains(EventFlags::OUT);
                }
            }
        }
        Ok(())
    }

    fn write_log(&mut self) {
        let mut chunk = [0; CHUNK];
        loop {
            let (missed, count) = {
                let mut state = self.inner.state();
                let missed = state.ring.start().saturating_sub(state.logged);
                state.logged += missed;
                let count = state.ring.read(state.logged, &mut chunk);
                (missed, count)
            };
            if let Some(log) = &mut self.log {
                // A full disk must not stop the VM's console.
                if missed > 0 {
                    let _ = log.append(format!("\n[{missed} bytes lost]\n").as_bytes());
                }
                let _ = log.append(&chunk[..count]);
            }
            self.inner.state().logged += count as u64;
            if count == 0 {
                self.inner.logged.notify_all();
                return;
            }
        }
    }

    fn welcome(&mut self) {
        let (arrivals, at) = {
            let mut state = self.inner.state();
            (std::mem::take(&mut state.arrivals), state.ring.start())
        };
        for stream in arrivals {
            let token = self.next_token;
            self.next_token += 1;
            // Edge-triggered: a full input buffer or an idle output must not spin.
            let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
            let watched = epoll::add(
                &self.epoll,
                stream.as_fd(),
                EventData::new_u64(token),
                flags,
            );
            let client = Client {
                stream,
                at,
                readable: true,
                writable: true,
                gone: watched.is_err(),
            };
            self.clients.push((token, client));
        }
    }

    fn write_clients(&mut self) {
        let mut chunk = [0; CHUNK];
        for (_, client) in &mut self.clients {
            while client.writable && !client.gone {
                let count = {
                    let state = self.inner.state();
                    // Fell behind by more than the ring: too slow.
                    client.gone |= client.at < state.ring.start();
                    state.ring.read(client.at, &mut chunk)
                };
                if count == 0 || client.gone {
                    break;
                }
                match client.stream.write(&chunk[..count]) {
                    Ok(written) => client.at += written as u64,
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => client.writable = false,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => client.gone = true,
                }
            }
            client.gone |= client.at < self.inner.state().ring.start();
        }
    }

    fn read_clients(&mut self) {
        let mut arrived = false;
        let mut chunk = [0; CHUNK];
        for (_, client) in &mut self.clients {
            while client.readable && !client.gone {
                let room = INPUT_MAX - self.inner.state().input.len();
                if room == 0 {
                    break;
                }
                match client.stream.read(&mut chunk[..room.min(CHUNK)]) {
                    Ok(0) => client.gone = true,
                    Ok(count) => {
                        self.inner.state().input.extend(&chunk[..count]);
                        arrived = true;
                    }
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => client.readable = false,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => client.gone = true,
                }
            }
        }
        if arrived {
            let _ = self.inner.input_event.write(1);
            let taker = self
                .inner
                .taker
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone();
            if let Some(taker) = taker.and_then(|weak| weak.upgrade()) {
                taker.input_ready();
            }
        }
    }

    /// Lets go of clients that are gone; closing ends their epoll entry.
    fn dismiss(&mut self) {
        let before = self.clients.len();
        self.clients.retain(|(_, client)| !client.gone);
        let left = before - self.clients.len();
        if left > 0 {
            self.inner.state().clients -= left;
        }
    }
}

/// The files of a console's log, open for good: `*` and, for what was in it
/// before it reached its bound, `*.1`.
#[derive(Debug)]
pub struct ConsoleLog {
    file: File,
    old: File,
}

impl ConsoleLog {
    /// Opens or makes both.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut old = path.as_os_str().to_owned();
        old.push(".1");
        let open = |path: &Path| {
            let mut options = OpenOptions::new();
            options.read(true).create(true).append(true).open(path)
        };
        Ok(Self {
            file: open(path)?,
            old: open(Path::new(&old))?,
        })
    }
}

/// A log with a bound of [`LOG_MAX`]. No name is used: a process in its cage
/// has none, and one that began in an initramfs finds nothing under it later.
struct Log {
    files: ConsoleLog,
    len: u64,
}

impl Log {
    fn new(files: &ConsoleLog) -> io::Result<Self> {
        Ok(Self {
            len: files.file.metadata()?.len(),
            files: ConsoleLog {
                file: files.file.try_clone()?,
                old: files.old.try_clone()?,
            },
        })
    }

    fn append(&mut self, data: &[u8]) -> io::Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        if self.len + data.len() as u64 > LOG_MAX {
            self.turn_over()?;
        }
        self.files.file.write_all(data)?;
        self.len += data.len() as u64;
        Ok(())
    }

    /// Moves what is in the log to the old one.
    fn turn_over(&mut self) -> io::Result<()> {
        let ConsoleLog { file, old } = &mut self.files;
        old.set_len(0)?;
        let mut chunk = vec![0; SCROLLBACK_LEN];
        let mut at = 0;
        while at < LOG_MAX {
            let count = file.read_at(&mut chunk, at)?;
            if count == 0 {
                break;
            }
            old.write_all(&chunk[..count])?;
            at += count as u64;
        }
        file.set_len(0)?;
        self.len = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_until(stream: &mut UnixStream, want: &[u8]) -> Vec<u8> {
        stream
            .set_read_timeout(Some(Duration::from_secs(120)))
            .expect("timeout");
        let mut got = Vec::new();
        let mut chunk = [0; 1024];
        while !got.windows(want.len()).any(|part| part == want) {
            let count = stream.read(&mut chunk).expect("read before the timeout");
            assert_ne!(count, 0, "hung up before {want:?}");
            got.extend_from_slice(&chunk[..count]);
        }
        got
    }

    #[test]
    fn a_client_gets_the_scrollback_and_then_the_rest() {
        let hub = ConsoleHub::new(None).expect("hub");
        hub.write_output(b"before ");
        let (mut ours, theirs) = UnixStream::pair().expect("pair");
        hub.attach(theirs).expect("attach");
        read_until(&mut ours, b"before ");
        hub.write_output(b"after");
        read_until(&mut ours, b"after");
    }

    #[test]
    fn nobody_waits_for_a_slow_client_and_it_is_dropped() {
        let hub = ConsoleHub::new(None).expect("hub");
        let (mut slow, theirs) = UnixStream::pair().expect("pair");
        hub.attach(theirs).expect("attach");
        // Attached for good, before the flood.
        hub.write_output(b"hello");
        read_until(&mut slow, b"hello");
        let line = [b'x'; 1024];
        for _ in 0..4096 {
            hub.write_output(&line);
        }
        hub.flush();
        let mut all = Vec::new();
        slow.set_read_timeout(Some(Duration::from_secs(120)))
            .expect("timeout");
        slow.read_to_end(&mut all).expect("it is hung up");
        assert!(all.len() < 4096 * 1024);
        let (mut next, theirs) = UnixStream::pair().expect("pair");
        hub.attach(theirs).expect("attach");
        hub.write_output(b"still here");
        read_until(&mut next, b"still here");
    }

    #[test]
    fn input_waits_for_the_guest_and_loses_nothing() {
        let hub = ConsoleHub::new(None).expect("hub");
        let (mut ours, theirs) = UnixStream::pair().expect("pair");
        hub.attach(theirs).expect("attach");
        let sent: Vec<u8> = (0..20_000u32).map(|i| i as u8).collect();
        let copy = sent.clone();
        let writer = std::thread::spawn(move || ours.write_all(&copy).map(|()| ours));
        let mut got = Vec::new();
        let until = Instant::now() + Duration::from_secs(120);
        while got.len() < sent.len() && Instant::now() < until {
            let mut chunk = [0; 64];
            let count = hub.take_input(&mut chunk);
            got.extend_from_slice(&chunk[..count]);
            if count == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        assert!(got == sent);
        writer.join().expect("writer").expect("write");
    }

    #[test]
    fn the_log_is_bounded_and_has_the_end() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("console.log");
        let hub = ConsoleHub::new(Some(&path)).expect("hub");
        for i in 0..30 {
            hub.write_output(&[b'a' + (i % 26) as u8; 60_000]);
            hub.flush();
        }
        hub.write_output(b"the end");
        drop(hub);
        let log = std::fs::read(&path).expect("log");
        assert!(log.ends_with(b"the end") && log.len() as u64 <= LOG_MAX);
        let old = std::fs::read(folder.path().join("console.log.1")).expect("old log");
        assert!(old.len() as u64 <= LOG_MAX);
        // Nothing is missing between the two.
        let all = [old, log].concat();
        let (said, end) = all.split_at(all.len() - b"the end".len());
        assert_eq!(end, b"the end");
        let mut letters = said.chunks(60_000).map(|part| part[0]);
        assert!(
            said.chunks(60_000)
                .all(|part| part.iter().all(|b| *b == part[0]))
        );
        let first = letters.next().expect("some");
        let rest: Vec<u8> = letters.collect();
        assert!(rest.len() > 10);
        let next = |b: u8| if b == b'z' { b'a' } else { b + 1 };
        rest.iter().fold(first, |before, &b| {
            assert_eq!(b, next(before));
            b
        });
    }

    #[test]
    fn the_ring_keeps_the_latest_bytes_at_their_positions() {
        let mut ring = Ring {
            bytes: VecDeque::new(),
            end: 0,
        };
        let all: Vec<u8> = (0..200_000u32).map(|i| (i * 7) as u8).collect();
        for part in all.chunks(977) {
            ring.push(part);
        }
        assert_eq!(ring.end, all.len() as u64);
        assert_eq!(ring.bytes.len(), SCROLLBACK_LEN);
        let from = ring.start() + 100;
        let mut got = [0; 1000];
        assert_eq!(ring.read(from, &mut got), 1000);
        assert_eq!(got, all[from as usize..from as usize + 1000]);
    }
}
