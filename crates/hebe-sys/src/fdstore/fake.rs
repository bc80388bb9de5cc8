//! A PID 1 for tests: it listens on a socket of its own and keeps a store with
//! systemd's rules, over any number of kernels.

use std::ffi::OsStr;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::{FdStore, Notify};

/// How long a test waits for this PID 1.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Debug, Default)]
struct State {
    max: usize,
    deaf: bool,
    held: Vec<(String, OwnedFd)>,
}

/// One service's store, and who holds it.
#[derive(Clone, Debug)]
pub struct FakeManager {
    state: Arc<Mutex<State>>,
    socket: PathBuf,
}

impl FakeManager {
    /// Listens on `socket`, until the test's process ends; its store takes `max`.
    ///
    /// # Panics
    /// When the socket cannot be made.
    pub fn new(socket: &Path, max: usize) -> Self {
        let listener = UnixDatagram::bind(socket).expect("bind");
        let state = Arc::new(Mutex::new(State {
            max,
            ..State::default()
        }));
        let shared = Arc::clone(&state);
        thread::spawn(move || while listen(&listener, &shared).is_ok() {});
        Self {
            state,
            socket: socket.to_owned(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where it listens.
    pub fn address(&self) -> &OsStr {
        self.socket.as_os_str()
    }

    /// Whether its store takes so many at all.
    pub fn has_room(&self, wanted: usize) -> bool {
        self.lock().max >= wanted
    }

    /// From now on it takes so many.
    pub fn set_max(&self, max: usize) {
        self.lock().max = max;
    }

    /// From now on it does nothing that it is asked, or does again.
    pub fn set_deaf(&self, deaf: bool) {
        self.lock().deaf = deaf;
    }

    /// The names in the store, in order.
    pub fn names(&self) -> Vec<String> {
        self.lock().held.iter().map(|(n, _)| n.clone()).collect()
    }

    /// Duplicates of what is in the store, as a unit that is started gets them.
    ///
    /// # Panics
    /// When there is no room for them.
    pub fn pass(&self) -> Vec<(String, OwnedFd)> {
        let state = self.lock();
        let copy = |(name, fd): &(String, OwnedFd)| {
            let fd = fd.try_clone().expect("a duplicate");
            (name.clone(), fd)
        };
        state.held.iter().map(copy).collect()
    }

    /// The store's contents as they are after a kexec.
    pub fn replace(&self, held: Vec<(String, OwnedFd)>) {
        self.lock().held = held;
    }
}

impl FdStore for FakeManager {
    fn put(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
        Notify::connect(self.address())?.put(name, fd)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        Notify::connect(self.address())?.remove(name)
    }

    fn settle(&self) -> io::Result<()> {
        Notify::connect(self.address())?.settle(PATIENCE)
    }

    fn held(&self) -> io::Result<usize> {
        Ok(self.lock().held.len())
    }
}

fn listen(listener: &UnixDatagram, state: &Mutex<State>) -> io::Result<()> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0u8; 4096];
    let received = recvmsg(
        listener,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    let words = String::from_utf8_lossy(&bytes[..received.bytes]).into_owned();
    let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
    if !state.deaf {
        state.obey(&words, fds);
    }
    Ok(())
}

impl State {
    fn obey(&mut self, words: &str, fds: Vec<OwnedFd>) {
        let has = |wanted: &str| words.lines().any(|line| line == wanted);
        let name = words.lines().find_map(|line| line.strip_prefix("FDNAME="));
        let name = name.unwrap_or("stored").to_owned();
        if has("FDSTOREREMOVE=1") {
            self.held.retain(|(held, _)| *held != name);
        } else if has("FDSTORE=1") {
            for fd in fds {
                let is_dup = |held: &OwnedFd| same_file(held.as_fd(), fd.as_fd());
                // In silence, as systemd does.
                if self.held.len() < self.max && !self.held.iter().any(|(_, h)| is_dup(h)) {
                    self.held.push((name.clone(), fd));
                }
            }
        }
        // A barrier's descriptor is closed by now.
    }
}

fn same_file(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> bool {
    let id = |fd| rustix::fs::fstat(fd).map(|s| (s.st_dev, s.st_ino));
    matches!((id(a), id(b)), (Ok(a), Ok(b)) if a == b)
}
