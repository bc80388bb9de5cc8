//! A VM and its vCPUs over KVM, with ordered save and restore.
//!
//! [`Machine`] owns the VM's file descriptor, its memory slots and its
//! interrupt routing. [`Vcpu`] owns one vCPU and knows in which order its
//! registers must be read and written. Nothing here has threads; the VMM
//! brings them.

mod cpuid;
mod machine;
mod pod;
mod rate;
pub mod requests;
mod routing;
mod settle;
mod tsc;
mod vcpu;

pub use cpuid::{CpuidRefusal, guest_cpuid, missing_features};
pub use machine::{KvmDevice, Machine, MachineError, host_can_run};
pub use pod::WrongLength;
pub use routing::{MsiRoute, Router};
pub use tsc::ClockPlan;
pub use vcpu::{BootRegisters, IoHandler, Kick, Stop, Vcpu, VcpuError, install_kick_handler};
