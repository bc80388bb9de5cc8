//! The emulated machine, driven from Rust.
//!
//! A *machine* is one QEMU; its processor is emulated with AMD-V, so that the
//! stock `kvm_amd` module loads in it and real guests run under the product's
//! own VMM. The *host* is the Debian kernel in the machine with an initramfs
//! that holds the product's programs; its PID 1 is `lab-init`, which also
//! plays PID 1 of the guests, or, with a [`system`], systemd on a Debian root
//! disk. [`scenario::Lab`] puts all of it together.

pub mod agent;
pub mod apt;
pub mod assets;
pub mod balancer;
pub mod binaries;
mod building;
pub mod bundle;
pub mod cache;
pub mod cpio;
pub mod disk;
pub mod emulator;
pub mod initramfs;
pub mod kernel;
pub mod loader;
pub mod machine;
pub mod modules;
pub mod peer;
pub mod probe;
pub mod progress;
pub mod scenario;
pub mod serial;
pub mod smaps;
pub mod system;
pub mod tools;
pub mod tree;
pub mod trial;
