//! Raw files and block devices.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use hebe_state::v2::devices::DiskIdentityV2;
use hebe_types::{DiskConfig, DiskFormat};
use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use crate::clear;
use crate::identity;
use crate::qcow2::{Image, ImageTrouble, Link, needs};
use crate::reads::Reads;

/// Bytes per sector, as virtio counts (virtio 1.2, 5.2.5).
pub const SECTOR_SIZE: u64 = 512;
/// How long a taken lock is asked for. Where one who held it looked at the disk
/// and forked just then, as a daemon does that starts VMs, the child has the
/// lock until it calls `execve`.
const FORKED_WAIT: Duration = Duration::from_secs(1);

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// Opening failed.
    #[error("disk '{}' cannot be opened: check that it exists and is {}", path.display(), if *readonly { "readable" } else { "writable, or set readonly = true" })]
    Open {
        /// Which disk.
        path: PathBuf,
        /// How it was asked for.
        readonly: bool,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Neither a regular file nor a block device.
    #[error("disk '{}' is neither a file nor a block device", .0.display())]
    Kind(PathBuf),
    /// Another VM, or any other process that locks, has it.
    #[error("disk '{}' is in use by another VM or process: stop that first, or give this VM its own disk", .0.display())]
    Busy(PathBuf),
    /// Locking failed for another reason.
    #[error("disk '{}' cannot be locked", path.display())]
    Lock {
        /// Which disk.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Not a whole number of sectors, or none.
    #[error("disk '{}' has {bytes} bytes: make it a multiple of 512 that is not 0 (truncate -s)", path.display())]
    Size {
        /// Which disk.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// Open, but nobody can open it again.
    #[error("disk '{}' was removed or renamed under its running VM, which could not be resumed with it: put it back, or shut the VM down instead", .0.display())]
    Gone(PathBuf),
    /// What would be opened is not what is open.
    #[error("disk '{}' was replaced under its running VM, which uses the one that was there before and could not be resumed with this one: put that back, or shut the VM down instead", .0.display())]
    Replaced(PathBuf),
    /// An image, or what is behind it.
    #[error("disk '{}' cannot be used as qcow2: {trouble}", path.display())]
    Image {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        trouble: ImageTrouble,
    },
    /// It is to stay as it is, and is opened to be written to.
    #[error("disk '{}' has snapshot = true, and nothing over it: hebe puts an image over it when it boots the VM", .0.display())]
    Bare(PathBuf),
    /// An image can lie over a file alone.
    #[error("disk '{}' is a block device: snapshot = true needs a file, such as a copy of it", .0.display())]
    NoFile(PathBuf),
    /// A name that no image can hold.
    #[error("disk '{}' cannot have snapshot = true: its path is longer than the 1023 bytes that an image has for it, or is no text", .0.display())]
    Name(PathBuf),
    /// The image over a disk cannot be made.
    #[error("the image {} for what is written cannot be made: check the space and the rights there", path.display())]
    Make {
        /// Where it would be.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Its end was cut off.
    #[error("disk '{}' became smaller under its running VM, which could not be resumed with it: give it its size back, or shut the VM down instead", .0.display())]
    Shrunk(PathBuf),
}

/// An open, locked disk.
#[derive(Debug)]
pub struct BlockBackend {
    pub(crate) file: File,
    path: PathBuf,
    /// The directory that `path` lies in, where it could be opened.
    place: Option<Arc<OwnedFd>>,
    sectors: u64,
    readonly: bool,
    /// Which block device it is; `None` for a file.
    device: Option<DiskIdentityV2>,
    /// Written since the last flush that succeeded.
    dirty: AtomicBool,
    /// Written since the last [`BlockBackend::settle`] that succeeded.
    unsettled: AtomicBool,
    /// Held while flushing: a flush that finds nothing to do must not return
    /// before one that is under way has made it so. Holds why a flush failed,
    /// for all that share the open file: the lost writes are lost for each.
    flushing: Arc<Mutex<Option<io::ErrorKind>>>,
    /// Length of the file at the last settling: whoever makes it longer
    /// changes its time, too. 0 before that, and for a device.
    settled_len: AtomicU64,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    /// The file is a part of a chain, whose length says nothing of the disk.
    in_chain: bool,
    /// What is in the file, where the disk is not the file itself.
    chain: Option<Arc<Chain>>,
    /// Its reads that are under way, if it has a ring for them.
    pub(crate) reads: Option<Arc<Reads>>,
}

/// An image that is open, with what is behind it.
#[derive(Debug)]
struct Chain {
    image: Image,
    /// Open and locked, to be read alone; the nearest first.
    behind: Vec<BlockBackend>,
}

impl BlockBackend {
    /// Opens and locks the disk of a definition: a raw one as
    /// [`BlockBackend::open`], or an image and every file behind it that the
    /// definition names.
    ///
    /// # Errors
    /// As [`BlockBackend::open`]; [`BlockError::Image`]; [`BlockError::Bare`].
    pub fn of(disk: &DiskConfig) -> Result<Self, BlockError> {
        if disk.snapshot {
            return Err(BlockError::Bare(disk.path.clone()));
        }
        match disk.format {
            DiskFormat::Raw => Self::open(&disk.path, disk.readonly),
            DiskFormat::Qcow2 => Self::open_image(&disk.path, disk.readonly, &disk.backing),
        }
    }

    /// An image's file, or a file behind one, for itself.
    fn open_link(path: &Path, readonly: bool) -> Result<Self, BlockError> {
        let (file, metadata) = open_file(path, readonly)?;
        if !metadata.is_file() {
            return Err(BlockError::Kind(path.to_owned()));
        }
        let mut backend = Self::around(file, &metadata, path, readonly, 0);
        backend.in_chain = true;
        Ok(backend)
    }

    fn open_image(path: &Path, readonly: bool, backing: &[PathBuf]) -> Result<Self, BlockError> {
        let (mut top, behind, links, size) = Self::open_chain(path, readonly, backing)?;
        let image = Image::open(links, readonly).map_err(|t| top.trouble(t))?;
        top.sectors = size / SECTOR_SIZE;
        top.chain = Some(Arc::new(Chain { image, behind }));
        Ok(top)
    }

    /// Opens and locks the files of a definition's disk, and gives the disk's
    /// size in bytes. Of an image nothing but headers is looked at.
    pub(crate) fn look_at(disk: &DiskConfig) -> Result<(Vec<Self>, u64), BlockError> {
        if disk.format == DiskFormat::Raw {
            let raw = Self::open(&disk.path, disk.readonly)?;
            let size = raw.sectors * SECTOR_SIZE;
            return Ok((vec![raw], size));
        }
        let (top, mut files, _, size) = Self::open_chain(&disk.path, disk.readonly, &disk.backing)?;
        files.push(top);
        Ok((files, size))
    }

    /// An image, what is behind it, all of them in order, and the size in bytes
    /// of the disk that they are.
    fn open_chain(
        path: &Path,
        readonly: bool,
        backing: &[PathBuf],
    ) -> Result<(Self, Vec<Self>, Vec<Link>, u64), BlockError> {
        let top = Self::open_link(path, readonly)?;
        let behind = backing.iter().map(|file| Self::open_link(file, true));
        let behind = behind.collect::<Result<Vec<Self>, _>>()?;
        let mut links = Vec::new();
        let mut size = 0;
        let mut raw = false;
        for (depth, link) in std::iter::once(&top).chain(&behind).enumerate() {
            let trouble = |trouble| link.trouble(trouble);
            let wanted = match raw {
                true => None,
                false => {
                    let needs = needs(&link.file).map_err(trouble)?;
                    size = if depth == 0 { needs.size } else { size };
                    needs.backing
                }
            };
            let file = link.file.try_clone();
            links.push(Link {
                file: file.map_err(|e| trouble(ImageTrouble::Refused(e)))?,
                path: link.path.clone(),
                raw,
            });
            match (wanted, depth < behind.len()) {
                (None, false) => {}
                (None, true) => return Err(trouble(ImageTrouble::NoBacking)),
                (Some((name, _)), false) => {
                    return Err(trouble(ImageTrouble::BackingUnnamed(name)));
                }
                (Some((_, format)), true) => match format.as_deref() {
                    Some("raw") => raw = true,
                    Some("qcow2") => {}
                    _ => return Err(trouble(ImageTrouble::BackingFormat)),
                },
            }
        }
        Ok((top, behind, links, size))
    }

    fn trouble(&self, trouble: ImageTrouble) -> BlockError {
        BlockError::Image {
            path: self.path.clone(),
            trouble,
        }
    }

    /// Opens and locks a raw file or block device. The size is taken once,
    /// here; a size that is 0 or no multiple of 512 is refused rather than
    /// rounded, because rounding hides a tail or invents one.
    pub fn open(path: &Path, readonly: bool) -> Result<Self, BlockError> {
        let (file, metadata) = open_file(path, readonly)?;
        let sectors = sectors(&file, path, readonly)?;
        Ok(Self::around(file, &metadata, path, readonly, sectors))
    }

    fn around(file: File, metadata: &Metadata, path: &Path, readonly: bool, sectors: u64) -> Self {
        Self {
            file,
            path: path.to_owned(),
            place: directory_of(path).map(Arc::new),
            sectors,
            readonly,
            device: identity::of_device(metadata, Path::new(identity::SYSFS)),
            dirty: AtomicBool::new(false),
            unsettled: AtomicBool::new(false),
            flushing: Arc::default(),
            settled_len: AtomicU64::new(0),
            bytes_read: AtomicU64::new(0),
            bytes_written: AtomicU64::new(0),
            in_chain: false,
            chain: None,
            reads: None,
        }
    }

    /// The same open disk once more, with the size that it has now: for a VM
    /// that is built again. The two share one lock; only one may be used.
    pub fn again(&self) -> Result<Self, BlockError> {
        let open_error = |source| BlockError::Open {
            path: self.path.clone(),
            readonly: self.readonly,
            source,
        };
        let file = self.file.try_clone().map_err(open_error)?;
        let sectors = match self.in_chain {
            true => self.sectors,
            false => sectors(&file, &self.path, self.readonly)?,
        };
        Ok(Self {
            in_chain: self.in_chain,
            chain: self.chain.clone(),
            reads: self.reads.clone(),
            file,
            path: self.path.clone(),
            place: self.place.clone(),
            sectors,
            readonly: self.readonly,
            device: self.device.clone(),
            // The other one may have left writes behind.
            dirty: AtomicBool::new(!self.readonly),
            unsettled: AtomicBool::new(!self.readonly),
            flushing: self.flushing.clone(),
            settled_len: AtomicU64::new(0),
            bytes_read: AtomicU64::new(0),
            bytes_written: AtomicU64::new(0),
        })
    }

    /// The disk as a guest knows it that saw it with so many `sectors`: one
    /// that has grown since shows no more of itself.
    pub fn as_known(mut self, sectors: u64) -> Self {
        self.sectors = self.sectors.min(sectors);
        self
    }

    /// Whether this disk is what would be found at its path, and is still as
    /// large: what is suspended can be resumed with that alone. Where the
    /// path cannot be looked at, the disk counts as found.
    ///
    /// # Errors
    /// [`BlockError::Gone`], [`BlockError::Replaced`], [`BlockError::Shrunk`],
    /// [`BlockError::Size`]; [`BlockError::Open`] if the system says nothing.
    pub fn check_found_again(&self) -> Result<(), BlockError> {
        let behind = self.chain.iter().flat_map(|chain| &chain.behind);
        behind.into_iter().try_for_each(Self::check_found_again)?;
        if !self.in_chain && sectors(&self.file, &self.path, self.readonly)? < self.sectors {
            return Err(BlockError::Shrunk(self.path.clone()));
        }
        let open = self.file.metadata().map_err(|source| BlockError::Open {
            path: self.path.clone(),
            readonly: self.readonly,
            source,
        })?;
        let is_device = open.file_type().is_block_device();
        match fs::metadata(&self.path) {
            // A device has as many nodes as somebody makes.
            Ok(there) if is_device => {
                let same = there.file_type().is_block_device() && there.rdev() == open.rdev();
                same.then_some(())
            }
            Ok(there) => ((there.dev(), there.ino()) == (open.dev(), open.ino())).then_some(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound && self.root_was_emptied() => {
                self.is_in_its_place(&open)?.then_some(())
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound || (!is_device && open.nlink() == 0) => {
                return Err(BlockError::Gone(self.path.clone()));
            }
            Err(_) => Some(()),
        }
        .ok_or_else(|| BlockError::Replaced(self.path.clone()))
    }

    /// Whether this process knows the root directory that an initramfs had:
    /// once the host's root took over (`switch_root(8)`), nothing is under
    /// that, not even the first directory of a path. That one is nobody's to
    /// rename, unlike those below it.
    fn root_was_emptied(&self) -> bool {
        let mut parts = self.path.components();
        let (Some(Component::RootDir), Some(first)) = (parts.next(), parts.next()) else {
            return false;
        };
        let top = Path::new("/").join(first);
        fs::metadata(top).is_err_and(|e| e.kind() == io::ErrorKind::NotFound)
    }

    /// Whether the disk has its name in the directory that it was opened in,
    /// wherever that is mounted now.
    fn is_in_its_place(&self, open: &Metadata) -> Result<bool, BlockError> {
        let gone = || BlockError::Gone(self.path.clone());
        let (Some(place), Some(name)) = (&self.place, self.path.file_name()) else {
            return Err(gone());
        };
        let there = rustix::fs::statat(&**place, name, AtFlags::empty()).map_err(|_| gone())?;
        if open.file_type().is_block_device() {
            let kind = rustix::fs::FileType::from_raw_mode(there.st_mode);
            return Ok(kind.is_block_device() && there.st_rdev == open.rdev());
        }
        Ok((there.st_dev, there.st_ino) == (open.dev(), open.ino()))
    }

    /// Capacity in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Opened for reading only.
    pub fn readonly(&self) -> bool {
        self.readonly
    }

    /// Where the disk lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Which disk it is, as it is now. Means something once it is settled and
    /// nobody writes. What a block device is was read when it was opened.
    pub fn identity(&self) -> io::Result<DiskIdentityV2> {
        if let Some(chain) = &self.chain {
            let files = std::iter::once(self).chain(&chain.behind);
            let link = |at: &Self| Ok(identity::link(&at.file.metadata()?));
            let files = files.map(link).collect::<io::Result<_>>()?;
            return Ok(DiskIdentityV2::Chain { files });
        }
        match &self.device {
            Some(device) => Ok(device.clone()),
            None => Ok(identity::of_file(&self.file.metadata()?)),
        }
    }

    /// Fills `data` from byte `offset` on. An error of kind `InvalidInput`
    /// if that reaches beyond the disk.
    pub fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        self.check(data.len(), offset)?;
        match &self.chain {
            Some(chain) => chain.image.read_at(data, offset)?,
            None => self.file.read_exact_at(data, offset)?,
        }
        self.count_read(data.len());
        Ok(())
    }

    pub(crate) fn count_read(&self, bytes: usize) {
        self.bytes_read.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Whether the disk is one file as it is, and no image.
    pub(crate) fn is_plain(&self) -> bool {
        !self.in_chain
    }

    /// Writes `data` to byte `offset` on. The bytes are durable after the
    /// next [`BlockBackend::flush`]. An error of kind `InvalidInput` if that
    /// reaches beyond the disk, of kind `PermissionDenied` if it is read-only.
    pub fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.check(data.len(), offset)?;
        self.check_writable()?;
        self.change(|file| match &self.chain {
            Some(chain) => chain.image.write_at(data, offset),
            None => file.write_all_at(data, offset),
        })?;
        self.bytes_written
            .fetch_add(data.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Changes the disk, and marks it as written to *after* that, even if it
    /// failed: a flush on another thread that began before the change must not
    /// clear the mark that stands for it.
    fn change(&self, how: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
        let result = how(&self.file);
        self.dirty.store(true, Ordering::Release);
        self.unsettled.store(true, Ordering::Release);
        result
    }

    /// Makes everything written so far durable (fdatasync). Nothing to do
    /// when nothing was written since the last time. A failure stays: the
    /// kernel reports lost writes once, and drops them.
    pub fn flush(&self) -> io::Result<()> {
        self.sync(false)
    }

    /// [`BlockBackend::flush`], and makes the time of the last write durable,
    /// too (fsync): by that the disk is known again, see
    /// [`BlockBackend::identity`].
    pub fn settle(&self) -> io::Result<()> {
        self.sync(true)
    }

    fn sync(&self, all: bool) -> io::Result<()> {
        let mut failed = self.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kind) = *failed {
            return Err(kind.into());
        }
        let grown = all && {
            let len = self.file.metadata()?.len();
            self.settled_len.swap(len, Ordering::AcqRel) != len
        };
        let unsettled = all && (self.unsettled.swap(false, Ordering::AcqRel) || grown);
        let dirty = self.dirty.swap(false, Ordering::AcqRel);
        if !unsettled && !dirty {
            return Ok(());
        }
        // What an image holds back is written first, by which it grows.
        let written = self.chain.as_ref().map_or(Ok(()), |c| c.image.flush());
        let result = written.and_then(|()| match unsettled {
            true => self.file.sync_all(),
            false => self.file.sync_data(),
        });
        result.inspect_err(|error| {
            self.dirty.store(true, Ordering::Release);
            self.unsettled.store(true, Ordering::Release);
            *failed = Some(error.kind());
        })
    }

    /// Gives `len` bytes from `offset` on back to the host; they read as
    /// zero afterwards. `Unsupported` where the host cannot.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.discard_by(offset, len, |file| match &self.chain {
            Some(chain) => chain.image.zero(offset, len),
            None => clear::discard(file, offset, len),
        })
    }

    /// Makes `len` bytes from `offset` on read as zeros, and gives them back
    /// to the host if it can and `may_give_back`. Without that the room stays
    /// the disk's, except in an image, which notes zeros without room.
    pub fn write_zeroes(&self, offset: u64, len: u64, may_give_back: bool) -> io::Result<()> {
        self.discard_by(offset, len, |file| match &self.chain {
            Some(chain) => chain.image.zero(offset, len),
            None => clear::zero(file, offset, len, may_give_back),
        })
    }

    fn discard_by(
        &self,
        offset: u64,
        len: u64,
        punch: impl FnOnce(&File) -> io::Result<()>,
    ) -> io::Result<()> {
        let size = usize::try_from(len).map_err(|_| beyond())?;
        self.check(size, offset)?;
        self.check_writable()?;
        if len == 0 {
            return Ok(());
        }
        self.change(punch)
    }

    /// Bytes read since it was opened.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    /// Bytes written since it was opened.
    pub fn bytes_written(&self) -> u64 {
        self.bytes_written.load(Ordering::Relaxed)
    }

    pub(crate) fn check(&self, len: usize, offset: u64) -> io::Result<()> {
        match offset.checked_add(len as u64) {
            Some(end) if end <= self.sectors * SECTOR_SIZE => Ok(()),
            _ => Err(beyond()),
        }
    }

    fn check_writable(&self) -> io::Result<()> {
        if self.readonly {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        Ok(())
    }
}

fn open_file(path: &Path, readonly: bool) -> Result<(File, Metadata), BlockError> {
    let open_error = |source| BlockError::Open {
        path: path.to_owned(),
        readonly,
        source,
    };
    let file = OpenOptions::new()
        .read(true)
        .write(!readonly)
        // A FIFO must be refused, not waited for.
        .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open(path)
        .map_err(open_error)?;
    let metadata = file.metadata().map_err(open_error)?;
    let kind = metadata.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(BlockError::Kind(path.to_owned()));
    }
    lock(&file, path, readonly)?;
    Ok((file, metadata))
}

/// Opens the directory that `path` lies in, to look at names there alone.
fn directory_of(path: &Path) -> Option<OwnedFd> {
    let parent = path.parent().filter(|dir| !dir.as_os_str().is_empty());
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(parent.unwrap_or(Path::new(".")), flags, Mode::empty()).ok()
}

fn beyond() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "beyond the end of the disk")
}

/// Works for block devices too, whose metadata has no length.
fn sectors(mut file: &File, path: &Path, readonly: bool) -> Result<u64, BlockError> {
    let bytes = file
        .seek(SeekFrom::End(0))
        .map_err(|source| BlockError::Open {
            path: path.to_owned(),
            readonly,
            source,
        })?;
    if bytes == 0 || !bytes.is_multiple_of(SECTOR_SIZE) {
        return Err(BlockError::Size {
            path: path.to_owned(),
            bytes,
        });
    }
    Ok(bytes / SECTOR_SIZE)
}

fn lock(file: &File, path: &Path, readonly: bool) -> Result<(), BlockError> {
    let how = if readonly {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    let deadline = Instant::now() + FORKED_WAIT;
    loop {
        return match rustix::fs::flock(file, how) {
            Ok(()) => Ok(()),
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => {
                thread::sleep(FORKED_WAIT / 500);
                continue;
            }
            Err(Errno::INTR) => continue,
            Err(Errno::WOULDBLOCK) => Err(BlockError::Busy(path.to_owned())),
            Err(errno) => Err(BlockError::Lock {
                path: path.to_owned(),
                source: errno.into(),
            }),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DiskChange, disk_change};

    #[test]
    fn a_disk_once_more_shares_the_lock_and_has_the_size_of_now() {
        let file = disk(1024);
        let first = BlockBackend::open(file.path(), false).expect("open");
        file.as_file().set_len(2048).expect("grow");
        let again = first.again().expect("again");
        assert_eq!((first.sectors(), again.sectors()), (2, 4));
        drop(first);
        let busy = BlockBackend::open(file.path(), false);
        assert!(matches!(busy, Err(BlockError::Busy(_))), "{busy:?}");
        file.as_file().set_len(0).expect("shrink");
        assert!(matches!(again.again(), Err(BlockError::Size { .. })));
    }

    fn disk(bytes: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().expect("temporary file");
        file.as_file().set_len(bytes).expect("set length");
        file
    }

    #[test]
    fn what_is_written_is_read_and_counted() {
        let file = disk(4096);
        let disk = BlockBackend::open(file.path(), false).expect("open");
        assert_eq!(disk.sectors(), 8);
        disk.write_at(b"hello", 510).expect("write");
        disk.flush().expect("flush");
        let mut back = [0; 5];
        disk.read_at(&mut back, 510).expect("read");
        assert_eq!(&back, b"hello");
        assert_eq!((disk.bytes_read(), disk.bytes_written()), (5, 5));
    }

    #[test]
    fn a_flush_in_the_midst_of_a_discard_does_not_hide_it_from_the_next_one() {
        let file = disk(4096);
        let disk = BlockBackend::open(file.path(), false).expect("open");
        disk.discard_by(0, 512, |_| disk.flush()).expect("discard");
        assert!(disk.dirty.load(Ordering::Acquire));
        disk.flush().expect("flush");
        disk.write_at(&[7; 512], 512).expect("write");
        match disk.discard(512, 512) {
            Ok(()) => {
                let mut back = [1; 512];
                disk.read_at(&mut back, 512).expect("read");
                assert_eq!(back, [0; 512]);
            }
            Err(e) => assert_eq!(e.kind(), io::ErrorKind::Unsupported),
        }
    }

    #[test]
    fn a_disk_is_known_again_until_somebody_writes_to_it_or_replaces_it() {
        let file = disk(4096);
        let open = || BlockBackend::open(file.path(), false).expect("open");
        let disk = open();
        disk.write_at(&[1; 512], 0).expect("write");
        disk.settle().expect("settle");
        let saved = disk.identity().expect("identity");
        drop(disk);
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(file.path(), mode).expect("chmod");
        let disk = open();
        disk.read_at(&mut [0; 512], 0).expect("read");
        disk.settle().expect("settle");
        let now = disk.identity().expect("identity");
        assert_eq!(disk_change(&saved, &now), None);
        // File systems may count time in ticks.
        let change = || disk_change(&saved, &disk.identity().expect("identity"));
        let until = Instant::now() + Duration::from_secs(120);
        while change().is_none() {
            assert!(Instant::now() < until, "a write does not show");
            disk.write_at(&[1; 512], 0).expect("write");
        }
        assert_eq!(change(), Some(DiskChange::Written));
        drop(disk);
        // The same bytes and the same time, but another file.
        let copy = file.path().with_extension("copy");
        std::fs::copy(file.path(), &copy).expect("copy");
        let time = file.as_file().metadata().expect("metadata").modified();
        let time = std::fs::FileTimes::new().set_modified(time.expect("time"));
        File::options()
            .write(true)
            .open(&copy)
            .and_then(|copy| copy.set_times(time))
            .expect("time");
        std::fs::rename(&copy, file.path()).expect("rename");
        let now = open().identity().expect("identity");
        assert_eq!(disk_change(&saved, &now), Some(DiskChange::OtherFile));
    }

    #[test]
    fn what_was_flushed_is_settled_all_the_same() {
        let file = disk(4096);
        let disk = BlockBackend::open(file.path(), false).expect("open");
        let marks = || {
            let load = |mark: &AtomicBool| mark.load(Ordering::Acquire);
            (load(&disk.dirty), load(&disk.unsettled))
        };
        disk.write_at(&[1; 512], 0).expect("write");
        assert_eq!(marks(), (true, true));
        disk.flush().expect("flush");
        assert_eq!(marks(), (false, true), "the time is not on disk yet");
        disk.settle().expect("settle");
        assert_eq!(marks(), (false, false));
    }

    #[test]
    fn nothing_beyond_the_end_is_touched() {
        let file = disk(1024);
        let disk = BlockBackend::open(file.path(), false).expect("open");
        for (len, offset) in [(1, 1024), (2, 1023), (1, u64::MAX), (1025, 0)] {
            let mut data = vec![0; len];
            assert!(disk.read_at(&mut data, offset).is_err());
            assert!(disk.write_at(&data, offset).is_err());
        }
        assert_eq!(file.as_file().metadata().expect("metadata").len(), 1024);
    }

    #[test]
    fn a_disk_that_a_resume_would_not_find_is_told_while_it_is_open() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("disk.img");
        let (other, link) = (dir.path().join("other"), dir.path().join("link"));
        for file in [&path, &other] {
            fs::write(file, [0; 1024]).expect("write");
        }
        std::os::unix::fs::symlink(&path, &link).expect("link");
        let disk = BlockBackend::open(&link, false).expect("open");
        disk.check_found_again().expect("it is there");
        disk.file.set_len(512).expect("shrink");
        let check = || disk.check_found_again().expect_err("not found again");
        assert!(matches!(check(), BlockError::Shrunk(_)));
        disk.file.set_len(2049).expect("a tail");
        assert!(matches!(check(), BlockError::Size { bytes: 2049, .. }));
        disk.file.set_len(2048).expect("grow");
        disk.check_found_again().expect("a larger one will do");
        let moved = dir.path().join("moved");
        fs::rename(&path, &moved).expect("rename");
        assert!(matches!(check(), BlockError::Gone(_)));
        fs::rename(&other, &path).expect("rename over");
        assert!(matches!(check(), BlockError::Replaced(_)));
        fs::rename(&moved, &path).expect("back");
        disk.check_found_again().expect("back again");
        fs::remove_file(&path).expect("remove");
        assert!(matches!(check(), BlockError::Gone(_)));
    }

    #[test]
    fn a_failed_flush_stays_failed_for_the_same_disk_once_more() {
        let file = disk(1024);
        let first = BlockBackend::open(file.path(), false).expect("open");
        let again = first.again().expect("again");
        *first.flushing.lock().expect("lock") = Some(io::ErrorKind::StorageFull);
        for disk in [again, first.again().expect("again")] {
            let kind = disk.flush().expect_err("lost writes stay lost").kind();
            assert_eq!(kind, io::ErrorKind::StorageFull);
        }
    }

    #[test]
    fn a_disk_that_grew_shows_what_was_known_of_it() {
        let file = disk(2048);
        let disk = BlockBackend::open(file.path(), false).expect("open");
        let disk = disk.as_known(2);
        assert_eq!(disk.sectors(), 2);
        assert!(disk.read_at(&mut [0; 512], 1024).is_err());
        assert_eq!(disk.again().expect("again").sectors(), 4);
    }

    #[test]
    fn two_writers_or_a_writer_and_a_reader_are_refused_but_readers_share() {
        let file = disk(512);
        let busy = |readonly| {
            matches!(
                BlockBackend::open(file.path(), readonly),
                Err(BlockError::Busy(_))
            )
        };
        let writer = BlockBackend::open(file.path(), false).expect("writer");
        assert!(busy(false) && busy(true));
        drop(writer);
        let readers = [true, true].map(|r| BlockBackend::open(file.path(), r).expect("reader"));
        assert!(busy(false));
        drop(readers);
        assert!(!busy(false));
    }

    #[test]
    fn a_disk_that_a_forked_child_still_has_for_an_instant_is_waited_for() {
        let file = disk(512);
        let of_child = OpenOptions::new().write(true).open(file.path());
        let of_child = of_child.expect("open");
        rustix::fs::flock(&of_child, FlockOperation::NonBlockingLockExclusive).expect("free");
        let child = thread::spawn(move || {
            thread::sleep(FORKED_WAIT / 50);
            drop(of_child);
        });
        BlockBackend::open(file.path(), false).expect("waited for");
        child.join().expect("join");
    }

    #[test]
    fn bad_disks_are_refused_with_a_sentence() {
        for bytes in [0, 511, 513] {
            let file = disk(bytes);
            let refused = BlockBackend::open(file.path(), false)
                .expect_err("size")
                .to_string();
            assert!(refused.contains(&format!("{bytes} bytes")), "{refused}");
        }
        let folder = tempfile::tempdir().expect("folder");
        assert!(matches!(
            BlockBackend::open(folder.path(), true),
            Err(BlockError::Kind(_))
        ));
        let missing = BlockBackend::open(&folder.path().join("none"), true).expect_err("missing");
        assert!(missing.to_string().contains("cannot be opened"));
    }

    #[test]
    fn a_read_only_disk_is_not_written() {
        let file = disk(512);
        let disk = BlockBackend::open(file.path(), true).expect("open");
        let refused = disk.write_at(&[1], 0).expect_err("read-only");
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
        disk.flush().expect("nothing to flush");
    }
}
