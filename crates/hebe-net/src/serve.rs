//! The helper's process: it answers DHCP, passes on what comes to forwarded
//! ports of the loopback address, puts rules back that somebody flushed, and
//! takes away what is not used any more, itself last.
//!
//! ```text
//!   begin ── lock `net/helper` held ──▶ "ready" said ──▶ ┌─ serve ◀──────┐
//!                                                        └── look: every │ second,
//!        nobody uses the network, seen under its lock ◀────  or as rules │ change
//!        └▶ rules and bridge gone ──▶ end
//! ```

use std::fs;
use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use hebe_sys::link;
use hebe_types::{MacAddr, NAT_BRIDGE};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, netlink};

use crate::dhcp::{CLIENT_PORT, PACKET_MAX, SERVER_PORT};
use crate::proxy::{Door, doors};
use crate::range::Range;
use crate::up::Care;
use crate::{NetworkError, Offer, Place, Port, answer, rules};

/// The program's own word for it.
pub const WORD: &str = "net-helper";
/// What it says when it serves.
pub const READY: &str = "ready";

/// How often it looks who uses the network.
const LOOK: Duration = Duration::from_secs(1);
/// How often rules that could not be put in are tried again.
const RETRY: Duration = Duration::from_secs(10);
/// The kernel tells this group of changes to rules (`NFNLGRP_NFTABLES`).
const GROUP_NFTABLES: u32 = 1 << 6;
/// Packets answered before anything else has its turn.
const ANSWERS_MAX: usize = 64;

/// Serves until nobody uses the network. Says [`READY`] on `said`, or the
/// reason why it does not serve.
pub fn run(place: &Place, mut said: impl Write) -> Result<(), NetworkError> {
    let begun = Helper::begin(place);
    // Whoever started it may be gone.
    let _ = match &begun {
        Ok(_) => writeln!(said, "{READY}"),
        Err(error) => writeln!(said, "{error}"),
    };
    drop(said);
    match begun? {
        None => Ok(()),
        Some(mut helper) => helper.serve(),
    }
}

struct Helper<'a> {
    place: &'a Place,
    dhcp: UdpSocket,
    /// Told when rules change; where the kernel cannot, looked at in turn.
    changes: Option<OwnedFd>,
    doors: Vec<Door>,
    ports: Vec<Port>,
    retried: Instant,
    /// Held as long as it serves.
    lock: Option<OwnedFd>,
}

impl<'a> Helper<'a> {
    /// `None` when another one serves.
    fn begin(place: &'a Place) -> Result<Option<Self>, NetworkError> {
        let lock = place.be_helper();
        let lock = lock.map_err(NetworkError::file("lock the network's helper"))?;
        let Some(lock) = lock else {
            return Ok(None);
        };
        let listen = NetworkError::file(format!("listen for DHCP on {NAT_BRIDGE}"));
        let mut helper = Self {
            place,
            dhcp: listen_dhcp().map_err(listen)?,
            changes: watch_rules().ok(),
            doors: Vec::new(),
            ports: place.ports_in_use(),
            retried: Instant::now(),
            lock: Some(lock),
        };
        helper.open_doors();
        Ok(Some(helper))
    }

    fn serve(&mut self) -> Result<(), NetworkError> {
        let mut looked = Instant::now();
        let mut flushed = false;
        loop {
            flushed |= self.wait()?;
            if looked.elapsed() < LOOK && !flushed {
                continue;
            }
            looked = Instant::now();
            // Somebody else changes the network: the next look is soon.
            let Some(held) = self.place.lock(false)? else {
                continue;
            };
            if !self.look(flushed)? {
                // Before the network's lock: whoever comes next starts anew.
                self.lock = None;
                return Ok(());
            }
            drop(held);
            flushed = false;
        }
    }

    /// Waits for anything, and serves it; whether rules changed.
    fn wait(&mut self) -> Result<bool, NetworkError> {
        let mut fds = vec![PollFd::new(&self.dhcp, PollFlags::IN)];
        fds.extend(
            self.doors
                .iter()
                .map(|d| PollFd::new(&d.listener, PollFlags::IN)),
        );
        if let Some(changes) = &self.changes {
            fds.push(PollFd::new(changes, PollFlags::IN));
        }
        let second = Timespec {
            tv_sec: LOOK.as_secs() as i64,
            tv_nsec: 0,
        };
        match poll(&mut fds, Some(&second)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(NetworkError::file("wait for DHCP")(e.into())),
        }
        self.answer_all();
        self.doors.iter().for_each(Door::serve);
        Ok(self.changes.as_ref().is_some_and(have_rules_changed))
    }

    fn answer_all(&self) {
        let mut packet = [0; PACKET_MAX];
        for _ in 0..ANSWERS_MAX {
            let Ok((len, _)) = self.dhcp.recv_from(&mut packet) else {
                return;
            };
            if let Some(reply) = answer(&packet[..len], |mac| self.offer(mac)) {
                // The client asks again if it gets none.
                let _ = self.dhcp.send_to(&reply.bytes, (reply.to, CLIENT_PORT));
            }
        }
    }

    /// Looked up anew: a port may have been plugged this instant.
    fn offer(&self, mac: MacAddr) -> Option<Offer> {
        let ports = self.place.ports_in_use();
        let port = ports.into_iter().find(|port| port.mac == mac)?;
        Some(Offer {
            address: port.address,
            range: Range::of(port.address),
            dns: resolvers(),
            host_name: port.vm.to_string(),
        })
    }

    /// Under the network's lock: takes away what is unused and puts back what is
    /// missing. False when nothing is left to be served.
    fn look(&mut self, flushed: bool) -> Result<bool, NetworkError> {
        let ports = self.place.settle()?;
        let Some(first) = ports.first() else {
            self.place.take_away()?;
            return Ok(false);
        };
        let range = Range::of(first.address);
        let bridge = link::index(NAT_BRIDGE).is_some();
        let late = !self.place.has_rules() && self.retried.elapsed() >= RETRY;
        let anew = late || (flushed && !rules::are_there());
        if late {
            self.retried = Instant::now();
        }
        if anew || !bridge || ports != self.ports {
            let made = self.place.make(range, &ports, anew, Care::WhatThereIs);
            for words in made.unwrap_or_else(|error| vec![error.to_string()]) {
                log(&words);
            }
        }
        if !bridge && let Ok(dhcp) = listen_dhcp() {
            self.dhcp = dhcp;
        }
        if ports != self.ports {
            self.ports = ports;
            self.open_doors();
        }
        Ok(true)
    }

    fn open_doors(&mut self) {
        let wanted = doors(&self.ports);
        self.doors.retain(|door| wanted.contains(&door.leads()));
        for (from, to) in wanted {
            if self.doors.iter().any(|door| door.from == from) {
                continue;
            }
            match Door::open(from, to) {
                Ok(door) => self.doors.push(door),
                Err(error) => log(&format!("{from} cannot be listened on: {error}")),
            }
        }
    }
}

fn log(words: &str) {
    // Where nobody reads it, it goes on all the same.
    let _ = writeln!(io::stderr(), "{words}");
}

fn listen_dhcp() -> io::Result<UdpSocket> {
    let socket = rustix::net::socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    // Before it has a port: others may serve other interfaces.
    link::bind_to_device(&socket, NAT_BRIDGE)?;
    rustix::net::sockopt::set_socket_reuseaddr(&socket, true)?;
    rustix::net::sockopt::set_socket_broadcast(&socket, true)?;
    rustix::net::bind(
        &socket,
        &SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, SERVER_PORT),
    )?;
    Ok(socket.into())
}

fn watch_rules() -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        Some(netlink::NETFILTER),
    )?;
    let group = netlink::SocketAddrNetlink::new(0, GROUP_NFTABLES);
    rustix::net::bind(&socket, &group)?;
    Ok(socket)
}

/// Whatever the kernel says there, something changed; so it has when it said
/// more than there was room for.
fn have_rules_changed(socket: &OwnedFd) -> bool {
    let mut room = [0; 4096];
    let mut changed = false;
    for _ in 0..ANSWERS_MAX {
        match rustix::net::recv(socket.as_fd(), &mut room, RecvFlags::DONTWAIT) {
            Ok(_) | Err(rustix::io::Errno::NOBUFS) => changed = true,
            Err(_) => break,
        }
    }
    changed
}

/// The host's resolvers of names that guests can reach, three at most.
pub(crate) fn resolvers() -> Vec<Ipv4Addr> {
    // The second is what the first one's own resolver asks, where that is
    // systemd's.
    let files = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];
    let read = files.iter().map(fs::read_to_string);
    let mut lists = read.map(|text| nameservers(&text.unwrap_or_default()));
    lists.find(|list| !list.is_empty()).unwrap_or_default()
}

fn nameservers(text: &str) -> Vec<Ipv4Addr> {
    let servers = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next()? == "nameserver").then(|| words.next()?.parse().ok())?
    });
    servers
        .filter(|address: &Ipv4Addr| !address.is_loopback() && !address.is_unspecified())
        .take(3)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_are_told_of_resolvers_that_they_reach() {
        let text = "# x\nsearch a\nnameserver 127.0.0.53\nnameserver 192.0.2.1\nnameserver ::1\n\
                    nameserver 192.0.2.2\nnameserver\nnameserver 192.0.2.3\nnameserver 192.0.2.4\n";
        let told: Vec<String> = nameservers(text).iter().map(ToString::to_string).collect();
        assert_eq!(told, ["192.0.2.1", "192.0.2.2", "192.0.2.3"]);
        assert!(nameservers("nameserver 127.0.0.53\n").is_empty());
    }
}
