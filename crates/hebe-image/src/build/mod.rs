//! Makes a disk image out of Debian's packages, without mounting it and
//! without a loop device.
//!
//! ```text
//!  mmdebstrap ──► directory ──► mke2fs -d ──► image: [GPT │ ext4 │ spare GPT]
//!   packages, then               at 1 MiB               │
//!   our own files                                       ▼
//!                                     read back by `load`, renamed into place
//! ```
//!
//! Everything happens in a folder beside the output, which is renamed at the
//! end: an image is complete or not there. [`Order`] says what goes in;
//! [`build`] does it.

mod contents;
mod error;
mod gpt;
pub mod sources;
mod tool;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

pub use contents::{Contents, FileIn, is_inside_path};
pub use error::BuildError;
use gpt::Gpt;
use sources::Source as AptSource;
use tool::Rights;

use crate::{Found, Limits, Source, load};

/// Smallest disk, in bytes.
pub const SIZE_MIN: u64 = 64 << 20;
/// Largest disk, in bytes.
pub const SIZE_MAX: u64 = 16 << 40;

/// How an image is written down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// As it is, with holes.
    #[default]
    Raw,
    /// qcow2, by `qemu-img`.
    Qcow2,
}

/// What an image is to hold.
#[derive(Clone, Debug, Default)]
pub struct Order {
    /// Suite or code name of Debian.
    pub suite: String,
    /// Where its packages come from.
    pub sources: Vec<AptSource>,
    /// The package that brings the kernel; without one the image has neither
    /// kernel nor boot loader's configuration, and somebody else boots it.
    pub kernel: Option<String>,
    /// Packages besides those that every image has.
    pub packages: Vec<String>,
    /// Bytes of the disk, rounded up to mebibytes.
    pub size: u64,
    /// Host name.
    pub hostname: String,
    /// The kernel's command line, behind `root=`.
    pub cmdline: String,
    /// Addresses by DHCP, and names by what DHCP says.
    pub dhcp: bool,
    /// Public keys with which root may log in over SSH.
    pub ssh_keys: Vec<String>,
    /// Root is logged in on the serial console without being asked for anything.
    pub autologin: bool,
    /// Files to put in, after the packages.
    pub files: Vec<FileIn>,
    /// Symbolic links to put in: where, and to what.
    pub links: Vec<(String, String)>,
    /// Units to enable.
    pub units: Vec<String>,
    /// How it is written down.
    pub format: Format,
}

/// An image that was made.
#[derive(Clone, Debug)]
pub struct Built {
    /// What it boots, as [`load`] reads it; none without a kernel.
    pub boots: Option<Found>,
    /// Bytes of its disk.
    pub size: u64,
    /// Bytes that it takes on this machine's disk.
    pub allocated: u64,
}

/// Makes an image at `output`. `say` is told what is going on.
///
/// # Errors
/// [`BuildError`]; then nothing is left at `output` but what was there.
pub fn build(
    order: &Order,
    output: &Path,
    replace: bool,
    say: &dyn Fn(&str),
) -> Result<Built, BuildError> {
    order.check()?;
    if !replace && output.symlink_metadata().is_ok() {
        return Err(BuildError::Exists(output.to_owned()));
    }
    let rights = Rights::of_this_process();
    tool::need_all(order, rights)?;
    let work = Work::create(output, rights)?;
    contents::write(order, &work.path)?;
    contents::unpack(order, rights, &work.path, say)?;
    say("making the file system");
    let image = work.path.join("image");
    let size = order.size.next_multiple_of(1 << 20);
    make_disk(order, rights, &work.path, &image, size)?;
    let boots = match order.kernel {
        Some(_) => {
            say("reading the image back");
            Some(read_back(&image)?)
        }
        None => None,
    };
    let done = match order.format {
        Format::Raw => image,
        Format::Qcow2 => {
            say("converting it to qcow2");
            let to = work.path.join("qcow2");
            tool::qcow2(&image, &to)?;
            to
        }
    };
    let file = File::open(&done).map_err(|e| BuildError::io("cannot open", &done, e))?;
    file.sync_all()
        .map_err(|e| BuildError::io("cannot write", &done, e))?;
    let allocated = tool::allocated(&file).map_err(|e| BuildError::io("cannot read", &done, e))?;
    fs::rename(&done, output).map_err(|e| BuildError::io("cannot put in place", output, e))?;
    Ok(Built {
        boots,
        size,
        allocated,
    })
}

impl Order {
    fn check(&self) -> Result<(), BuildError> {
        if self.sources.is_empty() {
            return Err(BuildError::NoSource(self.suite.clone()));
        }
        if !(SIZE_MIN..=SIZE_MAX).contains(&self.size) {
            return Err(BuildError::Size);
        }
        contents::check(self)
    }
}

/// The file system and the table around it.
fn make_disk(
    order: &Order,
    rights: Rights,
    work: &Path,
    image: &Path,
    size: u64,
) -> Result<(), BuildError> {
    let failed = |e| BuildError::io("cannot write", image, e);
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(image)
        .map_err(failed)?;
    file.set_len(size).map_err(failed)?;
    let [disk_id, partition_id] = [tool::random_id()?, tool::random_id()?];
    let gpt = Gpt {
        disk_len: size,
        disk_id,
        partition_id,
    };
    let uuid = fs::read_to_string(work.join("uuid"));
    let uuid = uuid.map_err(|e| BuildError::io("cannot read", work, e))?;
    tool::mke2fs(
        rights,
        &work.join("root"),
        image,
        &uuid,
        gpt::START,
        gpt.partition_len(),
    )
    .map_err(|error| error.or_too_small(order.size))?;
    gpt.write(&file).map_err(failed)?;
    file.sync_all().map_err(failed)
}

/// A file that is read as a disk.
struct Image {
    file: File,
    len: u64,
}

impl Source for Image {
    fn size(&self) -> u64 {
        self.len
    }

    fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(data, offset)
    }
}

/// What a raw image boots, by the reader that a VMM uses.
fn read_back(image: &Path) -> Result<Found, BuildError> {
    let failed = |e| BuildError::io("cannot read", image, e);
    let file = File::open(image).map_err(failed)?;
    let len = file.metadata().map_err(failed)?.len();
    let source = Rc::new(Image { file, len });
    load(source, Limits::default(), &mut io::sink(), &mut io::sink())
        .map_err(BuildError::DoesNotBoot)
}

/// The folder of one build; it goes with everything in it.
struct Work {
    path: PathBuf,
    rights: Rights,
}

impl Work {
    fn create(output: &Path, rights: Rights) -> Result<Self, BuildError> {
        let name = output.file_name().ok_or(BuildError::NoName)?;
        let name = format!(".{}.{}.part", name.to_string_lossy(), std::process::id());
        let parent = match output.parent() {
            Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
            Some(parent) => parent,
            None => Path::new("."),
        };
        let parent = parent.canonicalize();
        let parent = parent.map_err(|e| BuildError::io("cannot write beside", output, e))?;
        let path = parent.join(name);
        fs::create_dir(&path).map_err(|e| BuildError::io("cannot create", &path, e))?;
        Ok(Self { path, rights })
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        tool::remove(self.rights, &self.path);
    }
}
