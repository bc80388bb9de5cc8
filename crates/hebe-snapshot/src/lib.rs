//! RAM and execution state of one VM in a file: the `saved` method of a
//! reboot, suspend to disk (R-41, R-44).
//!
//! ```text
//! 0        header, one page; complete only when everything else is on disk
//! 0x1000   ranges of guest RAM, then a CRC-32 for every chunk of 2 MiB
//! …        execution state
//! n × 2 MiB  guest RAM, range after range; pages of zeros are holes
//! ```
//! A file is written under a temporary name, in this order: everything but
//! the header, fsync, header, fsync, rename, fsync of the directory. So a name
//! without `.partial` never holds half a VM, and a file copied while it was
//! written is told by its header. A VMM in its cage can name no file: it is
//! handed one, which whoever opened it names when it is whole. What is read is untrusted until checked:
//! lengths against the file, contents against their checksums.

mod format;
mod load;
mod save;
mod view;

use std::io;
use std::path::PathBuf;

use hebe_types::{ByteSize, Gpa};

pub use load::{LoadStats, SavedFile};
pub use save::{SaveStats, save, save_into};
pub use view::{RamView, RamViewMut, UsedRun};

/// Why a VM cannot be saved, or a saved one not restored.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The system refused.
    #[error("cannot {what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file system is full; nothing was left behind.
    #[error(
        "no space left for {path}: up to {needed} are needed; free some, or set another directory for saved VMs"
    )]
    NoSpace {
        /// Which file.
        path: PathBuf,
        /// State and all RAM, zero pages counted too.
        needed: ByteSize,
    },
    /// Too much of something to fit the format.
    #[error("this VM cannot be saved: {0}")]
    Unsupported(String),
    /// Not a saved VM.
    #[error("{0} is not a saved VM of Hebe")]
    Foreign(PathBuf),
    /// Written by a newer release.
    #[error(
        "{path} has format {found}, and this release reads up to {known}: use the release that wrote it, or a newer one"
    )]
    Newer {
        /// Which file.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The newest format known.
        known: u32,
    },
    /// Saving was cut off.
    #[error("{0} was never finished: the VM was not saved; delete the file")]
    Incomplete(PathBuf),
    /// Shorter or longer than its header says.
    #[error(
        "{path} has {len} bytes and should have {expected}: it was cut short or copied badly; copy it again"
    )]
    Length {
        /// Which file.
        path: PathBuf,
        /// Its length.
        len: u64,
        /// Its length by its header.
        expected: u64,
    },
    /// A checksum is wrong or a value impossible.
    #[error("{path} is damaged ({what}): this copy cannot be restored")]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// Which part.
        what: String,
    },
    /// The RAM to load into is not the RAM that was saved.
    #[error("{path} holds other RAM than the VM has at guest address {:#x}: restore it into a VM of the same size", .gpa.0)]
    OtherRam {
        /// Which file.
        path: PathBuf,
        /// First difference.
        gpa: Gpa,
    },
}

#[cfg(test)]
mod tests;
