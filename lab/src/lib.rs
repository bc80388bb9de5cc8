//! The emulated machine, driven from Rust.
