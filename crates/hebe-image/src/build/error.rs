//! Why no image was made.

use std::io;
use std::path::{Path, PathBuf};

use crate::ImageError;

/// Why no image was made.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A program that is needed is not here.
    #[error("{program} is missing: install the package {package} (apt install {package})")]
    MissingTool {
        /// The program.
        program: &'static str,
        /// The Debian package that brings it.
        package: &'static str,
    },
    /// A user without subordinate ids cannot own what root owns in the image.
    #[error(
        "{user} has no subordinate ids in {file}, which making an image without being root takes: run it as root, or add a line such as {user}:100000:65536"
    )]
    NoSubordinateIds {
        /// The user.
        user: String,
        /// Where they are looked for.
        file: &'static str,
    },
    /// The output is there.
    #[error("{} is there already: name another file, or replace it with --force", .0.display())]
    Exists(PathBuf),
    /// The output is open as a VM's disk, or locked by something else.
    #[error("{} is in use, as by a VM whose disk it is: stop that first, or name another file", .0.display())]
    InUse(PathBuf),
    /// Something that is no file has the output's name.
    #[error("{} is no file: name another place for the image", .0.display())]
    NoFile(PathBuf),
    /// The output has no name.
    #[error("the image needs the name of a file")]
    NoName,
    /// Nothing says where packages come from.
    #[error(
        "no apt source of this machine leads to '{0}': name one with --mirror, or another --suite"
    )]
    NoSource(String),
    /// [`super::SIZE_MIN`], [`super::SIZE_MAX`].
    #[error("a disk has at least 64 MiB and at most 16 TiB")]
    Size,
    /// What is to be put in does not fit.
    #[error(
        "what is to be put in does not fit into {} MiB: give a larger --size", size >> 20
    )]
    TooSmall {
        /// Bytes of the disk.
        size: u64,
    },
    /// Something that was asked for would not be taken as it is meant.
    #[error("{0}")]
    Wrong(String),
    /// A program failed.
    #[error("{program} failed: {why}")]
    Tool {
        /// Which.
        program: &'static str,
        /// Its last words.
        why: String,
    },
    /// A file cannot be handled.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// What could not be done.
        what: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// [`super::Watch::stop`].
    #[error("the image was not made: the work was ended")]
    Stopped,
    /// It was made, and nothing on it boots.
    #[error("the image was made, and does not boot")]
    DoesNotBoot(#[source] ImageError),
}

impl BuildError {
    pub(super) fn io(what: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            what,
            path: path.to_owned(),
            source,
        }
    }

    /// What mke2fs says of a full disk, in our words.
    pub(super) fn or_too_small(self, size: u64) -> Self {
        let full = ["allocate block", "No space", "inode in ext2"];
        match &self {
            Self::Tool { why, .. } if full.iter().any(|words| why.contains(words)) => {
                Self::TooSmall { size }
            }
            _ => self,
        }
    }
}
