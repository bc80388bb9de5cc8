//! One VM put together, and its control socket.
//!
//! The owner of all state of a running VM is the [`Vm`]; it goes through
//!
//! ```text
//!              boot                    freeze, save
//!   (nothing) ──────► running ◄──────► paused ──────► frozen (in the segment)
//!              resume    ▲   pause,      │  ▲            │  ▲
//!              restore   │   unpause     │  └────────────┘  │ withdrawn first,
//!                        └───────────────┘      saved       └ then the vCPUs run
//! ```
//!
//! Threads: one per vCPU, one per virtio device, one that accepts control
//! connections and one per connection, one that waits for signals, and the
//! main one, which waits for the VM's end. There is no async runtime: a pause must be able to say exactly
//! who still runs.

mod acpi;
pub mod args;
mod balloon;
mod board;
pub mod cage;
mod control;
pub mod descriptors;
mod generation;
#[cfg(test)]
#[path = "../tests/process/guest.rs"]
mod guest;
mod held;
mod image;
mod interrupts;
mod log;
mod parts;
mod run;
mod signals;
mod suspend;
#[cfg(test)]
mod testing;
mod vcpus;
mod vm;

pub use log::log_error;
pub use parts::Disks;
pub use run::{Outcome, run};
pub use vm::{Event, Identity, Vm, VmError};
