//! Kernel loading, memory layout and ACPI tables.
//!
//! Everything that a guest finds in its RAM before its first instruction is
//! written here, once; a resume never comes through this crate.

mod acpi;
mod kernel;
pub mod layout;

pub use acpi::{AcpiError, AcpiPlan, write_acpi};
pub use kernel::{BootError, BootFile, BootPlan, Entry, load};
