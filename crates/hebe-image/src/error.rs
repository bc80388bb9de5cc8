//! Why an image does not boot.

use std::io;

/// Why an image does not boot. Paths and words from the image are shown with
/// what a terminal would obey taken out.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The disk cannot be read, or reading it took more than any sound image
    /// takes.
    #[error("the disk image cannot be read")]
    Read(#[source] io::Error),
    /// Nothing on it can be looked into.
    #[error(
        "the disk image has no file system that Hebe reads (ext2, ext3, ext4, FAT); it has {found}: put /boot on one of them, or give a kernel with --kernel"
    )]
    NoFileSystem {
        /// What was found instead.
        found: String,
    },
    /// No configuration and no kernel.
    #[error(
        "the disk image has no boot entry: there is no grub.cfg, no loader/entries and no vmlinuz in / or /boot of {looked}; give a kernel with --kernel"
    )]
    NoEntry {
        /// Which volumes were looked into.
        looked: String,
    },
    /// The configuration is of no use.
    #[error("{file} on the disk image cannot be used: {why}")]
    Config {
        /// Which file.
        file: String,
        /// What is wrong with it.
        why: String,
    },
    /// What the configuration names is not there.
    #[error("the disk image names {what} {path}, which is not on it: {why}")]
    Missing {
        /// Kernel or initrd.
        what: &'static str,
        /// Its path on the image.
        path: String,
        /// Why it cannot be had.
        why: String,
    },
    /// A bound of [`crate::Limits`].
    #[error("{what} {path} on the disk image is larger than {max} bytes")]
    TooLarge {
        /// Kernel or initrd.
        what: &'static str,
        /// Its path on the image.
        path: String,
        /// The bound.
        max: u64,
    },
    /// A reader met what its author did not think of.
    #[error("the disk image is damaged: its file system cannot be followed")]
    Damaged,
    /// What is found cannot be put where it is wanted.
    #[error("what the disk image boots cannot be kept: is there memory left?")]
    Sink(#[source] io::Error),
}

/// Text from an image for a terminal or a log: nothing but printable
/// characters, and not too many.
pub(crate) fn shown(text: &str) -> String {
    const MAX: usize = 200;
    let printable = |c: char| if c.is_control() { '?' } else { c };
    let mut shown: String = text.chars().take(MAX).map(printable).collect();
    if text.chars().nth(MAX).is_some() {
        shown.push('…');
    }
    shown
}
