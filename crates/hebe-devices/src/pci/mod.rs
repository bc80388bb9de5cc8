//! PCI: configuration space and the root that guests reach it by.

pub(crate) mod config;
mod root;

pub use root::PciRoot;
