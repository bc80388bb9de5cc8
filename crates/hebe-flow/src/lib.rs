//! The state machines of the host: pure values, no I/O, no clock, no threads.
//!
//! - [`life`]: what may be ordered of a VM, and what becomes of it.
//! - [`reboot`]: the reboot of the VMM layer, forward and back.
//! - [`resume`]: what to do with each VM when the host comes up.
//! - [`stopping`]: what becomes of each VM when the service manager takes the
//!   host down.
//! - [`supervise`]: which VMs a supervisor starts, and when.
//!
//! Whoever does the I/O owns the value, runs the effects and feeds results
//! back; each module draws its machine at the top.

#![forbid(unsafe_code)]

pub mod life;
pub mod reboot;
pub mod resume;
pub mod stopping;
pub mod supervise;
