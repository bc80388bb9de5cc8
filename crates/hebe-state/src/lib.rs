//! Execution state as versioned, checksummed sections.
//!
//! A state is a header followed by sections. Each section carries its kind,
//! version, instance (the number of the vCPU or of the PCI slot), length and
//! checksum, so that a reader can name what it does not know, and one damaged
//! section is told from another. See [`StateWriter`] and [`StateReader`].
//! Payloads are `postcard` encodings of the frozen structs under [`v1`] and
//! [`v2`]; a change of a struct is a new version, never an edit, and is read
//! beside the older one.

#![forbid(unsafe_code)]

mod container;
#[doc(hidden)]
pub mod fuzzing;
#[cfg(test)]
mod testing;
pub mod v1;
pub mod v2;

pub use container::{DecodeError, Section, SectionKind, StateError, StateReader, StateWriter};
