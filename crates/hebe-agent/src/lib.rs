//! The agent in the guest, and its protocol.
//!
//! ```text
//!  host: Client ── vsock.sock, lines of JSON ── guest: converse ── Guest (clock, file systems, power)
//! ```
//! Neither side trusts the other: lines have bounds, everything has a time
//! limit, and what is no request or no answer is refused by a sentence. The
//! agent serves whoever reaches its port from the host, who rules over the
//! guest anyhow; running programs for the host is off unless the guest's owner
//! says otherwise. A VM works without an agent.
//!
//! The protocol is described in `docs/agent.md`.

pub mod client;
mod exec;
mod freeze;
pub mod guest;
mod lines;
pub mod protocol;
pub mod server;

pub use client::{Client, ClientError};
pub use freeze::thaw_left;
pub use lines::{LineError, Lines, Wire};
pub use protocol::{Done, Facts, Order, Request, Said};
pub use server::{Limits, converse};

/// The guest's port on which the agent listens.
pub const PORT: u32 = 18_501;
/// Version of the protocol.
pub const PROTOCOL: u32 = 1;
