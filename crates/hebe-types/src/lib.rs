//! Ids, guest addresses, byte sizes and VM definitions shared by every layer.
//!
//! This crate is pure: no unsafe code, no I/O, no clock, no threads.

#![forbid(unsafe_code)]

mod config;
mod counted;
mod ids;
mod layout;
mod limit;
mod net;
mod sip;
mod size;
mod stamp;

pub use config::{
    BalloonConfig, ConfigError, ConsoleConfig, DEVICES_MAX, DiskConfig, DiskFormat, RebootMethod,
    RestartPolicy, StoreKind, VCPUS_MAX, VmConfig, VsockConfig,
};
pub use counted::counted;
pub use ids::{HostId, InvalidName, MacAddr, SegmentId, VmId, VmName};
pub use layout::{Extent, Gpa, MMIO_HOLE_END, MMIO_HOLE_START, RamRange, ram_ranges};
pub use limit::{CpuLimit, InvalidCpuLimit};
pub use net::{
    FORWARDS_MAX, Forward, NAT_BRIDGE, NetConfig, NetError, Network, USER_ADDRESS, USER_GATEWAY,
    fill_macs,
};
pub use size::{ByteSize, GRANULE, InvalidSize};
pub use stamp::Stamp;
