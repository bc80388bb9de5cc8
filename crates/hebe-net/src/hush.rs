//! Ports of the host that lead to guests, while nothing leads there yet.
//!
//! A connection outlives the reboot of the host if nobody answers in its guest's
//! place. A host that has its addresses before it has the rules would: whatever comes
//! to a port that leads to a guest gets a reset, because nothing listens there. So
//! something does, and hears nothing: to whoever sends it is a packet that was lost.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;

use hebe_sys::link;
use hebe_types::Forward;
use rustix::io;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};

use crate::Port;

/// Nobody answers on these ports as long as this lives.
#[derive(Debug)]
pub(crate) struct Hush(#[expect(dead_code, reason = "held, not used")] Vec<OwnedFd>);

impl Hush {
    /// On all ports of the host that lead to these NICs. One that cannot be had is
    /// left out.
    pub(crate) fn on(ports: &[Port]) -> Self {
        let forwards = ports.iter().flat_map(|port| &port.forward);
        let outer = forwards.filter(|forward| !forward.is_loopback());
        Self(outer.filter_map(|forward| deaf(forward).ok()).collect())
    }
}

fn deaf(forward: &Forward) -> io::Result<OwnedFd> {
    let socket = socket(forward, true)?;
    // Before it listens: nobody is greeted.
    link::drop_all(&socket)?;
    if !forward.udp {
        listen(&socket, 1)?;
    }
    Ok(socket)
}

/// A socket that has the port as a server has it; with `early`, also at an address
/// that the host does not have yet.
pub(crate) fn bound(forward: &Forward, early: bool) -> io::Result<OwnedFd> {
    let socket = socket(forward, early)?;
    if !forward.udp {
        listen(&socket, 1)?;
    }
    Ok(socket)
}

fn socket(forward: &Forward, early: bool) -> io::Result<OwnedFd> {
    let kind = match forward.udp {
        true => SocketType::DGRAM,
        false => SocketType::STREAM,
    };
    let socket = socket_with(AddressFamily::INET, kind, SocketFlags::CLOEXEC, None)?;
    // Connections that ended lately are no hindrance; whoever listens still is.
    sockopt::set_socket_reuseaddr(&socket, !forward.udp)?;
    sockopt::set_ip_freebind(&socket, early)?;
    let address = forward.address.unwrap_or(Ipv4Addr::UNSPECIFIED);
    bind(&socket, &SocketAddrV4::new(address, forward.host))?;
    Ok(socket)
}
