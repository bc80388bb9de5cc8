//! Tap devices: an Ethernet interface of the host whose other end is a file
//! descriptor (Linux Documentation/networking/tuntap.rst), and bridges.

use std::ffi::{c_int, c_short, c_ulong};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::net::{AddressFamily, SocketFlags, SocketType};

const TUN_DEVICE: &str = "/dev/net/tun";
/// `struct virtio_net_hdr_v1`, which precedes every frame.
const HEADER_LEN: c_int = 12;
/// Bridge requests of <linux/sockios.h>, which `libc` lacks for Linux.
const SIOCBRADDBR: libc::Ioctl = 0x89a0;
pub(crate) const SIOCBRADDIF: libc::Ioctl = 0x89a2;

/// Why a tap or a bridge cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// No tap support.
    #[error("{TUN_DEVICE} cannot be opened: load the module 'tun' (modprobe tun)")]
    Device(#[source] io::Error),
    /// Held by a process, perhaps another VM.
    #[error(
        "tap '{0}' is taken by another process: stop the VM or program that has it, or name another tap"
    )]
    Busy(String),
    /// There is an interface of this name that is no tap, or one made in
    /// another way.
    #[error("'{0}' exists and is not a tap with one queue: remove it, or name another tap")]
    NotTap(String),
    /// Not allowed.
    #[error("tap '{0}' may not be used: run as root or with CAP_NET_ADMIN")]
    Permission(String),
    /// The name is too long or has a NUL.
    #[error("'{0}' cannot name a network interface: 1 to 15 bytes")]
    Name(String),
    /// The tap belongs to another bridge.
    #[error("tap '{tap}' is in bridge '{other}' and not in '{bridge}': take it out of there first")]
    OtherBridge {
        /// The tap.
        tap: String,
        /// The bridge that was asked for.
        bridge: String,
        /// The bridge it is in.
        other: String,
    },
    /// No such bridge.
    #[error("there is no bridge '{0}': create it (ip link add {0} type bridge)")]
    NoBridge(String),
    /// Anything else.
    #[error("cannot {what} '{name}'")]
    Other {
        /// What was tried.
        what: &'static str,
        /// On which interface.
        name: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// A tap, open, with a 12-byte virtio-net header before each frame and no
/// offloads at first. It goes away when closed, unless it was made persistent by
/// somebody else.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
}

impl Tap {
    /// Opens the tap of this name; creates it if absent. Non-blocking.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let mut request = request(name)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(TUN_DEVICE)
            .map_err(TapError::Device)?;
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = flags as c_short;
        ioctl(file.as_fd(), libc::TUNSETIFF, &mut request).map_err(|e| {
            let name = name.to_owned();
            match e.raw_os_error() {
                Some(libc::EBUSY) => TapError::Busy(name),
                Some(libc::EINVAL) => TapError::NotTap(name),
                Some(libc::EPERM) => TapError::Permission(name),
                _ => TapError::Other {
                    what: "open tap",
                    name,
                    source: e,
                },
            }
        })?;
        let tap = Self {
            file,
            name: name.to_owned(),
        };
        let mut len = HEADER_LEN;
        ioctl(tap.as_fd(), libc::TUNSETVNETHDRSZ, &mut len)
            .map_err(|e| tap.other("set the header length of tap", e))?;
        // A tap that another VMM used before may have some on.
        set_offloads(tap.as_fd(), Offloads::default())
            .map_err(|e| tap.other("set the offloads of tap", e))?;
        Ok(tap)
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Brings the interface up.
    pub fn set_up(&self) -> Result<(), TapError> {
        set_up(&self.name)
    }

    /// Puts the interface into a bridge; nothing to do if it is there.
    pub fn join_bridge(&self, bridge: &str) -> Result<(), TapError> {
        let mut tap = request(&self.name)?;
        let mut port = request(bridge)?;
        let socket = socket(&self.name)?;
        ioctl(socket.as_fd(), libc::SIOCGIFINDEX, &mut tap)
            .map_err(|e| self.other("find tap", e))?;
        // SAFETY: SIOCGIFINDEX has just written this field of the union.
        port.ifr_ifru.ifru_ifindex = unsafe { tap.ifr_ifru.ifru_ifindex };
        let Err(e) = ioctl(socket.as_fd(), SIOCBRADDIF, &mut port) else {
            return Ok(());
        };
        match (e.raw_os_error(), self.bridge()) {
            (Some(libc::EBUSY), Some(other)) if other == bridge => Ok(()),
            (Some(libc::EBUSY), Some(other)) => Err(TapError::OtherBridge {
                tap: self.name.clone(),
                bridge: bridge.to_owned(),
                other,
            }),
            (Some(libc::ENODEV | libc::EOPNOTSUPP), _) => {
                Err(TapError::NoBridge(bridge.to_owned()))
            }
            (Some(libc::EPERM), _) => Err(TapError::Permission(self.name.clone())),
            _ => Err(self.other("add to its bridge tap", e)),
        }
    }

    /// The bridge that the interface is in.
    pub fn bridge(&self) -> Option<String> {
        let link = format!("/sys/class/net/{}/brport/bridge", self.name);
        let target = std::fs::read_link(link).ok()?;
        Some(target.file_name()?.to_str()?.to_owned())
    }

    fn other(&self, what: &'static str, source: io::Error) -> TapError {
        TapError::Other {
            what,
            name: self.name.clone(),
            source,
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl From<Tap> for OwnedFd {
    fn from(tap: Tap) -> Self {
        tap.file.into()
    }
}

/// What the reader of a tap does itself: frames come to it undone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums; the others need it.
    pub checksum: bool,
    /// The cutting of TCP over IPv4 into packets.
    pub tcp4: bool,
    /// The cutting of TCP over IPv6 into packets.
    pub tcp6: bool,
}

/// Tells an open tap what its reader takes. Needs no privilege.
pub fn set_offloads(tap: BorrowedFd<'_>, offloads: Offloads) -> io::Result<()> {
    let bit = |on: bool, bit: libc::c_uint| if on && offloads.checksum { bit } else { 0 };
    let flags = bit(true, libc::TUN_F_CSUM)
        | bit(offloads.tcp4, libc::TUN_F_TSO4)
        | bit(offloads.tcp6, libc::TUN_F_TSO6);
    // SAFETY: TUNSETOFFLOAD takes its argument by value; the descriptor is open.
    let rc = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, c_ulong::from(flags)) };
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Creates a bridge and brings it up. One that is there stays as it is, also down:
/// who has it so brings it up.
pub fn create_bridge(name: &str) -> Result<(), TapError> {
    if make_bridge(name)? {
        set_up(name)?;
    }
    Ok(())
}

/// Creates a bridge, which is down and passes nothing on; whether there was none.
pub fn make_bridge(name: &str) -> Result<bool, TapError> {
    let request = request(name)?;
    if Path::new(&format!("/sys/class/net/{name}/bridge")).exists() {
        return Ok(false);
    }
    let socket = socket(name)?;
    let mut bytes = request.ifr_name;
    match ioctl(socket.as_fd(), SIOCBRADDBR, &mut bytes) {
        Ok(()) => Ok(true),
        // Another process was faster.
        Err(e) if e.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        Err(e) if e.raw_os_error() == Some(libc::EPERM) => {
            Err(TapError::Permission(name.to_owned()))
        }
        Err(source) => Err(TapError::Other {
            what: "create bridge",
            name: name.to_owned(),
            source,
        }),
    }
}

/// Brings an interface up.
pub fn set_up(name: &str) -> Result<(), TapError> {
    let other = |e: io::Error| match e.raw_os_error() {
        Some(libc::EPERM) => TapError::Permission(name.to_owned()),
        _ => TapError::Other {
            what: "bring up interface",
            name: name.to_owned(),
            source: e,
        },
    };
    let mut request = request(name)?;
    let socket = socket(name)?;
    ioctl(socket.as_fd(), libc::SIOCGIFFLAGS, &mut request).map_err(other)?;
    // SAFETY: SIOCGIFFLAGS has just written this field of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    if c_int::from(flags) & libc::IFF_UP != 0 {
        return Ok(());
    }
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as c_short;
    ioctl(socket.as_fd(), libc::SIOCSIFFLAGS, &mut request).map_err(other)
}

pub(crate) fn request(name: &str) -> Result<libc::ifreq, TapError> {
    // SAFETY: `ifreq` is plain data; all zero is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let fits = !name.is_empty() && name.len() < request.ifr_name.len();
    if !fits || name.contains('\0') {
        return Err(TapError::Name(name.to_owned()));
    }
    for (to, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = byte as libc::c_char;
    }
    Ok(request)
}

pub(crate) fn socket(name: &str) -> Result<OwnedFd, TapError> {
    rustix::net::socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(|e| TapError::Other {
        what: "open a socket for interface",
        name: name.to_owned(),
        source: e.into(),
    })
}

/// An ioctl whose argument the kernel reads and may write back.
pub(crate) fn ioctl<T>(
    fd: BorrowedFd<'_>,
    request: libc::Ioctl,
    argument: &mut T,
) -> io::Result<()> {
    // SAFETY: every request in this module takes a pointer to the type that
    // its caller passes, and the kernel keeps to that type's size.
    let rc = unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) };
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_do_not_fit_are_refused() {
        for name in ["", "sixteen-bytes-xx", "a\0b"] {
            assert!(matches!(Tap::open(name), Err(TapError::Name(_))), "{name}");
        }
    }

    /// Needs CAP_NET_ADMIN and /dev/net/tun; says so where they are missing,
    /// and then checks that the refusal is a clear one.
    #[test]
    fn a_tap_is_made_joined_and_refused_to_a_second_user() {
        let id = std::process::id() % 100_000;
        let (name, bridge) = (format!("hbt{id}"), format!("hbb{id}"));
        let tap = match Tap::open(&name) {
            Ok(tap) => tap,
            Err(e @ (TapError::Permission(_) | TapError::Device(_))) => {
                skipped(&format!("{e}; only that refusal was checked"));
                assert!(e.to_string().contains("CAP_NET_ADMIN") || e.to_string().contains("tun"));
                return;
            }
            Err(e) => panic!("{e}"),
        };
        assert!(matches!(Tap::open(&name), Err(TapError::Busy(_))));
        tap.set_up().expect("up");
        tap.set_up().expect("up twice");
        assert!(matches!(
            tap.join_bridge("hb-none"),
            Err(TapError::NoBridge(_))
        ));
        assert!(matches!(Tap::open("lo"), Err(TapError::NotTap(_))));
        match create_bridge(&bridge) {
            Ok(()) => {
                tap.join_bridge(&bridge).expect("join");
                tap.join_bridge(&bridge).expect("join twice");
                assert_eq!(tap.bridge(), Some(bridge.clone()));
                crate::link::remove_bridge(&bridge).expect("remove");
            }
            Err(e) => skipped(&format!("nothing was checked with a bridge: {e}")),
        }
    }

    /// Straight to stderr: what `eprintln!` says in a test that passes is
    /// swallowed, and a test that did not run would look like one that did.
    fn skipped(why: &str) {
        use std::io::Write;
        writeln!(io::stderr(), "skipped: taps: {why}").expect("stderr");
    }
}
