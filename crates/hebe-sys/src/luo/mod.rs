//! Linux's Live Update Orchestrator (LUO): open files that outlive a kexec.
//!
//! From Linux 6.19 a kernel booted with `kho=on liveupdate=on` keeps memfds
//! for the kernel it jumps into. This module is the kernel's interface,
//! `/dev/liveupdate`, behind three small traits, so that another carrier of
//! descriptors, and the tests' own kernel (`fake`), can stand in its place.
//!
//! ```text
//! old kernel                                  new kernel
//!   Orchestrator ── create_session(name)        Orchestrator ── retrieve_session(name)
//!        ▼                                            ▼
//!   Outgoing ── preserve(fd, token) …           Incoming ── retrieve(token) …, finish()
//!        │ open at the jump: kept                     │ dropped: finished, what was not
//!        │ dropped: all of it let go                  │ retrieved is freed
//! ```
//!
//! What the kernel (`kernel/liveupdate/`, `mm/memfd_luo.c`, 7.3) does:
//! - One process at a time has the device open. Sessions live on without it.
//! - Preserving a memfd pins its pages and *fills its holes*. From then on it
//!   neither grows nor shrinks, and no hole can be punched (EPERM); reading and
//!   writing go on. The kernel holds the file itself, so its descriptors may go.
//! - Only memfds on ordinary shared memory: huge-page memfds are refused.
//! - A retrieve that failed fails with the same error for ever. One that
//!   succeeded gives the same file again, until the session is finished.
//! - When the new kernel cannot read what the old one left, opening the device
//!   fails with EIO, and all of it is lost.

mod abi;
#[cfg(any(test, feature = "testing"))]
pub mod fake;
mod handed;

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::str::FromStr;

use abi::{Argument, NAME_LEN};

pub use handed::{Adopted, Handed};

/// Where the device is.
pub const DEVICE: &str = "/dev/liveupdate";

/// Tells the files of one session apart; the same in both kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u64);

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A session's name: 1 to 63 bytes without NUL, unique among the sessions that
/// one kernel hands over, whoever made them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionName(String);

/// The text cannot name a session.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("'{0}' cannot name a live-update session: use 1 to 63 bytes without NUL")]
pub struct InvalidSessionName(pub String);

impl FromStr for SessionName {
    type Err = InvalidSessionName;

    fn from_str(text: &str) -> Result<Self, InvalidSessionName> {
        if text.is_empty() || text.len() >= NAME_LEN || text.contains('\0') {
            return Err(InvalidSessionName(text.to_owned()));
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for SessionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why something was not preserved, or did not come back.
#[derive(Debug, thiserror::Error)]
pub enum LuoError {
    /// The kernel does not know it.
    #[error(
        "this kernel has no Live Update Orchestrator: it takes Linux 6.19 or newer, built with CONFIG_LIVEUPDATE=y and CONFIG_LIVEUPDATE_MEMFD=y, and booted with kho=on liveupdate=on"
    )]
    NotOffered,
    /// The command line does not switch it on.
    #[error(
        "the Live Update Orchestrator is not switched on: boot with kho=on liveupdate=on (this kernel was booted without {0})"
    )]
    NotEnabled(&'static str),
    /// It is switched on, and yet not there.
    #[error(
        "this kernel was booted with kho=on liveupdate=on and yet has no Live Update Orchestrator: either it is built without CONFIG_LIVEUPDATE, or it could not set memory aside for the hand-over (`dmesg | grep -i kho`)"
    )]
    NotWorking,
    /// The kernel has the device, and /dev does not show it.
    #[error("the kernel offers {DEVICE}, but there is no such file: mount devtmpfs on /dev")]
    NoNode,
    /// Another process has the device open.
    #[error(
        "another process has {DEVICE} open, and only one may: `fuser {DEVICE}` names it; systemd from 261 on may be its owner"
    )]
    Taken,
    /// The caller may not open the device.
    #[error("{DEVICE} may not be opened: run as root")]
    NotPermitted(#[source] io::Error),
    /// The new kernel could not read what the old one left.
    #[error(
        "the kernel could not read what the kernel before it preserved, and all of it is lost until the next reboot: dmesg has the reason"
    )]
    Unreadable,
    /// A session of that name is there already.
    #[error("there is a live-update session '{0}' already: another process holds it open")]
    SessionExists(SessionName),
    /// The kernel before did not hand over such a session.
    #[error("the kernel before this one handed over no session '{0}'")]
    NoSession(SessionName),
    /// The session was retrieved before.
    #[error("the session '{0}' was retrieved already: the process that did so holds it")]
    SessionTaken(SessionName),
    /// The token stands for another file of this session.
    #[error(
        "token {0} is used already in this session: this is a fault of Hebe's, please report it"
    )]
    TokenUsed(Token),
    /// The file is preserved already, in this session or another.
    #[error("the file is preserved already, by another live-update session")]
    Preserved,
    /// A kind of file that the kernel does not carry.
    #[error(
        "the kernel carries no file of this kind over a kexec: only memfds on ordinary shared memory, so hugepages = false"
    )]
    NotCarried,
    /// The file has seals, or another property, that the kernel cannot carry.
    #[error("the kernel does not carry a file with these seals over a kexec")]
    Seals,
    /// Not enough memory, to fill holes for instance, or too many files.
    #[error("there is not enough memory, or too many files, to preserve it: free some memory")]
    NoRoom(#[source] io::Error),
    /// No such token in this session.
    #[error("the session holds no file under token {0}")]
    NoToken(Token),
    /// The file under the token is lost.
    #[error("the kernel could not bring back the file under token {token}, and will not try again")]
    Lost {
        /// Which file.
        token: Token,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Anything else.
    #[error("the kernel refused to {what}")]
    Refused {
        /// What was tried.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Carries open files into the next kernel.
pub trait Orchestrator: Send + Sync {
    /// Makes a session for the next kernel.
    ///
    /// # Errors
    /// [`LuoError::SessionExists`].
    fn create_session(&self, name: &SessionName) -> Result<Box<dyn Outgoing>, LuoError>;

    /// Gets a session that the kernel before handed over; once.
    ///
    /// # Errors
    /// [`LuoError::NoSession`], [`LuoError::SessionTaken`].
    fn retrieve_session(&self, name: &SessionName) -> Result<Box<dyn Incoming>, LuoError>;
}

/// A session that is being filled. Dropping it lets everything in it go.
pub trait Outgoing: Send + Sync + fmt::Debug {
    /// Preserves a file under `token`. Slow: it fills holes and pins every page.
    ///
    /// # Errors
    /// [`LuoError::TokenUsed`], [`LuoError::Preserved`], [`LuoError::NotCarried`],
    /// [`LuoError::Seals`], [`LuoError::NoRoom`]; the file is as it was, but for
    /// holes that may be filled.
    fn preserve(&self, fd: BorrowedFd<'_>, token: Token) -> Result<(), LuoError>;

    /// Its own descriptor: as long as anybody has a duplicate of it open, the
    /// session stands, and goes along at the jump.
    fn descriptor(&self) -> BorrowedFd<'_>;
}

/// A session from the kernel before. Dropping it finishes it, and frees what
/// was not retrieved.
pub trait Incoming: Send + Sync + fmt::Debug {
    /// Brings a file back. Slow: it goes through every page.
    ///
    /// # Errors
    /// [`LuoError::NoToken`]; [`LuoError::Lost`], which is final.
    fn retrieve(&self, token: Token) -> Result<OwnedFd, LuoError>;

    /// Ends the session: the kernel lets go of every file. Those that were
    /// retrieved live on in their descriptors; the others are freed.
    ///
    /// # Errors
    /// [`LuoError::Refused`]: the session stands as it was.
    fn finish(&self) -> Result<(), LuoError>;
}

/// The running kernel's Live Update Orchestrator.
#[derive(Debug)]
pub struct LiveUpdate {
    device: File,
}

impl LiveUpdate {
    /// Opens the device. Keep it no longer than it takes to get at the
    /// sessions, for it keeps every other process out.
    ///
    /// # Errors
    /// [`LuoError::NotOffered`], [`LuoError::NotEnabled`],
    /// [`LuoError::NotWorking`], [`LuoError::NoNode`],
    /// [`LuoError::Taken`], [`LuoError::NotPermitted`], [`LuoError::Unreadable`].
    pub fn open() -> Result<Self, LuoError> {
        let opened = File::options().read(true).write(true).open(DEVICE);
        match opened {
            Ok(device) => Ok(Self { device }),
            Err(error) => Err(open_error(error, || why_absent(Path::new("/proc")))),
        }
    }

    fn session(&self, request: libc::c_ulong, name: &SessionName) -> io::Result<Session> {
        let mut argument = abi::Session {
            size: size_of::<abi::Session>() as u32,
            fd: -1,
            name: [0; NAME_LEN],
        };
        argument.name[..name.0.len()].copy_from_slice(name.0.as_bytes());
        abi::call(self.device.as_fd(), request, &mut argument)?;
        // SAFETY: the call succeeded, so the kernel has put a new descriptor
        // there, which nobody else knows of.
        let fd = unsafe { owned(argument.fd) }?;
        Ok(Session { fd })
    }
}

/// Whether the running kernel can preserve files: its device is there. Opens
/// nothing, and so disturbs no owner.
///
/// # Errors
/// [`LuoError::NotOffered`], [`LuoError::NotEnabled`], [`LuoError::NotWorking`],
/// [`LuoError::NoNode`].
pub fn offered() -> Result<(), LuoError> {
    if Path::new(DEVICE).exists() {
        return Ok(());
    }
    Err(why_absent(Path::new("/proc")))
}

fn open_error(error: io::Error, absent: impl FnOnce() -> LuoError) -> LuoError {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => absent(),
        Some(libc::EBUSY) => LuoError::Taken,
        Some(libc::EACCES | libc::EPERM) => LuoError::NotPermitted(error),
        Some(libc::EIO) => LuoError::Unreadable,
        _ => LuoError::Refused {
            what: "open /dev/liveupdate",
            source: error,
        },
    }
}

/// Why the device is not there, from what /proc says.
fn why_absent(proc: &Path) -> LuoError {
    let misc = fs::read_to_string(proc.join("misc")).unwrap_or_default();
    let mut devices = misc.lines().filter_map(|l| l.split_whitespace().nth(1));
    if devices.any(|name| name == "liveupdate") {
        return LuoError::NoNode;
    }
    let words = fs::read_to_string(proc.join("cmdline")).unwrap_or_default();
    let has = |wanted: &str| words.split_whitespace().any(|word| word == wanted);
    // Where neither word is there nobody tried, and the kernel may be any.
    match (has("kho=on"), has("liveupdate=on")) {
        (true, false) => LuoError::NotEnabled("liveupdate=on"),
        (false, true) => LuoError::NotEnabled("kho=on"),
        (true, true) => LuoError::NotWorking,
        (false, false) => LuoError::NotOffered,
    }
}

/// Takes the descriptor that an ioctl filled in.
///
/// # Safety
/// A number that is not negative is an open descriptor that nobody owns.
unsafe fn owned(fd: i32) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::ErrorKind::InvalidData.into());
    }
    // SAFETY: as the caller promises.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

impl Orchestrator for LiveUpdate {
    fn create_session(&self, name: &SessionName) -> Result<Box<dyn Outgoing>, LuoError> {
        match self.session(abi::CREATE_SESSION, name) {
            Ok(session) => Ok(Box::new(session)),
            Err(error) => Err(create_error(error, name)),
        }
    }

    fn retrieve_session(&self, name: &SessionName) -> Result<Box<dyn Incoming>, LuoError> {
        match self.session(abi::RETRIEVE_SESSION, name) {
            Ok(session) => Ok(Box::new(session)),
            Err(error) => Err(retrieve_session_error(error, name)),
        }
    }
}

/// What the kernel calls an open session in /proc, before its name.
const LINK: &str = "anon_inode:[luo_session] ";

/// A session that somebody else, PID 1 for instance, got from the kernel before,
/// and its name as the kernel tells it: whatever else is said of the descriptor
/// is only a word for it.
///
/// # Errors
/// `InvalidInput`: the descriptor is no session's.
pub fn adopt(fd: OwnedFd) -> io::Result<Adopted> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let link = fs::read_link(path)?;
    let name = named(&link.to_string_lossy()).ok_or(io::ErrorKind::InvalidInput)?;
    Ok((name, Box::new(Session { fd })))
}

fn named(link: &str) -> Option<SessionName> {
    link.strip_prefix(LINK)?.parse().ok()
}

/// One open session; the kernel knows which of the two kinds.
#[derive(Debug)]
struct Session {
    fd: OwnedFd,
}

impl Session {
    fn call<T: Argument>(&self, request: libc::c_ulong, argument: &mut T) -> io::Result<()> {
        abi::call(self.fd.as_fd(), request, argument)
    }
}

impl Outgoing for Session {
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn preserve(&self, fd: BorrowedFd<'_>, token: Token) -> Result<(), LuoError> {
        let mut argument = abi::File {
            size: size_of::<abi::File>() as u32,
            fd: fd.as_raw_fd(),
            token: token.0,
        };
        self.call(abi::PRESERVE_FD, &mut argument)
            .map_err(|e| preserve_error(e, token))
    }
}

impl Incoming for Session {
    fn retrieve(&self, token: Token) -> Result<OwnedFd, LuoError> {
        let mut argument = abi::File {
            size: size_of::<abi::File>() as u32,
            fd: -1,
            token: token.0,
        };
        self.call(abi::RETRIEVE_FD, &mut argument)
            // SAFETY: the call succeeded, so the kernel has put a new
            // descriptor there, which nobody else knows of.
            .and_then(|()| unsafe { owned(argument.fd) })
            .map_err(|e| retrieve_error(e, token))
    }

    fn finish(&self) -> Result<(), LuoError> {
        let mut argument = abi::Finish {
            size: size_of::<abi::Finish>() as u32,
            reserved: 0,
        };
        self.call(abi::FINISH, &mut argument)
            .map_err(|source| LuoError::Refused {
                what: "finish the session",
                source,
            })
    }
}

fn create_error(source: io::Error, name: &SessionName) -> LuoError {
    match source.raw_os_error() {
        Some(libc::EEXIST) => LuoError::SessionExists(name.clone()),
        Some(libc::ENOMEM | libc::ENOSPC) => LuoError::NoRoom(source),
        _ => LuoError::Refused {
            what: "make a live-update session",
            source,
        },
    }
}

fn retrieve_session_error(source: io::Error, name: &SessionName) -> LuoError {
    match source.raw_os_error() {
        Some(libc::ENOENT) => LuoError::NoSession(name.clone()),
        // The name is valid, so this is what a retrieved session answers.
        Some(libc::EINVAL) => LuoError::SessionTaken(name.clone()),
        _ => LuoError::Refused {
            what: "hand the session out",
            source,
        },
    }
}

fn preserve_error(source: io::Error, token: Token) -> LuoError {
    match source.raw_os_error() {
        Some(libc::EEXIST) => LuoError::TokenUsed(token),
        Some(libc::EBUSY) => LuoError::Preserved,
        Some(libc::ENOENT) => LuoError::NotCarried,
        Some(libc::EOPNOTSUPP) => LuoError::Seals,
        Some(libc::ENOMEM | libc::ENOSPC) => LuoError::NoRoom(source),
        _ => LuoError::Refused {
            what: "preserve the file",
            source,
        },
    }
}

fn retrieve_error(source: io::Error, token: Token) -> LuoError {
    match source.raw_os_error() {
        Some(libc::ENOENT) => LuoError::NoToken(token),
        _ => LuoError::Lost { token, source },
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
