//! What the test machine and the init program of the lab's hosts and guests
//! have in common: the agent's protocol, the guests' status page, QEMU's
//! control socket, and the definitions of VMs that are QEMU's.

pub mod peer;
pub mod proto;
pub mod qmp;
pub mod status;

/// Commands that a host runs at each boot, one a line.
pub const SERVICES: &str = "/data/services";
/// What they say; outlives the host's kernel.
pub const SERVICES_LOG: &str = "/data/services.log";
