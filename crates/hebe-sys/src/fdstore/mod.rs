//! A service's file descriptor store in systemd: PID 1 holds open files for a
//! service whose processes may all be gone.
//!
//! From version 261 on, PID 1 also hands what the stores of units with
//! `FileDescriptorStorePreserve=yes` hold over a kexec, where the kernel can
//! carry it: memfds, and sessions of the Live Update Orchestrator
//! ([`crate::luo`]), which it retrieves by their names and passes to the unit of
//! the same name when that is started.
//!
//! ```text
//! service ── FDSTORE=1, FDNAME=…, one descriptor ──▶ PID 1      (sd_notify(3))
//!         ── BARRIER=1, a pipe's end ──▶ closed once all before it was done
//! PID 1   ── LISTEN_FDS, LISTEN_FDNAMES, descriptors from 3 on ──▶ service
//! ```
//! PID 1 answers nothing: what does not fit into the store is closed in silence.
//! So whoever depends on it counts afterwards ([`FdStore::held`]).
//!
//! Sources: systemd's `docs/FILE_DESCRIPTOR_STORE.md`, sd_notify(3),
//! sd_listen_fds(3), systemd.service(5) and `src/core/luo.c`, version 262.

#[cfg(any(test, feature = "testing"))]
pub mod fake;
mod show;

use std::env;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

pub use show::{Manager, UnitStore, manager, own_unit, room_in, unit_store};

/// The first systemd that hands stores over a kexec.
pub const FIRST_VERSION: u32 = 261;
/// How long PID 1 may be busy with other things.
const PATIENCE: Duration = Duration::from_secs(30);
/// The first descriptor that is handed over.
const LISTEN_FDS_START: i32 = 3;
/// Most that are taken.
const LISTEN_FDS_MAX: i32 = 4096;
/// What is taken out of the environment: it is this process's alone.
const VARIABLES: [&str; 6] = [
    "NOTIFY_SOCKET",
    "LISTEN_PID",
    "LISTEN_PIDFDID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "FDSTORE",
];

/// Somebody who holds open files for this service.
pub trait FdStore: Send + Sync + fmt::Debug {
    /// Gives it a duplicate under a name. That it was taken is known only from
    /// [`FdStore::held`], after [`FdStore::settle`].
    ///
    /// # Errors
    /// The system's: it is not there.
    fn put(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()>;

    /// Has it close everything of that name.
    ///
    /// # Errors
    /// As [`FdStore::put`].
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Waits until it has done all that was asked before.
    ///
    /// # Errors
    /// `TimedOut`, and as [`FdStore::put`].
    fn settle(&self) -> io::Result<()>;

    /// How many it holds for this service.
    ///
    /// # Errors
    /// It does not say.
    fn held(&self) -> io::Result<usize>;
}

/// What systemd gave this process at its start.
#[derive(Debug, Default)]
pub struct Given {
    /// Where it listens, for a process of a unit that may speak.
    pub notify: Option<OsString>,
    /// What its store held for this unit, with the names.
    pub fds: Vec<(String, OwnedFd)>,
}

impl Given {
    /// Takes everything out of the environment, which children inherit.
    ///
    /// # Safety
    /// The process has no other thread yet, and has opened nothing at the numbers
    /// from 3 on that the environment speaks of.
    pub unsafe fn take() -> Self {
        let number = |key: &str| env::var(key).ok()?.parse::<u64>().ok();
        let ours = number("LISTEN_PID") == Some(u64::from(std::process::id()));
        let count = number("LISTEN_FDS")
            .filter(|_| ours)
            .and_then(|count| i32::try_from(count).ok())
            .unwrap_or(0)
            .clamp(0, LISTEN_FDS_MAX);
        let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
        let mut names = names.split(':').map(str::to_owned);
        let fds = (LISTEN_FDS_START..LISTEN_FDS_START + count).map(|fd| {
            // SAFETY: systemd opened it for this process, and nobody else knows
            // of it, as the caller says.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            // A descriptor that is none is found out when it is used.
            let _ = rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC);
            (names.next().unwrap_or_default(), fd)
        });
        let given = Self {
            fds: fds.collect(),
            notify: env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty()),
        };
        for key in VARIABLES {
            // SAFETY: the caller says that no other thread reads the environment.
            unsafe { env::remove_var(key) };
        }
        given
    }
}

/// A descriptor that was handed on to a child, by the word that says which:
/// `NUMBER=NAME`. `None` where the word is another.
///
/// # Safety
/// A number in it is an open descriptor of which nobody else knows.
pub unsafe fn inherited(word: &str) -> Option<(String, OwnedFd)> {
    let (number, name) = word.split_once('=')?;
    let number: i32 = number.parse().ok().filter(|n| *n >= LISTEN_FDS_START)?;
    // SAFETY: as the caller says.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    let _ = rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC);
    Some((name.to_owned(), fd))
}

/// PID 1's socket for words of services.
#[derive(Debug)]
pub struct Notify {
    socket: UnixDatagram,
}

impl Notify {
    /// At the address that `NOTIFY_SOCKET` says: a path, or a name after `@`.
    ///
    /// # Errors
    /// The system's: nobody listens.
    pub fn connect(address: &OsStr) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        match address.as_bytes().strip_prefix(b"@") {
            Some(name) => socket.connect_addr(&SocketAddr::from_abstract_name(name)?)?,
            None => socket.connect(address)?,
        }
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { socket })
    }

    fn send(&self, words: &str, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let words = [IoSlice::new(words.as_bytes())];
        loop {
            match sendmsg(&self.socket, &words, &mut control, SendFlags::NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// See [`FdStore::put`].
    ///
    /// # Errors
    /// The same.
    pub fn put(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
        // A session is not polled: the store would drop it on a hang-up.
        self.send(&format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0"), Some(fd))
    }

    /// See [`FdStore::remove`].
    ///
    /// # Errors
    /// The same.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), None)
    }

    /// See [`FdStore::settle`].
    ///
    /// # Errors
    /// The same.
    pub fn settle(&self, patience: Duration) -> io::Result<()> {
        let (here, there) = io::pipe()?;
        self.send("BARRIER=1", Some(there.as_fd()))?;
        drop(there);
        let mut polled = [PollFd::new(&here, PollFlags::empty())];
        let patience = Timespec::try_from(patience).map_err(io::Error::other)?;
        loop {
            match poll(&mut polled, Some(&patience)) {
                Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

/// This service's store in the running PID 1.
#[derive(Debug)]
pub struct ServiceStore {
    notify: Notify,
    unit: String,
}

impl ServiceStore {
    /// Of the unit that this process is part of.
    ///
    /// # Errors
    /// One sentence: this process is no unit's, or the unit's store cannot carry
    /// anything over a kexec.
    pub fn open(given: &Given) -> Result<Self, String> {
        let unit = own_unit().ok_or("this process is no systemd service's")?;
        manager()?.may_carry()?;
        unit_store(&unit)?.may_carry(&unit)?;
        let address = given.notify.as_deref();
        let address = address.ok_or_else(|| format!("{unit} has no NotifyAccess="))?;
        let notify = Notify::connect(address);
        let notify = notify.map_err(|e| format!("systemd does not listen to {unit}: {e}"))?;
        Ok(Self { notify, unit })
    }
}

impl FdStore for ServiceStore {
    fn put(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.notify.put(name, fd)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.notify.remove(name)
    }

    fn settle(&self) -> io::Result<()> {
        self.notify.settle(PATIENCE)
    }

    fn held(&self) -> io::Result<usize> {
        let store = unit_store(&self.unit).map_err(io::Error::other)?;
        Ok(store.held)
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
