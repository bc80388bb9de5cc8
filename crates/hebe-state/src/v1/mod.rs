//! Version 1 of every section. Frozen: golden files pin the bytes.

pub mod devices;
pub mod machine;
