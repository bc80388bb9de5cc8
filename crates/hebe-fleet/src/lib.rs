//! Slots of a group of hosts, kept by others: etcd, or a FleetLock server.
//!
//! What may be done with slots is decided by [`hebe_policy::fleet::slots`],
//! and a host's way from the first request to the release is
//! [`hebe_policy::fleet::holder`]. Here is what asks and what answers:
//!
//! - [`config`] reads `fleet.toml`.
//! - [`slots`] is one interface over both kinds of servers.
//! - [`etcd`] has etcd's keys, leases and transactions, over its JSON gateway,
//!   and [`etcd_slots`] makes slots of these.
//! - [`fleetlock`] is a client of the FleetLock protocol, and [`note`] the file
//!   in which a host keeps what such a server does not.
//! - [`member`] is this host in its group, and [`rolls`] keeps rolls through the
//!   group in etcd.
//! - [`order`] drives the holder against a server and a clock.
//! - [`http`] makes requests with a limit on time and size.
//!
//! Nothing here decides by consensus of its own: two hosts that want the last
//! slot meet in one etcd transaction.

#![forbid(unsafe_code)]

pub mod config;
pub mod etcd;
pub mod etcd_slots;
pub mod fleetlock;
pub mod http;
pub mod member;
pub mod note;
pub mod order;
pub mod rolls;
pub mod slots;

pub use config::FleetConfig;
pub use member::Member;
pub use slots::{FleetError, Slots, Taken};
