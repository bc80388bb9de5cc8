//! An empty image over a disk that stays as it is.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use hebe_types::{DiskConfig, DiskFormat};

use crate::raw::{BlockBackend, BlockError};
use crate::{ImageTrouble, qcow2};

/// Longest name of a file behind an image, in bytes (QEMU's
/// docs/interop/qcow2.rst).
const NAME_LEN_MAX: usize = 1023;
/// Largest disk, in bytes: its image's first table then has 32 MiB, which is the
/// most that is taken when it is opened.
const SIZE_MAX: u64 = 2 << 50;

/// Makes an image at `path`, where nothing may be, that reads as the disk
/// `below` does; gives the disk that it is, with `below` behind it. It is on
/// disk when this returns, for its owner alone to read and write. `below` is
/// opened to be read alone, and locked as long as that takes; of an image no
/// more than its header is believed here, and the rest where it is used.
///
/// # Errors
/// As [`BlockBackend::of`], of `below` as far as that is looked at; [`BlockError::NoFile`],
/// [`BlockError::Name`]; [`BlockError::Make`]. Nothing is at `path` then.
pub fn make_overlay(path: &Path, below: &DiskConfig) -> Result<DiskConfig, BlockError> {
    let below = DiskConfig {
        readonly: true,
        snapshot: false,
        ..below.clone()
    };
    let name = below.path.to_str();
    let Some(name) = name.filter(|name| name.len() <= NAME_LEN_MAX) else {
        return Err(BlockError::Name(below.path));
    };
    let (_locked, size) = BlockBackend::look_at(&below)?;
    // A device has no inode of its own by which it would be known again.
    if !fs::metadata(&below.path).is_ok_and(|metadata| metadata.is_file()) {
        return Err(BlockError::NoFile(below.path));
    }
    let format = match below.format {
        DiskFormat::Raw => "raw",
        DiskFormat::Qcow2 => "qcow2",
    };
    write(path, size, name, format).map_err(|source| BlockError::Make {
        path: path.to_owned(),
        source,
    })?;
    let mut backing = vec![below.path];
    backing.extend(below.backing);
    Ok(DiskConfig {
        path: path.to_owned(),
        readonly: false,
        format: DiskFormat::Qcow2,
        snapshot: false,
        queues: below.queues,
        backing,
    })
}

fn write(path: &Path, size: u64, name: &str, format: &str) -> io::Result<()> {
    if size > SIZE_MAX {
        return Err(io::Error::other("the disk is larger than 2 PiB"));
    }
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600);
    let file = options.open(path)?;
    let written = fill(&file, path, size, name, format);
    if written.is_err() {
        let _ = fs::remove_file(path);
    }
    written
}

fn fill(file: &File, path: &Path, size: u64, name: &str, format: &str) -> io::Result<()> {
    qcow2::create(file.try_clone()?, path.to_owned(), size, name, format)?;
    file.sync_all()?;
    let folder = path.parent().filter(|dir| !dir.as_os_str().is_empty());
    if let Some(folder) = folder {
        File::open(folder)?.sync_all()?;
    }
    // Read back: what is made here must be what a VMM takes.
    let needs = qcow2::needs(file).map_err(|trouble: ImageTrouble| io::Error::other(trouble))?;
    match needs.size == size {
        true => Ok(()),
        false => Err(io::Error::other("the image has another size")),
    }
}
