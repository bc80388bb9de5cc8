//! Stores and segments: where guest RAM outlives a VMM or a host kernel.
//!
//! A *store* is a reserved range of physical memory, seen as a devdax device
//! (or a regular file, on hosts and in tests without one). Its head holds two
//! copies of a superblock and the segment table: for every VM which
//! guest-physical range lies where (the P2M table, R-21 and R-26) and where
//! its execution-state area is (R-12). Everything is found again from the
//! head alone, after any number of host kernels.
//!
//! ```text
//! granule 0   0x00000  superblock, copy A          granule 1   segment table: for each
//!             0x01000  superblock, copy B                      slot record copy A, copy B
//!             0x80000  report, slot 0 (256 KiB)    granule 2…  segments: execution state
//!             0xc0000  report, slot 1 (256 KiB)                (1 granule), then RAM
//!                                                  last granule: guard
//! ```
//!
//! Who owns what: the table is written by one manager at a time ([`Store`]
//! with [`Access::Manage`], which holds a lock on the device); the
//! execution-state area is written by the segment's VMM ([`ExecArea`]); guest
//! RAM belongs to the VM and is never touched by this crate between
//! [`Store::create`] and [`Store::drop_segment`] (R-14).
//!
//! A segment's record goes through these states, each change committed in
//! both copies of the record before anything relies on it:
//!
//! ```text
//!             create                 zeroed
//!   Free ───────────────► Allocating ───────► Live
//!    ▲                        │                 │ drop_segment
//!    │ zeroed                 │ crash           ▼
//!    └─────────────────── Scrubbing ◄───────────┘
//! ```
//!
//! A manager that opens a store finishes what a killed one left: Allocating
//! and Scrubbing segments are zeroed and freed. How two copies make a change
//! atomic is argued in the `mirror` module, what is never handed out in
//! `alloc`, why an old frozen state can never win over a newer one in `exec`,
//! and how a kernel that used the range as its own RAM is found out in
//! `guard`.
//!
//! Where no range is reserved, [`luo`] keeps segments in ordinary memory and has
//! Linux carry them; records, execution-state areas and reports are the same.
//!
//! Bytes of a destroyed VM are zeroed when it is dropped, and `create` makes
//! sure that every byte it hands out reads as zero: it trusts neither an
//! earlier release, nor a damaged table, nor a fresh device full of old RAM.

mod alloc;
mod error;
mod exec;
mod giving;
mod guard;
mod hold;
mod layout;
pub mod luo;
mod mapping;
mod media;
mod mirror;
mod report;
mod segment;
mod spec;
mod store;
mod table;

#[cfg(test)]
mod testing;

pub use error::StoreError;
pub use exec::{EXEC_STATE_LEN_MAX, ExecArea, ExecStatus};
pub use layout::{EXTENTS_MAX, REPORT_LEN_MAX, SEGMENTS_MAX};
pub use segment::{MappedRam, Segment};
pub use spec::{Placement, SegmentSpec};
pub use store::{Access, FormatOptions, Store, StoreInfo};
pub use table::{SegmentEntry, SegmentInfo};
