//! Version 2 of the sections that changed since version 1. Frozen: golden
//! files pin the bytes. What is not here is still [`crate::v1`].

pub mod devices;
