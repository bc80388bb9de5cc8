//! Disk back ends.
//!
//! [`BlockBackend`] is a raw file or a block device of the host, in the
//! host's page cache, or a qcow2 image with the files behind it. A lock keeps
//! two VMs off one disk: whoever writes holds it alone, readers share it. The
//! lock belongs to the open file, so it ends with the process however that
//! ends. [`make_overlay`] puts an image over a disk that is to stay as it is.

mod clear;
mod identity;
mod overlay;
mod qcow2;
mod raw;
mod reads;

pub use identity::{DiskChange, disk_change};
pub use overlay::make_overlay;
pub use qcow2::ImageTrouble;
pub use raw::{BlockBackend, BlockError, SECTOR_SIZE};
pub use reads::{NoRing, READS_MAX};
