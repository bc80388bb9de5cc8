//! Ids, guest addresses, byte sizes and VM definitions shared by every layer.
//!
//! This crate is pure: no unsafe code, no I/O, no clock, no threads.

#![forbid(unsafe_code)]

mod config;
mod ids;
mod layout;
mod size;
mod stamp;

pub use config::{
    BalloonConfig, ConfigError, ConsoleConfig, DEVICES_MAX, DiskConfig, DiskFormat, NetConfig,
    RebootMethod, RestartPolicy, StoreKind, VmConfig, VsockConfig,
};
pub use ids::{InvalidName, MacAddr, SegmentId, VmId, VmName};
pub use layout::{Extent, Gpa, MMIO_HOLE_END, MMIO_HOLE_START, RamRange, ram_ranges};
pub use size::{ByteSize, GRANULE, InvalidSize};
pub use stamp::Stamp;
