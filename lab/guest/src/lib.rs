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
/// What a guest with `lab.say` on its command line writes to its console as soon
/// as its first program runs.
pub const USER_SPACE: &str = "LAB: user space";
/// What `lab-init timed` prints, as JSON: instants of the host's wall clock, in
/// nanoseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Timed {
    /// The program was started.
    pub began_ns: u64,
    /// It had ended.
    pub ended_ns: u64,
    /// The words were seen.
    pub seen_ns: u64,
}
