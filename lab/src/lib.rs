//! The emulated machine, driven from Rust.

pub mod agent;
pub mod apt;
pub mod assets;
pub mod binaries;
pub mod cache;
pub mod cpio;
pub mod disk;
pub mod initramfs;
pub mod machine;
pub mod modules;
pub mod probe;
pub mod progress;
pub mod qmp;
pub mod serial;
pub mod sources;
