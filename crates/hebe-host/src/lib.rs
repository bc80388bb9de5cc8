//! The host's life: start VMs, suspend all, reload the layer below them,
//! resume all.
//!
//! Every order is carried out by the process that was given it, `hebe` or
//! `hebed`, from facts that lie in the run directory, the store and the state
//! directory; none of them holds any other truth. Each VM is one `hebe-vmm`
//! process, which holds the VM's lock as long as it lives.
//!
//! - [`Host`]: where everything lies, and the seams ([`stores::StoreAccess`],
//!   [`system::System`]) behind which tests put fakes.
//! - [`definitions`], [`launch`], [`ops`], [`listing`]: one VM.
//! - [`limits`]: what a VMM may take of its host.
//! - [`agent`]: the agents in guests.
//! - [`balloon`]: memory that a guest gives back.
//! - [`overlays`]: disks that keep nothing.
//! - [`preflight`], [`reboot`], [`suspend_all`], [`resume_all`]: all of them.
//! - [`stopping`]: the suspend event, where a service manager takes the host
//!   down; [`systemd`]: that service manager.
//! - [`timeline`], [`report`], [`gantt`]: the report that spans both kernels.
//! - [`luo`]: VMs whose memory Linux itself carries into the next kernel.
//! - [`network`]: networks that Hebe makes for VMs.
//! - [`check`]: is this machine ready? [`setup`]: making it so.
//! - [`ageing`]: samples of how it is doing.

pub mod ageing;
pub mod agent;
mod answering;
pub mod balloon;
pub mod check;
mod checks;
pub mod claims;
pub mod cmdline;
pub mod definitions;
mod failed;
pub mod files;
pub mod gantt;
mod gate;
pub mod host;
mod host_id;
mod job;
pub mod launch;
pub mod limits;
pub mod listing;
pub mod lock;
pub mod luo;
mod mounted;
pub mod network;
pub mod notes;
pub mod ops;
pub mod overlays;
pub mod pending;
pub mod preflight;
mod process;
pub mod reboot;
pub mod report;
pub mod resume_all;
mod resuming;
pub mod saved;
pub mod saving;
pub mod segments;
pub mod setup;
pub mod stopping;
pub mod store_init;
pub mod stores;
mod stores_known;
pub mod suspend_all;
pub mod system;
pub mod systemd;
pub mod timeline;
pub mod vmm;

pub use host::{Host, HostError, Layout};
