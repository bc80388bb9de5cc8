//! Booting from a disk image without firmware, as Xen's pygrub does it: the
//! host reads the boot loader's configuration from the image and takes kernel,
//! initrd and command line from there.
//!
//! [`load`] looks for volumes (GPT, MBR, or a file system on the whole disk),
//! opens those with ext2, ext3, ext4 or FAT, and takes from them, in this
//! order:
//!
//! 1. the default entry of GRUB's `grub.cfg`, which may hand over to boot
//!    loader entries by its `blscfg` command ([`grub`]);
//! 2. the first boot loader entry ([`bls`]);
//! 3. `vmlinuz` and its initrd, where there is no configuration.
//!
//! [`build`] makes such images out of Debian's packages.
//!
//! Everything on an image is its guest's to write, and hostile: sizes, counts
//! and depths have [`Limits`] and constants of this crate, everything read is
//! counted against a [budget](source), nothing is ever written, and a reader
//! that panics is a damaged image.

pub mod bls;
pub mod build;
mod error;
mod find;
mod fs;
#[doc(hidden)]
pub mod fuzzing;
pub mod grub;
pub mod grubenv;
pub mod seed;
pub mod source;
mod table;
#[cfg(test)]
mod testing;
pub mod version;

pub use error::ImageError;
pub use find::{Found, Limits, load};
pub use seed::{Seed, SeedError};
pub use source::Source;
