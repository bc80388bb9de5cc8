//! A network for VMs that works at once (`network = "nat"`): the bridge
//! `hebe0` with a range of addresses of its own, DHCP, translation of addresses
//! towards the world, and ports of the host that lead to guests.
//!
//! ```text
//!   guest ── tap ──┐                        ┌─ table `hebe` (nftables): translation,
//!   guest ── tap ──┴─ hebe0 (10.86.0.1/24) ─┤  forwarded ports, nobody unasked
//!                     DHCP: the helper      └─ uplink ── the world
//! ```
//!
//! **What is true.** Who uses the network follows from what runs: a port's tap
//! exists as long as a VMM has it open, and its VM's lock is held as long as a
//! VMM or whoever starts one lives. There is no counter to get wrong: whatever
//! is killed, the next look finds out ([`Place::ports_in_use`]).
//!
//! **Who owns what.** Everything is changed under one lock, `net/lock` in the
//! run directory, by whoever starts a VM ([`Place::plug`]) and by the helper
//! ([`serve::run`]), a small process that answers DHCP and takes away what is
//! not used any more, itself last. It holds no truth: killed, it is started
//! again by the next order, or by whoever looks after it ([`Place::tend`]), from the
//! same files.
//!
//! **The same address after everything.** A VM's address is chosen once, written
//! down durably before the VM boots ([`Place::lease`]), and is part of the VM's
//! own definition from then on: after a reboot the network is made anew around
//! the addresses that the VMs have, before they run.

mod dhcp;
mod dir;
mod expected;
mod hush;
pub mod passt;
mod proxy;
mod range;
mod rules;
pub mod serve;
mod up;

use std::io;
use std::net::Ipv4Addr;

use hebe_sys::tap::TapError;
use hebe_types::{Forward, MacAddr, NAT_BRIDGE, VmName};
use serde::{Deserialize, Serialize};

pub use dhcp::{Offer, Reply, answer};
pub use expected::Expected;
pub use range::{Book, Range};
pub use rules::program as nft_program;
pub use up::{Care, Place};

/// A NIC that is in the network, or about to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// Whose.
    pub vm: VmName,
    /// Its tap.
    pub tap: String,
    /// Its Ethernet address.
    pub mac: MacAddr,
    /// Its address.
    pub address: Ipv4Addr,
    /// Ports of the host that lead to it.
    #[serde(default)]
    pub forward: Vec<Forward>,
    /// Its VM is about to be resumed with many others: until this instant
    /// (`CLOCK_BOOTTIME`, in nanoseconds) it counts as in use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_until_ns: Option<u64>,
}

/// Why the network cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The program is not there.
    #[error(
        "network = \"nat\" needs the program nft, which is not installed: install the package nftables, or give the VM a bridge of yours"
    )]
    NoNft,
    /// The kernel or the program refused.
    #[error(
        "the rules of network = \"nat\" are refused by nftables: {0}. The kernel needs nf_tables, nft_nat, nft_masq, nft_ct and nft_fib"
    )]
    Rules(String),
    /// Everything private is routed somewhere.
    #[error(
        "no range of addresses is free for network = \"nat\": each of those that Hebe takes lies in a route of this host. Give the VM a bridge of yours"
    )]
    NoRange,
    /// A resumed VM's range is somebody else's on this host.
    #[error(
        "the range {0} of network = \"nat\" collides with a route of this host: its VMs reach nobody until that route is gone"
    )]
    Collision(Range),
    /// The network has another range now.
    #[error(
        "{address} of VM '{vm}' is outside of {range}, which network = \"nat\" has now: the VM reaches nobody until it is started anew"
    )]
    Elsewhere {
        /// Whose.
        vm: VmName,
        /// Its address.
        address: Ipv4Addr,
        /// The network's.
        range: Range,
    },
    /// Nothing is free.
    #[error("all addresses of network = \"nat\" are given away: drop VMs that are not needed")]
    Full,
    /// Not one of ours.
    #[error(
        "address = {address} is not possible on this host: network = \"nat\" has {range}, of which .2 to .254 can be had"
    )]
    BadAddress {
        /// Asked for.
        address: Ipv4Addr,
        /// The network's.
        range: Range,
    },
    /// Somebody has it.
    #[error("address = {address} is VM '{other}' 's already")]
    AddressTaken {
        /// Asked for.
        address: Ipv4Addr,
        /// Whose it is.
        other: String,
    },
    /// Another VM has the port.
    #[error("{forward} cannot be forwarded: VM '{other}' has that port")]
    PortTaken {
        /// Asked for.
        forward: Forward,
        /// Whose it is.
        other: VmName,
    },
    /// A program of the host has the port.
    #[error(
        "{forward} cannot be forwarded: a program of this host has that port, or it may not be had ({source})"
    )]
    PortInUse {
        /// Asked for.
        forward: Forward,
        /// What the system said.
        source: io::Error,
    },
    /// What goes into rules must be plain.
    #[error(
        "tap = \"{0}\" is not possible with network = \"nat\": letters, digits, '.', '-' and '_' only"
    )]
    TapName(String),
    /// The bridge.
    #[error("the bridge {NAT_BRIDGE} cannot be made: {0}")]
    Bridge(#[from] TapError),
    /// The helper.
    #[error("the helper of network = \"nat\", which answers DHCP, does not start: {0}")]
    Helper(String),
    /// A file.
    #[error("cannot {what}: check that the directory is there and may be written ({source})")]
    File {
        /// What was tried.
        what: String,
        /// Why.
        source: io::Error,
    },
}

impl NetworkError {
    fn file(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::File { what, source }
    }
}
