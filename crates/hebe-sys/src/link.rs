//! Interfaces of the host, by name: what a network of Hebe's own is made of
//! (netdevice(7), and bridges as in [`crate::tap`]). Everything here concerns
//! the network namespace of the calling thread.

use std::ffi::{c_int, c_short};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd};

use hebe_types::MacAddr;

use crate::tap::{SIOCBRADDIF, TapError, ioctl, request, socket};

const SIOCBRDELBR: libc::Ioctl = 0x89a1;

/// Whether there is an interface of this name. Asked for the number of one that there
/// is not, the kernel starts `modprobe` twice, for modules of that name.
fn exists(name: &str) -> bool {
    let list = std::fs::read_to_string("/proc/thread-self/net/dev");
    // What cannot be looked at may be there.
    list.map_or(true, |list| is_listed(&list, name))
}

fn is_listed(list: &str, name: &str) -> bool {
    let interfaces = list.lines().filter_map(|line| line.split_once(':'));
    let mut names = interfaces.map(|(name, _)| name.trim());
    names.any(|listed| listed == name)
}

/// The interface's number, if there is one of this name.
pub fn index(name: &str) -> Option<u32> {
    exists(name).then_some(())?;
    let mut request = request(name).ok()?;
    let socket = socket(name).ok()?;
    ioctl(socket.as_fd(), libc::SIOCGIFINDEX, &mut request).ok()?;
    // SAFETY: SIOCGIFINDEX has just written this field of the union.
    u32::try_from(unsafe { request.ifr_ifru.ifru_ifindex }).ok()
}

/// Whether there is an interface of this name that was brought up.
pub fn is_up(name: &str) -> bool {
    let look = || {
        exists(name).then_some(())?;
        let mut request = request(name).ok()?;
        let socket = socket(name).ok()?;
        ioctl(socket.as_fd(), libc::SIOCGIFFLAGS, &mut request).ok()?;
        // SAFETY: SIOCGIFFLAGS has just written this field of the union.
        Some(c_int::from(unsafe { request.ifr_ifru.ifru_flags }) & libc::IFF_UP != 0)
    };
    look().unwrap_or(false)
}

/// Gives the interface an address and the prefix that it reaches, in place of
/// the first that it had.
pub fn set_address(name: &str, address: Ipv4Addr, prefix: u8) -> Result<(), TapError> {
    let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
    for (order, value) in [
        (libc::SIOCSIFADDR, address),
        (libc::SIOCSIFNETMASK, Ipv4Addr::from_bits(mask)),
    ] {
        let mut request = request(name)?;
        request.ifr_ifru.ifru_addr = inet(value);
        let socket = socket(name)?;
        ioctl(socket.as_fd(), order, &mut request)
            .map_err(|e| failed("give an address to interface", name, e))?;
    }
    Ok(())
}

/// `struct sockaddr_in` where the kernel wants a `struct sockaddr`.
fn inet(address: Ipv4Addr) -> libc::sockaddr {
    // SAFETY: `sockaddr` is plain data; all zero is a valid value.
    let mut place: libc::sockaddr = unsafe { std::mem::zeroed() };
    place.sa_family = libc::AF_INET as libc::sa_family_t;
    // Behind family and port: ip(7).
    for (to, byte) in place.sa_data[2..6].iter_mut().zip(address.octets()) {
        *to = byte as libc::c_char;
    }
    place
}

/// Gives the interface an Ethernet address.
pub fn set_mac(name: &str, mac: MacAddr) -> Result<(), TapError> {
    let mut request = request(name)?;
    // SAFETY: `sockaddr` is plain data; all zero is a valid value.
    let mut place: libc::sockaddr = unsafe { std::mem::zeroed() };
    place.sa_family = libc::ARPHRD_ETHER;
    for (to, byte) in place.sa_data.iter_mut().zip(mac.0) {
        *to = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_hwaddr = place;
    let socket = socket(name)?;
    ioctl(socket.as_fd(), libc::SIOCSIFHWADDR, &mut request)
        .map_err(|e| failed("give an Ethernet address to interface", name, e))
}

/// Puts interface `port` into `bridge`; nothing to do if it is in one.
pub fn join(port: &str, bridge: &str) -> Result<(), TapError> {
    let Some(number) = index(port) else {
        return Err(failed(
            "find interface",
            port,
            io::Error::from_raw_os_error(libc::ENODEV),
        ));
    };
    let mut request = request(bridge)?;
    request.ifr_ifru.ifru_ifindex = number as c_int;
    let socket = socket(bridge)?;
    match ioctl(socket.as_fd(), SIOCBRADDIF, &mut request) {
        Err(e) if e.raw_os_error() != Some(libc::EBUSY) => {
            Err(failed("add a port to bridge", bridge, e))
        }
        _ => Ok(()),
    }
}

/// Brings a bridge down and removes it; an absent one is fine.
pub fn remove_bridge(name: &str) -> Result<(), TapError> {
    if index(name).is_none() {
        return Ok(());
    }
    let mut down = request(name)?;
    let mut bytes = down.ifr_name;
    let socket = socket(name)?;
    down.ifr_ifru.ifru_flags = 0 as c_short;
    ioctl(socket.as_fd(), libc::SIOCSIFFLAGS, &mut down)
        .and_then(|()| ioctl(socket.as_fd(), SIOCBRDELBR, &mut bytes))
        .map_err(|e| failed("remove bridge", name, e))
}

/// Has a socket send and receive on this interface alone (socket(7)).
pub fn bind_to_device(socket: impl AsFd, name: &str) -> io::Result<()> {
    let len = name.len() as libc::socklen_t;
    // SAFETY: the kernel reads `len` bytes of the name, which outlives the call.
    let rc = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_BINDTODEVICE,
            name.as_ptr().cast(),
            len,
        )
    };
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Has the kernel drop whatever comes for this socket, as if it never came
/// (socket(7), `SO_ATTACH_FILTER`): to one that listens for TCP, also what belongs to
/// connections that nobody knows, which would be reset otherwise.
pub fn drop_all(socket: impl AsFd) -> rustix::io::Result<()> {
    // `BPF_RET | BPF_K`, of nothing: a program of classic BPF that keeps 0 bytes.
    let mut keep_nothing = [libc::sock_filter {
        code: 0x06,
        jt: 0,
        jf: 0,
        k: 0,
    }];
    let program = libc::sock_fprog {
        len: keep_nothing.len() as libc::c_ushort,
        filter: keep_nothing.as_mut_ptr(),
    };
    // SAFETY: the kernel reads the program and its one instruction, both of which
    // outlive the call, and copies them.
    let rc = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            std::ptr::from_ref(&program).cast(),
            size_of_val(&program) as libc::socklen_t,
        )
    };
    if rc < 0 {
        let error = io::Error::last_os_error();
        return Err(rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::INVAL));
    }
    Ok(())
}

fn failed(what: &'static str, name: &str, source: io::Error) -> TapError {
    if source.raw_os_error() == Some(libc::EPERM) {
        return TapError::Permission(name.to_owned());
    }
    let name = name.to_owned();
    TapError::Other { what, name, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_is_found_by_its_name() {
        assert!(index("lo").is_some());
        assert!(index("hb-none").is_none());
        assert!(!is_up("hb-none"));
        assert!(index("sixteen-bytes-xx").is_none());
        assert!(remove_bridge("hb-none").is_ok());
        let refused = join("hb-none", "hb-none").expect_err("no such port");
        assert!(refused.to_string().contains("hb-none"), "{refused}");
    }

    #[test]
    fn interfaces_are_listed_by_their_whole_names() {
        let list = "Inter-|   Receive\n face |bytes\n    lo: 1 2\nhebe0:1 2\n br0.5: 1 2\n";
        for (name, is) in [
            ("lo", true),
            ("hebe0", true),
            ("br0.5", true),
            ("hebe", false),
            ("face", false),
            ("br0", false),
            ("", false),
        ] {
            assert_eq!(is_listed(list, name), is, "{name}");
        }
    }

    #[test]
    fn an_address_lies_where_the_kernel_looks_for_it() {
        let place = inet(Ipv4Addr::new(10, 1, 2, 254));
        let bytes: Vec<u8> = place.sa_data[..6].iter().map(|b| *b as u8).collect();
        assert_eq!(bytes, [0, 0, 10, 1, 2, 254]);
    }
}
