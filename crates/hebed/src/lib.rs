//! The daemon: a host's VMs over HTTP, supervised.
//!
//! It holds no truth. What VMs there are and how each is, is looked up in the
//! run directory, the definitions and the store each time
//! ([`hebe_host::listing`]); orders are those that `hebe` carries out too
//! ([`hebe_host::ops`]), under the same locks. So it can die at any instant,
//! and the next one goes on: VMMs are sessions of their own, whose parent
//! nothing depends on.
//!
//! - [`server`]: sockets, connections and what bounds them; [`tls`]: those over
//!   the network; [`limits`]: what a request has to keep to.
//! - [`routes`], [`orders`] and [`agent_orders`]: the API, described by `docs/openapi.json`;
//!   [`answers`]: what it says.
//! - [`engine`]: everything that blocks; [`jobs`]: what takes long;
//!   [`events`]: what is told to whoever listens.
//! - [`watch`]: looks at the VMs, and carries out what
//!   [`hebe_flow::supervise`] decides; takes samples of the host.
//! - [`policy`]: runs `hebe reboot` when the host's policy says so; [`ageing`]:
//!   alerts when the host begins to age.
//! - [`agents`]: which guests' agents answer.
//! - [`metrics`], [`log`], [`systemd`], [`cli`]: the rest.

pub mod ageing;
pub mod agent_orders;
pub mod agents;
pub mod answers;
pub mod app;
pub mod cli;
pub mod engine;
pub mod events;
pub mod jobs;
pub mod limits;
pub mod log;
pub mod metrics;
pub mod orders;
pub mod policy;
pub mod routes;
pub mod run;
pub mod server;
pub mod stall;
pub mod systemd;
pub mod tls;
pub mod watch;
