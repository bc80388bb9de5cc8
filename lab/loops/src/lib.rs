//! Suspends and resumes a hand-assembled SMP guest, over and over, on the
//! real path: [`hebe_vmm::Vm`], KVM, a segment that outlives the VM.
//!
//! The guest holds known patterns in every register it can reach while
//! timers, interprocessor interrupts, serial interrupts, port and MMIO
//! accesses are in flight, and checks them for ever; see [`guest`].

pub mod environment;
pub mod faults;
pub mod guest;
pub mod loops;
pub mod report;
pub mod rig;
